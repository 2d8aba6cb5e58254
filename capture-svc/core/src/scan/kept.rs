//! The file of an open interval: which blocks differ from the base, their checksums, and their bytes.
//!
//! The volume is looked at in chunks of 1 MiB. A chunk in which something differs has one record here; records lie in any
//! order, behind a header. `docs/FORMAT-CAPTURE.md` has the bytes. The bytes of blocks are verified by their checksums
//! whenever they are read. A record without bytes, for which there was no room, names the checksums alone: then the blocks
//! are read from the volume file, and must still be what they were.

use tidemark_block::{
    BlockCount, BlockIndex, BlockSet, Checksum128, Extent, Geometry, VolumeId,
    wire::{ENVELOPE_LEN, Reader, WireError, seal, unseal},
    xxh3_128,
};

/// Magic of the header.
pub const KEPT_MAGIC: [u8; 8] = *b"TMSCANIV";
const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = ENVELOPE_LEN + 36;
const RECORD_MAGIC: [u8; 4] = *b"TMSR";
/// Bytes of a volume that are looked at together.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Most blocks of a chunk.
pub const CHUNK_BLOCKS_MAX: usize = 256;
/// Bytes of a record's head without its checksums.
const FIXED_LEN: usize = 80;
/// Most bytes of a record's head.
pub const HEAD_LEN_MAX: usize = FIXED_LEN + (CHUNK_BLOCKS_MAX + 1) * Checksum128::LEN;
const WITH_BYTES: u32 = 1;

/// A bit for each block of a chunk, from its first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bits([u64; CHUNK_BLOCKS_MAX / 64]);

impl Bits {
    /// Sets one; `at` is below [`CHUNK_BLOCKS_MAX`].
    pub fn set(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }

    /// Whether one is set.
    #[must_use]
    pub fn has(&self, at: usize) -> bool {
        self.0[at / 64] >> (at % 64) & 1 == 1
    }

    /// How many are set.
    #[must_use]
    pub fn count(&self) -> usize {
        self.below(CHUNK_BLOCKS_MAX)
    }

    /// How many are set below `at`.
    #[must_use]
    pub fn below(&self, at: usize) -> usize {
        let word = |(n, bits): (usize, &u64)| match at.saturating_sub(n * 64) {
            whole if whole >= 64 => bits.count_ones() as usize,
            part => (bits & ((1 << part) - 1)).count_ones() as usize,
        };
        self.0.iter().enumerate().map(word).sum()
    }

    /// Those that are set, ascending.
    pub fn ones(self) -> impl Iterator<Item = usize> {
        (0..CHUNK_BLOCKS_MAX).filter(move |at| self.has(*at))
    }

    fn is_within(self, other: Self) -> bool {
        self.0.iter().zip(other.0).all(|(a, b)| a & !b == 0)
    }
}

/// The number of chunks of a volume.
#[must_use]
pub const fn chunk_count(geometry: Geometry) -> u64 {
    geometry.length().div_ceil(CHUNK_BYTES)
}

/// Blocks of a whole chunk.
#[must_use]
pub fn chunk_blocks(geometry: Geometry) -> u64 {
    CHUNK_BYTES / u64::from(geometry.block_size().get())
}

/// The blocks of a chunk; the last one may have fewer.
#[must_use]
pub fn chunk_extent(geometry: Geometry, chunk: u64) -> Extent {
    let blocks = chunk_blocks(geometry);
    let start = BlockIndex::new(chunk * blocks);
    Extent::new(start, BlockCount::new(blocks)).intersect(geometry.all())
}

/// The head of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The number of its chunk.
    pub chunk: u64,
    /// The blocks that differ from the base.
    pub changed: Bits,
    /// Those of them that hold something else than zeroes.
    pub data: Bits,
    /// Their checksums, ascending.
    pub sums: Vec<Checksum128>,
    /// Whether their bytes follow.
    pub with_bytes: bool,
}

impl Head {
    /// Bytes of the head.
    #[must_use]
    pub fn len(&self) -> u64 {
        (FIXED_LEN + (self.sums.len() + 1) * Checksum128::LEN) as u64
    }

