//! The control interface: `tidemark.capture.v1.Capture`.

mod coherence;
mod rollback;
mod scrub;
mod shown;
mod snapshots;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use tidemark_block::BlockSize;
use tidemark_identity::Caller;
use tidemark_proto::{
    Reason, RpcError,
    capture::v1::{
        self as pb, capture_server::Capture, trigger_interval_response::Message as TriggerMessage,
    },
    convert::WireError,
};
use tidemark_telemetry::about_volume;
use tidemark_tls::caller;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::{
    config::EngineSetting,
    front::FrontEnds,
    registry::{AddVolume, Registry},
    uplink::{blocking, shutting_down, stopped},
    volume::Volume,
};

/// How often the progress of an interval is told.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);
/// Messages of a stream that wait for their reader.
const AHEAD: usize = 4;

/// The service behind the interface.
#[derive(Debug, Clone)]
pub(crate) struct CaptureService {
    registry: Arc<Registry>,
    fronts: FrontEnds,
    stop: watch::Receiver<bool>,
    /// For those who read a snapshot.
    reads: Arc<Semaphore>,
}

type Reply<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl CaptureService {
    pub(crate) fn new(
        registry: Arc<Registry>,
        fronts: FrontEnds,
        stop: watch::Receiver<bool>,
    ) -> Self {
        Self {
            registry,
            fronts,
            stop,
            reads: Arc::new(Semaphore::new(snapshots::READS_MAX)),
        }
    }

    fn stopping(&self) -> Result<(), RpcError> {
        if *self.stop.borrow() {
            Err(shutting_down())
        } else {
            Ok(())
        }
    }

    /// The volume of this name or UUID, where the caller's roles hold for it.
    fn find(&self, caller: &Caller, name: &str) -> Result<Arc<Volume>, RpcError> {
        let volume = self.registry.find(name)?;
        self.need(caller, &volume.record.name)?;
        about_volume(&volume.record.name);
        Ok(volume)
    }

    fn need(&self, caller: &Caller, volume: &str) -> Result<(), RpcError> {
        Ok(caller.need(&self.registry.config().source_name, volume)?)
    }

    /// The status, with the volumes that the caller may see.
    async fn status(&self, caller: &Caller) -> Result<pb::CaptureStatus, RpcError> {
        let (shown, caller) = (self.clone(), caller.clone());
        blocking(move || Ok(shown.shown_status(&caller)))
            .await
            .map_err(|error| RpcError::internal(format!("{error:#}")))
    }

    async fn volume(&self, name: &str) -> Result<pb::Volume, RpcError> {
        let volume = self.registry.find(name)?;
        let shown = self.clone();
        blocking(move || Ok(shown.shown_volume(&volume)))
            .await
            .map_err(|error| RpcError::internal(format!("{error:#}")))
    }
}

/// The engine that a request asks for; none where it names none.
fn engine_setting(text: &str) -> Result<Option<EngineSetting>, RpcError> {
    if text.is_empty() {
        return Ok(None);
    }
    let unknown = || {
        RpcError::new(
            Reason::RequestInvalid,
            format!("there is no engine {text:?}"),
            "name auto, intercept or reflink",
        )
    };
    EngineSetting::named(text).map(Some).ok_or_else(unknown)
}

#[tonic::async_trait]
impl Capture for CaptureService {
    async fn add_volume(&self, request: Request<pb::AddVolumeRequest>) -> Reply<pb::Volume> {
        let caller = caller(request.extensions());
        let request = request.into_inner();
        self.need(&caller, &request.name)?;
        let block_size = match request.block_size {
            0 => BlockSize::MIN,
            bytes => BlockSize::new(bytes).map_err(WireError::from)?,
        };
        let add = AddVolume {
            name: request.name,
            file: request.file.into(),
            length: (request.length > 0).then_some(request.length),
            block_size,
            engine: engine_setting(&request.engine)?,
        };
        // On a task of its own: a caller who hangs up doesn't leave half of it.
        let registry = Arc::clone(&self.registry);
        let added = tokio::spawn(async move { registry.add(add).await });
        let volume = added
            .await
            .map_err(|error| RpcError::internal(format!("add the volume: {error}")))??;
        Ok(Response::new(
            self.volume(&volume.record.id.to_string()).await?,
        ))
    }

