//! The image digest: a tree over the block checksums of a whole volume.
//!
//! ```text
//! root   = XXH3-128("TMDIGEST" ‖ version u32 ‖ block size u32 ‖ length u64 ‖ every leaf)
//! leaf   = H(its groups, up to 32)      4 MiB of a volume with blocks of 4 KiB
//! group  = H(its blocks, up to 32)    128 KiB
//! block  = XXH3-128 of its bytes, 0 where all are zero
//! H(children) = XXH3-128 of the children's 16 bytes each, 0 where all children are 0
//! ```
//!
//! The last group and the last leaf hash only the children that exist. A change costs its groups, its leaves and
//! the root, which reads 4 MiB of leaves per TiB. Both sides compute the digest of an interval's image from their
//! checksum table, which still holds the base generation, and the interval's checksums in ascending order
//! ([`DigestUpdate`]): nothing is applied to a table before the generation is durable.

use std::{collections::BTreeMap, convert::Infallible, fmt};

use xxhash_rust::xxh3::Xxh3;

use crate::{
    checksum::{Checksum128, block_checksum},
    extent::Extent,
    geometry::Geometry,
    units::{BlockCount, BlockIndex},
};

/// Children of a group and of a leaf.
pub const FANOUT: usize = 32;
/// Blocks below a leaf.
pub const LEAF_BLOCKS: u64 = (FANOUT * FANOUT) as u64;
const GROUP_BLOCKS: u64 = FANOUT as u64;
const ROOT_MAGIC: &[u8; 8] = b"TMDIGEST";
const ROOT_VERSION: u32 = 1;
/// Leaves read from a table at a time while the root is computed.
const LEAVES_AT_ONCE: usize = 4096;

/// The digest of a whole image.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImageDigest([u8; 16]);

impl ImageDigest {
    /// Wraps stored bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes to store.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Checksum128::from_bytes(self.0).fmt(f)
    }
}

impl fmt::Debug for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageDigest({self})")
    }
}

/// The number of groups of a volume.
#[must_use]
pub const fn group_count(geometry: Geometry) -> u64 {
    geometry.block_count().get().div_ceil(GROUP_BLOCKS)
}

/// The number of leaves of a volume.
#[must_use]
pub const fn leaf_count(geometry: Geometry) -> u64 {
    geometry.block_count().get().div_ceil(LEAF_BLOCKS)
}

/// The blocks of a group.
#[must_use]
pub fn group_extent(geometry: Geometry, group: u64) -> Extent {
    let start = BlockIndex::new(group * GROUP_BLOCKS);
    Extent::new(start, BlockCount::new(GROUP_BLOCKS)).intersect(geometry.all())
}

/// The blocks below a leaf.
#[must_use]
pub fn leaf_extent(geometry: Geometry, leaf: u64) -> Extent {
    let start = BlockIndex::new(leaf * LEAF_BLOCKS);
    Extent::new(start, BlockCount::new(LEAF_BLOCKS)).intersect(geometry.all())
}

/// The group that a block belongs to.
#[must_use]
pub const fn group_of(block: BlockIndex) -> u64 {
    block.get() / GROUP_BLOCKS
}

/// The leaf that a block belongs to.
#[must_use]
pub const fn leaf_of(block: BlockIndex) -> u64 {
    block.get() / LEAF_BLOCKS
}

/// The children of one node; those that don't exist are zero.
pub type Children = [Checksum128; FANOUT];

/// A checksum table, as far as a digest needs it. Nodes that were never written are zero.
pub trait TableView {
    /// Why a table can't be read.
    type Error;

    /// The shape of the volume.
    fn geometry(&self) -> Geometry;

    /// The leaves from `first` on; `leaves` must not reach past the last one.
    ///
    /// # Errors
    /// Where the table can't be read.
    fn leaves(&self, first: u64, leaves: &mut [Checksum128]) -> Result<(), Self::Error>;

    /// The groups of a leaf.
    ///
    /// # Errors
    /// Where the table can't be read.
    fn groups(&self, leaf: u64) -> Result<Children, Self::Error>;

    /// The blocks of a group.
    ///
    /// # Errors
    /// Where the table can't be read.
    fn blocks(&self, group: u64) -> Result<Children, Self::Error>;
}

/// The checksum of a group, from those of its blocks.
#[must_use]
pub fn group_checksum(geometry: Geometry, group: u64, blocks: &Children) -> Checksum128 {
    node_checksum(blocks, group_extent(geometry, group).count().get())
}

/// The checksum of a leaf, from those of its groups.
#[must_use]
pub fn leaf_checksum(geometry: Geometry, leaf: u64, groups: &Children) -> Checksum128 {
    let first = leaf * FANOUT as u64;
    node_checksum(groups, group_count(geometry).saturating_sub(first))
}

