//! 4,096 blocks of a set.

use crate::{
    extent::Extent,
    units::{BlockCount, BlockIndex},
};

/// Blocks of a chunk.
pub(super) const CHUNK_BLOCKS: u64 = 4096;
/// Words of a chunk's bits.
pub(super) const WORDS: usize = 64;

/// What a set holds of a chunk that it touches.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Chunk {
    Full,
    /// Neither empty nor full.
    Bits(Box<[u64; WORDS]>),
}

impl Chunk {
    pub(super) const EMPTY: [u64; WORDS] = [0; WORDS];

    pub(super) fn from_bits(bits: Box<[u64; WORDS]>) -> Option<Self> {
        if bits.iter().all(|&word| word == 0) {
            None
        } else if bits.iter().all(|&word| word == u64::MAX) {
            Some(Self::Full)
        } else {
            Some(Self::Bits(bits))
        }
    }

    pub(super) fn into_bits(self) -> Box<[u64; WORDS]> {
        match self {
            Self::Full => Box::new([u64::MAX; WORDS]),
            Self::Bits(bits) => bits,
        }
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Full => CHUNK_BLOCKS,
            Self::Bits(bits) => bits.iter().map(|word| u64::from(word.count_ones())).sum(),
        }
    }
}

/// The bits of `word` (0 to 63) that blocks `from..to` of a chunk have in it.
pub(super) const fn mask(word: u64, from: u64, to: u64) -> u64 {
    let low = from.saturating_sub(word * 64);
    let high = if to < (word + 1) * 64 {
        to.saturating_sub(word * 64)
    } else {
        64
    };
    if low >= high {
        return 0;
    }
    let upper = if high == 64 {
        u64::MAX
    } else {
        (1 << high) - 1
    };
    upper & (u64::MAX << low)
}

/// The word of a chunk that holds block `at` of it.
#[allow(clippy::cast_possible_truncation, reason = "a chunk has 64 words")]
pub(super) const fn word_of(at: u64) -> usize {
    (at / 64) as usize
}

/// First and last chunk that an extent, which is not empty, touches.
pub(super) const fn chunk_range(extent: Extent) -> (u64, u64) {
    (
        extent.start().get() / CHUNK_BLOCKS,
        (extent.end().get() - 1) / CHUNK_BLOCKS,
    )
}

pub(super) fn chunk_extent(n: u64) -> Extent {
    Extent::new(
        BlockIndex::new(n * CHUNK_BLOCKS),
        BlockCount::new(CHUNK_BLOCKS),
    )
}

/// The runs of a chunk's blocks, ascending.
pub(super) struct ChunkRuns<'a> {
    base: u64,
    at: u64,
    chunk: &'a Chunk,
}

impl<'a> ChunkRuns<'a> {
    /// Of the chunk with number `n`.
    pub(super) const fn new(n: u64, chunk: &'a Chunk) -> Self {
        Self {
            base: n * CHUNK_BLOCKS,
            at: 0,
            chunk,
        }
    }
}

impl Iterator for ChunkRuns<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        let bits = match self.chunk {
            Chunk::Bits(bits) => bits,
            Chunk::Full if self.at == 0 => {
                self.at = CHUNK_BLOCKS;
                return Some(Extent::new(
                    BlockIndex::new(self.base),
                    BlockCount::new(CHUNK_BLOCKS),
                ));
            }
            Chunk::Full => return None,
        };
        let find = |from: u64, want: u64| {
            let mut at = from;
            while at < CHUNK_BLOCKS {
                let word = (bits[word_of(at)] ^ want) >> (at % 64) << (at % 64);
                if word != 0 {
                    return at / 64 * 64 + u64::from(word.trailing_zeros());
                }
                at = (at / 64 + 1) * 64;
            }
            CHUNK_BLOCKS
        };
        let start = find(self.at, 0);
        let end = find(start, u64::MAX);
        self.at = end;
        (start < end).then(|| {
            Extent::between(
                BlockIndex::new(self.base + start),
                BlockIndex::new(self.base + end),
            )
        })
    }
}
