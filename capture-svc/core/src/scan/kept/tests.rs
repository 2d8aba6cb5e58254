use proptest::prelude::*;
use tidemark_block::{BlockSize, block_checksum};

use super::*;

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

fn geometry(block_size: u32, blocks: u64) -> Geometry {
    let size = BlockSize::new(block_size).unwrap();
    Geometry::new(u64::from(block_size) * blocks, size).unwrap()
}

fn head(chunk: u64, changed: &[usize], data: &[usize], with_bytes: bool) -> Head {
    let bits = |of: &[usize]| {
        let mut bits = Bits::default();
        of.iter().for_each(|at| bits.set(*at));
        bits
    };
    let sum = |at: &usize| block_checksum(&[u8::try_from(*at % 255).unwrap() + 1; 8]);
    Head {
        chunk,
        changed: bits(changed),
        data: bits(data),
        sums: data.iter().map(sum).collect(),
        with_bytes,
    }
}

#[test]
fn a_head_says_which_blocks_changed_and_where_their_bytes_lie() {
    let geometry = geometry(4096, 300);
    let head = head(0, &[1, 3, 63, 64, 255], &[3, 64, 255], true);
    let bytes = head.encode();
    assert_eq!(bytes.len() as u64, head.len());
    assert_eq!(head.len(), 80 + 4 * 16);
    assert_eq!(head.record_len(geometry), head.len() + 3 * 4096);
    let again = Head::decode(&[&bytes[..], &[9; 50]].concat(), geometry).unwrap();
    assert_eq!(again, head);
    assert_eq!(head.find(geometry, 3), Some((head.len(), head.sums[0])));
    let last = Some((head.len() + 2 * 4096, head.sums[2]));
    assert_eq!(head.find(geometry, 255), last);
    assert_eq!(head.find(geometry, 1), None);
    let mut changed = BlockSet::new();
    head.add_changed_to(geometry, &mut changed);
    assert_eq!(changed.len().get(), 5);
    assert!(changed.contains(BlockIndex::new(63)) && !changed.contains(BlockIndex::new(62)));
    insta::assert_snapshot!(
        bytes[..64]
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect::<String>()
    );
}

#[test]
#[allow(clippy::disallowed_methods, reason = "a test's own files")]
fn the_golden_records_keep_decoding() {
    let geometry = geometry(4096, 300);
    let heads = [
        head(0, &[1, 3, 255], &[3, 255], true),
        head(1, &[7], &[], false),
    ];
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/scan-records-v1");
    if std::env::var("TIDEMARK_BLESS").is_ok() {
        let encoded = heads.iter().map(Head::encode);
        let header = encode_header(VOLUME, geometry, 5);
        let all: Vec<_> = std::iter::once(header).chain(encoded).collect();
        std::fs::write(path, all.concat()).unwrap();
    }
    let golden = std::fs::read(path).unwrap();
    check_header(&golden[..HEADER_LEN], VOLUME, geometry, 5).unwrap();
    let mut rest = &golden[HEADER_LEN..];
    for head in heads {
        assert_eq!(Head::decode(rest, geometry).unwrap(), head);
        assert!(rest.starts_with(&head.encode()));
        rest = &rest[usize::try_from(head.len()).unwrap()..];
    }
    assert!(rest.is_empty());
}

#[test]
fn chunks_cover_a_volume_and_its_last_one_may_be_short() {
    for (geometry, chunks, last) in [
        (geometry(4096, 300), 2, 44),
        (geometry(65536, 16), 1, 16),
        (geometry(65536, 17), 2, 1),
        (geometry(4096, 1), 1, 1),
    ] {
        assert_eq!(chunk_count(geometry), chunks);
        let extent = chunk_extent(geometry, chunks - 1);
        assert_eq!(
            (extent.count().get(), extent.end()),
            (last, geometry.all().end())
        );
    }
}

#[test]
fn what_is_no_record_of_the_volume_is_refused() {
    let geometry = geometry(4096, 300);
    let good = head(1, &[1, 3], &[3], true);
    Head::decode(&good.encode(), geometry).unwrap();
    for wrong in [
        head(2, &[1], &[1], true),
        head(1, &[44], &[], true),
        head(1, &[1], &[2], true),
        Head {
            sums: vec![Checksum128::ZERO],
            ..good.clone()
        },
    ] {
        assert!(
            matches!(
                Head::decode(&wrong.encode(), geometry),
                Err(WireError::Range(_))
            ),
            "{wrong:?}"
        );
    }
    let bytes = good.encode();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 4;
        Head::decode(&damaged, geometry).unwrap_err();
        Head::decode(&bytes[..at], geometry).unwrap_err();
    }
}

#[test]
fn a_header_is_that_of_one_cut_of_one_volume() {
    let ours = geometry(4096, 300);
    let bytes = encode_header(VOLUME, ours, 5);
    assert_eq!(bytes.len(), HEADER_LEN);
    check_header(&bytes, VOLUME, ours, 5).unwrap();
    check_header(&bytes, VOLUME, ours, 6).unwrap_err();
    check_header(&bytes, VOLUME, geometry(4096, 301), 5).unwrap_err();
    check_header(&bytes, VolumeId::from_bytes([8; 16]), ours, 5).unwrap_err();
    check_header(&bytes[..HEADER_LEN - 1], VOLUME, ours, 5).unwrap_err();
}

proptest! {
    #[test]
    fn bits_count_as_a_set_does(set in proptest::collection::btree_set(0..CHUNK_BLOCKS_MAX, 0..CHUNK_BLOCKS_MAX), at in 0..=CHUNK_BLOCKS_MAX) {
        let mut bits = Bits::default();
        set.iter().for_each(|at| bits.set(*at));
        prop_assert_eq!(bits.count(), set.len());
        prop_assert_eq!(bits.below(at), set.range(..at).count());
        prop_assert!(bits.ones().eq(set.iter().copied()));
    }
}
