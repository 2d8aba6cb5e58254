//! Reading the volume as it was at a cut: a clone is an ordinary file.

use std::{
    fs::File,
    io,
    num::NonZeroU64,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use capture_core::reflink::extents::{Place, Runs as _};
use rustix::fs::{Advice, fadvise};
use tidemark_block::{BlockSet, Epoch, Extent, Geometry};

use super::{super::EngineError, fiemap::FileRuns};

/// The most bytes that are read ahead of the first reader.
const READ_AHEAD_BYTES: u64 = 64 << 20;

/// How much stays in the page cache, at least, of what a pass over a clone has read; at most twice as much does.
const KEPT_BYTES: u64 = 16 << 20;

/// Reads a clone. One that is removed meanwhile goes with its last reader. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct CloneReader(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    file: File,
    cut: Epoch,
    geometry: Geometry,
    /// Up to where a pass has let pages go; none where it is read in any order.
    passed: Option<AtomicU64>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // A clone's pages are not those of the volume file: nobody else wants them. Those of a whole large
        // file would take seconds: passes let go of them before (`let_go_before`).
        let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
    }
}

impl CloneReader {
    /// Of a clone that is read in any order.
    pub(super) fn new(file: File, cut: u64, geometry: Geometry) -> Self {
        Self::of(file, cut, geometry, None)
    }

    /// Of a clone that is read in passes, from its start to its end.
    pub(super) fn in_passes(file: File, cut: u64, geometry: Geometry) -> Self {
        Self::of(file, cut, geometry, Some(AtomicU64::new(0)))
    }

    fn of(file: File, cut: u64, geometry: Geometry, passed: Option<AtomicU64>) -> Self {
        Self(Arc::new(Opened {
            file,
            cut: Epoch::new(cut),
            geometry,
            passed,
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
        self.0.file.read_exact_at(buffer, offset)?;
        self.let_go_before(offset);
        Ok(())
    }

    /// Takes what a pass has behind it from the page cache, a good deal at once.
    fn let_go_before(&self, offset: u64) {
        let Some(passed) = &self.0.passed else {
            return;
        };
        let (from, to) = (passed.load(Relaxed), offset.saturating_sub(KEPT_BYTES));
        if to >= from + KEPT_BYTES {
            // It changes nothing but what reading again takes, so neither do two at once.
            let _ = fadvise(
                &self.0.file,
                from,
                NonZeroU64::new(to - from),
                Advice::DontNeed,
            );
            passed.store(to, Relaxed);
        } else if offset + 2 * KEPT_BYTES < from {
            // Another pass.
            passed.store(offset, Relaxed);
        }
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
