//! From a cut to frames: which blocks differ from the base, in ascending order.
//!
//! A block that may have changed is read as it was at the cut, checksummed and compared with the checksum table of
//! the base: only what differs is sent. Holes are not read: where the table says zero too, whole leaves are passed
//! over, so that a sparse volume in doubt costs its data and the table's leaves, not its length.

use std::{io, sync::Arc};

use bytes::Bytes;
use tidemark_block::{
    BlockCount, BlockIndex, BlockSet, Checksum128, DigestUpdate, Extent, FrameEncoder, Geometry,
    ImageDigest, TableView, block_checksum,
    digest::{Children, FANOUT, LEAF_BLOCKS, leaf_of},
    frame::{CodecChoice, EXTENTS_MAX, blocks_max},
};
use tidemark_disk::ChecksumTable;

use super::pending::Entry;
use crate::engine::{EngineError, SnapshotReader};

/// The image at a cut, as far as walking needs it.
pub(crate) trait ImageAtCut {
    /// Reads whole blocks; `buffer` has the length of the extent.
    fn read_blocks(&self, extent: Extent, buffer: &mut [u8]) -> Result<(), EngineError>;

    /// The parts of the extent that may hold other bytes than zeroes.
    fn data_extents(&self, extent: Extent) -> Result<BlockSet, EngineError>;
}

impl ImageAtCut for SnapshotReader {
    fn read_blocks(&self, extent: Extent, buffer: &mut [u8]) -> Result<(), EngineError> {
        SnapshotReader::read_blocks(self, extent, buffer)
    }

    fn data_extents(&self, extent: Extent) -> Result<BlockSet, EngineError> {
        SnapshotReader::data_extents(self, extent)
    }
}

/// The checksums that an image is compared with.
pub(crate) trait Base: TableView<Error = io::Error> {
    /// The checksums of the blocks from `first` on.
    fn read_blocks(&self, first: BlockIndex, checksums: &mut [Checksum128]) -> io::Result<()>;
}

impl Base for ChecksumTable {
    fn read_blocks(&self, first: BlockIndex, checksums: &mut [Checksum128]) -> io::Result<()> {
        ChecksumTable::read_blocks(self, first, checksums)
    }
}

/// The checksums of the all-zero image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ZeroBase(pub(crate) Geometry);

impl TableView for ZeroBase {
    type Error = io::Error;

    fn geometry(&self) -> Geometry {
        self.0
    }

    fn leaves(&self, _: u64, leaves: &mut [Checksum128]) -> io::Result<()> {
        leaves.fill(Checksum128::ZERO);
        Ok(())
    }

    fn groups(&self, _: u64) -> io::Result<Children> {
        Ok(Children::default())
    }

    fn blocks(&self, _: u64) -> io::Result<Children> {
        Ok(Children::default())
    }
}

impl Base for ZeroBase {
    fn read_blocks(&self, _: BlockIndex, checksums: &mut [Checksum128]) -> io::Result<()> {
        checksums.fill(Checksum128::ZERO);
        Ok(())
    }
}

/// Why a walk ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WalkError {
    /// The cut can't be read.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The checksum table, or the file of pending checksums.
    #[error("checksum table: {0}")]
    Table(#[from] io::Error),
    /// Nobody wants the rest.
    #[error("stopped")]
    Stopped,
    /// Somebody wants it, and doesn't take it.
    #[error("not taken in time")]
    Unread,
}

/// Bytes read at a time.
const READ_LEN: usize = 1 << 20;
/// Blocks whose holes are asked for at a time.
const WINDOW_BLOCKS: u64 = 1 << 20;
/// Fewer bytes are read without asking for holes. A filesystem may look through all extents up to the next hole, which is
/// every extent of a file without holes: for 10,000 single blocks of one in 19,000 extents that took 27 s on XFS.
const HOLES_LEN_MIN: u64 = 64 << 10;
/// Leaves looked at together.
const LEAVES_AT_ONCE: usize = 4096;

/// What a walk finds, ascending.
pub(crate) trait Sink {
    /// A block that differs; not zero.
    fn data(
        &mut self,
        block: BlockIndex,
        checksum: Checksum128,
        bytes: &[u8],
    ) -> Result<(), WalkError>;

    /// Blocks that are zero and were not.
    fn zero(&mut self, extent: Extent) -> Result<(), WalkError>;

    /// So many more blocks have been looked at.
    fn passed(&mut self, count: BlockCount) -> Result<(), WalkError>;
}

