//! Frames: the unit of transfer, and of storage inside a segment.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `TMFR` |
//! | 4 | 1 | version, 1 |
//! | 5 | 1 | codec: 0 zero, 1 raw, 2 zstd, 3 delta |
//! | 6 | 1 | digest kind: 0, XXH3-128 of the plain blocks |
//! | 7 | 1 | binary logarithm of the block size, 12 to 16 |
//! | 8 | 2 | incompatible features, 0 |
//! | 10 | 2 | e: extents, 1 to 64 |
//! | 12 | 4 | b: blocks with data, 1 to 64 and 1 MiB at most; 0 with codec zero |
//! | 16 | 4 | p: bytes of the payload, at most b × block size |
//! | 20 | 4 | 0 |
//! | 24 | 8 | key, 0: none |
//! | 32 | 16 | XXH3-128 of bytes 0 to 31 and of all behind byte 47 |
//! | 48 | 12 e | extents, ascending, not overlapping: first block (8 bytes), number of blocks (4 bytes) |
//! | | 16 b | checksum of each block, in order |
//! | | p | payload: the blocks one after the other, encoded together |
//!
//! A frame with data has as many blocks as its extents have together. A `zero` frame says that its extents, of any
//! length, are zero, and has neither checksums nor payload. The frame's own checksum covers the encoded bytes, so
//! that they can be verified without decoding; the blocks' checksums cover what they decode to. Both are checked
//! before a block can be touched.

mod decode;
mod encode;

use thiserror::Error;

pub use decode::{FrameDecoder, UnverifiedFrame, VerifiedFrame};
pub use encode::{CodecChoice, FrameEncoder};

use crate::{
    checksum::Checksum128,
    geometry::{BlockSize, Geometry},
    units::{BlockCount, BlockIndex},
    verified::CorruptBlock,
};

/// First bytes of a frame.
pub const MAGIC: [u8; 4] = *b"TMFR";
/// The version that this release writes, and the newest it reads.
pub const VERSION: u8 = 1;
/// Bytes before the extents.
pub const HEADER_LEN: usize = 48;
/// Bytes per extent.
pub const EXTENT_LEN: usize = 12;
/// The most extents of a frame.
pub const EXTENTS_MAX: usize = 64;
/// The most blocks with data of a frame.
pub const BLOCKS_MAX: usize = 64;
/// The most decoded bytes of a frame.
pub const DECODED_LEN_MAX: usize = 1 << 20;
/// The most bytes of an encoded frame.
pub const FRAME_LEN_MAX: usize =
    HEADER_LEN + EXTENTS_MAX * EXTENT_LEN + BLOCKS_MAX * Checksum128::LEN + DECODED_LEN_MAX;

const CHECKSUM_AT: usize = 32;

/// How a frame's payload is encoded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Codec {
    /// No payload: every block is zero.
    Zero = 0,
    /// The blocks themselves.
    Raw = 1,
    /// One zstd frame (RFC 8878).
    Zstd = 2,
    /// One zstd frame whose prefix is the base generation's version of the same blocks. Reserved: not decoded yet.
    Delta = 3,
}

/// The most blocks of this size that one frame holds.
#[must_use]
pub const fn blocks_max(block_size: BlockSize) -> usize {
    let fit = DECODED_LEN_MAX / block_size.as_usize();
    if fit < BLOCKS_MAX { fit } else { BLOCKS_MAX }
}

/// Why bytes are not a frame of this volume.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The bytes end before the frame does.
    #[error("the frame has {wanted} bytes, {left} are there")]
    Short {
        /// Bytes of the frame, as far as known.
        wanted: usize,
        /// Bytes that there are.
        left: usize,
    },
    /// Not a frame.
    #[error("no frame begins here")]
    Magic,
    /// Written by a later release.
    #[error("frame version {0} is newer than {VERSION}, the newest this release reads")]
    Version(u8),
    /// Written with features, a codec, a digest or a key that this release doesn't know.
    #[error("the frame's {0} is not known to this release")]
    Unknown(&'static str),
    /// A field holds what no encoder puts there.
    #[error("the frame's {0} is out of range")]
    Range(&'static str),
    /// The encoded bytes are not those that were written.
    #[error("the frame is corrupt: its checksum is {found}, {stored} was expected")]
    Corrupt {
        /// Of the bytes that are there.
        found: Checksum128,
        /// Of the bytes that were written.
        stored: Checksum128,
    },
    /// The frame belongs to a volume of another block size.
    #[error("the frame's blocks have {found} bytes, those of the volume {expected}")]
    BlockSize {
        /// In the frame.
        found: BlockSize,
        /// Of the volume.
        expected: BlockSize,
    },
    /// The frame has blocks behind the end of the volume.
    #[error("block {block} is not one of the volume's {count}")]
    Outside {
        /// The first that is outside.
        block: BlockIndex,
        /// How many the volume has.
        count: BlockCount,
    },
    /// The payload can't be decoded to the bytes that the header announces.
    #[error("the frame's payload does not decode to {0} bytes")]
    Payload(usize),
    /// A block is not what its checksum says.
    #[error(transparent)]
    Block(#[from] CorruptBlock),
}

fn check_extents(extents: &[crate::Extent], geometry: Geometry) -> Result<(), FrameError> {
    match extents
        .iter()
        .find(|extent| extent.end() > geometry.all().end())
    {
        Some(extent) => Err(FrameError::Outside {
            block: extent.start().max(geometry.all().end()),
            count: geometry.block_count(),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
