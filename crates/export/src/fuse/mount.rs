//! The mount point: examined, cleared of what a killed server left, mounted, unmounted.
//!
//! Root mounts by the system call, everybody else through the set-user-id program `fusermount3`. A mount is known by
//! its type `fuse.tidemark` and its number in the kernel's table, so that nothing is ever unmounted that is not
//! ours, not even where somebody has mounted something else over it.

use std::ffi::{CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tidemark_disk::mount_table::{Mounted, uppermost_at};

const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
/// Says to the helper on which descriptor to send the mounted device.
const HELPER_SOCKET: &str = "_FUSE_COMMFD";
const SOURCE: &str = "tidemark";
const TYPE: &str = "fuse.tidemark";
/// Stale mounts that may lie on one another.
const STALE_MAX: usize = 16;

/// Why a directory could not be mounted on.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel has no FUSE, or a container lacks the device.
    #[error(
        "cannot mount at {at}: there is no {DEVICE}: load the kernel's module (modprobe fuse), or give the container the \
         device (--device {DEVICE})"
    )]
    NoDevice {
        /// The mount point.
        at: PathBuf,
    },
    /// This process may not.
    #[error(
        "cannot mount at {at}: not permitted: run the service as root (in a container: with the capability SYS_ADMIN and \
         the device {DEVICE}), or install {HELPER} (Debian package fuse3) and let the service's user open {DEVICE}"
    )]
    NotPermitted {
        /// The mount point.
        at: PathBuf,
    },
    /// The directory's content would be hidden.
    #[error(
        "cannot mount at {at}: the directory is not empty: name an empty one, or one that doesn't exist"
    )]
    NotEmpty {
        /// The mount point.
        at: PathBuf,
    },
    /// Another server, or another file system.
    #[error(
        "cannot mount at {at}: a file system of type {kind} is mounted there: stop the service that serves it, unmount it, \
         or name another directory"
    )]
    Mounted {
        /// The mount point.
        at: PathBuf,
        /// What is there.
        kind: String,
    },
    /// The directory can't be made or used.
    #[error(
        "cannot use {at} as a mount point: {error}: name a directory that this service may write to"
    )]
    Directory {
        /// The mount point.
        at: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Whatever else the kernel or the helper says.
    #[error("cannot mount at {at}: {error}: see the kernel's log")]
    Failed {
        /// The mount point.
        at: PathBuf,
        /// What was said.
        error: io::Error,
    },
}

/// What is mounted, until [`Mount::unmount`].
#[derive(Debug)]
pub(super) struct Mount {
    at: PathBuf,
    entry: Option<Mounted>,
}

/// How an unmount went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Nobody used it.
    Whole,
    /// Programs use it still; it has no name any more.
    Lazily,
}

/// A mounted device that requests are read from.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) fd: OwnedFd,
    /// More descriptors of the same may be opened.
    pub(super) clonable: bool,
}

/// Mounts at a directory, which is made where it doesn't exist.
pub(super) fn mount_at(at: &Path) -> Result<(Device, Mount), MountError> {
    clear_stale(at)?;
    let directory = |error| MountError::Directory {
        at: at.to_owned(),
        error,
    };
    fs::create_dir_all(at).map_err(directory)?;
    let at = &at.canonicalize().map_err(directory)?;
    if let Some(entry) = uppermost_at(at).map_err(directory)? {
        return Err(MountError::Mounted {
            at: at.clone(),
            kind: entry.kind,
        });
    }
    if fs::read_dir(at).map_err(directory)?.next().is_some() {
        return Err(MountError::NotEmpty { at: at.clone() });
    }
    let mode = fs::metadata(at).map_err(directory)?.mode();
    let device = match by_system_call(at, mode) {
        Err(error) if is_refusal(&error) => by_helper(at)?,
        other => other.map_err(|error| failed(at, error))?,
    };
    let entry = uppermost_at(at).map_err(directory)?;
    Ok((
        device,
        Mount {
            at: at.clone(),
            entry,
        },
    ))
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

fn failed(at: &Path, error: io::Error) -> MountError {
    let at = at.to_owned();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => MountError::NoDevice { at },
        Some(libc::EPERM | libc::EACCES) => MountError::NotPermitted { at },
        _ => MountError::Failed { at, error },
    }
}

fn by_system_call(at: &Path, mode: u32) -> io::Result<Device> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(DEVICE)?;
    let options = format!(
        "fd={},rootmode={mode:o},user_id={},group_id={},default_permissions,allow_other",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NOATIME;
    let options = CString::new(options)?;
    mount(SOURCE, at, TYPE, flags, options.as_c_str())?;
    Ok(Device {
        fd: device.into(),
        clonable: true,
    })
}

