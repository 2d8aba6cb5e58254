//! Makes of a state that 0.1.0 wrote one of today's (`docs/FORMAT-CAPTURE.md`).
//!
//! File by file, each of which tells by itself what it is; the identity is written last, by the opening. Whatever ends
//! this early is followed by an opening that does the rest. What is damaged is left as it is: the opening finds it.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
    sync::atomic::Ordering::SeqCst,
};

use capture_core::engine::{
    capture::{
        CHANGES_WORD, ENTRIES_WORD, EPOCH_SEAL_WORD, EPOCH_WORD, MARK_SYNC_FAILED, MARKS_WORD,
        RING_WORD, TRACKING_WORDS, checked_word, epoch_seal,
    },
    damage::{Fault, StateFile},
    dirty::DirtyLayout,
    examine::epoch_of,
    intent::{PAGE_LEN, PAGE_REGIONS, PAGE_WORDS},
    media::{Map, Record},
    records::{
        FileIdentity, Identity, Place, SnapshotTable, encode_carry, encode_interval,
        encode_map_header, old,
    },
    recover::EPOCHS_RESERVED,
    ring::Ring,
    spool::{ENTRY_WORDS, SpoolLimits},
};
use tidemark_block::{BlockSet, Geometry, VolumeId};
use tidemark_disk::durable;

use super::{
    files::{changes, create_intent, found, path_of, regions, size_of},
    mapped::{HEADER_LEN, MappedWords, Size},
};

/// Converts the state in a directory.
pub(super) fn upgrade(
    dir: &Path,
    id: VolumeId,
    geometry: Geometry,
    limits: SpoolLimits,
) -> io::Result<()> {
    let all = geometry.all();
    record(dir, Record::Carry, |found| {
        let carry = found.map_or(Some(BlockSet::new()), |bytes| {
            old::decode_carry(bytes, all).ok()
        })?;
        Some(encode_carry(id, &carry))
    })?;
    record(dir, Record::Interval, |found| {
        let Some(bytes) = found else {
            return Some(encode_interval(id, None));
        };
        let (cut, changed) = old::decode_cut(bytes, all).ok()?;
        Some(encode_interval(id, Some((cut, &changed))))
    })?;
    let changes = changes(dir)?;
    record(dir, Record::Snapshots, |found| {
        let Some(bytes) = found else {
            return Some(SnapshotTable::default().encode(id));
        };
        let mut table = old::decode_snapshots(bytes).ok()?;
        for snapshot in &mut table.snapshots {
            let newest = changes.iter().filter(|cut| **cut <= snapshot.cut).max();
            snapshot.changes = newest.copied().unwrap_or(0);
        }
        Some(table.encode(id))
    })?;
    for parity in [0, 1] {
        dirty(dir, id, geometry, limits, Map::Dirty(parity))?;
    }
    intent(dir, id, geometry)?;
    tracking(dir, id, geometry, limits)
}

/// An identity in place of one that is lost, of whatever release, for a volume of which nothing else is believed. None
/// where the epochs can't be told either.
pub(super) fn made_up(
    dir: &Path,
    volume: VolumeId,
    geometry: Geometry,
) -> io::Result<Option<Identity>> {
    let size = Size::Fixed(TRACKING_WORDS as u64);
    let open = |header: &[u8]| MappedWords::open(&path_of(dir, Map::Tracking), header, size);
    // A conversion ends with this file's header: where it is today's, so is the rest.
    let (epoch, old) = match open(&encode_map_header(Map::Tracking, volume, geometry))? {
        Ok(tracking) => (epoch_of(tracking.words()), false),
        Err(_) => {
            let tracking = open(&old::encode_map_header(Map::Tracking, volume, geometry))?.ok();
            let epoch = tracking.map(|tracking| tracking.words()[EPOCH_WORD].load(SeqCst));
            (epoch, true)
        }
    };
    // After a loss of power it may be that of an opening before the last one, each of which goes on past all that the
    // one before had reserved.
    Ok(epoch.map(|epoch| Identity {
        volume,
        geometry,
        clean: false,
        failed: false,
        old,
        seals: None,
        epoch_limit: epoch.saturating_add(4 * EPOCHS_RESERVED),
        file: FileIdentity::default(),
        state: Place::default(),
    }))
}

/// Replaces a record, unless `convert` makes nothing of what is there.
fn record(
    dir: &Path,
    record: Record,
    convert: impl FnOnce(Option<&[u8]>) -> Option<Vec<u8>>,
) -> io::Result<()> {
    let path = path_of(dir, record);
    let found = match found(fs::read(&path))? {
        Ok(bytes) => Some(bytes),
        Err(Fault::Missing) => None,
        Err(_) => return Ok(()),
    };
    convert(found.as_deref()).map_or(Ok(()), |content| durable::write_file(&path, &content))
}

