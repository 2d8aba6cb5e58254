//! Bytes travel with their checksum, and are of another type until it has been checked.

use thiserror::Error;

use crate::{
    checksum::{Checksum128, block_checksum},
    units::BlockIndex,
};

/// A block's bytes are not those that its checksum was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("block {block} is corrupt: its checksum is {found}, {expected} was expected")]
pub struct CorruptBlock {
    /// Which block.
    pub block: BlockIndex,
    /// The checksum that belongs to it.
    pub expected: Checksum128,
    /// The checksum of the bytes that are there.
    pub found: Checksum128,
}

/// A block as a disk or a wire gave it, with the checksum it should have.
#[derive(Debug, Clone, Copy)]
pub struct UnverifiedBlock<'a> {
    block: BlockIndex,
    bytes: &'a [u8],
    expected: Checksum128,
}

impl<'a> UnverifiedBlock<'a> {
    /// Puts bytes and the checksum they should have together.
    #[must_use]
    pub const fn new(block: BlockIndex, bytes: &'a [u8], expected: Checksum128) -> Self {
        Self {
            block,
            bytes,
            expected,
        }
    }

    /// Checks the bytes.
    ///
    /// # Errors
    /// Where the bytes are not those of the checksum.
    pub fn verify(self) -> Result<VerifiedBlock<'a>, CorruptBlock> {
        let found = block_checksum(self.bytes);
        if found == self.expected {
            Ok(VerifiedBlock {
                block: self.block,
                bytes: self.bytes,
                checksum: found,
            })
        } else {
            Err(CorruptBlock {
                block: self.block,
                expected: self.expected,
                found,
            })
        }
    }
}

/// A block whose bytes have been checked against its checksum.
#[derive(Debug, Clone, Copy)]
pub struct VerifiedBlock<'a> {
    block: BlockIndex,
    bytes: &'a [u8],
    checksum: Checksum128,
}

impl<'a> VerifiedBlock<'a> {
    /// For bytes that this crate has just checked.
    pub(crate) const fn checked(block: BlockIndex, bytes: &'a [u8], checksum: Checksum128) -> Self {
        Self {
            block,
            bytes,
            checksum,
        }
    }

    /// Which block.
    #[must_use]
    pub const fn block(&self) -> BlockIndex {
        self.block
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its checksum.
    #[must_use]
    pub const fn checksum(&self) -> Checksum128 {
        self.checksum
    }
}
