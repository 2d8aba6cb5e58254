//! What can go wrong with an engine, and what to do about each.

use std::{io, path::PathBuf, time::Duration};

use capture_core::{engine::trust::Replacement, scan::moment::Unsteady};
use thiserror::Error;
use tidemark_block::{Epoch, Geometry, VolumeId};

use super::SnapshotId;

/// Why a call of the engine failed. Each message says what to do.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The volume file is not there.
    #[error(
        "volume file {path} is missing: put it back, or restore it from the vault and readopt the volume"
    )]
    VolumeMissing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The volume file has another length than the volume.
    #[error(
        "volume file {path} has {found} bytes, the volume has {recorded}: bring the file back to its length, or remove \
         the volume and add it again"
    )]
    VolumeLength {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The length recorded for the volume, in bytes.
        recorded: u64,
    },
    /// The volume file is not the one that was recorded.
    #[error(
        "volume file {path} was replaced by another file ({what}): put the recorded file back, or, where this one is \
         meant, use `tidemark volume readopt` (every block is compared then, and the snapshots are gone)"
    )]
    VolumeReplaced {
        /// The file.
        path: PathBuf,
        /// What tells it from the recorded one.
        what: Replacement,
    },
    /// What lies at the path is not a regular file.
    #[error("{path} is not a regular file: name the file that holds the volume")]
    NotAFile {
        /// What was named.
        path: PathBuf,
    },
    /// The volume file may not be written.
    #[error(
        "volume file {path} can't be opened for writing ({source}): {}",
        writable(.source)
    )]
    VolumeReadOnly {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The volume file may not be read.
    #[error(
        "volume file {path} can't be opened for reading: give the service's user read access to it"
    )]
    VolumeUnreadable {
        /// The file.
        path: PathBuf,
    },
    /// The filesystem doesn't clone the volume file.
    #[error(
        "volume file {path} can't be cloned ({source}): put it on btrfs, or on XFS made with reflink=1, or choose another \
         engine"
    )]
    NotClonable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is no room for a clone.
    #[error(
        "the filesystem of volume file {path} has no room for a clone of it ({source}): make room there, or delete snapshots"
    )]
    CloneNoRoom {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A clone took too long when it was tried.
    #[error(
        "a clone of volume file {path} held its writers up for {took:.1?}, longer than cut_stall_max ({most:?}), because it \
         has too many extents: copy it to a new file (cp --reflink=never) with an extent-size hint, raise cut_stall_max, or \
         choose the engine intercept"
    )]
    CutStalls {
        /// The file.
        path: PathBuf,
        /// How long it took.
        took: Duration,
        /// How long it may take.
        most: Duration,
    },
    /// The directory of the clones can't be made.
    #[error(
        "the folder {path} for clones can't be made ({source}): remove what is there, or give the service's user write access to \
         the folder of the volume file"
    )]
    NoClones {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The volume file lies where its times say nothing.
    #[error(
        "volume file {path} can't be scanned, because it lies on {filesystem}: put it on ext4, XFS, btrfs, F2FS or bcachefs of \
         this machine, or use the engine intercept"
    )]
    NotScannable {
        /// The file.
        path: PathBuf,
        /// The filesystem's name or number.
        filesystem: String,
    },
    /// The volume file was never still.
    #[error("volume file {path} can't be cut: {why}")]
    Unsteady {
        /// The file.
        path: PathBuf,
        /// Why.
        why: Unsteady,
    },
    /// There is nothing to compare the volume file with.
    #[error(
        "the checksum table is not that of the base yet: it is compared with the vault's, then there will be a cut"
    )]
    NoBase,
    /// The checksum table can't be read.
    #[error("read the checksum table: {0}")]
    Table(io::Error),
    /// Nobody wants the cut any more.
    #[error("the cut was abandoned")]
    Abandoned,
    /// The engine `scan` keeps no snapshots.
    #[error(
        "a volume with the engine scan has no snapshots: give it the engine reflink or intercept with `tidemark volume readopt \
         --engine`"
    )]
    NoSnapshots,
    /// Somebody else has the volume file locked.
    #[error("volume file {path} is in use by another process: stop that one first")]
    VolumeLocked {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else has the state directory locked.
    #[error(
        "state directory {path} is in use by another process: stop that one, or use another state directory"
    )]
    StateLocked {
        /// The directory.
        path: PathBuf,
    },
    /// The state directory belongs to another volume.
    #[error(
        "state directory {path} belongs to volume {found}, not to {expected}: correct the path of the state"
    )]
    OtherVolume {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        found: VolumeId,
        /// Whose it should be.
        expected: VolumeId,
    },
    /// The state directory was made for another geometry.
    #[error(
        "the volume's state in {path} is for {found}, not for {expected}: remove the volume and add it again"
    )]
    OtherGeometry {
        /// The directory.
        path: PathBuf,
        /// The recorded geometry.
        found: Geometry,
        /// The geometry that was asked for.
        expected: Geometry,
    },
    /// There is no state of a volume in the directory.
    #[error("{path} holds no state of a volume: add the volume first")]
    StateMissing {
        /// The directory.
        path: PathBuf,
    },
    /// There is a volume's state in the directory already.
    #[error("{path} already holds the state of a volume: open that one, or remove it first")]
    StateExists {
        /// The directory.
        path: PathBuf,
    },
    /// The identity of the state is damaged or gone.
    #[error(
        "{path} is damaged ({what}): check the disk, then use `tidemark volume readopt` (every block is compared then, \
         and the snapshots are gone)"
    )]
    StateDamaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Besides the identity the epochs are lost: nothing can be taken up.
    #[error(
        "{path} is damaged ({what}), and so is the file tracking beside it: check the disk, then use `tidemark volume \
         remove` and add the volume again; what the vault has stays"
    )]
    StateLost {
        /// The identity.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A write or sync of durable state failed earlier.
    #[error(
        "the volume is stopped after a failed write or sync: mend the disk, then restart the service"
    )]
    Poisoned,
    /// An engine through which no write passes can't hold writers while others are cut.
    #[error(
        "it is written by its workload itself, and can't be cut at one instant with others: take it out of the group, or \
         give it the engine intercept with `tidemark volume readopt --engine intercept`"
    )]
    NotTogether,
    /// The engine was closed.
    #[error("the volume is closed")]
    Closed,
    /// There is no such snapshot.
    #[error("there is no snapshot {0}: list the snapshots of the volume")]
    NoSuchSnapshot(SnapshotId),
    /// The snapshot's before-images were given up because the spool was full.
    #[error(
        "the snapshot at epoch {0} was given up because the spool was full: make the spool larger"
    )]
    GivenUp(Epoch),
    /// The volume has as many snapshots as it may.
    #[error("the volume has {0} snapshots, the most it may have: delete some")]
    TooManySnapshots(usize),
    /// A label is too long.
    #[error("the label has {0} bytes, more than the most of 255")]
    LabelTooLong(usize),
    /// The older snapshot must be older.
    #[error("snapshot {older} is not older than snapshot {newer}: exchange them")]
    SnapshotOrder {
        /// What was given as the older one.
        older: SnapshotId,
        /// What was given as the newer one.
        newer: SnapshotId,
    },
    /// An interval is open already.
    #[error("the interval cut at epoch {0} is still open: commit it or give it up first")]
    IntervalOpen(Epoch),
    /// No interval with this cut is open.
    #[error("no interval cut at epoch {0} is open")]
    NoInterval(Epoch),
    /// A before-image in the spool is not what was put there.
    #[error(
        "the before-image of block {block} in spool.data is damaged: delete the snapshots that read it, and check the disk"
    )]
    SpoolDamaged {
        /// The block that can't be read.
        block: u64,
    },
    /// A range outside the volume was asked for.
    #[error("the range is outside the volume")]
    OutOfRange,
    /// The system refused something.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system says.
        source: io::Error,
    },
}

/// How a file becomes one that can be written.
fn writable(refused: &io::Error) -> &'static str {
    match refused.raw_os_error() {
        Some(libc::EROFS) => "mount its filesystem, or the volume of its container, for writing",
        // What the owner and root hear too.
        Some(libc::EPERM) => "remove its attribute immutable or append-only (chattr -i -a)",
        _ => "give the service's user write access to it",
    }
}

impl EngineError {
    pub(super) fn io(action: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            action: action.into(),
            source,
        }
    }
}
