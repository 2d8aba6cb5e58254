//! A loop device over a file, which ends with its last user.
//!
//! **The mark** of ours is in the device's size limit: [`MARK`] bytes beyond its last sector. They change nothing, because
//! a device has whole sectors only, no other program sets them, and the kernel tells the limit without asking the file,
//! which may be dead. (It asks the file for all that the ioctl of the device's status tells.)

#![allow(
    unsafe_code,
    reason = "loop devices are made by ioctl, for which there is no other interface"
)]

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::filesystem::Partition;

const CONTROL: &str = "/dev/loop-control";
/// Requests of `linux/loop.h`.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const SECTOR: u64 = 512;
/// Bytes of the size limit beyond whole sectors.
const MARK: u64 = 0x171;
/// Devices that others may take before we get one.
const TRIES: usize = 64;
/// Of a device's end.
const LOOK: Duration = Duration::from_millis(10);
/// What direct I/O is aligned to.
const ALIGNMENT: usize = 4096;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    const NONE: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A loop device in use by us; it ends when this is dropped, unless somebody else uses it by then.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Makes one over a file, or over a part of it: writable, past the page cache where the file's filesystem can.
    ///
    /// # Errors
    /// Where this machine has no loop devices, or none is free.
    pub(crate) fn attach(file: &File, part: Option<Partition>) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        for _ in 0..TRIES {
            // SAFETY: it takes no argument; the descriptor is open.
            let free = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if free < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{free}"));
            let device = OpenOptions::new().read(true).write(true).open(&path)?;
            match configure(&device, file, part) {
                // Somebody else was faster.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                done => {
                    return done.map(|()| Self {
                        path,
                        _open: device,
                    });
                }
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// `/dev/loopN`.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn configure(device: &File, file: &File, part: Option<Partition>) -> io::Result<()> {
    let fd = u32::try_from(file.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (offset, length) = match part {
        Some(part) => (part.offset, part.length),
        None => (0, file.metadata()?.len()),
    };
    let config = LoopConfig {
        fd,
        block_size: 0,
        info: LoopInfo {
            offset,
            size_limit: length / SECTOR * SECTOR + MARK,
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            ..LoopInfo::NONE
        },
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads a `struct loop_config`, which this is; both descriptors are open.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The file of a loop device that is ours, as the kernel names it now; none where the device isn't, or is gone.
pub(crate) fn backing_file_of_ours(device: &Path) -> Option<PathBuf> {
    let sysfs = sysfs(device)?;
    let limit = fs::read_to_string(sysfs.join("sizelimit")).ok()?;
    let limit: u64 = limit.trim().parse().ok()?;
    (limit % SECTOR == MARK).then(|| backing_file(&sysfs))?
}

/// Where the kernel tells what is behind `/dev/loopN`.
fn sysfs(device: &Path) -> Option<PathBuf> {
    let name = device.strip_prefix("/dev").ok()?.to_str()?;
    let number = name.strip_prefix("loop")?;
    number.parse::<u32>().ok()?;
    Some(PathBuf::from(format!("/sys/block/{name}/loop")))
}

fn backing_file(sysfs: &Path) -> Option<PathBuf> {
    let told = fs::read(sysfs.join("backing_file")).ok()?;
    let path = told.strip_suffix(b"\n").unwrap_or(&told);
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
}

/// Waits until a device has let go of this file; tells whether it has.
pub(crate) fn wait_until_gone(device: &Path, file: &Path, most: Duration) -> bool {
    let end = Instant::now() + most;
    let holds = || sysfs(device).and_then(|at| backing_file(&at)).as_deref() == Some(file);
    while holds() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}

/// Whether what is behind the device still answers: not where the service that served it has ended.
pub(crate) fn answers(device: &Path) -> bool {
    let mut space = vec![0; 2 * ALIGNMENT];
    let from = space.as_ptr().align_offset(ALIGNMENT);
    let Some(aligned) = space.get_mut(from..from + ALIGNMENT) else {
        return false;
    };
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device);
    direct.is_ok_and(|open| open.read_exact_at(aligned, 0).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_reads_has_the_kernels_layout() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(std::mem::offset_of!(LoopInfo, flags), 52);
        assert_eq!(std::mem::offset_of!(LoopInfo, file_name), 56);
        assert_eq!(std::mem::offset_of!(LoopConfig, info), 8);
    }

    #[test]
    fn only_loop_devices_have_something_behind_them() {
        assert_eq!(
            sysfs(Path::new("/dev/loop7")),
            Some("/sys/block/loop7/loop".into())
        );
        for other in [
            "/dev/sda1",
            "/dev/loop",
            "/dev/loop1p1",
            "loop1",
            "/dev/loop/../x",
        ] {
            assert_eq!(sysfs(Path::new(other)), None, "{other}");
        }
    }
}
