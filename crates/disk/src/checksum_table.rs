//! The checksum table of a volume, as a sparse file.
//!
//! It is a cache: the checksums of every block of one generation, with the groups and leaves above them (see
//! `tidemark_block::digest`). Beside it lies its stamp, the generation that is guaranteed applied. What is applied
//! later reaches the disk in any order, or not at all, until [`ChecksumTable::sync_and_stamp`] has returned; whoever
//! opens a table applies every generation after its stamp again, or compares it with the vault's.
//!
//! | region | begins at | entry |
//! |---|---|---|
//! | leaves | 0 | 16 bytes each |
//! | groups | next multiple of 4096 | 16 bytes each |
//! | blocks | next multiple of 4096 | 16 bytes each |
//!
//! The stamp, a sealed record (`TMTABSTP`, version 1): volume 16 bytes, length u64, block size u32, generation u64.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::Errno,
};
use thiserror::Error;
use tidemark_block::{
    Checksum128, Extent, GenerationId, Geometry, ImageDigest, TableView, VolumeId,
    digest::{
        self, Children, FANOUT, LEAF_BLOCKS, group_checksum, group_count, group_of, leaf_checksum,
        leaf_count, leaf_of,
    },
    units::BlockIndex,
    wire::{Reader, WireError},
};

use crate::{
    durable,
    guarded_map::VolumeMap,
    record::{self, RecordError},
};

const STAMP_MAGIC: [u8; 8] = *b"TMTABSTP";
const STAMP_VERSION: u16 = 1;
const REGION_ALIGN: u64 = 4096;
const ENTRY: u64 = Checksum128::LEN as u64;
const CHILDREN_LEN: usize = FANOUT * Checksum128::LEN;

