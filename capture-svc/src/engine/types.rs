//! What the engines say and are told, whichever it is.

use std::{io, path::Path, time::Duration};

use tidemark_block::{BlockCount, Coherence, CutReason, Epoch, Geometry, VolumeId};

use super::EngineError;

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
    /// The longest that writers may have to wait for a cut; none: however long it takes.
    pub cut_stall_max: Option<Duration>,
}

/// The volume that an engine is made or opened for.
#[derive(Debug, Clone)]
pub struct EngineSetup<'a> {
    /// Its state directory.
    pub dir: &'a Path,
    /// Its UUID.
    pub volume: VolumeId,
    /// Its volume file.
    pub file: &'a Path,
    /// What it must have.
    pub geometry: Geometry,
    /// Bounds.
    pub options: EngineOptions,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            spool_bytes_max: 4 << 30,
            spool_index_memory_max: 32 << 20,
            spool_policy: SpoolPolicy::GiveUp,
            snapshots_max: 1024,
            hot_regions_max: 4096,
            cut_stall_max: None,
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
    /// What changed is told by clones, which are whole: exact, snapshots survive.
    Clones {
        /// The same boot: what was written without a sync is there, too.
        stores_kept: bool,
    },
    /// Nothing is tracked: each cut compares everything.
    Untracked {
        /// The same boot: what was written without a sync is there, too.
        stores_kept: bool,
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
    /// Files of the state that were found damaged, each time that one was, since and when the engine was opened.
    pub damaged: u64,
    /// How long the last flip took: what a cut can cost a writer. Zero before the first one.
    pub last_flip: Duration,
    /// Extents of the volume file at the last cut, where a cut's cost depends on them; else 0.
    pub extents: u64,
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
    /// How good the moment of its cut was.
    pub coherence: Coherence,
    /// Why it was no better.
    pub reason: CutReason,
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
