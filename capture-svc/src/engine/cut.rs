//! What every engine gives for a cut: the blocks that changed, and a reader of what was there.

use std::sync::Arc;

use tidemark_block::{BlockSet, Epoch, Extent, Geometry};

use super::{EngineError, intercept, reflink};

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

/// Reads the volume as it was at an open cut. Cloning is cheap.
#[derive(Debug, Clone)]
pub enum SnapshotReader {
    /// From before-images and the volume file.
    Intercept(intercept::SnapshotReader),
    /// From a clone.
    Reflink(reflink::CloneReader),
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
        }
    }

    /// The volume's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        match self {
            Self::Intercept(reader) => reader.geometry(),
            Self::Reflink(reader) => reader.geometry(),
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
        }
    }
}
