//! XXH3-128 checksums of blocks and of structures.
//!
//! XXH3 (<https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>) guards against accident, not malice. A
//! block of zeroes has checksum 0, so that a hole costs nothing: neither to store, nor to send, nor to compute.

use std::fmt;

use xxhash_rust::xxh3::xxh3_128 as hash;

/// A 128-bit checksum, stored as the little-endian bytes of the XXH3 value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Checksum128([u8; 16]);

impl Checksum128 {
    /// The checksum of zeroes, and of nothing else.
    pub const ZERO: Self = Self([0; 16]);
    /// Bytes of a stored checksum.
    pub const LEN: usize = 16;

    /// Wraps stored bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes to store.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Whether it is that of zeroes.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }
}

impl fmt::Display for Checksum128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Checksum128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum128({self})")
    }
}

/// The checksum of a block: [`Checksum128::ZERO`] if and only if every byte is zero.
#[must_use]
pub fn block_checksum(block: &[u8]) -> Checksum128 {
    if is_zero(block) {
        return Checksum128::ZERO;
    }
    match xxh3_128(block) {
        // One content in 2^128 would read as a hole otherwise.
        Checksum128::ZERO => Checksum128(1u128.to_le_bytes()),
        checksum => checksum,
    }
}

/// The plain XXH3-128 of a structure's bytes.
#[must_use]
pub fn xxh3_128(bytes: &[u8]) -> Checksum128 {
    Checksum128(hash(bytes).to_le_bytes())
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most blocks with content show it in their first bytes.
    let (head, tail) = bytes.split_at(bytes.len().min(64));
    head.iter().all(|&byte| byte == 0)
        && tail
            .chunks(256)
            .all(|chunk| chunk.iter().fold(0, |any, &byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zeroes_have_checksum_zero() {
        let mut block = vec![0; 4096];
        assert_eq!(block_checksum(&block), Checksum128::ZERO);
        for place in [0, 63, 64, 319, 320, 4095] {
            block[place] = 1;
            assert!(!is_zero(&block), "{place}");
            assert_ne!(block_checksum(&block), Checksum128::ZERO);
            block[place] = 0;
        }
        assert!(is_zero(&[]));
    }

    #[test]
    fn a_checksum_is_that_of_the_xxh3_specification() {
        // XXH3_128bits("", seed 0) = 0x99aa06d3014798d86001c324468d497f, stored with its low byte first.
        assert_eq!(
            xxh3_128(b"").to_string(),
            "7f498d4624c30160d8984701d306aa99"
        );
    }
}
