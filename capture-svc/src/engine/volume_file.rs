//! The volume's file: opening it for ourselves alone, what identifies it, and operations the standard library lacks.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
};

use capture_core::engine::{
    records::{FileIdentity, Place},
    trust::Replacement,
};
use rustix::{
    fs::{
        Advice, AtFlags, FallocateFlags, SeekFrom, StatxFlags, fadvise, fallocate, fstatvfs, seek,
        statx,
    },
    io::Errno,
};
use tidemark_block::{BlockSet, Extent, Geometry, VolumeId};
use tidemark_disk::lock::{FileLock, LockError};

use super::{EngineError, file_key};

/// Opens a volume's file and locks it.
pub(super) fn open(path: &Path, geometry: Geometry) -> Result<(File, FileLock), EngineError> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(EngineError::VolumeMissing {
                path: path.to_owned(),
            });
        }
        Err(error) => {
            return Err(EngineError::io(
                format!("look at volume file {}", path.display()),
                error,
            ));
        }
    };
    if !metadata.is_file() {
        return Err(EngineError::NotAFile {
            path: path.to_owned(),
        });
    }
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(source)
            if matches!(
                source.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            return Err(EngineError::VolumeReadOnly {
                path: path.to_owned(),
                source,
            });
        }
        Err(error) => {
            return Err(EngineError::io(
                format!("open volume file {}", path.display()),
                error,
            ));
        }
    };
    let lock = FileLock::of_file(&file, path).map_err(|error| match error {
        LockError::Owned { path, .. } => EngineError::VolumeLocked { path },
        LockError::Io { path, source } => {
            EngineError::io(format!("lock volume file {}", path.display()), source)
        }
    })?;
    let found = file
        .metadata()
        .map_err(|error| EngineError::io(format!("look at volume file {}", path.display()), error))?
        .len();
    if found != geometry.length() {
        let recorded = geometry.length();
        return Err(EngineError::VolumeLength {
            path: path.to_owned(),
            found,
            recorded,
        });
    }
    Ok((file, lock))
}

/// Opens a volume's file that others write. It isn't locked: it is theirs.
pub(super) fn open_to_read(path: &Path, geometry: Geometry) -> Result<File, EngineError> {
    let file = match File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
    {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(EngineError::VolumeMissing {
                path: path.to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(EngineError::VolumeUnreadable {
                path: path.to_owned(),
            });
        }
        Err(error) => {
            return Err(EngineError::io(
                format!("open volume file {}", path.display()),
                error,
            ));
        }
    };
    let metadata = file.metadata().map_err(|error| {
        EngineError::io(format!("look at volume file {}", path.display()), error)
    })?;
    if !metadata.is_file() {
        return Err(EngineError::NotAFile {
            path: path.to_owned(),
        });
    }
    if metadata.len() != geometry.length() {
        return Err(EngineError::VolumeLength {
            path: path.to_owned(),
            found: metadata.len(),
            recorded: geometry.length(),
        });
    }
    Ok(file)
}

/// Whether the open file is the one that lies at the path.
pub(super) fn is_at(file: &File, path: &Path) -> Result<bool, EngineError> {
    let open = file.metadata();
    let open = open.map_err(|error| EngineError::io("look at the open volume file", error))?;
    let found = file_key(path)?;
    Ok((found.device, found.inode) == (open.dev(), open.ino()))
}

/// What lies at the path must be what is open.
pub(super) fn check_at(file: &File, path: &Path) -> Result<(), EngineError> {
    if is_at(file, path)? {
        return Ok(());
    }
    let open = file.metadata();
    let open = open.map_err(|error| EngineError::io("look at the open volume file", error))?;
    let (found, recorded) = (file_key(path)?.inode, open.ino());
    Err(EngineError::VolumeReplaced {
        path: path.to_owned(),
        what: if found == recorded {
            Replacement::Filesystem
        } else {
            Replacement::Inode { recorded, found }
        },
    })
}

/// What is recorded in a state directory must be of this volume, and of this shape.
pub(super) fn check_record(
    dir: &Path,
    recorded: (VolumeId, Geometry),
    expected: (VolumeId, Geometry),
) -> Result<(), EngineError> {
    let path = dir.to_owned();
    if recorded.0 != expected.0 {
        let (found, expected) = (recorded.0, expected.0);
        return Err(EngineError::OtherVolume {
            path,
            found,
            expected,
        });
    }
    if recorded.1 != expected.1 {
        let (found, expected) = (recorded.1, expected.1);
        return Err(EngineError::OtherGeometry {
            path,
            found,
            expected,
        });
    }
    Ok(())
}

/// Has the filesystem allocate an empty file in pieces of at least so many bytes, where it can (XFS): a file in few extents
/// is cloned quickly.
#[allow(unsafe_code)]
pub(super) fn keep_whole(file: &File, bytes: u32) {
    /// `struct fsxattr` of linux/fs.h.
    #[repr(C)]
    #[derive(Default)]
    struct FsXattr {
        xflags: u32,
        extent_size: u32,
        extents: u32,
        project: u32,
        cow_extent_size: u32,
        padding: [u8; 8],
    }
    /// `_IOR('X', 31, struct fsxattr)` and `_IOW('X', 32, struct fsxattr)`.
    const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
    const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;
    const FS_XFLAG_EXTSIZE: u32 = 0x800;
    let mut found = FsXattr::default();
    // SAFETY: the request fills a structure of exactly this layout, which we own.
    let got = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::Ioctl::from(FS_IOC_FSGETXATTR),
            &raw mut found,
        )
    };
    if got != 0 || found.extents != 0 || found.extent_size != 0 {
        return;
    }
    found.xflags |= FS_XFLAG_EXTSIZE;
    found.extent_size = bytes;
    // SAFETY: the request reads a structure of exactly this layout. One that is refused changes nothing: it is a hint.
    let _refused = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::Ioctl::from(FS_IOC_FSSETXATTR),
            &raw const found,
        )
    };
}

