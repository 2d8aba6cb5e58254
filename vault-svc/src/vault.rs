//! The vault: its volumes, and what is asked of them.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context, Result, bail};
use parking_lot::{Mutex as SyncMutex, RwLock};
use tidemark_block::{IntervalHeader, VolumeId};
use tidemark_disk::{durable, lock::FileLock, record};
use tidemark_identity::Caller;
use tidemark_proto::{
    Reason, RpcError,
    convert::{self, Head, TermGrant},
};
use tidemark_telemetry::{about_volume, step};
use tokio::sync::{Mutex, Notify};
use tracing::Instrument;
use vault_core::{
    manifest::{Manifest, StoreMarker, TermRequest, grant_term},
    reclaim::Policy,
};

use crate::{
    Config,
    cache::Cache,
    config::Settings,
    error::{no_volume, of_store, of_term},
    image::{FRAMES_BYTES_MAX, MAPS_BYTES_MAX},
    ship::{self, Begun, IngestLimits},
    store::{Reserve, Space, Store, VolumeStore},
    volume::{Shared, TableFiles, Volume, now_ms},
};

const STATE_MAGIC: [u8; 8] = *b"TMVSTATE";
const STATE_VERSION: u16 = 1;

/// An open vault.
#[derive(Debug)]
pub struct Vault {
    config: Config,
    policy: Policy,
    store: Store,
    shared: Arc<Shared>,
    limits: Arc<IngestLimits>,
    tables: TableFiles,
    volumes: RwLock<BTreeMap<VolumeId, Arc<Volume>>>,
    /// Volumes whose manifest can't be read, and why. They hold up no other.
    broken: RwLock<BTreeMap<VolumeId, RpcError>>,
    /// Held while a volume is made, so that it is made once.
    creating: Mutex<()>,
    pub(crate) reserve: Reserve,
    /// Of the file system that the store is on, as it was last looked at.
    space: SyncMutex<Option<Space>>,
    /// Something was committed, or the store is full: look after the volumes.
    pub(crate) wake: Notify,
    _state_lock: FileLock,
}

impl Vault {
    /// Opens the store and the state directory that `config` names, and every volume in it.
    ///
    /// # Errors
    /// A directory is in use or belongs to another vault, or a manifest can't be read.
    pub async fn open(config: Config) -> Result<Arc<Self>> {
        let dir = config.store_dir.clone();
        let store = tokio::task::spawn_blocking(move || Store::local(&dir))
            .await
            .context("join")??;
        Self::open_on(config, store).await
    }

