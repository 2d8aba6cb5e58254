//! What a store in a local directory needs beside the object store's own interface.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use tidemark_disk::{durable, lock::FileLock};

/// The directory of a local store, locked against a second vault.
#[derive(Debug)]
pub(super) struct LocalDir {
    root: PathBuf,
    _lock: FileLock,
}

/// What makes visible objects durable, where a put that failed may have left one visible.
pub(crate) trait Settle: std::fmt::Debug + Send + Sync {
    /// Makes what is visible in a directory durable. Blocks.
    fn settle(&self, prefix: &str) -> io::Result<()>;

    /// Drops an object from the page cache. Blocks.
    fn forget(&self, object: &str) -> io::Result<()>;
}

impl LocalDir {
    pub(super) fn open(root: &Path) -> Result<Self> {
        durable::create_dir(root)
            .with_context(|| format!("create the store's directory {}", root.display()))?;
        let lock = FileLock::of_dir(root)
            .with_context(|| format!("lock the store's directory {}", root.display()))?;
        remove_staged(root)
            .with_context(|| format!("clear unfinished writes below {}", root.display()))?;
        Ok(Self {
            root: root.to_owned(),
            _lock: lock,
        })
    }
}

impl Settle for LocalDir {
    /// Syncs the files of a directory, the directory, and those above it up to the root.
    fn settle(&self, prefix: &str) -> io::Result<()> {
        let mut dir = self.root.join(prefix);
        match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
            Ok(entries) => {
                for entry in entries {
                    let entry = entry?;
                    if entry.file_type()?.is_file() {
                        File::open(entry.path())?.sync_all()?;
                    }
                }
            }
        }
        while dir != self.root {
            durable::sync_dir(&dir)?;
            if !dir.pop() {
                break;
            }
        }
        durable::sync_dir(&self.root)
    }

    fn forget(&self, object: &str) -> io::Result<()> {
        let file = File::open(self.root.join(object))?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(())
    }
}

/// A put writes to `<name>#<number>` first; a crash leaves that behind.
fn remove_staged(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_staged(&entry.path())?;
        } else if is_staged(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn is_staged(name: &str) -> bool {
    name.rsplit_once('#')
        .is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit()))
}

/// Room on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it, in bytes.
    pub size: u64,
    /// What is left for everybody, in bytes.
    pub available: u64,
}

impl Space {
    /// Of the file system that the directory is on. Blocks.
    ///
    /// # Errors
    /// The directory can't be looked at.
    pub fn of(dir: &Path) -> io::Result<Self> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(Self {
            size: stat.f_blocks.saturating_mul(stat.f_frsize),
            available: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }
}

/// Room set aside, so that retire and reclaim work on a full disk.
#[derive(Debug, Clone)]
pub struct Reserve {
    path: PathBuf,
    length: u64,
}

impl Reserve {
    /// A reserve of `length` bytes in `dir`; 0 = none.
    #[must_use]
    pub fn new(dir: &Path, length: u64) -> Self {
        Self {
            path: dir.join("reserve"),
            length,
        }
    }

    /// Sets the room aside, where it isn't and can be. Returns whether it is.
    pub fn fill(&self) -> bool {
        if self.length == 0 {
            let _ = fs::remove_file(&self.path);
            return false;
        }
        durable::open_allocated(&self.path, self.length)
            .inspect_err(|error| {
                tracing::warn!(path = %self.path.display(), %error, "no room for the reserve");
            })
            .is_ok()
    }

    /// Lets the room go. Returns whether there was any.
    pub fn release(&self) -> bool {
        self.length > 0 && fs::remove_file(&self.path).is_ok()
    }
}

#[cfg(test)]
#[path = "../../../crates/disk/src/durable/ext4.rs"]
mod ext4;

#[cfg(test)]
mod tests {
    use super::{ext4::Ext4, *};

    #[test]
    fn unfinished_writes_are_cleared_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("volumes/x/segments/y");
        fs::create_dir_all(&deep).unwrap();
        for name in ["00000000", "00000001#1", "a#b", "#"] {
            fs::write(deep.join(name), b"x").unwrap();
        }
        LocalDir::open(dir.path()).unwrap();
        let mut left: Vec<_> = fs::read_dir(&deep)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["#", "00000000", "a#b"]);
    }

    /// A put whose last sync failed: the object has its bytes and its name, and nobody knows for how long.
    #[test]
    fn what_is_visible_and_was_settled_survives_a_loss_of_power() {
        let Some(disk) = Ext4::mount() else {
            return;
        };
        let local = LocalDir::open(&disk.path().join("store")).unwrap();
        for (version, content) in ["first", "second"].into_iter().enumerate() {
            let manifests = local.root.join("volumes/v/manifest");
            fs::create_dir_all(&manifests).unwrap();
            let (staged, name) = (format!("{version}#1"), version.to_string());
            fs::write(manifests.join(&staged), content).unwrap();
            fs::rename(manifests.join(&staged), manifests.join(&name)).unwrap();
            local.settle("volumes/v/manifest").unwrap();
            let lost = disk.after_a_loss_of_power();
            let found = fs::read(lost.path().join("store/volumes/v/manifest").join(&name));
            assert_eq!(found.unwrap(), content.as_bytes());
        }
    }

    #[test]
    fn a_second_vault_on_the_same_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = LocalDir::open(dir.path()).unwrap();
        assert!(LocalDir::open(dir.path()).is_err());
    }
}
