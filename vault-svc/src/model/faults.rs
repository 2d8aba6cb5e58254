//! An object store that fails when told to.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};
use parking_lot::Mutex;

use crate::interval::Numbers;

/// What becomes of one put or delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Good,
    /// Fails; has, or hasn't, taken place.
    Failed {
        done: bool,
    },
    /// The process dies.
    Crashed {
        done: bool,
    },
}

/// Decides about one process of a vault.
#[derive(Debug, Default)]
pub(super) struct Fuse {
    dead: AtomicBool,
    burnt: AtomicBool,
    faults: Mutex<Option<Numbers>>,
    /// Bytes that the store has room for.
    room: Mutex<Option<u64>>,
}

impl Fuse {
    pub(super) fn arm(&self, seed: u64) {
        *self.faults.lock() = Some(Numbers(seed));
    }

    pub(super) fn disarm(&self) {
        *self.faults.lock() = None;
    }

    pub(super) fn limit(&self, bytes: Option<u64>) {
        *self.room.lock() = bytes;
    }

    pub(super) fn limit_now(&self) -> u64 {
        self.room.lock().unwrap_or(u64::MAX)
    }

    /// Kills the process.
    pub(super) fn blow(&self) {
        self.dead.store(true, Ordering::Release);
        self.burnt.store(true, Ordering::Release);
    }

    pub(super) fn blown(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Something has failed.
    pub(super) fn burnt(&self) -> bool {
        self.burnt.load(Ordering::Acquire)
    }

    fn fate(&self) -> Fate {
        if self.blown() {
            return Fate::Crashed { done: false };
        }
        let mut faults = self.faults.lock();
        let Some(numbers) = faults.as_mut() else {
            return Fate::Good;
        };
        let fate = match numbers.below(24) {
            0 => Fate::Failed { done: false },
            1 => Fate::Failed { done: true },
            2 => Fate::Crashed { done: false },
            3 => Fate::Crashed { done: true },
            _ => return Fate::Good,
        };
        drop(faults);
        self.burnt.store(true, Ordering::Release);
        if matches!(fate, Fate::Crashed { .. }) {
            self.blow();
        }
        fate
    }
}

#[derive(Debug)]
pub(super) struct FaultyStore {
    objects: Arc<InMemory>,
    fuse: Arc<Fuse>,
}

impl FaultyStore {
    pub(super) fn new(objects: Arc<InMemory>, fuse: Arc<Fuse>) -> Self {
        Self { objects, fuse }
    }

    fn alive(&self) -> Result<()> {
        if self.fuse.blown() {
            Err(failure())
        } else {
            Ok(())
        }
    }
}

fn failure() -> Error {
    Error::Generic {
        store: "faulty",
        source: "a fault was asked for".into(),
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[tonic::async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let room = *self.fuse.room.lock();
        if let Some(room) = room {
            let stored: Vec<ObjectMeta> = self.objects.list(None).try_collect().await?;
            let stored: u64 = stored.iter().map(|meta| meta.size).sum();
            if stored + payload.content_length() as u64 > room {
                return Err(Error::Generic {
                    store: "faulty",
                    source: std::io::Error::from(std::io::ErrorKind::StorageFull).into(),
                });
            }
        }
        match self.fuse.fate() {
            Fate::Good => self.objects.put_opts(location, payload, opts).await,
            Fate::Failed { done } | Fate::Crashed { done } => {
                if done {
                    let _ = self.objects.put_opts(location, payload, opts).await;
                }
                Err(failure())
            }
        }
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(failure())
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.alive()?;
        self.objects.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.alive()?;
        self.objects.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let objects = Arc::clone(&self.objects);
        let fuse = Arc::clone(&self.fuse);
        locations
            .then(move |location| {
                let (objects, fuse) = (Arc::clone(&objects), Arc::clone(&fuse));
                async move {
                    use object_store::ObjectStoreExt;
                    let location = location?;
                    match fuse.fate() {
                        Fate::Good => objects.delete(&location).await.map(|()| location),
                        Fate::Failed { done } | Fate::Crashed { done } => {
                            if done {
                                let _ = objects.delete(&location).await;
                            }
                            Err(failure())
                        }
                    }
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.alive() {
            Ok(()) => self.objects.list(prefix),
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.alive()?;
        self.objects.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(failure())
    }
}