/// Why a checksum table can't be used. Each is mended by creating it anew and comparing it with the vault's.
#[derive(Debug, Error)]
pub enum TableError {
    /// There is none.
    #[error("there is no checksum table at {0}")]
    Missing(PathBuf),
    /// It belongs to another volume, or to one of another shape.
    #[error("the checksum table at {0} is that of another volume")]
    Foreign(PathBuf),
    /// Its stamp is damaged or from a later release.
    #[error("the checksum table's stamp: {0}")]
    Stamp(#[from] RecordError),
    /// A file of it can't be opened, read or written.
    #[error("the checksum table: {0}")]
    Io(#[from] io::Error),
}

/// The checksum table of one volume.
#[derive(Debug)]
pub struct ChecksumTable {
    path: PathBuf,
    volume: VolumeId,
    layout: Layout,
    file: Arc<File>,
    map: VolumeMap,
    stamp: AtomicU64,
    poisoned: AtomicBool,
    writer: Mutex<()>,
}

#[derive(Debug, Clone, Copy)]
struct Layout {
    geometry: Geometry,
    groups_at: u64,
    blocks_at: u64,
    length: u64,
}

impl Layout {
    const fn new(geometry: Geometry) -> Self {
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
    fn blocks_of(self, group: u64) -> (u64, usize) {
        let extent = digest::group_extent(self.geometry, group);
        (
            self.blocks_at + extent.start().get() * ENTRY,
            bytes_of(extent.count().get()),
        )
    }

    /// Place and existing length of the checksums of a leaf's groups.
    fn groups_of(self, leaf: u64) -> (u64, usize) {
        let first = leaf * FANOUT as u64;
        let count = group_count(self.geometry)
            .saturating_sub(first)
            .min(FANOUT as u64);
        (self.groups_at + first * ENTRY, bytes_of(count))
    }
}

/// Bytes of a node's children, of which there are at most 32.
#[allow(clippy::cast_possible_truncation, reason = "at most 32 entries")]
const fn bytes_of(count: u64) -> usize {
    count as usize * Checksum128::LEN
}

impl ChecksumTable {
    /// Creates the table of the all-zero image, in place of whatever is at `path`, stamped with generation 0.
    ///
    /// # Errors
    /// Where its files can't be created.
    pub fn create(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self, TableError> {
        durable::remove_file(&stamp_path(path))?;
        durable::remove_file(path)?;
        let layout = Layout::new(geometry);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.set_len(layout.length)?;
        file.sync_all()?;
        let table = Self::assemble(path, volume, layout, file, GenerationId::ZERO);
        table.write_stamp(GenerationId::ZERO)?;
        Ok(table)
    }

    /// Opens the table of a volume.
    ///
    /// # Errors
    /// Where there is none, or it is damaged or another volume's: create it anew then.
    pub fn open(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self, TableError> {
        let Some((_, payload)) = record::read(&stamp_path(path), STAMP_MAGIC, STAMP_VERSION)?
        else {
            return Err(TableError::Missing(path.to_owned()));
        };
        let stamp = read_stamp(&payload).map_err(RecordError::Damaged)?;
        let layout = Layout::new(geometry);
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TableError::Missing(path.to_owned()));
            }
            other => other?,
        };
        let ours = (volume, geometry.length(), geometry.block_size().get());
        if (stamp.volume, stamp.length, stamp.block_size) != ours
            || file.metadata()?.len() != layout.length
        {
            return Err(TableError::Foreign(path.to_owned()));
        }
        Ok(Self::assemble(path, volume, layout, file, stamp.generation))
    }

    fn assemble(
        path: &Path,
        volume: VolumeId,
        layout: Layout,
        file: File,
        stamp: GenerationId,
    ) -> Self {
        let file = Arc::new(file);
        Self {
            path: path.to_owned(),
            volume,
            layout,
            map: VolumeMap::new(Arc::clone(&file), layout.length),
            file,
            stamp: AtomicU64::new(stamp.get()),
            poisoned: AtomicBool::new(false),
            writer: Mutex::new(()),
        }
    }

    /// The generation that is guaranteed applied; 0 for the all-zero image.
    #[must_use]
    pub fn stamp(&self) -> GenerationId {
        GenerationId::new(self.stamp.load(Ordering::Acquire))
    }

    /// Whether a failed write has made it refuse all use: open it again.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// The digest of the image that the table describes.
    ///
    /// # Errors
    /// Where the table can't be read.
    pub fn digest(&self) -> io::Result<ImageDigest> {
        digest::image_digest(self)
    }

    /// The checksum of a block of the volume.
    ///
    /// # Errors
    /// Where the table can't be read.
    pub fn block(&self, block: BlockIndex) -> io::Result<Checksum128> {
        let mut one = [Checksum128::ZERO];
        self.read_blocks(block, &mut one)?;
        Ok(one[0])
    }

    /// The checksums of the blocks from `first` on.
    ///
    /// # Errors
    /// Where the table can't be read, or `checksums` reaches past the volume's end.
    pub fn read_blocks(&self, first: BlockIndex, checksums: &mut [Checksum128]) -> io::Result<()> {
        self.read_entries(self.layout.blocks_at + first.get() * ENTRY, checksums)
    }

    /// Applies checksums of blocks, in ascending order, and what follows from them in groups and leaves. The caller
    /// sees to it that no digest is computed meanwhile.
    ///
    /// # Errors
    /// Where the table can't be read or written: it then refuses all use until it is opened again.
    pub fn apply(
        &self,
        checksums: impl IntoIterator<Item = (BlockIndex, Checksum128)>,
    ) -> io::Result<()> {
        self.apply_with(checksums, false)
    }

    /// As [`Self::apply`], after a crash in the middle of the same: groups and leaves are written also where the
    /// blocks have these checksums already.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn reapply(
        &self,
        checksums: impl IntoIterator<Item = (BlockIndex, Checksum128)>,
    ) -> io::Result<()> {
        self.apply_with(checksums, true)
    }

    fn apply_with(
        &self,
        checksums: impl IntoIterator<Item = (BlockIndex, Checksum128)>,
        again: bool,
    ) -> io::Result<()> {
        self.write(|| {
            let mut change = Change::new(self, again);
            for (block, checksum) in checksums {
                change.set(block, checksum)?;
            }
            change.finish()
        })
    }

    /// Applies "these blocks are zero". Whole leaves that were zero before cost one look.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_zero(&self, extent: Extent) -> io::Result<()> {
        self.apply_zero_with(extent, false)
    }

