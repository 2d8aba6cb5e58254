//! Whether a checksum table is whole: what lies in it has no checksum but the tree itself.

use std::io;

use tidemark_block::{
    Extent, TableView,
    digest::{FANOUT, group_checksum, group_of, leaf_checksum},
    units::BlockIndex,
};

use super::{ChecksumTable, layout::leaves_of};

impl ChecksumTable {
    /// Whether the checksums of the extent's blocks come to what stands above them, up to the leaves; not whether the
    /// leaves come to the digest, which is for [`ChecksumTable::digest`]. The caller sees to it that nothing is applied
    /// meanwhile.
    ///
    /// # Errors
    /// Where the table can't be read.
    pub fn is_whole(&self, extent: Extent) -> io::Result<bool> {
        let geometry = self.layout.geometry;
        if extent.is_empty() {
            return Ok(true);
        }
        let last = BlockIndex::new(extent.end().get() - 1);
        let asked = group_of(extent.start())..=group_of(last);
        for leaf in leaves_of(extent) {
            let groups = self.groups(leaf)?;
            let mut found = [tidemark_block::Checksum128::ZERO];
            self.leaves(leaf, &mut found)?;
            if leaf_checksum(geometry, leaf, &groups) != found[0] {
                return Ok(false);
            }
            let first = leaf * FANOUT as u64;
            for (group, stored) in (first..).zip(&groups).filter(|(n, _)| asked.contains(n)) {
                if group_checksum(geometry, group, &self.blocks(group)?) != *stored {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
