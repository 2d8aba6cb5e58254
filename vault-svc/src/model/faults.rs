//! An object store that fails when told to.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{interval::Numbers, store::Settle};

/// What becomes of one put or delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
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
    /// What becomes of the step that comes after so many others.
    plan: Mutex<Option<(u64, Fate)>>,
    /// Puts, deletes and syncs that have begun.
    steps: AtomicU64,
    /// Bytes that the store has room for.
    room: Mutex<Option<u64>>,
    /// Where the next delete waits: says that it is there, and goes on when told to.
    stop: Mutex<Option<Arc<Stop>>>,
    /// No object whose path contains this can be read.
    unreadable: Mutex<Option<&'static str>>,
    /// These bytes of this object can't be read.
    bad_sectors: Mutex<Option<(Path, Vec<Range<u64>>)>>,
    /// What was dropped from the page cache.
    forgotten: Mutex<BTreeSet<String>>,
    reads: Mutex<Reads>,
    /// Objects look years old.
    aged: AtomicBool,
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
        *self.plan.lock() = None;
    }

    /// Plans the fate of one step: the one that comes after `step` others.
    pub(super) fn plan(&self, step: u64, fate: Fate) {
        *self.plan.lock() = Some((self.steps() + step, fate));
    }

    /// How many puts, deletes and syncs have begun.
    pub(super) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Acquire)
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

    pub(super) fn spoil(&self, sectors: Option<(Path, Vec<Range<u64>>)>) {
        *self.bad_sectors.lock() = sectors;
    }

    fn read_sectors(&self, path: &Path, ranges: &[Range<u64>]) -> Result<()> {
        let bad = self.bad_sectors.lock();
        let bad = bad.iter().filter(|(at, _)| at == path);
        let hit = |bad: &Range<u64>| {
            ranges
                .iter()
                .any(|r| r.start < bad.end && bad.start < r.end)
        };
        if bad.flat_map(|(_, bad)| bad).any(hit) {
            return Err(bad_sector());
        }
        Ok(())
    }

    /// What was dropped from the page cache since this was last asked.
    pub(super) fn take_forgotten(&self) -> BTreeSet<String> {
        std::mem::take(&mut self.forgotten.lock())
    }

    /// What was read since this was last asked.
    pub(super) fn take_reads(&self) -> Reads {
        std::mem::take(&mut self.reads.lock())
    }

    /// Makes every object look years old, or as old as it is.
    pub(super) fn age(&self, aged: bool) {
        self.aged.store(aged, Ordering::Release);
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
        let step = self.steps.fetch_add(1, Ordering::AcqRel);
        let planned = *self.plan.lock();
        let fate = match planned {
            Some((at, fate)) if at == step => fate,
            _ => self.by_chance(),
        };
        if fate == Fate::Good {
            return fate;
        }
        self.burnt.store(true, Ordering::Release);
        if matches!(fate, Fate::Crashed { .. }) {
            self.blow();
        }
        fate
    }

    fn by_chance(&self) -> Fate {
        let one_in = if self.often.load(Ordering::Acquire) {
            8
        } else {
            24
        };
        let mut faults = self.faults.lock();
        match faults.as_mut().map(|numbers| numbers.below(one_in)) {
            Some(0) => Fate::Failed { done: false },
            Some(1) => Fate::Failed { done: true },
            Some(2) => Fate::Crashed { done: false },
            Some(3) => Fate::Crashed { done: true },
            _ => Fate::Good,
        }
    }
}

/// What happened to an object.
#[derive(Debug, Clone)]
pub(super) enum Event {
    Put(Path, Bytes),
    Deleted(Path),
    /// A loss of power took the put back.
    Lost(Path),
    /// A loss of power took the delete back.
    Returned(Path, Bytes),
}

/// What can be seen and what a loss of power may take back. Outlives processes.
#[derive(Debug, Clone, Default)]
pub(super) struct Volatile(Arc<Mutex<Unsynced>>);

#[derive(Debug, Clone, Default)]
struct Unsynced {
    /// Objects whose puts have failed half way.
    put: BTreeSet<Path>,
    /// Objects that were deleted, with their bytes.
    deleted: BTreeMap<Path, Bytes>,
    /// Everything that took place.
    events: Vec<Event>,
}

fn dir_of(path: &Path) -> &str {
    path.as_ref().rsplit_once('/').map_or("", |(dir, _)| dir)
}