    /// As [`Self::apply_zero`], after a crash in the middle of the same.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn reapply_zero(&self, extent: Extent) -> io::Result<()> {
        self.apply_zero_with(extent, true)
    }

    fn apply_zero_with(&self, extent: Extent, again: bool) -> io::Result<()> {
        self.write(|| {
            for leaf in leaves_of(extent) {
                let whole = digest::leaf_extent(self.layout.geometry, leaf);
                let part = whole.intersect(extent);
                if part == whole {
                    self.zero_leaf(leaf, whole, again)?;
                } else {
                    let mut change = Change::new(self, again);
                    part.iter()
                        .try_for_each(|block| change.set(block, Checksum128::ZERO))?;
                    change.finish()?;
                }
            }
            Ok(())
        })
    }

    /// `again`: a zero leaf proves nothing, since the blocks below it may not have reached the disk.
    fn zero_leaf(&self, leaf: u64, whole: Extent, again: bool) -> io::Result<()> {
        let mut old = [Checksum128::ZERO];
        self.leaves(leaf, &mut old)?;
        if old[0].is_zero() && !again {
            return Ok(());
        }
        let at = self.layout.blocks_at + whole.start().get() * ENTRY;
        self.punch(at, whole.count().get() * ENTRY)?;
        let (at, length) = self.layout.groups_of(leaf);
        self.file.write_all_at(&[0; CHILDREN_LEN][..length], at)?;
        self.file
            .write_all_at(Checksum128::ZERO.as_bytes(), leaf * ENTRY)
    }

    fn punch(&self, at: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*self.file, flags, at, length).or_else(|_| {
            // A filesystem without holes.
            let zeroes = [0; 4096];
            (at..at + length)
                .step_by(zeroes.len())
                .try_for_each(|at_part| {
                    let left = usize::try_from(at + length - at_part).unwrap_or(zeroes.len());
                    self.file
                        .write_all_at(&zeroes[..left.min(zeroes.len())], at_part)
                })
        })
    }

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
            let first = leaf * FANOUT as u64;
            let groups = group_count(geometry)
                .saturating_sub(first)
                .min(FANOUT as u64);
            let mut children = Children::default();
            for (group, child) in (first..first + groups).zip(&mut children) {
                *child = group_checksum(geometry, group, &self.blocks(group)?);
            }
            self.write_groups(leaf, &children)?;
        }
        Ok(())
    }

    fn write_groups(&self, leaf: u64, groups: &Children) -> io::Result<()> {
        let (at, length) = self.layout.groups_of(leaf);
        self.file
            .write_all_at(&children_bytes(groups)[..length], at)?;
        let checksum = leaf_checksum(self.layout.geometry, leaf, groups);
        self.file.write_all_at(checksum.as_bytes(), leaf * ENTRY)
    }

    /// Makes what was applied durable and then says so.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn sync_and_stamp(&self, generation: GenerationId) -> io::Result<()> {
        self.write(|| {
            self.file.sync_data()?;
            self.write_stamp(generation)
        })?;
        self.stamp.store(generation.get(), Ordering::Release);
        Ok(())
    }

    /// Removes the table's files.
    ///
    /// # Errors
    /// Where they can't be removed.
    pub fn remove(path: &Path) -> io::Result<()> {
        durable::remove_file(&stamp_path(path))?;
        durable::remove_file(path)
    }

    fn write_stamp(&self, generation: GenerationId) -> io::Result<()> {
        let geometry = self.layout.geometry;
        let mut payload = Vec::with_capacity(36);
        payload.extend_from_slice(self.volume.as_bytes());
        payload.extend_from_slice(&geometry.length().to_le_bytes());
        payload.extend_from_slice(&geometry.block_size().get().to_le_bytes());
        payload.extend_from_slice(&generation.get().to_le_bytes());
        record::write(
            &stamp_path(&self.path),
            STAMP_MAGIC,
            STAMP_VERSION,
            &payload,
        )
    }

    fn write(&self, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let _writer = self.writer.lock();
        self.check()?;
        change().inspect_err(|_| self.poisoned.store(true, Ordering::Release))
    }

    fn check(&self) -> io::Result<()> {
        if self.is_poisoned() {
            return Err(io::Error::other(
                "the checksum table refuses use after a failed write until it is opened again",
            ));
        }
        Ok(())
    }

    fn read_entries(&self, at: u64, checksums: &mut [Checksum128]) -> io::Result<()> {
        self.check()?;
        let mut buffer = [0; 4096];
        let mut at = at;
        for part in checksums.chunks_mut(buffer.len() / Checksum128::LEN) {
            let bytes = &mut buffer[..part.len() * Checksum128::LEN];
            self.map.read_into(at, bytes)?;
            at += bytes.len() as u64;
            let (entries, _) = bytes.as_chunks();
            for (entry, checksum) in entries.iter().zip(part) {
                *checksum = Checksum128::from_bytes(*entry);
            }
        }
        Ok(())
    }

    fn read_children(&self, (at, length): (u64, usize)) -> io::Result<Children> {
        let mut children = Children::default();
        self.read_entries(at, &mut children[..length / Checksum128::LEN])?;
        Ok(children)
    }
}

impl TableView for ChecksumTable {
    type Error = io::Error;

    fn geometry(&self) -> Geometry {
        self.layout.geometry
    }

    fn leaves(&self, first: u64, leaves: &mut [Checksum128]) -> io::Result<()> {
        self.read_entries(first * ENTRY, leaves)
    }

