//! The encoded form of a set:
//!
//! | bytes | field |
//! |---|---|
//! | 40 | envelope (`wire`), magic `TMBLKSET`, version 1 |
//! | 8 | number of records |
//! | 8 + 8 | per record: first chunk, number of chunks with the highest bit set where they are full |
//! | 512 | behind a record of one chunk that isn't full: its bits, lowest block first |
//!
//! Records ascend, and no two that touch are both full.

use super::{
    BlockSet,
    chunk::{CHUNK_BLOCKS, Chunk},
};
use crate::{
    extent::Extent,
    wire::{self, Reader, WireError},
};

pub(super) const MAGIC: [u8; 8] = *b"TMBLKSET";
pub(super) const VERSION: u16 = 1;
pub(super) const FULL: u64 = 1 << 63;
/// Past the last chunk that a volume of the greatest length and the least block size has.
const CHUNK_END: u64 = 1 << 36;

impl BlockSet {
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
