//! Changes of a checksum table: blocks' checksums and what follows from them in groups and leaves.

use std::{io, os::unix::fs::FileExt};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use tidemark_block::{
    Checksum128, TableView,
    digest::{Children, FANOUT, group_checksum, group_of, leaf_of},
    units::BlockIndex,
};

use super::{
    ChecksumTable,
    layout::{ENTRY, children_bytes},
};

/// Writes each changed group and leaf once, as the blocks ascend past it.
pub(super) struct Change<'a> {
    table: &'a ChecksumTable,
    group: Option<Node>,
    leaf: Option<Node>,
    again: bool,
}

struct Node {
    number: u64,
    children: Children,
    changed: bool,
}

impl<'a> Change<'a> {
    pub(super) const fn new(table: &'a ChecksumTable, again: bool) -> Self {
        Self {
            table,
            group: None,
            leaf: None,
            again,
        }
    }

    pub(super) fn set(&mut self, block: BlockIndex, checksum: Checksum128) -> io::Result<()> {
        let number = group_of(block);
        if self
            .group
            .as_ref()
            .is_none_or(|group| group.number != number)
        {
            self.close_group()?;
            let leaf = leaf_of(block);
            if self.leaf.as_ref().is_none_or(|open| open.number != leaf) {
                self.close_leaf()?;
                let children = self.table.groups(leaf)?;
                self.leaf = Some(Node {
                    number: leaf,
                    children,
                    changed: self.again,
                });
            }
            let children = self.table.blocks(number)?;
            self.group = Some(Node {
                number,
                children,
                changed: self.again,
            });
        }
        if let Some(group) = &mut self.group {
            group.put(block.get(), checksum);
        }
        Ok(())
    }

    fn close_group(&mut self) -> io::Result<()> {
        let (Some(group), Some(leaf)) = (self.group.take(), &mut self.leaf) else {
            return Ok(());
        };
        if group.changed {
            let (at, length) = self.table.layout.blocks_of(group.number);
            self.table
                .file
                .write_all_at(&children_bytes(&group.children)[..length], at)?;
            let geometry = self.table.layout.geometry;
            leaf.put(
                group.number,
                group_checksum(geometry, group.number, &group.children),
            );
        }
        Ok(())
    }

    fn close_leaf(&mut self) -> io::Result<()> {
        match self.leaf.take() {
            Some(leaf) if leaf.changed => self.table.write_groups(leaf.number, &leaf.children),
            _ => Ok(()),
        }
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.close_group()?;
        self.close_leaf()
    }
}

impl Node {
    #[allow(clippy::cast_possible_truncation, reason = "below 32")]
    fn put(&mut self, child: u64, checksum: Checksum128) {
        let place = &mut self.children[(child % FANOUT as u64) as usize];
        if *place != checksum {
            *place = checksum;
            self.changed = true;
        }
    }
}

impl ChecksumTable {
    /// Computes groups and leaves anew from the checksums of the blocks: after a power loss, when what was applied
    /// since the stamp may have reached the disk in part.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn rebuild_upper_levels(&self) -> io::Result<()> {
        self.write(|| {
            self.punch(0, self.layout.blocks_at)?;
            let mut at = self.layout.blocks_at;
            loop {
                let data = match seek(&*self.file, SeekFrom::Data(at)) {
                    // Nothing but holes from here on.
                    Err(Errno::NXIO) => return Ok(()),
                    other => other?,
                };
                let hole = seek(&*self.file, SeekFrom::Hole(data))?;
                self.rebuild_leaves(data, hole)?;
                at = hole;
            }
        })
    }

    /// Rebuilds the leaves above the bytes `from..to` of the blocks' region.
    fn rebuild_leaves(&self, from: u64, to: u64) -> io::Result<()> {
        let geometry = self.layout.geometry;
        let block = |at: u64| {
            let n = (at - self.layout.blocks_at) / ENTRY;
            BlockIndex::new(n.min(geometry.block_count().get() - 1))
        };
        for leaf in leaf_of(block(from))..=leaf_of(block(to - 1)) {
            let mut children = Children::default();
            for (group, child) in self.layout.groups_in(leaf).zip(&mut children) {
                *child = group_checksum(geometry, group, &self.blocks(group)?);
            }
            self.write_groups(leaf, &children)?;
        }
        Ok(())
    }
}
