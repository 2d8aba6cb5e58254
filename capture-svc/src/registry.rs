//! The volumes of a service: adding, removing, finding, opening and retrying them.
//!
//! Each volume has a directory `<state>/volumes/<uuid>`. Its record is written last and removed first; while it is added or
//! removed the directory has a mark, so that one that is half done is deleted at the start, and one whose record was lost
//! is not. A volume that can't be opened is listed with its problem and tried again; it doesn't stop the others.

mod add;
mod choose;
mod readopt;
mod rollback;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use futures::{StreamExt, stream};
use parking_lot::RwLock;
use tidemark_block::{BlockSize, Geometry, VolumeId};
use tidemark_disk::{FileLock, durable};
use tidemark_export::{ExportRegistry, RegistryError, ScratchRoom};
use tidemark_proto::{Reason, RpcError};
use tokio::sync::{Mutex, watch};

pub(crate) use add::AddVolume;

use crate::{
    config::Config,
    engine::{Engine, EngineError, EngineKind},
    front::FrontEnds,
    quiesce::agents::Agents,
    uplink::{blocking, group::AllGroups, shutting_down},
    volume::{Ready, Serving, Shared, Volume, VolumeRecord},
};

/// Volumes opened at a time.
const OPENING_AT_ONCE: usize = 8;
/// How long a forced removal waits for clients to be gone.
const DISCONNECT_MAX: Duration = Duration::from_secs(5);

/// All volumes.
#[derive(Debug)]
pub(crate) struct Registry {
    shared: Shared,
    volumes: RwLock<BTreeMap<VolumeId, Arc<Volume>>>,
    /// One change of the set at a time.
    change: Mutex<()>,
    _lock: FileLock,
}

impl Registry {
    /// Takes the state directory, clears what was left half done, and opens every volume.
    pub(crate) async fn open(
        config: Arc<Config>,
        stop: watch::Receiver<bool>,
    ) -> Result<Arc<Self>> {
        let state = config.state.clone();
        let (lock, found) = blocking(move || {
            durable::create_dir(&volumes_dir(&state))
                .with_context(|| format!("create the state directory {}", state.display()))?;
            let lock = FileLock::of_dir(&state)?;
            Ok((lock, scan(&volumes_dir(&state))?))
        })
        .await?;
        let shared = Shared {
            groups: AllGroups::new(&config.groups),
            exports: Arc::new(ExportRegistry::new()),
            agents: Arc::default(),
            scratch_room: Arc::new(ScratchRoom::new(
                config.state.clone(),
                config.scratch_bytes_max.get(),
            )),
            config,
            stop,
        };
        for volume in &found {
            shared.groups.know(&volume.record.name);
        }
        let registry = Arc::new(Self {
            volumes: RwLock::new(
                found
                    .into_iter()
                    .map(|v| (v.record.id, Arc::new(v)))
                    .collect(),
            ),
            shared,
            change: Mutex::new(()),
            _lock: lock,
        });
        registry.try_failed().await;
        Ok(registry)
    }

    /// Agents that are attached.
    pub(crate) const fn agents(&self) -> &Arc<Agents> {
        &self.shared.agents
    }

    /// The volumes that clients may ask for.
    pub(crate) const fn exports(&self) -> &Arc<ExportRegistry> {
        &self.shared.exports
    }

    /// What the service was told.
    pub(crate) fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Every volume, by name.
    pub(crate) fn list(&self) -> Vec<Arc<Volume>> {
        let mut all: Vec<_> = self.volumes.read().values().cloned().collect();
        all.sort_by(|a, b| a.record.name.cmp(&b.record.name));
        all
    }

    /// The volume with this name or UUID.
    pub(crate) fn find(&self, text: &str) -> Result<Arc<Volume>, RpcError> {
        let volumes = self.volumes.read();
        let by_id = text
            .parse::<VolumeId>()
            .ok()
            .and_then(|id| volumes.get(&id));
        by_id
            .or_else(|| volumes.values().find(|v| v.record.name == text))
            .cloned()
            .ok_or_else(|| {
                RpcError::new(
                    Reason::VolumeNotFound,
                    format!("there is no volume {text:?}"),
                    "list the volumes, or add it first",
                )
            })
    }

    /// Tries to open every volume that isn't served.
    pub(crate) async fn try_failed(&self) {
        let _change = self.change.lock().await;
        let failed: Vec<_> = self
            .list()
            .into_iter()
            .filter(|volume| volume.serving().is_err())
            .collect();
        stream::iter(failed)
            .for_each_concurrent(OPENING_AT_ONCE, |volume| async move {
                if *self.shared.stop.borrow() {
                    return;
                }
                if let Err(error) = self.try_open(&volume, false).await {
                    volume.set_problem(format!("{error:#}"));
                }
            })
            .await;
    }

