//! Recorded blocks: the checksums of up to 256 blocks that were written lately, in mapped memory, so that an opening
//! can tell whether the volume still holds what was written to it.
//!
//! Direct-mapped: a block has one place, by its hash. A record is invalid from before its block is written until the
//! write has ended, so a mismatch is never a request in flight. Each is sealed, so that it is never its own damage
//! either.

use tidemark_block::{BlockIndex, Checksum128, Extent, block_checksum, xxh3_128};

use super::words::{halves, joined};
use crate::sync::{
    atomic::{
        AtomicBool, AtomicU64, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
    },
    hint, many,
};

/// Records.
pub const RING_LEN: usize = many(256, 2);
/// Words of a record: block + 1 (0: none), the checksum's halves, the seal of these.
const RECORD_WORDS: usize = 4;
/// Words of all records.
pub const RING_WORDS: usize = RING_LEN * RECORD_WORDS;
/// One write in this many makes a record in a place of another block.
const SAMPLE: usize = many(16, 1);

/// What the process knows besides the mapped words.
#[derive(Debug)]
pub struct Ring {
    busy: Vec<AtomicBool>,
    writes: AtomicUsize,
}

impl Default for Ring {
    fn default() -> Self {
        Self {
            busy: std::iter::repeat_with(AtomicBool::default)
                .take(RING_LEN)
                .collect(),
            writes: AtomicUsize::new(0),
        }
    }
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the upper 8 bits of a hash"
)]
const fn place_of(block: BlockIndex) -> usize {
    (block.get().wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as usize % RING_LEN
}

fn seal_of(tag: u64, checksum: [u64; 2]) -> u64 {
    let mut bytes = [0; 24];
    for (bytes, word) in bytes
        .chunks_exact_mut(8)
        .zip([tag, checksum[0], checksum[1]])
    {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    halves(xxh3_128(&bytes))[0]
}

impl Ring {
    /// Before blocks are written: makes their records invalid.
    pub fn invalidate(&self, words: &[AtomicU64], blocks: Extent) {
        if blocks.count().get() < RING_LEN as u64 {
            blocks
                .iter()
                .for_each(|block| self.invalidate_at(words, place_of(block), blocks));
        } else {
            (0..RING_LEN).for_each(|place| self.invalidate_at(words, place, blocks));
        }
    }

    fn invalidate_at(&self, words: &[AtomicU64], place: usize, blocks: Extent) {
        let tag = &words[place * RECORD_WORDS];
        let holds = |tag: u64| tag != 0 && blocks.contains(BlockIndex::new(tag - 1));
        if holds(tag.load(SeqCst)) {
            self.acquire(place);
            if holds(tag.load(SeqCst)) {
                tag.store(0, SeqCst);
            }
            self.busy[place].store(false, Release);
        }
    }

    /// After a whole block was written, its stripe still locked: now and then makes a record of it.
    pub fn record(&self, words: &[AtomicU64], block: BlockIndex, content: &[u8]) {
        if !self.writes.fetch_add(1, Relaxed).is_multiple_of(SAMPLE) {
            return;
        }
        let checksum = halves(block_checksum(content));
        let place = place_of(block);
        self.acquire(place);
        let record = &words[place * RECORD_WORDS..][..RECORD_WORDS];
        record[0].store(0, SeqCst);
        record[1].store(checksum[0], SeqCst);
        record[2].store(checksum[1], SeqCst);
        record[3].store(seal_of(block.get() + 1, checksum), SeqCst);
        record[0].store(block.get() + 1, SeqCst);
        self.busy[place].store(false, Release);
    }

    fn acquire(&self, place: usize) {
        while self.busy[place]
            .compare_exchange_weak(false, true, Acquire, Relaxed)
            .is_err()
        {
            hint::spin_loop();
        }
    }

    /// The valid records; for one that was damaged, its place.
    pub fn records(
        words: &[AtomicU64],
    ) -> impl Iterator<Item = Result<(BlockIndex, Checksum128), u64>> + '_ {
        let places = words.chunks_exact(RECORD_WORDS).zip(0_u64..);
        places.filter_map(|(record, place)| {
            let [tag, low, high, seal] = [0, 1, 2, 3].map(|n| record[n].load(SeqCst));
            if tag == 0 {
                return None;
            }
            let block = BlockIndex::new(tag - 1);
            let valid = seal == seal_of(tag, [low, high]) && place_of(block) as u64 == place;
            Some(if valid {
                Ok((block, joined([low, high])))
            } else {
                Err(place)
            })
        })
    }

    /// Seals the records that 0.1.0 made.
    pub fn seal_all(words: &[AtomicU64]) {
        for record in words.chunks_exact(RECORD_WORDS) {
            let [tag, low, high] = [0, 1, 2].map(|n| record[n].load(SeqCst));
            if tag != 0 {
                record[3].store(seal_of(tag, [low, high]), SeqCst);
            }
        }
    }

    /// Forgets all records.
    pub fn clear(words: &[AtomicU64]) {
        words
            .chunks_exact(RECORD_WORDS)
            .for_each(|record| record[0].store(0, SeqCst));
    }
}
