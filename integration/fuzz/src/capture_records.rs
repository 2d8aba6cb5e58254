//! The records of a volume's state at the capture side, and pages of its intent map.

use capture_core::{
    engine::{
        intent::{
            HEADER_LEN, IntentFault, IntentMap, PAGE_LEN, PAGE_WORDS, SECTOR_LEN, decode_page,
            encode_page,
        },
        records::{
            CARRY_MAGIC, CHANGES_MAGIC, CUT_MAGIC, Changes, IDENTITY_MAGIC, Identity,
            SNAPSHOTS_MAGIC, SnapshotTable, decode_carry, decode_interval, encode_carry,
            encode_interval, old,
        },
        trust::{judge, replaced},
    },
    reflink::state::{REFLINK_MAGIC, State},
    rollback::{self, Plan},
    scan::{
        kept::{Head, chunk_extent},
        state::{SCAN_MAGIC, State as ScanState},
    },
};
use tidemark_block::{BlockSize, Geometry, VolumeId, wire, xxh3_128};

use crate::{
    bounded::bounded,
    input::Input,
    wire::{raw_or_sealed, room},
};

const SET_MAGIC: [u8; 8] = *b"TMBLKSET";

const VOLUME: VolumeId = VolumeId::from_bytes([0; 16]);

fn geometry() -> Geometry {
    Geometry::new(64 * 4096, BlockSize::MIN).expect("blocks of 4 KiB")
}

fn identity(mut input: Input<'_>) {
    let (sealed, bytes) = sealed(&mut input, IDENTITY_MAGIC, 0);
    if let Ok(identity) = bounded(room(&bytes), || Identity::decode(&bytes)) {
        assert!(!sealed || identity.old || identity.encode() == bytes);
        assert_eq!(replaced(&identity.file, &identity.file), None);
        let _judged = judge(&identity, &identity.file, &identity.state);
    }
}

/// The same payload with each version up to the newest, where it is in an envelope.
fn versions(sealed: bool, bytes: &[u8], magic: [u8; 8], newest: u16) -> Vec<Vec<u8>> {
    let mut all = vec![bytes.to_vec()];
    if sealed {
        let payload = &bytes[wire::ENVELOPE_LEN..];
        all.extend((1..=newest).map(|version| wire::seal(magic, version, payload)));
    }
    all
}

/// The record of a volume's clones.
fn clones(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, REFLINK_MAGIC);
    for bytes in versions(sealed, &bytes, REFLINK_MAGIC, 2) {
        let Ok(state) = bounded(room(&bytes), || State::decode(&bytes)) else {
            continue;
        };
        assert!(state.clones().all(|clone| state.names(clone.cut)));
        let mut left = state.clone();
        let lost = left.missing(|_| false);
        assert_eq!(lost.len(), state.clones().count());
        assert_eq!(left.clones().count(), 0);
        assert_eq!(State::decode(&state.encode()), Ok(state));
    }
}

/// The record of a volume that is scanned.
fn scans(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, SCAN_MAGIC);
    if let Ok(mut state) = bounded(room(&bytes), || ScanState::decode(&bytes)) {
        assert!(!sealed || state.encode() == bytes);
        if let Some(interval) = state.interval {
            assert!(state.commit(interval.cut));
            assert_eq!(state.proof, interval.proof);
        }
    }
}

