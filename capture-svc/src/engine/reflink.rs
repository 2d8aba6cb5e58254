//! The engine `reflink`: the workload writes the volume file itself, on a filesystem that clones files (XFS, btrfs).
//!
//! A cut is a clone of the file (`clones`); what changed is what the clones of two cuts differ in, by the filesystem's
//! own map of them (`compare`, `fiemap`, `capture_core::reflink::extents`), never by a look at the file itself: that changes
//! meanwhile, and in part where it lies. A snapshot is a clone that is kept. Nothing has to be seen, so nothing can be
//! missed while the service is down, and no crash loses more than the clone that was being made; no privilege is needed.
//!
//! A clone holds writers up for as long as it takes, which grows with the number of extents (XFS: 4.2 s at 100,000), not
//! with their length. Each cut's cost is measured and shown.
//!
//! What is recorded is in `capture_core::reflink::state`, `docs/CRASH-RULES.md` has the order of steps.

mod clones;
mod compare;
mod fiemap;
mod open;
mod reader;
mod snapshots;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use capture_core::reflink::{
    extents::Difference,
    state::{Base, CloneFile, State},
};
use parking_lot::{Mutex, MutexGuard};
use tidemark_block::{BlockIndex, BlockSet, Epoch, Extent, Geometry, VolumeId};
use tidemark_disk::{durable, lock::FileLock};

pub use reader::CloneReader;

use super::{EngineError, EngineOptions, EngineSetup, EngineStats, Trust, volume_file};
use clones::{CloneError, Clones, Made};

pub(super) use open::{has_record, missing_clones, prepare, remove_state};

/// An open interval: what changed up to a cut, and the volume as it was at the cut.
#[derive(Debug, Clone)]
pub struct IntervalCut {
    /// The last epoch that the interval covers.
    pub epoch: Epoch,
    /// The blocks that may differ from the base.
    pub changed: Arc<BlockSet>,
    /// Reads the volume as it was at the cut.
    pub reader: CloneReader,
}

/// The engine of one volume. Every call blocks; none may be made on an async worker.
#[derive(Debug)]
pub struct Reflink {
    volume: VolumeId,
    geometry: Geometry,
    /// The path of the volume file.
    path: PathBuf,
    source: File,
    /// The path of the record.
    record: PathBuf,
    clones: Clones,
    options: EngineOptions,
    /// One cut after the other. A cut may take seconds; commits don't wait for it.
    cutting: Mutex<()>,
    /// One change of the record after the other, for as long as the disk takes. Taken inside `cutting`.
    changing: Mutex<()>,
    /// Locked to look and to swap, never over input or output: figures are asked for on async workers, too. Taken last.
    now: Mutex<Now>,
    closed: AtomicBool,
    failed: AtomicBool,
    _lock: FileLock,
}

/// What changes.
#[derive(Debug)]
struct Now {
    /// As it was recorded last.
    state: State,
    interval: Option<IntervalCut>,
    /// The base's clone, where there is one.
    base: Option<CloneReader>,
    stall: Duration,
    extents: u64,
}

impl Reflink {
    /// Makes the state of a new volume in `dir`, and opens it. The base is the all-zero image.
    ///
    /// # Errors
    /// Where the file can't be cloned, takes too long to, or something isn't fit; nothing is left behind then.
    pub fn create(setup: EngineSetup<'_>) -> Result<Arc<Self>, EngineError> {
        open::create(setup).map(Arc::new)
    }

    /// Opens a volume that was created before. Blocks that may have changed meanwhile need no tracking: the next clone
    /// shows them.
    ///
    /// # Errors
    /// Where the file or the directory isn't fit; nothing was changed then, and the call may be repeated.
    pub fn open(setup: EngineSetup<'_>) -> Result<(Arc<Self>, Trust), EngineError> {
        let (engine, trust) = open::open(setup, false)?;
        Ok((Arc::new(engine), trust))
    }

    /// As [`Self::open`], whatever file is found: it is the volume's from now on, and every block is in doubt.
    ///
    /// # Errors
    /// As [`Self::open`], save for [`EngineError::VolumeReplaced`].
    pub fn readopt(setup: EngineSetup<'_>) -> Result<(Arc<Self>, Trust), EngineError> {
        let (engine, trust) = open::open(setup, true)?;
        Ok((Arc::new(engine), trust))
    }

