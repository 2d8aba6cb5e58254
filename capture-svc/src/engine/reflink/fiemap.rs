//! Where a file's extents lie, as the filesystem tells it: `FS_IOC_FIEMAP`.

use std::{fs::File, io, ops::Range, os::fd::AsRawFd};

use capture_core::reflink::extents::{Place, Run, Runs};

/// Extents asked for at a time.
const EXTENTS_AT_ONCE_U32: u32 = 1024;
const EXTENTS_AT_ONCE: usize = EXTENTS_AT_ONCE_U32 as usize;

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` of linux/fiemap.h, with room for extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; EXTENTS_AT_ONCE],
}

/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: u32 = 0xc020_660b;
/// The file is synced first.
const FIEMAP_FLAG_SYNC: u32 = 0x1;
const FIEMAP_EXTENT_LAST: u32 = 0x1;
const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x800;
/// The address isn't known yet, is that of something that holds the data in another form, or stands for several parts.
const NO_PLACE: u32 = 0x2 // UNKNOWN
    | 0x4 // DELALLOC
    | 0x8 // ENCODED
    | 0x80 // DATA_ENCRYPTED
    | 0x100 // NOT_ALIGNED
    | 0x200 // DATA_INLINE
    | 0x400; // DATA_TAIL

/// The runs of a file that nobody writes to.
pub(super) struct FileRuns<'f> {
    file: &'f File,
    end: u64,
    /// Where the next question begins.
    at: u64,
    map: Box<Fiemap>,
    taken: usize,
    is_last: bool,
    synced: bool,
}

impl<'f> FileRuns<'f> {
    /// Of the first `length` bytes of the file.
    pub(super) fn new(file: &'f File, length: u64) -> Self {
        Self::within(file, 0..length)
    }

    /// Of these bytes of the file; the last run may end after them.
    pub(super) fn within(file: &'f File, range: Range<u64>) -> Self {
        Self {
            file,
            end: range.end,
            at: range.start,
            map: Box::new(Fiemap {
                start: 0,
                length: 0,
                flags: 0,
                mapped_extents: 0,
                extent_count: 0,
                reserved: 0,
                extents: [FiemapExtent::default(); EXTENTS_AT_ONCE],
            }),
            taken: 0,
            is_last: false,
            synced: false,
        }
    }

    fn filled(&self) -> usize {
        (self.map.mapped_extents as usize).min(EXTENTS_AT_ONCE)
    }

    #[allow(unsafe_code)]
    fn ask(&mut self) -> io::Result<()> {
        self.map.start = self.at;
        self.map.length = self.end - self.at;
        self.map.flags = if self.synced { 0 } else { FIEMAP_FLAG_SYNC };
        self.synced = true;
        self.map.mapped_extents = 0;
        self.map.extent_count = EXTENTS_AT_ONCE_U32;
        self.taken = 0;
        // SAFETY: the request reads the head of a structure of exactly this layout, and writes to it and to at most
        // `extent_count` extents behind it, all of which we own.
        let done = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::Ioctl::from(FS_IOC_FIEMAP),
                &raw mut *self.map,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Runs for FileRuns<'_> {
    type Error = io::Error;

    fn next(&mut self) -> io::Result<Option<Run>> {
        loop {
            if self.taken == self.filled() {
                if self.is_last || self.at >= self.end {
                    return Ok(None);
                }
                self.ask()?;
                if self.filled() == 0 {
                    self.is_last = true;
                    return Ok(None);
                }
            }
            let extent = self.map.extents[self.taken];
            self.taken += 1;
            self.is_last |= extent.flags & FIEMAP_EXTENT_LAST != 0;
            // One that reaches back is told from where the last one ended.
            let known = self.at.saturating_sub(extent.logical);
            let Some(length) = extent.length.checked_sub(known).filter(|left| *left > 0) else {
                continue;
            };
            let start = extent.logical + known;
            self.at = start.saturating_add(length);
            let place = if extent.flags & NO_PLACE != 0 {
                Place::Unknown
            } else if extent.flags & FIEMAP_EXTENT_UNWRITTEN != 0 {
                Place::Zero
            } else {
                Place::At(extent.physical + known)
            };
            return Ok(Some(Run {
                start,
                length,
                place,
            }));
        }
    }
}
