//! The engine `intercept`: all writes to a volume file pass through here, so that it knows exactly which blocks
//! changed, and can show the volume as it was at any open cut.

mod error;

use std::{io, path::Path, sync::Arc};

pub use error::EngineError;
use tidemark_block::{BlockCount, BlockSet, Epoch, Extent, Geometry, VolumeId};

/// The number of a snapshot, from 1, never given twice for a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(pub u64);

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What happens when the spool is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SpoolPolicy {
    /// The oldest open cuts are given up: snapshots break, an unshipped interval folds into the next one.
    #[default]
    GiveUp,
    /// Writers wait until there is room.
    Stall,
}

/// Bounds of one volume's engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The most that before-images may take on disk, in bytes.
    pub spool_bytes_max: u64,
    /// The most memory for the index of before-images, in bytes. Past it the spool counts as full.
    pub spool_index_memory_max: u64,
    /// What to do when the spool is full.
    pub spool_policy: SpoolPolicy,
    /// The most snapshots, at least 1.
    pub snapshots_max: usize,
    /// The most 1 MiB regions that stay in the intent map past a commit because they were written lately: what a
    /// power loss may cost in comparison.
    pub hot_regions_max: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            spool_bytes_max: 4 << 30,
            spool_index_memory_max: 32 << 20,
            spool_policy: SpoolPolicy::GiveUp,
            snapshots_max: 1024,
            hot_regions_max: 4096,
        }
    }
}

/// How far the tracking could be trusted when the engine was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// It was closed cleanly: exact, snapshots survive.
    Clean,
    /// The process had crashed: exact all the same, snapshots survive.
    ProcessCrash,
    /// The power was lost, or a sync had failed: the blocks of the intent map joined the carry, snapshots are gone.
    PowerLoss {
        /// Blocks that may differ from the base and will be compared.
        doubtful: BlockCount,
    },
    /// Nothing is known: all blocks joined the carry, snapshots are gone.
    Everything {
        /// Why.
        reason: String,
    },
}

/// Figures of an engine at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Blocks that the next interval will hold: an upper bound, cheap to ask for.
    pub changed_blocks: u64,
    /// Bytes of before-images in the spool.
    pub spool_used: u64,
    /// The most bytes of before-images.
    pub spool_max: u64,
    /// Open snapshots, without the one of an open interval.
    pub snapshots: u64,
    /// Snapshots and intervals given up because the spool was full, since the engine was opened.
    pub give_ups: u64,
    /// Blocks of TRIM requests that were ignored for the sake of a snapshot, since the engine was opened.
    pub trims_ignored: u64,
    /// Blocks copied into the spool since the engine was opened.
    pub blocks_copied: u64,
    /// Regions set in the intent map: what would be in doubt if the power were lost now.
    pub intent_regions: u64,
    /// Whether the engine refuses work after a failed write or sync.
    pub poisoned: bool,
}

/// A snapshot, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its number.
    pub id: SnapshotId,
    /// What the user called it; may be empty.
    pub label: String,
    /// When it was taken: milliseconds since 1970, as given by the caller.
    pub time_ms: u64,
    /// Its cut: the last epoch it shows.
    pub cut: Epoch,
}

/// The engine of one volume. Every call blocks; none may be made on an async worker.
#[derive(Debug)]
pub struct Engine {}

/// An open interval: what changed up to a cut, and the volume as it was at the cut.
#[derive(Debug, Clone)]
pub struct IntervalCut {
    /// The last epoch that the interval covers.
    pub epoch: Epoch,
    /// The blocks that may differ from the base.
    pub changed: Arc<BlockSet>,
    /// Reads the volume as it was at the cut.
    pub reader: SnapshotReader,
}

/// Reads the volume as it was at an open cut. While one exists, so do the before-images it needs.
#[derive(Debug, Clone)]
pub struct SnapshotReader {}

impl SnapshotReader {
    /// The last epoch that is seen.
    #[must_use]
    pub fn cut(&self) -> Epoch {
        unimplemented!()
    }

    /// Reads whole blocks; `buffer` has the length of the extent.
    ///
    /// # Errors
    /// [`EngineError::GivenUp`] where the cut was given up meanwhile, [`EngineError::SpoolDamaged`], or what the
    /// volume file says.
    pub fn read_blocks(&self, _extent: Extent, _buffer: &mut [u8]) -> Result<(), EngineError> {
        unimplemented!()
    }

    /// The parts of the extent that may hold other bytes than zeroes, ascending; the rest reads as zeroes.
    ///
    /// # Errors
    /// As [`Self::read_blocks`].
    pub fn data_extents(&self, _extent: Extent) -> Result<BlockSet, EngineError> {
        unimplemented!()
    }
}

impl Engine {
    /// Makes the state of a new volume in `dir`, and opens it. The base is the all-zero image: every block that is
    /// no hole in the file is in the carry.
    ///
    /// # Errors
    /// Where the file or the directory isn't fit; nothing is left behind then.
    pub fn create(
        _dir: &Path,
        _volume: VolumeId,
        _file: &Path,
        _geometry: Geometry,
        _options: EngineOptions,
    ) -> Result<Arc<Self>, EngineError> {
        unimplemented!()
    }

