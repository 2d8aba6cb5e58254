//! Golden files of every durable structure, and the page that describes them.

use std::sync::atomic::Ordering::SeqCst;

use capture_core::engine::{
    capture::{CaptureError, MARKS_WORD, RING_WORD, TRACKING_WORDS},
    dirty::DirtyLayout,
    intent::{HEADER_LEN, PAGE_LEN, PAGE_REGIONS, decode_page, encode_page},
    media::{Map, Media},
    read::SnapshotRead,
    records::{
        CARRY_MAGIC, CUT_MAGIC, DIRTY_MAGIC, FileIdentity, IDENTITY_MAGIC, Identity, Place,
        SLOTS_MAGIC, SNAPSHOTS_MAGIC, Snapshot, SnapshotTable, TRACKING_MAGIC, decode_carry,
        decode_cut, encode_carry, encode_cut, encode_map_header,
    },
    spool::{ENTRY_WORDS, Spool, SpoolLimits},
};
use proptest::prelude::*;
use tidemark_block::{BlockIndex, BlockSet, BlockSize, Extent, Geometry, VolumeId};

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
        label: label.to_owned(),
    };
    SnapshotTable {
        last_id: 9,
        snapshots: vec![snapshot(3, 10, ""), snapshot(9, 12, "before – 'after'")],
    }
}

fn page() -> [u64; 504] {
    let mut bits = [0; 504];
    bits[0] = 0b1011;
    bits[503] = 1 << 63;
    bits
}

/// Compares with the golden file; `TIDEMARK_BLESS=1` writes a new one.
#[allow(clippy::disallowed_methods, reason = "a test's own files")]
fn golden(name: &str, encoded: &[u8]) -> Vec<u8> {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var("TIDEMARK_BLESS").is_ok() {
        std::fs::write(&path, encoded).unwrap();
    }
    let stored = std::fs::read(&path).unwrap();
    assert!(stored == encoded, "{name} is encoded as ever");
    stored
}

#[test]
fn golden_files_keep_decoding() {
    let all = geometry().all();
    let bytes = golden("identity-v1", &identity().encode());
    assert_eq!(Identity::decode(&bytes), Ok(identity()));
    let bytes = golden("carry-v1", &encode_carry(&set()));
    assert_eq!(decode_carry(&bytes, all), Ok(set()));
    let bytes = golden("cut-v1", &encode_cut(17, &set()));
    assert_eq!(decode_cut(&bytes, all), Ok((17, set())));
    let bytes = golden("snapshots-v1", &snapshots().encode());
    assert_eq!(SnapshotTable::decode(&bytes), Ok(snapshots()));
    let bytes = golden("intent-page-v1", &encode_page(volume(), 2, 5, &page())[..]);
    assert_eq!(
        decode_page(volume(), 2, &bytes),
        Some((5, Box::new(page())))
    );
    golden(
        "map-header-v1",
        &encode_map_header(TRACKING_MAGIC, volume(), geometry()),
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
    assert_eq!(again.rebuild(&sim), Ok(true));
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
        let read = SnapshotTable::decode(&table.encode());
        assert_eq!(read.is_ok(), is_read, "{last_id}");
    }
}

#[test]
fn a_damaged_byte_is_seen_in_every_structure() {
    let all = geometry().all();
    type Decode = fn(&[u8], Extent) -> bool;
    let structures: [(Vec<u8>, Decode); 5] = [
        (identity().encode(), |bytes, _| {
            Identity::decode(bytes).is_ok()
        }),
        (encode_carry(&set()), |bytes, all| {
            decode_carry(bytes, all).is_ok()
        }),
        (encode_cut(1, &set()), |bytes, all| {
            decode_cut(bytes, all).is_ok()
        }),
        (snapshots().encode(), |bytes, _| {
            SnapshotTable::decode(bytes).is_ok()
        }),
        (encode_page(volume(), 2, 5, &page()).to_vec(), |bytes, _| {
            decode_page(volume(), 2, bytes).is_some()
        }),
    ];
    for (n, (encoded, decodes)) in structures.into_iter().enumerate() {
        assert!(decodes(&encoded, all));
        for at in 0..encoded.len() {
            let mut bytes = encoded.clone();
            bytes[at] ^= 0x10;
            assert!(!decodes(&bytes, all), "structure {n}, byte {at}");
        }
        assert!(!decodes(&encoded[..encoded.len() - 1], all));
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

proptest! {
    #[test]
    fn no_bytes_make_a_decoder_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let all = geometry().all();
        for magic in [IDENTITY_MAGIC, CARRY_MAGIC, CUT_MAGIC, SNAPSHOTS_MAGIC] {
            let sealed = tidemark_block::wire::seal(magic, 1, &payload);
            for bytes in [&sealed, &payload] {
                let _ = Identity::decode(bytes);
                let _ = decode_carry(bytes, all);
                let _ = decode_cut(bytes, all);
                let _ = SnapshotTable::decode(bytes);
                let _ = decode_page(volume(), 0, bytes);
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
    assert!(page.contains(&format!(
        "| {HEADER_LEN} | {} | bit per region |",
        PAGE_LEN - HEADER_LEN
    )));
    assert!(page.contains("Page n covers 32,256 regions") && PAGE_REGIONS == 32_256);
    assert!(page.contains(&format!("| {MARKS_WORD} | marks")));
    assert!(page.contains(&format!(
        "| {RING_WORD} + 4 n | recorded block n (0 to 255)"
    )));
    assert_eq!(TRACKING_WORDS, RING_WORD + 4 * 256);
    assert!(page.contains("Entries of 8 words") && ENTRY_WORDS == 8);
    assert_eq!(
        DirtyLayout::new(64 * 64 * 64 + 1).total(),
        2 + (64 + 1) + (64 * 64 + 1)
    );
    assert_eq!(identity().encode().len(), 40 + 172);
}