    /// Opens a vault over any store; `config.store_dir` only holds the reserve then, where it exists.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_on(config: Config, store: Store) -> Result<Arc<Self>> {
        Self::open_with(config, store, Policy::default()).await
    }

    pub(crate) async fn open_with(
        config: Config,
        store: Store,
        policy: Policy,
    ) -> Result<Arc<Self>> {
        config.validate()?;
        durable::create_dir(&config.state_dir).with_context(|| {
            format!("create the state directory {}", config.state_dir.display())
        })?;
        let state_lock = FileLock::of_dir(&config.state_dir)
            .with_context(|| format!("lock the state directory {}", config.state_dir.display()))?;
        let fresh = StoreMarker {
            store: *uuid::Uuid::new_v4().as_bytes(),
            created_ms: now_ms(),
        };
        let marker = store.marker(fresh).await.context("open the store")?;
        adopt_state(&config, marker)?;
        let tables = config.state_dir.join("tables");
        durable::create_dir(&tables).context("create the directory of checksum tables")?;
        let cache_bytes = usize::try_from(config.cache_bytes_max.get()).unwrap_or(usize::MAX);
        let vault = Self {
            shared: Arc::new(Shared {
                indexes: Cache::new(cache_bytes),
                pages: Cache::new(cache_bytes / 4),
                maps: Cache::new(MAPS_BYTES_MAX),
                frames: Cache::new(FRAMES_BYTES_MAX),
                manifest_keep: config.manifest_keep.get(),
                marker,
            }),
            limits: Arc::new(IngestLimits::new(&config)),
            tables: TableFiles { dir: tables },
            volumes: RwLock::default(),
            broken: RwLock::default(),
            creating: Mutex::new(()),
            space: SyncMutex::default(),
            reserve: Reserve::new(&config.store_dir, config.reserve_bytes.get()),
            wake: Notify::new(),
            _state_lock: state_lock,
            store,
            config,
            policy,
        };
        vault.reserve.fill();
        for id in vault
            .store
            .volumes()
            .await
            .context("list the store's volumes")?
        {
            vault.open_volume(id).await;
        }
        Ok(Arc::new(vault))
    }

    async fn open_volume(&self, id: VolumeId) {
        let store = VolumeStore::new(self.store.clone(), id);
        match store.open().await {
            Ok(Some(manifest)) => {
                let volume = self.assemble(store, manifest).await;
                self.volumes.write().insert(id, Arc::new(volume));
                self.broken.write().remove(&id);
            }
            // Made in part when something crashed: its first StartTerm makes it whole.
            Ok(None) => {
                self.broken.write().remove(&id);
            }
            Err(error) => {
                self.broken.write().insert(id, of_store(&error));
            }
        }
    }

    /// Tries again to open the volumes that could not be: the store may have failed for a moment only.
    pub(crate) async fn open_broken(&self) {
        let _creating = self.creating.lock().await;
        let broken: Vec<_> = self.broken.read().keys().copied().collect();
        for id in broken {
            self.open_volume(id).await;
            if !self.broken.read().contains_key(&id) {
                tracing::info!(volume = %id, "the volume can be opened again");
            }
        }
    }

    async fn assemble(&self, store: VolumeStore, manifest: Manifest) -> Volume {
        Volume::new(
            store,
            Arc::clone(&self.shared),
            manifest,
            self.tables.clone(),
        )
        .await
    }

    /// A way to tell whether somebody still uses the store, and thus holds its lock.
    pub(crate) fn store_in_use(&self) -> impl Fn() -> bool + use<> {
        self.store.in_use()
    }

    pub(crate) const fn config(&self) -> &Config {
        &self.config
    }

    /// When reclaim does what.
    pub(crate) const fn policy(&self) -> Policy {
        self.policy
    }

    /// Looks how much room there is for the store.
    pub(crate) async fn look_at_space(&self) {
        let dir = self.config.store_dir.clone();
        let space = tokio::task::spawn_blocking(move || Space::of(&dir)).await;
        *self.space.lock() = space.ok().and_then(Result::ok);
    }

    /// How much room there was for the store at the last look; none where that can't be told.
    pub(crate) fn space(&self) -> Option<Space> {
        *self.space.lock()
    }

    /// Volumes that can't be opened.
    pub(crate) fn broken_count(&self) -> usize {
        self.broken.read().len()
    }

    /// Streams of intervals that are open.
    pub(crate) fn open_streams(&self) -> usize {
        let max = self.config.streams_max as usize;
        max.saturating_sub(self.limits.free_streams())
    }

    /// All volumes, by id.
    pub(crate) fn volumes(&self) -> Vec<Arc<Volume>> {
        self.volumes.read().values().cloned().collect()
    }

    /// A volume by its identity.
    pub(crate) fn volume(&self, id: VolumeId) -> Result<Arc<Volume>, RpcError> {
        if let Some(error) = self.broken.read().get(&id) {
            return Err(error.clone());
        }
        self.volumes
            .read()
            .get(&id)
            .cloned()
            .ok_or_else(|| no_volume(&id.to_string()))
    }

    /// Those that the caller may see, by id.
    pub(crate) fn volumes_of(&self, caller: &Caller) -> Vec<Arc<Volume>> {
        let mut volumes = self.volumes();
        volumes.retain(|volume| {
            let manifest = volume.manifest();
            caller.has(&manifest.source, &manifest.name)
        });
        volumes
    }

    /// A volume that the caller writes to as its source.
    pub(crate) fn own(&self, id: VolumeId, caller: &Caller) -> Result<Arc<Volume>, RpcError> {
        let volume = self.volume(id)?;
        let manifest = volume.manifest();
        caller.need_own(&manifest.source, &manifest.name)?;
        about_volume(&manifest.name);
        Ok(volume)
    }

    /// A volume that the caller may see, by UUID, or by name where only one of those has it.
    pub(crate) fn find(&self, name: &str, caller: &Caller) -> Result<Arc<Volume>, RpcError> {
        if let Ok(id) = name.parse::<VolumeId>() {
            let volume = self.volume(id)?;
            let manifest = volume.manifest();
            caller.need(&manifest.source, &manifest.name)?;
            about_volume(&manifest.name);
            return Ok(volume);
        }
        let mut found: Vec<_> = self.volumes();
        found.retain(|volume| volume.manifest().name == name);
        let has = |volume: &Arc<Volume>| caller.has(&volume.manifest().source, name);
        if let Some(volume) = found.first()
            && !found.iter().any(has)
        {
            caller.need(&volume.manifest().source, name)?;
        }
        found.retain(has);
        if found.len() > 1 {
            let ids: Vec<_> = found.iter().map(|volume| volume.id.to_string()).collect();
            return Err(RpcError::new(
                Reason::VolumeAmbiguous,
                format!("{} volumes are named {name:?}", found.len()),
                format!("name one by its UUID: {}", ids.join(", ")),
            ));
        }
        let volume = found.pop().ok_or_else(|| no_volume(name))?;
        about_volume(name);
        Ok(volume)
    }

    /// Grants the next writer term. The source that the volume is recorded under is one that the caller may be.
    pub(crate) async fn start_term(
        &self,
        mut asked: convert::TermRequest,
        caller: &Caller,
    ) -> Result<TermGrant, RpcError> {
        asked.source_name = caller.source_of(asked.source_name, &asked.volume_name);
        caller.need_own(&asked.source_name, &asked.volume_name)?;
        let request = TermRequest {
            volume: asked.volume,
            name: asked.volume_name,
            source: asked.source_name,
            geometry: asked.geometry,
            last_term: asked.last_term,
            nonce: asked.nonce,
        };
        let longest = self.config.volume_bytes_max;
        if request.geometry.length() > longest.get() {
            return Err(RpcError::new(
                Reason::GeometryInvalid,
                format!(
                    "volume {}: {} bytes are more than this vault takes ({longest})",
                    request.volume,
                    request.geometry.length()
                ),
                "raise volume_bytes_max at the vault",
            ));
        }
        let volume = match self.volume(request.volume) {
            Ok(volume) => volume,
            Err(error) if error.reason == Reason::VolumeNotFound => self.create(&request).await?,
            Err(error) => return Err(error),
        };
        let known = volume.manifest();
        caller.need_own(&known.source, &known.name)?;
        let manifest = volume
            .edit(|manifest| {
                grant_term(Some(manifest), &request, now_ms())
                    .map(|next| next.map(|next| (next, Vec::new())))
                    .map_err(|e| of_term(&e, request.volume))
            })
            .await?;
        if manifest.nonce != request.nonce {
            // Another source was granted a later term in the same instant.
            return Err(of_term(
                &vault_core::manifest::TermError::Fenced {
                    asked: request.last_term,
                    current: manifest.term,
                },
                request.volume,
            ));
        }
        Ok(TermGrant {
            term: manifest.term,
            head: manifest.head().map(|head| Head {
                generation: head.id,
                digest: head.digest,
                interval: head.interval,
            }),
            bytes_in_flight_max: self.config.bytes_in_flight_max.get(),
        })
    }

    async fn create(&self, request: &TermRequest) -> Result<Arc<Volume>, RpcError> {
        let _creating = self.creating.lock().await;
        if let Ok(volume) = self.volume(request.volume) {
            return Ok(volume);
        }
        if self.volumes.read().len() >= self.config.volumes_max as usize {
            return Err(RpcError::new(
                Reason::LimitReached,
                "the vault has as many volumes as it may have",
                "raise volumes_max at the vault",
            ));
        }
        let first = grant_term(None, request, now_ms()).map_err(|e| of_term(&e, request.volume))?;
        let Some(first) = first else {
            return Err(RpcError::internal("a new volume has no manifest"));
        };
        let store = VolumeStore::new(self.store.clone(), request.volume);
        let put = store.put_manifest(&first).await;
        // Whatever the put said: what is there now decides.
        let manifest = match store.open().await.map_err(|e| of_store(&e))? {
            Some(manifest) => manifest,
            None => match put {
                Err(error) => return Err(of_store(&error)),
                Ok(()) => return Err(RpcError::internal("a manifest vanished after its put")),
            },
        };
        tracing::info!(volume = %request.volume, name = request.name, "volume created");
        let volume = Arc::new(self.assemble(store, manifest).await);
        self.volumes
            .write()
            .insert(request.volume, Arc::clone(&volume));
        Ok(volume)
    }

    /// Begins to receive an interval.
    pub(crate) async fn ship(
        &self,
        header: IntervalHeader,
        caller: &Caller,
    ) -> Result<Begun, RpcError> {
        let volume = self.own(header.volume, caller)?;
        let admitting = ship::begin(volume, Arc::clone(&self.limits), header);
        admitting.instrument(step!("admit")).await
    }

    /// Ends streams and writes what is only in memory.
    ///
    /// # Errors
    /// A write failed; nothing committed is lost.
    pub async fn close(&self) -> Result<()> {
        let mut failed = None;
        for volume in self.volumes() {
            volume.shipping.end();
            if let Err(error) = volume.stamp_table().await {
                failed = Some(
                    anyhow::Error::from(error)
                        .context(format!("stamp the table of volume {}", volume.id)),
                );
            }
            if let Err(error) = volume.write_current().await {
                failed = Some(
                    anyhow::Error::from(error)
                        .context(format!("write current_through of volume {}", volume.id)),
                );
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// Ties the state directory to the store: tables of another store would be taken for this one's.
fn adopt_state(config: &Config, marker: StoreMarker) -> Result<()> {
    let path = config.state_dir.join("store");
    let known = record::read(&path, STATE_MAGIC, STATE_VERSION)
        .with_context(|| format!("read {}", path.display()))?;
    match known {
        None => record::write(&path, STATE_MAGIC, STATE_VERSION, &marker.store)
            .with_context(|| format!("write {}", path.display())),
        Some((_, store)) if store == marker.store => Ok(()),
        Some(_) => bail!(
            "the state directory {} belongs to another store than {}: use its own one, or empty it (it can be rebuilt)",
            config.state_dir.display(),
            config.store_dir.display()
        ),
    }
}
