//! Reading the volume as it was at an open cut.

use std::sync::Arc;

use capture_core::engine::{capture::View, read::SnapshotRead};
use tidemark_block::{BlockCount, BlockSet, Epoch, Extent, Geometry};

use super::{EngineError, Intercept, volume_file};

/// Blocks that are read at a time: what one look at the index covers.
const PIECE_BLOCKS: BlockCount = BlockCount::new(256);

/// Reads the volume as it was at an open cut. While one exists, so do the before-images it needs. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct SnapshotReader(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    engine: Arc<Intercept>,
    view: Arc<View>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.engine.capture.close_view(&self.view);
        self.engine.room.notify();
    }
}

impl SnapshotReader {
    pub(super) fn new(engine: Arc<Intercept>, view: Arc<View>) -> Self {
        Self(Arc::new(Opened { engine, view }))
    }

    /// The last epoch that is seen.
    #[must_use]
    pub fn cut(&self) -> Epoch {
        Epoch::new(self.0.view.cut())
    }

    /// The volume's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.0.engine.geometry()
    }

    /// Reads whole blocks; `buffer` has the length of the extent.
    ///
    /// # Errors
    /// [`EngineError::GivenUp`] where the cut was given up meanwhile, [`EngineError::SpoolDamaged`], or what the
    /// volume file says.
    pub fn read_blocks(&self, extent: Extent, buffer: &mut [u8]) -> Result<(), EngineError> {
        let engine = &self.0.engine;
        let geometry = engine.geometry();
        if extent.end() > geometry.all().end()
            || buffer.len() as u64 != geometry.bytes(extent.count())
        {
            return Err(EngineError::OutOfRange);
        }
        engine.check_open()?;
        let mut rest = buffer;
        for piece in extent.pieces(PIECE_BLOCKS) {
            let length = usize::try_from(geometry.bytes(piece.count()))
                .map_err(|_| EngineError::OutOfRange)?;
            let part;
            (part, rest) = rest.split_at_mut(length);
            let mut read = SnapshotRead::new(Arc::clone(&self.0.view), piece);
            read.before_images(&engine.capture, part)
                .and_then(|()| read.live(&engine.capture, part))
                .and_then(|()| read.recheck(&engine.capture, part))
                .map_err(|error| engine.explain(error))?;
        }
        Ok(())
    }

    /// The parts of the extent that may hold other bytes than zeroes; the rest reads as zeroes.
    ///
    /// # Errors
    /// As [`Self::read_blocks`].
    pub fn data_extents(&self, extent: Extent) -> Result<BlockSet, EngineError> {
        let engine = &self.0.engine;
        let extent = extent.intersect(engine.geometry().all());
        engine.check_open()?;
        // Holes first: whoever makes a hole of a block has entered its before-image in the index by then.
        let volume = engine.capture.media().volume();
        let mut blocks = volume_file::data_blocks(volume, engine.geometry(), extent)
            .map_err(|error| EngineError::io("look for holes in the volume file", error))?;
        blocks.union_with(&engine.capture.spooled(&self.0.view, extent));
        if self.0.view.is_broken() {
            return Err(EngineError::GivenUp(self.cut()));
        }
        Ok(blocks)
    }
}
