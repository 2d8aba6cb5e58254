//! The objects of a vault over an object store, each decoded and verified as it is read.
//!
//! ```text
//! store                                        what this store is
//! volumes/<uuid>/manifest/<20 digits>          one object per version, put only if absent
//! volumes/<uuid>/pages/<checksum>              segment records
//! volumes/<uuid>/segments/<origin>/<8 digits>  parts of an interval or of a rewrite
//! volumes/<uuid>/current                       advisory
//! ```

mod check;
mod error;
mod found;
mod local;
mod segments;
mod volume;

use std::{ops::Range, path::Path as FilePath, sync::Arc};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    local::LocalFileSystem, path::Path,
};
use tidemark_block::VolumeId;
use vault_core::manifest::StoreMarker;

use self::error::short_or;
pub use self::{
    check::Whose,
    error::StoreError,
    found::Found,
    local::{Reserve, Space},
    volume::VolumeStore,
};
pub(crate) use check::MARKER;
pub(crate) use local::Settle;

/// The objects of a vault.
#[derive(Debug, Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    local: Option<Arc<dyn Settle>>,
}

impl Store {
    /// A way to tell whether somebody still uses the store, and thus holds its lock.
    pub(crate) fn in_use(&self) -> impl Fn() -> bool + use<> {
        let lock = self.local.as_ref().map(Arc::downgrade);
        move || lock.as_ref().is_some_and(|lock| lock.strong_count() > 0)
    }

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
        let path = Path::from(MARKER);
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