/// Gives every block of `changed`, from `from` on, that differs from `table` to `sink`.
pub(crate) fn walk(
    image: &impl ImageAtCut,
    table: &impl Base,
    changed: &BlockSet,
    from: BlockIndex,
    sink: &mut impl Sink,
) -> Result<(), WalkError> {
    let geometry = table.geometry();
    let size = geometry.block_size().as_usize();
    let at_once = (READ_LEN / size) as u64;
    let mut buffer = vec![0; READ_LEN];
    let mut sums = vec![Checksum128::ZERO; READ_LEN / size];
    for extent in changed.extents_from(from) {
        for window in extent.pieces(BlockCount::new(WINDOW_BLOCKS)) {
            let data = if geometry.bytes(window.count()) < HOLES_LEN_MIN {
                std::iter::once(window).collect()
            } else {
                image.data_extents(window)?
            };
            let mut at = window.start();
            for part in data.extents() {
                zeroed(table, Extent::between(at, part.start()), sink)?;
                sink.passed(part.start().since(at))?;
                for piece in part.pieces(BlockCount::new(at_once)) {
                    let blocks = usize::try_from(piece.count().get()).unwrap_or(sums.len());
                    let bytes = &mut buffer[..blocks * size];
                    image.read_blocks(piece, bytes)?;
                    known(table, piece, &mut sums[..blocks])?;
                    compare(piece, bytes.chunks_exact(size), &sums[..blocks], sink)?;
                    sink.passed(piece.count())?;
                }
                at = part.end();
            }
            zeroed(table, Extent::between(at, window.end()), sink)?;
            sink.passed(window.end().since(at))?;
        }
    }
    Ok(())
}

/// The base's checksums of `piece`. Zero leaves are not read further: in a sparse volume that is most of the table.
fn known(table: &impl Base, piece: Extent, sums: &mut [Checksum128]) -> Result<(), WalkError> {
    let mut rest = sums;
    while !rest.is_empty() {
        let done = piece.count().get() - rest.len() as u64;
        let at = BlockIndex::new(piece.start().get() + done);
        let leaf = leaf_of(at);
        let end = BlockIndex::new((leaf + 1) * LEAF_BLOCKS).min(piece.end());
        let part = Extent::between(at, end);
        let count = usize::try_from(part.count().get()).unwrap_or(rest.len());
        let here;
        (here, rest) = rest.split_at_mut(count);
        let mut sum = [Checksum128::ZERO];
        table.leaves(leaf, &mut sum)?;
        if sum[0].is_zero() {
            here.fill(Checksum128::ZERO);
        } else {
            table.read_blocks(part.start(), here)?;
        }
    }
    Ok(())
}

/// Gives every block of `changed` to `sink`, whatever it was before.
pub(crate) fn walk_whole(
    image: &impl ImageAtCut,
    geometry: Geometry,
    changed: &BlockSet,
    sink: &mut impl Sink,
) -> Result<(), WalkError> {
    let size = geometry.block_size().as_usize();
    let mut buffer = vec![0; READ_LEN];
    for extent in changed.extents() {
        for window in extent.pieces(BlockCount::new(WINDOW_BLOCKS)) {
            let mut at = window.start();
            for part in image.data_extents(window)?.extents() {
                zero_unless_empty(Extent::between(at, part.start()), sink)?;
                for piece in part.pieces(BlockCount::new((READ_LEN / size) as u64)) {
                    let len = usize::try_from(geometry.bytes(piece.count())).unwrap_or(READ_LEN);
                    let bytes = &mut buffer[..len];
                    image.read_blocks(piece, bytes)?;
                    for (block, bytes) in piece.iter().zip(bytes.chunks_exact(size)) {
                        match block_checksum(bytes) {
                            Checksum128::ZERO => {
                                sink.zero(Extent::new(block, BlockCount::new(1)))?;
                            }
                            checksum => sink.data(block, checksum, bytes)?,
                        }
                    }
                }
                at = part.end();
            }
            zero_unless_empty(Extent::between(at, window.end()), sink)?;
            sink.passed(window.count())?;
        }
    }
    Ok(())
}

fn zero_unless_empty(extent: Extent, sink: &mut impl Sink) -> Result<(), WalkError> {
    if extent.is_empty() {
        return Ok(());
    }
    sink.zero(extent)
}

