//! What knows which blocks of a volume changed, and shows the volume as it was at a cut.
//!
//! There are several ways to know, each an engine of its own; the rest of the service meets them as one [`Engine`],
//! which can cut, say what changed since the base, and read what was there at the cut.

mod cut;
mod error;
pub mod group;
pub mod intercept;
pub mod reflink;
pub mod scan;
mod types;
mod volume_file;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use capture_core::kind::EngineKind;
use capture_core::reflink::state::Base;
use tidemark_block::{
    BlockIndex, BlockSet, Coherence, CutReason, Epoch, Extent, Geometry, VolumeId,
};

pub use cut::{CutAt, IntervalCut, SnapshotReader};
pub use error::EngineError;
use intercept::{Intercept, Sample, lock_state};
use reflink::Reflink;
use scan::Scan;
pub use types::{
    EngineOptions, EngineSetup, EngineStats, FileKey, SnapshotId, SnapshotInfo, SpoolPolicy, Trust,
    file_key,
};

/// The engine of one volume. Every call blocks; none may be made on an async worker.
#[derive(Debug)]
pub enum Engine {
    /// All writes come through our front ends.
    Intercept(Arc<Intercept>),
    /// The workload writes the file itself; cuts are clones of it.
    Reflink(Arc<Reflink>),
    /// The workload writes the file itself; cuts read it.
    Scan(Arc<Scan>),
}

impl Engine {
    /// Makes the state of a new volume in `dir`, and opens it. The base is the all-zero image: whatever differs from
    /// it will be in the first interval.
    ///
    /// # Errors
    /// Where the file or the directory isn't fit; nothing is left behind then.
    pub fn create(kind: EngineKind, setup: EngineSetup<'_>) -> Result<Arc<Self>, EngineError> {
        Ok(Arc::new(match kind {
            EngineKind::Intercept => Self::Intercept(Intercept::create(setup)?),
            EngineKind::Reflink => Self::Reflink(Reflink::create(setup)?),
            EngineKind::Scan => Self::Scan(Scan::create(setup)?),
        }))
    }

    /// Opens a volume that was created before, and recovers it.
    ///
    /// # Errors
    /// Where the file or the directory isn't fit; nothing was changed then, and the call may be repeated.
    pub fn open(
        kind: EngineKind,
        setup: EngineSetup<'_>,
    ) -> Result<(Arc<Self>, Trust), EngineError> {
        let (engine, trust) = match kind {
            EngineKind::Intercept => {
                let (engine, trust) = Intercept::open(setup)?;
                (Self::Intercept(engine), trust)
            }
            EngineKind::Reflink => {
                let (engine, trust) = Reflink::open(setup)?;
                (Self::Reflink(engine), trust)
            }
            EngineKind::Scan => {
                let (engine, trust) = Scan::open(setup)?;
                (Self::Scan(engine), trust)
            }
        };
        Ok((Arc::new(engine), trust))
    }

    /// As [`Self::open`], whatever file is found: it is the volume's from now on, and every block is in doubt. A crash
    /// in the middle leaves it refused as before, or all of that done.
    ///
    /// # Errors
    /// As [`Self::open`], save for [`EngineError::VolumeReplaced`].
    pub fn readopt(
        kind: EngineKind,
        setup: EngineSetup<'_>,
    ) -> Result<(Arc<Self>, Trust), EngineError> {
        let (engine, trust) = match kind {
            EngineKind::Intercept => {
                let (engine, trust) = Intercept::readopt(setup)?;
                (Self::Intercept(engine), trust)
            }
            EngineKind::Reflink => {
                let (engine, trust) = Reflink::readopt(setup)?;
                (Self::Reflink(engine), trust)
            }
            EngineKind::Scan => {
                let (engine, trust) = Scan::readopt(setup)?;
                (Self::Scan(engine), trust)
            }
        };
        Ok((Arc::new(engine), trust))
    }

