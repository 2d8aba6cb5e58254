use std::fs;

use proptest::prelude::*;
use tidemark_block::{BlockSize, MemoryTable, xxh3_128};

use super::*;

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

fn geometry(blocks: u64) -> Geometry {
    Geometry::new(blocks * 4096, BlockSize::MIN).unwrap()
}

fn sum(n: u64) -> Checksum128 {
    if n == 0 {
        Checksum128::ZERO
    } else {
        xxh3_128(&n.to_le_bytes())
    }
}

fn model_digest(model: &MemoryTable) -> ImageDigest {
    let Ok(digest) = digest::image_digest(model);
    digest
}

#[test]
fn a_flipped_bit_is_seen_at_every_byte_by_the_tree_or_by_the_digest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table");
    // Three groups, of which the last is not a whole one.
    let g = geometry(70);
    let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
    table
        .apply((0..70).map(|n| (BlockIndex::new(n), sum(1 + n))))
        .unwrap();
    let digest = table.digest().unwrap();
    let layout = Layout::new(g);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let blocks = layout.blocks_at..layout.blocks_at + 70 * 16;
    let used = [0..16, 4096..4096 + 3 * 16, blocks];
    assert!(table.is_whole(g.all()).unwrap());
    for at in 0..layout.length {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
        let counts = used.iter().any(|used| used.contains(&at));
        assert_eq!(!table.is_whole(g.all()).unwrap(), counts, "byte {at}");
        assert_eq!(table.digest().unwrap() != digest, at < 16, "byte {at}");
        file.write_all_at(&byte, at).unwrap();
    }
}

#[test]
fn a_part_of_a_table_is_whole_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table");
    let g = geometry(1024 + 40);
    let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
    table
        .apply((0..1064).map(|n| (BlockIndex::new(n), sum(1 + n))))
        .unwrap();
    let part = |first, end| Extent::between(BlockIndex::new(first), BlockIndex::new(end));
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[1], Layout::new(g).blocks_at + 100 * 16)
        .unwrap();
    for (part, is_whole) in [
        (part(127, 128), false),
        (part(0, 1064), false),
        (part(128, 1064), true),
        (part(0, 96), true),
        (part(100, 100), true),
    ] {
        assert_eq!(table.is_whole(part).unwrap(), is_whole, "{part}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_table_keeps_what_is_applied_and_its_digest(
        count in prop_oneof![1..70u64, 900..5000u64],
        rounds in prop::collection::vec(
            (prop::collection::btree_map(0..5000u64, 0..4u64, 0..40), (0..5000u64, 0..5000u64)),
            1..5,
        ),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let g = geometry(count);
        let mut model = MemoryTable::new(g);
        let mut table = ChecksumTable::create(&path, VOLUME, g).unwrap();
        for (number, (changes, zero)) in (1..).zip(rounds) {
            let changes: Vec<_> = changes
                .into_iter()
                .filter(|(block, _)| *block < count)
                .map(|(block, n)| (BlockIndex::new(block), sum(n)))
                .collect();
            table.apply(changes.iter().copied()).unwrap();
            changes.iter().for_each(|(block, checksum)| model.set(*block, *checksum));
            let zero = Extent::between(
                BlockIndex::new(zero.0.min(count)),
                BlockIndex::new(zero.1.min(count)),
            );
            table.apply_zero(zero).unwrap();
            zero.iter().for_each(|block| model.set(block, Checksum128::ZERO));
            prop_assert_eq!(table.digest().unwrap(), model_digest(&model));
            table.sync_and_stamp(GenerationId::new(number)).unwrap();
            if number % 2 == 0 {
                drop(table);
                table = ChecksumTable::open(&path, VOLUME, g).unwrap();
                prop_assert_eq!(table.stamp(), GenerationId::new(number));
            }
        }
        table.rebuild_upper_levels().unwrap();
        prop_assert_eq!(table.digest().unwrap(), model_digest(&model));
        for block in g.all().iter() {
            prop_assert_eq!(table.block(block).unwrap(), model.get(block));
        }
    }
}

