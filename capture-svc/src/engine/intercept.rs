//! The engine `intercept`: all writes to a volume file pass through here, so that it knows exactly which blocks
//! changed, and can show the volume as it was at any open cut.
//!
//! The decisions are in `capture_core::engine`; here are the files (`files`, `mapped`, `volume_file`), the locks
//! and the waiting. In the order in which a request meets them: `device`, `files`; then `reader` for what reads
//! old cuts, and `open` for how it all begins and ends. `docs/CRASH-RULES.md` says what is durable before what,
//! `docs/FORMAT-CAPTURE.md` how it lies on disk.

mod activity;
mod device;
mod files;
pub(super) mod group;
mod mapped;
mod open;
mod reader;
mod seals;
mod stripes;
mod upgrade;

use std::{
    io,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use super::{
    EngineError, EngineOptions, EngineSetup, EngineStats, SnapshotId, SnapshotInfo, SpoolPolicy,
    Trust, volume_file,
};
use activity::Activity;
pub use activity::Sample;
use capture_core::engine::{
    capture::{Capture, CaptureError},
    cut::{Cut, Purpose},
    damage::Damage,
    records::{LABEL_MAX, Snapshot},
};
use files::Files;
use open::Taken;
pub(super) use open::{lock_state, remove_state};
use parking_lot::{Condvar, Mutex};
pub use reader::SnapshotReader;
use tidemark_block::{
    BlockCount, BlockIndex, BlockSet, Coherence, CutReason, Epoch, Extent, Geometry,
};
use tidemark_disk::lock::FileLock;
use tidemark_telemetry::step;

/// Somebody waits until something has changed; a time limit makes up for a signal that comes too early.
#[derive(Debug, Default)]
struct Signal {
    lock: Mutex<()>,
    changed: Condvar,
}

impl Signal {
    fn notify(&self) {
        drop(self.lock.lock());
        self.changed.notify_all();
    }

    /// Waits, unless `ready` already, for a signal or the time limit.
    fn wait(&self, limit: Duration, ready: impl Fn() -> bool) {
        let mut guard = self.lock.lock();
        if !ready() {
            self.changed.wait_for(&mut guard, limit);
        }
    }
}

/// Figures that can't be had at every moment without waiting.
#[derive(Debug, Default)]
struct Seen {
    spool_used: AtomicU64,
    snapshots: AtomicU64,
}

/// The engine of one volume. Every call blocks; none may be made on an async worker.
#[derive(Debug)]
pub struct Intercept {
    capture: Capture<Files>,
    /// What was found damaged when it was opened.
    damage: Vec<Damage>,
    damaged: AtomicU64,
    options: EngineOptions,
    dir: std::path::PathBuf,
    closed: AtomicBool,
    activity: Activity,
    /// One cut after the other.
    cutting: Mutex<()>,
    last_flip: Mutex<Duration>,
    /// What was seen of the spool and the snapshots at the last look.
    seen: Seen,
    /// One makes room in the spool, the others wait for it.
    relieving: Mutex<()>,
    /// It was said that the disk is full, and nothing could be given up since.
    disk_full_told: AtomicBool,
    settled: Signal,
    intent: Signal,
    room: Signal,
    zeroes_fast: [OnceLock<bool>; 2],
    _volume_lock: FileLock,
    _state_lock: FileLock,
}

/// An open interval: what changed up to a cut, and the volume as it was at the cut.
#[derive(Debug, Clone)]
pub struct IntervalCut {
    /// The last epoch that the interval covers.
    pub epoch: Epoch,
    /// The blocks that may differ from the base.
    pub changed: Arc<BlockSet>,
    /// Reads the volume as it was at the cut.
    pub reader: SnapshotReader,
}

impl Intercept {
    /// Makes the state of a new volume in `dir`, and opens it. The base is the all-zero image: every block that is
    /// no hole in the file is in the carry.
    ///
    /// # Errors
    /// Where the file or the directory isn't fit; nothing is left behind then.
    pub fn create(setup: EngineSetup<'_>) -> Result<Arc<Self>, EngineError> {
        open::create(setup).map(Arc::new)
    }

    /// Opens a volume that was created before, and recovers it.
    ///
    /// # Errors
    /// Where the file or the directory isn't fit; nothing was changed then, and the call may be repeated.
    pub fn open(setup: EngineSetup<'_>) -> Result<(Arc<Self>, Trust), EngineError> {
        let (engine, trust) = open::open(setup, Taken::AsRecorded)?;
        Ok((Arc::new(engine), trust))
    }

    /// As [`Self::open`], whatever file is found: it is the volume's from now on, every block is in doubt, and
    /// snapshots are gone. A crash in the middle leaves it refused as before, or all of that done.
    ///
    /// # Errors
    /// As [`Self::open`], save for [`EngineError::VolumeReplaced`].
    pub fn readopt(setup: EngineSetup<'_>) -> Result<(Arc<Self>, Trust), EngineError> {
        let (engine, trust) = open::open(setup, Taken::Anew)?;
        Ok((Arc::new(engine), trust))
    }

    /// Waits for the requests in flight, syncs everything and marks the state clean. Later requests fail. Closing
    /// again does nothing.
    ///
    /// # Errors
    /// Where a sync fails: the next open recovers as after a crash.
    pub fn close(&self) -> Result<(), EngineError> {
        // First, and without the lock: a cut that holds it may be waiting for a writer that waits for room.
        let closed_before = self.closed.swap(true, SeqCst);
        self.room.notify();
        let _cutting = self.cutting.lock();
        if closed_before {
            return Ok(());
        }
        while !self.capture.is_idle() {
            self.settled
                .wait(Duration::from_millis(1), || self.capture.is_idle());
        }
        self.capture.sync().map_err(|error| self.explain(error))?;
        self.capture.close();
        open::mark_clean(self)
    }

    fn check_open(&self) -> Result<(), EngineError> {
        if self.closed.load(SeqCst) {
            Err(EngineError::Closed)
        } else {
            Ok(())
        }
    }

    /// The files of the state that were found damaged when it was opened: [`Trust`] says the worst that followed.
    #[must_use]
    pub fn damage_at_opening(&self) -> &[Damage] {
        &self.damage
    }

    fn tell(&self, damage: &[Damage]) {
        self.damaged.fetch_add(damage.len() as u64, SeqCst);
        for Damage { file, fault, cost } in damage {
            tracing::error!(
                volume = %self.capture.volume(), file = %self.dir.join(file.to_string()).display(), %fault,
                "a file of the volume's state is damaged: {cost}; check the disk"
            );
        }
    }

    /// The volume's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.capture.geometry()
    }

    /// The open epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch::new(self.capture.epoch())
    }

    /// Figures of this moment.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let (_, slots) = self.capture.spool().used();
        let snapshots = self.capture.snapshots().len() as u64;
        self.stats_with(self.geometry().bytes(BlockCount::new(slots)), snapshots)
    }

    /// As [`Self::stats`], without waiting for the disk: what would have to wait is as it was at the last look.
    #[must_use]
    pub fn stats_now(&self) -> EngineStats {
        let capture = &self.capture;
        if let Some((_, slots)) = capture.spool().used_now() {
            let used = self.geometry().bytes(BlockCount::new(slots));
            self.seen.spool_used.store(used, SeqCst);
        }
        if let Some(count) = capture.snapshot_count_now() {
            self.seen.snapshots.store(count as u64, SeqCst);
        }
        let (used, snapshots) = (&self.seen.spool_used, &self.seen.snapshots);
        self.stats_with(used.load(SeqCst), snapshots.load(SeqCst))
    }

    fn stats_with(&self, spool_used: u64, snapshots: u64) -> EngineStats {
        let counters = &self.capture.counters;
        EngineStats {
            changed_blocks: self.changed_hint(),
            spool_used,
            spool_max: self.options.spool_bytes_max,
            snapshots,
            give_ups: counters.give_ups.load(SeqCst),
            trims_ignored: counters.trims_ignored.load(SeqCst),
            blocks_copied: counters.copied.load(SeqCst),
            intent_regions: self.capture.intent().set_regions().len() as u64,
            damaged: self.damaged.load(SeqCst),
            last_flip: *self.last_flip.lock(),
            extents: 0,
            poisoned: self.capture.is_poisoned(),
        }
    }

    /// Blocks that the next interval will hold, an upper bound: cheap enough to ask for at every write.
    #[must_use]
    pub fn changed_hint(&self) -> u64 {
        self.capture.changed_bound().get()
    }

    /// Whether the file at the path is the one that is open.
    ///
    /// # Errors
    /// What the system says to a look at either.
    pub fn has_open(&self, path: &Path) -> Result<bool, EngineError> {
        volume_file::is_at(self.capture.media().volume(), path)
    }

    /// Puts every block into the next interval, durably.
    ///
    /// # Errors
    /// Where the carry can't be written.
    pub fn doubt_everything(&self, reason: &str) -> Result<(), EngineError> {
        tracing::warn!(
            reason,
            "every block of the volume is in doubt and will be compared"
        );
        self.doubt(&std::iter::once(self.geometry().all()).collect())
    }

    /// Puts blocks into the next interval, durably.
    ///
    /// # Errors
    /// Where the carry can't be written.
    pub fn doubt(&self, blocks: &BlockSet) -> Result<(), EngineError> {
        self.check_open()?;
        self.capture
            .doubt(blocks)
            .map_err(|error| self.explain(error))
    }

    /// Cuts, and opens the interval of all blocks that may differ from the base. It survives a process crash.
    ///
    /// # Errors
    /// [`EngineError::IntervalOpen`] where one is open; where it can't be written the blocks go into the next one.
    pub fn begin_interval(self: &Arc<Self>) -> Result<IntervalCut, EngineError> {
        Ok(self.begin_observed_interval()?.0)
    }

    /// As [`Self::begin_interval`]; also says what the data path had done right after the flip.
    ///
    /// # Errors
    /// As [`Self::begin_interval`].
    pub fn begin_observed_interval(self: &Arc<Self>) -> Result<(IntervalCut, Sample), EngineError> {
        let (cut, at_flip) = self.cut(Purpose::Interval)?;
        Ok((self.interval_of(cut)?, at_flip))
    }

    fn interval_of(self: &Arc<Self>, cut: Epoch) -> Result<IntervalCut, EngineError> {
        let interval = self.open_interval().filter(|open| open.epoch == cut);
        interval.ok_or(EngineError::GivenUp(cut))
    }

    /// What the data path has done so far. Cheap.
    #[must_use]
    pub fn activity(&self) -> Sample {
        self.activity.sample()
    }

    /// Flips, waits for the settle, and finishes the cut.
    fn cut(&self, purpose: Purpose) -> Result<(Epoch, Sample), EngineError> {
        let _cutting = self.cutting.lock();
        self.check_open()?;
        let flipping = step!("flip");
        let begun = Instant::now();
        let cut = self
            .capture
            .begin_cut(purpose)
            .map_err(|error| self.explain(error))?;
        let at_flip = self.activity.sample();
        *self.last_flip.lock() = begun.elapsed();
        drop(flipping);
        Ok((self.finish(cut)?, at_flip))
    }

    /// Waits for the settle of a cut that has begun, and finishes it.
    fn finish(&self, cut: Cut) -> Result<Epoch, EngineError> {
        let _settling = step!("settle").entered();
        self.settle(&cut);
        let epoch = Epoch::new(cut.epoch());
        let finished = self.capture.finish_cut(cut);
        self.tell(&self.capture.take_damage());
        finished.map_err(|error| self.explain(error))?;
        Ok(epoch)
    }

    fn settle(&self, cut: &Cut) {
        while !self.capture.is_settled(cut.epoch()) {
            self.settled.wait(Duration::from_millis(1), || {
                self.capture.is_settled(cut.epoch())
            });
        }
    }

    /// The open interval: begun before, or survived a restart.
    #[must_use]
    pub fn open_interval(self: &Arc<Self>) -> Option<IntervalCut> {
        let interval = self.capture.open_interval()?;
        let view = self.capture.open_cut(interval.cut)?;
        Some(IntervalCut {
            epoch: Epoch::new(interval.cut),
            changed: interval.changed,
            reader: SnapshotReader::new(Arc::clone(self), view),
        })
    }

    /// Folds the open interval's blocks into the next one, durably. Without an open interval nothing happens.
    ///
    /// # Errors
    /// Where the carry can't be written: the interval is still open.
    pub fn give_up_interval(&self) -> Result<(), EngineError> {
        self.check_open()?;
        let result = self
            .capture
            .give_up_interval()
            .map_err(|error| self.explain(error));
        self.room.notify();
        result
    }

    /// Drops the interval with this cut: its generation is committed and the caller has that durably. Syncs the
    /// volume unless that has happened since the cut.
    ///
    /// # Errors
    /// [`EngineError::NoInterval`] where another one or none is open; where the sync fails the engine is stopped.
    pub fn commit_interval(&self, cut: Epoch) -> Result<(), EngineError> {
        self.check_open()?;
        let result = self
            .capture
            .commit_interval(cut.get())
            .map_err(|error| self.explain(error));
        self.room.notify();
        // Requests that met the clearing of the intent map wait for its sync.
        self.intent.notify();
        result
    }

    /// Cuts, and keeps the image at the cut readable. `label` has at most 255 bytes.
    ///
    /// # Errors
    /// [`EngineError::TooManySnapshots`], [`EngineError::GivenUp`] where the spool was full at once, or where the
    /// table can't be written.
    pub fn create_snapshot(&self, label: &str, now_ms: u64) -> Result<SnapshotInfo, EngineError> {
        let (taken, _) = self.create_observed_snapshot(label, now_ms)?;
        Ok(taken)
    }

    /// As [`Self::create_snapshot`]; also says what the data path had done right after the flip.
    ///
    /// # Errors
    /// The same.
    pub fn create_observed_snapshot(
        &self,
        label: &str,
        now_ms: u64,
    ) -> Result<(SnapshotInfo, Sample), EngineError> {
        if label.len() > LABEL_MAX {
            return Err(EngineError::LabelTooLong(label.len()));
        }
        let (cut, at_flip) = self.cut(Purpose::Snapshot {
            label: label.to_owned(),
            time_ms: now_ms,
        })?;
        Ok((self.snapshot_of(cut)?, at_flip))
    }

    /// Records how good the moment of a snapshot's cut was, and why no better.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], or where the table can't be written: the grade is as it was.
    pub fn grade_snapshot(
        &self,
        id: SnapshotId,
        coherence: Coherence,
        reason: &CutReason,
    ) -> Result<(), EngineError> {
        self.check_open()?;
        let graded = self.capture.grade_snapshot(id.0, coherence, reason);
        graded.map_err(|error| self.explain(error))
    }

    fn snapshot_of(&self, cut: Epoch) -> Result<SnapshotInfo, EngineError> {
        let mut snapshots = self.list_snapshots().into_iter();
        let created = snapshots.find(|snapshot| snapshot.cut == cut);
        created.ok_or(EngineError::GivenUp(cut))
    }

    /// All snapshots, oldest first.
    #[must_use]
    pub fn list_snapshots(&self) -> Vec<SnapshotInfo> {
        self.capture
            .snapshots()
            .into_iter()
            .map(SnapshotInfo::from)
            .collect()
    }

    /// Deletes a snapshot. Readers that have it open may finish.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], or where the table can't be written.
    pub fn delete_snapshot(&self, id: SnapshotId) -> Result<(), EngineError> {
        self.check_open()?;
        let result = self
            .capture
            .delete_snapshot(id.0)
            .map_err(|error| self.explain(error));
        self.room.notify();
        result
    }

    /// Opens a snapshot for reading.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`].
    pub fn open_snapshot(self: &Arc<Self>, id: SnapshotId) -> Result<SnapshotReader, EngineError> {
        self.check_open()?;
        let view = self
            .capture
            .open_snapshot(id.0)
            .map_err(|error| self.explain(error))?;
        Ok(SnapshotReader::new(Arc::clone(self), view))
    }

    /// The blocks that may differ between two snapshots.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], [`EngineError::SnapshotOrder`], or where a record can't be read. Where one is
    /// damaged or gone every block counts as changed, and the log says so.
    pub fn changed_between(
        &self,
        older: SnapshotId,
        newer: SnapshotId,
    ) -> Result<BlockSet, EngineError> {
        self.check_open()?;
        let changed = self.capture.changed_between(older.0, newer.0);
        self.tell(&self.capture.take_damage());
        changed.map_err(|error| self.explain(error))
    }

    /// The blocks of the extent that may differ from the base: dirty, carried, or in the open interval.
    #[must_use]
    pub fn tracked(&self, extent: Extent) -> BlockSet {
        self.capture
            .tracked(extent.intersect(self.geometry().all()))
    }

    /// The first byte at or after the block that is in no hole of the volume file; the volume's length where there is
    /// none.
    ///
    /// # Errors
    /// What the volume file says.
    pub fn next_data(&self, from: BlockIndex) -> io::Result<u64> {
        let geometry = self.geometry();
        let offset = geometry.offset_of(from).get();
        let volume = self.capture.media().volume();
        volume_file::data_from(volume, offset, geometry.length())
    }

    /// Reads whole blocks as they are now; `buffer` has the length of the extent. Blocks being written meanwhile may
    /// come torn: ask [`Self::tracked`] afterwards.
    ///
    /// # Errors
    /// What the volume file says.
    pub fn read_live(&self, extent: Extent, buffer: &mut [u8]) -> io::Result<()> {
        use capture_core::engine::media::Media;
        let geometry = self.geometry();
        if extent.end() > geometry.all().end()
            || buffer.len() as u64 != geometry.bytes(extent.count())
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let offset = geometry.offset_of(extent.start()).get();
        self.capture
            .media()
            .read_volume(offset, buffer)
            .map_err(|error| io::Error::from_raw_os_error(error.0))
    }

    /// What a decision's error is called outside.
    fn explain(&self, error: CaptureError) -> EngineError {
        match error {
            CaptureError::Media(error) => EngineError::io(
                format!(
                    "use the volume's files and its state in {}",
                    self.dir.display()
                ),
                io::Error::from_raw_os_error(error.0),
            ),
            CaptureError::Poisoned => EngineError::Poisoned,
            CaptureError::GivenUp(cut) => EngineError::GivenUp(Epoch::new(cut)),
            CaptureError::IntervalOpen(cut) => EngineError::IntervalOpen(Epoch::new(cut)),
            CaptureError::NoInterval(cut) => EngineError::NoInterval(Epoch::new(cut)),
            CaptureError::NoSnapshot(id) => EngineError::NoSuchSnapshot(SnapshotId(id)),
            CaptureError::TooManySnapshots(most) => EngineError::TooManySnapshots(most),
            CaptureError::SnapshotOrder(older, newer) => EngineError::SnapshotOrder {
                older: SnapshotId(older),
                newer: SnapshotId(newer),
            },
            CaptureError::SpoolDamaged(block) => EngineError::SpoolDamaged { block },
            CaptureError::Closed => EngineError::Closed,
        }
    }
}

impl From<Snapshot> for SnapshotInfo {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            id: SnapshotId(snapshot.id),
            label: snapshot.label,
            time_ms: snapshot.time_ms,
            cut: Epoch::new(snapshot.cut),
            coherence: snapshot.coherence,
            reason: snapshot.reason,
        }
    }
}
