//! Pages of the intent map, as they lie in its file: two places for each, every sector sealed by itself.
//!
//! | offset | bytes | field of a sector |
//! |---|---|---|
//! | 0 | 8 | magic `TMINTENT` |
//! | 8 | 2 | version |
//! | 10 | 2 | compatible features |
//! | 12 | 2 | incompatible features |
//! | 14 | 2 | number of the sector in its page |
//! | 16 | 8 | number of the page |
//! | 24 | 8 | sequence, from 0 |
//! | 32 | 16 | XXH3-128 of bytes 0 to 31 and 48 to 511 |
//! | 48 | 16 | volume |
//! | 64 | 448 | one bit per region |

use thiserror::Error;
use tidemark_block::{VolumeId, xxh3_128};

/// Bytes of a page.
pub const PAGE_LEN: usize = 4096;
/// Bytes that a disk writes whole or not at all.
pub const SECTOR_LEN: usize = 512;
/// Sectors of a page.
pub const PAGE_SECTORS: usize = PAGE_LEN / SECTOR_LEN;
/// Bytes before the bits of a sector.
pub const HEADER_LEN: usize = 64;
/// Words of bits of a sector.
const SECTOR_WORDS: usize = (SECTOR_LEN - HEADER_LEN) / 8;
/// Words of bits of a page.
pub const PAGE_WORDS: usize = PAGE_SECTORS * SECTOR_WORDS;
/// Regions of a page.
pub const PAGE_REGIONS: u64 = PAGE_WORDS as u64 * 64;
/// Magic of a sector.
pub const MAGIC: [u8; 8] = *b"TMINTENT";
const VERSION: u16 = 2;

/// The bits of a page.
pub(super) type Words = [u64; PAGE_WORDS];

/// A page of the intent map that was damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum IntentFault {
    /// What it said last can't be told: all its regions are set now.
    #[error("page {0} can't be read: all its regions are set")]
    Lost(u64),
    /// Only what it said before the last time.
    #[error("page {0} can't be read in the place that was written before the last one")]
    Stale(u64),
}

/// Encodes a page.
#[must_use]
pub fn encode_page(
    volume: VolumeId,
    number: u64,
    sequence: u64,
    bits: &Words,
) -> Box<[u8; PAGE_LEN]> {
    let mut page = Box::new([0; PAGE_LEN]);
    let sectors = page.chunks_exact_mut(SECTOR_LEN);
    for ((sector, words), n) in sectors.zip(bits.chunks_exact(SECTOR_WORDS)).zip(0_u16..) {
        sector[..8].copy_from_slice(&MAGIC);
        sector[8..10].copy_from_slice(&VERSION.to_le_bytes());
        sector[14..16].copy_from_slice(&n.to_le_bytes());
        sector[16..24].copy_from_slice(&number.to_le_bytes());
        sector[24..32].copy_from_slice(&sequence.to_le_bytes());
        sector[48..64].copy_from_slice(volume.as_bytes());
        for (bytes, word) in sector[HEADER_LEN..].chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let checksum = checksum_of(sector);
        sector[32..48].copy_from_slice(&checksum);
    }
    page
}

/// Decodes a place of a page: its sequence and bits; nothing where it isn't a whole page of this volume and number.
#[must_use]
pub fn decode_page(volume: VolumeId, number: u64, page: &[u8]) -> Option<(u64, Box<Words>)> {
    match Place::of(volume, number, page) {
        Place::Whole(sequence, bits) => Some((sequence, bits)),
        Place::Torn(..) | Place::Damaged(_) => None,
    }
}

fn checksum_of(sector: &[u8]) -> [u8; 16] {
    let mut covered = Vec::with_capacity(SECTOR_LEN - 16);
    covered.extend_from_slice(&sector[..32]);
    covered.extend_from_slice(&sector[48..]);
    *xxh3_128(&covered).as_bytes()
}