    async fn list_volumes(
        &self,
        request: Request<pb::ListVolumesRequest>,
    ) -> Reply<pb::ListVolumesResponse> {
        let caller = caller(request.extensions());
        let volumes = self.status(&caller).await?.volumes;
        Ok(Response::new(pb::ListVolumesResponse { volumes }))
    }

    async fn get_volume(&self, request: Request<pb::GetVolumeRequest>) -> Reply<pb::Volume> {
        let caller = caller(request.extensions());
        let id = self.find(&caller, &request.into_inner().volume)?.record.id;
        Ok(Response::new(self.volume(&id.to_string()).await?))
    }

    async fn remove_volume(
        &self,
        request: Request<pb::RemoveVolumeRequest>,
    ) -> Reply<pb::RemoveVolumeResponse> {
        self.stopping()?;
        let caller = caller(request.extensions());
        let pb::RemoveVolumeRequest { volume, force } = request.into_inner();
        self.find(&caller, &volume)?;
        let (registry, fronts) = (Arc::clone(&self.registry), self.fronts.clone());
        let removed = tokio::spawn(async move { registry.remove(&volume, force, &fronts).await });
        let left = removed
            .await
            .map_err(|error| RpcError::internal(format!("remove the volume: {error}")))??;
        Ok(Response::new(pb::RemoveVolumeResponse {
            left_behind: left.map_or_else(String::new, |path| path.display().to_string()),
        }))
    }

    async fn readopt_volume(
        &self,
        request: Request<pb::ReadoptVolumeRequest>,
    ) -> Reply<pb::Volume> {
        let caller = caller(request.extensions());
        let pb::ReadoptVolumeRequest {
            volume: name,
            engine,
        } = request.into_inner();
        let engine = engine_setting(&engine)?;
        let id = self.find(&caller, &name)?.record.id.to_string();
        // On a task of its own: a caller who hangs up doesn't leave half of it.
        let (registry, readopted) = (Arc::clone(&self.registry), id.clone());
        let fronts = self.fronts.clone();
        let done = tokio::spawn(async move { registry.readopt(&readopted, engine, &fronts).await });
        done.await
            .map_err(|error| RpcError::internal(format!("readopt the volume: {error}")))??;
        Ok(Response::new(self.volume(&id).await?))
    }

    async fn create_snapshot(
        &self,
        request: Request<pb::CreateSnapshotRequest>,
    ) -> Reply<pb::Snapshot> {
        self.stopping()?;
        let caller = caller(request.extensions());
        let pb::CreateSnapshotRequest { volume, label, now } = request.into_inner();
        self.find(&caller, &volume)?;
        let mut taken = self.take_snapshots(&[volume], label, now).await?;
        let taken = taken
            .pop()
            .ok_or_else(|| RpcError::internal("no snapshot"))?;
        Ok(Response::new(taken))
    }

    async fn create_snapshots(
        &self,
        request: Request<pb::CreateSnapshotsRequest>,
    ) -> Reply<pb::CreateSnapshotsResponse> {
        self.stopping()?;
        let caller = caller(request.extensions());
        let pb::CreateSnapshotsRequest {
            volumes,
            label,
            now,
        } = request.into_inner();
        for volume in &volumes {
            self.find(&caller, volume)?;
        }
        let snapshots = self.take_snapshots(&volumes, label, now).await?;
        Ok(Response::new(pb::CreateSnapshotsResponse { snapshots }))
    }