/// The head of what is put aside of a chunk, as it is or with the right checksum behind it.
fn kept(mut input: Input<'_>) {
    let seal = input.flag();
    let mut bytes = input.rest().to_vec();
    if seal {
        let sum = xxh3_128(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
    }
    if let Ok(head) = Head::decode(&bytes, geometry()) {
        assert!(bytes.starts_with(&head.encode()));
        let mut changed = tidemark_block::BlockSet::new();
        head.add_changed_to(geometry(), &mut changed);
        assert_eq!(changed.len().get(), head.changed.count() as u64);
        assert_eq!(
            changed,
            changed.intersect_extent(chunk_extent(geometry(), head.chunk))
        );
        let places = head.data.ones().filter_map(|at| head.find(geometry(), at));
        assert!(places.map(|(offset, _)| offset).is_sorted());
    }
}

/// Bytes as they are, or a payload of these versions' in its envelope, behind the volume's id and a head of fields.
fn sealed(input: &mut Input<'_>, magic: [u8; 8], head: usize) -> (bool, Vec<u8>) {
    if input.flag() {
        return raw_or_sealed(input, magic);
    }
    let version = 1 + u16::from(input.u8() % 2);
    let mut payload = Vec::new();
    if magic != IDENTITY_MAGIC {
        payload.extend(VOLUME.as_bytes());
    }
    payload.extend(input.bytes(head));
    if input.flag() {
        payload.extend(wire::seal(SET_MAGIC, 1, input.rest()));
    } else {
        payload.extend(input.rest());
    }
    (true, wire::seal(magic, version, &payload))
}

fn carry(mut input: Input<'_>) {
    let (_, bytes) = sealed(&mut input, CARRY_MAGIC, 0);
    let all = geometry().all();
    if let Ok(set) = bounded(room(&bytes), || decode_carry(&bytes, VOLUME, all)) {
        assert_eq!(set.intersect_extent(all), set);
        assert_eq!(
            decode_carry(&encode_carry(VOLUME, &set), VOLUME, all),
            Ok(set)
        );
    }
    let _old = bounded(room(&bytes), || old::decode_carry(&bytes, all));
}

fn interval(mut input: Input<'_>) {
    let (_, bytes) = sealed(&mut input, CUT_MAGIC, 8);
    let all = geometry().all();
    if let Ok(found) = bounded(room(&bytes), || decode_interval(&bytes, VOLUME, all)) {
        let open = found.as_ref().map(|(cut, set)| (*cut, set));
        let again = encode_interval(VOLUME, open);
        assert_eq!(decode_interval(&again, VOLUME, all), Ok(found));
    }
    if let Ok((_, set)) = bounded(room(&bytes), || old::decode_cut(&bytes, all)) {
        assert_eq!(set.intersect_extent(all), set);
    }
}

fn changes(mut input: Input<'_>) {
    let cut = u64::from(input.u8());
    let (_, bytes) = sealed(&mut input, CHANGES_MAGIC, 16);
    let all = geometry().all();
    if let Ok(found) = bounded(room(&bytes), || Changes::decode(&bytes, VOLUME, cut, all)) {
        assert!(found.since < cut);
        assert_eq!(
            Changes::decode(&found.encode(VOLUME), VOLUME, cut, all),
            Ok(found)
        );
    }
}

fn snapshots(mut input: Input<'_>) {
    let (sealed, bytes) = sealed(&mut input, SNAPSHOTS_MAGIC, 16);
    for bytes in versions(sealed, &bytes, SNAPSHOTS_MAGIC, 3) {
        if let Ok(table) = bounded(room(&bytes), || SnapshotTable::decode(&bytes, VOLUME)) {
            let again = SnapshotTable::decode(&table.encode(VOLUME), VOLUME);
            assert_eq!(again, Ok(table));
        }
        let _old = bounded(room(&bytes), || old::decode_snapshots(&bytes));
    }
}

/// Two places of a page: whatever lies there, a region that a whole page has set which the other one doesn't follow is
/// not lost.
fn intent(mut input: Input<'_>) {
    const REGIONS: u64 = 1000;
    let places = [(); 2].map(|()| place(&mut input));
    let whole: Vec<(u64, Box<[u64; PAGE_WORDS]>)> = places
        .iter()
        .filter_map(|page| decode_page(VOLUME, 0, page))
        .collect();
    for (sequence, bits) in &whole {
        let again = encode_page(VOLUME, 0, *sequence, bits);
        let found = decode_page(VOLUME, 0, &again[..]);
        assert_eq!(found, Some((*sequence, bits.clone())));
    }
    let epoch = u64::from(input.u32());
    let map = IntentMap::restore(VOLUME, REGIONS, epoch, std::slice::from_ref(&places));
    let set = map.set_regions();
    assert!(set.iter().all(|region| *region < REGIONS));
    let newest = whole.into_iter().max_by_key(|(sequence, _)| *sequence);
    match (newest, map.faults()) {
        (None, faults) => assert_eq!(faults, [IntentFault::Lost(0)]),
        (Some((_, bits)), _) => {
            let is_set =
                |n: &u64| bits[usize::try_from(n / 64).expect("small")] >> (n % 64) & 1 == 1;
            for region in (0..REGIONS).filter(is_set) {
                assert!(set.contains(&region), "region {region} is set");
            }
        }
    }
    if map.faults().contains(&IntentFault::Lost(0)) {
        assert_eq!(set.len() as u64, REGIONS, "every region is in doubt");
    }
    let _old = places.map(|page| old::decode_page(VOLUME, 0, &page));
}

/// A place of a page: any bytes, some of its sectors sealed again.
fn place(input: &mut Input<'_>) -> Vec<u8> {
    let mut page = vec![0; PAGE_LEN];
    let resealed = input.u8();
    let sequence = u64::from(input.u8());
    let taken = input.bytes(HEADER_LEN + 32);
    page[..taken.len()].copy_from_slice(taken);
    for (sector, n) in page.chunks_exact_mut(SECTOR_LEN).zip(0_u16..) {
        // Mostly of one sequence.
        let sequence = sequence + 2 * u64::from(input.u8() / 250);
        if resealed == 0 || resealed >> n & 1 == 1 {
            sector[..8].copy_from_slice(b"TMINTENT");
            sector[8..14].copy_from_slice(&[2, 0, 0, 0, 0, 0]);
            sector[14..16].copy_from_slice(&n.to_le_bytes());
            sector[16..24].fill(0);
            sector[24..32].copy_from_slice(&sequence.to_le_bytes());
            sector[48..64].fill(0);
            let covered = [&sector[..32], &sector[48..]].concat();
            sector[32..48].copy_from_slice(xxh3_128(&covered).as_bytes());
        }
    }
    page
}

fn rollback(mut input: Input<'_>) {
    let (_, bytes) = raw_or_sealed(&mut input, rollback::MAGIC);
    if let Ok(plan) = bounded(room(&bytes), || Plan::decode(&bytes)) {
        assert_eq!(plan.encode().len(), rollback::HEAD_LEN);
        assert_eq!(Plan::decode(&plan.encode()), Ok(plan));
    }
}

/// Records and pages.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8();
    match kind {
        255 => return rollback(input),
        252 => return kept(input),
        253 => return scans(input),
        254 => return clones(input),
        _ => {}
    }
    match kind % 6 {
        0 => identity(input),
        1 => carry(input),
        2 => interval(input),
        3 => snapshots(input),
        4 => changes(input),
        _ => intent(input),
    }
}