fn node_checksum(children: &Children, count: u64) -> Checksum128 {
    let mut bytes = [0; FANOUT * Checksum128::LEN];
    for (child, place) in children
        .iter()
        .zip(bytes.chunks_exact_mut(Checksum128::LEN))
    {
        place.copy_from_slice(child.as_bytes());
    }
    let count = usize::try_from(count).unwrap_or(FANOUT).min(FANOUT);
    block_checksum(&bytes[..count * Checksum128::LEN])
}

/// The digest of an image whose table is `view`.
///
/// # Errors
/// Where the table can't be read.
pub fn image_digest<V: TableView>(view: &V) -> Result<ImageDigest, V::Error> {
    root(view, &BTreeMap::new())
}

fn root<V: TableView>(
    view: &V,
    changed: &BTreeMap<u64, Checksum128>,
) -> Result<ImageDigest, V::Error> {
    let geometry = view.geometry();
    let mut hash = Xxh3::new();
    hash.update(ROOT_MAGIC);
    hash.update(&ROOT_VERSION.to_le_bytes());
    hash.update(&geometry.block_size().get().to_le_bytes());
    hash.update(&geometry.length().to_le_bytes());
    let count = leaf_count(geometry);
    let mut buffer = vec![Checksum128::ZERO; LEAVES_AT_ONCE];
    let mut first = 0;
    while first < count {
        let wanted =
            usize::try_from(count - first).map_or(LEAVES_AT_ONCE, |n| n.min(LEAVES_AT_ONCE));
        let leaves = &mut buffer[..wanted];
        view.leaves(first, leaves)?;
        let end = first + wanted as u64;
        for (&leaf, &checksum) in changed.range(first..end) {
            if let Ok(at) = usize::try_from(leaf - first) {
                leaves[at] = checksum;
            }
        }
        leaves.iter().for_each(|leaf| hash.update(leaf.as_bytes()));
        first = end;
    }
    Ok(ImageDigest(hash.digest128().to_le_bytes()))
}

/// Computes the digest of "this table, with these blocks changed" without touching the table.
///
/// Blocks are pushed in ascending order. Memory: 16 bytes (and a map's overhead) per changed leaf.
#[derive(Debug, Clone)]
pub struct DigestUpdate {
    geometry: Geometry,
    changed: BTreeMap<u64, Checksum128>,
    leaf: Option<(u64, Children)>,
    group: Option<(u64, Children)>,
    next: BlockIndex,
}

impl DigestUpdate {
    /// Starts without changes.
    #[must_use]
    pub const fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            changed: BTreeMap::new(),
            leaf: None,
            group: None,
            next: BlockIndex::ZERO,
        }
    }

    /// The block below which nothing may be pushed any more.
    #[must_use]
    pub const fn next(&self) -> BlockIndex {
        self.next
    }

    /// Says that `block` now has this checksum.
    ///
    /// # Errors
    /// Where the table can't be read.
    ///
    /// # Panics
    /// Where `block` isn't greater than every block before it, or lies outside the volume.
    pub fn push<V: TableView>(
        &mut self,
        view: &V,
        block: BlockIndex,
        checksum: Checksum128,
    ) -> Result<(), V::Error> {
        assert!(
            self.next <= block && self.geometry.all().contains(block),
            "blocks are pushed in ascending order within the volume"
        );
        let (group, leaf) = (group_of(block), leaf_of(block));
        if self.group.is_none_or(|(open, _)| open != group) {
            self.close_group();
            if self.leaf.is_none_or(|(open, _)| open != leaf) {
                self.close_leaf();
                self.leaf = Some((leaf, groups_of(view, leaf)?));
            }
            let known_zero = self
                .leaf
                .is_some_and(|(_, groups)| groups[child(group)].is_zero());
            let blocks = if known_zero {
                Children::default()
            } else {
                view.blocks(group)?
            };
            self.group = Some((group, blocks));
        }
        if let Some((_, blocks)) = &mut self.group {
            blocks[child(block.get())] = checksum;
        }
        self.next = block.next();
        Ok(())
    }

    /// Says that every block of `extent` is zero now. Whole leaves cost no reading.
    ///
    /// # Errors
    /// Where the table can't be read.
    ///
    /// # Panics
    /// As [`Self::push`].
    pub fn push_zero<V: TableView>(&mut self, view: &V, extent: Extent) -> Result<(), V::Error> {
        let mut at = extent.start();
        while at < extent.end() {
            let leaf = leaf_of(at);
            let whole = leaf_extent(self.geometry, leaf);
            if at == whole.start() && whole.end() <= extent.end() {
                assert!(
                    self.next <= at && self.geometry.all().contains(at),
                    "blocks are pushed in ascending order within the volume"
                );
                self.close_group();
                self.close_leaf();
                self.changed.insert(leaf, Checksum128::ZERO);
                at = whole.end();
                self.next = at;
            } else {
                self.push(view, at, Checksum128::ZERO)?;
                at = at.next();
            }
        }
        Ok(())
    }

    /// The digest of the image with every change pushed so far.
    ///
    /// # Errors
    /// Where the table can't be read.
    pub fn finish<V: TableView>(mut self, view: &V) -> Result<ImageDigest, V::Error> {
        self.close_group();
        self.close_leaf();
        root(view, &self.changed)
    }

    fn close_group(&mut self) {
        if let (Some((group, blocks)), Some((_, groups))) = (self.group.take(), &mut self.leaf) {
            groups[child(group)] = group_checksum(self.geometry, group, &blocks);
        }
    }

    fn close_leaf(&mut self) {
        if let Some((leaf, groups)) = self.leaf.take() {
            self.changed
                .insert(leaf, leaf_checksum(self.geometry, leaf, &groups));
        }
    }
}

