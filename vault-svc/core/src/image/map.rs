//! Where the blocks of one window of a generation are: the overlay of its segments, in few bytes.

use std::{collections::HashMap, ops::Range};

use tidemark_block::{BlockCount, BlockIndex, Extent, SegmentId, Sequence};

use super::{WINDOW_BLOCKS, overlay};
use crate::segment::SegmentIndex;

/// A frame in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameAt {
    /// The segment.
    pub segment: SegmentId,
    /// Where the frame begins, from the start of the object.
    pub at: u64,
    /// Its bytes.
    pub len: u32,
    /// Blocks of the whole frame.
    pub blocks: u16,
}

impl FrameAt {
    /// Its bytes in the object.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.at..self.at + u64::from(self.len)
    }
}

/// A run of blocks with data, and the frame that holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataPiece {
    /// The blocks.
    pub blocks: Extent,
    /// The frame.
    pub frame: FrameAt,
    /// The place of the first of these blocks among the frame's.
    pub first: u16,
}

impl DataPiece {
    /// The part of it that lies in `range`.
    #[must_use]
    pub fn clipped(&self, range: Extent) -> Option<Self> {
        let blocks = self.blocks.intersect(range);
        (!blocks.is_empty()).then(|| Self {
            blocks,
            first: self.first + small(blocks.start().since(self.blocks.start())),
            ..*self
        })
    }
}

/// The runs of blocks with data of one generation in one window. All else in the window is zero.
///
/// It takes 8 bytes per run and 24 per frame: 16 KiB where frames are full and whole, at most 1 MiB where every
/// block has a frame of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentMap {
    window: Extent,
    runs: Box<[Run]>,
    frames: Box<[Frame]>,
    segments: Box<[SegmentId]>,
}

/// Counted from the window's first block; everything fits, since a window has 2^15 blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    start: u16,
    count: u16,
    frame: u16,
    first: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Frame {
    at: u64,
    segment: u32,
    len: u32,
    blocks: u16,
}

const _: () = assert!(WINDOW_BLOCKS <= 1 << 15, "a run counts blocks in 16 bits");

fn small(count: BlockCount) -> u16 {
    u16::try_from(count.get()).expect("a window has at most 2^15 blocks")
}

impl ExtentMap {
    /// The image of a generation in one window, from the indexes of the segments of these names.
    ///
    /// # Panics
    /// Where `window` is larger than [`WINDOW_BLOCKS`].
    #[must_use]
    pub fn new(segments: &[(SegmentId, &SegmentIndex)], window: Extent, newest: Sequence) -> Self {
        let mut runs = Vec::new();
        let mut frames = Vec::new();
        let mut names = Vec::new();
        let mut frame_numbers: HashMap<(u32, u64), u16> = HashMap::new();
        let mut segment_numbers: HashMap<u32, u32> = HashMap::new();
        let indexes = segments.iter().map(|(_, index)| *index);
        for piece in overlay(indexes, window, newest) {
            let (name, index) = &segments[piece.source.index as usize];
            let entry = &index.entries()[piece.source.entry as usize];
            if entry.zero {
                continue;
            }
            let key = (piece.source.index, entry.frame_at);
            let frame = *frame_numbers.entry(key).or_insert_with(|| {
                let segment = *segment_numbers
                    .entry(piece.source.index)
                    .or_insert_with(|| {
                        names.push(*name);
                        number(names.len() - 1)
                    });
                frames.push(Frame {
                    at: entry.frame_at,
                    segment,
                    len: entry.frame_len,
                    blocks: entry.frame_blocks,
                });
                u16::try_from(frames.len() - 1).expect("a window has no more frames than blocks")
            });
            runs.push(Run {
                start: small(piece.blocks.start().since(window.start())),
                count: small(piece.blocks.count()),
                frame,
                first: entry.first_in_frame
                    + small(piece.blocks.start().since(entry.blocks.start())),
            });
        }
        Self {
            window,
            runs: runs.into(),
            frames: frames.into(),
            segments: names.into(),
        }
    }

    /// The blocks that it describes.
    #[must_use]
    pub const fn window(&self) -> Extent {
        self.window
    }

    /// The runs with data in `range`, ascending, cut to it.
    pub fn pieces(&self, range: Extent) -> impl Iterator<Item = DataPiece> + '_ {
        let behind = |run: &Run| self.blocks(run).end() <= range.start();
        let first = self.runs.partition_point(behind);
        self.runs[first..]
            .iter()
            .take_while(move |run| self.blocks(run).start() < range.end())
            .filter_map(move |run| self.piece(run).clipped(range))
    }

    fn blocks(&self, run: &Run) -> Extent {
        let start = BlockIndex::new(self.window.start().get() + u64::from(run.start));
        Extent::new(start, BlockCount::new(run.count.into()))
    }

    fn piece(&self, run: &Run) -> DataPiece {
        let frame = self.frames[usize::from(run.frame)];
        DataPiece {
            blocks: self.blocks(run),
            frame: FrameAt {
                segment: self.segments[frame.segment as usize],
                at: frame.at,
                len: frame.len,
                blocks: frame.blocks,
            },
            first: run.first,
        }
    }

    /// Bytes of memory it takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        size_of_val(&*self.runs) + size_of_val(&*self.frames) + size_of_val(&*self.segments)
    }
}

fn number(count: usize) -> u32 {
    u32::try_from(count).expect("a window has no more segments than blocks")
}