fn by_helper(at: &Path) -> Result<Device, MountError> {
    let error = |error| failed(at, error);
    if !Path::new(DEVICE).exists() {
        return Err(MountError::NoDevice { at: at.to_owned() });
    }
    let (ours, theirs) = UnixStream::pair().map_err(error)?;
    // Its standard input is the socket: no other child can inherit it by accident.
    let mut command = helper();
    let child = command
        .args([
            "-o",
            "fsname=tidemark,subtype=tidemark,nosuid,nodev,noexec,noatime",
        ])
        .arg("--")
        .arg(at)
        .env(HELPER_SOCKET, "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let child = match child {
        Err(refused) if refused.kind() == io::ErrorKind::NotFound => {
            return Err(MountError::NotPermitted { at: at.to_owned() });
        }
        other => other.map_err(error)?,
    };
    // It holds the other end of the socket as long as it lives, in the command.
    drop(command);
    let received = receive(&ours);
    let output = child.wait_with_output().map_err(error)?;
    match received.map_err(error)? {
        Some(fd) if output.status.success() => Ok(Device {
            fd,
            clonable: false,
        }),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(if said.contains("ermi") {
                MountError::NotPermitted { at: at.to_owned() }
            } else {
                error(io::Error::other(said))
            })
        }
    }
}

fn helper() -> Command {
    let mut command = Command::new(HELPER);
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(OsStr::new(":/usr/bin:/bin"));
    command.env("PATH", path);
    command
}

/// The descriptor that the helper sends; none where it ended without.
fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut byte)];
    loop {
        match recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => break,
        }
    }
    Ok(ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

/// Unmounts what a server that was killed has left at the directory, also while programs use it.
fn clear_stale(at: &Path) -> Result<(), MountError> {
    let stale = |error: &io::Error| error.raw_os_error() == Some(libc::ENOTCONN);
    for _ in 0..STALE_MAX {
        match fs::metadata(at) {
            Err(error) if stale(&error) => {}
            _ => return Ok(()),
        }
        let directory = |error| MountError::Directory {
            at: at.to_owned(),
            error,
        };
        // The directory itself can't be asked for its path any more.
        let (parent, name) = (at.parent(), at.file_name());
        let (Some(parent), Some(name)) = (parent, name) else {
            return Err(directory(io::ErrorKind::InvalidInput.into()));
        };
        let at = parent.canonicalize().map_err(directory)?.join(name);
        match uppermost_at(&at).map_err(directory)? {
            Some(entry) if entry.kind == TYPE => {}
            Some(entry) => {
                return Err(MountError::Mounted {
                    at,
                    kind: entry.kind,
                });
            }
            None => return Err(directory(io::Error::from_raw_os_error(libc::ENOTCONN))),
        }
        tracing::warn!(at = %at.display(), "unmounting what an earlier run of the service has left mounted");
        detach(&at).map_err(|error| failed(&at, error))?;
    }
    Ok(())
}

fn detach(at: &Path) -> io::Result<()> {
    match unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Err(rustix::io::Errno::PERM) => by_helper_unmount(at, &["-u", "-q", "-z"]),
        other => Ok(other?),
    }
}

fn by_helper_unmount(at: &Path, options: &[&str]) -> io::Result<()> {
    let status = helper()
        .args(options)
        .arg("--")
        .arg(at)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }
}

impl Mount {
    pub(super) fn path(&self) -> &Path {
        &self.at
    }

    /// Whether it is mounted, and nothing over it.
    fn is_on_top(&self) -> bool {
        let top = uppermost_at(&self.at).ok().flatten();
        let same = |(ours, top): (&Mounted, Mounted)| {
            (ours.number, &ours.device) == (top.number, &top.device)
        };
        self.entry.as_ref().zip(top).is_some_and(same)
    }

    /// Unmounts it: whole where nobody uses it, else so that it is gone from the directory at once and ends when the
    /// last file of it is closed. Where somebody else has unmounted it nothing happens. May wait for requests.
    pub(super) fn unmount(&self) -> io::Result<How> {
        if !self.is_on_top() {
            return Ok(How::Whole);
        }
        let plain = match unmount(&self.at, UnmountFlags::NOFOLLOW) {
            Err(rustix::io::Errno::PERM) => by_helper_unmount(&self.at, &["-u", "-q"]),
            other => other.map_err(Into::into),
        };
        match plain {
            Ok(()) => Ok(How::Whole),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                // What was written through mappings comes now, or never.
                let synced = File::open(&self.at).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
                if let Err(error) = synced {
                    tracing::warn!(at = %self.at.display(), %error, "sync what is mounted");
                }
                self.detach()?;
                Ok(How::Lazily)
            }
            Err(error) => Err(error),
        }
    }

    /// Takes it from the directory at once, whoever uses it.
    pub(super) fn detach(&self) -> io::Result<()> {
        if self.is_on_top() {
            detach(&self.at)
        } else {
            Ok(())
        }
    }
}
