//! The objects of one volume: its manifests, pages and advisory object.

use futures::TryStreamExt;
use object_store::{ObjectMeta, PutMode, path::Path};
use tidemark_block::{Checksum128, VolumeId};
use vault_core::{
    manifest::{Current, Manifest, NewPage, decode_page},
    segment::SegmentRecord,
};

use super::{
    Store, StoreError,
    found::{Found, found_as, modified_ms, parse_hex},
};

/// The objects of one volume.
#[derive(Debug, Clone)]
pub struct VolumeStore {
    pub(super) store: Store,
    pub(super) volume: VolumeId,
    pub(super) root: Path,
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

    pub(super) fn manifest_path(&self, version: u64) -> Path {
        self.manifests().join(format!("{version:020}"))
    }

    pub(super) fn page_path(&self, name: Checksum128) -> Path {
        self.root.clone().join("pages").join(name.to_string())
    }

    pub(super) fn current_path(&self) -> Path {
        self.root.clone().join("current")
    }

    /// The numbers of the manifests above `version`, ascending.
    pub(super) async fn versions_above(&self, version: u64) -> Result<Vec<u64>, StoreError> {
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

    pub(super) async fn manifest(&self, version: u64) -> Result<Manifest, StoreError> {
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

    /// Deletes versions below `version`; returns which there were.
    ///
    /// # Errors
    /// One can't be deleted.
    pub async fn prune_manifests(
        &self,
        version: u64,
        older_than_ms: u64,
    ) -> Result<Vec<u64>, StoreError> {
        let found = self.store.list(&self.manifests()).await?;
        let mut pruned = Vec::new();
        for meta in found {
            let number: Option<u64> = meta.location.filename().and_then(|name| name.parse().ok());
            if let Some(number) = number.filter(|n| *n < version)
                && modified_ms(&meta) <= older_than_ms
            {
                self.store.delete(&meta.location).await?;
                pruned.push(number);
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

    /// Reads the advisory object; none where there is none or it is damaged, since nothing depends on it.
    pub async fn current(&self) -> Option<Current> {
        let bytes = self.store.get(&self.current_path()).await.ok()?;
        Current::decode(&bytes, self.volume).ok()
    }

    /// Writes the advisory object.
    ///
    /// # Errors
    /// The store can't.
    pub async fn put_current(&self, current: Current) -> Result<(), StoreError> {
        let path = self.current_path();
        let bytes = current.encode(self.volume);
        self.store
            .put(&path, bytes.into(), PutMode::Overwrite)
            .await
    }
}