    /// Refuses further work. Everything is durable already. Closing again does nothing.
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
        drop(self.cutting.lock());
    }

    fn check_open(&self) -> Result<(), EngineError> {
        if self.closed.load(SeqCst) {
            Err(EngineError::Closed)
        } else if self.failed.load(SeqCst) {
            Err(EngineError::Poisoned)
        } else {
            Ok(())
        }
    }

    /// The volume's geometry.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The open epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch::new(self.now.lock().state.last_cut + 1)
    }

    /// Figures of this moment. Blocks that have changed since the last cut are not known.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let now = self.now.lock();
        let open = now.interval.as_ref();
        let open = open.map_or(0, |interval| interval.changed.len().get());
        EngineStats {
            changed_blocks: open + now.state.carry.len().get(),
            snapshots: now.state.snapshots.len() as u64,
            last_flip: now.stall,
            extents: now.extents,
            poisoned: self.failed.load(SeqCst),
            ..EngineStats::default()
        }
    }

    /// Whether the file at the path is the one that is open.
    ///
    /// # Errors
    /// What the system says to a look at either.
    pub fn has_open(&self, path: &Path) -> Result<bool, EngineError> {
        volume_file::is_at(&self.source, path)
    }

    /// Puts blocks into the next interval, durably.
    ///
    /// # Errors
    /// Where the record can't be written.
    pub fn doubt(&self, blocks: &BlockSet) -> Result<(), EngineError> {
        self.check_open()?;
        let changing = self.changing.lock();
        let mut state = self.state();
        state.carry.union_with(blocks);
        self.store(&changing, state, |_| {})
    }

    fn state(&self) -> State {
        self.now.lock().state.clone()
    }

    /// Records what is so from now on; once that is durable it is seen, together with what `show` sets. What
    /// `show` takes out is given back: to close a clone may take long, and must not be done under the lock.
    fn store<R>(
        &self,
        _changing: &MutexGuard<'_, ()>,
        state: State,
        show: impl FnOnce(&mut Now) -> R,
    ) -> Result<R, EngineError> {
        durable::write_file(&self.record, &state.encode())
            .map_err(|error| EngineError::io(format!("write {}", self.record.display()), error))?;
        let mut now = self.now.lock();
        now.state = state;
        Ok(show(&mut now))
    }

    /// Cuts, and opens the interval of all blocks that may differ from the base.
    ///
    /// # Errors
    /// [`EngineError::IntervalOpen`] where one is open; where the file can't be cloned nothing has changed.
    pub fn begin_interval(&self) -> Result<IntervalCut, EngineError> {
        let _cutting = self.cutting.lock();
        self.check_open()?;
        let base = {
            let now = self.now.lock();
            if let Some(interval) = &now.state.interval {
                return Err(EngineError::IntervalOpen(Epoch::new(interval.clone.cut)));
            }
            (now.state.base, now.base.clone())
        };
        let made = self.clone_now()?;
        let (clone, reader) = (made.clone, self.reader(made));
        let begun = self
            .changed_since(base, &reader)
            .and_then(|difference| self.open_new(clone, reader, difference));
        if begun.is_err() {
            self.clones.remove(clone.cut);
        }
        begun
    }

    fn open_new(
        &self,
        clone: CloneFile,
        reader: CloneReader,
        difference: Difference,
    ) -> Result<IntervalCut, EngineError> {
        let changing = self.changing.lock();
        let mut state = self.state();
        let mut changed = difference.changed;
        changed.union_with(&state.carry);
        state.begin(clone);
        let interval = IntervalCut {
            epoch: Epoch::new(clone.cut),
            changed: Arc::new(changed),
            reader,
        };
        self.store(&changing, state, |now| {
            now.extents = difference.runs;
            now.interval = Some(interval.clone());
        })?;
        drop(changing);
        interval.reader.read_ahead(&interval.changed);
        Ok(interval)
    }

    /// Clones the volume file, as it is at one moment.
    fn clone_now(&self) -> Result<Made, EngineError> {
        self.check_file()?;
        let cut = self.now.lock().state.last_cut + 1;
        let made = self.clones.make(&self.source, cut);
        let made = made.map_err(|error| self.explain(error))?;
        self.now.lock().stall = made.stall;
        if let Some(most) = self.options.cut_stall_max.filter(|most| made.stall > *most) {
            tracing::warn!(
                volume = %self.volume, file = %self.path.display(), stall = ?made.stall, cut_stall_max = ?most,
                "writers had to wait too long for a cut: the file has too many extents; see docs/ENGINES.md"
            );
        }
        if made.length != self.geometry.length() {
            self.clones.remove(cut);
            return Err(EngineError::VolumeLength {
                path: self.path.clone(),
                found: made.length,
                recorded: self.geometry.length(),
            });
        }
        Ok(made)
    }

    /// What lies at the path must be what is cloned.
    fn check_file(&self) -> Result<(), EngineError> {
        volume_file::check_at(&self.source, &self.path)
    }

    fn reader(&self, made: Made) -> CloneReader {
        CloneReader::in_passes(made.file, made.clone.cut, self.geometry)
    }

    fn explain(&self, error: CloneError) -> EngineError {
        explain(error, &self.path, &self.failed)
    }

    /// What may differ between the base and a clone.
    fn changed_since(
        &self,
        (base, file): (Base, Option<CloneReader>),
        newer: &CloneReader,
    ) -> Result<Difference, EngineError> {
        compare::changed_since(self.volume, base, file.as_ref(), newer)
    }

    /// The open interval: begun before, or survived a restart.
    #[must_use]
    pub fn open_interval(&self) -> Option<IntervalCut> {
        self.now.lock().interval.clone()
    }

    /// Puts the open interval's blocks into the next one, durably. Without an open interval nothing happens.
    ///
    /// # Errors
    /// Where the record can't be written: the interval is still open.
    pub fn give_up_interval(&self) -> Result<(), EngineError> {
        self.check_open()?;
        let changing = self.changing.lock();
        let Some(interval) = self.open_interval() else {
            return Ok(());
        };
        let mut state = self.state();
        state.give_up(&interval.changed);
        let given_up = self.store(&changing, state, |now| now.interval.take())?;
        drop((changing, given_up));
        self.clones.remove(interval.epoch.get());
        Ok(())
    }

    /// Closes the interval with this cut: its generation is committed and the caller has that durably. The next clone is
    /// compared with this one's.
    ///
    /// # Errors
    /// [`EngineError::NoInterval`] where another one or none is open, or where the record can't be written.
    pub fn commit_interval(&self, cut: Epoch) -> Result<(), EngineError> {
        self.check_open()?;
        let changing = self.changing.lock();
        let mut state = self.state();
        let before = state.base;
        if !state.commit(cut.get()) {
            return Err(EngineError::NoInterval(cut));
        }
        let old_base = self.store(&changing, state, |now| {
            let base = now.interval.take().map(|interval| interval.reader);
            std::mem::replace(&mut now.base, base)
        })?;
        drop((changing, old_base));
        if let Base::Clone(clone) = before {
            self.clones.remove(clone.cut);
        }
        Ok(())
    }

    /// The blocks of the extent of which [`Self::read_base`] may give something else than the base.
    #[must_use]
    pub fn tracked(&self, extent: Extent) -> BlockSet {
        let now = self.now.lock();
        now.state.tracked(extent.intersect(self.geometry.all()))
    }

    fn base(&self) -> Option<CloneReader> {
        self.now.lock().base.clone()
    }

    /// The first byte at or after the block that is in no hole of the base's clone; the volume's length where there is
    /// none.
    ///
    /// # Errors
    /// What the clone's file says.
    pub fn next_data(&self, from: BlockIndex) -> io::Result<u64> {
        let offset = self.geometry.offset_of(from).get();
        match self.base() {
            Some(base) => volume_file::data_from(base.file(), offset, self.geometry.length()),
            None => Ok(offset),
        }
    }

    /// Reads whole blocks of the base's clone; zeroes where there is none.
    ///
    /// # Errors
    /// What the clone's file says.
    pub fn read_base(&self, extent: Extent, buffer: &mut [u8]) -> io::Result<()> {
        match self.base() {
            Some(base) => base.read(extent, buffer),
            None => {
                buffer.fill(0);
                Ok(())
            }
        }
    }
}

/// What a clone that could not be made is called outside. A failed sync ends all work: what was lost by it is told once.
fn explain(error: CloneError, path: &Path, failed: &AtomicBool) -> EngineError {
    let path = path.to_owned();
    match error {
        CloneError::Unable(source) => EngineError::NotClonable { path, source },
        CloneError::NoRoom(source) => EngineError::CloneNoRoom { path, source },
        CloneError::Sync(error) => {
            failed.store(true, SeqCst);
            EngineError::io(format!("sync volume file {}", path.display()), error)
        }
        CloneError::Other(error) => {
            EngineError::io(format!("clone volume file {}", path.display()), error)
        }
    }
}