impl Volatile {
    /// Loses some puts and deletes, as a loss of power would. Returns how many puts.
    pub(super) async fn lose_some(&self, objects: &InMemory, numbers: &mut Numbers) -> u64 {
        use object_store::ObjectStoreExt;
        let (put, deleted) = {
            let unsynced = self.0.lock();
            (unsynced.put.clone(), unsynced.deleted.clone())
        };
        let mut lost = 0;
        for path in put {
            if numbers.below(2) == 0 {
                let _ = objects.delete(&path).await;
                self.0.lock().put.remove(&path);
                self.0.lock().events.push(Event::Lost(path));
                lost += 1;
            }
        }
        for (path, bytes) in deleted {
            if numbers.below(2) == 0 && objects.head(&path).await.is_err() {
                let _ = objects.put(&path, bytes.clone().into()).await;
                self.0.lock().events.push(Event::Returned(path, bytes));
            }
        }
        self.0.lock().deleted.clear();
        lost
    }

    /// The same state, apart from this one from now on.
    pub(super) fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().clone())))
    }

    /// Everything that took place.
    pub(super) fn events(&self) -> Vec<Event> {
        self.0.lock().events.clone()
    }

    /// What can be seen and is not durable.
    pub(super) fn unsynced(&self) -> BTreeSet<Path> {
        self.0.lock().put.clone()
    }

    fn synced(&self, dir: &str) {
        let mut unsynced = self.0.lock();
        unsynced.put.retain(|path| dir_of(path) != dir);
        unsynced.deleted.retain(|path, _| dir_of(path) != dir);
    }

    fn put(&self, path: &Path, bytes: Bytes, durable: bool, is_new: bool) {
        let mut unsynced = self.0.lock();
        if durable {
            // It has synced the directory, too.
            unsynced
                .deleted
                .retain(|other, _| dir_of(other) != dir_of(path));
            unsynced.put.remove(path);
        } else if is_new {
            unsynced.put.insert(path.clone());
        }
        unsynced.deleted.remove(path);
        unsynced.events.push(Event::Put(path.clone(), bytes));
    }

    fn deleted(&self, path: &Path, bytes: Bytes) {
        let mut unsynced = self.0.lock();
        // What was not durable before may come back as well as not.
        unsynced.put.remove(path);
        unsynced.deleted.insert(path.clone(), bytes);
        unsynced.events.push(Event::Deleted(path.clone()));
    }
}

/// A put that fails and has taken place is visible but not durable; a sync of its directory, or a put that succeeds,
/// makes it so. A delete is durable once its directory is synced, by a put in it or by itself.
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
                self.volatile.synced(prefix);
                Ok(())
            }
            Fate::Failed { .. } | Fate::Crashed { .. } => {
                Err(std::io::Error::other("a fault was asked for"))
            }
        }
    }

    fn forget(&self, object: &str) -> std::io::Result<()> {
        self.fuse.forgotten.lock().insert(object.to_owned());
        Ok(())
    }
}

/// What a system says of a bad sector.
const EIO: i32 = 5;

fn bad_sector() -> Error {
    Error::Generic {
        store: "faulty",
        source: std::io::Error::from_raw_os_error(EIO).into(),
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
        let bytes = Bytes::from(payload.clone());
        match self.fuse.fate() {
            Fate::Good => {
                let put = self.objects.put_opts(location, payload, opts).await;
                if put.is_ok() {
                    self.volatile.put(location, bytes, true, false);
                }
                put
            }
            Fate::Failed { done } | Fate::Crashed { done } => {
                if done {
                    use object_store::ObjectStoreExt;
                    let is_new = self.objects.head(location).await.is_err();
                    let put = self.objects.put_opts(location, payload, opts).await;
                    if put.is_ok() {
                        self.volatile.put(location, bytes, false, is_new);
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
            return Err(bad_sector());
        }
        let range = match &options.range {
            _ if options.head => 0..0,
            Some(GetRange::Bounded(range)) => range.clone(),
            _ => 0..u64::MAX,
        };
        self.fuse.read_sectors(location, &[range])?;
        self.fuse.reads.lock().sections += 1;
        self.objects.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.alive()?;
        self.fuse.read_sectors(location, ranges)?;
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
                        let bytes = store.objects.get(&location).await?.bytes().await?;
                        store.volatile.deleted(&location, bytes);
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
            Ok(()) => {
                let aged = self.fuse.aged.load(Ordering::Acquire);
                let seen = move |mut meta: ObjectMeta| {
                    if aged {
                        meta.last_modified -= Duration::from_secs(10 * 365 * 86_400);
                    }
                    meta
                };
                self.objects.list(prefix).map_ok(seen).boxed()
            }
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
