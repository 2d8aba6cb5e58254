//! Dirty map: which blocks an epoch wrote, with two levels of summary above, so that reading and clearing cost by what
//! was set and not by the size of the volume (1 TiB in 4 KiB blocks: 2²⁸ blocks, 8,192 words at the top).
//!
//! It lies in mapped memory and must be right after a crash at any store: a bit is set from the top down, so that a
//! set bit is always found, and cleared from the bottom up. A checksum can't be kept of memory that every write
//! changes; so each word has every bit twice, in its lower and in its upper half, set by one store. A flipped bit
//! differs from its copy: it is found, and till then it counts as set where blocks are collected, and as not set where
//! that would spare the work of copying or marking.

use thiserror::Error;
use tidemark_block::{BlockIndex, BlockSet, Extent};

use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

const WORD_LEN: usize = 32;
/// Bits of a word, each of which it has twice.
pub const WORD_BITS: u64 = WORD_LEN as u64;

/// What a dirty map never holds unless its file was damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DirtyFault {
    /// A bit isn't what its copy is.
    #[error("a bit of word {0} differs from its copy")]
    Copies(u64),
    /// A word has bits, and the one that says so isn't set.
    #[error("word {0} has bits that the level above knows nothing of")]
    Hidden(u64),
    /// A bit stands for a block or word that there isn't.
    #[error("word {0} has bits beyond the end of the volume")]
    Beyond(u64),
}

/// Sizes of the levels, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyLayout {
    block_count: u64,
    blocks: usize,
    words: usize,
    groups: usize,
}

impl DirtyLayout {
    /// The layout for this many blocks.
    ///
    /// # Panics
    /// Where the number of blocks doesn't fit this machine's address space.
    #[must_use]
    pub fn new(block_count: u64) -> Self {
        let above = |below: usize| below.div_ceil(WORD_LEN);
        let blocks = usize::try_from(block_count.div_ceil(WORD_BITS))
            .expect("a volume's dirty map fits into the address space");
        Self {
            block_count,
            blocks,
            words: above(blocks),
            groups: above(above(blocks)),
        }
    }

    /// All words: top level first, bits of blocks last.
    #[must_use]
    pub const fn total(self) -> usize {
        self.groups + self.words + self.blocks
    }

    /// The map in these words.
    #[must_use]
    pub fn map(self, words: &[AtomicU64]) -> DirtyMap<'_> {
        let (groups, rest) = words.split_at(self.groups);
        let (words, rest) = rest.split_at(self.words);
        DirtyMap {
            block_count: self.block_count,
            groups,
            words,
            blocks: &rest[..self.blocks],
        }
    }
}

/// A dirty map over its words.
#[derive(Debug, Clone, Copy)]
pub struct DirtyMap<'a> {
    block_count: u64,
    /// A bit per word of `words`.
    groups: &'a [AtomicU64],
    /// A bit per word of `blocks`.
    words: &'a [AtomicU64],
    /// A bit per block.
    blocks: &'a [AtomicU64],
}

/// A word with these bits, and their copies.
const fn twice(bits: u32) -> u64 {
    bits as u64 | (bits as u64) << WORD_BITS
}

#[allow(clippy::cast_possible_truncation, reason = "the two halves of a word")]
const fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> WORD_BITS) as u32]
}

/// The bits of a word, where one that differs from its copy counts as set.
const fn bits_of(word: u64) -> u32 {
    let [one, other] = halves(word);
    one | other
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the layout has checked that positions fit"
)]
const fn split(at: u64) -> (usize, u32) {
    ((at / WORD_BITS) as usize, 1 << (at % WORD_BITS))
}

