//! Services that are made up: they stream an image as told, right or wrong.

use std::{net::SocketAddr, pin::Pin, sync::Arc};

use bytes::Bytes;
use futures::Stream;
use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, CodecChoice, Extent, FrameEncoder, Geometry, ImageDigest,
    MemoryTable, block_checksum, image_digest,
};
use tidemark_proto::{
    Reason, RpcError,
    capture::v1::{
        self as capture,
        capture_server::{Capture, CaptureServer},
    },
    common::v1 as common,
    vault::v1::{
        self as vault,
        vault_server::{Vault, VaultServer},
    },
};
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

pub(crate) const BLOCK: usize = 4096;

/// One message of the stream.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Encoded frames.
    Frames(Bytes),
    /// The last message, with this many blocks.
    End(u64),
    /// The call fails.
    Fail,
    /// Nothing more ever comes.
    Hang,
}

/// What a service streams.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub geometry: Geometry,
    pub digest: Vec<u8>,
    pub steps: Vec<Step>,
}

impl Script {
    /// Streams this image as it is, a batch per frame.
    pub(crate) fn of(image: &[u8]) -> Self {
        let geometry = geometry(image.len());
        let mut encoder = FrameEncoder::new(geometry);
        let mut steps = Vec::new();
        let mut blocks = 0;
        for (n, chunk) in image.chunks(64 * BLOCK).enumerate() {
            let (data, zeros): (Vec<_>, Vec<_>) = chunk
                .chunks(BLOCK)
                .enumerate()
                .map(|(m, bytes)| (BlockIndex::new((n * 64 + m) as u64), bytes))
                .partition(|(_, bytes)| bytes.iter().any(|&b| b != 0));
            let mut frames = Vec::new();
            if !data.is_empty() {
                let sums: Vec<_> = data.iter().map(|(i, b)| (*i, block_checksum(b))).collect();
                let bytes = data.iter().map(|(_, b)| *b).collect::<Vec<_>>().concat();
                encoder.encode_data(&sums, &bytes, CodecChoice::Zstd(1), &mut frames);
                blocks += data.len() as u64;
            } else if !zeros.is_empty() {
                let extent = Extent::new(zeros[0].0, BlockCount::new(zeros.len() as u64));
                encoder.encode_zero(&[extent], &mut frames);
                blocks += zeros.len() as u64;
            }
            steps.push(Step::Frames(frames.into()));
        }
        steps.push(Step::End(blocks));
        Self {
            geometry,
            digest: digest(image).as_bytes().to_vec(),
            steps,
        }
    }
}

pub(crate) fn geometry(length: usize) -> Geometry {
    Geometry::new(length as u64, BlockSize::MIN).unwrap()
}

pub(crate) fn digest(image: &[u8]) -> ImageDigest {
    let Ok(digest) = image_digest(&MemoryTable::of_image(geometry(image.len()), image));
    digest
}

/// Some data, some holes, an odd number of leaves.
pub(crate) fn image() -> Vec<u8> {
    let mut image = vec![0; 3000 * BLOCK];
    for block in (0..3000).filter(|b| b % 7 == 1 || (500..600).contains(b)) {
        let at = block * BLOCK;
        image[at..at + BLOCK].fill(u8::try_from(block % 251).unwrap() | 1);
        image[at..at + 8].copy_from_slice(&(block as u64).to_le_bytes());
    }
    image
}

