//! State of one volume's capture: epochs and their gate, what is open, and the rules that tie the files together.
//!
//! All decisions of the engine are methods of [`Capture`]; none of them waits for another request. Where one must,
//! it says so and the caller comes again: on threads by blocking, in the model test by taking another turn.

use std::sync::Arc;

use thiserror::Error;
use tidemark_block::{BlockCount, BlockSet, Extent, Geometry, VolumeId, xxh3_128};

use super::{
    damage::{Cost, Damage, Fault, StateFile},
    dirty::{DirtyLayout, DirtyMap},
    intent::IntentMap,
    media::{Map, Media, MediaError, Record},
    records::{SnapshotTable, encode_carry},
    ring::{RING_WORDS, Ring},
    spool::{Spool, SpoolLimits},
};
use crate::sync::{
    Mutex, MutexGuard, RwLock,
    atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    yield_now,
};

/// Word of the open epoch in [`Map::Tracking`].
pub const EPOCH_WORD: usize = 0;
/// Word of the marks.
pub const MARKS_WORD: usize = 1;
/// Word of the open epoch's [`epoch_seal`], or of that of the next one while a flip is under way.
pub const EPOCH_SEAL_WORD: usize = 2;
/// Word of the number of entries that `spool.slots` has room for: see [`checked_word`].
pub const ENTRIES_WORD: usize = 3;
/// Word of the cut of the newest record of changes, likewise. The words from the next one to the first recorded block
/// are 0.
pub const CHANGES_WORD: usize = 4;
/// First word of the recorded blocks.
pub const RING_WORD: usize = 8;
/// Words of [`Map::Tracking`].
pub const TRACKING_WORDS: usize = RING_WORD + RING_WORDS;
/// Mark: a sync of the volume failed; what was written since the last good one may be lost. No flipped bit makes or
/// unmakes it.
pub const MARK_SYNC_FAILED: u64 = u64::from_le_bytes(*b"TMFAILED");

/// By what an epoch is known to be one that was stored.
#[must_use]
pub fn epoch_seal(epoch: u64) -> u64 {
    let mut low = [0; 8];
    low.copy_from_slice(&xxh3_128(&epoch.to_le_bytes()).as_bytes()[..8]);
    u64::from_le_bytes(low)
}

/// A word that no flipped bit makes another one: the lower half of a number, and its complement above.
#[must_use]
pub const fn checked_word(number: u64) -> u64 {
    number & HALF | (!number & HALF) << 32
}

/// What a word of [`checked_word`] says: the lower half of a number; none where it was damaged. 0 is that of a file made
/// anew.
pub(super) const fn checked(word: u64) -> Option<u64> {
    let number = word & HALF;
    if word == 0 || checked_word(number) == word {
        Some(number)
    } else {
        None
    }
}

const HALF: u64 = 0xFFFF_FFFF;

/// Sizes and bounds of one volume's capture.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    /// Bytes of a region of the intent map; also the most that is written in one step. A multiple of the block size.
    pub region_bytes: u64,
    /// Blocks under one lock.
    pub stripe_blocks: u64,
    /// Bounds of the spool.
    pub spool: SpoolLimits,
    /// The most regions that stay set in the intent map past a commit.
    pub hot_regions_max: usize,
    /// The most snapshots.
    pub snapshots_max: usize,
    /// The most records of changes since the newest snapshot, before they are merged.
    pub changes_max: usize,
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CaptureError {
    /// The medium failed.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// An earlier write or sync of durable state failed.
    #[error("stopped after a failed write or sync")]
    Poisoned,
    /// The cut was given up because the spool was full.
    #[error("the cut at epoch {0} was given up")]
    GivenUp(u64),
    /// An interval is open.
    #[error("the interval cut at epoch {0} is open")]
    IntervalOpen(u64),
    /// No interval with this cut is open.
    #[error("no interval cut at epoch {0} is open")]
    NoInterval(u64),
    /// There is no such snapshot.
    #[error("there is no snapshot {0}")]
    NoSnapshot(u64),
    /// There are as many snapshots as there may be.
    #[error("there are {0} snapshots already")]
    TooManySnapshots(usize),
    /// The older snapshot isn't older.
    #[error("snapshot {0} is not older than snapshot {1}")]
    SnapshotOrder(u64, u64),
    /// A before-image isn't what was stored.
    #[error("the before-image of block {0} in spool.data is damaged")]
    SpoolDamaged(u64),
    /// It was closed.
    #[error("closed")]
    Closed,
}