/// What tells the file from every other.
pub(super) fn identity(file: &File) -> io::Result<FileIdentity> {
    let metadata = file.metadata()?;
    let (born_s, born_ns) = born(file)?;
    Ok(FileIdentity {
        boot: boot_id()?,
        mount: mount_id(file)?,
        filesystem: filesystem_id(file)?,
        device: metadata.dev(),
        inode: metadata.ino(),
        modified_s: metadata.mtime(),
        modified_ns: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
        born_s,
        born_ns,
    })
}

/// When the file was created, which nobody can set: seconds and nanoseconds; zeroes where the filesystem doesn't tell.
pub(super) fn born(file: &File) -> io::Result<(i64, u32)> {
    let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME)?;
    let told = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::BTIME);
    let time = found.stx_btime;
    Ok(if told {
        (time.tv_sec, time.tv_nsec)
    } else {
        (0, 0)
    })
}

/// Where a state directory lies, and which of its copies it is.
pub(super) fn place(dir: &Path) -> io::Result<Place> {
    let tracking = File::open(dir.join("tracking"))?;
    let dir = File::open(dir)?;
    let (born_s, born_ns) = born(&tracking)?;
    Ok(Place {
        mount: mount_id(&dir)?,
        filesystem: filesystem_id(&dir)?,
        device: dir.metadata()?.dev(),
        inode: tracking.metadata()?.ino(),
        born_s,
        born_ns,
    })
}

/// The mount's number: one that never comes back in the same boot, where the kernel has it (since 6.8).
pub(super) fn mount_id(file: &File) -> io::Result<u64> {
    /// `STATX_MNT_ID_UNIQUE` of linux/stat.h.
    const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let flags = StatxFlags::MNT_ID | UNIQUE;
    Ok(statx(file, c"", AtFlags::EMPTY_PATH, flags)?.stx_mnt_id)
}

fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    match text.trim().parse::<uuid::Uuid>() {
        Ok(id) => Ok(*id.as_bytes()),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel's boot id is no UUID",
        )),
    }
}

