//! A capture service, a vault and, between them, a proxy that fails on demand.

use std::{
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use capture_svc::{
    Config, Running,
    config::{ByteSize, NbdListen, NbdListens, OptionalAddr, Span},
};
use tempfile::TempDir;
use tidemark_block::{
    BlockSize, FrameDecoder, Geometry, MemoryTable, Receipt, UnverifiedFrame, image_digest,
};
use tidemark_proto::{
    RpcError,
    capture::v1::{
        self as pb, capture_client::CaptureClient, read_snapshot_response,
        trigger_interval_response,
    },
    common::v1 as common,
    vault::v1::{self as vault, restore_response, vault_client::VaultClient},
};
use tidemark_telemetry::{Settings, Telemetry};
use tonic::transport::{Channel, Endpoint};

use crate::{nbd::Nbd, proxy::Proxy};

/// Longer than anything that a test waits for may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub(crate) dir: Arc<TempDir>,
    pub(crate) vault: Option<vault_svc::Running>,
    pub(crate) proxy: Proxy,
    pub(crate) capture: Option<Running>,
    pub(crate) config: Config,
}

/// Waits until `check` gives something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut check: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Where the state of a volume lies.
pub(crate) async fn state_dir(rig: &Rig, name: &str) -> PathBuf {
    let id = tidemark_proto::convert::volume_id(&rig.volume(name).await.volume_id).unwrap();
    rig.path("capture/volumes").join(id.to_string())
}

/// Whether an interval is open, by the record in a volume's state.
pub(crate) fn cut_is_open(state: &Path) -> bool {
    let volume = state
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let record = std::fs::read(state.join("interval")).unwrap();
    let any = Geometry::new(1 << 40, BlockSize::MIN).unwrap().all();
    capture_core::engine::records::decode_interval(&record, volume, any)
        .unwrap()
        .is_some()
}

async fn channel(address: SocketAddr) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    endpoint.connect().await.unwrap()
}

pub(crate) fn vault_config(dir: &Path) -> vault_svc::Config {
    vault_svc::Config {
        listen: ([127, 0, 0, 1], 0).into(),
        store_dir: dir.join("store"),
        state_dir: dir.join("vault-state"),
        reserve_bytes: vault_svc::config::ByteSize::mib(0),
        metrics_listen: OptionalAddr(Some(([127, 0, 0, 1], 0).into())),
        ..vault_svc::Config::default()
    }
}

pub(crate) fn capture_config(dir: &Path, vault: &str) -> Config {
    Config {
        state: dir.join("capture"),
        listen: ([127, 0, 0, 1], 0).into(),
        nbd: NbdListens(vec![NbdListen::Unix(dir.join("nbd.sock"))]),
        vault: vault.to_owned(),
        source_name: "test".to_owned(),
        interval_max: Span::from_secs(3600),
        lull_wait_max: Span::from_secs(0),
        spool_bytes_max: ByteSize::mib(64),
        backoff_min: Span::from_millis(20),
        backoff_max: Span::from_millis(200),
        scrub_period: Span::from_secs(0),
        retry_period: Span::from_millis(100),
        metrics_listen: OptionalAddr(Some(([127, 0, 0, 1], 0).into())),
        ..Config::default()
    }
}

