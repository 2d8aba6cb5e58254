//! What the engine stands on: the volume file, the files of its state, and the locks, as a trait, so that the same
//! decisions run on files and on a simulated disk that crashes.

use std::fmt;

use thiserror::Error;

use crate::sync::atomic::AtomicU64;

/// A failed operation of the medium: the number that the system gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("system error {0}")]
pub struct MediaError(pub i32);

impl MediaError {
    /// Whether the disk can't read what lies there: that is lost no less than what it reads otherwise.
    #[must_use]
    pub const fn is_unreadable(self) -> bool {
        self.0 == EIO
    }
}

/// What a system says of bytes that it can't read.
const EIO: i32 = 5;

/// Shorthand for what each operation returns.
pub type MediaResult<T = ()> = Result<T, MediaError>;

/// A record that is replaced as a whole: after any crash the old or the new one is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Record {
    /// Blocks of no open epoch that the next interval must hold.
    Carry,
    /// The open interval.
    Interval,
    /// The table of snapshots.
    Snapshots,
    /// The blocks changed in the epochs up to this cut, since the cut of the record before it.
    Changes(u64),
}

impl fmt::Display for Record {
    /// The name of its file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Carry => f.write_str("carry"),
            Self::Interval => f.write_str("interval"),
            Self::Snapshots => f.write_str("snapshots"),
            Self::Changes(cut) => write!(f, "changes/{cut}"),
        }
    }
}

/// Memory that outlives the process: words of a mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Map {
    /// Epoch counter, marks, recorded blocks.
    Tracking,
    /// Dirty map of the epochs of this parity, 0 or 1.
    Dirty(u8),
    /// Entries of the before-images.
    Slots,
}

/// Files, mapped memory and locks of one volume. Operations may run at the same time on different threads.
pub trait Media {
    /// Fills `buffer` from the volume. Bytes that are being written meanwhile may come torn. No later look at memory
    /// overtakes the copy: the caller looks whether somebody may have written meanwhile.
    fn read_volume(&self, offset: u64, buffer: &mut [u8]) -> MediaResult;
    /// Writes to the volume, not durably. After an error any part may have been written.
    fn write_volume(&self, offset: u64, data: &[u8]) -> MediaResult;
    /// Zeroes a range of the volume; as a hole unless it must stay allocated.
    fn zero_volume(&self, offset: u64, length: u64, allocated: bool) -> MediaResult;
    /// Makes durable what was written to the volume before the call.
    fn sync_volume(&self) -> MediaResult;
    /// Drops what memory holds of the volume and takes for written: later reads come from the disk. Nothing has been
    /// written since the last sync.
    fn drop_volume_cache(&self) -> MediaResult;

    /// Reads the before-image in a slot of the spool.
    fn read_before(&self, slot: u64, buffer: &mut [u8]) -> MediaResult;
    /// Writes a before-image into a slot.
    fn write_before(&self, slot: u64, data: &[u8]) -> MediaResult;
    /// Allocates disk space so that at least these numbers of entries and slots can be written; gives what there
    /// is room for now, which may be more.
    fn reserve(&self, entries: u64, slots: u64) -> MediaResult<(u64, u64)>;

    /// Reads a place of the intent file: 4 KiB.
    fn read_intent(&self, place: u64, page: &mut [u8]) -> MediaResult;
    /// Writes a place of the intent file, not durably.
    fn write_intent(&self, place: u64, page: &[u8]) -> MediaResult;
    /// Makes durable what was written to the intent file before the call.
    fn sync_intent(&self) -> MediaResult;

    /// Replaces or removes a record, durably.
    fn put(&self, record: Record, content: Option<&[u8]>) -> MediaResult;
    /// A record's content.
    fn get(&self, record: Record) -> MediaResult<Option<Vec<u8>>>;
    /// The cuts of the [`Record::Changes`] that there are.
    fn changes(&self) -> MediaResult<Vec<u64>>;

    /// The words of a map.
    fn words(&self, map: Map) -> &[AtomicU64];
    /// Zeroes all words of a map.
    fn reset(&self, map: Map) -> MediaResult;

    /// Takes the locks of a range of stripes, in ascending order; false where the caller must come again.
    fn lock(&self, first: u64, last: u64) -> bool;
    /// Lets go of them.
    fn unlock(&self, first: u64, last: u64);

    /// A place where a simulated crash may happen between two stores to mapped memory.
    fn instant(&self) -> MediaResult {
        Ok(())
    }
}
