//! What the scrub asks of a store: whether an object is there, and is what it was.

use object_store::{ObjectStoreExt, PutMode};
use tidemark_block::{Checksum128, SegmentId};
use vault_core::{
    manifest::{Current, Manifest, StoreMarker, decode_page},
    segment::{FRAMES_AT, SegmentRecord},
};

use super::{Store, StoreError, VolumeStore};

/// The name of the store's marker.
pub(crate) const MARKER: &str = "store";

/// Whose store it is, by its marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The one that the vault has opened.
    Own,
    /// Another one: a disk was mounted, or put, in its place.
    Anothers,
}

impl Store {
    /// Whose store it is.
    ///
    /// # Errors
    /// The marker is missing or damaged, or the store can't be read.
    pub async fn whose(&self, marker: StoreMarker) -> Result<Whose, StoreError> {
        let path = object_store::path::Path::from(MARKER);
        self.forget(path.as_ref()).await;
        let bytes = self.get(&path).await?;
        match StoreMarker::decode(&bytes) {
            Ok(found) if found.store == marker.store => Ok(Whose::Own),
            Ok(_) => Ok(Whose::Anothers),
            Err(error) => Err(StoreError::corrupt(&path, error)),
        }
    }

    /// Puts the marker again.
    ///
    /// # Errors
    /// The store can't.
    pub async fn replace_marker(&self, marker: StoreMarker) -> Result<(), StoreError> {
        let path = object_store::path::Path::from(MARKER);
        self.put(&path, marker.encode().into(), PutMode::Overwrite)
            .await
    }

    /// Drops an object from this machine's page cache, so that the next read is one of the medium. Does what it can.
    async fn forget(&self, object: &str) {
        if let Some(local) = self.local.clone() {
            let object = object.to_owned();
            let _ = tokio::task::spawn_blocking(move || local.forget(&object)).await;
        }
    }
}

impl VolumeStore {
    /// The store that it is a part of.
    #[must_use]
    pub const fn root(&self) -> &Store {
        &self.store
    }

    /// Drops an object from this machine's page cache, so that the next read is one of the medium.
    pub async fn forget(&self, object: &str) {
        self.store.forget(object).await;
    }

    /// The name of a manifest in the store.
    #[must_use]
    pub fn manifest_name(&self, version: u64) -> String {
        self.manifest_path(version).to_string()
    }

    /// The name of a page in the store.
    #[must_use]
    pub fn page_name(&self, name: Checksum128) -> String {
        self.page_path(name).to_string()
    }

    /// The name of the advisory object in the store.
    #[must_use]
    pub fn current_name(&self) -> String {
        self.current_path().to_string()
    }

    /// The numbers of all manifests, ascending.
    ///
    /// # Errors
    /// The store can't be listed.
    pub async fn versions(&self) -> Result<Vec<u64>, StoreError> {
        self.versions_above(0).await
    }

    /// Whether a manifest is whole, and, where it is the version that `newest` has, is that one. Gives its bytes.
    ///
    /// # Errors
    /// It is missing, damaged or another one, or the store can't be read.
    pub async fn check_manifest(&self, newest: &Manifest, version: u64) -> Result<u64, StoreError> {
        let path = self.manifest_path(version);
        self.forget(path.as_ref()).await;
        let bytes = self.store.get(&path).await?;
        let found = Manifest::decode(&bytes, self.volume, version)
            .map_err(|e| StoreError::corrupt(&path, e))?;
        if version == newest.version && found != *newest {
            return Err(StoreError::corrupt(&path, "it is not what was written"));
        }
        Ok(bytes.len() as u64)
    }

    /// Puts a manifest again that is damaged or gone: the same bytes as before.
    ///
    /// # Errors
    /// The store can't.
    pub async fn replace_manifest(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let path = self.manifest_path(manifest.version);
        let bytes = manifest.encode().into();
        self.store.put(&path, bytes, PutMode::Overwrite).await
    }

    /// Whether a page is whole. Gives its bytes.
    ///
    /// # Errors
    /// It is missing or damaged, or the store can't be read.
    pub async fn check_page(&self, name: Checksum128) -> Result<u64, StoreError> {
        let path = self.page_path(name);
        self.forget(path.as_ref()).await;
        let bytes = self.store.get(&path).await?;
        decode_page(&bytes, name).map_err(|e| StoreError::corrupt(&path, e))?;
        Ok(bytes.len() as u64)
    }

    /// Whether the advisory object is whole, or absent. Gives its bytes.
    ///
    /// # Errors
    /// It is damaged, or the store can't be read.
    pub async fn check_current(&self) -> Result<u64, StoreError> {
        let path = self.current_path();
        self.forget(path.as_ref()).await;
        let bytes = match self.store.get(&path).await {
            Err(StoreError::Missing(_)) => return Ok(0),
            bytes => bytes?,
        };
        Current::decode(&bytes, self.volume)
            .map(|_| bytes.len() as u64)
            .map_err(|e| StoreError::corrupt(&path, e))
    }

    /// Whether a segment's object has the length that its record says.
    ///
    /// # Errors
    /// It is missing, longer or shorter, or the store can't be read.
    pub async fn check_length(&self, record: &SegmentRecord) -> Result<(), StoreError> {
        let path = self.segment_path(record.id);
        let found = self.store.objects.head(&path).await;
        let found = found.map_err(|e| StoreError::of(&path, e))?.size;
        if found == record.file_len {
            return Ok(());
        }
        let wanted = record.file_len;
        Err(StoreError::corrupt(
            &path,
            format_args!("it has {found} bytes, {wanted} were written"),
        ))
    }

    /// Whether a segment begins with this header.
    ///
    /// # Errors
    /// It doesn't, or the store can't be read.
    pub async fn check_header(&self, id: SegmentId, header: &[u8]) -> Result<(), StoreError> {
        let path = self.segment_path(id);
        if self.store.get_range(&path, 0..FRAMES_AT).await? == header {
            return Ok(());
        }
        Err(StoreError::corrupt(
            &path,
            "its header is not what was written",
        ))
    }
}
