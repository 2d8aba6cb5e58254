//! The records of a volume's state at the capture side, and pages of its intent map.

use capture_core::engine::{
    intent::{HEADER_LEN, IntentMap, PAGE_LEN, decode_page, encode_page},
    records::{
        CARRY_MAGIC, CUT_MAGIC, IDENTITY_MAGIC, Identity, SNAPSHOTS_MAGIC, SnapshotTable,
        decode_carry, decode_cut, encode_carry, encode_cut,
    },
    trust::{judge, replaced},
};
use tidemark_block::{BlockSize, Geometry, VolumeId, wire, xxh3_128};

use crate::{
    bounded::bounded,
    input::Input,
    wire::{raw_or_sealed, room},
};

const SET_MAGIC: [u8; 8] = *b"TMBLKSET";

fn geometry() -> Geometry {
    Geometry::new(64 * 4096, BlockSize::MIN).expect("blocks of 4 KiB")
}

fn identity(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, IDENTITY_MAGIC);
    if let Ok(identity) = bounded(room(&bytes), || Identity::decode(&bytes)) {
        assert!(!sealed || identity.encode() == bytes);
        assert_eq!(replaced(&identity.file, &identity.file), None);
        let _judged = judge(&identity, &identity.file, &identity.state);
    }
}

/// A carry, or a cut, whose set is sealed too.
fn sets(mut input: Input<'_>, magic: [u8; 8]) {
    let head = if magic == CUT_MAGIC { 8 } else { 0 };
    let nested = input.flag();
    let (_, bytes) = if nested {
        let mut payload = input.bytes(head).to_vec();
        payload.extend(wire::seal(SET_MAGIC, 1, input.rest()));
        (true, wire::seal(magic, 1, &payload))
    } else {
        raw_or_sealed(&mut input, magic)
    };
    let all = geometry().all();
    if magic == CARRY_MAGIC {
        if let Ok(set) = bounded(room(&bytes), || decode_carry(&bytes, all)) {
            assert_eq!(set.intersect_extent(all), set);
            assert_eq!(decode_carry(&encode_carry(&set), all), Ok(set));
        }
    } else if let Ok((cut, set)) = bounded(room(&bytes), || decode_cut(&bytes, all)) {
        assert_eq!(set.intersect_extent(all), set);
        assert_eq!(decode_cut(&encode_cut(cut, &set), all), Ok((cut, set)));
    }
}

fn snapshots(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, SNAPSHOTS_MAGIC);
    if let Ok(table) = bounded(room(&bytes), || SnapshotTable::decode(&bytes)) {
        assert!(!sealed || table.encode() == bytes);
    }
}

/// Two places of a page: whatever lies there, a region that the newer whole page has set is not lost.
fn intent(mut input: Input<'_>) {
    const REGIONS: u64 = 1000;
    let volume = VolumeId::from_bytes([0; 16]);
    let places = [(); 2].map(|()| {
        let resealed = input.flag();
        let mut page = vec![0; PAGE_LEN];
        let taken = input.bytes(HEADER_LEN + 32);
        page[..taken.len()].copy_from_slice(taken);
        if resealed {
            page[..8].copy_from_slice(b"TMINTENT");
            page[8..16].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
            page[16..24].fill(0);
            page[48..64].fill(0);
            let covered = [&page[..32], &page[48..]].concat();
            page[32..48].copy_from_slice(xxh3_128(&covered).as_bytes());
        }
        page
    });
    let mut newest: Option<(u64, Box<[u64; 504]>)> = None;
    for page in &places {
        if let Some((sequence, bits)) = decode_page(volume, 0, page) {
            let again = encode_page(volume, 0, sequence, &bits);
            assert_eq!(
                decode_page(volume, 0, &again[..]),
                Some((sequence, bits.clone()))
            );
            if newest
                .as_ref()
                .is_none_or(|(newest, _)| *newest <= sequence)
            {
                newest = Some((sequence, bits));
            }
        }
    }
    let epoch = u64::from(input.u32());
    let map = IntentMap::restore(volume, REGIONS, epoch, std::slice::from_ref(&places));
    let set = map.set_regions();
    assert!(set.iter().all(|region| *region < REGIONS));
    match newest {
        None => assert_eq!(
            set.len() as u64,
            REGIONS,
            "without a page every region is in doubt"
        ),
        Some((_, bits)) => {
            for region in (0..REGIONS)
                .filter(|n| bits[usize::try_from(n / 64).expect("small")] >> (n % 64) & 1 == 1)
            {
                assert!(set.contains(&region), "region {region} is set");
            }
        }
    }
}

/// Records and pages.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 5 {
        0 => identity(input),
        1 => sets(input, CARRY_MAGIC),
        2 => sets(input, CUT_MAGIC),
        3 => snapshots(input),
        _ => intent(input),
    }
}
