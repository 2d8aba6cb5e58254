//! A compressed set of blocks: what changed, what is in doubt.
//!
//! Chunks of 4,096 blocks are absent, full, or 512 bytes of bits, so that a set takes at most one bit per block of
//! the chunks it touches, and next to nothing where it covers them wholly. Encoded form:
//!
//! | bytes | field |
//! |---|---|
//! | 40 | envelope (`wire`), magic `TMBLKSET`, version 1 |
//! | 8 | number of records |
//! | 8 + 8 | per record: first chunk, number of chunks with the highest bit set where they are full |
//! | 512 | behind a record of one chunk that isn't full: its bits, lowest block first |
//!
//! Records ascend, and no two that touch are both full.

use std::{collections::BTreeMap, fmt};

use crate::{
    extent::{Extent, coalesce},
    units::{BlockCount, BlockIndex},
    wire::{self, Reader, WireError},
};

const CHUNK_BLOCKS: u64 = 4096;
const WORDS: usize = 64;
const MAGIC: [u8; 8] = *b"TMBLKSET";
const VERSION: u16 = 1;
const FULL: u64 = 1 << 63;
/// Past the last chunk that a volume of the greatest length and the least block size has.
const CHUNK_END: u64 = 1 << 36;

/// A set of blocks.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct BlockSet {
    chunks: BTreeMap<u64, Chunk>,
    len: u64,
}

#[derive(Clone, PartialEq, Eq)]
enum Chunk {
    Full,
    /// Neither empty nor full.
    Bits(Box<[u64; WORDS]>),
}

impl Chunk {
    const EMPTY: [u64; WORDS] = [0; WORDS];

    fn from_bits(bits: Box<[u64; WORDS]>) -> Option<Self> {
        if bits.iter().all(|&word| word == 0) {
            None
        } else if bits.iter().all(|&word| word == u64::MAX) {
            Some(Self::Full)
        } else {
            Some(Self::Bits(bits))
        }
    }

    fn into_bits(self) -> Box<[u64; WORDS]> {
        match self {
            Self::Full => Box::new([u64::MAX; WORDS]),
            Self::Bits(bits) => bits,
        }
    }

    fn len(&self) -> u64 {
        match self {
            Self::Full => CHUNK_BLOCKS,
            Self::Bits(bits) => bits.iter().map(|word| u64::from(word.count_ones())).sum(),
        }
    }
}

