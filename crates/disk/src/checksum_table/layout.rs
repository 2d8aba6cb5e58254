//! Where the entries of a checksum table lie.

use std::ops::Range;

use tidemark_block::{
    Checksum128, Extent, Geometry,
    digest::{self, Children, FANOUT, LEAF_BLOCKS, group_count, leaf_count, leaf_of},
};

const REGION_ALIGN: u64 = 4096;
/// Bytes of an entry.
pub(super) const ENTRY: u64 = Checksum128::LEN as u64;
/// Bytes of a whole node's children.
pub(super) const CHILDREN_LEN: usize = FANOUT * Checksum128::LEN;

#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    groups_at: u64,
    pub(super) blocks_at: u64,
    pub(super) length: u64,
}

impl Layout {
    pub(super) const fn new(geometry: Geometry) -> Self {
        let groups_at = (leaf_count(geometry) * ENTRY).next_multiple_of(REGION_ALIGN);
        let blocks_at = (groups_at + group_count(geometry) * ENTRY).next_multiple_of(REGION_ALIGN);
        let length =
            (blocks_at + geometry.block_count().get() * ENTRY).next_multiple_of(REGION_ALIGN);
        Self {
            geometry,
            groups_at,
            blocks_at,
            length,
        }
    }

    /// Place and existing length of the checksums of a group's blocks.
    pub(super) fn blocks_of(self, group: u64) -> (u64, usize) {
        let extent = digest::group_extent(self.geometry, group);
        (
            self.blocks_at + extent.start().get() * ENTRY,
            bytes_of(extent.count().get()),
        )
    }

    /// The groups of a leaf that exist.
    pub(super) fn groups_in(self, leaf: u64) -> Range<u64> {
        let first = leaf * FANOUT as u64;
        let count = group_count(self.geometry)
            .saturating_sub(first)
            .min(FANOUT as u64);
        first..first + count
    }

    /// Place and existing length of the checksums of a leaf's groups.
    pub(super) fn groups_of(self, leaf: u64) -> (u64, usize) {
        let groups = self.groups_in(leaf);
        (
            self.groups_at + groups.start * ENTRY,
            bytes_of(groups.end - groups.start),
        )
    }
}

/// Bytes of a node's children, of which there are at most 32.
#[allow(clippy::cast_possible_truncation, reason = "at most 32 entries")]
const fn bytes_of(count: u64) -> usize {
    count as usize * Checksum128::LEN
}

pub(super) fn children_bytes(children: &Children) -> [u8; CHILDREN_LEN] {
    let mut bytes = [0; CHILDREN_LEN];
    for (child, place) in children.iter().zip(bytes.as_chunks_mut().0) {
        *place = *child.as_bytes();
    }
    bytes
}

/// The leaves that an extent touches.
pub(super) fn leaves_of(extent: Extent) -> impl Iterator<Item = u64> {
    let first = leaf_of(extent.start());
    let end = if extent.is_empty() {
        first
    } else {
        extent.end().get().div_ceil(LEAF_BLOCKS)
    };
    first..end
}

#[cfg(test)]
mod tests {
    use tidemark_block::{BlockSize, units::BlockIndex};

    use super::*;

    #[test]
    fn leaves_of_an_empty_extent_are_none() {
        let at = BlockIndex::new(5);
        assert_eq!(leaves_of(Extent::between(at, at)).count(), 0);
        let geometry = Geometry::new(1025 * 4096, BlockSize::MIN).unwrap();
        assert_eq!(leaves_of(geometry.all()).count(), 2);
    }
}