    /// Opens a volume and serves it.
    async fn try_open(&self, volume: &Arc<Volume>, readopt: bool) -> Result<()> {
        let (config, tried) = (Arc::clone(&self.shared.config), Arc::clone(volume));
        let opened = blocking(move || {
            // Read again: it is what was damaged, perhaps.
            let record = read_record(&tried.dir, tried.record.id)?
                .with_context(|| record_is_missing(&tried.dir))?;
            let ready = Ready::open(&record, &tried.dir, &config, readopt)?;
            Ok((record, ready))
        });
        let (record, ready) = opened.await?;
        if record == volume.record {
            return volume.serve(ready, &self.shared).await;
        }
        let known = Arc::new(Volume::failed(
            record,
            volume.dir.clone(),
            "it is being opened",
        ));
        self.volumes
            .write()
            .insert(known.record.id, Arc::clone(&known));
        known.serve(ready, &self.shared).await
    }

    /// Stops protecting a volume. Its file stays; so does the directory of clones that is given, which isn't there to be
    /// removed.
    pub(crate) async fn remove(
        &self,
        text: &str,
        force: bool,
        fronts: &FrontEnds,
    ) -> Result<Option<PathBuf>, RpcError> {
        let _change = self.change.lock().await;
        let volume = self.find(text)?;
        let name = &volume.record.name;
        let (dir, id) = (volume.dir.clone(), volume.record.id);
        let left = blocking(move || Ok(Engine::out_of_reach(&dir, id)));
        let left = left.await.map_err(|e| local(&e))?;
        if let Some(clones) = left.as_deref().filter(|_| !force) {
            return Err(RpcError::new(
                Reason::VolumeFailed,
                format!(
                    "the clones of volume {name} are not there to be removed: {}",
                    clones.display()
                ),
                "mount their filesystem and try again, or use force, which leaves them behind",
            ));
        }
        if let Ok(serving) = volume.serving() {
            let engine = Arc::clone(&serving.engine);
            let counted = blocking(move || Ok(engine.list_snapshots().len()));
            let snapshots = counted.await.map_err(|e| local(&e))?;
            if !force && snapshots > 0 {
                return Err(in_use(format!(
                    "volume {name} has {snapshots} open snapshots"
                )));
            }
            self.unexport(&serving, force, fronts).await?;
        }
        let dir = volume.dir.clone();
        let removed = blocking(move || remove_record(&dir).context("remove the volume record"));
        if let Err(error) = removed.await {
            self.keep(&volume).await;
            return Err(local(&error));
        }
        self.volumes.write().remove(&volume.record.id);
        let ended = volume.end("the volume was removed").await;
        self.shared.groups.forget(name);
        if let Err(error) = ended {
            tracing::warn!(volume = %name, error = %format!("{error:#}"), "close a removed volume");
        }
        let dir = volume.dir.clone();
        let cleaned = blocking(move || remove_state(&dir, id).context("remove the volume's state"));
        if let Err(error) = cleaned.await {
            tracing::warn!(volume = %name, error = %format!("{error:#}"), "the next start removes the rest");
        }
        tracing::info!(volume = %name, %id, "removed");
        if let Some(clones) = &left {
            tracing::warn!(volume = %name, path = %clones.display(), "the clones of a removed volume are left behind: delete them once their filesystem is mounted");
        }
        Ok(left)
    }

    /// Serves a volume on whose removal failed.
    async fn keep(&self, volume: &Arc<Volume>) {
        let Ok(serving) = volume.serving() else {
            return;
        };
        let kept = Arc::clone(volume);
        let recorded = blocking(move || {
            if VolumeRecord::load(&kept.dir)?.is_none() {
                // Gone, but perhaps not durably.
                kept.record.store(&kept.dir)?;
            }
            unmark(&kept.dir);
            Ok(())
        });
        if let Err(error) = recorded.await {
            tracing::error!(volume = %volume.record.name, error = %format!("{error:#}"), "record a volume whose removal failed");
        }
        if let Err(error) = serving.export_again(&self.shared.exports) {
            tracing::error!(volume = %volume.record.name, %error, "export a volume whose removal failed");
        }
    }