impl DirtyMap<'_> {
    /// Whether a block is set; not one whose bit was damaged.
    #[must_use]
    pub fn contains(self, block: BlockIndex) -> bool {
        let (word, bit) = split(block.get());
        self.blocks[word].load(SeqCst) & twice(bit) == twice(bit)
    }

    /// Sets the blocks of an extent; returns how many were not set before.
    pub fn insert(self, extent: Extent) -> u64 {
        let (mut at, end) = (extent.start().get(), extent.end().get());
        let mut fresh = 0;
        while at < end {
            let stop = end.min((at / WORD_BITS + 1) * WORD_BITS);
            let mask = (u32::MAX >> (WORD_BITS - (stop - at))) << (at % WORD_BITS);
            fresh += self.insert_word(split(at).0, mask);
            at = stop;
        }
        fresh
    }

    fn insert_word(self, word: usize, mask: u32) -> u64 {
        if self.blocks[word].load(SeqCst) & twice(mask) == twice(mask) {
            return 0;
        }
        set(self.groups, word as u64 / WORD_BITS);
        set(self.words, word as u64);
        let before = self.blocks[word].fetch_or(twice(mask), SeqCst);
        u64::from((mask & !bits_of(before)).count_ones())
    }

    /// Looks at every word, whatever the summaries say.
    ///
    /// # Errors
    /// The first damage that is found. Its file has more, perhaps.
    pub fn check(self) -> Result<(), DirtyFault> {
        let below = [self.words.len() as u64, self.blocks.len() as u64];
        let levels = [
            (self.groups, below[0], None),
            (self.words, below[1], Some(self.groups)),
            (self.blocks, self.block_count, Some(self.words)),
        ];
        let mut number = 0;
        for (level, below, above) in levels {
            for (n, word) in level.iter().enumerate() {
                check_word(n as u64, word.load(SeqCst), below, above, number)?;
                number += 1;
            }
        }
        Ok(())
    }

    /// The set blocks of an extent; with those that a damaged bit may stand for.
    #[must_use]
    pub fn collect(self, extent: Extent) -> BlockSet {
        self.collect_checked(extent).0
    }

    /// As [`Self::collect`], and whether each bit on the way is as its copy.
    #[must_use]
    pub fn collect_checked(self, extent: Extent) -> (BlockSet, bool) {
        let mut set = BlockSet::new();
        if extent.is_empty() {
            return (set, true);
        }
        let (first, last) = (extent.start().get(), extent.end().get() - 1);
        let whole = self.each_word(first / WORD_BITS, last / WORD_BITS, |word, bits| {
            let mut bits = u64::from(bits);
            if word == first / WORD_BITS {
                bits &= u64::MAX << (first % WORD_BITS);
            }
            if word == last / WORD_BITS {
                bits &= u64::MAX >> (63 - last % WORD_BITS);
            }
            set.insert_word(word / 2, bits << (word % 2 * WORD_BITS));
        });
        (set, whole)
    }

    /// Clears what was set. No block may be set at the same time.
    pub fn clear(self) {
        let last = self.blocks.len() as u64 - 1;
        self.each_word(0, last, |word, _| {
            if let Some(word) = usize::try_from(word).ok().and_then(|n| self.blocks.get(n)) {
                word.store(0, SeqCst);
            }
        });
        for (group, summary) in self.groups.iter().enumerate() {
            each_bit(bits_of(summary.load(SeqCst)), |bit| {
                if let Some(word) = self.words.get(group * WORD_LEN + bit) {
                    word.store(0, SeqCst);
                }
            });
            summary.store(0, SeqCst);
        }
    }

    /// Calls `then` for each word of block bits from `first` to `last` that may have any set, with its bits; tells
    /// whether each bit on the way is as its copy.
    fn each_word(self, first: u64, last: u64, mut then: impl FnMut(u64, u32)) -> bool {
        let mut whole = true;
        let mut look = |level: &[AtomicU64], at: u64| {
            // A damaged bit may stand for a word that there isn't.
            let word = usize::try_from(at).ok().and_then(|n| level.get(n));
            let [one, other] = halves(word.map_or(0, |word| word.load(SeqCst)));
            whole &= word.is_some() && one == other;
            one | other
        };
        for group in first / WORD_BITS / WORD_BITS..=last / WORD_BITS / WORD_BITS {
            each_bit(look(self.groups, group), |bit| {
                let summary = group * WORD_BITS + bit as u64;
                each_bit(look(self.words, summary), |bit| {
                    let word = summary * WORD_BITS + bit as u64;
                    if (first..=last).contains(&word) {
                        then(word, look(self.blocks, word));
                    }
                });
            });
        }
        whole
    }
}

/// `number`: of the word in the map; `n`: in its level.
fn check_word(
    n: u64,
    word: u64,
    below: u64,
    above: Option<&[AtomicU64]>,
    number: u64,
) -> Result<(), DirtyFault> {
    if word == 0 {
        return Ok(());
    }
    let [one, other] = halves(word);
    if one != other {
        return Err(DirtyFault::Copies(number));
    }
    let left = below - n * WORD_BITS;
    if left < WORD_BITS && one >> left != 0 {
        return Err(DirtyFault::Beyond(number));
    }
    let (at, bit) = split(n);
    if above.is_some_and(|above| bits_of(above[at].load(SeqCst)) & bit == 0) {
        return Err(DirtyFault::Hidden(number));
    }
    Ok(())
}

fn set(level: &[AtomicU64], at: u64) {
    let (word, bit) = split(at);
    if level[word].load(SeqCst) & twice(bit) != twice(bit) {
        level[word].fetch_or(twice(bit), SeqCst);
    }
}

