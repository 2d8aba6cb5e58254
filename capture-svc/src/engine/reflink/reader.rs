//! Reading the volume as it was at a cut: a clone is an ordinary file.

use std::{fs::File, io, num::NonZeroU64, os::unix::fs::FileExt, sync::Arc};

use capture_core::reflink::extents::{Place, Runs as _};
use rustix::fs::{Advice, fadvise};
use tidemark_block::{BlockSet, Epoch, Extent, Geometry};

use super::{super::EngineError, fiemap::FileRuns};

/// The most bytes that are read ahead of the first reader.
const READ_AHEAD_BYTES: u64 = 64 << 20;

/// Reads a clone. One that is removed meanwhile goes with its last reader. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct CloneReader(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    file: File,
    cut: Epoch,
    geometry: Geometry,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // A clone's pages are not those of the volume file: nobody else wants them.
        let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
    }
}

impl CloneReader {
    pub(super) fn new(file: File, cut: u64, geometry: Geometry) -> Self {
        Self(Arc::new(Opened {
            file,
            cut: Epoch::new(cut),
            geometry,
        }))
    }

    pub(super) fn file(&self) -> &File {
        &self.0.file
    }

    /// Has the first of these blocks read from the disk together: one after the other each would be waited for.
    pub(super) fn read_ahead(&self, blocks: &BlockSet) {
        let geometry = self.geometry();
        let mut left = READ_AHEAD_BYTES;
        for extent in blocks.extents() {
            let length = geometry.bytes(extent.count()).min(left);
            let Some(some) = NonZeroU64::new(length) else {
                return;
            };
            let offset = geometry.offset_of(extent.start()).get();
            // It changes nothing but the time that reading takes.
            let _ = fadvise(&self.0.file, offset, Some(some), Advice::WillNeed);
            left -= length;
        }
    }

    /// The last epoch that is seen.
    #[must_use]
    pub fn cut(&self) -> Epoch {
        self.0.cut
    }

    /// The volume's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    /// Reads whole blocks; `buffer` has the length of the extent.
    ///
    /// # Errors
    /// What the clone's file says.
    pub fn read_blocks(&self, extent: Extent, buffer: &mut [u8]) -> Result<(), EngineError> {
        self.read(extent, buffer)
            .map_err(|error| match error.kind() {
                io::ErrorKind::InvalidInput => EngineError::OutOfRange,
                _ => EngineError::io(format!("read the clone of cut {}", self.cut()), error),
            })
    }

    pub(super) fn read(&self, extent: Extent, buffer: &mut [u8]) -> io::Result<()> {
        let geometry = self.geometry();
        if extent.end() > geometry.all().end()
            || buffer.len() as u64 != geometry.bytes(extent.count())
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let offset = geometry.offset_of(extent.start()).get();
        self.0.file.read_exact_at(buffer, offset)
    }

    /// The parts of the extent that may hold other bytes than zeroes; the rest reads as zeroes.
    ///
    /// # Errors
    /// As [`Self::read_blocks`].
    pub fn data_extents(&self, extent: Extent) -> Result<BlockSet, EngineError> {
        let extent = extent.intersect(self.geometry().all());
        self.data_within(extent).map_err(|error| {
            EngineError::io(
                format!("look for holes in the clone of cut {}", self.cut()),
                error,
            )
        })
    }

    /// Asks for the map of just these blocks: a search for the next hole would go through all extents up to it.
    fn data_within(&self, extent: Extent) -> io::Result<BlockSet> {
        let geometry = self.geometry();
        let offset = |block| geometry.offset_of(block).get();
        let (start, end) = (offset(extent.start()), offset(extent.end()));
        let mut runs = FileRuns::within(&self.0.file, start..end);
        let mut blocks = BlockSet::new();
        while let Some(run) = runs.next()? {
            if run.place != Place::Zero {
                let within = geometry.covering(run.start, run.length).intersect(extent);
                blocks.insert(within);
            }
        }
        Ok(blocks)
    }
}