    /// Whether a state directory holds what an engine of this kind keeps.
    #[must_use]
    pub fn has_state(kind: EngineKind, dir: &Path) -> bool {
        match kind {
            EngineKind::Intercept => dir.join("identity").exists(),
            EngineKind::Reflink => reflink::has_record(dir),
            EngineKind::Scan => scan::has_record(dir),
        }
    }

    /// What a removal of the volume would leave behind outside its state directory, as it isn't there now.
    #[must_use]
    pub fn out_of_reach(dir: &Path, volume: VolumeId) -> Option<PathBuf> {
        reflink::missing_clones(dir, volume)
    }

    /// Removes what an engine of this kind keeps of a volume, in its state directory and elsewhere. Nothing happens where
    /// there is nothing.
    ///
    /// # Errors
    /// Where something can't be removed: the call may be repeated.
    pub fn remove_state(kind: EngineKind, dir: &Path, volume: VolumeId) -> io::Result<()> {
        match kind {
            EngineKind::Intercept => intercept::remove_state(dir),
            EngineKind::Reflink => reflink::remove_state(dir, volume),
            EngineKind::Scan => scan::remove_state(dir),
        }
    }

    /// Makes the state of an engine of this kind for a volume that another one has kept so far: every block is in doubt.
    /// What such an engine left here before is replaced.
    ///
    /// # Errors
    /// Where the file isn't fit for the engine: nothing is left behind then.
    pub fn prepare(kind: EngineKind, setup: &EngineSetup<'_>) -> Result<(), EngineError> {
        Self::remove_state(kind, setup.dir, setup.volume)
            .map_err(|error| EngineError::io(format!("clear {}", setup.dir.display()), error))?;
        match kind {
            EngineKind::Intercept => {
                let engine = Intercept::create(setup.clone())?;
                engine.doubt_everything("the volume has another engine from now on")?;
                engine.close()
            }
            EngineKind::Reflink => reflink::prepare(setup, Base::Lost),
            EngineKind::Scan => scan::prepare(setup),
        }
    }

    /// The engine through which the volume is written, where it is one.
    #[must_use]
    pub const fn intercept(&self) -> Option<&Arc<Intercept>> {
        match self {
            Self::Intercept(engine) => Some(engine),
            Self::Reflink(_) | Self::Scan(_) => None,
        }
    }

    /// Which kind it is.
    #[must_use]
    pub const fn kind(&self) -> EngineKind {
        match self {
            Self::Intercept(_) => EngineKind::Intercept,
            Self::Reflink(_) => EngineKind::Reflink,
            Self::Scan(_) => EngineKind::Scan,
        }
    }

    /// Ends what is under way and leaves the state so that it can be trusted. Closing again does nothing.
    ///
    /// # Errors
    /// Where a sync fails: the next open recovers as after a crash.
    pub fn close(&self) -> Result<(), EngineError> {
        match self {
            Self::Intercept(engine) => engine.close(),
            Self::Reflink(engine) => {
                engine.close();
                Ok(())
            }
            Self::Scan(engine) => {
                engine.close();
                Ok(())
            }
        }
    }

