use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{
    encoding::{FULL, MAGIC, VERSION},
    *,
};
use crate::wire::{self, WireError};

fn extent(start: u64, end: u64) -> Extent {
    Extent::between(BlockIndex::new(start), BlockIndex::new(end))
}

fn blocks(set: &BlockSet) -> BTreeSet<u64> {
    set.extents()
        .flat_map(Extent::iter)
        .map(BlockIndex::get)
        .collect()
}

#[derive(Debug, Clone)]
enum Op {
    Insert(Extent),
    Remove(Extent),
    Word(u64, u64),
}

const END: u64 = 5 * CHUNK_BLOCKS + 100;

fn extents() -> impl Strategy<Value = Extent> {
    prop_oneof![
        (0..END, 0..200u64).prop_map(|(start, count)| extent(start, (start + count).min(END))),
        (0..END, 0..END).prop_map(|(a, b)| extent(a.min(b), a.max(b))),
        (0..5u64, 1..3u64).prop_map(|(chunk, count)| {
            extent(
                chunk * CHUNK_BLOCKS,
                ((chunk + count) * CHUNK_BLOCKS).min(END),
            )
        }),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        3 => extents().prop_map(Op::Insert),
        2 => extents().prop_map(Op::Remove),
        1 => (0..END / 64, any::<u64>()).prop_map(|(word, bits)| Op::Word(word, bits)),
    ];
    prop::collection::vec(op, 0..12)
}

fn build(ops: &[Op]) -> (BlockSet, BTreeSet<u64>) {
    let (mut set, mut model) = (BlockSet::new(), BTreeSet::new());
    for op in ops {
        match *op {
            Op::Insert(extent) => {
                set.insert(extent);
                model.extend(extent.iter().map(BlockIndex::get));
            }
            Op::Remove(extent) => {
                set.remove(extent);
                model.retain(|&block| !extent.contains(BlockIndex::new(block)));
            }
            Op::Word(word, bits) => {
                set.insert_word(word, bits);
                model.extend(
                    (0..64)
                        .filter(|n| bits >> n & 1 == 1)
                        .map(|n| word * 64 + n),
                );
            }
        }
    }
    (set, model)
}

proptest! {
    #[test]
    fn a_block_set_is_a_set_of_blocks(ops in ops(), other in ops(), cut in extents()) {
        let (set, model) = build(&ops);
        let (other, other_model) = build(&other);
        prop_assert_eq!(&blocks(&set), &model);
        prop_assert_eq!(set.len().get(), model.len() as u64);
        for block in [0, 1, 4095, 4096, END - 1] {
            prop_assert_eq!(set.contains(BlockIndex::new(block)), model.contains(&block));
        }

        let mut union = set.clone();
        union.union_with(&other);
        prop_assert_eq!(blocks(&union), &model | &other_model);
        prop_assert_eq!(union.len().get(), (&model | &other_model).len() as u64);

        let mut less = set.clone();
        less.subtract(&other);
        prop_assert_eq!(blocks(&less), &model - &other_model);
        prop_assert_eq!(less.len().get(), (&model - &other_model).len() as u64);

        let part = set.intersect_extent(cut);
        let expected: BTreeSet<_> =
            model.iter().copied().filter(|&b| cut.contains(BlockIndex::new(b))).collect();
        prop_assert_eq!(part.len().get(), expected.len() as u64);
        prop_assert_eq!(blocks(&part), expected);

        let from: BTreeSet<_> =
            set.extents_from(cut.start()).flat_map(Extent::iter).map(BlockIndex::get).collect();
        prop_assert_eq!(from, model.iter().copied().filter(|&b| b >= cut.start().get()).collect());

        let decoded = BlockSet::decode(&set.encode(), extent(0, END));
        prop_assert_eq!(decoded, Ok(set));
    }

    #[test]
    fn no_bytes_make_decoding_panic(payload in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = BlockSet::decode(&wire::seal(MAGIC, VERSION, &payload), extent(0, END));
    }
}

#[test]
fn extents_are_maximal_across_chunks() {
    let set: BlockSet = [extent(10, 20), extent(4000, 9000)].into_iter().collect();
    assert_eq!(
        set.extents().collect::<Vec<_>>(),
        [extent(10, 20), extent(4000, 9000)]
    );
}

#[test]
fn a_set_of_a_whole_tebibyte_is_small() {
    let set: BlockSet = [extent(0, 1 << 28)].into_iter().collect();
    assert_eq!(set.len().get(), 1 << 28);
    assert!(set.encode().len() < 100);
}

#[test]
fn a_decoded_set_stays_within_its_bounds() {
    let set: BlockSet = [extent(10, 21)].into_iter().collect();
    assert!(BlockSet::decode(&set.encode(), extent(0, 21)).is_ok());
    assert_eq!(
        BlockSet::decode(&set.encode(), extent(0, 20)),
        Err(WireError::Range("block of a block set"))
    );
    let huge = [1u64, 0, FULL | (1 << 62)].map(u64::to_le_bytes).concat();
    assert!(BlockSet::decode(&wire::seal(MAGIC, VERSION, &huge), extent(0, 20)).is_err());
}

#[test]
fn a_golden_set_keeps_decoding() {
    let set = BlockSet::decode(
        include_bytes!("../../tests/golden/block-set-v1"),
        extent(0, 50_000),
    );
    let set = set.unwrap();
    assert_eq!(
        set.extents().collect::<Vec<_>>(),
        [extent(10, 21), extent(4000, 20_000), extent(40_960, 49_152)]
    );
    assert_eq!(
        set.encode(),
        include_bytes!("../../tests/golden/block-set-v1")
    );
}