/// A cut that can be read.
#[derive(Debug)]
pub struct View {
    pub(super) cut: u64,
    pub(super) broken: AtomicBool,
}

impl View {
    /// The last epoch that is seen.
    #[must_use]
    pub const fn cut(&self) -> u64 {
        self.cut
    }

    /// Whether its before-images were given up.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.load(SeqCst)
    }
}

/// A cut whose before-images are kept.
#[derive(Debug)]
pub(super) struct OpenCut {
    pub(super) view: Arc<View>,
    pub(super) readers: u64,
    /// A snapshot or interval stands for it; else only its readers keep it open.
    pub(super) wanted: bool,
}

impl OpenCut {
    /// One that nobody reads yet.
    pub(super) fn new(cut: u64) -> Self {
        let view = View {
            cut,
            broken: AtomicBool::new(false),
        };
        Self {
            view: Arc::new(view),
            readers: 0,
            wanted: true,
        }
    }
}

/// The open interval.
#[derive(Debug, Clone)]
pub struct Interval {
    /// Its cut.
    pub cut: u64,
    /// The blocks that may differ from the base.
    pub changed: Arc<BlockSet>,
    /// There is a record of it. An interval without changes needs none.
    pub(super) recorded: bool,
}

/// What control operations change, under one lock that requests never take.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) cuts: std::collections::BTreeMap<u64, OpenCut>,
    /// Flipped, not finished.
    pub(super) cutting: Option<u64>,
    /// A closed epoch whose dirty map could not be drained.
    pub(super) undrained: Option<u64>,
    pub(super) interval: Option<Interval>,
    pub(super) carry: BlockSet,
    pub(super) snapshots: SnapshotTable,
    /// Cuts with a record of changes.
    pub(super) changes: std::collections::BTreeSet<u64>,
    /// The cut of the last committed interval.
    pub(super) committed: u64,
    /// The records stay as they are.
    pub(super) closed: bool,
}

impl Table {
    /// # Errors
    /// Where the records stay as they are. Whoever replaces one asks under the lock under which it does.
    pub(super) fn check_open(&self) -> Result<(), CaptureError> {
        if self.closed {
            Err(CaptureError::Closed)
        } else {
            Ok(())
        }
    }
}

/// Counters since the opening.
#[derive(Debug, Default)]
pub struct Counters {
    /// Snapshots and intervals given up because the spool was full.
    pub give_ups: AtomicU64,
    /// Blocks of TRIM requests that were ignored for the sake of a snapshot.
    pub trims_ignored: AtomicU64,
    /// Before-images stored.
    pub copied: AtomicU64,
}

/// Keeps two counters off each other's cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded(AtomicU64);

/// The capture of one volume.
#[derive(Debug)]
pub struct Capture<M> {
    pub(super) media: M,
    pub(super) volume: VolumeId,
    pub(super) geometry: Geometry,
    pub(super) tuning: Tuning,
    pub(super) layout: DirtyLayout,
    pub(super) intent: IntentMap,
    pub(super) spool: Spool,
    pub(super) ring: Ring,
    pub(super) table: Mutex<Table>,
    /// Open cuts, ascending: a copy for those who must not take the table's lock.
    open_cuts: RwLock<Arc<[u64]>>,
    /// By parity of the epoch: the newest open cut before it, 0 for none.
    pub(super) cut_before: [AtomicU64; 2],
    inflight: [Padded; 2],
    /// No request enters: several volumes are being flipped.
    gate_closed: AtomicBool,
    /// Blocks set in the dirty map, by parity.
    pub(super) dirty_count: [AtomicU64; 2],
    pub(super) carry_count: AtomicU64,
    poisoned: AtomicBool,
    /// No before-image is freed any more; readers may still let go of cuts. Held while some are freed.
    closed: Mutex<bool>,
    /// One syncs the volume at a time: a failure is reported to one sync only, and must stop the engine before
    /// another one counts as good.
    syncing: Mutex<()>,
    /// Syncs of the volume that have begun.
    syncs_begun: AtomicU64,
    /// All requests of the epochs up to this one have ended.
    pub(super) settled_through: AtomicU64,
    /// A sync of the volume that began after this epoch had settled has succeeded.
    pub(super) synced_through: AtomicU64,
    /// What was found damaged, and nobody was told of.
    damage: Mutex<Vec<Damage>>,
    /// Counters.
    pub counters: Counters,
}

