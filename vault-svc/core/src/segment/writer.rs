//! Gathers frames into a segment.

use bytes::Bytes;
use tidemark_block::{
    BlockCount, BlockIndex, Checksum128, Codec, Extent, Sequence, VerifiedFrame, wire,
};

use super::{
    CHECKSUMS_MAGIC, DATA_BLOCKS_MAX, ENTRIES_MAX, ENTRY_LEN, FOOTER_LEN, FRAMES_AT, Footer,
    INDEX_MAGIC, IndexEntry, SegmentOrigin, SegmentRecord, VERSION, encode_header,
};

/// A segment under construction, in memory.
#[derive(Debug)]
pub struct SegmentWriter {
    origin: SegmentOrigin,
    bytes: Vec<u8>,
    /// With the place of the entry's checksums.
    entries: Vec<(IndexEntry, usize)>,
    checksums: Vec<Checksum128>,
    frame_count: u64,
    zero_blocks: u64,
}

/// A whole segment, ready to be put.
#[derive(Debug, Clone)]
pub struct SealedSegment {
    /// The object.
    pub bytes: Bytes,
    /// Its last part, decoded.
    pub footer: Footer,
}

impl SegmentWriter {
    /// Starts a segment in `bytes`, which is empty and has room for what is expected.
    #[must_use]
    pub fn new(origin: SegmentOrigin, mut bytes: Vec<u8>) -> Self {
        debug_assert!(bytes.is_empty());
        bytes.extend_from_slice(&encode_header(&origin));
        Self {
            origin,
            bytes,
            entries: Vec::new(),
            checksums: Vec::new(),
            frame_count: 0,
            zero_blocks: 0,
        }
    }

    /// Bytes of the frames so far.
    #[must_use]
    pub fn frame_bytes(&self) -> u64 {
        (self.bytes.len() as u64).saturating_sub(FRAMES_AT)
    }

    /// No frame is in it yet.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// It has as many bytes as it should, or its index or checksums are half way to their limit: a batch that began
    /// before still fits.
    #[must_use]
    pub fn is_full(&self, bytes_max: u64) -> bool {
        self.frame_bytes() >= bytes_max
            || self.entries.len() >= ENTRIES_MAX / 2
            || self.checksums.len() as u64 >= DATA_BLOCKS_MAX / 2
    }

    /// Appends a frame as it is; all its blocks have one sequence.
    pub fn push(&mut self, frame: &VerifiedFrame, sequence: Sequence) {
        if frame.codec() == Codec::Zero {
            self.frame_count += 1;
            frame
                .extents()
                .iter()
                .for_each(|extent| self.push_zero(*extent, sequence));
            return;
        }
        let count = usize::try_from(frame.block_count().get()).unwrap_or(usize::MAX);
        self.push_versions(frame, &vec![sequence; count]);
    }

    /// Appends a frame whose blocks have a sequence each.
    pub fn push_versions(&mut self, frame: &VerifiedFrame, sequences: &[Sequence]) {
        let frame_at = self.bytes.len() as u64;
        self.bytes.extend_from_slice(frame.encoded());
        self.frame_count += 1;
        let template = IndexEntry {
            blocks: Extent::new(BlockIndex::ZERO, BlockCount::ZERO),
            sequence: Sequence::ZERO,
            frame_at,
            frame_len: u32::try_from(frame.encoded().len()).unwrap_or(u32::MAX),
            first_in_frame: 0,
            frame_blocks: u16::try_from(sequences.len()).unwrap_or(u16::MAX),
            zero: false,
        };
        let versions = frame.extents().iter().flat_map(|extent| extent.iter());
        for (((block, checksum), &sequence), place) in
            versions.zip(frame.checksums()).zip(sequences).zip(0_u16..)
        {
            let goes_on = self.entries.last_mut().filter(|(last, _)| {
                place > 0 && last.blocks.end() == block && last.sequence == sequence
            });
            if let Some((last, _)) = goes_on {
                last.blocks = Extent::between(last.blocks.start(), block.next());
            } else {
                let blocks = Extent::between(block, block.next());
                let entry = IndexEntry {
                    blocks,
                    sequence,
                    first_in_frame: place,
                    ..template
                };
                self.entries.push((entry, self.checksums.len()));
            }
            self.checksums.push(checksum);
        }
    }

    /// Says that blocks are zero; needs no frame.
    pub fn push_zero(&mut self, blocks: Extent, sequence: Sequence) {
        self.zero_blocks += blocks.count().get();
        for blocks in blocks.pieces(BlockCount::new(u32::MAX.into())) {
            let entry = IndexEntry {
                blocks,
                sequence,
                frame_at: 0,
                frame_len: 0,
                first_in_frame: 0,
                frame_blocks: 0,
                zero: true,
            };
            self.entries.push((entry, self.checksums.len()));
        }
    }

    /// Ends the segment; every changed block of the interval in `watermark` is in it.
    #[must_use]
    pub fn finish(mut self, watermark: (BlockIndex, BlockIndex)) -> SealedSegment {
        self.entries.sort_by_key(|(entry, _)| entry.key());
        let mut index = Vec::with_capacity(self.entries.len() * ENTRY_LEN);
        let mut checksums = Vec::with_capacity(self.checksums.len() * Checksum128::LEN);
        for (entry, at) in &self.entries {
            entry.encode(&mut index);
            if !entry.zero {
                let count = usize::try_from(entry.blocks.count().get()).unwrap_or(0);
                for checksum in &self.checksums[*at..*at + count] {
                    checksums.extend_from_slice(checksum.as_bytes());
                }
            }
        }
        let index_at = self.bytes.len() as u64;
        let index = wire::seal(INDEX_MAGIC, VERSION, &index);
        let checksums = wire::seal(CHECKSUMS_MAGIC, VERSION, &checksums);
        self.bytes.extend_from_slice(&index);
        self.bytes.extend_from_slice(&checksums);
        let footer = Footer {
            origin: self.origin,
            watermark,
            frame_count: self.frame_count,
            zero_blocks: BlockCount::new(self.zero_blocks),
            record: SegmentRecord {
                id: self.origin.id,
                kind: self.origin.kind,
                sequences: bounds(self.entries.iter().map(|(entry, _)| entry.sequence)),
                blocks: self.span(),
                file_len: self.bytes.len() as u64 + FOOTER_LEN,
                index_at,
                index_len: u32::try_from(index.len()).unwrap_or(u32::MAX),
                checksums_len: u32::try_from(checksums.len()).unwrap_or(u32::MAX),
                data_blocks: BlockCount::new(self.checksums.len() as u64),
            },
        };
        self.bytes.extend_from_slice(&footer.encode());
        SealedSegment {
            bytes: Bytes::from(self.bytes),
            footer,
        }
    }

    fn span(&self) -> Extent {
        let start = self
            .entries
            .first()
            .map_or(BlockIndex::ZERO, |(entry, _)| entry.blocks.start());
        let end = self
            .entries
            .iter()
            .map(|(entry, _)| entry.blocks.end())
            .max();
        Extent::between(start, end.unwrap_or(start))
    }
}

fn bounds(sequences: impl Iterator<Item = Sequence> + Clone) -> (Sequence, Sequence) {
    (
        sequences.clone().min().unwrap_or_default(),
        sequences.max().unwrap_or_default(),
    )
}
