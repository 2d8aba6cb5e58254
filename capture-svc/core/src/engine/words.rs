//! Checksums in mapped memory, which is read and written in words.

use tidemark_block::Checksum128;

/// The lower and the upper half of a checksum.
#[allow(clippy::cast_possible_truncation, reason = "the two halves")]
pub(super) fn halves(checksum: Checksum128) -> [u64; 2] {
    let value = u128::from_le_bytes(*checksum.as_bytes());
    [value as u64, (value >> 64) as u64]
}

/// The checksum that has these halves.
pub(super) fn joined([low, high]: [u64; 2]) -> Checksum128 {
    Checksum128::from_bytes((u128::from(low) | u128::from(high) << 64).to_le_bytes())
}