/// Runs until it is dropped.
pub(crate) struct Fake {
    addr: SocketAddr,
    _stop: oneshot::Sender<()>,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub(crate) fn serve(script: Script) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (stop, stopped) = oneshot::channel();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let addr = listener.local_addr().unwrap();
        let service = Arc::new(Service(script));
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(VaultServer::from_arc(Arc::clone(&service)))
                .add_service(CaptureServer::from_arc(service))
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
                    let _ = stopped.await;
                }),
        );
        Self {
            addr,
            _stop: stop,
            _runtime: runtime,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

struct Service(Script);

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    fn stream<T: Send + 'static>(
        &self,
        header: T,
        convert: impl Fn(&Script, Step) -> Option<T> + Send + 'static,
    ) -> Streamed<T> {
        let script = self.0.clone();
        Box::pin(futures::stream::unfold(
            (Some(header), script, 0),
            move |(mut header, script, at)| {
                let header = header.take();
                let step = script.steps.get(at).cloned();
                let message = match (header, step) {
                    (Some(header), _) => Some((Ok(header), at)),
                    (None, None) => None,
                    (None, Some(Step::Fail)) => Some((
                        Err(RpcError::new(Reason::StoreCorrupt, "segment 7 is corrupt", "").into()),
                        at + 1,
                    )),
                    (None, Some(step)) => Some((
                        convert(&script, step).ok_or(Status::aborted("hang")),
                        at + 1,
                    )),
                };
                async move {
                    match message {
                        None => None,
                        Some((Err(status), _)) if status.message() == "hang" => {
                            futures::future::pending().await
                        }
                        Some((message, at)) => Some((message, (None, script, at))),
                    }
                }
            },
        ))
    }

    fn shape(&self) -> Option<common::Geometry> {
        Some(common::Geometry {
            length: self.0.geometry.length(),
            block_size: self.0.geometry.block_size().get(),
        })
    }
}

fn none<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not made up"))
}

#[tonic::async_trait]
impl Vault for Service {
    type RestoreStream = Streamed<vault::RestoreResponse>;

    async fn list_volumes(
        &self,
        _: Request<vault::ListVolumesRequest>,
    ) -> Result<Response<vault::ListVolumesResponse>, Status> {
        none()
    }

    async fn list_generations(
        &self,
        _: Request<vault::ListGenerationsRequest>,
    ) -> Result<Response<vault::ListGenerationsResponse>, Status> {
        none()
    }

    async fn get_generation(
        &self,
        request: Request<vault::GetGenerationRequest>,
    ) -> Result<Response<vault::Generation>, Status> {
        let request = request.into_inner();
        Err(RpcError::new(
            Reason::GenerationNotFound,
            format!(
                "{} has no generation {}",
                request.volume, request.generation
            ),
            "list those that are retained",
        )
        .into())
    }

    async fn restore(
        &self,
        _: Request<vault::RestoreRequest>,
    ) -> Result<Response<Self::RestoreStream>, Status> {
        let message = |message| vault::RestoreResponse {
            message: Some(message),
        };
        let header = message(vault::restore_response::Message::Header(
            vault::RestoreHeader {
                volume_id: vec![1; 16].into(),
                generation: Some(vault::Generation {
                    generation: 7,
                    image_digest: self.0.digest.clone().into(),
                    geometry: self.shape(),
                    ..vault::Generation::default()
                }),
            },
        ));
        Ok(Response::new(self.stream(header, move |_, step| {
            Some(message(match step {
                Step::Frames(frames) => {
                    vault::restore_response::Message::Frames(vault::FrameBatch {
                        end_block: 0,
                        frames,
                    })
                }
                Step::End(blocks_sent) => {
                    vault::restore_response::Message::End(vault::RestoreEnd { blocks_sent })
                }
                Step::Fail | Step::Hang => return None,
            }))
        })))
    }

    async fn maintain(
        &self,
        _: Request<vault::MaintainRequest>,
    ) -> Result<Response<vault::MaintainResponse>, Status> {
        none()
    }

    type ScrubStream = Streamed<vault::ScrubResponse>;

    async fn scrub(
        &self,
        _: Request<vault::ScrubRequest>,
    ) -> Result<Response<Self::ScrubStream>, Status> {
        none()
    }

    async fn get_status(
        &self,
        _: Request<vault::GetStatusRequest>,
    ) -> Result<Response<vault::VaultStatus>, Status> {
        Ok(Response::new(vault::VaultStatus {
            version: "0.1.0".into(),
            volumes: Vec::new(),
        }))
    }
}

#[tonic::async_trait]
impl Capture for Service {
    type ReadSnapshotStream = Streamed<capture::ReadSnapshotResponse>;
    type TriggerIntervalStream = Streamed<capture::TriggerIntervalResponse>;
    type WatchStatusStream = Streamed<capture::CaptureStatus>;

