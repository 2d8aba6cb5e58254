//! A run of adjacent blocks.

use std::fmt;

use crate::units::{BlockCount, BlockIndex};

/// A run of adjacent blocks. It has no identity of its own; an empty one has a count of 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    start: BlockIndex,
    count: BlockCount,
}

impl Extent {
    /// `count` blocks from `start` on.
    ///
    /// # Panics
    /// Where the end would not fit into 64 bits; whoever reads counts off a wire or a disk checks them first.
    #[must_use]
    pub const fn new(start: BlockIndex, count: BlockCount) -> Self {
        assert!(
            start.get().checked_add(count.get()).is_some(),
            "an extent ends within the 64-bit range"
        );
        Self { start, count }
    }

    /// The blocks from `start` up to but without `end`; empty where `end` is not greater.
    #[must_use]
    pub const fn between(start: BlockIndex, end: BlockIndex) -> Self {
        Self {
            start,
            count: BlockCount::new(end.get().saturating_sub(start.get())),
        }
    }

    /// The first block.
    #[must_use]
    pub const fn start(self) -> BlockIndex {
        self.start
    }

    /// How many blocks.
    #[must_use]
    pub const fn count(self) -> BlockCount {
        self.count
    }

    /// The block behind the last one.
    #[must_use]
    pub const fn end(self) -> BlockIndex {
        self.start.plus(self.count)
    }

    /// Whether it has no block.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.count.get() == 0
    }

    /// Whether `block` is one of its blocks.
    #[must_use]
    pub fn contains(self, block: BlockIndex) -> bool {
        self.start <= block && block < self.end()
    }

    /// The blocks that both have; empty where there are none.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }

    /// Its blocks, ascending.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = BlockIndex> + Clone {
        (self.start.get()..self.end().get()).map(BlockIndex::new)
    }

    /// Cuts it into pieces of at most `most` blocks, ascending.
    ///
    /// # Panics
    /// Where `most` is 0.
    pub fn pieces(self, most: BlockCount) -> impl Iterator<Item = Self> + Clone {
        assert!(most.get() > 0, "a piece has at least one block");
        let count = self.count.get().div_ceil(most.get());
        (0..count).map(move |n| {
            let start = BlockIndex::new(self.start.get() + n * most.get());
            let left = self.end().since(start);
            Self::new(start, left.min(most))
        })
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end())
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count.get() {
            0 => write!(f, "no block at {}", self.start),
            1 => write!(f, "block {}", self.start),
            n => write!(f, "blocks {} to {}", self.start, self.start.get() + n - 1),
        }
    }
}

/// Joins adjacent and overlapping extents of an ascending sequence.
pub fn coalesce(extents: impl IntoIterator<Item = Extent>) -> impl Iterator<Item = Extent> {
    let mut extents = extents.into_iter().filter(|extent| !extent.is_empty());
    let mut open = extents.next();
    std::iter::from_fn(move || {
        let mut run = open?;
        for extent in extents.by_ref() {
            if extent.start() > run.end() {
                open = Some(extent);
                return Some(run);
            }
            run = Extent::between(run.start(), run.end().max(extent.end()));
        }
        open = None;
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64) -> Extent {
        Extent::between(BlockIndex::new(start), BlockIndex::new(end))
    }

    #[test]
    fn pieces_cover_the_extent_once() {
        let pieces: Vec<_> = extent(5, 15).pieces(BlockCount::new(4)).collect();
        assert_eq!(pieces, [extent(5, 9), extent(9, 13), extent(13, 15)]);
        assert_eq!(extent(5, 5).pieces(BlockCount::new(4)).count(), 0);
    }

    #[test]
    fn what_does_not_overlap_intersects_in_nothing() {
        assert!(extent(1, 3).intersect(extent(3, 9)).is_empty());
        assert_eq!(extent(1, 5).intersect(extent(3, 9)), extent(3, 5));
    }

    #[test]
    fn adjacent_extents_become_one() {
        let joined: Vec<_> = coalesce([
            extent(1, 3),
            extent(3, 3),
            extent(3, 4),
            extent(6, 9),
            extent(7, 8),
        ])
        .collect();
        assert_eq!(joined, [extent(1, 4), extent(6, 9)]);
        assert_eq!(coalesce([]).count(), 0);
    }
}
