//! Golden files of every durable structure, and the page that describes them.

use std::sync::atomic::Ordering::SeqCst;

use capture_core::engine::{
    capture::{
        CHANGES_WORD, CaptureError, ENTRIES_WORD, EPOCH_SEAL_WORD, MARK_SYNC_FAILED, MARKS_WORD,
        RING_WORD, TRACKING_WORDS, checked_word,
    },
    dirty::{DirtyLayout, WORD_BITS},
    intent::{
        HEADER_LEN, PAGE_REGIONS, PAGE_SECTORS, PAGE_WORDS, SECTOR_LEN, decode_page, encode_page,
    },
    media::{Map, Media},
    read::SnapshotRead,
    records::{
        CARRY_MAGIC, CHANGES_MAGIC, CUT_MAGIC, Changes, DIRTY_MAGIC, FileIdentity, IDENTITY_MAGIC,
        Identity, Place, SEALED, SLOTS_MAGIC, SNAPSHOTS_MAGIC, Snapshot, SnapshotTable,
        TRACKING_MAGIC, UNGRADED, decode_carry, decode_interval, encode_carry, encode_interval,
        encode_map_header, old,
    },
    spool::{ENTRY_WORDS, Spool, SpoolLimits},
};
use proptest::prelude::*;
use tidemark_block::{
    BlockIndex, BlockSet, BlockSize, Checksum128, Coherence, CutReason, Extent, Geometry, VolumeId,
    wire,
};

use crate::{
    bench::{BLOCK, Bench, extent, snapshot},
    sim::Sim,
};

fn geometry() -> Geometry {
    Geometry::new(64 * 4096, BlockSize::MIN).unwrap()
}

fn volume() -> VolumeId {
    "00112233-4455-6677-8899-aabbccddeeff".parse().unwrap()
}

fn set() -> BlockSet {
    let extent = |a, b| Extent::between(BlockIndex::new(a), BlockIndex::new(b));
    [extent(1, 4), extent(60, 64)].into_iter().collect()
}

fn identity() -> Identity {
    Identity {
        volume: volume(),
        geometry: geometry(),
        clean: true,
        failed: false,
        old: false,
        seals: Some(std::array::from_fn(|n| {
            Checksum128::from_bytes([u8::try_from(n).unwrap(); 16])
        })),
        epoch_limit: 0x1_0000_0007,
        file: FileIdentity {
            boot: [1; 16],
            mount: 2,
            filesystem: [3; 16],
            device: 4,
            inode: 5,
            modified_s: -6,
            modified_ns: 7,
            born_s: 11,
            born_ns: 12,
        },
        state: Place {
            mount: 8,
            filesystem: [9; 16],
            device: 10,
            inode: 13,
            born_s: 14,
            born_ns: 15,
        },
    }
}

fn snapshots() -> SnapshotTable {
    let snapshot = |id, cut, label: &str| Snapshot {
        id,
        cut,
        time_ms: 1000 * id,
        changes: cut - 3,
        coherence: Coherence::Lull,
        reason: CutReason::new("the last write was not flushed"),
        label: label.to_owned(),
    };
    SnapshotTable {
        last_id: 9,
        snapshots: vec![snapshot(3, 10, ""), snapshot(9, 12, "before – 'after'")],
    }
}

/// As a version without grades has them.
fn ungraded() -> SnapshotTable {
    let mut table = snapshots();
    for snapshot in &mut table.snapshots {
        snapshot.coherence = Coherence::Crash;
        snapshot.reason = CutReason::new(UNGRADED);
    }
    table
}

fn changes() -> Changes {
    Changes {
        cut: 17,
        since: 12,
        blocks: set(),
    }
}

fn page() -> [u64; PAGE_WORDS] {
    let mut bits = [0; PAGE_WORDS];
    bits[0] = 0b1011;
    bits[PAGE_WORDS - 1] = 1 << 63;
    bits
}

#[allow(clippy::disallowed_methods, reason = "a test's own files")]
fn stored(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap()
}

