//! The checksum table of the base, and who may look at it when.
//!
//! A cache of what the vault holds: where the disk can't read it, it is made anew. It is changed only after "base = g" is durable, together with the release of the
//! engine's interval, under the write lock: a reader that holds the read lock sees tracking and table fit together.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use anyhow::{Context, Result};
use parking_lot::{RwLock, RwLockReadGuard};
use tidemark_block::{BlockIndex, Checksum128, Extent, Geometry, ImageDigest, VolumeId};
use tidemark_disk::{ChecksumTable, TableError, guarded_map::is_unreadable};

use super::pending::{Entry, PendingKey, PendingReader};

/// The table, and whether it is known to be that of the base.
#[derive(Debug)]
pub(crate) struct BaseTable {
    path: PathBuf,
    volume: VolumeId,
    geometry: Geometry,
    /// Replaced only while it isn't sound.
    table: RwLock<Arc<ChecksumTable>>,
    sound: RwLock<bool>,
    /// The disk can't read it: the next repair makes another one.
    unreadable: AtomicBool,
}

impl BaseTable {
    /// Opens the table of a volume; makes a new one, that is not sound, where there is none to be used.
    pub(crate) fn open(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self> {
        let (table, found) = open_or_create(path, volume, geometry)?;
        Ok(Self {
            path: path.to_owned(),
            volume,
            geometry,
            table: RwLock::new(Arc::new(table)),
            sound: RwLock::new(found),
            unreadable: AtomicBool::new(false),
        })
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The table itself, for whoever knows that it doesn't change meanwhile.
    pub(crate) fn table(&self) -> Arc<ChecksumTable> {
        Arc::clone(&self.table.read())
    }

    /// The table, to be compared and repaired: not sound until [`Self::set_sound`] says so. One that a failed write
    /// has closed is opened again; one that the disk can't read gives way to another.
    pub(crate) fn to_repair(&self) -> Result<Arc<ChecksumTable>> {
        let mut sound = self.sound.write();
        *sound = false;
        let mut table = self.table.write();
        if self.unreadable.load(SeqCst) {
            *table = Arc::new(create(&self.path, self.volume, self.geometry)?);
            self.unreadable.store(false, SeqCst);
        } else if table.is_poisoned() {
            *table = Arc::new(open_or_create(&self.path, self.volume, self.geometry)?.0);
        }
        Ok(Arc::clone(&table))
    }

    /// Takes note of why the table could not be used. True where the disk can't read it: it is not sound then. Not to be
    /// called while [`Self::steady`] is held.
    pub(crate) fn failed(&self, error: &io::Error) -> bool {
        if !is_unreadable(error) {
            return false;
        }
        tracing::error!(
            volume = %self.volume, file = %self.path.display(),
            "the disk can't read the checksum table: it is made anew and compared with the vault's; check the disk"
        );
        self.unreadable.store(true, SeqCst);
        self.set_sound(false);
        true
    }

    /// Whether the table is that of the base, and can be read.
    pub(crate) fn is_sound(&self) -> bool {
        *self.sound.read() && !self.table.read().is_poisoned()
    }

    /// Says whether the table is that of the base.
    pub(crate) fn set_sound(&self, sound: bool) {
        *self.sound.write() = sound;
    }

    /// Keeps the table, and the tracking it goes with, as they are until the guard is dropped. None where the table
    /// isn't that of the base, or can't be read.
    pub(crate) fn steady(&self) -> Option<RwLockReadGuard<'_, bool>> {
        Some(self.sound.read()).filter(|sound| **sound && !self.table.read().is_poisoned())
    }

    /// Releases an interval and applies its checksums, as one step for whoever holds [`Self::steady`]. The table is
    /// not sound any more where its checksums are not all there; one that was not sound stays so.
    pub(crate) fn advance(
        &self,
        pending: Option<(&Path, PendingKey)>,
        release: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut sound = self.sound.write();
        let released = release();
        let Some((path, key)) = pending else {
            return released;
        };
        // The base is recorded: the table follows it, whatever became of the release.
        *sound = *sound
            && match self.apply(path, key, false) {
                Ok(complete) => complete,
                Err(error) => {
                    tracing::error!(%error, "the interval's checksums can't be applied; the table will be fetched again");
                    self.unreadable.fetch_or(is_unreadable(&error), SeqCst);
                    false
                }
            };
        released
    }

    /// Applies an interval's checksums again, after a crash that may have torn the first time. Where they are not all
    /// there, those of the next interval may have taken their place: then the table had them. False where it doesn't
    /// have the image digest `expected` in the end.
    pub(crate) fn replay(
        &self,
        path: &Path,
        key: PendingKey,
        expected: ImageDigest,
    ) -> io::Result<bool> {
        let mut sound = self.sound.write();
        *sound = false;
        if super::pending::is_complete(path, key)? {
            self.apply(path, key, true)?;
        }
        let table = self.table();
        table.rebuild_upper_levels()?;
        *sound = table.digest()? == expected;
        Ok(*sound)
    }

    fn apply(&self, path: &Path, key: PendingKey, again: bool) -> io::Result<bool> {
        let Some(mut reader) = PendingReader::open(path, key)? else {
            return Ok(false);
        };
        let table = self.table();
        let mut run: Vec<(BlockIndex, Checksum128)> = Vec::new();
        let apply = |run: &mut Vec<(BlockIndex, Checksum128)>| match again {
            false => table.apply(run.drain(..)),
            true => table.reapply(run.drain(..)),
        };
        while let Some(entry) = reader.next()? {
            match entry {
                Entry::Data(extents, sums) => {
                    run.extend(extents.iter().flat_map(|e: &Extent| e.iter()).zip(sums));
                    if run.len() >= RUN_BLOCKS {
                        apply(&mut run)?;
                    }
                }
                Entry::Zero(extents) => {
                    apply(&mut run)?;
                    for extent in extents {
                        match again {
                            false => table.apply_zero(extent)?,
                            true => table.reapply_zero(extent)?,
                        }
                    }
                }
                Entry::Batch(_) => {}
                Entry::End(_) => {
                    apply(&mut run)?;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// The table in the files, or a new one, and whether it was found.
fn open_or_create(
    path: &Path,
    volume: VolumeId,
    geometry: Geometry,
) -> Result<(ChecksumTable, bool)> {
    match ChecksumTable::open(path, volume, geometry) {
        Ok(table) => Ok((table, true)),
        Err(error) => {
            if !matches!(error, TableError::Missing(_)) {
                tracing::warn!(%volume, %error, "the checksum table is made anew");
            }
            Ok((create(path, volume, geometry)?, false))
        }
    }
}

fn create(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<ChecksumTable> {
    ChecksumTable::create(path, volume, geometry)
        .with_context(|| format!("create the checksum table {}", path.display()))
}

/// Checksums gathered before they are applied.
const RUN_BLOCKS: usize = 16 << 10;

#[cfg(test)]
mod tests;