    /// The volume's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        match self {
            Self::Intercept(engine) => engine.geometry(),
            Self::Reflink(engine) => engine.geometry(),
            Self::Scan(engine) => engine.geometry(),
        }
    }

    /// The open epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        match self {
            Self::Intercept(engine) => engine.epoch(),
            Self::Reflink(engine) => engine.epoch(),
            Self::Scan(engine) => engine.epoch(),
        }
    }

    /// Figures of this moment.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        match self {
            Self::Intercept(engine) => engine.stats(),
            Self::Reflink(engine) => engine.stats(),
            Self::Scan(engine) => engine.stats(),
        }
    }

    /// As [`Self::stats`], without waiting for the disk: what would have to wait is as it was at the last look.
    #[must_use]
    pub fn stats_now(&self) -> EngineStats {
        match self {
            Self::Intercept(engine) => engine.stats_now(),
            // Their figures are under a lock that nobody holds while he waits.
            Self::Reflink(_) | Self::Scan(_) => self.stats(),
        }
    }

    /// Blocks that the next interval will hold, an upper bound that is cheap to ask for; none where only a cut tells.
    #[must_use]
    pub fn changed_hint(&self) -> Option<u64> {
        match self {
            Self::Intercept(engine) => Some(engine.changed_hint()),
            Self::Reflink(_) | Self::Scan(_) => None,
        }
    }

    /// What the data path has done so far; none where writes don't pass through the engine. Cheap.
    #[must_use]
    pub fn activity(&self) -> Option<Sample> {
        match self {
            Self::Intercept(engine) => Some(engine.activity()),
            Self::Reflink(_) | Self::Scan(_) => None,
        }
    }

    /// Whether the file at the path is the one that is open.
    ///
    /// # Errors
    /// What the system says to a look at either.
    pub fn has_open(&self, path: &Path) -> Result<bool, EngineError> {
        match self {
            Self::Intercept(engine) => engine.has_open(path),
            Self::Reflink(engine) => engine.has_open(path),
            Self::Scan(engine) => engine.has_open(path),
        }
    }

    /// Puts every block into the next interval, durably.
    ///
    /// # Errors
    /// Where that can't be written.
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
    /// Where that can't be written.
    pub fn doubt(&self, blocks: &BlockSet) -> Result<(), EngineError> {
        match self {
            Self::Intercept(engine) => engine.doubt(blocks),
            Self::Reflink(engine) => engine.doubt(blocks),
            Self::Scan(engine) => engine.doubt(),
        }
    }

    /// Cuts, and opens the interval of all blocks that may differ from the base. It survives a process crash. Also says
    /// what the data path had done right after the flip.
    ///
    /// # Errors
    /// [`EngineError::IntervalOpen`] where one is open; where it can't be written the blocks go into the next one.
    pub fn begin_interval(
        &self,
        at: &CutAt<'_>,
    ) -> Result<(IntervalCut, Option<Sample>), EngineError> {
        match self {
            Self::Intercept(engine) => {
                let (cut, at_flip) = engine.begin_observed_interval()?;
                Ok((cut.into(), Some(at_flip)))
            }
            Self::Reflink(engine) => Ok((engine.begin_interval()?.into(), None)),
            Self::Scan(engine) => Ok((engine.begin_interval(at)?.into(), None)),
        }
    }

    /// The open interval: begun before, or survived a restart.
    #[must_use]
    pub fn open_interval(&self) -> Option<IntervalCut> {
        match self {
            Self::Intercept(engine) => engine.open_interval().map(IntervalCut::from),
            Self::Reflink(engine) => engine.open_interval().map(IntervalCut::from),
            Self::Scan(engine) => engine.open_interval().map(IntervalCut::from),
        }
    }

    /// Folds the open interval's blocks into the next one, durably. Without an open interval nothing happens.
    ///
    /// # Errors
    /// Where that can't be written: the interval is still open.
    pub fn give_up_interval(&self) -> Result<(), EngineError> {
        match self {
            Self::Intercept(engine) => engine.give_up_interval(),
            Self::Reflink(engine) => engine.give_up_interval(),
            Self::Scan(engine) => engine.give_up_interval(),
        }
    }

    /// Drops the interval with this cut: its generation is committed and the caller has that durably.
    ///
    /// # Errors
    /// [`EngineError::NoInterval`] where another one or none is open, or where that can't be made durable.
    pub fn commit_interval(&self, cut: Epoch) -> Result<(), EngineError> {
        match self {
            Self::Intercept(engine) => engine.commit_interval(cut),
            Self::Reflink(engine) => engine.commit_interval(cut),
            Self::Scan(engine) => engine.commit_interval(cut),
        }
    }

    /// Cuts, and keeps the image at the cut readable. `label` has at most 255 bytes. Also says what the data path had done
    /// right after the flip.
    ///
    /// # Errors
    /// [`EngineError::TooManySnapshots`], [`EngineError::NoSnapshots`], or where it can't be kept.
    pub fn create_snapshot(
        &self,
        label: &str,
        now_ms: u64,
    ) -> Result<(SnapshotInfo, Option<Sample>), EngineError> {
        match self {
            Self::Intercept(engine) => {
                let (taken, at_flip) = engine.create_observed_snapshot(label, now_ms)?;
                Ok((taken, Some(at_flip)))
            }
            Self::Reflink(engine) => Ok((engine.create_snapshot(label, now_ms)?, None)),
            Self::Scan(_) => Err(EngineError::NoSnapshots),
        }
    }

    /// Records how good the moment of a snapshot's cut was, and why no better. Until then it is graded as after a power
    /// cut.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], or where that can't be written: the grade is as it was.
    pub fn grade_snapshot(
        &self,
        id: SnapshotId,
        coherence: Coherence,
        reason: &CutReason,
    ) -> Result<(), EngineError> {
        match self {
            Self::Intercept(engine) => engine.grade_snapshot(id, coherence, reason),
            Self::Reflink(engine) => engine.grade_snapshot(id, coherence, reason),
            Self::Scan(_) => Err(EngineError::NoSuchSnapshot(id)),
        }
    }

    /// All snapshots, oldest first.
    #[must_use]
    pub fn list_snapshots(&self) -> Vec<SnapshotInfo> {
        match self {
            Self::Intercept(engine) => engine.list_snapshots(),
            Self::Reflink(engine) => engine.list_snapshots(),
            Self::Scan(_) => Vec::new(),
        }
    }

    /// Deletes a snapshot. Readers that have it open may finish.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], or where that can't be written.
    pub fn delete_snapshot(&self, id: SnapshotId) -> Result<(), EngineError> {
        match self {
            Self::Intercept(engine) => engine.delete_snapshot(id),
            Self::Reflink(engine) => engine.delete_snapshot(id),
            Self::Scan(_) => Err(EngineError::NoSuchSnapshot(id)),
        }
    }

    /// Opens a snapshot for reading.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`].
    pub fn open_snapshot(&self, id: SnapshotId) -> Result<SnapshotReader, EngineError> {
        match self {
            Self::Intercept(engine) => Ok(engine.open_snapshot(id)?.into()),
            Self::Reflink(engine) => Ok(engine.open_snapshot(id)?.into()),
            Self::Scan(_) => Err(EngineError::NoSuchSnapshot(id)),
        }
    }

    /// The blocks that may differ between two snapshots.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], [`EngineError::SnapshotOrder`], or what the files say.
    pub fn changed_between(
        &self,
        older: SnapshotId,
        newer: SnapshotId,
    ) -> Result<BlockSet, EngineError> {
        match self {
            Self::Intercept(engine) => engine.changed_between(older, newer),
            Self::Reflink(engine) => engine.changed_between(older, newer),
            Self::Scan(_) => Err(EngineError::NoSuchSnapshot(older)),
        }
    }

    /// The blocks of the extent of which [`Self::read_clean`] may give something else than the base.
    #[must_use]
    pub fn tracked(&self, extent: Extent) -> BlockSet {
        match self {
            Self::Intercept(engine) => engine.tracked(extent),
            Self::Reflink(engine) => engine.tracked(extent),
            Self::Scan(engine) => engine.tracked(extent),
        }
    }

    /// The first byte at or after the block that [`Self::read_clean`] finds in no hole; the volume's length where there
    /// is none.
    ///
    /// # Errors
    /// What the file says.
    pub fn next_data(&self, from: BlockIndex) -> io::Result<u64> {
        match self {
            Self::Intercept(engine) => engine.next_data(from),
            Self::Reflink(engine) => engine.next_data(from),
            Self::Scan(engine) => engine.next_data(from),
        }
    }

    /// Reads whole blocks for a comparison with the base; `buffer` has the length of the extent. They are those of the
    /// base, unless [`Self::tracked`] names them before or afterwards, or a change was missed.
    ///
    /// # Errors
    /// What the file says.
    pub fn read_clean(&self, extent: Extent, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Intercept(engine) => engine.read_live(extent, buffer),
            Self::Reflink(engine) => engine.read_base(extent, buffer),
            Self::Scan(engine) => engine.read_live(extent, buffer),
        }
    }
}
