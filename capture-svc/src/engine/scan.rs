//! The engine `scan`: the workload writes the volume file itself, on any local filesystem.
//!
//! A cut reads the whole file, compares each block with the checksum table of the base, and puts aside the bytes of those
//! that differ (`kept`), in passes (`pass`) that count only if the file was still meanwhile: when that is so
//! `capture_core::scan::moment` decides. What was put aside is the interval, whatever becomes of the file. Nothing has to be
//! seen, so nothing can be missed while the service is down, and no privilege is needed. There are no snapshots.
//!
//! Where everyone holds still, a file whose times are those that it had as the base, when everyone held still too, is not
//! read at all.
//!
//! What is recorded is in `capture_core::scan::state`, `docs/CRASH-RULES.md` has the order of steps.

mod kept;
mod open;
mod pass;
mod source;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use capture_core::{
    engine::records::FileIdentity,
    scan::{
        moment::{FileTimes, Passed, Search, Step, Workload},
        state::{OpenInterval, Proof, State},
    },
};
use parking_lot::Mutex;
use tidemark_block::{BlockIndex, BlockSet, Epoch, Extent, Geometry, VolumeId};
use tidemark_disk::{ChecksumTable, durable, lock::FileLock};

pub use kept::ScanReader;

use super::{CutAt, EngineError, EngineOptions, EngineSetup, EngineStats, Trust, volume_file};
use kept::{Keeper, Kept, path_in};
use pass::{Pass, Prints, Task};
use source::{Source, now_ns};

pub(super) use open::{has_record, prepare, remove_state};

/// The longest wait without a look whether the engine was closed.
const WAIT_MAX: Duration = Duration::from_millis(50);

/// An open interval: what changed up to a cut, and the bytes of it.
#[derive(Debug, Clone)]
pub struct IntervalCut {
    /// The last epoch that the interval covers.
    pub epoch: Epoch,
    /// The blocks that differ from the base.
    pub changed: Arc<BlockSet>,
    /// Reads them.
    pub reader: ScanReader,
}

/// The engine of one volume. Every call blocks; none may be made on an async worker.
#[derive(Debug)]
pub struct Scan {
    volume: VolumeId,
    geometry: Geometry,
    /// The path of the volume file.
    path: PathBuf,
    source: Arc<Source>,
    /// That of the state.
    dir: PathBuf,
    /// What tells the volume file from others now.
    identity: FileIdentity,
    options: EngineOptions,
    /// One cut after the other.
    cutting: Mutex<()>,
    /// One change of the record after the other: held while it is written.
    changing: Mutex<()>,
    now: Mutex<Now>,
    closed: AtomicBool,
    /// A sync of the volume file failed: what was lost by that is told once.
    failed: AtomicBool,
    _lock: FileLock,
}

/// What changes.
#[derive(Debug)]
struct Now {
    /// As it was recorded last.
    state: State,
    interval: Option<IntervalCut>,
    /// How often blocks came in doubt since it was opened.
    doubts: u64,
    /// How long everyone had to hold still for the last cut.
    held: Duration,
}

/// What was found at a moment.
struct Found {
    kept: Option<Kept>,
    /// The file's times then, where nobody was writing.
    proof: Option<Proof>,
}

impl Scan {
    /// Makes the state of a new volume in `dir`, and opens it. The base is the all-zero image.
    ///
    /// # Errors
    /// Where the file doesn't lie on a filesystem that it can be scanned on, or something else isn't fit; nothing is left
    /// behind then.
    pub fn create(setup: EngineSetup<'_>) -> Result<Arc<Self>, EngineError> {
        open::create(setup).map(Arc::new)
    }

    /// Opens a volume that was created before.
    ///
    /// # Errors
    /// Where the file or the directory isn't fit; nothing was changed then, and the call may be repeated.
    pub fn open(setup: EngineSetup<'_>) -> Result<(Arc<Self>, Trust), EngineError> {
        let (engine, trust) = open::open(setup, false)?;
        Ok((Arc::new(engine), trust))
    }