fn each_bit(mut bits: u32, mut then: impl FnMut(usize)) {
    while bits != 0 {
        then(bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 64 * 64 * 64 * 2 + 100;

    fn words(layout: DirtyLayout) -> Vec<AtomicU64> {
        std::iter::repeat_with(AtomicU64::default)
            .take(layout.total())
            .collect()
    }

    fn extent(start: u64, count: u64) -> Extent {
        Extent::between(
            BlockIndex::new(start),
            BlockIndex::new((start + count).min(BLOCKS)),
        )
    }

    proptest! {
        #[test]
        fn a_dirty_map_holds_what_was_set_until_it_is_cleared(
            runs in prop::collection::vec((0..BLOCKS, 1..300u64), 0..12),
            part in (0..BLOCKS, 0..20_000u64),
        ) {
            let layout = DirtyLayout::new(BLOCKS);
            let words = words(layout);
            let map = layout.map(&words);
            let mut model = BTreeSet::new();
            for (start, count) in runs {
                let extent = extent(start, count);
                let before = model.len();
                model.extend(extent.iter().map(BlockIndex::get));
                prop_assert_eq!(map.insert(extent), (model.len() - before) as u64);
            }
            for part in [extent(part.0, part.1), extent(0, BLOCKS)] {
                let found: BTreeSet<_> =
                    map.collect(part).extents().flat_map(Extent::iter).map(BlockIndex::get).collect();
                let wanted: BTreeSet<_> =
                    model.iter().copied().filter(|&b| part.contains(BlockIndex::new(b))).collect();
                prop_assert_eq!(found, wanted);
            }
            prop_assert_eq!(map.check(), Ok(()));
            map.clear();
            prop_assert!(words.iter().all(|word| word.load(SeqCst) == 0));
        }

        #[test]
        fn a_flipped_bit_is_found_loses_no_block_and_spares_no_copy(
            runs in prop::collection::vec((0..BLOCKS, 1..300u64), 0..12),
            flips in prop::collection::vec(any::<u64>(), 1..40),
        ) {
            let layout = DirtyLayout::new(BLOCKS);
            let words = words(layout);
            let map = layout.map(&words);
            for (start, count) in runs {
                map.insert(extent(start, count));
            }
            let mut set = map.collect(extent(0, BLOCKS));
            let summaries = (layout.groups + layout.words) as u64;
            for flip in flips {
                // As many in the summaries as among the blocks.
                let place = match flip % 2 {
                    0 => (flip >> 8) % summaries,
                    _ => summaries + (flip >> 8) % layout.blocks as u64,
                };
                let (word, bit) = (&words[usize::try_from(place).unwrap()], (flip >> 1) % 64);
                word.fetch_xor(1 << bit, SeqCst);
                prop_assert_eq!(map.check(), Err(DirtyFault::Copies(place)));
                let mut both = map.collect(extent(0, BLOCKS));
                both.union_with(&set);
                prop_assert_eq!(map.collect(extent(0, BLOCKS)), both, "no block is lost");
                let at = place.saturating_sub(summaries) * WORD_BITS + bit % WORD_BITS;
                if place < summaries || at >= BLOCKS {
                    word.fetch_xor(1 << bit, SeqCst);
                } else {
                    prop_assert!(!map.contains(BlockIndex::new(at)));
                    // Whoever sets the block is heard.
                    map.insert(extent(at, 1));
                    set.insert(extent(at, 1));
                    prop_assert!(map.contains(BlockIndex::new(at)));
                }
                prop_assert_eq!(map.check(), Ok(()));
                prop_assert_eq!(map.collect(extent(0, BLOCKS)), set.clone());
            }
        }
    }

    #[test]
    fn bits_that_nobody_set_are_told_by_their_word() {
        let layout = DirtyLayout::new(70);
        let cases = [
            (0, 1 << 1, DirtyFault::Beyond(0)),
            (1, 1 << 3, DirtyFault::Beyond(1)),
            (4, 1 << 6, DirtyFault::Beyond(4)),
            (1, 1, DirtyFault::Hidden(1)),
            (3, 1, DirtyFault::Hidden(3)),
        ];
        for (word, bits, fault) in cases {
            let words = words(layout);
            words[word].store(twice(bits), SeqCst);
            let map = layout.map(&words);
            assert_eq!(map.check(), Err(fault));
            map.clear();
        }
    }

    #[test]
    fn a_tebibyte_is_read_and_cleared_by_looking_at_some_thousand_words() {
        let layout = DirtyLayout::new(1 << 28);
        assert_eq!(layout.groups, 8192);
        assert_eq!(layout.total() * 8, (64 << 20) + (2 << 20) + (64 << 10));
    }
}
