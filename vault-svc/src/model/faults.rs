//! An object store that fails when told to.

use std::{
    collections::BTreeSet,
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
use tokio::sync::Notify;

use crate::{interval::Numbers, store::Settle};

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
    /// Half of all puts and deletes fail, not a sixth.
    often: AtomicBool,
    /// Bytes that the store has room for.
    room: Mutex<Option<u64>>,
    /// Where the next delete waits: says that it is there, and goes on when told to.
    stop: Mutex<Option<Arc<Stop>>>,
    /// No object whose path contains this can be read.
    unreadable: Mutex<Option<&'static str>>,
    reads: Mutex<Reads>,
}

/// What was read so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reads {
    /// Objects, or one range of one: manifests, pages, sections of segments.
    pub(super) sections: u64,
    /// Frames.
    pub(super) frames: u64,
}

/// A place to wait at.
#[derive(Debug, Default)]
pub(super) struct Stop {
    pub(super) reached: Notify,
    pub(super) go: Notify,
}

impl Fuse {
    pub(super) fn arm(&self, seed: u64) {
        *self.faults.lock() = Some(Numbers(seed));
    }

    pub(super) fn arm_often(&self, seed: u64) {
        self.often.store(true, Ordering::Release);
        self.arm(seed);
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

    /// Makes the next delete wait.
    pub(super) fn stop_next_delete(&self) -> Arc<Stop> {
        let stop = Arc::<Stop>::default();
        *self.stop.lock() = Some(Arc::clone(&stop));
        stop
    }

    pub(super) fn make_unreadable(&self, paths: Option<&'static str>) {
        *self.unreadable.lock() = paths;
    }

    /// What was read since this was last asked.
    pub(super) fn take_reads(&self) -> Reads {
        std::mem::take(&mut self.reads.lock())
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
        let one_in = if self.often.load(Ordering::Acquire) {
            8
        } else {
            24
        };
        let fate = match numbers.below(one_in) {
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

/// Objects that can be seen and that a crash may take back: their puts have failed half way. Outlives processes.
#[derive(Debug, Clone, Default)]
pub(super) struct Volatile(Arc<Mutex<BTreeSet<Path>>>);

impl Volatile {
    /// Loses some of them, as a loss of power would.
    pub(super) async fn lose_some(&self, objects: &InMemory, numbers: &mut Numbers) -> u64 {
        use object_store::ObjectStoreExt;
        let mut lost = 0;
        let all: Vec<Path> = self.0.lock().iter().cloned().collect();
        for path in all {
            if numbers.below(2) == 0 {
                let _ = objects.delete(&path).await;
                self.0.lock().remove(&path);
                lost += 1;
            }
        }
        lost
    }
}

/// A put that fails and has taken place is visible but not durable; a sync of its directory, or a put that succeeds,
/// makes it so.
#[derive(Debug, Clone)]
pub(super) struct FaultyStore {
    objects: Arc<InMemory>,
    fuse: Arc<Fuse>,
    volatile: Volatile,
}

impl FaultyStore {
    pub(super) fn new(objects: Arc<InMemory>, fuse: Arc<Fuse>) -> Self {
        Self::with_volatile(objects, fuse, Volatile::default())
    }

    pub(super) fn with_volatile(
        objects: Arc<InMemory>,
        fuse: Arc<Fuse>,
        volatile: Volatile,
    ) -> Self {
        Self {
            objects,
            fuse,
            volatile,
        }
    }

    async fn wait_if_told(&self) {
        let stop = self.fuse.stop.lock().take();
        if let Some(stop) = stop {
            stop.reached.notify_one();
            stop.go.notified().await;
        }
    }

    fn alive(&self) -> Result<()> {
        if self.fuse.blown() {
            Err(failure())
        } else {
            Ok(())
        }
    }
}

impl Settle for FaultyStore {
    fn settle(&self, prefix: &str) -> std::io::Result<()> {
        match self.fuse.fate() {
            Fate::Good => {
                let inside = |path: &Path| match path.as_ref().rsplit_once('/') {
                    Some((dir, _)) => dir == prefix,
                    None => prefix.is_empty(),
                };
                self.volatile.0.lock().retain(|path| !inside(path));
                Ok(())
            }
            Fate::Failed { .. } | Fate::Crashed { .. } => {
                Err(std::io::Error::other("a fault was asked for"))
            }
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
            Fate::Good => {
                let put = self.objects.put_opts(location, payload, opts).await;
                if put.is_ok() {
                    self.volatile.0.lock().remove(location);
                }
                put
            }
            Fate::Failed { done } | Fate::Crashed { done } => {
                if done {
                    use object_store::ObjectStoreExt;
                    let is_new = self.objects.head(location).await.is_err();
                    let put = self.objects.put_opts(location, payload, opts).await;
                    if put.is_ok() && is_new {
                        self.volatile.0.lock().insert(location.clone());
                    }
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
        let unreadable = *self.fuse.unreadable.lock();
        if unreadable.is_some_and(|part| location.as_ref().contains(part)) {
            return Err(failure());
        }
        self.fuse.reads.lock().sections += 1;
        self.objects.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.alive()?;
        self.fuse.reads.lock().frames += ranges.len() as u64;
        self.objects.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        locations
            .then(move |location| {
                let store = store.clone();
                async move {
                    use object_store::ObjectStoreExt;
                    let location = location?;
                    store.wait_if_told().await;
                    let delete = async || {
                        store.volatile.0.lock().remove(&location);
                        store.objects.delete(&location).await
                    };
                    match store.fuse.fate() {
                        Fate::Good => delete().await.map(|()| location),
                        Fate::Failed { done } | Fate::Crashed { done } => {
                            if done {
                                let _ = delete().await;
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