fn compare<'a>(
    piece: Extent,
    bytes: impl Iterator<Item = &'a [u8]>,
    base: &[Checksum128],
    sink: &mut impl Sink,
) -> Result<(), WalkError> {
    for ((block, bytes), base) in piece.iter().zip(bytes).zip(base) {
        let checksum = block_checksum(bytes);
        if checksum == *base {
            continue;
        }
        if checksum.is_zero() {
            sink.zero(Extent::new(block, BlockCount::new(1)))?;
        } else {
            sink.data(block, checksum, bytes)?;
        }
    }
    Ok(())
}

/// Blocks that are zero now: those that the table doesn't know as zero differ.
fn zeroed(table: &impl Base, extent: Extent, sink: &mut impl Sink) -> Result<(), WalkError> {
    if extent.is_empty() {
        return Ok(());
    }
    let mut leaves = vec![Checksum128::ZERO; LEAVES_AT_ONCE];
    let mut sums = vec![Checksum128::ZERO; FANOUT * FANOUT];
    let (mut first, last) = (
        leaf_of(extent.start()),
        leaf_of(BlockIndex::new(extent.end().get() - 1)),
    );
    while first <= last {
        let count =
            usize::try_from(last - first + 1).map_or(LEAVES_AT_ONCE, |n| n.min(LEAVES_AT_ONCE));
        table.leaves(first, &mut leaves[..count])?;
        for (leaf, checksum) in (first..).zip(&leaves[..count]) {
            if checksum.is_zero() {
                continue;
            }
            let whole = Extent::new(
                BlockIndex::new(leaf * LEAF_BLOCKS),
                BlockCount::new(LEAF_BLOCKS),
            );
            let part = whole.intersect(extent);
            let sums = &mut sums[..usize::try_from(part.count().get()).unwrap_or(0)];
            table.read_blocks(part.start(), sums)?;
            let differing = part
                .iter()
                .zip(sums.iter())
                .filter(|(_, sum)| !sum.is_zero())
                .map(|(block, _)| Extent::new(block, BlockCount::new(1)));
            for run in tidemark_block::extent::coalesce(differing) {
                sink.zero(run)?;
            }
        }
        first += count as u64;
    }
    Ok(())
}

/// Frames that are sent together.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The watermark.
    pub(crate) end: BlockIndex,
    /// Whole encoded frames.
    pub(crate) frames: Bytes,
}

/// What an interval came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Total {
    pub(crate) changed_blocks: u64,
    pub(crate) frame_count: u64,
    pub(crate) image_digest: ImageDigest,
}

/// Puts blocks into frames and frames into batches, and keeps the books: digest, counts, pending checksums.
///
/// Frames are cut by content alone, never by timing, so that an interval has the same frames wherever it is resumed.
pub(crate) struct Assembler<B, E> {
    table: Arc<B>,
    encoder: FrameEncoder,
    update: DigestUpdate,
    geometry: Geometry,
    blocks_max: usize,
    batch_len: usize,
    blocks: Vec<(BlockIndex, Checksum128)>,
    data: Vec<u8>,
    zeros: Vec<Extent>,
    frames: Vec<u8>,
    entries: Vec<u8>,
    end: BlockIndex,
    changed_blocks: u64,
    frame_count: u64,
    emit: E,
}

/// Takes finished batches, with their pending entries, and says how the next frames are to be encoded.
pub(crate) trait Emit {
    /// How to encode now.
    fn codec(&self) -> CodecChoice;
    /// `entries` are to be recorded before `batch` is sent.
    fn batch(&mut self, batch: Batch, entries: &[u8]) -> Result<(), WalkError>;
    /// So many more blocks have been looked at; an error where the work is not wanted any more.
    fn passed(&mut self, count: BlockCount) -> Result<(), WalkError>;
    /// The last entries.
    fn finish(&mut self, entries: &[u8]) -> Result<(), WalkError>;
}

impl<B: Base, E: Emit> Assembler<B, E> {
    /// Starts an interval.
    pub(crate) fn new(table: Arc<B>, batch_len: usize, emit: E) -> Self {
        let geometry = table.geometry();
        Self {
            encoder: FrameEncoder::new(geometry),
            update: DigestUpdate::new(geometry),
            geometry,
            blocks_max: blocks_max(geometry.block_size()),
            batch_len,
            blocks: Vec::new(),
            data: Vec::new(),
            zeros: Vec::new(),
            frames: Vec::new(),
            entries: Vec::new(),
            end: BlockIndex::ZERO,
            changed_blocks: 0,
            frame_count: 0,
            table,
            emit,
        }
    }

