//! The image of a generation, window by window: for each block the newest version not above the generation's own.
//!
//! A window is a fixed range of blocks, so that memory is bounded by it whatever the size of the volume. The same
//! overlay, seen from the other side, tells which entries no retained generation needs ([`live_pieces`]).

mod map;

use std::collections::BTreeSet;

use tidemark_block::{BlockCount, BlockIndex, Extent, Geometry, Sequence};

pub use map::{DataPiece, ExtentMap, FrameAt};

use crate::segment::{IndexEntry, SegmentIndex, SegmentRecord};

/// Blocks of a window: 128 MiB of a volume with blocks of 4 KiB. So many that the first read of a window pays for the
/// reads near it, so few that a map of one takes at most 1 MiB and well under a millisecond once the indexes are there.
pub const WINDOW_BLOCKS: u64 = 1 << 15;

/// The window that a block lies in.
#[must_use]
pub fn window_of(geometry: Geometry, block: BlockIndex) -> Extent {
    let start = BlockIndex::new(block.get() / WINDOW_BLOCKS * WINDOW_BLOCKS);
    Extent::new(start, BlockCount::new(WINDOW_BLOCKS)).intersect(geometry.all())
}

/// All windows that touch `range`, ascending.
pub fn windows(geometry: Geometry, range: Extent) -> impl Iterator<Item = Extent> {
    let range = range.intersect(geometry.all());
    let first = range.start().get() / WINDOW_BLOCKS;
    let behind = range.end().get().div_ceil(WINDOW_BLOCKS).max(first);
    let behind = if range.is_empty() { first } else { behind };
    (first..behind).map(move |n| window_of(geometry, BlockIndex::new(n * WINDOW_BLOCKS)))
}

/// Walks all windows that segments touch, ascending, each with the records of those segments.
#[derive(Debug)]
pub struct ByWindow {
    geometry: Geometry,
    /// Those that begin behind the last window, the first of them last.
    ahead: Vec<SegmentRecord>,
    here: Vec<SegmentRecord>,
    next: BlockIndex,
}

impl ByWindow {
    /// Starts before the first window.
    #[must_use]
    pub fn new(geometry: Geometry, records: &[SegmentRecord]) -> Self {
        let mut ahead: Vec<_> = records
            .iter()
            .filter(|record| !record.blocks.is_empty())
            .copied()
            .collect();
        ahead.sort_by_key(|record| std::cmp::Reverse(record.blocks.start()));
        Self {
            geometry,
            ahead,
            here: Vec::new(),
            next: BlockIndex::ZERO,
        }
    }
}

impl Iterator for ByWindow {
    type Item = (Extent, Vec<SegmentRecord>);

    fn next(&mut self) -> Option<Self::Item> {
        let from = self.next;
        self.here.retain(|record| record.blocks.end() > from);
        let start = if self.here.is_empty() {
            self.ahead.last()?.blocks.start().max(from)
        } else {
            from
        };
        if start >= self.geometry.all().end() {
            return None;
        }
        let window = window_of(self.geometry, start);
        while let Some(record) = self
            .ahead
            .pop_if(|record| record.blocks.start() < window.end())
        {
            self.here.push(record);
        }
        self.next = window.end();
        Some((window, self.here.clone()))
    }
}

/// An entry of one of several indexes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRef {
    /// Which of the indexes, by its place among them.
    pub index: u32,
    /// Which of its entries.
    pub entry: u32,
}

/// A run of blocks that one entry holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The blocks, all of them within the entry's.
    pub blocks: Extent,
    /// The entry.
    pub source: EntryRef,
}

struct Clipped {
    sequence: Sequence,
    blocks: Extent,
    source: EntryRef,
}

/// The entries that touch the window, newest first.
fn gather<'a>(
    indexes: impl IntoIterator<Item = &'a SegmentIndex>,
    window: Extent,
    newest: Sequence,
) -> Vec<Clipped> {
    let mut clipped = Vec::new();
    for (index, at_index) in indexes.into_iter().zip(0_u32..) {
        for at in index.touching(window) {
            let entry: &IndexEntry = &index.entries()[at];
            if entry.sequence <= newest {
                clipped.push(Clipped {
                    sequence: entry.sequence,
                    blocks: entry.blocks.intersect(window),
                    source: EntryRef {
                        index: at_index,
                        entry: u32::try_from(at).unwrap_or(u32::MAX),
                    },
                });
            }
        }
    }
    clipped.sort_by(|a, b| {
        b.sequence
            .cmp(&a.sequence)
            .then(a.blocks.start().cmp(&b.blocks.start()))
    });
    clipped
}

fn place(window: Extent, block: BlockIndex) -> usize {
    usize::try_from(block.since(window.start()).get()).unwrap_or(usize::MAX)
}

