//! The shape of a volume, and the only conversions between its blocks and its bytes.

use std::fmt;

use thiserror::Error;

use crate::{
    extent::Extent,
    units::{BlockCount, BlockIndex, ByteOffset},
};

/// Bytes per block: a power of two from 4 KiB to 64 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize(u32);

impl BlockSize {
    /// The least block size, which is also the default.
    pub const MIN: Self = Self(4096);
    /// The greatest block size.
    pub const MAX: Self = Self(65536);

    /// Checks a number of bytes.
    ///
    /// # Errors
    /// Where it isn't a power of two from 4096 to 65536.
    pub const fn new(bytes: u32) -> Result<Self, GeometryError> {
        if bytes.is_power_of_two() && bytes >= Self::MIN.0 && bytes <= Self::MAX.0 {
            Ok(Self(bytes))
        } else {
            Err(GeometryError::BlockSize(bytes))
        }
    }

    /// In bytes.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// In bytes, for slices.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl Default for BlockSize {
    fn default() -> Self {
        Self::MIN
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockSize({})", self.0)
    }
}

/// Why numbers are not the shape of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// The block size is out of range.
    #[error("block size {0} is not a power of two from 4096 to 65536")]
    BlockSize(u32),
    /// The length has no block, or part of one at the end.
    #[error("length {length} is not a multiple of the block size {block_size}, at least one block")]
    Length {
        /// In bytes.
        length: u64,
        /// The block size asked for.
        block_size: BlockSize,
    },
    /// The length is beyond what a volume may have.
    #[error("length {0} is beyond the greatest length of a volume, 2^60 bytes")]
    TooLong(u64),
}

/// The length of a volume and its block size.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    length: u64,
    block_size: BlockSize,
}

impl Geometry {
    /// The greatest length of a volume, in bytes.
    pub const LENGTH_MAX: u64 = 1 << 60;

    /// Checks a volume's shape; `length` is in bytes.
    ///
    /// # Errors
    /// Where `length` isn't a positive multiple of the block size, or is beyond [`Self::LENGTH_MAX`].
    pub const fn new(length: u64, block_size: BlockSize) -> Result<Self, GeometryError> {
        if length > Self::LENGTH_MAX {
            Err(GeometryError::TooLong(length))
        } else if length == 0 || !length.is_multiple_of(block_size.0 as u64) {
            Err(GeometryError::Length { length, block_size })
        } else {
            Ok(Self { length, block_size })
        }
    }

    /// In bytes.
    #[must_use]
    pub const fn length(self) -> u64 {
        self.length
    }

    /// Bytes per block.
    #[must_use]
    pub const fn block_size(self) -> BlockSize {
        self.block_size
    }

    /// How many blocks the volume has.
    #[must_use]
    pub const fn block_count(self) -> BlockCount {
        BlockCount::new(self.length / self.block_size.0 as u64)
    }

    /// Every block.
    #[must_use]
    pub const fn all(self) -> Extent {
        Extent::new(BlockIndex::ZERO, self.block_count())
    }

    /// Where a block begins.
    #[must_use]
    pub const fn offset_of(self, block: BlockIndex) -> ByteOffset {
        ByteOffset::new(block.get() * self.block_size.0 as u64)
    }

    /// The block that holds a byte.
    #[must_use]
    pub const fn block_at(self, offset: ByteOffset) -> BlockIndex {
        BlockIndex::new(offset.get() / self.block_size.0 as u64)
    }

    /// How many bytes an extent has.
    #[must_use]
    pub const fn bytes(self, count: BlockCount) -> u64 {
        count.get() * self.block_size.0 as u64
    }

    /// Whether `length` bytes from `offset` on lie within the volume.
    #[must_use]
    pub const fn spans(self, offset: u64, length: u64) -> bool {
        match offset.checked_add(length) {
            Some(end) => end <= self.length,
            None => false,
        }
    }

    /// The blocks that `length` bytes from `offset` on touch, in whole or in part; they must lie within the volume.
    #[must_use]
    pub const fn covering(self, offset: u64, length: u64) -> Extent {
        let start = self.block_at(ByteOffset::new(offset));
        if length == 0 {
            return Extent::new(start, BlockCount::ZERO);
        }
        let end = (offset + length).div_ceil(self.block_size.0 as u64);
        Extent::between(start, BlockIndex::new(end))
    }

    /// The blocks that lie wholly within `length` bytes from `offset` on; empty where there are none.
    #[must_use]
    pub const fn contained(self, offset: u64, length: u64) -> Extent {
        let size = self.block_size.0 as u64;
        Extent::between(
            BlockIndex::new(offset.div_ceil(size)),
            BlockIndex::new((offset + length) / size),
        )
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in blocks of {}", self.length, self.block_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(blocks: u64) -> Geometry {
        Geometry::new(blocks * 4096, BlockSize::MIN).unwrap()
    }

    #[test]
    fn only_whole_blocks_make_a_volume() {
        for length in [0, 1, 4095, 4097] {
            assert!(matches!(
                Geometry::new(length, BlockSize::MIN),
                Err(GeometryError::Length { .. })
            ));
        }
        assert!(Geometry::new(Geometry::LENGTH_MAX, BlockSize::MAX).is_ok());
        assert!(matches!(
            Geometry::new(Geometry::LENGTH_MAX + 4096, BlockSize::MIN),
            Err(GeometryError::TooLong(_))
        ));
        for size in [0, 1, 2048, 4097, 131_072] {
            assert_eq!(BlockSize::new(size), Err(GeometryError::BlockSize(size)));
        }
    }

    #[test]
    fn covering_touches_and_contained_fills() {
        let g = geometry(10);
        let cases = [
            // offset, length, covering, contained
            (0, 0, (0, 0), (0, 0)),
            (0, 1, (0, 1), (0, 0)),
            (0, 4096, (0, 1), (0, 1)),
            (1, 4096, (0, 2), (1, 1)),
            (4095, 8194, (0, 4), (1, 3)),
            (36864, 4096, (9, 10), (9, 10)),
        ];
        for (offset, length, covering, contained) in cases {
            let c = g.covering(offset, length);
            assert_eq!(
                (c.start().get(), c.end().get()),
                covering,
                "{offset}+{length}"
            );
            let c = g.contained(offset, length);
            assert_eq!(
                (c.start().get(), c.end().get()),
                contained,
                "{offset}+{length}"
            );
        }
    }

    #[test]
    fn a_range_past_the_end_is_seen_without_overflow() {
        let g = geometry(2);
        assert!(g.spans(8192, 0));
        assert!(!g.spans(8192, 1));
        assert!(!g.spans(u64::MAX, 2));
    }
}
