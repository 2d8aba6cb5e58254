//! Overlay and liveness against naive models; what a rewrite may forget.

use std::collections::BTreeMap;

use proptest::prelude::*;
use tidemark_block::{BlockIndex, Extent, Geometry, SegmentId, Sequence};
use vault_core::{
    image::{EntryRef, ExtentMap, WINDOW_BLOCKS, images_that_need, live_pieces, overlay, windows},
    segment::{SealedSegment, SegmentIndex, SegmentKind, SegmentWriter},
};

use crate::samples::{INTERVAL, count, extent, frame, geometry, origin};

const BLOCKS: u64 = 200;

/// What one segment holds: of each generation some blocks, with data (true) or zero.
type Content = BTreeMap<(u64, u64), bool>;

fn index_of(content: &Content) -> SegmentIndex {
    let g = geometry(BLOCKS);
    let mut writer = SegmentWriter::new(origin(g, SegmentKind::Rewritten), Vec::new());
    let mut by_sequence: BTreeMap<u64, Vec<(u64, bool)>> = BTreeMap::new();
    for (&(block, sequence), &data) in content {
        by_sequence.entry(sequence).or_default().push((block, data));
    }
    for (sequence, blocks) in by_sequence {
        let data: Vec<u64> = blocks
            .iter()
            .filter(|(_, data)| *data)
            .map(|(block, _)| *block)
            .collect();
        for part in data.chunks(64) {
            writer.push(&frame(g, part, sequence), Sequence::new(sequence));
        }
        let zeroes = blocks.iter().filter(|(_, data)| !*data);
        for zero in
            tidemark_block::extent::coalesce(zeroes.map(|(block, _)| extent(*block, block + 1)))
        {
            writer.push_zero(zero, Sequence::new(sequence));
        }
    }
    index_in(&writer.finish((BlockIndex::ZERO, BlockIndex::ZERO)), g)
}

fn index_in(sealed: &SealedSegment, geometry: Geometry) -> SegmentIndex {
    let record = sealed.footer.record;
    let range =
        usize::try_from(record.index_at).unwrap()..usize::try_from(record.checksums_at()).unwrap();
    SegmentIndex::decode(&sealed.bytes[range], &record, geometry).unwrap()
}

/// Contents of several segments; no version of a block is in two of them.
fn segments() -> impl Strategy<Value = Vec<Content>> {
    let versions =
        prop::collection::btree_map((0..BLOCKS, 1..12_u64), (0..4_usize, any::<bool>()), 1..300);
    let runs = prop::collection::vec((0..BLOCKS, 1..150_u64, 1..12_u64, 0..4_usize), 0..3);
    (versions, runs).prop_map(|(versions, runs)| {
        let mut segments = vec![Content::new(); 4];
        let mut taken = std::collections::BTreeSet::new();
        for ((block, sequence), (segment, data)) in versions {
            taken.insert((block, sequence));
            segments[segment].insert((block, sequence), data);
        }
        for (start, length, sequence, segment) in runs {
            for block in start..(start + length).min(BLOCKS) {
                if taken.insert((block, sequence)) {
                    segments[segment].insert((block, sequence), false);
                }
            }
        }
        segments
    })
}

fn named_part(part: u32) -> SegmentId {
    SegmentId {
        origin: INTERVAL,
        part,
    }
}

/// The version that generation `newest` sees.
fn seen(segments: &[Content], block: u64, newest: u64) -> Option<(u64, usize, bool)> {
    let versions = segments.iter().enumerate().flat_map(|(n, content)| {
        content
            .range((block, 0)..=(block, newest))
            .map(move |((_, sequence), data)| (*sequence, n, *data))
    });
    versions.max()
}