impl Rig {
    /// Everything up, with an empty vault.
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// As [`Self::new`], with changes to the configuration.
    pub(crate) async fn with(change: impl FnOnce(&mut Config)) -> Self {
        // RUST_LOG=info shows what the services say.
        if let Ok(filter) = std::env::var("RUST_LOG") {
            static TOLD: OnceLock<Telemetry> = OnceLock::new();
            TOLD.get_or_init(|| {
                tidemark_telemetry::init(Settings::plain("test", &filter)).unwrap()
            });
        }
        let dir = tempfile::tempdir().unwrap();
        let vault = vault_svc::start(vault_config(dir.path())).await.unwrap();
        let proxy = Proxy::start(vault.listen_addr).await;
        let mut config = capture_config(dir.path(), &proxy.url());
        change(&mut config);
        let capture = capture_svc::start(config.clone()).await.unwrap();
        Self {
            dir: Arc::new(dir),
            vault: Some(vault),
            proxy,
            capture: Some(capture),
            config,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) async fn client(&self) -> CaptureClient<Channel> {
        CaptureClient::new(channel(self.control_addr()).await).max_decoding_message_size(4 << 20)
    }

    pub(crate) async fn vault_client(&self) -> VaultClient<Channel> {
        let address = self.vault.as_ref().unwrap().listen_addr;
        VaultClient::new(channel(address).await).max_decoding_message_size(4 << 20)
    }

    pub(crate) fn control_addr(&self) -> SocketAddr {
        self.capture.as_ref().unwrap().control_addr()
    }

    pub(crate) async fn stop_capture(&mut self) {
        self.capture.take().unwrap().shutdown().await.unwrap();
    }

    pub(crate) async fn start_capture(&mut self) {
        // Connections of the last one, in this same process, may hold its state for a moment longer.
        let started = eventually("the state is let go of", || async {
            match capture_svc::start(self.config.clone()).await {
                Err(error) if format!("{error:#}").contains("is in use by another process") => None,
                started => Some(started),
            }
        });
        self.capture = Some(started.await.unwrap());
    }

    pub(crate) async fn restart_vault(&mut self) {
        self.proxy.set_target(None);
        self.vault.take().unwrap().shutdown().await.unwrap();
        let vault = vault_svc::start(vault_config(self.dir.path()))
            .await
            .unwrap();
        self.proxy.set_target(Some(vault.listen_addr));
        self.vault = Some(vault);
    }

    /// Adds a volume, and waits for its first generation: all zeroes.
    pub(crate) async fn add(&self, name: &str, blocks: u64) -> pb::Volume {
        let file = self.path(&format!("{name}.img"));
        let volume = self.try_add(name, &file, blocks * 4096, 0).await.unwrap();
        self.first_generation(name).await;
        volume
    }

    pub(crate) async fn first_generation(&self, name: &str) {
        eventually("the first generation", || async {
            (self.volume(name).await.base_generation == 1).then_some(())
        })
        .await;
    }

    pub(crate) async fn try_add(
        &self,
        name: &str,
        file: &Path,
        length: u64,
        block_size: u32,
    ) -> Result<pb::Volume, RpcError> {
        let request = pb::AddVolumeRequest {
            name: name.to_owned(),
            file: file.display().to_string(),
            length,
            block_size,
            ..pb::AddVolumeRequest::default()
        };
        let answer = self.client().await.add_volume(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(RpcError::from)
    }

    /// Adds a file with an engine; one that isn't there is made, with this length.
    pub(crate) async fn add_file(
        &self,
        name: &str,
        file: &Path,
        length: usize,
        engine: &str,
    ) -> Result<pb::Volume, RpcError> {
        let request = pb::AddVolumeRequest {
            name: name.to_owned(),
            file: file.display().to_string(),
            length: if file.exists() { 0 } else { length as u64 },
            engine: engine.to_owned(),
            ..pb::AddVolumeRequest::default()
        };
        let answer = self.client().await.add_volume(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(RpcError::from)
    }

    pub(crate) fn nbd(&self, name: &str) -> Nbd {
        Nbd::connect(&self.path("nbd.sock"), name).unwrap()
    }

    pub(crate) async fn volume(&self, name: &str) -> pb::Volume {
        let request = pb::GetVolumeRequest {
            volume: name.to_owned(),
        };
        self.client()
            .await
            .get_volume(request)
            .await
            .unwrap()
            .into_inner()
    }

    /// Cuts now, and waits for the receipt.
    pub(crate) async fn ship(&self, name: &str) -> Receipt {
        let shipped = tokio::time::timeout(PATIENCE, self.try_ship(name)).await;
        shipped.expect("a receipt in time").unwrap()
    }

    pub(crate) async fn try_ship(&self, name: &str) -> Result<Receipt, RpcError> {
        let request = pb::TriggerIntervalRequest {
            volume: name.to_owned(),
        };
        let mut answers = self
            .client()
            .await
            .trigger_interval(request)
            .await
            .map_err(RpcError::from)?
            .into_inner();
        while let Some(answer) = answers.message().await.map_err(RpcError::from)? {
            if let Some(trigger_interval_response::Message::Receipt(receipt)) = answer.message {
                return Ok(receipt.try_into().unwrap());
            }
        }
        panic!("the stream ended without a receipt");
    }

    /// A pass of the source scrub, by hand.
    pub(crate) async fn scrub(&self, name: &str) -> Result<pb::ScrubEnd, RpcError> {
        let request = pb::ScrubVolumeRequest {
            volume: name.to_owned(),
        };
        let answers = self.client().await.scrub_volume(request).await;
        let mut answers = answers.map_err(RpcError::from)?.into_inner();
        while let Some(answer) = answers.message().await.map_err(RpcError::from)? {
            if let Some(pb::scrub_volume_response::Message::End(end)) = answer.message {
                return Ok(end);
            }
        }
        panic!("the stream ended without its end");
    }

    /// Restores a generation; 0 is the newest. The digest of what was restored is checked.
    pub(crate) async fn restore(&self, name: &str, generation: u64) -> Vec<u8> {
        let request = vault::RestoreRequest {
            volume: name.to_owned(),
            generation,
        };
        let mut answers = self
            .vault_client()
            .await
            .restore(request)
            .await
            .unwrap()
            .into_inner();
        let mut image = Vec::new();
        let mut shape = None;
        let mut ended = false;
        while let Some(answer) = answers.message().await.unwrap() {
            match answer.message.unwrap() {
                restore_response::Message::Header(header) => {
                    let generation = header.generation.unwrap();
                    let geometry = Geometry::try_from(generation.geometry.unwrap()).unwrap();
                    image = vec![0; usize::try_from(geometry.length()).unwrap()];
                    shape = Some((geometry, generation.image_digest));
                }
                restore_response::Message::Frames(batch) => {
                    apply_frames(shape.as_ref().unwrap().0, &mut image, batch.frames);
                }
                restore_response::Message::End(_) => ended = true,
            }
        }
        assert!(ended, "the stream is whole");
        let (geometry, digest) = shape.unwrap();
        assert_eq!(digest_of(geometry, &image), digest);
        image
    }

    pub(crate) async fn generations(&self, name: &str) -> Vec<vault::Generation> {
        let request = vault::ListGenerationsRequest {
            volume: name.to_owned(),
        };
        self.vault_client()
            .await
            .list_generations(request)
            .await
            .unwrap()
            .into_inner()
            .generations
    }

    pub(crate) async fn snapshot(&self, name: &str, label: &str) -> pb::Snapshot {
        let request = pb::CreateSnapshotRequest {
            volume: name.to_owned(),
            label: label.to_owned(),
            now: false,
        };
        self.client()
            .await
            .create_snapshot(request)
            .await
            .unwrap()
            .into_inner()
    }

    /// Of several volumes at one instant; their numbers.
    pub(crate) async fn snapshots_together(&self, names: &[&str]) -> Result<Vec<u64>, RpcError> {
        let request = pb::CreateSnapshotsRequest {
            volumes: names.iter().map(|&name| name.to_owned()).collect(),
            label: String::new(),
            now: false,
        };
        let taken = self.client().await.create_snapshots(request).await?;
        let taken = taken.into_inner().snapshots;
        Ok(taken
            .into_iter()
            .map(|snapshot| snapshot.snapshot)
            .collect())
    }

    /// Reads a snapshot over `image`, which is that of `since`, or all zeroes.
    pub(crate) async fn read_snapshot(
        &self,
        name: &str,
        snapshot: u64,
        since_snapshot: u64,
        image: &mut [u8],
    ) -> Result<pb::ReadSnapshotEnd, RpcError> {
        let request = pb::ReadSnapshotRequest {
            volume: name.to_owned(),
            snapshot,
            since_snapshot,
        };
        let mut answers = self
            .client()
            .await
            .read_snapshot(request)
            .await
            .map_err(RpcError::from)?
            .into_inner();
        let mut geometry = None;
        while let Some(answer) = answers.message().await.map_err(RpcError::from)? {
            match answer.message.unwrap() {
                read_snapshot_response::Message::Header(header) => {
                    let shape: common::Geometry = header.geometry.unwrap();
                    geometry = Some(Geometry::try_from(shape).unwrap());
                }
                read_snapshot_response::Message::Frames(frames) => {
                    apply_frames(geometry.unwrap(), image, frames);
                }
                read_snapshot_response::Message::End(end) => {
                    if since_snapshot == 0 {
                        assert_eq!(digest_of(geometry.unwrap(), image), end.image_digest);
                    }
                    return Ok(end);
                }
            }
        }
        panic!("the stream ended without its end");
    }
}

pub(crate) fn apply_frames(geometry: Geometry, image: &mut [u8], mut frames: bytes::Bytes) {
    let mut decoder = FrameDecoder::new();
    while !frames.is_empty() {
        let (frame, rest) = UnverifiedFrame::split(frames).unwrap();
        frames = rest;
        let frame = frame.verify(geometry, &mut decoder).unwrap();
        for extent in frame.extents() {
            let at = usize::try_from(geometry.offset_of(extent.start()).get()).unwrap();
            let len = usize::try_from(geometry.bytes(extent.count())).unwrap();
            image[at..at + len].fill(0);
        }
        for block in frame.blocks() {
            let at = usize::try_from(geometry.offset_of(block.block()).get()).unwrap();
            image[at..at + block.bytes().len()].copy_from_slice(block.bytes());
        }
    }
}

fn digest_of(geometry: Geometry, image: &[u8]) -> bytes::Bytes {
    assert_eq!(geometry.block_size(), BlockSize::MIN);
    let Ok(digest) = image_digest(&MemoryTable::of_image(geometry, image));
    bytes::Bytes::copy_from_slice(digest.as_bytes())
}

/// Bytes that depend on the seed and on their place, and don't compress well.
/// Writes noise to a file, as a workload does that has it open.
pub(crate) fn write(file: &Path, seed: u64, at: u64, length: usize) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(&noise(seed, length), at).unwrap();
}

pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}