    /// Takes account of a frame that is durable at the vault already.
    pub(crate) fn account(&mut self, entry: &Entry) -> io::Result<()> {
        match entry {
            Entry::Data(extents, sums) => {
                let blocks = extents.iter().flat_map(|extent| extent.iter());
                for (block, sum) in blocks.zip(sums) {
                    self.update.push(&*self.table, block, *sum)?;
                }
            }
            Entry::Zero(extents) => {
                for extent in extents {
                    self.update.push_zero(&*self.table, *extent)?;
                }
            }
            Entry::Batch(_) | Entry::End(_) => return Ok(()),
        }
        self.changed_blocks += entry.blocks();
        self.frame_count += 1;
        Ok(())
    }

    fn close_data(&mut self) -> Result<(), WalkError> {
        let Some((last, _)) = self.blocks.last() else {
            return Ok(());
        };
        self.end = last.next();
        self.encoder.encode_data(
            &self.blocks,
            &self.data,
            self.emit.codec(),
            &mut self.frames,
        );
        let extents = tidemark_block::extent::coalesce(
            self.blocks
                .iter()
                .map(|(block, _)| Extent::new(*block, BlockCount::new(1))),
        );
        let entry = Entry::Data(
            extents.collect(),
            self.blocks.iter().map(|(_, sum)| *sum).collect(),
        );
        self.blocks.clear();
        self.data.clear();
        self.closed(&entry)
    }

    fn close_zeros(&mut self) -> Result<(), WalkError> {
        let Some(last) = self.zeros.last() else {
            return Ok(());
        };
        self.end = last.end();
        let zeros = std::mem::take(&mut self.zeros);
        self.encoder.encode_zero(&zeros, &mut self.frames);
        self.closed(&Entry::Zero(zeros))
    }

    fn closed(&mut self, entry: &Entry) -> Result<(), WalkError> {
        entry.encode(&mut self.entries);
        self.account(entry)?;
        if self.frames.len() >= self.batch_len {
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), WalkError> {
        if self.frames.is_empty() {
            return Ok(());
        }
        Entry::Batch(self.end).encode(&mut self.entries);
        let room = Vec::with_capacity(self.batch_len + self.batch_len / 2);
        let batch = Batch {
            end: self.end,
            frames: Bytes::from(std::mem::replace(&mut self.frames, room)),
        };
        self.emit.batch(batch, &self.entries)?;
        self.entries.clear();
        Ok(())
    }

    /// What batches are given to.
    pub(crate) const fn emit_mut(&mut self) -> &mut E {
        &mut self.emit
    }

    /// Ends the frames and the batch that are open.
    pub(crate) fn flush(&mut self) -> Result<(), WalkError> {
        self.close_data()?;
        self.close_zeros()?;
        self.send()
    }

    /// Ends the interval: sends what is left, and sums up.
    pub(crate) fn finish(mut self) -> Result<Total, WalkError> {
        self.flush()?;
        let mut last = Vec::new();
        Entry::End(BlockCount::new(self.changed_blocks)).encode(&mut last);
        self.emit.finish(&last)?;
        Ok(Total {
            changed_blocks: self.changed_blocks,
            frame_count: self.frame_count,
            image_digest: self.update.finish(&*self.table)?,
        })
    }
}

impl<B: Base, E: Emit> Sink for Assembler<B, E> {
    fn data(
        &mut self,
        block: BlockIndex,
        checksum: Checksum128,
        bytes: &[u8],
    ) -> Result<(), WalkError> {
        self.close_zeros()?;
        self.blocks.push((block, checksum));
        self.data.extend_from_slice(bytes);
        if self.blocks.len() == self.blocks_max {
            self.close_data()?;
        }
        Ok(())
    }

    fn zero(&mut self, extent: Extent) -> Result<(), WalkError> {
        self.close_data()?;
        debug_assert!(extent.end() <= self.geometry.all().end());
        for piece in extent.pieces(BlockCount::new(u64::from(u32::MAX))) {
            match self.zeros.last_mut() {
                Some(last)
                    if last.end() == piece.start()
                        && last.count().get() + piece.count().get() <= u64::from(u32::MAX) =>
                {
                    *last = Extent::between(last.start(), piece.end());
                }
                _ => {
                    if self.zeros.len() == EXTENTS_MAX {
                        self.close_zeros()?;
                    }
                    self.zeros.push(piece);
                }
            }
        }
        Ok(())
    }

    fn passed(&mut self, count: BlockCount) -> Result<(), WalkError> {
        self.emit.passed(count)
    }
}

#[cfg(test)]
pub(crate) mod tests;
