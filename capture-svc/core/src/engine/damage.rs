//! What of a volume's state is not as it was left: which file, what is wrong with it, and what that costs.

use std::fmt;

use thiserror::Error;

use super::{
    dirty::DirtyFault,
    intent::IntentFault,
    media::{Map, Media, MediaError, Record},
    records::RecordError,
};

/// A file of a volume's state. It is shown by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StateFile {
    /// Epoch counter, marks, recorded blocks.
    Tracking,
    /// Dirty map of the epochs of this parity.
    Dirty(u8),
    /// Entries of the before-images.
    Slots,
    /// The before-images.
    Spool,
    /// The intent map.
    Intent,
    /// A record.
    Record(Record),
}

impl fmt::Display for StateFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tracking => f.write_str("tracking"),
            Self::Dirty(parity) => write!(f, "dirty.{parity}"),
            Self::Slots => f.write_str("spool.slots"),
            Self::Spool => f.write_str("spool.data"),
            Self::Intent => f.write_str("intent"),
            Self::Record(record) => record.fmt(f),
        }
    }
}

impl From<Map> for StateFile {
    fn from(map: Map) -> Self {
        match map {
            Map::Tracking => Self::Tracking,
            Map::Dirty(parity) => Self::Dirty(parity),
            Map::Slots => Self::Slots,
        }
    }
}

impl From<Record> for StateFile {
    fn from(record: Record) -> Self {
        Self::Record(record)
    }
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    /// It isn't there.
    #[error("it is missing")]
    Missing,
    /// It lies, in part, where the disk can't read.
    #[error("the disk can't read it")]
    Unreadable,
    /// It has bytes that it never has, or lacks some.
    #[error("it has a length that it never has")]
    Length,
    /// Its header is not that of the volume's.
    #[error("its header is damaged or that of another volume")]
    Header,
    /// It isn't as it was when the volume was closed.
    #[error("it is not as it was when the volume was closed")]
    Changed,
    /// A record can't be read.
    #[error("{0}")]
    Record(#[from] RecordError),
    /// Words of the dirty map.
    #[error("{0}")]
    Dirty(#[from] DirtyFault),
    /// Of a dirty map in use: the copies told what was set.
    #[error("bits differ from their copies; all that either has set is shipped")]
    Healed,
    /// Pages of the intent map.
    #[error("{0}")]
    Intent(#[from] IntentFault),
    /// The epoch counter isn't the one that was sealed, or it is behind a recorded cut or ahead of all that can be.
    #[error("the epoch counter is wrong")]
    Epoch,
    /// The marks are none that are ever made.
    #[error("the marks are none that are made")]
    Marks,
    /// A recorded block is none that is ever recorded.
    #[error("recorded block {0} is damaged")]
    Ring(u64),
    /// A word that is 0, or is its own complement, isn't.
    #[error("a word is none that is ever stored")]
    Word,
    /// An entry of the spool can't be read.
    #[error("entry {0} is damaged")]
    Entry(u64),
    /// Two entries are for the same before-image or the same slot.
    #[error("entry {0} is there twice")]
    Twice(u64),
}

/// What a fault costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// Nothing is known of any block.
    Everything,
    /// No cut can be read any more; what was to be shipped is known.
    Cuts,
    /// What a later power loss would put in doubt.
    Regions,
    /// What changed between two snapshots.
    Changes,
    /// Nothing.
    Nothing,
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Everything => "snapshots are gone, every block is compared with the vault's",
            Self::Cuts => {
                "snapshots are gone, what was being shipped is read and compared once more"
            }
            Self::Regions => "a loss of power would put all regions of its page in doubt",
            Self::Changes => {
                "between the snapshots that it lies between every block counts as changed"
            }
            Self::Nothing => "nothing was lost",
        })
    }
}

/// A file that is not as it was left.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("file {file} of the volume's state is damaged: {fault}")]
pub struct Damage {
    /// Which.
    pub file: StateFile,
    /// What is wrong.
    pub fault: Fault,
    /// What follows.
    pub cost: Cost,
}

impl Damage {
    /// Damage after which nothing is known.
    #[must_use]
    pub fn everything(file: impl Into<StateFile>, fault: impl Into<Fault>) -> Self {
        Self::new(file, fault, Cost::Everything)
    }

    pub(super) fn new(file: impl Into<StateFile>, fault: impl Into<Fault>, cost: Cost) -> Self {
        Self {
            file: file.into(),
            fault: fault.into(),
            cost,
        }
    }
}

/// The content of a record, or why there is none.
pub(super) fn content<M: Media>(
    media: &M,
    record: Record,
) -> Result<Result<Vec<u8>, Fault>, MediaError> {
    match media.get(record) {
        Ok(found) => Ok(found.ok_or(Fault::Missing)),
        Err(error) if error.is_unreadable() => Ok(Err(Fault::Unreadable)),
        Err(error) => Err(error),
    }
}