/// The image of a generation in one window: ascending pieces; what no piece covers is zero. Pieces of zero entries
/// are among them.
#[must_use]
pub fn overlay<'a>(
    indexes: impl IntoIterator<Item = &'a SegmentIndex>,
    window: Extent,
    newest: Sequence,
) -> Vec<Piece> {
    const NONE: u32 = u32::MAX;
    let clipped = gather(indexes, window, newest);
    let mut owner = vec![NONE; place(window, window.end())];
    for (entry, n) in clipped.iter().zip(0_u32..) {
        for slot in
            &mut owner[place(window, entry.blocks.start())..place(window, entry.blocks.end())]
        {
            if *slot == NONE {
                *slot = n;
            }
        }
    }
    let mut pieces: Vec<Piece> = Vec::new();
    let mut last = NONE;
    for (block, &n) in window.iter().zip(&owner) {
        if n == NONE {
            last = NONE;
            continue;
        }
        if n == last
            && let Some(piece) = pieces.last_mut()
        {
            piece.blocks = Extent::between(piece.blocks.start(), block.next());
        } else {
            pieces.push(Piece {
                blocks: Extent::between(block, block.next()),
                source: clipped[n as usize].source,
            });
        }
        last = n;
    }
    pieces
}

/// The retained images of `retained` (ascending) of which a block in `range` is read from an entry that `wanted` names.
/// The indexes must be those of all segments that touch `range`.
#[must_use]
pub fn images_that_need<'a>(
    indexes: impl IntoIterator<Item = &'a SegmentIndex>,
    range: Extent,
    retained: &[Sequence],
    wanted: impl Fn(EntryRef) -> bool,
) -> BTreeSet<Sequence> {
    let newest = Sequence::new(u64::MAX);
    let clipped = gather(indexes, range, newest);
    // Of each block: the version that hides older ones.
    let mut hidden_from = vec![newest; place(range, range.end())];
    let mut needing = BTreeSet::new();
    for entry in &clipped {
        let is_wanted = wanted(entry.source);
        let first = retained.partition_point(|sequence| *sequence < entry.sequence);
        let mut done = first;
        let blocks = place(range, entry.blocks.start())..place(range, entry.blocks.end());
        for slot in &mut hidden_from[blocks] {
            let next = std::mem::replace(slot, entry.sequence);
            if !is_wanted {
                continue;
            }
            let behind = if next == newest {
                retained.len()
            } else {
                retained.partition_point(|sequence| *sequence < next)
            };
            if behind > done {
                needing.extend(&retained[done..behind]);
                done = behind;
            }
        }
    }
    needing
}

/// A run of blocks of one entry that a retained generation needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LivePiece {
    /// Blocks, entry.
    pub piece: Piece,
    /// No older version of any of the blocks is in the indexes. Where it is zero, nothing needs to say so.
    pub oldest: bool,
}

/// The pieces that are needed by a retained image, ordered by block, then the newest version first. `retained` are
/// the sequences of the retained generations, ascending.
///
/// Indexes that are left out can only make more pieces look alive, never fewer.
#[must_use]
pub fn live_pieces<'a>(
    indexes: impl IntoIterator<Item = &'a SegmentIndex>,
    window: Extent,
    retained: &[Sequence],
) -> Vec<LivePiece> {
    let newest = Sequence::new(u64::MAX);
    let clipped = gather(indexes, window, newest);
    // Of each block: the version that hides older ones, and how many versions it has.
    let mut hidden_from = vec![newest; place(window, window.end())];
    let mut last_version = vec![u32::MAX; hidden_from.len()];
    for (entry, n) in clipped.iter().zip(0_u32..) {
        for slot in &mut last_version
            [place(window, entry.blocks.start())..place(window, entry.blocks.end())]
        {
            *slot = n;
        }
    }
    let mut pieces: Vec<(Sequence, LivePiece)> = Vec::new();
    for (entry, n) in clipped.iter().zip(0_u32..) {
        // The oldest generation that can see this version is the first at or above it.
        let first = retained.partition_point(|sequence| *sequence < entry.sequence);
        let mut open = false;
        for block in entry.blocks.iter() {
            let slot = place(window, block);
            let next = std::mem::replace(&mut hidden_from[slot], entry.sequence);
            let live = retained
                .get(first)
                .is_some_and(|sequence| *sequence < next || next == newest);
            let oldest = last_version[slot] == n;
            if !live {
                open = false;
                continue;
            }
            match pieces.last_mut() {
                Some((_, last)) if open && last.oldest == oldest => {
                    last.piece.blocks = Extent::between(last.piece.blocks.start(), block.next());
                }
                _ => pieces.push((
                    entry.sequence,
                    LivePiece {
                        piece: Piece {
                            blocks: Extent::between(block, block.next()),
                            source: entry.source,
                        },
                        oldest,
                    },
                )),
            }
            open = true;
        }
    }
    pieces
        .sort_by_key(|(sequence, live)| (live.piece.blocks.start(), std::cmp::Reverse(*sequence)));
    pieces.into_iter().map(|(_, live)| live).collect()
}