/// The groups of a leaf. Those of a zero leaf are zero: in a sparse volume most changed blocks need no reading then,
/// which is what makes them cost the same at any volume size.
fn groups_of<V: TableView>(view: &V, leaf: u64) -> Result<Children, V::Error> {
    let mut own = [Checksum128::ZERO];
    view.leaves(leaf, &mut own)?;
    if own[0].is_zero() {
        return Ok(Children::default());
    }
    view.groups(leaf)
}

/// The place of a node among its parent's children.
#[allow(clippy::cast_possible_truncation, reason = "below 32")]
const fn child(node: u64) -> usize {
    (node % FANOUT as u64) as usize
}

/// A checksum table in memory, computed from its blocks on each reading: the model that others are tested against.
#[derive(Debug, Clone)]
pub struct MemoryTable {
    geometry: Geometry,
    blocks: BTreeMap<BlockIndex, Checksum128>,
}

impl MemoryTable {
    /// The table of an all-zero image.
    #[must_use]
    pub const fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            blocks: BTreeMap::new(),
        }
    }

    /// The table of an image, whose length must be that of `geometry`.
    #[must_use]
    pub fn of_image(geometry: Geometry, image: &[u8]) -> Self {
        let mut table = Self::new(geometry);
        for (block, bytes) in geometry
            .all()
            .iter()
            .zip(image.chunks(geometry.block_size().as_usize()))
        {
            table.set(block, block_checksum(bytes));
        }
        table
    }

    /// The checksum of a block.
    #[must_use]
    pub fn get(&self, block: BlockIndex) -> Checksum128 {
        self.blocks.get(&block).copied().unwrap_or_default()
    }

    /// Changes the checksum of a block.
    pub fn set(&mut self, block: BlockIndex, checksum: Checksum128) {
        if checksum.is_zero() {
            self.blocks.remove(&block);
        } else {
            self.blocks.insert(block, checksum);
        }
    }

    fn group(&self, group: u64) -> Checksum128 {
        let Ok(blocks) = self.blocks(group);
        group_checksum(self.geometry, group, &blocks)
    }
}

impl TableView for MemoryTable {
    type Error = Infallible;

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn leaves(&self, first: u64, leaves: &mut [Checksum128]) -> Result<(), Infallible> {
        for (leaf, place) in (first..).zip(leaves) {
            *place = leaf_checksum(self.geometry, leaf, &self.groups(leaf)?);
        }
        Ok(())
    }

    fn groups(&self, leaf: u64) -> Result<Children, Infallible> {
        Ok(std::array::from_fn(|n| {
            self.group(leaf * FANOUT as u64 + n as u64)
        }))
    }