    async fn list_snapshots(
        &self,
        request: Request<pb::ListSnapshotsRequest>,
    ) -> Reply<pb::ListSnapshotsResponse> {
        let caller = caller(request.extensions());
        let volume = request.into_inner().volume;
        self.find(&caller, &volume)?;
        let snapshots = self.snapshots(&volume).await?;
        Ok(Response::new(pb::ListSnapshotsResponse { snapshots }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<pb::DeleteSnapshotRequest>,
    ) -> Reply<pb::DeleteSnapshotResponse> {
        let caller = caller(request.extensions());
        let pb::DeleteSnapshotRequest { volume, snapshot } = request.into_inner();
        self.find(&caller, &volume)?;
        self.drop_snapshot(&volume, snapshot).await?;
        Ok(Response::new(pb::DeleteSnapshotResponse {}))
    }

    type ReadSnapshotStream = Streamed<pb::ReadSnapshotResponse>;

    async fn read_snapshot(
        &self,
        request: Request<pb::ReadSnapshotRequest>,
    ) -> Reply<Self::ReadSnapshotStream> {
        self.stopping()?;
        let caller = caller(request.extensions());
        let request = request.into_inner();
        self.find(&caller, &request.volume)?;
        Ok(Response::new(self.stream_snapshot(request).await?))
    }

    type RollbackVolumeStream = Streamed<pb::RollbackVolumeResponse>;

    async fn rollback_volume(
        &self,
        request: Request<pb::RollbackVolumeRequest>,
    ) -> Reply<Self::RollbackVolumeStream> {
        self.stopping()?;
        let caller = caller(request.extensions());
        let request = request.into_inner();
        self.find(&caller, &request.volume)?;
        Ok(Response::new(self.stream_rollback(request)?))
    }

    type TriggerIntervalStream = Streamed<pb::TriggerIntervalResponse>;

    async fn trigger_interval(
        &self,
        request: Request<pb::TriggerIntervalRequest>,
    ) -> Reply<Self::TriggerIntervalStream> {
        let caller = caller(request.extensions());
        let volume = self.find(&caller, &request.into_inner().volume)?;
        let serving = volume.need()?;
        let mut receipt = serving.uplink.request().await?;
        let mut status = serving.uplink.status();
        // The stream must not keep a removed volume alive.
        drop(serving);
        let (sender, receiver) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            let progress = |status: &mut watch::Receiver<_>| {
                let shown = shown::uplink(&status.borrow_and_update());
                pb::TriggerIntervalResponse {
                    message: Some(TriggerMessage::Progress(shown)),
                }
            };
            let mut last = None;
            let end = loop {
                let now = progress(&mut status);
                if last.as_ref() != Some(&now) {
                    if sender.send(Ok(now.clone())).await.is_err() {
                        return;
                    }
                    last = Some(now);
                }
                tokio::select! {
                    end = &mut receipt => break end,
                    () = sender.closed() => return,
                    () = tokio::time::sleep(PROGRESS_PERIOD) => {}
                }
            };
            let end = end.unwrap_or_else(|_| Err(shutting_down()));
            let message = match end {
                Ok(receipt) => Ok(pb::TriggerIntervalResponse {
                    message: Some(TriggerMessage::Receipt(receipt.into())),
                }),
                Err(error) => Err(Status::from(error)),
            };
            // Whoever hung up doesn't want it.
            let _ = sender.send(message).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type ScrubVolumeStream = Streamed<pb::ScrubVolumeResponse>;

    async fn scrub_volume(
        &self,
        request: Request<pb::ScrubVolumeRequest>,
    ) -> Reply<Self::ScrubVolumeStream> {
        self.stopping()?;
        let caller = caller(request.extensions());
        let volume = self.find(&caller, &request.into_inner().volume)?;
        let serving = volume.need()?;
        Ok(Response::new(scrub::stream(&serving)))
    }

    async fn get_status(&self, request: Request<pb::GetStatusRequest>) -> Reply<pb::CaptureStatus> {
        let caller = caller(request.extensions());
        Ok(Response::new(self.status(&caller).await?))
    }

    type WatchStatusStream = Streamed<pb::CaptureStatus>;

    async fn watch_status(
        &self,
        request: Request<pb::WatchStatusRequest>,
    ) -> Reply<Self::WatchStatusStream> {
        let caller = caller(request.extensions());
        let period = match request.into_inner().period_min_ms {
            0 => 1000,
            ms if ms < 100 => {
                return Err(RpcError::invalid("period_min_ms is below 100").into());
            }
            ms => ms,
        };
        let (sender, receiver) = mpsc::channel(1);
        let service = self.clone();
        tokio::spawn(async move {
            let mut last = None;
            let mut stop = service.stop.clone();
            loop {
                match service.status(&caller).await {
                    Ok(now) => {
                        if last.as_ref() != Some(&now) {
                            if sender.send(Ok(now.clone())).await.is_err() {
                                return;
                            }
                            last = Some(now);
                        }
                    }
                    Err(error) => {
                        let _ = sender.send(Err(error.into())).await;
                        return;
                    }
                }
                tokio::select! {
                    () = stopped(&mut stop) => {
                        let _ = sender.send(Err(shutting_down().into())).await;
                        return;
                    }
                    () = sender.closed() => return,
                    () = tokio::time::sleep(Duration::from_millis(u64::from(period))) => {}
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
