//! The objects of a vault over an object store, each decoded and verified as it is read.
//!
//! ```text
//! store                                        what this store is
//! volumes/<uuid>/manifest/<20 digits>          one object per version, put only if absent
//! volumes/<uuid>/pages/<checksum>              segment records
//! volumes/<uuid>/segments/<origin>/<8 digits>  parts of an interval or of a rewrite
//! volumes/<uuid>/current                       advisory
//! ```

mod local;

use std::{collections::BTreeMap, ops::Range, path::Path as FilePath, sync::Arc};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    local::LocalFileSystem, path::Path,
};
use thiserror::Error;
use tidemark_block::{Checksum128, Geometry, IntervalId, SegmentId, VolumeId};
use vault_core::{
    manifest::{Current, Manifest, NewPage, StoreMarker, decode_page},
    segment::{FOOTER_LEN, Footer, FormatError, SegmentIndex, SegmentRecord, decode_checksums},
};

pub use local::Reserve;
pub(crate) use local::Settle;

/// Why the store didn't do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// No room.
    #[error("the store has no room for {0}")]
    Full(Path),
    /// The object isn't there.
    #[error("{0} is missing from the store")]
    Missing(Path),
    /// An object of this name is there already.
    #[error("{0} is in the store already")]
    Exists(Path),
    /// The object's bytes are not what was written.
    #[error("{path} is corrupt: {reason}")]
    Corrupt {
        /// Which.
        path: Path,
        /// In what way.
        reason: String,
    },
    /// Anything else.
    #[error("the store failed at {path}: {source}")]
    Failed {
        /// Where.
        path: Path,
        /// How.
        #[source]
        source: object_store::Error,
    },
}

impl StoreError {
    fn of(path: &Path, error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { .. } => Self::Missing(path.clone()),
            object_store::Error::AlreadyExists { .. }
            | object_store::Error::Precondition { .. } => Self::Exists(path.clone()),
            error if is_full(&error) => Self::Full(path.clone()),
            source => Self::Failed {
                path: path.clone(),
                source,
            },
        }
    }

    fn corrupt(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self::Corrupt {
            path: path.clone(),
            reason: reason.to_string(),
        }
    }
}

fn is_full(error: &object_store::Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return matches!(
                io.kind(),
                std::io::ErrorKind::StorageFull
                    | std::io::ErrorKind::QuotaExceeded
                    | std::io::ErrorKind::FileTooLarge
            );
        }
        source = error.source();
    }
    false
}

/// The objects of a vault.
#[derive(Debug, Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    local: Option<Arc<dyn Settle>>,
}

impl Store {
    /// A store in a directory of this machine, every write durable before it counts.
    ///
    /// # Errors
    /// The directory can't be created or opened.
    pub fn local(dir: &FilePath) -> anyhow::Result<Self> {
        let local = local::LocalDir::open(dir)?;
        let objects = LocalFileSystem::new_with_prefix(dir)?
            .with_fsync(true)
            .with_automatic_cleanup(true);
        Ok(Self {
            objects: Arc::new(objects),
            local: Some(Arc::new(local)),
        })
    }