#[test]
fn groups_and_leaves_torn_by_a_power_loss_are_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table");
    let g = geometry(5000);
    let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
    table
        .apply([
            (BlockIndex::new(3), sum(1)),
            (BlockIndex::new(4999), sum(2)),
        ])
        .unwrap();
    let digest = table.digest().unwrap();
    let torn = vec![0xaa; usize::try_from(table.layout.blocks_at).unwrap()];
    table.file.write_all_at(&torn, 0).unwrap();
    assert_ne!(table.digest().unwrap(), digest);
    table.rebuild_upper_levels().unwrap();
    assert_eq!(table.digest().unwrap(), digest);
}

#[test]
fn an_apply_torn_by_a_crash_is_completed_by_repeating_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table");
    let g = geometry(3000);
    let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
    let block = |n| BlockIndex::new(n);
    let changes = [
        (block(3), sum(1)),
        (block(1500), sum(2)),
        (block(2999), sum(3)),
    ];
    let zero = Extent::between(block(10), block(20));
    table.apply((0..20).map(|n| (block(n), sum(9)))).unwrap();
    table.apply(changes).unwrap();
    table.apply_zero(zero).unwrap();
    let whole = table.digest().unwrap();
    // The blocks were written, groups and leaves were not.
    table
        .file
        .write_all_at(
            &vec![0; usize::try_from(table.layout.blocks_at).unwrap()],
            0,
        )
        .unwrap();
    assert_ne!(table.digest().unwrap(), whole);
    table.reapply((0..3).map(|n| (block(n), sum(9)))).unwrap();
    table.reapply(changes).unwrap();
    table.reapply((4..10).map(|n| (block(n), sum(9)))).unwrap();
    table.reapply_zero(zero).unwrap();
    assert_eq!(table.digest().unwrap(), whole);
}

/// The leaf reached the disk before the power was lost, the hole below it did not.
#[test]
fn a_whole_leaf_zeroed_in_part_is_zeroed_by_repeating_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table");
    let g = geometry(3000);
    let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
    let leaf = digest::leaf_extent(g, 1);
    table
        .apply(leaf.iter().map(|block| (block, sum(1))))
        .unwrap();
    table
        .file
        .write_all_at(Checksum128::ZERO.as_bytes(), ENTRY)
        .unwrap();
    table.reapply_zero(leaf).unwrap();
    for block in leaf.iter() {
        assert!(table.block(block).unwrap().is_zero(), "{block}");
    }
    let empty = MemoryTable::new(g);
    assert_eq!(table.digest().unwrap(), model_digest(&empty));
    table.rebuild_upper_levels().unwrap();
    assert_eq!(table.digest().unwrap(), model_digest(&empty));
}

/// Field by field as in the table of `docs/FORMAT.md`.
#[test]
fn a_stamp_is_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table");
    let g = geometry(5);
    let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
    table.sync_and_stamp(GenerationId::new(9)).unwrap();
    let mut payload = VOLUME.as_bytes().to_vec();
    payload.extend_from_slice(&(5u64 * 4096).to_le_bytes());
    payload.extend_from_slice(&4096u32.to_le_bytes());
    payload.extend_from_slice(&9u64.to_le_bytes());
    assert_eq!(payload.len(), 36);
    let sealed = tidemark_block::wire::seal(*b"TMTABSTP", 1, &payload);
    assert_eq!(fs::read(dir.path().join("table.stamp")).unwrap(), sealed);
}

#[test]
fn the_table_of_a_sparse_tebibyte_takes_little_space() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table");
    let g = Geometry::new(1 << 40, BlockSize::MIN).unwrap();
    let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
    table.apply([(BlockIndex::new(1 << 27), sum(1))]).unwrap();
    table.apply_zero(g.all()).unwrap();
    table.apply([(BlockIndex::new(1 << 27), sum(1))]).unwrap();
    table.digest().unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512 < 1 << 20);
}

#[test]
fn the_table_of_another_volume_or_shape_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table");
    assert!(matches!(
        ChecksumTable::open(&path, VOLUME, geometry(5)),
        Err(TableError::Missing(_))
    ));
    drop(ChecksumTable::create(&path, VOLUME, geometry(5)).unwrap());
    ChecksumTable::open(&path, VOLUME, geometry(5)).unwrap();
    for (volume, g) in [
        (VolumeId::from_bytes([8; 16]), geometry(5)),
        (VOLUME, geometry(6)),
    ] {
        assert!(matches!(
            ChecksumTable::open(&path, volume, g),
            Err(TableError::Foreign(_))
        ));
    }
}
