//! Scrub: which segments are read again next, and whether what is read is what was written.
//!
//! Every byte of a segment belongs to its header, a frame, one of the sections behind the frames, or the footer: the
//! frames that the index names must fill the object up to the index without a gap. So a segment that passes has no
//! byte that was not checked.

use std::collections::{BTreeMap, HashSet};

use thiserror::Error;
use tidemark_block::{Checksum128, Extent, FrameError, SegmentId, VerifiedFrame};

use crate::segment::{FRAMES_AT, SegmentIndex, SegmentRecord};

/// Chooses the segments that a pass reads next: of all that it is shown, the `most` first ones behind `after` in the
/// order of a pass that begins at `start`, goes up by name, and goes on with the lowest name.
///
/// Names are random, so wherever passes begin, and however often they are cut short, every segment has its turn. What
/// is in the manifest throughout a pass is read by it; what comes or goes meanwhile may be.
#[derive(Debug)]
pub struct NextSegments {
    start: SegmentId,
    behind: Option<(bool, SegmentId)>,
    most: usize,
    next: BTreeMap<(bool, SegmentId), SegmentRecord>,
}

impl NextSegments {
    /// Nothing is chosen yet.
    #[must_use]
    pub fn new(start: SegmentId, after: Option<SegmentId>, most: usize) -> Self {
        Self {
            start,
            behind: after.map(|id| (id < start, id)),
            most,
            next: BTreeMap::new(),
        }
    }

    /// Shows it a segment, in any order.
    pub fn offer(&mut self, record: SegmentRecord) {
        let place = (record.id < self.start, record.id);
        if Some(place) > self.behind {
            self.next.insert(place, record);
            if self.next.len() > self.most {
                self.next.pop_last();
            }
        }
    }

    /// Those that were chosen, in the order of the pass; none where it is at its end.
    #[must_use]
    pub fn chosen(self) -> Vec<SegmentRecord> {
        self.next.into_values().collect()
    }
}

/// What is wrong with a segment whose sections are each sound.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SegmentError {
    /// Bytes that no index entry accounts for, or that two do.
    #[error("its frames don't lie one behind the other: byte {at} is not where one begins")]
    Gap {
        /// Where a frame should begin, or the index.
        at: u64,
    },
    /// A frame can't be decoded.
    #[error("its frame at byte {at}: {error}")]
    Frame {
        /// Where the frame begins.
        at: u64,
        /// In what way.
        error: FrameError,
    },
    /// A frame is sound, and isn't the one that the index or the checksum section describes.
    #[error("its frame at byte {at} is not what its {section} says")]
    Contradicted {
        /// Where the frame begins.
        at: u64,
        /// `index` or `checksum section`.
        section: &'static str,
    },
}

impl SegmentError {
    /// The frame that can't be read, if it is one.
    #[must_use]
    pub const fn frame(&self) -> Option<u64> {
        match *self {
            Self::Gap { .. } => None,
            Self::Frame { at, .. } | Self::Contradicted { at, .. } => Some(at),
        }
    }
}

/// A frame as the index describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexedFrame {
    /// Where it begins, from the start of the object.
    pub at: u64,
    /// Its bytes.
    pub len: u32,
    first: usize,
    entries: usize,
}

impl IndexedFrame {
    /// The byte behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.at + u64::from(self.len)
    }
}

/// The frames of a segment, in the order in which they lie in the object.
#[derive(Debug)]
pub struct SegmentFrames<'a> {
    index: &'a SegmentIndex,
    checksums: Option<&'a [Checksum128]>,
    /// Places of the entries with data, by frame.
    by_frame: Vec<u32>,
    frames: Vec<IndexedFrame>,
}

impl<'a> SegmentFrames<'a> {
    /// Sorts the entries of a decoded index by frame. `checksums` is the decoded checksum section, where it is sound.
    ///
    /// # Errors
    /// [`SegmentError::Gap`].
    pub fn new(
        record: &SegmentRecord,
        index: &'a SegmentIndex,
        checksums: Option<&'a [Checksum128]>,
    ) -> Result<Self, SegmentError> {
        let entries = index.entries();
        let mut by_frame: Vec<u32> = (0_u32..)
            .zip(entries)
            .filter(|(_, entry)| !entry.zero)
            .map(|(place, _)| place)
            .collect();
        let entry = |place: &u32| &entries[*place as usize];
        by_frame.sort_unstable_by_key(|place| (entry(place).frame_at, entry(place).first_in_frame));
        let mut frames = Vec::new();
        let mut first = 0;
        let mut behind = FRAMES_AT;
        for group in by_frame.chunk_by(|a, b| entry(a).frame_at == entry(b).frame_at) {
            let frame = IndexedFrame {
                at: entry(&group[0]).frame_at,
                len: entry(&group[0]).frame_len,
                first,
                entries: group.len(),
            };
            if frame.at != behind {
                return Err(SegmentError::Gap { at: behind });
            }
            behind = frame.end();
            first += group.len();
            frames.push(frame);
        }
        if behind != record.index_at {
            return Err(SegmentError::Gap { at: behind });
        }
        Ok(Self {
            index,
            checksums,
            by_frame,
            frames,
        })
    }

    /// The frames, ascending, without a gap between the header and the index.
    #[must_use]
    pub fn frames(&self) -> &[IndexedFrame] {
        &self.frames
    }

    /// The blocks of which one of these frames, by where they begin, holds a version.
    pub fn blocks_of<'f>(&'f self, frames: &'f HashSet<u64>) -> impl Iterator<Item = Extent> + 'f {
        let entries = self.by_frame.iter();
        entries
            .map(|place| &self.index.entries()[*place as usize])
            .filter(|entry| frames.contains(&entry.frame_at))
            .map(|entry| entry.blocks)
    }

    fn places(&self, frame: &IndexedFrame) -> &[u32] {
        &self.by_frame[frame.first..frame.first + frame.entries]
    }

    /// Compares a frame whose own checksums are right with what index and checksum section say of it.
    ///
    /// # Errors
    /// [`SegmentError::Contradicted`].
    pub fn check(&self, frame: &IndexedFrame, found: &VerifiedFrame) -> Result<(), SegmentError> {
        let contradicted = |section| SegmentError::Contradicted {
            at: frame.at,
            section,
        };
        let blocks: Vec<_> = found
            .blocks()
            .map(|block| (block.block(), block.checksum()))
            .collect();
        let mut covered = 0;
        for place in self.places(frame) {
            let entry = &self.index.entries()[*place as usize];
            let from = usize::from(entry.first_in_frame);
            let wanted = self.index.checksums_of(*place as usize);
            let fits = from == covered
                && usize::from(entry.frame_blocks) == blocks.len()
                && entry.frame_len as usize == found.encoded().len();
            covered += wanted.len();
            let (true, Some(here)) = (fits, blocks.get(from..covered)) else {
                return Err(contradicted("index"));
            };
            if !here.iter().map(|(block, _)| *block).eq(entry.blocks.iter()) {
                return Err(contradicted("index"));
            }
            let stored = self.checksums.map(|checksums| &checksums[wanted]);
            if stored.is_some_and(|stored| !here.iter().map(|(_, sum)| sum).eq(stored)) {
                return Err(contradicted("checksum section"));
            }
        }
        if covered == blocks.len() {
            Ok(())
        } else {
            Err(contradicted("index"))
        }
    }
}