/// The bits of `word` (0 to 63) that blocks `from..to` of a chunk have in it.
const fn mask(word: u64, from: u64, to: u64) -> u64 {
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
            .flat_map(|(&n, chunk)| ChunkRuns {
                base: n * CHUNK_BLOCKS,
                at: 0,
                chunk,
            });
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

    /// The encoded form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = vec![0; 8];
        let mut records = 0u64;
        let mut full: Option<(u64, u64)> = None;
        let flush = |full: &mut Option<(u64, u64)>, payload: &mut Vec<u8>| {
            if let Some((start, count)) = full.take() {
                payload.extend_from_slice(&start.to_le_bytes());
                payload.extend_from_slice(&(count | FULL).to_le_bytes());
                1
            } else {
                0
            }
        };
        for (&n, chunk) in &self.chunks {
            match (chunk, &mut full) {
                (Chunk::Full, Some((start, count))) if *start + *count == n => *count += 1,
                (Chunk::Full, _) => {
                    records += flush(&mut full, &mut payload);
                    full = Some((n, 1));
                }
                (Chunk::Bits(bits), _) => {
                    records += flush(&mut full, &mut payload) + 1;
                    payload.extend_from_slice(&n.to_le_bytes());
                    payload.extend_from_slice(&1u64.to_le_bytes());
                    bits.iter()
                        .for_each(|word| payload.extend_from_slice(&word.to_le_bytes()));
                }
            }
        }
        records += flush(&mut full, &mut payload);
        payload[..8].copy_from_slice(&records.to_le_bytes());
        wire::seal(MAGIC, VERSION, &payload)
    }

    /// Reads the encoded form of a set whose blocks all lie in `bounds`.
    ///
    /// # Errors
    /// Where the bytes are not an encoded set, or hold blocks out of bounds.
    pub fn decode(bytes: &[u8], bounds: Extent) -> Result<Self, WireError> {
        let (_, payload) = wire::unseal(MAGIC, VERSION, bytes)?;
        let mut reader = Reader::new(payload);
        let records = reader.u64()?;
        let mut set = Self::new();
        let mut next = 0;
        for _ in 0..records {
            let start = reader.u64()?;
            let count = reader.u64()?;
            let chunks = count & !FULL;
            let end = start.checked_add(chunks).filter(|&end| end <= CHUNK_END);
            let (Some(end), true) = (end, start >= next && chunks > 0) else {
                return Err(WireError::Range("chunk of a block set"));
            };
            if end - 1 > (bounds.end().get().saturating_sub(1)) / CHUNK_BLOCKS {
                return Err(WireError::Range("block of a block set"));
            }
            if count & FULL != 0 {
                set.chunks.extend((start..end).map(|n| (n, Chunk::Full)));
                set.len += chunks * CHUNK_BLOCKS;
            } else if chunks == 1 {
                let mut bits = Box::new(Chunk::EMPTY);
                for word in bits.iter_mut() {
                    *word = reader.u64()?;
                }
                set.put(start, bits);
            } else {
                return Err(WireError::Range("chunk count of a block set"));
            }
            next = end;
        }
        reader.end()?;
        let outside = set
            .extents()
            .any(|extent| extent.intersect(bounds) != extent);
        if outside {
            Err(WireError::Range("block of a block set"))
        } else {
            Ok(set)
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

/// The word of a chunk that holds block `at` of it.
#[allow(clippy::cast_possible_truncation, reason = "a chunk has 64 words")]
const fn word_of(at: u64) -> usize {
    (at / 64) as usize
}

/// First and last chunk that an extent, which is not empty, touches.
const fn chunk_range(extent: Extent) -> (u64, u64) {
    (
        extent.start().get() / CHUNK_BLOCKS,
        (extent.end().get() - 1) / CHUNK_BLOCKS,
    )
}

fn chunk_extent(n: u64) -> Extent {
    Extent::new(
        BlockIndex::new(n * CHUNK_BLOCKS),
        BlockCount::new(CHUNK_BLOCKS),
    )
}

struct ChunkRuns<'a> {
    base: u64,
    at: u64,
    chunk: &'a Chunk,
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn extent(start: u64, end: u64) -> Extent {
        Extent::between(BlockIndex::new(start), BlockIndex::new(end))
    }

    fn blocks(set: &BlockSet) -> BTreeSet<u64> {
        set.extents()
            .flat_map(Extent::iter)
            .map(BlockIndex::get)
            .collect()
    }

    #[derive(Debug, Clone)]
    enum Op {
        Insert(Extent),
        Remove(Extent),
        Word(u64, u64),
    }

    const END: u64 = 5 * CHUNK_BLOCKS + 100;

    fn extents() -> impl Strategy<Value = Extent> {
        prop_oneof![
            (0..END, 0..200u64).prop_map(|(start, count)| extent(start, (start + count).min(END))),
            (0..END, 0..END).prop_map(|(a, b)| extent(a.min(b), a.max(b))),
            (0..5u64, 1..3u64).prop_map(|(chunk, count)| {
                extent(
                    chunk * CHUNK_BLOCKS,
                    ((chunk + count) * CHUNK_BLOCKS).min(END),
                )
            }),
        ]
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            3 => extents().prop_map(Op::Insert),
            2 => extents().prop_map(Op::Remove),
            1 => (0..END / 64, any::<u64>()).prop_map(|(word, bits)| Op::Word(word, bits)),
        ];
        prop::collection::vec(op, 0..12)
    }

    fn build(ops: &[Op]) -> (BlockSet, BTreeSet<u64>) {
        let (mut set, mut model) = (BlockSet::new(), BTreeSet::new());
        for op in ops {
            match *op {
                Op::Insert(extent) => {
                    set.insert(extent);
                    model.extend(extent.iter().map(BlockIndex::get));
                }
                Op::Remove(extent) => {
                    set.remove(extent);
                    model.retain(|&block| !extent.contains(BlockIndex::new(block)));
                }
                Op::Word(word, bits) => {
                    set.insert_word(word, bits);
                    model.extend(
                        (0..64)
                            .filter(|n| bits >> n & 1 == 1)
                            .map(|n| word * 64 + n),
                    );
                }
            }
        }
        (set, model)
    }

    proptest! {
        #[test]
        fn a_block_set_is_a_set_of_blocks(ops in ops(), other in ops(), cut in extents()) {
            let (set, model) = build(&ops);
            let (other, other_model) = build(&other);
            prop_assert_eq!(&blocks(&set), &model);
            prop_assert_eq!(set.len().get(), model.len() as u64);
            for block in [0, 1, 4095, 4096, END - 1] {
                prop_assert_eq!(set.contains(BlockIndex::new(block)), model.contains(&block));
            }

            let mut union = set.clone();
            union.union_with(&other);
            prop_assert_eq!(blocks(&union), &model | &other_model);
            prop_assert_eq!(union.len().get(), (&model | &other_model).len() as u64);

            let mut less = set.clone();
            less.subtract(&other);
            prop_assert_eq!(blocks(&less), &model - &other_model);
            prop_assert_eq!(less.len().get(), (&model - &other_model).len() as u64);

            let part = set.intersect_extent(cut);
            let expected: BTreeSet<_> =
                model.iter().copied().filter(|&b| cut.contains(BlockIndex::new(b))).collect();
            prop_assert_eq!(part.len().get(), expected.len() as u64);
            prop_assert_eq!(blocks(&part), expected);

            let from: BTreeSet<_> =
                set.extents_from(cut.start()).flat_map(Extent::iter).map(BlockIndex::get).collect();
            prop_assert_eq!(from, model.iter().copied().filter(|&b| b >= cut.start().get()).collect());

            let decoded = BlockSet::decode(&set.encode(), extent(0, END));
            prop_assert_eq!(decoded, Ok(set));
        }

        #[test]
        fn no_bytes_make_decoding_panic(payload in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = BlockSet::decode(&wire::seal(MAGIC, VERSION, &payload), extent(0, END));
        }
    }

    #[test]
    fn extents_are_maximal_across_chunks() {
        let set: BlockSet = [extent(10, 20), extent(4000, 9000)].into_iter().collect();
        assert_eq!(
            set.extents().collect::<Vec<_>>(),
            [extent(10, 20), extent(4000, 9000)]
        );
    }

    #[test]
    fn a_set_of_a_whole_tebibyte_is_small() {
        let set: BlockSet = [extent(0, 1 << 28)].into_iter().collect();
        assert_eq!(set.len().get(), 1 << 28);
        assert!(set.encode().len() < 100);
    }

    #[test]
    fn a_decoded_set_stays_within_its_bounds() {
        let set: BlockSet = [extent(10, 21)].into_iter().collect();
        assert!(BlockSet::decode(&set.encode(), extent(0, 21)).is_ok());
        assert_eq!(
            BlockSet::decode(&set.encode(), extent(0, 20)),
            Err(WireError::Range("block of a block set"))
        );
        let huge = [1u64, 0, FULL | (1 << 62)].map(u64::to_le_bytes).concat();
        assert!(BlockSet::decode(&wire::seal(MAGIC, VERSION, &huge), extent(0, 20)).is_err());
    }

    #[test]
    fn a_golden_set_keeps_decoding() {
        let set = BlockSet::decode(
            include_bytes!("../tests/golden/block-set-v1"),
            extent(0, 50_000),
        );
        let set = set.unwrap();
        assert_eq!(
            set.extents().collect::<Vec<_>>(),
            [extent(10, 21), extent(4000, 20_000), extent(40_960, 49_152)]
        );
        assert_eq!(set.encode(), include_bytes!("../tests/golden/block-set-v1"));
    }
}