/// The filesystem's UUID, or its id where it has none.
#[allow(unsafe_code)]
fn filesystem_id(file: &File) -> io::Result<[u8; 16]> {
    /// `struct fsuuid2` of linux/fs.h.
    #[repr(C)]
    struct FsUuid {
        len: u8,
        uuid: [u8; 16],
    }
    /// `FS_IOC_GETFSUUID`: `_IOR(0x15, 0, struct fsuuid2)`.
    const FS_IOC_GETFSUUID: u32 = 0x8011_1500;
    let mut found = FsUuid {
        len: 0,
        uuid: [0; 16],
    };
    // SAFETY: the request fills a structure of exactly this layout, which we own.
    let done = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::Ioctl::from(FS_IOC_GETFSUUID),
            &raw mut found,
        )
    };
    if done == 0 && found.len == 16 && found.uuid != [0; 16] {
        return Ok(found.uuid);
    }
    let mut id = [0; 16];
    id[..8].copy_from_slice(&fstatvfs(file)?.f_fsid.to_le_bytes());
    Ok(id)
}

/// Has later reads come from the disk, where nothing was written since a sync and nothing is mapped. Pages that the
/// kernel failed to write are marked clean, so that it drops them like any other.
pub(super) fn drop_cache(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, Advice::DontNeed)?)
}

/// Zeroes a range: as a hole, or keeping it allocated.
pub(super) fn zero(file: &File, offset: u64, length: u64, allocated: bool) -> io::Result<()> {
    match fallocate(file, zero_flags(allocated), offset, length) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeroes(file, offset, length),
        other => Ok(other?),
    }
}

fn zero_flags(allocated: bool) -> FallocateFlags {
    let how = if allocated {
        FallocateFlags::ZERO_RANGE
    } else {
        FallocateFlags::PUNCH_HOLE
    };
    how | FallocateFlags::KEEP_SIZE
}

/// Whether ranges can be zeroed faster than by writing.
pub(super) fn zeroes_fast(file: &File, length: u64, allocated: bool) -> bool {
    // Past the end of the file nothing changes, but an unsupported operation is refused all the same.
    fallocate(
        file,
        zero_flags(allocated) | FallocateFlags::KEEP_SIZE,
        length,
        4096,
    )
    .is_ok()
        && (!allocated || fallocate(file, zero_flags(false), length, 4096).is_ok())
}

fn write_zeroes(file: &File, mut offset: u64, mut length: u64) -> io::Result<()> {
    static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
    while length > 0 {
        let part = length.min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..usize::try_from(part).unwrap_or(0)], offset)?;
        offset += part;
        length -= part;
    }
    Ok(())
}

/// The next data at or after `offset`, and the next hole after that; both at most `end`, which is within the volume.
pub(super) fn next_data(file: &File, offset: u64, end: u64) -> io::Result<(u64, u64)> {
    let data = data_from(file, offset, end)?;
    match seek(file, SeekFrom::Hole(data)) {
        Ok(hole) => Ok((data, hole.min(end))),
        // Without knowledge of holes all is data.
        Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok((data, end)),
        Err(error) => Err(error.into()),
    }
}

/// The next data at or after `offset`, at most `end`, which is within the volume. Cheap also in a file of many extents,
/// all of which a search for the next hole may go through.
///
/// What a file that was cut short no longer has is no hole: nobody may take it for zeroes.
pub(super) fn data_from(file: &File, offset: u64, end: u64) -> io::Result<u64> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(data.min(end)),
        Err(Errno::NXIO) if file.metadata()?.len() < end => Err(Errno::IO.into()),
        Err(Errno::NXIO) => Ok(end),
        // Without knowledge of holes all is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(offset),
        Err(error) => Err(error.into()),
    }
}

/// The blocks of an extent that aren't wholly holes.
pub(super) fn data_blocks(file: &File, geometry: Geometry, extent: Extent) -> io::Result<BlockSet> {
    let mut blocks = BlockSet::new();
    let mut at = geometry.offset_of(extent.start()).get();
    let end = geometry.offset_of(extent.end()).get();
    while at < end {
        let (data, hole) = next_data(file, at, end)?;
        if data < hole {
            blocks.insert(geometry.covering(data, hole - data).intersect(extent));
        }
        at = hole.max(at + 1);
    }
    Ok(blocks)
}