fn window(range: (u64, u64)) -> Extent {
    let (a, b) = range;
    extent(a.min(b), a.max(b) + 1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_image_has_the_newest_version_of_each_block(
        contents in segments(), range in (0..BLOCKS, 0..BLOCKS), newest in 0..13_u64,
    ) {
        let indexes: Vec<_> = contents.iter().map(index_of).collect();
        let window = window(range);
        let pieces = overlay(&indexes, window, Sequence::new(newest));
        let mut found = BTreeMap::new();
        for piece in &pieces {
            let entry = &indexes[piece.source.index as usize].entries()[piece.source.entry as usize];
            prop_assert_eq!(entry.blocks.intersect(piece.blocks), piece.blocks);
            for block in piece.blocks.iter() {
                prop_assert!(window.contains(block));
                let version = (entry.sequence.get(), piece.source.index as usize, !entry.zero);
                prop_assert!(found.insert(block.get(), version).is_none());
            }
        }
        prop_assert!(pieces.windows(2).all(|pair| pair[0].blocks.end() <= pair[1].blocks.start()));
        for block in window.iter() {
            prop_assert_eq!(found.get(&block.get()).copied(), seen(&contents, block.get(), newest));
        }
    }

    #[test]
    fn the_images_that_need_an_entry_are_those_that_are_read_from_it(
        contents in segments(), range in (0..BLOCKS, 0..BLOCKS), retained in prop::collection::btree_set(0..13_u64, 1..6),
        segment in 0..4_usize, entries in prop::collection::hash_set(0..300_u32, 1..20),
    ) {
        let indexes: Vec<_> = contents.iter().map(index_of).collect();
        let window = window(range);
        let wanted = |at: EntryRef| at.index as usize == segment && entries.contains(&at.entry);
        let retained: Vec<_> = retained.into_iter().map(Sequence::new).collect();
        let read_from_it = |newest: &&Sequence| {
            overlay(&indexes, window, **newest).iter().any(|piece| wanted(piece.source))
        };
        let expected: Vec<_> = retained.iter().filter(read_from_it).copied().collect();
        let found = images_that_need(&indexes, window, &retained, wanted);
        prop_assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_map_leads_to_the_newest_version_of_each_block(
        contents in segments(), range in (0..BLOCKS, 0..BLOCKS), part in (0..BLOCKS, 0..BLOCKS),
        newest in 0..13_u64,
    ) {
        let indexes: Vec<_> = contents.iter().map(index_of).collect();
        let named: Vec<_> = (0_u32..).map(named_part).zip(&indexes).collect();
        let window = window(range);
        let part = self::window(part);
        let map = ExtentMap::new(&named, window, Sequence::new(newest));
        prop_assert_eq!(map.window(), window);
        let mut found = BTreeMap::new();
        let mut last = BlockIndex::ZERO;
        for piece in map.pieces(part) {
            prop_assert!(piece.blocks.start() >= last);
            last = piece.blocks.end();
            let segment = piece.frame.segment.part as usize;
            for (block, place) in piece.blocks.iter().zip(u64::from(piece.first)..) {
                // The version that the frame has at this place.
                let entry = indexes[segment].entries().iter().find(|entry| {
                    !entry.zero
                        && entry.frame_at == piece.frame.at
                        && entry.blocks.contains(block)
                        && u64::from(entry.first_in_frame) + block.since(entry.blocks.start()).get() == place
                });
                let entry = entry.expect("the frame holds the block at its place");
                prop_assert_eq!(piece.frame.len, entry.frame_len);
                prop_assert_eq!(piece.frame.blocks, entry.frame_blocks);
                prop_assert!(found.insert(block.get(), (entry.sequence.get(), segment)).is_none());
            }
        }
        for block in 0..BLOCKS {
            let inside = window.intersect(part).contains(BlockIndex::new(block));
            let expected = seen(&contents, block, newest)
                .filter(|(_, _, data)| inside && *data)
                .map(|(sequence, segment, _)| (sequence, segment));
            prop_assert_eq!(found.get(&block).copied(), expected);
        }
    }

    #[test]
    fn exactly_what_a_retained_generation_sees_is_alive(
        contents in segments(), range in (0..BLOCKS, 0..BLOCKS),
        retained in prop::collection::btree_set(1..13_u64, 1..4),
    ) {
        let indexes: Vec<_> = contents.iter().map(index_of).collect();
        let window = window(range);
        let sequences: Vec<_> = retained.iter().map(|g| Sequence::new(*g)).collect();
        let mut found = BTreeMap::new();
        let mut last = None;
        for live in live_pieces(&indexes, window, &sequences) {
            let entry = &indexes[live.piece.source.index as usize].entries()[live.piece.source.entry as usize];
            let key = (live.piece.blocks.start(), std::cmp::Reverse(entry.sequence));
            prop_assert!(last.is_none_or(|last| last < key), "by block, then the newest first");
            last = Some(key);
            for block in live.piece.blocks.iter() {
                let version = (block.get(), entry.sequence.get(), live.piece.source.index as usize);
                prop_assert!(found.insert(version, live.oldest).is_none());
            }
        }
        let mut expected = BTreeMap::new();
        for block in window.iter() {
            for newest in &retained {
                if let Some((sequence, segment, _)) = seen(&contents, block.get(), *newest) {
                    let older = seen(&contents, block.get(), sequence - 1).is_some();
                    expected.insert((block.get(), sequence, segment), !older);
                }
            }
        }
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn what_is_alive_gives_every_retained_image_and_with_fewer_indexes_known_never_less(
        contents in segments(), retained in prop::collection::btree_set(1..13_u64, 1..4),
    ) {
        let indexes: Vec<_> = contents.iter().map(index_of).collect();
        let all = extent(0, BLOCKS);
        let sequences: Vec<_> = retained.iter().map(|g| Sequence::new(*g)).collect();
        let versions = |pieces: Vec<vault_core::image::LivePiece>, complete: bool, of: &[SegmentIndex]| {
            let mut kept = Content::new();
            for live in pieces {
                let entry = &of[live.piece.source.index as usize].entries()[live.piece.source.entry as usize];
                for block in live.piece.blocks.iter() {
                    if !(complete && entry.zero && live.oldest) {
                        kept.insert((block.get(), entry.sequence.get()), !entry.zero);
                    }
                }
            }
            kept
        };
        let kept = [versions(live_pieces(&indexes, all, &sequences), true, &indexes)];
        let data = |segments: &[Content], block, newest| {
            seen(segments, block, newest).filter(|(_, _, data)| *data).map(|(sequence, _, _)| sequence)
        };
        for block in 0..BLOCKS {
            for newest in &retained {
                prop_assert_eq!(data(&kept, block, *newest), data(&contents, block, *newest));
            }
        }
        // A merge of the first two, which knows nothing of the others.
        let merged = versions(live_pieces(&indexes[..2], all, &sequences), false, &indexes[..2]);
        let rest = [merged, contents[2].clone(), contents[3].clone()];
        for block in 0..BLOCKS {
            for newest in &retained {
                prop_assert_eq!(data(&rest, block, *newest), data(&contents, block, *newest));
            }
        }
    }
}

#[test]
fn a_map_takes_8_bytes_per_run_and_24_per_frame() {
    let g = geometry(BLOCKS);
    let mut writer = SegmentWriter::new(origin(g, SegmentKind::Rewritten), Vec::new());
    for block in 0..BLOCKS {
        writer.push(&frame(g, &[block], 1), Sequence::new(1));
    }
    let sealed = writer.finish((BlockIndex::ZERO, BlockIndex::ZERO));
    let scattered = index_in(&sealed, g);
    let map = |index: &SegmentIndex| {
        ExtentMap::new(&[(named_part(0), index)], g.all(), Sequence::new(1)).memory()
    };
    let per_block = usize::try_from(BLOCKS).unwrap() * (8 + 24);
    assert_eq!(map(&scattered), per_block + size_of::<SegmentId>());
    let whole = index_of(&(0..64).map(|block| ((block, 1), true)).collect());
    assert_eq!(map(&whole), 8 + 24 + size_of::<SegmentId>());
    let zero = index_of(&(0..64).map(|block| ((block, 1), false)).collect());
    assert_eq!(map(&zero), 0);
}

#[test]
fn windows_cover_a_volume_without_gap_or_overlap() {
    let g = geometry(3 * WINDOW_BLOCKS + 5);
    let found: Vec<_> = windows(g, g.all()).collect();
    assert_eq!(found.len(), 4);
    assert_eq!(
        found.iter().map(|window| window.count().get()).sum::<u64>(),
        3 * WINDOW_BLOCKS + 5
    );
    assert!(
        found
            .windows(2)
            .all(|pair| pair[0].end() == pair[1].start())
    );
    assert_eq!(
        windows(g, extent(WINDOW_BLOCKS - 1, WINDOW_BLOCKS + 1)).count(),
        2
    );
    assert_eq!(windows(g, extent(7, 7)).count(), 0);
    assert_eq!(found[3].count(), count(5));
}
