//! A compressed set of blocks: what changed, what is in doubt.
//!
//! Chunks of 4,096 blocks are absent, full, or 512 bytes of bits, so that a set takes at most one bit per block of
//! the chunks it touches, and next to nothing where it covers them wholly.

mod chunk;
mod encoding;

use std::{collections::BTreeMap, fmt};

use crate::{
    extent::{Extent, coalesce},
    units::{BlockCount, BlockIndex},
};

use chunk::{CHUNK_BLOCKS, Chunk, ChunkRuns, WORDS, chunk_extent, chunk_range, mask, word_of};

/// A set of blocks.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct BlockSet {
    chunks: BTreeMap<u64, Chunk>,
    len: u64,
}

impl BlockSet {
    /// The set without blocks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many blocks it has.
    #[must_use]
    pub const fn len(&self) -> BlockCount {
        BlockCount::new(self.len)
    }

    /// Whether it has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `block` is in it.
    #[must_use]
    pub fn contains(&self, block: BlockIndex) -> bool {
        match self.chunks.get(&(block.get() / CHUNK_BLOCKS)) {
            None => false,
            Some(Chunk::Full) => true,
            Some(Chunk::Bits(bits)) => {
                let at = block.get() % CHUNK_BLOCKS;
                bits[word_of(at)] >> (at % 64) & 1 == 1
            }
        }
    }

    /// Adds the blocks of an extent.
    pub fn insert(&mut self, extent: Extent) {
        self.change(extent, |word, mask| word | mask, Some(Chunk::Full));
    }

    /// Takes the blocks of an extent out.
    pub fn remove(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        // Only chunks that are there can lose blocks: an extent may be far longer than the set.
        let (first, last) = chunk_range(extent);
        let held: Vec<u64> = self.chunks.range(first..=last).map(|(&n, _)| n).collect();
        for chunk in held {
            let part = chunk_extent(chunk).intersect(extent);
            self.change(part, |word, mask| word & !mask, None);
        }
    }

    /// Adds every block of `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (&n, theirs) in &other.chunks {
            let merged = match (self.chunks.remove(&n), theirs) {
                (None, theirs) => theirs.clone(),
                (Some(ours), theirs) => {
                    self.len -= ours.len();
                    match (ours, theirs) {
                        (Chunk::Full, _) | (_, Chunk::Full) => Chunk::Full,
                        (Chunk::Bits(mut ours), Chunk::Bits(theirs)) => {
                            ours.iter_mut()
                                .zip(theirs.iter())
                                .for_each(|(a, b)| *a |= b);
                            Chunk::from_bits(ours).unwrap_or(Chunk::Full)
                        }
                    }
                }
            };
            self.len += merged.len();
            self.chunks.insert(n, merged);
        }
    }

    /// Takes every block of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        for (&n, theirs) in &other.chunks {
            let Some(ours) = self.chunks.remove(&n) else {
                continue;
            };
            self.len -= ours.len();
            let Chunk::Bits(theirs) = theirs else {
                continue;
            };
            let mut bits = ours.into_bits();
            bits.iter_mut()
                .zip(theirs.iter())
                .for_each(|(a, b)| *a &= !b);
            self.put(n, bits);
        }
    }

    /// The blocks of this set that lie in `extent`.
    #[must_use]
    pub fn intersect_extent(&self, extent: Extent) -> Self {
        let mut cut = Self::new();
        if extent.is_empty() {
            return cut;
        }
        let (first, last) = chunk_range(extent);
        for (&n, chunk) in self.chunks.range(first..=last) {
            if chunk_extent(n).intersect(extent) == chunk_extent(n) {
                cut.len += chunk.len();
                cut.chunks.insert(n, chunk.clone());
            } else {
                let mut bits = chunk.clone().into_bits();
                let base = n * CHUNK_BLOCKS;
                let from = extent.start().get().saturating_sub(base);
                let to = extent.end().get() - base;
                for (at, word) in (0..).zip(bits.iter_mut()) {
                    *word &= mask(at, from, to.min(CHUNK_BLOCKS));
                }
                cut.put(n, bits);
            }
        }
        cut
    }

    /// Its blocks as maximal extents, ascending.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents_from(BlockIndex::ZERO)
    }

    /// Its blocks from `start` on as maximal extents, ascending.
    pub fn extents_from(&self, start: BlockIndex) -> impl Iterator<Item = Extent> + '_ {
        let runs = self
            .chunks
            .range(start.get() / CHUNK_BLOCKS..)
            .flat_map(|(&n, chunk)| ChunkRuns::new(n, chunk));
        coalesce(runs.map(move |run| Extent::between(run.start().max(start), run.end())))
    }

    /// Sets 64 blocks at once: bit n of `bits` adds block `64 × word + n`. For draining bitmaps.
    pub fn insert_word(&mut self, word: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        let n = word / WORDS as u64;
        let mut chunk = match self.chunks.remove(&n) {
            None => Box::new(Chunk::EMPTY),
            Some(chunk) => {
                self.len -= chunk.len();
                chunk.into_bits()
            }
        };
        chunk[word_of(word % WORDS as u64 * 64)] |= bits;
        self.put(n, chunk);
    }

    fn change(&mut self, extent: Extent, apply: fn(u64, u64) -> u64, whole: Option<Chunk>) {
        if extent.is_empty() {
            return;
        }
        let (first, last) = chunk_range(extent);
        for n in first..=last {
            let part = chunk_extent(n).intersect(extent);
            let old = self.chunks.remove(&n);
            self.len -= old.as_ref().map_or(0, Chunk::len);
            if let (Some(whole), true) = (&whole, part == chunk_extent(n)) {
                self.len += whole.len();
                self.chunks.insert(n, whole.clone());
                continue;
            }
            let mut bits = old.map_or_else(|| Box::new(Chunk::EMPTY), Chunk::into_bits);
            let base = n * CHUNK_BLOCKS;
            let (from, to) = (part.start().get() - base, part.end().get() - base);
            for (at, word) in (0..).zip(bits.iter_mut()) {
                *word = apply(*word, mask(at, from, to));
            }
            self.put(n, bits);
        }
    }

    fn put(&mut self, n: u64, bits: Box<[u64; WORDS]>) {
        if let Some(chunk) = Chunk::from_bits(bits) {
            self.len += chunk.len();
            self.chunks.insert(n, chunk);
        }
    }
}

impl FromIterator<Extent> for BlockSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::new();
        set.extend(extents);
        set
    }
}

impl Extend<Extent> for BlockSet {
    fn extend<I: IntoIterator<Item = Extent>>(&mut self, extents: I) {
        extents.into_iter().for_each(|extent| self.insert(extent));
    }
}

impl fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.extents()).finish()
    }
}

#[cfg(test)]
mod tests;