    fn blocks(&self, group: u64) -> Result<Children, Infallible> {
        Ok(std::array::from_fn(|n| {
            self.get(BlockIndex::new(group * GROUP_BLOCKS + n as u64))
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::geometry::BlockSize;

    fn geometry(blocks: u64) -> Geometry {
        Geometry::new(blocks * 4096, BlockSize::MIN).unwrap()
    }

    fn sum(n: u64) -> Checksum128 {
        if n == 0 {
            Checksum128::ZERO
        } else {
            crate::xxh3_128(&n.to_le_bytes())
        }
    }

    fn digest(table: &MemoryTable) -> ImageDigest {
        let Ok(digest) = image_digest(table);
        digest
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn updating_gives_the_digest_of_the_changed_image(
            count in prop_oneof![1..70u64, 1000..3100u64],
            base in prop::collection::btree_map(0..3100u64, 0..5u64, 0..40),
            changes in prop::collection::btree_map(0..3100u64, 0..5u64, 0..40),
            zero in (0..3100u64, 0..3100u64),
        ) {
            let g = geometry(count);
            let mut table = MemoryTable::new(g);
            for (&block, &n) in base.iter().filter(|(block, _)| **block < count) {
                table.set(BlockIndex::new(block), sum(n));
            }
            let mut after = table.clone();
            let mut update = DigestUpdate::new(g);
            let zero = Extent::between(
                BlockIndex::new(zero.0.min(count)),
                BlockIndex::new(zero.1.min(count)),
            );
            let mut zeroed = false;
            for (&block, &n) in changes.iter().filter(|(block, _)| **block < count) {
                let block = BlockIndex::new(block);
                if zero.contains(block) {
                    continue;
                }
                if block >= zero.end() && !zeroed {
                    let Ok(()) = update.push_zero(&table, zero);
                    zeroed = true;
                }
                let Ok(()) = update.push(&table, block, sum(n));
                after.set(block, sum(n));
            }
            if !zeroed && update.next() <= zero.start() {
                let Ok(()) = update.push_zero(&table, zero);
                zeroed = true;
            }
            if zeroed {
                zero.iter().for_each(|block| after.set(block, Checksum128::ZERO));
            }
            let Ok(updated) = update.finish(&table);
            prop_assert_eq!(updated, digest(&after));
        }
    }

    #[test]
    fn length_and_block_size_are_part_of_the_digest() {
        let a = digest(&MemoryTable::new(geometry(32)));
        let b = digest(&MemoryTable::new(geometry(33)));
        let c = digest(&MemoryTable::new(
            Geometry::new(32 * 4096, BlockSize::new(8192).unwrap()).unwrap(),
        ));
        assert!(a != b && a != c && b != c);
    }

    #[test]
    fn a_block_moved_to_the_next_place_changes_the_digest() {
        let mut a = MemoryTable::new(geometry(2048));
        let mut b = a.clone();
        a.set(BlockIndex::new(1023), sum(1));
        b.set(BlockIndex::new(1024), sum(1));
        assert_ne!(digest(&a), digest(&b));
    }

    #[test]
    fn the_digest_stays_what_version_1_computes() {
        let mut table = MemoryTable::new(geometry(1500));
        for block in [0, 31, 32, 1023, 1024, 1499] {
            table.set(BlockIndex::new(block), sum(block + 1));
        }
        insta::assert_snapshot!(digest(&table).to_string(), @"37a1311e2540ca415093dcf6e3d1730b");
        insta::assert_snapshot!(digest(&MemoryTable::new(geometry(1500))).to_string(), @"055b80dd29bfd6ba45e71f6f06ed9a91");
    }

    /// Counts what is read below the leaves.
    struct Counting {
        table: MemoryTable,
        below: std::cell::Cell<u32>,
    }

    impl TableView for Counting {
        type Error = Infallible;

        fn geometry(&self) -> Geometry {
            self.table.geometry()
        }

        fn leaves(&self, first: u64, leaves: &mut [Checksum128]) -> Result<(), Infallible> {
            self.table.leaves(first, leaves)
        }

        fn groups(&self, leaf: u64) -> Result<Children, Infallible> {
            self.below.set(self.below.get() + 1);
            self.table.groups(leaf)
        }

        fn blocks(&self, group: u64) -> Result<Children, Infallible> {
            self.below.set(self.below.get() + 1);
            self.table.blocks(group)
        }
    }

    #[test]
    fn a_change_of_what_was_zero_reads_only_what_is_not() {
        let geometry = geometry(4 * LEAF_BLOCKS);
        let mut table = MemoryTable::new(geometry);
        let other = BlockIndex::new(2 * LEAF_BLOCKS + 40);
        table.set(other, sum(9));
        let view = Counting {
            table: table.clone(),
            below: std::cell::Cell::new(0),
        };
        // In a zero leaf, in a zero group beside another one, in that one.
        for (block, reads) in [(5, 0), (2 * LEAF_BLOCKS, 1), (2 * LEAF_BLOCKS + 41, 2)] {
            let block = BlockIndex::new(block);
            view.below.set(0);
            let mut update = DigestUpdate::new(geometry);
            update.push(&view, block, sum(1)).unwrap();
            assert_eq!(view.below.get(), reads, "{block}");
            let mut changed = table.clone();
            changed.set(block, sum(1));
            let Ok(digest_of_update) = update.finish(&view);
            assert_eq!(digest_of_update, digest(&changed));
        }
    }
}