/// Index of an epoch's parity.
#[allow(clippy::cast_possible_truncation, reason = "0 or 1")]
pub(super) const fn parity(epoch: u64) -> usize {
    (epoch & 1) as usize
}

impl<M: Media> Capture<M> {
    #[allow(clippy::too_many_arguments, reason = "only the opening calls it")]
    pub(super) fn assemble(
        media: M,
        volume: VolumeId,
        geometry: Geometry,
        tuning: Tuning,
        intent: IntentMap,
        spool: Spool,
        table: Table,
        settled: u64,
    ) -> Self {
        let capture = Self {
            media,
            volume,
            geometry,
            tuning,
            layout: DirtyLayout::new(geometry.block_count().get()),
            intent,
            spool,
            ring: Ring::default(),
            open_cuts: RwLock::new(Arc::new([])),
            cut_before: Default::default(),
            inflight: Default::default(),
            gate_closed: AtomicBool::new(false),
            dirty_count: Default::default(),
            carry_count: AtomicU64::new(table.carry.len().get()),
            table: Mutex::new(table),
            poisoned: AtomicBool::new(false),
            closed: Mutex::new(false),
            syncing: Mutex::default(),
            syncs_begun: AtomicU64::new(0),
            settled_through: AtomicU64::new(settled),
            synced_through: AtomicU64::new(settled),
            damage: Mutex::default(),
            counters: Counters::default(),
        };
        capture.publish_cuts(&capture.table.lock(), capture.epoch());
        capture
    }

    /// What the capture stands on.
    pub const fn media(&self) -> &M {
        &self.media
    }

    /// The volume's geometry.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The volume.
    pub const fn volume(&self) -> VolumeId {
        self.volume
    }

    /// The spool.
    pub const fn spool(&self) -> &Spool {
        &self.spool
    }

    /// The intent map.
    pub const fn intent(&self) -> &IntentMap {
        &self.intent
    }

    fn epoch_word(&self) -> &AtomicU64 {
        &self.media.words(Map::Tracking)[EPOCH_WORD]
    }