    fn groups(&self, leaf: u64) -> io::Result<Children> {
        self.read_children(self.layout.groups_of(leaf))
    }

    fn blocks(&self, group: u64) -> io::Result<Children> {
        self.read_children(self.layout.blocks_of(group))
    }
}

/// Writes each changed group and leaf once, as the blocks ascend past it.
struct Change<'a> {
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
    const fn new(table: &'a ChecksumTable, again: bool) -> Self {
        Self {
            table,
            group: None,
            leaf: None,
            again,
        }
    }

    fn set(&mut self, block: BlockIndex, checksum: Checksum128) -> io::Result<()> {
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

    fn finish(mut self) -> io::Result<()> {
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

fn children_bytes(children: &Children) -> [u8; CHILDREN_LEN] {
    let mut bytes = [0; CHILDREN_LEN];
    for (child, place) in children.iter().zip(bytes.as_chunks_mut().0) {
        *place = *child.as_bytes();
    }
    bytes
}

fn leaves_of(extent: Extent) -> impl Iterator<Item = u64> {
    let first = leaf_of(extent.start());
    let end = if extent.is_empty() {
        first
    } else {
        extent.end().get().div_ceil(LEAF_BLOCKS)
    };
    first..end
}

fn stamp_path(path: &Path) -> PathBuf {
    path.with_added_extension("stamp")
}

struct Stamp {
    volume: VolumeId,
    length: u64,
    block_size: u32,
    generation: GenerationId,
}

fn read_stamp(payload: &[u8]) -> Result<Stamp, WireError> {
    let mut reader = Reader::new(payload);
    let stamp = Stamp {
        volume: VolumeId::from_bytes(reader.array()?),
        length: reader.u64()?,
        block_size: reader.u32()?,
        generation: GenerationId::new(reader.u64()?),
    };
    reader.end()?;
    Ok(stamp)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use tidemark_block::{BlockSize, MemoryTable, xxh3_128};

    use super::*;

    const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

    fn geometry(blocks: u64) -> Geometry {
        Geometry::new(blocks * 4096, BlockSize::MIN).unwrap()
    }

    fn sum(n: u64) -> Checksum128 {
        if n == 0 {
            Checksum128::ZERO
        } else {
            xxh3_128(&n.to_le_bytes())
        }
    }

    fn model_digest(model: &MemoryTable) -> ImageDigest {
        let Ok(digest) = digest::image_digest(model);
        digest
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_table_keeps_what_is_applied_and_its_digest(
            count in prop_oneof![1..70u64, 900..5000u64],
            rounds in prop::collection::vec(
                (prop::collection::btree_map(0..5000u64, 0..4u64, 0..40), (0..5000u64, 0..5000u64)),
                1..5,
            ),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("table");
            let g = geometry(count);
            let mut model = MemoryTable::new(g);
            let mut table = ChecksumTable::create(&path, VOLUME, g).unwrap();
            for (number, (changes, zero)) in (1..).zip(rounds) {
                let changes: Vec<_> = changes
                    .into_iter()
                    .filter(|(block, _)| *block < count)
                    .map(|(block, n)| (BlockIndex::new(block), sum(n)))
                    .collect();
                table.apply(changes.iter().copied()).unwrap();
                changes.iter().for_each(|(block, checksum)| model.set(*block, *checksum));
                let zero = Extent::between(
                    BlockIndex::new(zero.0.min(count)),
                    BlockIndex::new(zero.1.min(count)),
                );
                table.apply_zero(zero).unwrap();
                zero.iter().for_each(|block| model.set(block, Checksum128::ZERO));
                prop_assert_eq!(table.digest().unwrap(), model_digest(&model));
                table.sync_and_stamp(GenerationId::new(number)).unwrap();
                if number % 2 == 0 {
                    drop(table);
                    table = ChecksumTable::open(&path, VOLUME, g).unwrap();
                    prop_assert_eq!(table.stamp(), GenerationId::new(number));
                }
            }
            table.rebuild_upper_levels().unwrap();
            prop_assert_eq!(table.digest().unwrap(), model_digest(&model));
            for block in g.all().iter() {
                prop_assert_eq!(table.block(block).unwrap(), model.get(block));
            }
        }
    }

    #[test]
    fn groups_and_leaves_torn_by_a_power_loss_are_rebuilt() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let g = geometry(5000);
        let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
        table
            .apply([
                (BlockIndex::new(3), sum(1)),
                (BlockIndex::new(4999), sum(2)),
            ])
            .unwrap();
        let digest = table.digest().unwrap();
        let torn = vec![0xaa; usize::try_from(table.layout.blocks_at).unwrap()];
        table.file.write_all_at(&torn, 0).unwrap();
        assert_ne!(table.digest().unwrap(), digest);
        table.rebuild_upper_levels().unwrap();
        assert_eq!(table.digest().unwrap(), digest);
    }

    #[test]
    fn an_apply_torn_by_a_crash_is_completed_by_repeating_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let g = geometry(3000);
        let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
        let block = |n| BlockIndex::new(n);
        let changes = [
            (block(3), sum(1)),
            (block(1500), sum(2)),
            (block(2999), sum(3)),
        ];
        let zero = Extent::between(block(10), block(20));
        table.apply((0..20).map(|n| (block(n), sum(9)))).unwrap();
        table.apply(changes).unwrap();
        table.apply_zero(zero).unwrap();
        let whole = table.digest().unwrap();
        // The blocks were written, groups and leaves were not.
        table
            .file
            .write_all_at(
                &vec![0; usize::try_from(table.layout.blocks_at).unwrap()],
                0,
            )
            .unwrap();
        assert_ne!(table.digest().unwrap(), whole);
        table.reapply((0..3).map(|n| (block(n), sum(9)))).unwrap();
        table.reapply(changes).unwrap();
        table.reapply((4..10).map(|n| (block(n), sum(9)))).unwrap();
        table.reapply_zero(zero).unwrap();
        assert_eq!(table.digest().unwrap(), whole);
    }

    /// The leaf reached the disk before the power was lost, the hole below it did not.
    #[test]
    fn a_whole_leaf_zeroed_in_part_is_zeroed_by_repeating_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let g = geometry(3000);
        let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
        let leaf = digest::leaf_extent(g, 1);
        table
            .apply(leaf.iter().map(|block| (block, sum(1))))
            .unwrap();
        table
            .file
            .write_all_at(Checksum128::ZERO.as_bytes(), ENTRY)
            .unwrap();
        table.reapply_zero(leaf).unwrap();
        for block in leaf.iter() {
            assert!(table.block(block).unwrap().is_zero(), "{block}");
        }
        let empty = MemoryTable::new(g);
        assert_eq!(table.digest().unwrap(), model_digest(&empty));
        table.rebuild_upper_levels().unwrap();
        assert_eq!(table.digest().unwrap(), model_digest(&empty));
    }

    /// Field by field as in the table of `docs/FORMAT.md`.
    #[test]
    fn a_stamp_is_as_documented() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let g = geometry(5);
        let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
        table.sync_and_stamp(GenerationId::new(9)).unwrap();
        let mut payload = VOLUME.as_bytes().to_vec();
        payload.extend_from_slice(&(5u64 * 4096).to_le_bytes());
        payload.extend_from_slice(&4096u32.to_le_bytes());
        payload.extend_from_slice(&9u64.to_le_bytes());
        assert_eq!(payload.len(), 36);
        let sealed = tidemark_block::wire::seal(*b"TMTABSTP", 1, &payload);
        assert_eq!(fs::read(dir.path().join("table.stamp")).unwrap(), sealed);
    }

    #[test]
    fn the_table_of_a_sparse_tebibyte_takes_little_space() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let g = Geometry::new(1 << 40, BlockSize::MIN).unwrap();
        let table = ChecksumTable::create(&path, VOLUME, g).unwrap();
        table.apply([(BlockIndex::new(1 << 27), sum(1))]).unwrap();
        table.apply_zero(g.all()).unwrap();
        table.apply([(BlockIndex::new(1 << 27), sum(1))]).unwrap();
        table.digest().unwrap();
        assert!(
            std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512 < 1 << 20
        );
    }

    #[test]
    fn the_table_of_another_volume_or_shape_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        assert!(matches!(
            ChecksumTable::open(&path, VOLUME, geometry(5)),
            Err(TableError::Missing(_))
        ));
        drop(ChecksumTable::create(&path, VOLUME, geometry(5)).unwrap());
        ChecksumTable::open(&path, VOLUME, geometry(5)).unwrap();
        for (volume, g) in [
            (VolumeId::from_bytes([8; 16]), geometry(5)),
            (VOLUME, geometry(6)),
        ] {
            assert!(matches!(
                ChecksumTable::open(&path, volume, g),
                Err(TableError::Foreign(_))
            ));
        }
    }

    #[test]
    fn leaves_of_an_empty_extent_are_none() {
        assert_eq!(
            leaves_of(Extent::between(BlockIndex::new(5), BlockIndex::new(5))).count(),
            0
        );
        assert_eq!(leaves_of(geometry(1025).all()).count(), 2);
    }
}
