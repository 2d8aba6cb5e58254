//! What a front end may ask of a block device.
//!
//! Offsets and lengths are bytes, of any alignment: the device itself handles partial blocks, because only it knows
//! under which lock a read-modify-write is sound. Every call blocks until done and may run at the same time as any
//! other, also on overlapping ranges; overlapping writes leave one or the other byte for byte of each block, in an
//! order that the device chooses. A front end checks ranges against [`BlockDevice::length`] first, so a device may
//! treat a range past its end as an error of its caller, but must not panic.

use std::io;

/// When a write must have reached stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// By the next successful [`BlockDevice::flush`] that begins after the write has returned.
    Volatile,
    /// Before the call returns ("force unit access").
    Fua,
}

impl Durability {
    /// `Fua` where `fua` is set.
    #[must_use]
    pub const fn from_fua(fua: bool) -> Self {
        if fua { Self::Fua } else { Self::Volatile }
    }

    /// Whether the data must be stable before the call returns.
    #[must_use]
    pub const fn is_fua(self) -> bool {
        matches!(self, Self::Fua)
    }
}

/// How [`BlockDevice::write_zeroes`] may go about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroFlags {
    /// The range may become a hole. Otherwise it must stay, or become, allocated.
    pub may_punch: bool,
    /// Fail at once with [`io::ErrorKind::Unsupported`], changing nothing, unless this is faster than writing zeroes.
    pub fast_only: bool,
    /// Stable before the call returns.
    pub fua: bool,
}

/// The allocation of one run of bytes, as the `base:allocation` context of NBD tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocationExtent {
    /// Bytes, at least 1.
    pub length: u64,
    /// Not allocated. May be set only where it is true; unset says nothing.
    pub hole: bool,
    /// Reads as zeroes. May be set only where it is true; unset says nothing.
    pub zero: bool,
}

/// A device of fixed length that front ends serve.
///
/// Errors become NBD errors by [`crate::errno`]; use an OS errno ([`io::Error::from_raw_os_error`]) or a telling
/// [`io::ErrorKind`], since a client sees no more than that.
pub trait BlockDevice: Send + Sync {
    /// Bytes. Does not change while a client is connected.
    fn length(&self) -> u64;

    /// Whether every call that changes data fails with [`io::ErrorKind::PermissionDenied`]. Asked once per client.
    fn read_only(&self) -> bool;

    /// The granularity, in bytes, at which requests cost least: a power of two, at least 512.
    fn block_size_preferred(&self) -> u32;

    /// Fills the whole of `buf` from `offset`. On an error the content of `buf` is not defined.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes the whole of `data` at `offset`. After an error any part of the range may have been written.
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()>;

    /// Makes stable every write, trim and zeroing that returned before this call began, whichever client made it.
    /// (This is what allows a client to use several connections at once.)
    fn flush(&self) -> io::Result<()>;

    /// Tells that the content of the range is no longer needed. The device may ignore it; afterwards the range reads
    /// as its old content or as zeroes.
    fn trim(&self, offset: u64, len: u64, fua: bool) -> io::Result<()>;

    /// Makes the range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()>;

    /// The allocation from `offset` on: at least one and at most `max` (≥ 1) extents, adjacent, the first beginning
    /// at `offset`, their sum at most `len` (≥ 1). It may end early; the caller asks again.
    ///
    /// The default knows nothing: all of it is allocated data.
    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<AllocationExtent>> {
        let _ = (offset, max);
        Ok(vec![AllocationExtent {
            length: len,
            hole: false,
            zero: false,
        }])
    }

    /// Advice that the range will be read soon. The default does nothing.
    fn cache(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Ok(())
    }
}