fn word_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// The sequence of a sector that is whole.
fn sequence_of(volume: VolumeId, number: u64, n: u16, sector: &[u8]) -> Option<u64> {
    let field = |at: usize| u16::from_le_bytes([sector[at], sector[at + 1]]);
    let valid = sector[..8] == MAGIC
        && field(8) == VERSION
        && field(12) == 0
        && field(14) == n
        && word_at(sector, 16) == number
        && sector[48..64] == *volume.as_bytes()
        && sector[32..48] == checksum_of(sector);
    valid.then(|| word_at(sector, 24))
}

/// What one of the two places of a page holds.
#[derive(Debug)]
pub(super) enum Place {
    Whole(u64, Box<Words>),
    /// Sectors of two writes, of these sequences.
    Torn(u64, u64),
    /// A sector isn't whole; the highest sequence of those that are.
    Damaged(Option<u64>),
}

impl Place {
    pub(super) fn of(volume: VolumeId, number: u64, page: &[u8]) -> Self {
        if page.len() != PAGE_LEN {
            return Self::Damaged(None);
        }
        let found: Vec<Option<u64>> = page
            .chunks_exact(SECTOR_LEN)
            .zip(0..)
            .map(|(sector, n)| sequence_of(volume, number, n, sector))
            .collect();
        let whole = || found.iter().flatten().copied();
        let (oldest, newest) = (whole().min(), whole().max());
        match (oldest, newest) {
            (Some(oldest), Some(newest)) if whole().count() == PAGE_SECTORS => {
                if oldest != newest {
                    let ends = [oldest, newest];
                    return match whole().all(|sequence| ends.contains(&sequence)) {
                        true => Self::Torn(oldest, newest),
                        false => Self::Damaged(Some(newest)),
                    };
                }
                let mut bits = Box::new([0; PAGE_WORDS]);
                let words = page
                    .chunks_exact(SECTOR_LEN)
                    .flat_map(|sector| sector[HEADER_LEN..].chunks_exact(8));
                for (bit, word) in bits.iter_mut().zip(words) {
                    *bit = word_at(word, 0);
                }
                Self::Whole(newest, bits)
            }
            _ => Self::Damaged(newest),
        }
    }

    fn newest(&self) -> u64 {
        match self {
            Self::Whole(sequence, _) | Self::Torn(_, sequence) => *sequence,
            Self::Damaged(newest) => newest.unwrap_or(0),
        }
    }
}

fn follows(sequence: u64, before: u64) -> bool {
    before.checked_add(1) == Some(sequence)
}

/// A page as its two places tell it: the sequence to go on from, its bits unless they are lost, and what is wrong.
pub(super) fn page_of(
    number: u64,
    places: [Place; 2],
) -> (u64, Option<Box<Words>>, Option<IntentFault>) {
    let newest = places[0].newest().max(places[1].newest());
    let (lost, stale) = (IntentFault::Lost(number), IntentFault::Stale(number));
    match places {
        [Place::Whole(one, bits), Place::Whole(other, _)]
        | [Place::Whole(other, _), Place::Whole(one, bits)]
            if follows(one, other) =>
        {
            (one, Some(bits), None)
        }
        // The write that was torn was not durable yet; the next one takes its place.
        [Place::Whole(whole, bits), Place::Torn(before, after)]
        | [Place::Torn(before, after), Place::Whole(whole, bits)]
            if follows(whole, before) && follows(after, whole) =>
        {
            (whole, Some(bits), None)
        }
        [Place::Whole(whole, bits), Place::Damaged(Some(before))]
        | [Place::Damaged(Some(before)), Place::Whole(whole, bits)]
            if follows(whole, before) =>
        {
            (whole, Some(bits), Some(stale))
        }
        _ => (newest, None, Some(lost)),
    }
}

/// Where a page of this sequence lies in the file, in pages.
#[must_use]
pub const fn place_of(number: u64, sequence: u64) -> u64 {
    number * 2 + sequence % 2
}