    async fn add_volume(
        &self,
        _: Request<capture::AddVolumeRequest>,
    ) -> Result<Response<capture::Volume>, Status> {
        none()
    }

    async fn list_volumes(
        &self,
        _: Request<capture::ListVolumesRequest>,
    ) -> Result<Response<capture::ListVolumesResponse>, Status> {
        Ok(Response::new(capture::ListVolumesResponse::default()))
    }

    async fn get_volume(
        &self,
        request: Request<capture::GetVolumeRequest>,
    ) -> Result<Response<capture::Volume>, Status> {
        Err(RpcError::new(
            Reason::VolumeNotFound,
            format!("there is no volume \"{}\"", request.into_inner().volume),
            "list those there are",
        )
        .into())
    }

    async fn remove_volume(
        &self,
        _: Request<capture::RemoveVolumeRequest>,
    ) -> Result<Response<capture::RemoveVolumeResponse>, Status> {
        none()
    }

    async fn readopt_volume(
        &self,
        _: Request<capture::ReadoptVolumeRequest>,
    ) -> Result<Response<capture::Volume>, Status> {
        none()
    }

    async fn create_snapshot(
        &self,
        _: Request<capture::CreateSnapshotRequest>,
    ) -> Result<Response<capture::Snapshot>, Status> {
        none()
    }

    async fn create_snapshots(
        &self,
        _: Request<capture::CreateSnapshotsRequest>,
    ) -> Result<Response<capture::CreateSnapshotsResponse>, Status> {
        none()
    }

    async fn list_snapshots(
        &self,
        _: Request<capture::ListSnapshotsRequest>,
    ) -> Result<Response<capture::ListSnapshotsResponse>, Status> {
        none()
    }

    async fn delete_snapshot(
        &self,
        _: Request<capture::DeleteSnapshotRequest>,
    ) -> Result<Response<capture::DeleteSnapshotResponse>, Status> {
        none()
    }

    async fn read_snapshot(
        &self,
        request: Request<capture::ReadSnapshotRequest>,
    ) -> Result<Response<Self::ReadSnapshotStream>, Status> {
        let whole = request.into_inner().since_snapshot == 0;
        let message = |message| capture::ReadSnapshotResponse {
            message: Some(message),
        };
        let header = message(capture::read_snapshot_response::Message::Header(
            capture::Snapshot {
                snapshot: 4,
                geometry: self.shape(),
                ..capture::Snapshot::default()
            },
        ));
        Ok(Response::new(self.stream(header, move |script, step| {
            Some(message(match step {
                Step::Frames(frames) => capture::read_snapshot_response::Message::Frames(frames),
                Step::End(blocks_sent) => {
                    capture::read_snapshot_response::Message::End(capture::ReadSnapshotEnd {
                        blocks_sent,
                        image_digest: if whole {
                            script.digest.clone().into()
                        } else {
                            Bytes::new()
                        },
                    })
                }
                Step::Fail | Step::Hang => return None,
            }))
        })))
    }

    type ScrubVolumeStream = Streamed<capture::ScrubVolumeResponse>;

    async fn scrub_volume(
        &self,
        _: Request<capture::ScrubVolumeRequest>,
    ) -> Result<Response<Self::ScrubVolumeStream>, Status> {
        none()
    }

    type RollbackVolumeStream = Streamed<capture::RollbackVolumeResponse>;

    async fn rollback_volume(
        &self,
        _: Request<capture::RollbackVolumeRequest>,
    ) -> Result<Response<Self::RollbackVolumeStream>, Status> {
        none()
    }

    async fn trigger_interval(
        &self,
        _: Request<capture::TriggerIntervalRequest>,
    ) -> Result<Response<Self::TriggerIntervalStream>, Status> {
        Ok(Response::new(Box::pin(futures::stream::empty())))
    }

    async fn get_status(
        &self,
        _: Request<capture::GetStatusRequest>,
    ) -> Result<Response<capture::CaptureStatus>, Status> {
        Ok(Response::new(capture::CaptureStatus {
            version: "0.1.0".into(),
            ..capture::CaptureStatus::default()
        }))
    }

    async fn watch_status(
        &self,
        _: Request<capture::WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        none()
    }
}