    /// The open epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch_word().load(SeqCst)
    }

    pub(super) fn flip(&self) {
        // A process that ends between the two has opened the next epoch for nobody.
        let next = self.epoch() + 1;
        self.media.words(Map::Tracking)[EPOCH_SEAL_WORD].store(epoch_seal(next), SeqCst);
        self.epoch_word().store(next, SeqCst);
    }

    /// Lets a request in: gives it its epoch, which it must [`Self::exit`] with.
    ///
    /// # Errors
    /// Where the engine is poisoned.
    pub fn enter(&self) -> Result<u64, CaptureError> {
        loop {
            self.check()?;
            let epoch = self.epoch();
            let inflight = &self.inflight[parity(epoch)].0;
            inflight.fetch_add(1, SeqCst);
            if self.epoch() == epoch && !self.gate_closed.load(SeqCst) {
                return Ok(epoch);
            }
            // A flip came between: its settle may have counted us in, and is no longer held up.
            inflight.fetch_sub(1, SeqCst);
            while self.gate_closed.load(SeqCst) {
                yield_now();
            }
        }
    }

    /// Closes or opens the gate. Whoever is counted in before it closes is of the epoch that is open then.
    pub(super) fn close_gate(&self, closed: bool) {
        self.gate_closed.store(closed, SeqCst);
    }

    /// Ends a request. True where a settle may have waited for it.
    pub fn exit(&self, epoch: u64) -> bool {
        let last = self.inflight[parity(epoch)].0.fetch_sub(1, SeqCst) == 1;
        last && self.epoch() != epoch
    }

    /// Whether all requests of a closed epoch have ended. Once it is so it stays so: a request that comes too late to
    /// be of the epoch is counted in it for a moment all the same, see [`Self::enter`].
    pub fn is_settled(&self, epoch: u64) -> bool {
        if epoch <= self.settled_through.load(SeqCst) {
            return true;
        }
        // The flip first: whoever is of the epoch was counted before it.
        let settled = epoch < self.epoch() && self.inflight[parity(epoch)].0.load(SeqCst) == 0;
        if settled {
            self.settled_through.fetch_max(epoch, SeqCst);
        }
        settled
    }

    /// Whether no request is in flight.
    pub fn is_idle(&self) -> bool {
        self.inflight.iter().all(|count| count.0.load(SeqCst) == 0)
    }

    pub(super) fn dirty(&self, epoch: u64) -> DirtyMap<'_> {
        self.layout
            .map(self.media.words(Map::Dirty(u8::from(epoch & 1 == 1))))
    }

    /// The blocks of an epoch's dirty map. A flipped bit counts as set, and is noted.
    pub(super) fn drained(&self, epoch: u64) -> BlockSet {
        let (drained, whole) = self.dirty(epoch).collect_checked(self.geometry.all());
        if !whole {
            let file = StateFile::Dirty(u8::from(epoch & 1 == 1));
            self.note([Damage::new(file, Fault::Healed, Cost::Nothing)]);
        }
        drained
    }

    pub(super) fn ring_words(&self) -> &[AtomicU64] {
        &self.media.words(Map::Tracking)[RING_WORD..][..RING_WORDS]
    }

    /// Refuses work from now on: what is durable is no longer known. Only a new opening helps.
    pub fn poison(&self) {
        self.poisoned.store(true, SeqCst);
    }

    /// A sync failed: as [`Self::poison`], and the next opening does as after a power loss.
    pub fn fail(&self) {
        self.media.words(Map::Tracking)[MARKS_WORD].store(MARK_SYNC_FAILED, SeqCst);
        self.poison();
    }

    /// Notes the newest record of changes, so that one that is gone is missed.
    pub(super) fn newest_changes(&self, cut: u64) {
        self.media.words(Map::Tracking)[CHANGES_WORD].store(checked_word(cut), SeqCst);
    }

    /// Takes note of a damaged file.
    pub(super) fn note(&self, damage: impl IntoIterator<Item = Damage>) {
        self.damage.lock().extend(damage);
    }

    /// What was found damaged since this was asked last. Whoever asks tells a human.
    pub fn take_damage(&self) -> Vec<Damage> {
        std::mem::take(&mut self.damage.lock())
    }

    /// On return the records and the mapped files are as the next opening finds them: whatever is under way has ended,
    /// and what comes later is refused. What a reader lets go of later stays for that opening. No request is in flight
    /// and none is made any more.
    pub fn close(&self) {
        self.table.lock().closed = true;
        *self.closed.lock() = true;
    }

    /// Whether work is refused.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(SeqCst)
    }

    /// # Errors
    /// Where work is refused.
    pub fn check(&self) -> Result<(), CaptureError> {
        if self.is_poisoned() {
            Err(CaptureError::Poisoned)
        } else {
            Ok(())
        }
    }

    /// Makes durable every write that ended before the call.
    ///
    /// # Errors
    /// Where the sync fails; all further work is refused then.
    pub fn sync(&self) -> Result<(), CaptureError> {
        let begun = self.syncs_begun.load(SeqCst);
        let _syncing = self.syncing.lock();
        self.check()?;
        if self.syncs_begun.load(SeqCst) != begun {
            // One has begun since the call, and has ended well.
            return Ok(());
        }
        self.syncs_begun.fetch_add(1, SeqCst);
        let through = self.settled_through.load(SeqCst);
        match self.media.sync_volume() {
            Ok(()) => {
                self.check()?;
                self.synced_through.fetch_max(through, SeqCst);
                Ok(())
            }
            Err(error) => {
                self.fail();
                Err(error.into())
            }
        }
    }

    /// The table, for whoever replaces records by what it holds then.
    ///
    /// # Errors
    /// Where work is refused.
    pub(super) fn table_to_change(&self) -> Result<MutexGuard<'_, Table>, CaptureError> {
        self.check()?;
        let table = self.table.lock();
        table.check_open()?;
        Ok(table)
    }

    /// Replaces a record. After a failure either the old one is known to be there, or all work is refused.
    pub(super) fn put(&self, record: Record, content: Option<&[u8]>) -> Result<(), CaptureError> {
        let Err(error) = self.media.put(record, content) else {
            return Ok(());
        };
        match self.media.get(record) {
            Ok(found) if found.as_deref() != content => {}
            _ => self.poison(),
        }
        Err(error.into())
    }

    /// Replaces the carry, on disk and in memory.
    pub(super) fn put_carry(&self, table: &mut Table, carry: BlockSet) -> Result<(), CaptureError> {
        self.put(Record::Carry, Some(&encode_carry(self.volume, &carry)))?;
        self.carry_count.store(carry.len().get(), SeqCst);
        table.carry = carry;
        Ok(())
    }

    /// Puts blocks into the next interval, durably.
    ///
    /// # Errors
    /// [`CaptureError::Closed`], or where the carry can't be replaced.
    pub fn doubt(&self, blocks: &BlockSet) -> Result<(), CaptureError> {
        let mut table = self.table_to_change()?;
        let mut carry = table.carry.clone();
        carry.union_with(blocks);
        if carry == table.carry {
            Ok(())
        } else {
            self.put_carry(&mut table, carry)
        }
    }

    /// The blocks of an extent that may differ from the base.
    pub fn tracked(&self, extent: Extent) -> BlockSet {
        // Dirty maps first: a drain enters the blocks elsewhere before it clears them.
        let mut tracked = self.dirty(0).collect(extent);
        tracked.union_with(&self.dirty(1).collect(extent));
        let table = self.table.lock();
        tracked.union_with(&table.carry.intersect_extent(extent));
        if let Some(interval) = &table.interval {
            tracked.union_with(&interval.changed.intersect_extent(extent));
        }
        tracked
    }

    /// Blocks that the next interval will hold: an upper bound.
    pub fn changed_bound(&self) -> BlockCount {
        let dirty: u64 = self
            .dirty_count
            .iter()
            .map(|count| count.load(SeqCst))
            .sum();
        BlockCount::new(dirty + self.carry_count.load(SeqCst))
    }

    /// Publishes the open cuts to writers and readers. `newest` is the newest epoch a writer may have, its parity's
    /// and its predecessor's entries are set.
    pub(super) fn publish_cuts(&self, table: &Table, newest: u64) {
        let cuts: Arc<[u64]> = table.cuts.keys().copied().collect();
        for epoch in [newest.saturating_sub(1), newest] {
            let before = cuts
                .iter()
                .rev()
                .find(|&&cut| cut < epoch)
                .copied()
                .unwrap_or(0);
            self.cut_before[parity(epoch)].store(before, SeqCst);
        }
        *self.open_cuts.write() = cuts;
    }

    /// The open cuts, ascending. None once work is refused: the next opening may find a cut that this process has
    /// given up believing in. Such a cut is taken back only after the refusal, which is therefore asked last.
    pub(super) fn open_cuts(&self) -> Option<Arc<[u64]>> {
        let cuts = Arc::clone(&self.open_cuts.read());
        (!self.is_poisoned()).then_some(cuts)
    }

    /// Frees the before-images that no open cut reads.
    pub(super) fn sweep(&self) {
        let closed = self.closed.lock();
        if !*closed {
            self.spool.sweep(&self.media, || self.open_cuts());
        }
    }
}