    /// Opens a volume that was created before, and recovers it.
    ///
    /// # Errors
    /// Where the file or the directory isn't fit; nothing was changed then, and the call may be repeated.
    pub fn open(
        _dir: &Path,
        _volume: VolumeId,
        _file: &Path,
        _geometry: Geometry,
        _options: EngineOptions,
    ) -> Result<(Arc<Self>, Trust), EngineError> {
        unimplemented!()
    }

    /// Waits for the requests in flight, syncs everything and marks the state clean. Later requests fail.
    ///
    /// # Errors
    /// Where a sync fails: the next open recovers as after a crash.
    pub fn close(&self) -> Result<(), EngineError> {
        unimplemented!()
    }

    /// The volume's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        unimplemented!()
    }

    /// The open epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        unimplemented!()
    }

    /// Figures of this moment.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        unimplemented!()
    }

    /// Blocks that the next interval will hold, an upper bound: cheap enough to ask for at every write.
    #[must_use]
    pub fn changed_hint(&self) -> u64 {
        unimplemented!()
    }

    /// Puts every block into the next interval, durably.
    ///
    /// # Errors
    /// Where the carry can't be written.
    pub fn doubt_everything(&self, _reason: &str) -> Result<(), EngineError> {
        unimplemented!()
    }

    /// Puts blocks into the next interval, durably.
    ///
    /// # Errors
    /// Where the carry can't be written.
    pub fn doubt(&self, _blocks: &BlockSet) -> Result<(), EngineError> {
        unimplemented!()
    }

    /// Cuts, and opens the interval of all blocks that may differ from the base. It survives a process crash.
    ///
    /// # Errors
    /// [`EngineError::IntervalOpen`] where one is open; where it can't be written the blocks go into the next one.
    pub fn begin_interval(self: &Arc<Self>) -> Result<IntervalCut, EngineError> {
        unimplemented!()
    }

    /// The open interval: begun before, or survived a restart.
    #[must_use]
    pub fn open_interval(self: &Arc<Self>) -> Option<IntervalCut> {
        unimplemented!()
    }

    /// Folds the open interval's blocks into the next one, durably. Without an open interval nothing happens.
    ///
    /// # Errors
    /// Where the carry can't be written: the interval is still open.
    pub fn give_up_interval(&self) -> Result<(), EngineError> {
        unimplemented!()
    }

    /// Drops the interval with this cut: its generation is committed and the caller has that durably. Syncs the
    /// volume unless that has happened since the cut.
    ///
    /// # Errors
    /// [`EngineError::NoInterval`] where another one or none is open; where the sync fails the engine is stopped.
    pub fn commit_interval(&self, _cut: Epoch) -> Result<(), EngineError> {
        unimplemented!()
    }

    /// Cuts, and keeps the image at the cut readable. `label` has at most 255 bytes.
    ///
    /// # Errors
    /// [`EngineError::TooManySnapshots`], [`EngineError::GivenUp`] where the spool was full at once, or where the
    /// table can't be written.
    pub fn create_snapshot(&self, _label: &str, _now_ms: u64) -> Result<SnapshotInfo, EngineError> {
        unimplemented!()
    }

    /// All snapshots, oldest first.
    #[must_use]
    pub fn list_snapshots(&self) -> Vec<SnapshotInfo> {
        unimplemented!()
    }

    /// Deletes a snapshot. Readers that have it open may finish.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], or where the table can't be written.
    pub fn delete_snapshot(&self, _id: SnapshotId) -> Result<(), EngineError> {
        unimplemented!()
    }

    /// Opens a snapshot for reading.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`].
    pub fn open_snapshot(self: &Arc<Self>, _id: SnapshotId) -> Result<SnapshotReader, EngineError> {
        unimplemented!()
    }

    /// The blocks that may differ between two snapshots.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], [`EngineError::SnapshotOrder`], or where the record can't be read.
    pub fn changed_between(
        &self,
        _older: SnapshotId,
        _newer: SnapshotId,
    ) -> Result<BlockSet, EngineError> {
        unimplemented!()
    }

    /// The blocks of the extent that may differ from the base: dirty, carried, or in the open interval.
    #[must_use]
    pub fn tracked(&self, _extent: Extent) -> BlockSet {
        unimplemented!()
    }

    /// Reads whole blocks as they are now; `buffer` has the length of the extent. Blocks being written meanwhile may
    /// come torn: ask [`Self::tracked`] afterwards.
    ///
    /// # Errors
    /// What the volume file says.
    pub fn read_live(&self, _extent: Extent, _buffer: &mut [u8]) -> io::Result<()> {
        unimplemented!()
    }
}

/// What identifies a file on this machine: no two volumes may share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileKey {
    /// The device's number.
    pub device: u64,
    /// The inode's number.
    pub inode: u64,
}

/// The key of an existing file.
///
/// # Errors
/// [`EngineError::VolumeMissing`] where there is none.
pub fn file_key(path: &Path) -> Result<FileKey, EngineError> {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(FileKey {
            device: metadata.dev(),
            inode: metadata.ino(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(EngineError::VolumeMissing {
            path: path.to_owned(),
        }),
        Err(error) => Err(EngineError::io(
            format!("look at volume file {}", path.display()),
            error,
        )),
    }
}