    /// Any other store. Its puts must be durable when they return.
    #[must_use]
    pub fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self {
            objects,
            local: None,
        }
    }

    /// A store whose failed puts may be visible and not durable, as those of a local directory.
    #[cfg(test)]
    pub(crate) fn settled_by(objects: Arc<dyn ObjectStore>, local: Arc<dyn Settle>) -> Self {
        Self {
            objects,
            local: Some(local),
        }
    }

    /// Nobody else can write to it while this process does: no view of it can be stale.
    #[must_use]
    pub const fn is_exclusive(&self) -> bool {
        self.local.is_some()
    }

    /// Makes everything below `prefix` that is visible durable as well: after a crash the one doesn't follow from
    /// the other. Nothing to do where the store is remote.
    async fn settle(&self, prefix: &Path) -> Result<(), StoreError> {
        let Some(local) = self.local.clone() else {
            return Ok(());
        };
        let at = prefix.clone();
        tokio::task::spawn_blocking(move || local.settle(at.as_ref()))
            .await
            .map_err(std::io::Error::other)
            .and_then(|done| done)
            .map_err(|error| {
                let source = object_store::Error::Generic {
                    store: "local",
                    source: error.into(),
                };
                StoreError::of(prefix, source)
            })
    }

    async fn get(&self, path: &Path) -> Result<Bytes, StoreError> {
        let result = self
            .objects
            .get(path)
            .await
            .map_err(|e| StoreError::of(path, e))?;
        result.bytes().await.map_err(|e| StoreError::of(path, e))
    }

    async fn get_range(&self, path: &Path, range: Range<u64>) -> Result<Bytes, StoreError> {
        let wanted = range.end - range.start;
        let bytes = self
            .objects
            .get_range(path, range)
            .await
            .map_err(|e| short_or(path, e))?;
        if bytes.len() as u64 == wanted {
            Ok(bytes)
        } else {
            Err(StoreError::corrupt(path, "it is cut short"))
        }
    }

    async fn put(&self, path: &Path, bytes: Bytes, mode: PutMode) -> Result<(), StoreError> {
        let options = PutOptions {
            mode,
            ..PutOptions::default()
        };
        self.objects
            .put_opts(path, PutPayload::from_bytes(bytes), options)
            .await
            .map(|_| ())
            .map_err(|e| StoreError::of(path, e))
    }

    /// Deletes an object; one that is absent is no error.
    async fn delete(&self, path: &Path) -> Result<(), StoreError> {
        match self.objects.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(StoreError::of(path, error)),
        }
    }

    async fn list(&self, prefix: &Path) -> Result<Vec<ObjectMeta>, StoreError> {
        match self.objects.list(Some(prefix)).try_collect().await {
            Ok(found) => Ok(found),
            Err(object_store::Error::NotFound { .. }) => Ok(Vec::new()),
            Err(error) => Err(StoreError::of(prefix, error)),
        }
    }

    /// The store's marker; makes one where the store is empty. It is durable: nothing that is written later can outlive
    /// it.
    ///
    /// # Errors
    /// The store holds something else, or can't be read, written or synced.
    pub async fn marker(&self, fresh: StoreMarker) -> Result<StoreMarker, StoreError> {
        let path = Path::from("store");
        let put = self
            .put(&path, fresh.encode().into(), PutMode::Create)
            .await;
        // Whatever the put said: what is there decides. It may be what a failed put has left behind, this one or that
        // of an earlier start.
        if put.is_err() {
            self.settle(&Path::default()).await?;
        }
        let bytes = match (self.get(&path).await, put) {
            (Err(StoreError::Missing(_)), Err(error)) => return Err(error),
            (bytes, _) => bytes?,
        };
        StoreMarker::decode(&bytes).map_err(|e| StoreError::corrupt(&path, e))
    }

    /// The volumes that have objects.
    ///
    /// # Errors
    /// The store can't be listed.
    pub async fn volumes(&self) -> Result<Vec<VolumeId>, StoreError> {
        let prefix = Path::from("volumes");
        let listed = match self.objects.list_with_delimiter(Some(&prefix)).await {
            Ok(listed) => listed,
            Err(object_store::Error::NotFound { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(StoreError::of(&prefix, error)),
        };
        let names = listed
            .common_prefixes
            .iter()
            .filter_map(|path| path.parts().next_back());
        Ok(names
            .filter_map(|name| name.as_ref().parse().ok())
            .collect())
    }
}

fn short_or(path: &Path, error: object_store::Error) -> StoreError {
    // A range behind the end of an object: the object was cut short.
    match error {
        object_store::Error::Generic { ref source, .. } if source.to_string().contains("range") => {
            StoreError::corrupt(path, "it is cut short")
        }
        error => StoreError::of(path, error),
    }
}

/// The objects of one volume.
#[derive(Debug, Clone)]
pub struct VolumeStore {
    store: Store,
    volume: VolumeId,
    root: Path,
}

/// An object that may be a stray.
#[derive(Debug, Clone)]
pub struct Found<T> {
    /// Which.
    pub id: T,
    /// Its bytes.
    pub length: u64,
    /// When it was written, milliseconds since the Unix epoch.
    pub modified_ms: u64,
}

impl VolumeStore {
    /// The objects of `volume`.
    #[must_use]
    pub fn new(store: Store, volume: VolumeId) -> Self {
        let root = Path::from("volumes").join(volume.to_string());
        Self {
            store,
            volume,
            root,
        }
    }

    /// As [`Store::is_exclusive`].
    #[must_use]
    pub const fn is_exclusive(&self) -> bool {
        self.store.is_exclusive()
    }

    fn manifests(&self) -> Path {
        self.root.clone().join("manifest")
    }

    fn manifest_path(&self, version: u64) -> Path {
        self.manifests().join(format!("{version:020}"))
    }

    fn page_path(&self, name: Checksum128) -> Path {
        self.root.clone().join("pages").join(name.to_string())
    }

    fn origin_path(&self, origin: IntervalId) -> Path {
        let hex: String = origin
            .as_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.root.clone().join("segments").join(hex)
    }

    /// Where a segment is.
    #[must_use]
    pub fn segment_path(&self, id: SegmentId) -> Path {
        self.origin_path(id.origin).join(format!("{:08}", id.part))
    }

    /// The numbers of the manifests above `version`, ascending.
    async fn versions_above(&self, version: u64) -> Result<Vec<u64>, StoreError> {
        let prefix = self.manifests();
        let listed = self
            .store
            .objects
            .list_with_offset(Some(&prefix), &self.manifest_path(version));
        let found: Vec<ObjectMeta> = match listed.try_collect().await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => Vec::new(),
            Err(error) => return Err(StoreError::of(&prefix, error)),
        };
        let mut versions: Vec<u64> = found
            .iter()
            .filter_map(|meta| meta.location.filename()?.parse().ok())
            .filter(|found| *found > version)
            .collect();
        versions.sort_unstable();
        Ok(versions)
    }

    async fn manifest(&self, version: u64) -> Result<Manifest, StoreError> {
        let path = self.manifest_path(version);
        let bytes = self.store.get(&path).await?;
        Manifest::decode(&bytes, self.volume, version).map_err(|e| StoreError::corrupt(&path, e))
    }

    /// The newest manifest, where it is newer than `version`.
    ///
    /// # Errors
    /// It can't be read, or is corrupt: an older one is never taken for it.
    pub async fn newest_above(&self, version: u64) -> Result<Option<Manifest>, StoreError> {
        match self.versions_above(version).await?.last() {
            Some(newest) => self.manifest(*newest).await.map(Some),
            None => Ok(None),
        }
    }

    /// The newest manifest, made durable should a crash have left it merely visible; `None` where the volume has none.
    ///
    /// # Errors
    /// As [`Self::newest_above`].
    pub async fn open(&self) -> Result<Option<Manifest>, StoreError> {
        self.settle_manifests().await?;
        self.newest_above(0).await
    }

    /// Makes every manifest that is visible durable: one whose put failed may be the one without the other.
    ///
    /// # Errors
    /// A sync failed: whether a visible manifest survives a crash is unknown.
    pub async fn settle_manifests(&self) -> Result<(), StoreError> {
        self.store.settle(&self.manifests()).await
    }

    /// Puts a manifest if its version is absent.
    ///
    /// # Errors
    /// It exists, or the outcome is unknown: read the newest to know.
    pub async fn put_manifest(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let path = self.manifest_path(manifest.version);
        self.store
            .put(&path, manifest.encode().into(), PutMode::Create)
            .await
    }

    /// Deletes versions below `version`; returns how many there were.
    ///
    /// # Errors
    /// One can't be deleted.
    pub async fn prune_manifests(
        &self,
        version: u64,
        older_than_ms: u64,
    ) -> Result<usize, StoreError> {
        let found = self.store.list(&self.manifests()).await?;
        let mut pruned = 0;
        for meta in found {
            let number: Option<u64> = meta.location.filename().and_then(|name| name.parse().ok());
            if number.is_some_and(|n| n < version) && modified_ms(&meta) <= older_than_ms {
                self.store.delete(&meta.location).await?;
                pruned += 1;
            }
        }
        Ok(pruned)
    }

    /// Puts a page; one that is there already has the same content.
    ///
    /// # Errors
    /// The store can't.
    pub async fn put_page(&self, page: &NewPage) -> Result<(), StoreError> {
        let path = self.page_path(page.name);
        self.store
            .put(&path, page.bytes.clone().into(), PutMode::Overwrite)
            .await
    }

    /// Reads a page.
    ///
    /// # Errors
    /// It is missing or corrupt.
    pub async fn page(&self, name: Checksum128) -> Result<Vec<SegmentRecord>, StoreError> {
        let path = self.page_path(name);
        let bytes = self.store.get(&path).await?;
        decode_page(&bytes, name).map_err(|e| StoreError::corrupt(&path, e))
    }

    /// Deletes a page.
    ///
    /// # Errors
    /// The store can't.
    pub async fn delete_page(&self, name: Checksum128) -> Result<(), StoreError> {
        self.store.delete(&self.page_path(name)).await
    }

    /// All pages that there are.
    ///
    /// # Errors
    /// The store can't be listed.
    pub async fn pages(&self) -> Result<Vec<Found<Checksum128>>, StoreError> {
        let found = self.store.list(&self.root.clone().join("pages")).await?;
        Ok(found
            .iter()
            .filter_map(|meta| {
                let name = parse_hex(meta.location.filename()?)?;
                Some(found_as(Checksum128::from_bytes(name), meta))
            })
            .collect())
    }

    /// Puts a segment, durably, if it is absent: a put of an earlier process that arrives late must not replace it.
    ///
    /// # Errors
    /// It may be there nevertheless: [`Self::parts`] tells what can be relied on.
    pub async fn put_segment(&self, id: SegmentId, bytes: Bytes) -> Result<(), StoreError> {
        self.store
            .put(&self.segment_path(id), bytes, PutMode::Create)
            .await
    }

    /// Deletes a segment.
    ///
    /// # Errors
    /// The store can't.
    pub async fn delete_segment(&self, id: SegmentId) -> Result<(), StoreError> {
        self.store.delete(&self.segment_path(id)).await
    }

    /// All segments that there are, named or not.
    ///
    /// # Errors
    /// The store can't be listed.
    pub async fn segments(&self) -> Result<Vec<Found<SegmentId>>, StoreError> {
        let found = self.store.list(&self.root.clone().join("segments")).await?;
        Ok(found
            .iter()
            .filter_map(|meta| {
                let mut parts = meta.location.parts();
                let part = parts.next_back()?.as_ref().parse().ok()?;
                let origin = IntervalId::from_bytes(parse_hex(parts.next_back()?.as_ref())?);
                Some(found_as(SegmentId { origin, part }, meta))
            })
            .collect())
    }

    /// The parts of an interval that are there, by number with their lengths, each durable from now on.
    ///
    /// # Errors
    /// The store can't be listed or synced.
    pub async fn parts(&self, interval: IntervalId) -> Result<BTreeMap<u32, u64>, StoreError> {
        let prefix = self.origin_path(interval);
        let found = self.store.list(&prefix).await?;
        self.store.settle(&prefix).await?;
        Ok(found
            .iter()
            .filter_map(|meta| Some((meta.location.filename()?.parse().ok()?, meta.size)))
            .collect())
    }

    /// Reads a segment's footer.
    ///
    /// # Errors
    /// The object is missing, cut short or corrupt.
    pub async fn footer(
        &self,
        geometry: Geometry,
        id: SegmentId,
        file_len: u64,
    ) -> Result<Footer, StoreError> {
        let path = self.segment_path(id);
        let Some(at) = file_len.checked_sub(FOOTER_LEN) else {
            return Err(StoreError::corrupt(&path, "it is cut short"));
        };
        let bytes = self.store.get_range(&path, at..file_len).await?;
        Footer::decode(&bytes, self.volume, geometry, id, file_len)
            .map_err(|e| StoreError::corrupt(&path, e))
    }

    /// Reads a segment's index.
    ///
    /// # Errors
    /// The object is missing, cut short or corrupt.
    pub async fn index(
        &self,
        geometry: Geometry,
        record: &SegmentRecord,
    ) -> Result<SegmentIndex, StoreError> {
        let path = self.segment_path(record.id);
        let range = record.index_at..record.checksums_at();
        let bytes = self.store.get_range(&path, range).await?;
        let record = *record;
        tokio::task::spawn_blocking(move || SegmentIndex::decode(&bytes, &record, geometry))
            .await
            .map_err(|e| StoreError::corrupt(&path, e))?
            .map_err(|e| StoreError::corrupt(&path, FormatError::from(e)))
    }

    /// Reads a segment's checksums.
    ///
    /// # Errors
    /// The object is missing, cut short or corrupt.
    pub async fn checksums(&self, record: &SegmentRecord) -> Result<Vec<Checksum128>, StoreError> {
        let path = self.segment_path(record.id);
        let at = record.checksums_at();
        let range = at..at + u64::from(record.checksums_len);
        let bytes = self.store.get_range(&path, range).await?;
        decode_checksums(&bytes, record).map_err(|e| StoreError::corrupt(&path, e))
    }

    /// Reads several frames of a segment, unverified.
    ///
    /// # Errors
    /// The object is missing or cut short.
    pub async fn frames(
        &self,
        id: SegmentId,
        ranges: &[Range<u64>],
    ) -> Result<Vec<Bytes>, StoreError> {
        let path = self.segment_path(id);
        let read = self
            .store
            .objects
            .get_ranges(&path, ranges)
            .await
            .map_err(|e| short_or(&path, e))?;
        for (bytes, range) in read.iter().zip(ranges) {
            if bytes.len() as u64 != range.end - range.start {
                return Err(StoreError::corrupt(&path, "it is cut short"));
            }
        }
        Ok(read)
    }

    /// Reads the advisory object; none where there is none or it is damaged, since nothing depends on it.
    pub async fn current(&self) -> Option<Current> {
        let bytes = self
            .store
            .get(&self.root.clone().join("current"))
            .await
            .ok()?;
        Current::decode(&bytes, self.volume).ok()
    }

    /// Writes the advisory object.
    ///
    /// # Errors
    /// The store can't.
    pub async fn put_current(&self, current: Current) -> Result<(), StoreError> {
        let path = self.root.clone().join("current");
        let bytes = current.encode(self.volume);
        self.store
            .put(&path, bytes.into(), PutMode::Overwrite)
            .await
    }
}

fn modified_ms(meta: &ObjectMeta) -> u64 {
    u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0)
}

fn found_as<T>(id: T, meta: &ObjectMeta) -> Found<T> {
    Found {
        id,
        length: meta.size,
        modified_ms: modified_ms(meta),
    }
}

fn parse_hex(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..32).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(bytes)
}
