//! A source of intervals: an image in memory that changes, and what a capture service would ship of it.

use std::collections::BTreeSet;

use bytes::Bytes;
use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, CodecChoice, Coherence, CutReason, DigestUpdate, Epoch,
    Extent, FrameEncoder, GenerationId, Geometry, ImageDigest, IntervalHeader, IntervalId,
    IntervalSeal, MemoryTable, Receipt, Trigger, VolumeId, WriterTerm, block_checksum,
    image_digest, is_zero,
};
use tidemark_proto::convert::{FrameBatch, TermRequest};

pub(crate) const BLOCK: usize = 4096;

/// Numbers that look random and are always the same.
#[derive(Debug, Clone)]
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn id(&mut self) -> [u8; 16] {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.next().to_le_bytes());
        id[8..].copy_from_slice(&self.next().to_le_bytes());
        id
    }
}

/// All messages of one interval.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    pub(crate) header: IntervalHeader,
    pub(crate) batches: Vec<FrameBatch>,
    pub(crate) seal: IntervalSeal,
}

#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) volume: VolumeId,
    pub(crate) geometry: Geometry,
    pub(crate) image: Vec<u8>,
    /// Of the base generation.
    table: MemoryTable,
    pub(crate) changed: BTreeSet<u64>,
    pub(crate) base: GenerationId,
    pub(crate) term: WriterTerm,
    pub(crate) numbers: Numbers,
    pub(crate) batch_frames: usize,
    /// Blocks in a frame, 64 at most.
    pub(crate) frame_blocks: usize,
    /// Whether frames are compressed; by chance where it isn't said.
    pub(crate) compressed: Option<bool>,
    epoch: u64,
}

impl Source {
    pub(crate) fn new(seed: u64, blocks: u64) -> Self {
        let mut numbers = Numbers(seed);
        let geometry = Geometry::new(blocks * BLOCK as u64, BlockSize::new(4096).unwrap()).unwrap();
        Self {
            volume: VolumeId::from_bytes(numbers.id()),
            geometry,
            image: vec![0; usize::try_from(geometry.length()).unwrap()],
            table: MemoryTable::new(geometry),
            changed: BTreeSet::new(),
            base: GenerationId::ZERO,
            term: WriterTerm::ZERO,
            numbers,
            batch_frames: 4,
            frame_blocks: 64,
            compressed: None,
            epoch: 0,
        }
    }

    pub(crate) fn block(&mut self, block: u64) -> &mut [u8] {
        let at = usize::try_from(block).unwrap() * BLOCK;
        &mut self.image[at..at + BLOCK]
    }

    /// Fills a block with bytes that don't compress.
    pub(crate) fn write(&mut self, block: u64) {
        let mut numbers = Numbers(self.numbers.next());
        for word in self.block(block).as_chunks_mut::<8>().0 {
            *word = numbers.next().to_le_bytes();
        }
        self.changed.insert(block);
    }

    pub(crate) fn zero(&mut self, blocks: std::ops::Range<u64>) {
        self.zero_each(blocks);
    }

    pub(crate) fn zero_each(&mut self, blocks: impl Iterator<Item = u64>) {
        for block in blocks {
            self.block(block).fill(0);
            self.changed.insert(block);
        }
    }

    pub(crate) fn write_some(&mut self, count: u64) {
        let blocks = self.geometry.block_count().get();
        for _ in 0..count {
            let block = self.numbers.below(blocks);
            if self.numbers.below(8) == 0 {
                self.zero(block..block + 1);
            } else {
                self.write(block);
            }
        }
    }

    /// What it says when it asks for a term.
    pub(crate) fn term_request(&mut self) -> TermRequest {
        TermRequest {
            volume: self.volume,
            volume_name: "data".into(),
            source_name: "test".into(),
            geometry: self.geometry,
            last_term: self.term,
            nonce: self.numbers.id(),
        }
    }

    /// Cuts: everything changed since the base becomes an interval.
    pub(crate) fn prepare(&mut self) -> Prepared {
        self.epoch += 1;
        let header = IntervalHeader {
            volume: self.volume,
            term: self.term,
            interval: IntervalId::from_bytes(self.numbers.id()),
            base: self.base,
            geometry: self.geometry,
            epoch: Epoch::new(self.epoch),
            cut_time_ms: 1_700_000_000_000 + self.epoch,
            coherence: Coherence::Crash,
            reason: CutReason::default(),
            trigger: Trigger::Request,
        };
        let changed: Vec<u64> = self.changed.iter().copied().collect();
        let mut digest = DigestUpdate::new(self.geometry);
        let mut encoder = FrameEncoder::new(self.geometry);
        let mut frames: Vec<(u64, Vec<u8>)> = Vec::new();
        let zero = |image: &[u8], block: u64| {
            is_zero(&image[usize::try_from(block).unwrap() * BLOCK..][..BLOCK])
        };
        for run in changed.chunk_by(|a, b| zero(&self.image, *a) == zero(&self.image, *b)) {
            for part in run.chunks(self.frame_blocks) {
                let mut out = Vec::new();
                let mut blocks = Vec::new();
                let mut data = Vec::new();
                for &block in part {
                    let bytes = &self.image[usize::try_from(block).unwrap() * BLOCK..][..BLOCK];
                    let checksum = block_checksum(bytes);
                    blocks.push((BlockIndex::new(block), checksum));
                    data.extend_from_slice(bytes);
                    let Ok(()) = digest.push(&self.table, BlockIndex::new(block), checksum);
                }
                if zero(&self.image, part[0]) {
                    let extents: Vec<Extent> = part
                        .iter()
                        .map(|block| Extent::new(BlockIndex::new(*block), BlockCount::new(1)))
                        .collect();
                    encoder.encode_zero(&extents, &mut out);
                } else {
                    let chance = self.numbers.below(2) == 1;
                    let choice = if self.compressed.unwrap_or(chance) {
                        CodecChoice::Zstd(1)
                    } else {
                        CodecChoice::Raw
                    };
                    encoder.encode_data(&blocks, &data, choice, &mut out);
                }
                frames.push((part[part.len() - 1] + 1, out));
            }
        }
        let Ok(image_digest) = digest.finish(&self.table);
        let seal = IntervalSeal {
            changed_blocks: BlockCount::new(changed.len() as u64),
            frame_count: frames.len() as u64,
            image_digest,
        };
        let batches = frames
            .chunks(self.batch_frames)
            .map(|part| FrameBatch {
                end: BlockIndex::new(part[part.len() - 1].0),
                frames: Bytes::from(
                    part.iter()
                        .flat_map(|(_, bytes)| bytes.clone())
                        .collect::<Vec<u8>>(),
                ),
            })
            .collect();
        Prepared {
            header,
            batches,
            seal,
        }
    }

    /// The vault has committed what was changed.
    pub(crate) fn committed(&mut self, receipt: &Receipt) {
        for block in std::mem::take(&mut self.changed) {
            let checksum =
                block_checksum(&self.image[usize::try_from(block).unwrap() * BLOCK..][..BLOCK]);
            self.table.set(BlockIndex::new(block), checksum);
        }
        self.base = receipt.generation;
        assert_eq!(receipt.image_digest, self.digest());
    }

    pub(crate) fn digest(&self) -> ImageDigest {
        let Ok(digest) = image_digest(&self.table);
        digest
    }
}