    async fn unexport(
        &self,
        serving: &Serving,
        force: bool,
        fronts: &FrontEnds,
    ) -> Result<(), RpcError> {
        let name = serving.export_name();
        let deadline = tokio::time::Instant::now() + DISCONNECT_MAX;
        loop {
            match self.shared.exports.remove(name) {
                Ok(_) | Err(RegistryError::Unknown(_)) => return Ok(()),
                Err(RegistryError::InUse { clients, .. }) => {
                    if !force || tokio::time::Instant::now() > deadline {
                        return Err(in_use(format!("volume {name} has {clients} clients")));
                    }
                    fronts.disconnect(name);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(RpcError::internal(error.to_string())),
            }
        }
    }

    /// Closes every volume. Clients are gone already.
    pub(crate) async fn close(&self) -> Result<()> {
        let _change = self.change.lock().await;
        let ends = self
            .list()
            .into_iter()
            .map(|volume| async move { volume.end("the service is stopping").await });
        let results = futures::future::join_all(ends).await;
        results.into_iter().collect()
    }

    fn stopping(&self) -> Result<(), RpcError> {
        if *self.shared.stop.borrow() {
            Err(shutting_down())
        } else {
            Ok(())
        }
    }
}

fn volumes_dir(state: &Path) -> PathBuf {
    state.join("volumes")
}

fn in_use(message: String) -> RpcError {
    RpcError::new(
        Reason::VolumeInUse,
        message,
        "disconnect them and delete the snapshots first, or force it",
    )
}

/// A failure of this machine's files.
pub(crate) fn local(error: &anyhow::Error) -> RpcError {
    match error.downcast_ref::<EngineError>() {
        Some(engine) => engine_error(engine),
        None => RpcError::new(
            Reason::IoFailed,
            format!("{error:#}"),
            "check the disk of the state directory and the log",
        ),
    }
}

/// What a failed call of the engine is to a caller. The engine's messages say what to do.
pub(crate) fn engine_error(error: &EngineError) -> RpcError {
    let reason = match error {
        EngineError::VolumeMissing { .. }
        | EngineError::VolumeLength { .. }
        | EngineError::NotAFile { .. }
        | EngineError::VolumeReadOnly { .. }
        | EngineError::VolumeUnreadable { .. } => Reason::VolumeFileInvalid,
        EngineError::NotClonable { .. }
        | EngineError::CutStalls { .. }
        | EngineError::NoClones { .. }
        | EngineError::NotScannable { .. }
        | EngineError::NoSnapshots
        | EngineError::NotTogether => Reason::EngineUnsupported,
        EngineError::CloneNoRoom { .. } => Reason::StoreFull,
        EngineError::VolumeLocked { .. } => Reason::VolumeFileInUse,
        EngineError::NoSuchSnapshot(_) => Reason::SnapshotNotFound,
        EngineError::GivenUp(_) => Reason::SnapshotLost,
        EngineError::TooManySnapshots(_) => Reason::SnapshotLimit,
        EngineError::LabelTooLong(_)
        | EngineError::SnapshotOrder { .. }
        | EngineError::OutOfRange => Reason::RequestInvalid,
        EngineError::Poisoned
        | EngineError::Closed
        | EngineError::VolumeReplaced { .. }
        | EngineError::StateLocked { .. }
        | EngineError::OtherVolume { .. }
        | EngineError::OtherGeometry { .. }
        | EngineError::StateMissing { .. }
        | EngineError::StateExists { .. }
        | EngineError::StateDamaged { .. }
        | EngineError::StateLost { .. } => Reason::VolumeFailed,
        EngineError::Unsteady { .. } => Reason::NotQuiesced,
        EngineError::NoBase => Reason::Busy,
        EngineError::SpoolDamaged { .. } | EngineError::Table(_) | EngineError::Io { .. } => {
            Reason::IoFailed
        }
        EngineError::IntervalOpen(_) | EngineError::NoInterval(_) | EngineError::Abandoned => {
            Reason::Internal
        }
    };
    let text = error.to_string();
    // "what happened: what to do"; what an input or output error says has no second part.
    match text.rsplit_once(": ") {
        Some((message, action)) if !matches!(reason, Reason::IoFailed | Reason::Internal) => {
            RpcError::new(reason, message, action)
        }
        _ => RpcError::new(reason, text, "check the disk and the service's log"),
    }
}

/// Finds the volumes of a state directory and deletes what is half done.
fn scan(dir: &Path) -> Result<Vec<Volume>> {
    let mut found = Vec::new();
    let what = || format!("list the volumes in {}", dir.display());
    for entry in std::fs::read_dir(dir).with_context(what)? {
        let path = entry.with_context(what)?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("");
        if name.ends_with(durable::TEMPORARY_SUFFIX) {
            remove_directory(&path);
            continue;
        }
        let Ok(id) = name.parse::<VolumeId>() else {
            tracing::warn!(path = %path.display(), "this is no volume's state; it is left alone");
            continue;
        };
        let kept = EngineKind::ALL
            .iter()
            .any(|kind| Engine::has_state(*kind, &path));
        let half_done = mark_in(&path).exists() || !kept;
        match read_record(&path, id) {
            Ok(Some(record)) => {
                unmark(&path);
                sweep(&record, &path);
                found.push(Volume::failed(record, path, "it has not been opened yet"));
            }
            Ok(None) if half_done => remove_half_done(&path, id),
            Ok(None) => {
                let problem = record_is_missing(&path);
                tracing::error!(volume = %id, problem, "a volume's record was lost");
                found.push(unreadable(id, path, problem));
            }
            Err(error) => found.push(unreadable(id, path, format!("{error:#}"))),
        }
    }
    Ok(found)
}

fn record_is_missing(dir: &Path) -> String {
    format!(
        "its record {} is missing: put the file back, or remove the volume and add it again; its generations stay",
        VolumeRecord::path_in(dir).display()
    )
}

/// What a directory has while its volume is being added or removed.
fn mark_in(dir: &Path) -> PathBuf {
    dir.join("unfinished")
}

/// Takes the mark off. One that stays is no harm while there is a record.
fn unmark(dir: &Path) {
    if let Err(error) = durable::remove_file(&mark_in(dir)) {
        tracing::warn!(path = %dir.display(), %error, "remove the mark of a volume that was being added or removed");
    }
}

/// Removes a volume's record: from now on the rest may be deleted.
fn remove_record(dir: &Path) -> std::io::Result<()> {
    let record = VolumeRecord::path_in(dir);
    if let (true, Err(error)) = (record.exists(), durable::write_file(&mark_in(dir), &[])) {
        // What would be left after a crash is listed, and can be removed once more.
        tracing::warn!(path = %dir.display(), %error, "mark a volume that is being removed");
    }
    durable::remove_file(&record)
}

/// The record in a volume's state directory, if it is that volume's; none where there is none.
fn read_record(dir: &Path, id: VolumeId) -> Result<Option<VolumeRecord>> {
    let record = VolumeRecord::load(dir)
        .context("remove the volume and add it again; its generations stay")?;
    if let Some(record) = record.as_ref().filter(|record| record.id != id) {
        anyhow::bail!(
            "its state directory holds the record of volume {}: put the directory back under that name, or remove \
             this volume and add it again",
            record.id
        );
    }
    Ok(record)
}

/// A volume whose record can't be read, so that it is listed, and can be removed.
fn unreadable(id: VolumeId, dir: PathBuf, problem: String) -> Volume {
    let one_block = Geometry::new(u64::from(BlockSize::MIN.get()), BlockSize::MIN);
    let record = VolumeRecord {
        id,
        name: id.to_string(),
        file: PathBuf::new(),
        geometry: one_block
            .unwrap_or_else(|_| unreachable!("one block of the least size is a volume")),
        engine: EngineKind::Intercept,
        engine_why: String::new(),
    };
    Volume::failed(record, dir, problem)
}

/// Removes everything that is kept of a volume, wherever it lies.
fn remove_state(dir: &Path, id: VolumeId) -> std::io::Result<()> {
    for kind in EngineKind::ALL {
        Engine::remove_state(kind, dir, id)?;
    }
    durable::remove_dir(dir)
}

/// Removes what an engine that the volume no longer has, or never came to have, has left.
fn sweep(record: &VolumeRecord, dir: &Path) {
    for kind in EngineKind::ALL
        .into_iter()
        .filter(|kind| *kind != record.engine)
    {
        if let Err(error) = Engine::remove_state(kind, dir, record.id) {
            tracing::warn!(volume = %record.name, engine = %kind, %error, "remove what is left of another engine");
        }
    }
}

fn remove_half_done(path: &Path, id: VolumeId) {
    tracing::info!(path = %path.display(), "this volume was being added or removed; its rest is deleted");
    if let Err(error) = remove_state(path, id) {
        tracing::warn!(path = %path.display(), %error, "delete what is left of a volume");
    }
}

fn remove_directory(path: &Path) {
    tracing::info!(path = %path.display(), "this volume was being removed; its rest is deleted");
    if let Err(error) = durable::remove_dir(path) {
        tracing::warn!(path = %path.display(), %error, "delete what is left of a volume");
    }
}