fn path(name: &str) -> String {
    format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Compares with the golden file; `TIDEMARK_BLESS=1` writes a new one.
#[allow(clippy::disallowed_methods, reason = "a test's own files")]
fn golden(name: &str, encoded: &[u8]) -> Vec<u8> {
    if std::env::var("TIDEMARK_BLESS").is_ok() {
        std::fs::write(path(name), encoded).unwrap();
    }
    let stored = stored(name);
    assert!(stored == encoded, "{name} is encoded as ever");
    stored
}

#[test]
fn golden_files_of_0_1_0_keep_decoding() {
    let all = geometry().all();
    let found = Identity::decode(&stored("identity-v1")).unwrap();
    let expected = Identity {
        old: true,
        seals: None,
        ..identity()
    };
    assert_eq!(found, expected);
    assert_eq!(old::decode_carry(&stored("carry-v1"), all), Ok(set()));
    assert_eq!(old::decode_cut(&stored("cut-v1"), all), Ok((17, set())));
    let mut table = ungraded();
    table
        .snapshots
        .iter_mut()
        .for_each(|snapshot| snapshot.changes = 0);
    assert_eq!(old::decode_snapshots(&stored("snapshots-v1")), Ok(table));
    let (sequence, bits) = old::decode_page(volume(), 2, &stored("intent-page-v1")).unwrap();
    let set: Vec<_> = (0..bits.len()).filter(|n| bits[*n]).collect();
    assert_eq!((sequence, set), (5, vec![0, 1, 3, 32_255]));
    assert_eq!(bits.len() as u64, old::PAGE_REGIONS);
    assert_eq!(
        old::encode_map_header(Map::Tracking, volume(), geometry()),
        stored("map-header-v1")
    );
}

#[test]
fn what_0_1_0_wrote_is_not_taken_for_what_is_written_now() {
    let all = geometry().all();
    assert!(decode_carry(&stored("carry-v1"), volume(), all).is_err());
    assert!(decode_interval(&stored("cut-v1"), volume(), all).is_err());
    assert!(Changes::decode(&stored("cut-v1"), volume(), 17, all).is_err());
    assert!(SnapshotTable::decode(&stored("snapshots-v1"), volume()).is_err());
    assert!(decode_page(volume(), 2, &stored("intent-page-v1")).is_none());
}

#[test]
fn golden_files_keep_decoding() {
    let all = geometry().all();
    let bytes = golden("identity-v2", &identity().encode());
    assert_eq!(Identity::decode(&bytes), Ok(identity()));
    let bytes = golden("carry-v2", &encode_carry(volume(), &set()));
    assert_eq!(decode_carry(&bytes, volume(), all), Ok(set()));
    let bytes = golden(
        "interval-v2",
        &encode_interval(volume(), Some((17, &set()))),
    );
    assert_eq!(
        decode_interval(&bytes, volume(), all),
        Ok(Some((17, set())))
    );
    let bytes = golden("interval-none-v2", &encode_interval(volume(), None));
    assert_eq!(decode_interval(&bytes, volume(), all), Ok(None));
    let bytes = golden("changes-v1", &changes().encode(volume()));
    assert_eq!(Changes::decode(&bytes, volume(), 17, all), Ok(changes()));
    let bytes = stored("snapshots-v2");
    assert_eq!(SnapshotTable::decode(&bytes, volume()), Ok(ungraded()));
    let bytes = golden("snapshots-v3", &snapshots().encode(volume()));
    assert_eq!(SnapshotTable::decode(&bytes, volume()), Ok(snapshots()));
    let bytes = golden("intent-page-v2", &encode_page(volume(), 2, 5, &page())[..]);
    assert_eq!(
        decode_page(volume(), 2, &bytes),
        Some((5, Box::new(page())))
    );
    golden(
        "map-header-v2",
        &encode_map_header(Map::Tracking, volume(), geometry()),
    );

    let sim = Sim::new(1, volume(), geometry(), 1, 2);
    let spool = Spool::new(SpoolLimits {
        entries_max: 2,
        slots_max: 2,
    });
    for (block, epoch, byte) in [(5, 7, 1), (6, 8, 0)] {
        let open = || Some([epoch - 1].into());
        spool
            .store(&sim, BlockIndex::new(block), epoch, &[byte; 4096], open)
            .unwrap();
    }
    let words = sim.words(Map::Slots);
    let bytes: Vec<u8> = words
        .iter()
        .flat_map(|word| word.load(SeqCst).to_le_bytes())
        .collect();
    golden("slots-v1", &bytes);
    let again = Spool::new(SpoolLimits {
        entries_max: 2,
        slots_max: 2,
    });
    assert_eq!(again.rebuild(&sim), Ok(None));
    assert_eq!(
        (again.used(), again.find(BlockIndex::new(6), 7)),
        ((2, 1), Some(1))
    );
}

#[test]
fn an_identity_leaves_room_for_epochs_to_rise() {
    for (epoch_limit, is_read) in [(0, false), (1, true), (1 << 62, true), (u64::MAX, false)] {
        let identity = Identity {
            epoch_limit,
            ..identity()
        };
        let read = Identity::decode(&identity.encode());
        assert_eq!(read.is_ok(), is_read, "{epoch_limit}");
    }
}

#[test]
fn snapshots_have_numbers_that_were_given() {
    for (last_id, is_read) in [(9, true), (8, false), (u64::MAX, false)] {
        let table = SnapshotTable {
            last_id,
            ..snapshots()
        };
        let read = SnapshotTable::decode(&table.encode(volume()), volume());
        assert_eq!(read.is_ok(), is_read, "{last_id}");
    }
}

type Decode = fn(&[u8], VolumeId, Extent) -> bool;

/// Each structure that belongs to a volume, and whether bytes are one.
fn structures() -> [(Vec<u8>, Decode); 6] {
    [
        (identity().encode(), |bytes, volume, _| {
            Identity::decode(bytes).is_ok_and(|identity| identity.volume == volume)
        }),
        (encode_carry(volume(), &set()), |bytes, volume, all| {
            decode_carry(bytes, volume, all).is_ok()
        }),
        (
            encode_interval(volume(), Some((1, &set()))),
            |bytes, volume, all| decode_interval(bytes, volume, all).is_ok(),
        ),
        (changes().encode(volume()), |bytes, volume, all| {
            Changes::decode(bytes, volume, 17, all).is_ok()
        }),
        (snapshots().encode(volume()), |bytes, volume, _| {
            SnapshotTable::decode(bytes, volume).is_ok()
        }),
        (
            encode_page(volume(), 2, 5, &page()).to_vec(),
            |bytes, volume, _| decode_page(volume, 2, bytes).is_some(),
        ),
    ]
}

#[test]
fn a_flipped_bit_is_seen_at_every_byte_of_every_structure() {
    let all = geometry().all();
    for (n, (encoded, decodes)) in structures().into_iter().enumerate() {
        assert!(decodes(&encoded, volume(), all));
        for at in 0..encoded.len() {
            let mut bytes = encoded.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(!decodes(&bytes, volume(), all), "structure {n}, byte {at}");
            assert!(
                !decodes(&encoded[..at], volume(), all),
                "structure {n}, {at} bytes"
            );
        }
    }
}

#[test]
fn a_damaged_before_image_is_refused_by_the_number_of_its_block() {
    let bench = Bench::new();
    bench.write(5, 1);
    let cut = bench.cut(snapshot());
    bench.write(5, 2);
    let read = || {
        let mut buffer = vec![0; BLOCK];
        let view = bench.capture.open_cut(cut).unwrap();
        let mut read = SnapshotRead::new(view, extent(5, 1));
        read.before_images(&bench.capture, &mut buffer)
            .map(|()| buffer[0])
    };
    let mut whole = vec![0; BLOCK];
    bench.sim.read_before(0, &mut whole).unwrap();
    for at in [0, 700, BLOCK - 1] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        bench.sim.write_before(0, &damaged).unwrap();
        assert_eq!(read(), Err(CaptureError::SpoolDamaged(5)), "byte {at}");
    }
    bench.sim.write_before(0, &whole).unwrap();
    for word in &bench.sim.words(Map::Slots)[..ENTRY_WORDS] {
        let was = word.fetch_xor(1 << 9, SeqCst);
        assert_eq!(read(), Err(CaptureError::SpoolDamaged(5)));
        word.store(was, SeqCst);
    }
    assert_eq!(read(), Ok(1));
}

