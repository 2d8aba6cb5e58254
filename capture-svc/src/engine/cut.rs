//! What every engine gives for a cut: the blocks that changed, and a reader of what was there.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tidemark_block::{BlockSet, Epoch, Extent, Geometry};
use tidemark_disk::ChecksumTable;

use super::{EngineError, intercept, reflink, scan};

/// What a cut may go by; only `scan` needs it.
#[derive(Debug, Clone, Copy, Default)]
pub struct CutAt<'a> {
    /// Everyone who was asked says that the workload holds still.
    pub quiesced: bool,
    /// The checksums of the base; none while they are not known.
    pub base: Option<&'a ChecksumTable>,
    /// The longest wait for a moment at which the file is not written.
    pub lull_wait_max: Duration,
    /// So long without a write is one.
    pub lull_min: Duration,
    /// Set where nobody wants the cut any more.
    pub abandoned: Option<&'a AtomicBool>,
}

impl CutAt<'_> {
    /// Whether nobody wants the cut any more.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.is_some_and(|flag| flag.load(Relaxed))
    }
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

impl From<intercept::IntervalCut> for IntervalCut {
    fn from(cut: intercept::IntervalCut) -> Self {
        Self {
            epoch: cut.epoch,
            changed: cut.changed,
            reader: cut.reader.into(),
        }
    }
}

impl From<reflink::IntervalCut> for IntervalCut {
    fn from(cut: reflink::IntervalCut) -> Self {
        Self {
            epoch: cut.epoch,
            changed: cut.changed,
            reader: cut.reader.into(),
        }
    }
}

impl From<scan::IntervalCut> for IntervalCut {
    fn from(cut: scan::IntervalCut) -> Self {
        Self {
            epoch: cut.epoch,
            changed: cut.changed,
            reader: SnapshotReader::Scan(cut.reader),
        }
    }
}

/// Reads the volume as it was at an open cut. Cloning is cheap.
#[derive(Debug, Clone)]
pub enum SnapshotReader {
    /// From before-images and the volume file.
    Intercept(intercept::SnapshotReader),
    /// From a clone.
    Reflink(reflink::CloneReader),
    /// From what was put aside; only the blocks that differ from the base.
    Scan(scan::ScanReader),
}

impl From<intercept::SnapshotReader> for SnapshotReader {
    fn from(reader: intercept::SnapshotReader) -> Self {
        Self::Intercept(reader)
    }
}

impl From<reflink::CloneReader> for SnapshotReader {
    fn from(reader: reflink::CloneReader) -> Self {
        Self::Reflink(reader)
    }
}

impl SnapshotReader {
    /// The last epoch that is seen.
    #[must_use]
    pub fn cut(&self) -> Epoch {
        match self {
            Self::Intercept(reader) => reader.cut(),
            Self::Reflink(reader) => reader.cut(),
            Self::Scan(reader) => reader.cut(),
        }
    }

    /// The volume's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        match self {
            Self::Intercept(reader) => reader.geometry(),
            Self::Reflink(reader) => reader.geometry(),
            Self::Scan(reader) => reader.geometry(),
        }
    }

    /// Reads whole blocks; `buffer` has the length of the extent.
    ///
    /// # Errors
    /// [`EngineError::GivenUp`] where the cut was given up meanwhile, or what the files say.
    pub fn read_blocks(&self, extent: Extent, buffer: &mut [u8]) -> Result<(), EngineError> {
        match self {
            Self::Intercept(reader) => reader.read_blocks(extent, buffer),
            Self::Reflink(reader) => reader.read_blocks(extent, buffer),
            Self::Scan(reader) => reader.read_blocks(extent, buffer),
        }
    }

    /// The parts of the extent that may hold other bytes than zeroes; the rest reads as zeroes.
    ///
    /// # Errors
    /// As [`Self::read_blocks`].
    pub fn data_extents(&self, extent: Extent) -> Result<BlockSet, EngineError> {
        match self {
            Self::Intercept(reader) => reader.data_extents(extent),
            Self::Reflink(reader) => reader.data_extents(extent),
            Self::Scan(reader) => reader.data_extents(extent),
        }
    }
}