/// Writes the map again with each bit twice, beside the one that is there, and puts it in its place.
fn dirty(
    dir: &Path,
    id: VolumeId,
    geometry: Geometry,
    limits: SpoolLimits,
    map: Map,
) -> io::Result<()> {
    let path = path_of(dir, map);
    let size = Size::Fixed(old::dirty_words(geometry.block_count().get()));
    let header = old::encode_map_header(map, id, geometry);
    let Ok(found) = MappedWords::open(&path, &header, size)? else {
        return Ok(());
    };
    let blocks = old::dirty_blocks(found.words(), geometry.all());
    let aside = path.with_added_extension("tmp");
    let header = encode_map_header(map, id, geometry);
    let made = MappedWords::create(&aside, &header, size_of(map, geometry, limits))?;
    let words = DirtyLayout::new(geometry.block_count().get()).map(made.words());
    blocks.extents().for_each(|extent| _ = words.insert(extent));
    made.sync()?;
    durable::rename(&aside, &path)
}

/// Writes the same regions into pages whose sectors are sealed.
fn intent(dir: &Path, id: VolumeId, geometry: Geometry) -> io::Result<()> {
    let path = path_of(dir, StateFile::Intent);
    let pages = regions(geometry).div_ceil(old::PAGE_REGIONS);
    let Ok(mut file) = found(File::open(&path))? else {
        return Ok(());
    };
    let mut bytes = Vec::new();
    let limit = pages * 2 * PAGE_LEN as u64 + 1;
    if found(file.by_ref().take(limit).read_to_end(&mut bytes))?.is_err() {
        return Ok(());
    }
    if bytes.len() as u64 != pages * 2 * PAGE_LEN as u64 {
        return Ok(());
    }
    let mut set = Vec::new();
    let mut found = false;
    for (number, pair) in (0..).zip(bytes.chunks_exact(2 * PAGE_LEN)) {
        let places = pair.chunks_exact(PAGE_LEN);
        let newest = places
            .filter_map(|page| old::decode_page(id, number, page))
            .max_by_key(|(sequence, _)| *sequence);
        found |= newest.is_some();
        // Of a page that can't be told every region is set.
        let bits = newest.map_or_else(
            || vec![true; usize::try_from(old::PAGE_REGIONS).unwrap_or(0)],
            |(_, bits)| bits,
        );
        set.extend(bits);
    }
    if !found {
        // Today's, or damaged as a whole.
        return Ok(());
    }
    let is_set = |region: u64| {
        let found = usize::try_from(region).ok().and_then(|n| set.get(n));
        region < regions(geometry) && found.is_some_and(|set| *set)
    };
    let aside = path.with_added_extension("tmp");
    create_intent(&aside, id, geometry, |number| {
        let mut words = [0; PAGE_WORDS];
        for (word, first) in words.iter_mut().zip((number * PAGE_REGIONS..).step_by(64)) {
            *word = (0..64).fold(0, |bits, n| bits | u64::from(is_set(first + n)) << n);
        }
        words
    })?;
    durable::rename(&aside, &path)
}

/// Enters what 0.1.0 left out, and then says so in the header. The file stays the one it is: by its inode a copy of the
/// state is known.
fn tracking(dir: &Path, id: VolumeId, geometry: Geometry, limits: SpoolLimits) -> io::Result<()> {
    let map = Map::Tracking;
    let (path, size) = (path_of(dir, map), size_of(map, geometry, limits));
    let header = old::encode_map_header(map, id, geometry);
    let Ok(found) = MappedWords::open(&path, &header, size)? else {
        return Ok(());
    };
    let words = found.words();
    let epoch = words[EPOCH_WORD].load(SeqCst);
    // Of a file made anew every word stays 0.
    if epoch != 0 {
        words[EPOCH_SEAL_WORD].store(epoch_seal(epoch), SeqCst);
        if let Ok(slots) = fs::metadata(path_of(dir, Map::Slots)) {
            let entries = slots.len().saturating_sub(HEADER_LEN) / (8 * ENTRY_WORDS as u64);
            words[ENTRIES_WORD].store(checked_word(entries), SeqCst);
        }
        if let Some(newest) = changes(dir)?.iter().max() {
            words[CHANGES_WORD].store(checked_word(*newest), SeqCst);
        }
        Ring::seal_all(&words[RING_WORD..]);
    }
    if words[MARKS_WORD].load(SeqCst) == old::MARK_SYNC_FAILED {
        words[MARKS_WORD].store(MARK_SYNC_FAILED, SeqCst);
    }
    found.sync()?;
    found.set_header(&encode_map_header(map, id, geometry))
}