#[test]
fn what_belongs_to_another_volume_or_is_another_record_is_seen() {
    let all = geometry().all();
    let all_structures = structures();
    for (n, (encoded, decodes)) in all_structures.iter().enumerate() {
        let other = VolumeId::from_bytes([9; 16]);
        assert!(!decodes(encoded, other, all), "structure {n}");
        for (m, (other, _)) in all_structures.iter().enumerate() {
            assert_eq!(decodes(other, volume(), all), n == m, "{m} in place of {n}");
        }
    }
    let bytes = changes().encode(volume());
    assert!(Changes::decode(&bytes, volume(), 16, all).is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_a_decoder_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let all = geometry().all();
        let owned = [&volume().as_bytes()[..], &payload].concat();
        let magics = [IDENTITY_MAGIC, CARRY_MAGIC, CUT_MAGIC, CHANGES_MAGIC, SNAPSHOTS_MAGIC];
        for (magic, version) in magics.into_iter().flat_map(|magic| [(magic, 1), (magic, 2), (magic, 3)]) {
            for bytes in [
                &wire::seal(magic, version, &payload),
                &wire::seal(magic, version, &owned),
                &payload,
            ] {
                for (_, decodes) in structures() {
                    decodes(bytes, volume(), all);
                }
                let _ = old::decode_carry(bytes, all);
                let _ = old::decode_cut(bytes, all);
                let _ = old::decode_snapshots(bytes);
                let _ = old::decode_page(volume(), 0, bytes);
            }
        }
    }
}

