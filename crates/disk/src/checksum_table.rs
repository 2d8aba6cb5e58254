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

mod change;
mod check;
mod layout;
mod stamp;

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
use rustix::fs::{FallocateFlags, fallocate};
use thiserror::Error;
use tidemark_block::{
    Checksum128, Extent, GenerationId, Geometry, ImageDigest, TableView, VolumeId,
    digest::{self, Children, leaf_checksum},
    units::BlockIndex,
};

use crate::{durable, guarded_map::VolumeMap, record::RecordError};

use change::Change;
use layout::{CHILDREN_LEN, ENTRY, Layout, children_bytes, leaves_of};
use stamp::Stamp;

/// Why a checksum table can't be used. Each is mended by creating it anew and comparing it with the vault's.
#[derive(Debug, Error)]
pub enum TableError {
    /// There is none.
    #[error("there is no checksum table at {0}")]
    Missing(PathBuf),
    /// It belongs to another volume, or to one of another shape.
    #[error("the checksum table at {0} is that of another volume, or was cut short")]
    Foreign(PathBuf),
    /// Its stamp is damaged or from a later release.
    #[error("the stamp {path} of the checksum table: {source}")]
    Stamp {
        /// The stamp.
        path: PathBuf,
        /// What is wrong with it.
        source: RecordError,
    },
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

impl ChecksumTable {
    /// Creates the table of the all-zero image, in place of whatever is at `path`, stamped with generation 0.
    ///
    /// # Errors
    /// Where its files can't be created.
    pub fn create(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self, TableError> {
        durable::remove_file(&stamp::path_of(path))?;
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
        Stamp::new(volume, geometry, GenerationId::ZERO).write(path)?;
        Ok(table)
    }

    /// Opens the table of a volume.
    ///
    /// # Errors
    /// Where there is none, or it is damaged or another volume's: create it anew then.
    pub fn open(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self, TableError> {
        let stamp = Stamp::read(path).map_err(|source| TableError::Stamp {
            path: stamp::path_of(path),
            source,
        })?;
        let Some(stamp) = stamp else {
            return Err(TableError::Missing(stamp::path_of(path)));
        };
        let layout = Layout::new(geometry);
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TableError::Missing(path.to_owned()));
            }
            other => other?,
        };
        if !stamp.is_of(volume, geometry) || file.metadata()?.len() != layout.length {
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
            Stamp::new(self.volume, self.layout.geometry, generation).write(&self.path)
        })?;
        self.stamp.store(generation.get(), Ordering::Release);
        Ok(())
    }

    /// Removes the table's files.
    ///
    /// # Errors
    /// Where they can't be removed.
    pub fn remove(path: &Path) -> io::Result<()> {
        durable::remove_file(&stamp::path_of(path))?;
        durable::remove_file(path)
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

#[cfg(test)]
mod tests;
