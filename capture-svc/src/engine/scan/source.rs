//! The volume file of a workload that writes it itself: reading it without getting in the way.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{SystemTime, UNIX_EPOCH},
};

use capture_core::scan::moment::FileTimes;
use rustix::{
    fs::fstatfs,
    io::{Errno, ReadWriteFlags, preadv2},
};
use tidemark_block::Geometry;

use super::super::{EngineError, volume_file};

/// `RWF_DONTCACHE` of linux/fs.h, since 6.14: pages that are read for this alone are dropped again.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// Filesystems that keep a file's times as `capture_core::scan::moment` needs them: a sync takes write access from mappings,
/// and each first store and each beginning of a write sets them. By their numbers in linux/magic.h.
const FIT: [(u32, &str); 5] = [
    (0xef53, "ext4"),
    (0x5846_5342, "XFS"),
    (0x9123_683e, "btrfs"),
    (0xf2f5_2010, "F2FS"),
    (0xca45_1a4e, "bcachefs"),
];

/// Others, so that they can be named.
const UNFIT: [(u32, &str); 9] = [
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x6573_5546, "FUSE"),
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x794c_7630, "overlayfs"),
];

/// The file.
#[derive(Debug)]
pub(super) struct Source {
    file: File,
    /// The kernel takes [`DONTCACHE`], as far as is known.
    dont_cache: AtomicBool,
}

impl Source {
    pub(super) fn open(path: &Path, geometry: Geometry) -> Result<Self, EngineError> {
        let file = volume_file::open_to_read(path, geometry)?;
        let found = fstatfs(&file).map_err(|error| {
            EngineError::io(
                format!("look at the filesystem of volume file {}", path.display()),
                error.into(),
            )
        })?;
        // The type of the field differs between machines; the numbers have 32 bits.
        let magic = u32::try_from(found.f_type & 0xffff_ffff).unwrap_or(0);
        if !FIT.iter().any(|(fit, _)| *fit == magic) {
            let named = UNFIT.iter().find(|(unfit, _)| *unfit == magic);
            return Err(EngineError::NotScannable {
                path: path.to_owned(),
                filesystem: named
                    .map_or_else(|| format!("{magic:#x}"), |(_, name)| (*name).to_owned()),
            });
        }
        Ok(Self {
            file,
            dont_cache: AtomicBool::new(true),
        })
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Its times now.
    pub(super) fn times(&self) -> io::Result<FileTimes> {
        let found = self.file.metadata()?;
        let nanos = |ns: i64| u32::try_from(ns).unwrap_or(0);
        Ok(FileTimes {
            modified_s: found.mtime(),
            modified_ns: nanos(found.mtime_nsec()),
            changed_s: found.ctime(),
            changed_ns: nanos(found.ctime_nsec()),
        })
    }

    /// Its length where it has no holes worth looking for, else 0. A look for one waits, on some filesystems, for a write
    /// that is under way.
    pub(super) fn whole_until(&self) -> io::Result<u64> {
        let found = self.file.metadata()?;
        let allocated = found.blocks() * 512;
        Ok(if allocated >= found.len() {
            found.len()
        } else {
            0
        })
    }

    /// Has what was stored through mappings reach the disk, and takes write access from them: the next store sets the
    /// times.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Reads all of the buffer, and leaves the page cache as it was where the kernel can do that.
    pub(super) fn read(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            let flags = match self.dont_cache.load(Relaxed) {
                true => DONTCACHE,
                false => ReadWriteFlags::empty(),
            };
            match preadv2(&self.file, &mut [IoSliceMut::new(buffer)], offset, flags) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    buffer = &mut buffer[read..];
                    offset += read as u64;
                }
                Err(Errno::OPNOTSUPP | Errno::INVAL) if flags == DONTCACHE => {
                    self.dont_cache.store(false, Relaxed);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The time of the clock that files are stamped with, in nanoseconds since 1970.
pub(super) fn now_ns() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| i128::try_from(since.as_nanos()).unwrap_or(0))
}

/// Lets everyone else run and read first, from this thread on; but not by the idle classes: on filesystems whose reads keep
/// writers out (XFS) somebody would wait for a reader that never gets its turn.
#[allow(unsafe_code)]
pub(super) fn stand_back() {
    /// Of linux/ioprio.h: the last priority of the class that is served in turn.
    const IOPRIO_LAST: libc::c_int = (2 << 13) | 7;
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const NICE_LAST: libc::c_int = 19;
    // SAFETY: plain numbers; 0 is this thread. A call that is refused changes nothing: it is a courtesy.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE_LAST) };
    // SAFETY: as above.
    let _ = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_LAST) };
}