#[test]
fn the_format_page_states_the_constants() {
    let page = include_str!("../../../../docs/FORMAT-CAPTURE.md");
    let magics = [
        IDENTITY_MAGIC,
        CARRY_MAGIC,
        CUT_MAGIC,
        CHANGES_MAGIC,
        SNAPSHOTS_MAGIC,
        TRACKING_MAGIC,
        DIRTY_MAGIC[0],
        DIRTY_MAGIC[1],
        SLOTS_MAGIC,
    ];
    for magic in magics {
        let text = String::from_utf8(magic.to_vec())
            .unwrap()
            .replace('\0', "\\0");
        assert!(page.contains(&format!("`{text}`")), "{text}");
    }
    for stated in [
        format!(
            "| {HEADER_LEN} | {} | bit per region |",
            SECTOR_LEN - HEADER_LEN
        ),
        format!("{PAGE_SECTORS} sectors of {SECTOR_LEN} bytes"),
        "Page n covers 28,672 regions".to_owned(),
        format!("| {MARKS_WORD} | marks"),
        format!("| {EPOCH_SEAL_WORD} | the lower half of the XXH3-128 of the open epoch"),
        format!("| {ENTRIES_WORD} | entries"),
        format!("| {CHANGES_WORD} | lower half of the cut"),
        format!("| {RING_WORD} + 4 n | recorded block n (0 to 255)"),
        format!("Entries of {ENTRY_WORDS} words"),
        format!("bit n mod {WORD_BITS} of word n / {WORD_BITS}"),
        format!("| 172 | {} | digests of", SEALED.len() * 16),
        "`TMFAILED`".to_owned(),
    ] {
        assert!(page.contains(&stated), "{stated}");
    }
    let sealed = SEALED.map(|file| format!("`{file}`")).join(", ");
    assert!(page.contains(&sealed), "{sealed}");
    assert_eq!(PAGE_REGIONS, 28_672);
    assert_eq!(MARK_SYNC_FAILED.to_le_bytes(), *b"TMFAILED");
    assert_eq!(checked_word(16), 16 | (!16 << 32));
    assert_eq!(TRACKING_WORDS, RING_WORD + 4 * 256);
    assert_eq!(
        DirtyLayout::new(32 * 32 * 32 + 1).total(),
        2 + (32 + 1) + (32 * 32 + 1)
    );
    assert_eq!(identity().encode().len(), 40 + 172 + SEALED.len() * 16);
}
