//! Reading the volume as it was at a cut, in three phases whose order keeps rule
//! `a_snapshot_reader_checks_the_index_after_the_copy`.

use std::sync::Arc;

use tidemark_block::{BlockIndex, BlockSet, Extent};

use super::{
    capture::{Capture, CaptureError, View},
    media::Media,
    spool::SpoolError,
};

/// A read of an extent at a cut: [`Self::before_images`], then [`Self::live`], then [`Self::recheck`].
#[derive(Debug)]
pub struct SnapshotRead {
    view: Arc<View>,
    extent: Extent,
    live: BlockSet,
}

impl SnapshotRead {
    /// A read of an extent within the volume. The view stays open meanwhile.
    #[must_use]
    pub fn new(view: Arc<View>, extent: Extent) -> Self {
        Self {
            view,
            extent,
            live: BlockSet::new(),
        }
    }

    /// Reads the blocks whose before-images are in the spool.
    ///
    /// # Errors
    /// Where one is damaged, or the cut was given up.
    pub fn before_images<M: Media>(
        &mut self,
        capture: &Capture<M>,
        buffer: &mut [u8],
    ) -> Result<(), CaptureError> {
        self.live = BlockSet::new();
        self.live.insert(self.extent);
        self.take_spooled(capture, buffer)
    }

    /// Copies the other blocks out of the volume.
    ///
    /// # Errors
    /// What the medium says.
    pub fn live<M: Media>(
        &self,
        capture: &Capture<M>,
        buffer: &mut [u8],
    ) -> Result<(), CaptureError> {
        for run in self.live.extents() {
            let part = self.part(capture, run, buffer);
            capture
                .media
                .read_volume(capture.geometry.offset_of(run.start()).get(), part)?;
        }
        Ok(())
    }

    /// Looks again for before-images of the blocks that were copied: whoever writes to a block enters its
    /// before-image first. On return the buffer holds the extent as it was at the cut.
    ///
    /// # Errors
    /// Where a before-image is damaged, or the cut was given up meanwhile.
    pub fn recheck<M: Media>(
        &mut self,
        capture: &Capture<M>,
        buffer: &mut [u8],
    ) -> Result<(), CaptureError> {
        self.take_spooled(capture, buffer)?;
        capture.check()?;
        if self.view.is_broken() {
            Err(CaptureError::GivenUp(self.view.cut))
        } else {
            Ok(())
        }
    }

    /// Reads those of the remaining blocks that the spool has now.
    fn take_spooled<M: Media>(
        &mut self,
        capture: &Capture<M>,
        buffer: &mut [u8],
    ) -> Result<(), CaptureError> {
        let runs: Vec<Extent> = self.live.extents().collect();
        for run in runs {
            let found =
                capture
                    .spool
                    .blocks_after(run.start().get(), run.end().get(), self.view.cut);
            for block in found.into_iter().map(BlockIndex::new) {
                let one = Extent::between(block, block.next());
                self.before_image(capture, block, self.part(capture, one, buffer))?;
                self.live.remove(one);
            }
        }
        Ok(())
    }

    fn before_image<M: Media>(
        &self,
        capture: &Capture<M>,
        block: BlockIndex,
        buffer: &mut [u8],
    ) -> Result<(), CaptureError> {
        let read = match capture.spool.find(block, self.view.cut) {
            Some(id) => capture.spool.read(&capture.media, id, block, buffer),
            None => Err(SpoolError::Damaged),
        };
        match read {
            Ok(()) => Ok(()),
            // Freed, and perhaps used again, under our hands.
            Err(_) if self.view.is_broken() => Err(CaptureError::GivenUp(self.view.cut)),
            Err(SpoolError::Media(error)) => Err(error.into()),
            Err(SpoolError::Damaged | SpoolError::Full) => {
                Err(CaptureError::SpoolDamaged(block.get()))
            }
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "positions in a slice")]
    fn part<'b, M: Media>(
        &self,
        capture: &Capture<M>,
        run: Extent,
        buffer: &'b mut [u8],
    ) -> &'b mut [u8] {
        let from = capture
            .geometry
            .bytes(run.start().since(self.extent.start())) as usize;
        &mut buffer[from..][..capture.geometry.bytes(run.count()) as usize]
    }
}

impl<M: Media> Capture<M> {
    /// Blocks of an extent that have a before-image for the cut: what the volume's holes say nothing about.
    pub fn spooled(&self, view: &View, extent: Extent) -> BlockSet {
        let found = self
            .spool
            .blocks_after(extent.start().get(), extent.end().get(), view.cut);
        found
            .into_iter()
            .map(|block| Extent::between(BlockIndex::new(block), BlockIndex::new(block + 1)))
            .collect()
    }
}
