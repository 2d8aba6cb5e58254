//! The envelope of every durable structure, and bounded reading of little-endian fields.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 2 | version |
//! | 10 | 2 | compatible features: unknown bits may be ignored |
//! | 12 | 2 | incompatible features: unknown bits forbid reading |
//! | 14 | 2 | 0 |
//! | 16 | 8 | length of the payload |
//! | 24 | 16 | XXH3-128 of bytes 0 to 23 and the payload |
//! | 40 | n | payload |

use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

use crate::checksum::Checksum128;

/// Bytes before the payload.
pub const ENVELOPE_LEN: usize = 40;
const CHECKSUM_AT: usize = 24;

/// Why bytes are not the structure they should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// The bytes end before the structure does.
    #[error("{wanted} bytes are needed, {left} are left")]
    Short {
        /// Bytes that the next field takes.
        wanted: usize,
        /// Bytes that there are.
        left: usize,
    },
    /// More bytes than the structure has.
    #[error("{0} bytes too many")]
    Trailing(usize),
    /// Another structure, or none.
    #[error("wrong magic {found:02x?}, {expected:02x?} was expected")]
    Magic {
        /// What stands there.
        found: [u8; 8],
        /// What should stand there.
        expected: [u8; 8],
    },
    /// Written by a later release.
    #[error("version {found} is newer than {known}, the newest this release reads")]
    Version {
        /// What stands there.
        found: u16,
        /// The newest known one.
        known: u16,
    },
    /// Written with features that this release doesn't know.
    #[error("unknown incompatible features {0:#06x}")]
    Features(u16),
    /// The bytes are not those that were written.
    #[error("checksum {found} does not match the stored {stored}")]
    Checksum {
        /// Of the bytes that are there.
        found: Checksum128,
        /// Of the bytes that were written.
        stored: Checksum128,
    },
    /// A field holds what its writer never puts there.
    #[error("{0} is out of range")]
    Range(&'static str),
}

/// Puts a payload into its envelope.
#[must_use]
pub fn seal(magic: [u8; 8], version: u16, payload: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(ENVELOPE_LEN + payload.len());
    sealed.extend_from_slice(&magic);
    sealed.extend_from_slice(&version.to_le_bytes());
    sealed.extend_from_slice(&[0; 6]);
    sealed.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    let checksum = checksum_of(&sealed, payload);
    sealed.extend_from_slice(checksum.as_bytes());
    sealed.extend_from_slice(payload);
    sealed
}

/// Takes a payload out of its envelope, which must fill `bytes`; also gives the version it was written with.
///
/// # Errors
/// Where the bytes are cut short, damaged, another structure's, or of a version newer than `known`.
pub fn unseal(magic: [u8; 8], known: u16, bytes: &[u8]) -> Result<(u16, &[u8]), WireError> {
    let mut reader = Reader::new(bytes);
    let found = reader.array()?;
    if found != magic {
        return Err(WireError::Magic {
            found,
            expected: magic,
        });
    }
    let version = reader.u16()?;
    let _compatible = reader.u16()?;
    let incompatible = reader.u16()?;
    let reserved = reader.u16()?;
    let length = reader.u64()?;
    let stored = Checksum128::from_bytes(reader.array()?);
    let payload = reader.rest();
    let wanted = usize::try_from(length).map_err(|_| WireError::Range("payload length"))?;
    if payload.len() < wanted {
        return Err(WireError::Short {
            wanted,
            left: payload.len(),
        });
    }
    if payload.len() > wanted {
        return Err(WireError::Trailing(payload.len() - wanted));
    }
    let found = checksum_of(&bytes[..CHECKSUM_AT], payload);
    if found != stored {
        return Err(WireError::Checksum { found, stored });
    }
    if version == 0 || version > known {
        return Err(WireError::Version {
            found: version,
            known,
        });
    }
    if incompatible != 0 {
        return Err(WireError::Features(incompatible));
    }
    if reserved != 0 {
        return Err(WireError::Range("reserved field"));
    }
    Ok((version, payload))
}

fn checksum_of(head: &[u8], payload: &[u8]) -> Checksum128 {
    let mut hash = Xxh3::new();
    hash.update(head);
    hash.update(payload);
    Checksum128::from_bytes(hash.digest128().to_le_bytes())
}

/// Takes little-endian fields off the front of a slice, never past its end.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the front.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What has not been taken yet.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Takes `count` bytes.
    ///
    /// # Errors
    /// Where fewer are left.
    pub const fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        match self.rest.split_at_checked(count) {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => Err(WireError::Short {
                wanted: count,
                left: self.rest.len(),
            }),
        }
    }

    /// Takes a fixed number of bytes.
    ///
    /// # Errors
    /// Where fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    /// Takes one byte.
    ///
    /// # Errors
    /// Where none is left.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Takes two bytes.
    ///
    /// # Errors
    /// Where fewer are left.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    /// Takes four bytes.
    ///
    /// # Errors
    /// Where fewer are left.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Takes eight bytes.
    ///
    /// # Errors
    /// Where fewer are left.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Ends reading.
    ///
    /// # Errors
    /// Where bytes are left.
    pub const fn end(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(WireError::Trailing(left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: [u8; 8] = *b"TMTEST\0\0";

    #[test]
    fn a_sealed_payload_comes_back() {
        let sealed = seal(MAGIC, 3, b"payload");
        assert_eq!(unseal(MAGIC, 3, &sealed), Ok((3, &b"payload"[..])));
        assert_eq!(
            unseal(MAGIC, 2, &sealed),
            Err(WireError::Version { found: 3, known: 2 })
        );
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let sealed = seal(MAGIC, 1, b"some payload");
        for place in 0..sealed.len() * 8 {
            let mut damaged = sealed.clone();
            damaged[place / 8] ^= 1 << (place % 8);
            assert!(unseal(MAGIC, 1, &damaged).is_err(), "bit {place}");
        }
        for length in 0..sealed.len() {
            assert!(
                unseal(MAGIC, 1, &sealed[..length]).is_err(),
                "length {length}"
            );
        }
        let mut longer = sealed.clone();
        longer.push(0);
        assert_eq!(unseal(MAGIC, 1, &longer), Err(WireError::Trailing(1)));
    }
}