    /// Whether nothing differs: such a chunk has no record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changed == Bits::default()
    }

    /// Bytes of the record.
    #[must_use]
    pub fn record_len(&self, geometry: Geometry) -> u64 {
        let bytes = geometry.bytes(BlockCount::new(self.sums.len() as u64));
        self.len() + if self.with_bytes { bytes } else { 0 }
    }

    /// Where a block's bytes begin, from the beginning of the record, with the block's checksum; none where it is zero.
    /// `at` counts from the chunk's first block.
    #[must_use]
    pub fn find(&self, geometry: Geometry, at: usize) -> Option<(u64, Checksum128)> {
        if !self.data.has(at) {
            return None;
        }
        let n = self.data.below(at);
        let offset = self.len() + geometry.bytes(BlockCount::new(n as u64));
        Some((offset, self.sums[n]))
    }

    /// Adds the blocks that differ.
    pub fn add_changed_to(&self, geometry: Geometry, changed: &mut BlockSet) {
        let start = chunk_extent(geometry, self.chunk).start();
        for at in self.changed.ones() {
            let block = start.plus(BlockCount::new(at as u64));
            changed.insert(Extent::new(block, BlockCount::new(1)));
        }
    }

    /// The head's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD_LEN_MAX);
        out.extend_from_slice(&RECORD_MAGIC);
        let flags = if self.with_bytes { WITH_BYTES } else { 0 };
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&self.chunk.to_le_bytes());
        for word in self.changed.0.iter().chain(&self.data.0) {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for sum in &self.sums {
            out.extend_from_slice(sum.as_bytes());
        }
        let sum = xxh3_128(&out);
        out.extend_from_slice(sum.as_bytes());
        out
    }

    /// Decodes a head; `bytes` begins with it and may go on.
    ///
    /// # Errors
    /// Where the bytes are no head of a record of such a volume.
    pub fn decode(bytes: &[u8], geometry: Geometry) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        if r.array()? != RECORD_MAGIC {
            return Err(WireError::Range("magic of a record"));
        }
        let flags = r.u32()?;
        let chunk = r.u64()?;
        let mut words = || -> Result<Bits, WireError> {
            let mut bits = Bits::default();
            for word in &mut bits.0 {
                *word = r.u64()?;
            }
            Ok(bits)
        };
        let (changed, data) = (words()?, words()?);
        let mut sums = Vec::with_capacity(data.count());
        for _ in 0..data.count() {
            sums.push(Checksum128::from_bytes(r.array()?));
        }
        let length = FIXED_LEN + sums.len() * Checksum128::LEN;
        let (found, stored) = (
            xxh3_128(&bytes[..length]),
            Checksum128::from_bytes(r.array()?),
        );
        if found != stored {
            return Err(WireError::Checksum { found, stored });
        }
        if chunk >= chunk_count(geometry) || flags & !WITH_BYTES != 0 {
            return Err(WireError::Range("chunk"));
        }
        let blocks = chunk_extent(geometry, chunk).count().get();
        let beyond = changed.ones().any(|at| at as u64 >= blocks);
        if beyond || !data.is_within(changed) || sums.iter().any(|sum| sum.is_zero()) {
            return Err(WireError::Range("blocks of a chunk"));
        }
        Ok(Self {
            chunk,
            changed,
            data,
            sums,
            with_bytes: flags == WITH_BYTES,
        })
    }
}

/// The header of the file with the records of a cut.
#[must_use]
pub fn encode_header(volume: VolumeId, geometry: Geometry, cut: u64) -> Vec<u8> {
    let mut payload = volume.as_bytes().to_vec();
    payload.extend_from_slice(&geometry.length().to_le_bytes());
    payload.extend_from_slice(&geometry.block_size().get().to_le_bytes());
    payload.extend_from_slice(&cut.to_le_bytes());
    seal(KEPT_MAGIC, VERSION, &payload)
}

/// Checks that bytes are the header of the file with the records of this cut.
///
/// # Errors
/// Where they are not.
pub fn check_header(
    bytes: &[u8],
    volume: VolumeId,
    geometry: Geometry,
    cut: u64,
) -> Result<(), WireError> {
    unseal(KEPT_MAGIC, VERSION, bytes)?;
    match bytes == encode_header(volume, geometry, cut) {
        true => Ok(()),
        false => Err(WireError::Range("volume or cut")),
    }
}

#[cfg(test)]
mod tests;
