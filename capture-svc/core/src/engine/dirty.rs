//! Dirty map: one bit per block, with two levels of summary above, so that reading and clearing cost by what was
//! set and not by the size of the volume (1 TiB in 4 KiB blocks: 2²⁸ bits, 1,024 words at the top).
//!
//! It lies in mapped memory and must be right after a crash at any store: a bit is set from the top down, so that a
//! set bit is always found, and cleared from the bottom up.

use tidemark_block::{BlockIndex, BlockSet, Extent};

use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Sizes of the levels, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyLayout {
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
        let blocks = usize::try_from(block_count.div_ceil(64))
            .expect("a volume's dirty map fits into the address space");
        let words = blocks.div_ceil(64);
        Self {
            blocks,
            words,
            groups: words.div_ceil(64),
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
            groups,
            words,
            blocks: &rest[..self.blocks],
        }
    }
}

/// A dirty map over its words.
#[derive(Debug, Clone, Copy)]
pub struct DirtyMap<'a> {
    /// A bit per word of `words`.
    groups: &'a [AtomicU64],
    /// A bit per word of `blocks`.
    words: &'a [AtomicU64],
    /// A bit per block.
    blocks: &'a [AtomicU64],
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the layout has checked that positions fit"
)]
const fn split(at: u64) -> (usize, u64) {
    ((at / 64) as usize, 1 << (at % 64))
}

impl DirtyMap<'_> {
    /// Whether a block is set.
    #[must_use]
    pub fn contains(self, block: BlockIndex) -> bool {
        let (word, bit) = split(block.get());
        self.blocks[word].load(SeqCst) & bit != 0
    }

    /// Sets the blocks of an extent; returns how many were not set before.
    pub fn insert(self, extent: Extent) -> u64 {
        let (mut at, end) = (extent.start().get(), extent.end().get());
        let mut fresh = 0;
        while at < end {
            let stop = end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            fresh += self.insert_word(split(at).0, mask);
            at = stop;
        }
        fresh
    }

    fn insert_word(self, word: usize, mask: u64) -> u64 {
        if self.blocks[word].load(SeqCst) & mask == mask {
            return 0;
        }
        set(self.groups, word as u64 / 64);
        set(self.words, word as u64);
        u64::from((mask & !self.blocks[word].fetch_or(mask, SeqCst)).count_ones())
    }

    /// Whether no summary names a word that the map doesn't have: such a bit was not set by us.
    #[must_use]
    pub fn is_whole(self) -> bool {
        let within = |summaries: &[AtomicU64], level: &[AtomicU64]| {
            let (full, last) = (level.len() / 64, level.len() % 64);
            let beyond = if last == 0 { 0 } else { u64::MAX << last };
            summaries
                .get(full)
                .is_none_or(|word| word.load(SeqCst) & beyond == 0)
        };
        within(self.groups, self.words) && within(self.words, self.blocks)
    }

    /// The set blocks of an extent.
    #[must_use]
    pub fn collect(self, extent: Extent) -> BlockSet {
        let mut set = BlockSet::new();
        if extent.is_empty() {
            return set;
        }
        let (first, last) = (extent.start().get() / 64, (extent.end().get() - 1) / 64);
        self.each_word(first, last, |word| {
            let mut bits = self.blocks[word].load(SeqCst);
            if word as u64 == first {
                bits &= u64::MAX << (extent.start().get() % 64);
            }
            if word as u64 == last {
                bits &= u64::MAX >> (63 - (extent.end().get() - 1) % 64);
            }
            set.insert_word(word as u64, bits);
        });
        set
    }

    /// Clears what was set. No block may be set at the same time.
    pub fn clear(self) {
        let last = self.blocks.len() as u64 - 1;
        self.each_word(0, last, |word| self.blocks[word].store(0, SeqCst));
        for (group, summary) in self.groups.iter().enumerate() {
            each_bit(summary.load(SeqCst), |bit| {
                self.words[group * 64 + bit].store(0, SeqCst)
            });
            summary.store(0, SeqCst);
        }
    }

    /// Calls `then` for each word of block bits from `first` to `last` that may have any set.
    fn each_word(self, first: u64, last: u64, mut then: impl FnMut(usize)) {
        for group in split(first / 64).0..=split(last / 64).0 {
            each_bit(self.groups[group].load(SeqCst), |word_bit| {
                let summary = group * 64 + word_bit;
                each_bit(self.words[summary].load(SeqCst), |bit| {
                    let word = summary * 64 + bit;
                    if (first..=last).contains(&(word as u64)) {
                        then(word);
                    }
                });
            });
        }
    }
}

fn set(level: &[AtomicU64], at: u64) {
    let (word, bit) = split(at);
    if level[word].load(SeqCst) & bit == 0 {
        level[word].fetch_or(bit, SeqCst);
    }
}

fn each_bit(mut bits: u64, mut then: impl FnMut(usize)) {
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
            map.clear();
            prop_assert!(words.iter().all(|word| word.load(SeqCst) == 0));
        }
    }

    #[test]
    fn a_tebibyte_is_read_and_cleared_by_looking_at_a_thousand_words() {
        let layout = DirtyLayout::new(1 << 28);
        assert_eq!(layout.groups, 1024);
        assert_eq!(layout.total() * 8, (32 << 20) + (512 << 10) + (8 << 10));
    }
}