    /// As [`Self::open`], whatever file is found: it is the volume's from now on.
    ///
    /// # Errors
    /// As [`Self::open`], save for [`EngineError::VolumeReplaced`].
    pub fn readopt(setup: EngineSetup<'_>) -> Result<(Arc<Self>, Trust), EngineError> {
        let (engine, trust) = open::open(setup, true)?;
        Ok((Arc::new(engine), trust))
    }

    /// Refuses further work, and ends a cut that is being made. Everything is durable already. Closing again does nothing.
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
        let interval = now.state.interval;
        EngineStats {
            changed_blocks: interval.map_or(0, |interval| interval.changed),
            spool_used: interval.map_or(0, |interval| interval.kept_bytes),
            spool_max: self.options.spool_bytes_max,
            last_flip: now.held,
            poisoned: self.failed.load(SeqCst),
            ..EngineStats::default()
        }
    }

    /// Whether the file at the path is the one that is open.
    ///
    /// # Errors
    /// What the system says to a look at either.
    pub fn has_open(&self, path: &Path) -> Result<bool, EngineError> {
        volume_file::is_at(self.source.file(), path)
    }

    /// The next cut reads everything, whatever the times say. Which blocks are in doubt needs no record: each cut compares
    /// all of them with the table, which is the base's.
    ///
    /// # Errors
    /// Where the record can't be written.
    pub fn doubt(&self) -> Result<(), EngineError> {
        self.check_open()?;
        self.change(State::doubt, |now| now.doubts += 1)
    }

    /// Records what is so from now on.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut State) -> T,
        then: impl FnOnce(&mut Now),
    ) -> Result<T, EngineError> {
        let _changing = self.changing.lock();
        let before = self.now.lock().state.clone();
        let mut state = before.clone();
        let result = change(&mut state);
        if state != before {
            let path = open::record_path(&self.dir);
            durable::write_file(&path, &state.encode())
                .map_err(|error| EngineError::io(format!("write {}", path.display()), error))?;
        }
        let mut now = self.now.lock();
        now.state = state;
        then(&mut now);
        Ok(result)
    }

    /// Cuts, and opens the interval of all blocks that differ from the base.
    ///
    /// # Errors
    /// [`EngineError::IntervalOpen`] where one is open; [`EngineError::Unsteady`] where the file was never still; nothing
    /// has changed then.
    pub fn begin_interval(&self, at: &CutAt<'_>) -> Result<IntervalCut, EngineError> {
        let _cutting = self.cutting.lock();
        self.check_open()?;
        let (state, doubts) = {
            let now = self.now.lock();
            (now.state.clone(), now.doubts)
        };
        if let Some(interval) = state.interval {
            return Err(EngineError::IntervalOpen(Epoch::new(interval.cut)));
        }
        let base = at.base.ok_or(EngineError::NoBase)?;
        let (cut, began) = (state.last_cut + 1, Instant::now());
        self.check_file()?;
        let found = match self.still_the_base(at, state.proof)? {
            Some(proof) => Found {
                kept: None,
                proof: Some(proof),
            },
            None => self.find(at, base, cut)?,
        };
        self.check_file()?;
        let interval = OpenInterval {
            cut,
            kept_bytes: found.kept.as_ref().map_or(0, |kept| kept.bytes),
            changed: found
                .kept
                .as_ref()
                .map_or(0, |kept| kept.changed.len().get()),
            proof: found.proof,
        };
        let source = Arc::clone(&self.source);
        let reader = ScanReader::new(found.kept, source, self.volume, self.geometry, cut);
        let begun = IntervalCut {
            epoch: Epoch::new(cut),
            changed: reader.changed(),
            reader,
        };
        let held = if at.quiesced {
            began.elapsed()
        } else {
            Duration::ZERO
        };
        let opened = self.change(
            |state| {
                state.begin(interval);
                // Blocks came in doubt meanwhile: what was read is right, but the base may not be.
                if self.now.lock().doubts != doubts {
                    state.doubt();
                }
            },
            |now| {
                now.interval = Some(begun.clone());
                now.held = held;
            },
        );
        if opened.is_err() {
            // The record may name it, or not: the number is not used again.
            self.now.lock().state.last_cut = cut;
            self.remove(cut);
        }
        opened.map(|()| begun)
    }

    /// What lies at the path must be what is read.
    fn check_file(&self) -> Result<(), EngineError> {
        let metadata = self.source.file().metadata();
        let found =
            metadata.map_err(|error| EngineError::io("look at the open volume file", error))?;
        if found.len() != self.geometry.length() {
            return Err(EngineError::VolumeLength {
                path: self.path.clone(),
                found: found.len(),
                recorded: self.geometry.length(),
            });
        }
        volume_file::check_at(self.source.file(), &self.path)
    }

    /// What proves that the file is still the base, where everyone holds still now.
    fn still_the_base(
        &self,
        at: &CutAt<'_>,
        known: Option<Proof>,
    ) -> Result<Option<Proof>, EngineError> {
        if !at.quiesced || known.is_none() {
            return Ok(None);
        }
        if let Err(error) = self.source.sync() {
            self.failed.store(true, SeqCst);
            return Err(EngineError::io("sync the volume file", error));
        }
        Ok(self.proof()?.filter(|now| known.as_ref() == Some(now)))
    }

    /// The file's times, where every later write must leave others.
    fn proof(&self) -> Result<Option<Proof>, EngineError> {
        let times = self.source.times();
        let times = times
            .map_err(|error| EngineError::io("look at the times of the volume file", error))?;
        Ok(self.proof_by(times))
    }

    fn proof_by(&self, times: FileTimes) -> Option<Proof> {
        times.is_settled(now_ns()).then_some(Proof {
            boot: self.identity.boot,
            mount: self.identity.mount,
            times,
        })
    }

    /// Reads the file, until what was read is the file at one moment.
    fn find(&self, at: &CutAt<'_>, base: &ChecksumTable, cut: u64) -> Result<Found, EngineError> {
        let began = Instant::now();
        let workload = match at.quiesced {
            true => Workload::Quiesced,
            false => Workload::Live {
                lull_wait_max: at.lull_wait_max,
                lull_min: at.lull_min,
            },
        };
        let (mut search, mut step) = Search::begin(began.elapsed(), workload);
        let mut attempt = None;
        loop {
            step = match step {
                Step::Look(after) => {
                    self.wait(at, after)?;
                    let times = self.source.times().map_err(|error| {
                        EngineError::io("look at the times of the volume file", error)
                    })?;
                    search.looked(began.elapsed(), times.age(now_ns()))
                }
                Step::Pass { first: true } => {
                    // What an attempt before put aside goes first.
                    drop(attempt.take());
                    let keeper = self.keeper(cut)?;
                    let keep = Task::Keep {
                        base,
                        keeper: &keeper,
                    };
                    let (passed, prints) = self.pass(at, keep)?;
                    attempt = Some((keeper, prints, passed.after));
                    search.passed(began.elapsed(), &passed)
                }
                Step::Pass { first: false } => {
                    let prints = attempt.as_ref().map_or(&[][..], |(_, prints, _)| prints);
                    let (passed, _) = self.pass(at, Task::Compare(prints))?;
                    search.passed(began.elapsed(), &passed)
                }
                Step::Accept => return self.accept(at, attempt),
                Step::Refuse(why) => {
                    return Err(EngineError::Unsteady {
                        path: self.path.clone(),
                        why,
                    });
                }
            };
        }
    }

    fn keeper(&self, cut: u64) -> Result<Keeper, EngineError> {
        let room = self.options.spool_bytes_max;
        Keeper::create(&self.dir, self.volume, self.geometry, cut, room).map_err(|error| {
            EngineError::io(
                format!("create {}", path_in(&self.dir, cut).display()),
                error,
            )
        })
    }

    fn pass(&self, at: &CutAt<'_>, task: Task<'_>) -> Result<(Passed, Prints), EngineError> {
        let pass = Pass {
            source: &self.source,
            geometry: self.geometry,
            task,
            in_background: !at.quiesced,
            failed: &self.failed,
            ended: &|| self.check_wanted(at),
        };
        pass.run()
    }

    fn accept(
        &self,
        at: &CutAt<'_>,
        attempt: Option<(Keeper, Prints, FileTimes)>,
    ) -> Result<Found, EngineError> {
        let Some((keeper, _, times)) = attempt else {
            return Err(EngineError::Abandoned);
        };
        let proof = self.proof_by(times).filter(|_| at.quiesced);
        let kept = keeper.finish();
        let kept = kept.map_err(|error| EngineError::io("put aside what has changed", error))?;
        Ok(Found { kept, proof })
    }

    fn check_wanted(&self, at: &CutAt<'_>) -> Result<(), EngineError> {
        self.check_open()?;
        match at.is_abandoned() {
            true => Err(EngineError::Abandoned),
            false => Ok(()),
        }
    }

    fn wait(&self, at: &CutAt<'_>, time: Duration) -> Result<(), EngineError> {
        let until = Instant::now() + time;
        loop {
            self.check_wanted(at)?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(WAIT_MAX));
        }
    }

    /// The open interval: begun before, or survived a restart.
    #[must_use]
    pub fn open_interval(&self) -> Option<IntervalCut> {
        self.now.lock().interval.clone()
    }

    /// Lets the open interval go: the next cut finds its blocks again. Without an open interval nothing happens.
    ///
    /// # Errors
    /// Where the record can't be written: the interval is still open.
    pub fn give_up_interval(&self) -> Result<(), EngineError> {
        self.check_open()?;
        let Some(cut) = self.now.lock().state.interval.map(|interval| interval.cut) else {
            return Ok(());
        };
        self.change(State::give_up, |now| now.interval = None)?;
        self.remove(cut);
        Ok(())
    }

    /// Closes the interval with this cut: its generation is committed and the caller has that durably, and in the table.
    ///
    /// # Errors
    /// [`EngineError::NoInterval`] where another one or none is open, or where the record can't be written.
    pub fn commit_interval(&self, cut: Epoch) -> Result<(), EngineError> {
        self.check_open()?;
        let open = self.now.lock().state.interval;
        if open.is_none_or(|interval| interval.cut != cut.get()) {
            return Err(EngineError::NoInterval(cut));
        }
        self.change(|state| state.commit(cut.get()), |now| now.interval = None)?;
        self.remove(cut.get());
        Ok(())
    }

    fn remove(&self, cut: u64) {
        let path = path_in(&self.dir, cut);
        // Nothing names it any more. What stays is removed when the volume is opened.
        if let Err(error) = durable::remove_file(&path) {
            tracing::warn!(volume = %self.volume, file = %path.display(), %error, "remove what was put aside");
        }
    }

    /// The blocks of the extent of which [`Self::read_live`] may give something else than the base: all of them, unless the
    /// file's times prove that it still is the base.
    #[must_use]
    pub fn tracked(&self, extent: Extent) -> BlockSet {
        let known = self.now.lock().state.proof;
        let same = known.is_some() && self.proof().is_ok_and(|now| now == known);
        if same {
            BlockSet::new()
        } else {
            std::iter::once(extent).collect()
        }
    }

    /// The first byte at or after the block that is in no hole of the file; the volume's length where there is none.
    ///
    /// # Errors
    /// What the file says.
    pub fn next_data(&self, from: BlockIndex) -> io::Result<u64> {
        let offset = self.geometry.offset_of(from).get();
        volume_file::data_from(self.source.file(), offset, self.geometry.length())
    }

    /// Reads whole blocks of the file.
    ///
    /// # Errors
    /// What the file says.
    pub fn read_live(&self, extent: Extent, buffer: &mut [u8]) -> io::Result<()> {
        let offset = self.geometry.offset_of(extent.start()).get();
        self.source.read(buffer, offset)
    }
}
