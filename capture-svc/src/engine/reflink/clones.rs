//! The directory of a volume's clones, beside the volume file: making, finding and removing them.
//!
//! A clone is named by its cut. It is there to be read by the record only after it and its name are durable.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use capture_core::reflink::state::CloneFile;
use rustix::{
    fs::{IFlags, ioctl_ficlone, ioctl_getflags, ioctl_setflags},
    io::Errno,
};
use tidemark_block::VolumeId;
use tidemark_disk::durable;

use super::super::volume_file;

const SUFFIX: &str = ".clone";

/// A clone that was just made.
pub(super) struct Made {
    pub(super) clone: CloneFile,
    pub(super) file: File,
    pub(super) length: u64,
    /// For how long whoever writes to the volume file had to wait.
    pub(super) stall: Duration,
}

/// Why there is no clone.
#[derive(Debug)]
pub(super) enum CloneError {
    /// The filesystem doesn't clone this file.
    Unable(io::Error),
    /// The filesystem has no room.
    NoRoom(io::Error),
    /// A sync failed: what was written lately may be lost.
    Sync(io::Error),
    /// Something else.
    Other(io::Error),
}

impl From<io::Error> for CloneError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoRoom(error),
            _ => Self::Other(error),
        }
    }
}

/// The directory.
#[derive(Debug)]
pub(super) struct Clones {
    dir: PathBuf,
}

impl Clones {
    /// Where the clones of a volume file lie: beside it, since only the same filesystem shares extents.
    pub(super) fn beside(file: &Path, volume: VolumeId) -> io::Result<Self> {
        let file = fs::canonicalize(file)?;
        let parent = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self {
            dir: parent.join(format!("{DIR_PREFIX}{volume}")),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes the directory, durably. One that is there must be ours alone: whoever else could put files there could have
    /// them taken for the volume.
    pub(super) fn create_dir(&self) -> io::Result<()> {
        match fs::DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let found = fs::symlink_metadata(&self.dir)?;
        let ours = found.uid() == rustix::process::geteuid().as_raw();
        if !found.is_dir() || !ours || found.mode() & 0o077 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "something else is there that is not the service's own, or that others may use",
            ));
        }
        durable::sync_dir(self.dir.parent().unwrap_or(&self.dir))
    }

    pub(super) fn path_of(&self, cut: u64) -> PathBuf {
        self.dir.join(format!("{cut}{SUFFIX}"))
    }

    /// Clones the volume file, durably. What fails leaves nothing behind.
    pub(super) fn make(&self, volume: &File, cut: u64) -> Result<Made, CloneError> {
        let path = self.path_of(cut);
        // Of a cut that was never recorded.
        durable::remove_file(&path)?;
        let made = self.try_make(volume, cut, &path);
        if made.is_err() {
            // What stays is removed by the next opening.
            let _ = fs::remove_file(&path);
        }
        made
    }

    fn try_make(&self, volume: &File, cut: u64, path: &Path) -> Result<Made, CloneError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(path)?;
        alike(volume, &file)?;
        // Most of what is dirty goes to the disk before writers have to wait.
        volume.sync_data().map_err(CloneError::Sync)?;
        let begun = Instant::now();
        let cloned = ioctl_ficlone(&file, volume);
        let stall = begun.elapsed();
        cloned.map_err(|error| match error {
            Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL | Errno::TXTBSY => {
                CloneError::Unable(error.into())
            }
            Errno::IO => CloneError::Sync(error.into()),
            error => io::Error::from(error).into(),
        })?;
        let synced = file.sync_all().and_then(|()| durable::sync_dir(&self.dir));
        synced.map_err(|error| match CloneError::from(error) {
            // Nothing but the clone is lost.
            CloneError::NoRoom(error) => CloneError::NoRoom(error),
            CloneError::Other(error) | CloneError::Unable(error) | CloneError::Sync(error) => {
                CloneError::Sync(error)
            }
        })?;
        Ok(Made {
            clone: look(&file, cut)?,
            length: file.metadata()?.len(),
            file,
            stall,
        })
    }

    /// Opens a clone, if it is the recorded one.
    pub(super) fn open(&self, clone: CloneFile, length: u64) -> io::Result<Option<File>> {
        let file = match File::open(self.path_of(clone.cut)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let same = look(&file, clone.cut)? == clone && file.metadata()?.len() == length;
        Ok(same.then_some(file))
    }

    /// Removes a clone that no record names any more. The folder isn't synced: one that a loss of power brings back is
    /// removed by the next opening.
    pub(super) fn remove(&self, cut: u64) {
        let path = self.path_of(cut);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(file = %path.display(), %error, "remove a clone that is not needed any more; the next start tries again");
            }
            _ => {}
        }
    }

    /// Removes every clone that isn't named.
    pub(super) fn sweep(&self, is_named: impl Fn(u64) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let cut = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            if let Some(cut) = cut
                .and_then(|cut| cut.parse().ok())
                .filter(|cut| !is_named(*cut))
            {
                self.remove(cut);
            }
        }
        Ok(())
    }
}

const DIR_PREFIX: &str = ".tidemark-";

/// Removes a volume's clones by their directory, which must be the volume's.
pub(super) fn remove_dir(dir: &Path, volume: VolumeId) -> io::Result<()> {
    let name = dir.file_name().and_then(|name| name.to_str());
    if name != Some(&format!("{DIR_PREFIX}{volume}")) || !dir.is_absolute() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is no directory of the volume's clones", dir.display()),
        ));
    }
    durable::remove_dir(dir)
}

/// btrfs clones only between files that are both copied on write, or both not.
fn alike(volume: &File, clone: &File) -> io::Result<()> {
    // A filesystem without such flags has no such rule.
    let (Ok(wanted), Ok(found)) = (ioctl_getflags(volume), ioctl_getflags(clone)) else {
        return Ok(());
    };
    if (wanted ^ found).contains(IFlags::NOCOW) {
        let flags = (found - IFlags::NOCOW) | (wanted & IFlags::NOCOW);
        ioctl_setflags(clone, flags)?;
    }
    Ok(())
}

fn look(file: &File, cut: u64) -> io::Result<CloneFile> {
    let metadata = file.metadata()?;
    let (born_s, born_ns) = volume_file::born(file)?;
    Ok(CloneFile {
        cut,
        inode: metadata.ino(),
        born_s,
        born_ns,
        modified_s: metadata.mtime(),
        modified_ns: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
    })
}
