//! What 0.1.0 wrote, for the opening that converts it (`docs/FORMAT-CAPTURE.md`, version 1).

use tidemark_block::{
    BlockSet, Extent, Geometry, VolumeId,
    wire::{Reader, unseal},
    xxh3_128,
};

use super::{
    super::{
        intent::{MAGIC, PAGE_LEN},
        media::Map,
    },
    CARRY_MAGIC, CUT_MAGIC, RecordError, SNAPSHOTS_MAGIC, SnapshotTable, map_header,
};
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

const VERSION: u16 = 1;
/// The mark of a failed sync in `tracking`.
pub const MARK_SYNC_FAILED: u64 = 1;
/// Regions of a page of the intent map.
pub const PAGE_REGIONS: u64 = ((PAGE_LEN - PAGE_HEADER_LEN) * 8) as u64;
const PAGE_HEADER_LEN: usize = 64;

/// The header of a mapped file.
#[must_use]
pub fn encode_map_header(map: Map, volume: VolumeId, geometry: Geometry) -> Vec<u8> {
    map_header(map, VERSION, volume, geometry)
}

/// The carry, without a volume.
///
/// # Errors
/// Where the bytes are no carry of version 1.
pub fn decode_carry(bytes: &[u8], all: Extent) -> Result<BlockSet, RecordError> {
    let (_, payload) = unseal(CARRY_MAGIC, VERSION, bytes)?;
    Ok(BlockSet::decode(payload, all)?)
}

/// A cut and its blocks, without a volume: the open interval or a record of changes.
///
/// # Errors
/// Where the bytes are no cut of version 1.
pub fn decode_cut(bytes: &[u8], all: Extent) -> Result<(u64, BlockSet), RecordError> {
    let (_, payload) = unseal(CUT_MAGIC, VERSION, bytes)?;
    let mut reader = Reader::new(payload);
    let cut = reader.u64()?;
    Ok((cut, BlockSet::decode(reader.rest(), all)?))
}

/// The snapshots, without a volume and without their newest records of changes.
///
/// # Errors
/// Where the bytes are no table of version 1.
pub fn decode_snapshots(bytes: &[u8]) -> Result<SnapshotTable, RecordError> {
    let (_, payload) = unseal(SNAPSHOTS_MAGIC, VERSION, bytes)?;
    SnapshotTable::read(Reader::new(payload), VERSION)
}

/// Words of a dirty map: three levels with a bit each, 64 to a word.
#[must_use]
pub const fn dirty_words(block_count: u64) -> u64 {
    let blocks = block_count.div_ceil(64);
    let words = blocks.div_ceil(64);
    blocks + words + words.div_ceil(64)
}

/// The blocks of a dirty map of [`dirty_words`]. What the levels above say is not needed.
#[must_use]
pub fn dirty_blocks(words: &[AtomicU64], all: Extent) -> BlockSet {
    let blocks = all.count().get().div_ceil(64);
    let above = words
        .len()
        .saturating_sub(usize::try_from(blocks).unwrap_or(usize::MAX));
    let mut set = BlockSet::new();
    for (word, n) in words[above..].iter().zip(0..blocks) {
        set.insert_word(n, word.load(SeqCst));
    }
    set.intersect_extent(all)
}

/// A page of the intent map in one of its places: its sequence, and whether each region is set; nothing where it isn't
/// a whole page of this volume and number.
#[must_use]
pub fn decode_page(volume: VolumeId, number: u64, page: &[u8]) -> Option<(u64, Vec<bool>)> {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&page[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let valid = page.len() == PAGE_LEN
        && page[..8] == MAGIC
        && page[8..10] == VERSION.to_le_bytes()
        && page[12..14] == [0; 2]
        && word(16) == number
        && page[48..64] == *volume.as_bytes()
        && page[32..48] == *xxh3_128(&[&page[..32], &page[48..]].concat()).as_bytes();
    valid.then(|| {
        let bits = page[PAGE_HEADER_LEN..].iter();
        let set = bits.flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
        (word(24), set.collect())
    })
}
