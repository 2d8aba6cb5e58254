//! The digest of what was received, put together from the checksums of verified blocks.

use std::convert::Infallible;

use tidemark_block::{
    BlockIndex, Checksum128, DigestUpdate, Geometry, ImageDigest, TableView,
    digest::{Children, FANOUT},
};

use super::Run;
use crate::failure::{self, Failure};

/// The image digest of a file that was all zero and then got these runs. 16 bytes of memory per leaf
/// of 1024 blocks that holds data.
#[derive(Debug)]
pub(super) struct ReceivedDigest {
    zero: ZeroTable,
    update: DigestUpdate,
    next: BlockIndex,
}

impl ReceivedDigest {
    /// Of a file of which nothing has arrived.
    #[must_use]
    pub(super) const fn new(geometry: Geometry) -> Self {
        Self {
            zero: ZeroTable(geometry),
            update: DigestUpdate::new(geometry),
            next: BlockIndex::ZERO,
        }
    }

    /// The block behind the last one that arrived.
    #[must_use]
    pub(super) const fn next(&self) -> BlockIndex {
        self.next
    }

    /// Takes the next run, whose blocks lie within the volume.
    ///
    /// # Errors
    /// It does not lie behind all that arrived before.
    pub(super) fn push(&mut self, run: &Run) -> Result<(), Failure> {
        if run.extent.start() < self.next() {
            return Err(failure::corrupt(format!(
                "block {} arrived after block {} was already behind: the stream is out of order",
                run.extent.start(),
                self.next()
            )));
        }
        // Zero blocks are what the file began with: only data changes the digest.
        for (block, &checksum) in run.extent.iter().zip(run.checksums.iter().flatten()) {
            let Ok(()) = self.update.push(&self.zero, block, checksum);
        }
        self.next = run.extent.end();
        Ok(())
    }

    /// Compares the digest of what arrived with the one that was promised.
    ///
    /// # Errors
    /// They differ.
    pub(super) fn prove(self, promised: ImageDigest) -> Result<ImageDigest, Failure> {
        let Ok(found) = self.update.finish(&self.zero);
        if found == promised {
            Ok(found)
        } else {
            Err(failure::corrupt(format!(
                "the image's digest is {found}, {promised} was promised"
            )))
        }
    }
}

/// The checksum table of an all-zero image.
#[derive(Debug)]
struct ZeroTable(Geometry);

impl TableView for ZeroTable {
    type Error = Infallible;

    fn geometry(&self) -> Geometry {
        self.0
    }

    fn leaves(&self, _first: u64, leaves: &mut [Checksum128]) -> Result<(), Infallible> {
        leaves.fill(Checksum128::ZERO);
        Ok(())
    }

    fn groups(&self, _leaf: u64) -> Result<Children, Infallible> {
        Ok([Checksum128::ZERO; FANOUT])
    }

    fn blocks(&self, _group: u64) -> Result<Children, Infallible> {
        Ok([Checksum128::ZERO; FANOUT])
    }
}

#[cfg(test)]
mod tests {
    use tidemark_block::{
        BlockCount, BlockSize, Extent, MemoryTable, block_checksum, image_digest,
    };

    use super::*;

    fn geometry(blocks: u64) -> Geometry {
        Geometry::new(blocks * 4096, BlockSize::MIN).unwrap()
    }

    fn run(start: u64, fill: &[u8]) -> Run {
        Run {
            extent: Extent::new(BlockIndex::new(start), BlockCount::new(fill.len() as u64)),
            checksums: Some(fill.iter().map(|&b| block_checksum(&[b; 4096])).collect()),
        }
    }

    fn zeros(start: u64, count: u64) -> Run {
        Run {
            extent: Extent::new(BlockIndex::new(start), BlockCount::new(count)),
            checksums: None,
        }
    }

    #[test]
    fn what_was_not_sent_counts_as_zero() {
        let geometry = geometry(5000);
        let mut table = MemoryTable::new(geometry);
        table.set(BlockIndex::new(3), block_checksum(&[1; 4096]));
        table.set(BlockIndex::new(4999), block_checksum(&[2; 4096]));
        let mut received = ReceivedDigest::new(geometry);
        received.push(&run(3, &[1])).unwrap();
        received.push(&zeros(4, 4000)).unwrap();
        received.push(&run(4999, &[2])).unwrap();
        let Ok(expected) = image_digest(&table);
        assert_eq!(received.prove(expected).unwrap(), expected);
    }

    #[test]
    fn another_image_is_refused_as_corrupt() {
        let geometry = geometry(64);
        let Ok(promised) = image_digest(&MemoryTable::new(geometry));
        let mut received = ReceivedDigest::new(geometry);
        received.push(&run(0, &[7])).unwrap();
        let failure = received.prove(promised).unwrap_err();
        assert_eq!(failure.kind(), failure::Kind::Corrupt);
    }

    #[test]
    fn blocks_that_come_twice_are_refused_and_do_not_panic() {
        let mut received = ReceivedDigest::new(geometry(64));
        received.push(&run(8, &[1, 2])).unwrap();
        let failure = received.push(&run(9, &[2])).unwrap_err();
        assert_eq!(failure.kind(), failure::Kind::Corrupt);
    }
}
