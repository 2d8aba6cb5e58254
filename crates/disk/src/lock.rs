//! Locks that die with their owner: `flock(2)` on an open file, so that none is ever stale.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process, thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use thiserror::Error;

/// Why a lock was not taken.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{path} is in use by another process{}", owner.map_or(String::new(), |pid| format!(" (pid {pid})")))]
    Owned {
        /// What is locked.
        path: PathBuf,
        /// The process that has it, where it is known.
        owner: Option<u32>,
    },
    /// The lock can't be taken for another reason.
    #[error("lock {path}: {source}")]
    Io {
        /// What should be locked.
        path: PathBuf,
        /// Why it can't be.
        source: io::Error,
    },
}

/// A lock on a file, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

impl FileLock {
    /// Takes the lock of a directory: its file `lock`, which also names the owner's process.
    ///
    /// # Errors
    /// Where another process has it, or the file can't be opened.
    pub fn of_dir(dir: &Path) -> Result<Self, LockError> {
        let path = dir.join("lock");
        let failed = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        if !try_lock(&file).map_err(failed)? {
            let mut text = String::new();
            let owner = file
                .read_to_string(&mut text)
                .ok()
                .and_then(|_| text.trim().parse().ok());
            return Err(LockError::Owned {
                path: dir.to_owned(),
                owner,
            });
        }
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| writeln!(file, "{}", process::id()))
            .map_err(failed)?;
        Ok(Self { _file: file })
    }

    /// Takes the lock of a file that is already open; `path` is for the error only.
    ///
    /// # Errors
    /// Where another process, or another handle of this one, has it.
    pub fn of_file(file: &File, path: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        let file = file.try_clone().map_err(failed)?;
        if try_lock(&file).map_err(failed)? {
            Ok(Self { _file: file })
        } else {
            Err(LockError::Owned {
                path: path.to_owned(),
                owner: None,
            })
        }
    }
}

/// How long a lock is waited for. One that this process has let go of may be held a moment longer by a child that is
/// between its fork and its exec, which closes what the parent had open.
const WAIT_MAX: Duration = Duration::from_millis(250);
const WAIT_PERIOD: Duration = Duration::from_millis(2);

fn try_lock(file: &File) -> io::Result<bool> {
    let begun = Instant::now();
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if begun.elapsed() < WAIT_MAX => thread::sleep(WAIT_PERIOD),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_until_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let first = FileLock::of_dir(dir.path()).unwrap();
        match FileLock::of_dir(dir.path()) {
            Err(LockError::Owned { owner, .. }) => assert_eq!(owner, Some(process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        FileLock::of_dir(dir.path()).unwrap();
    }

    #[test]
    fn a_lock_that_is_held_a_moment_longer_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        // As a child has it until its exec: the same open file.
        let inherited = File::create(dir.path().join("lock")).unwrap();
        drop(FileLock::of_file(&inherited, dir.path()).unwrap());
        let child = thread::spawn(move || {
            thread::sleep(WAIT_PERIOD * 10);
            drop(inherited);
        });
        FileLock::of_dir(dir.path()).unwrap();
        child.join().unwrap();
    }
}
