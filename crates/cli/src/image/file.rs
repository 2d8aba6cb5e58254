//! The file that an image is written to: a new one that takes its name only when it is whole, or an older image that is
//! brought up to date in place.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, fallocate};
use tidemark_disk::{FileLock, LockError, durable};

use crate::failure::{self, Failure};

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A file that an image is being written to. Dropped before it is [finished](Self::finish), a new one is removed.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    output: PathBuf,
    kind: Kind,
    /// Of the file that is replaced or changed, so that no capture service takes it up meanwhile.
    _lock: Option<FileLock>,
}

/// What becomes of the file.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// A temporary file, all holes at first, that is renamed when it is whole.
    New {
        /// Beside the output, so that the rename stays within one filesystem.
        temporary: PathBuf,
        /// Whether the output may exist.
        replace: bool,
    },
    /// An older image.
    Patched,
}

impl ImageFile {
    /// A new file of `length` bytes, all holes, that is to become `output`.
    ///
    /// # Errors
    /// `output` exists and `replace` is not set, is no regular file, is in use as a volume, or its folder cannot be
    /// written.
    pub fn create(output: &Path, length: u64, replace: bool) -> Result<Self, Failure> {
        let lock = check_output(output, replace)?;
        let temporary = temporary_beside(output)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            // It holds whatever the volume held.
            .mode(0o600)
            .open(&temporary)
            .map_err(|e| Failure::io(format_args!("create {}", temporary.display()), &e))?;
        let image = Self {
            file,
            output: output.to_owned(),
            kind: Kind::New { temporary, replace },
            _lock: lock,
        };
        image
            .file
            .set_len(length)
            .map_err(|e| Failure::io(format_args!("make {} that long", output.display()), &e))?;
        Ok(image)
    }

    /// An existing image of `length` bytes, to be changed in place.
    ///
    /// # Errors
    /// It is missing, of another length, in use as a volume, or cannot be written.
    pub fn patch(output: &Path, length: u64) -> Result<Self, Failure> {
        let shown = output.display();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(output)
            .map_err(|e| {
                Failure::io(format_args!("open {shown}"), &e).with_action(
                    "with --since the output must be a copy of the older snapshot: read that one first, without --since",
                )
            })?;
        let found = file
            .metadata()
            .map_err(|e| Failure::io(format_args!("look at {shown}"), &e))?;
        if !found.is_file() || found.len() != length {
            return Err(Failure::new(
                failure::Kind::Conflict,
                "OUTPUT_MISMATCH",
                format!(
                    "{shown} has {} bytes, the snapshot {length}: it is no copy of the older snapshot",
                    found.len()
                ),
                "read the older snapshot into it first, without --since",
            ));
        }
        let lock = Some(lock_output(&file, output)?);
        Ok(Self {
            file,
            output: output.to_owned(),
            kind: Kind::Patched,
            _lock: lock,
        })
    }

    /// To write to.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// The name that was asked for.
    #[must_use]
    pub fn shown(&self) -> &Path {
        &self.output
    }

    /// Makes a range zero, as a hole where the filesystem has holes.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        if matches!(self.kind, Kind::New { .. }) {
            // Nothing is written twice, so it is still a hole.
            return Ok(());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, hole, offset, length) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            other => return other.map_err(io::Error::from),
        }
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let piece = (end - at).min(ZEROS.len() as u64);
            // At most the length of ZEROS.
            let piece_len = usize::try_from(piece).unwrap_or(ZEROS.len());
            self.file.write_all_at(&ZEROS[..piece_len], at)?;
            at += piece;
        }
        Ok(())
    }

    /// Makes the content durable, then gives a new file its name.
    ///
    /// # Errors
    /// It cannot be synced or renamed, or the output has come to exist meanwhile.
    pub fn finish(mut self) -> Result<(), Failure> {
        let output = self.output.clone();
        let shown = output.display();
        self.file
            .sync_all()
            .map_err(|e| Failure::io(format_args!("sync {shown}"), &e))?;
        // From here on there is nothing to remove; where the rename fails it is put back.
        let Kind::New { temporary, replace } = std::mem::replace(&mut self.kind, Kind::Patched)
        else {
            return Ok(());
        };
        let renamed = if replace {
            durable::rename(&temporary, &output)
        } else {
            durable::rename_new(&temporary, &output)
        };
        renamed.map_err(|error| {
            self.kind = Kind::New { temporary, replace };
            if error.kind() == io::ErrorKind::AlreadyExists {
                exists(&output)
            } else {
                Failure::io(format_args!("give {shown} its name"), &error)
            }
        })
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        if let Kind::New { temporary, .. } = &self.kind {
            // Nothing better can be done about a file that cannot be removed than to leave it.
            let _ = std::fs::remove_file(temporary);
        }
    }
}

/// The lock of an output that exists and is to be replaced.
fn check_output(output: &Path, replace: bool) -> Result<Option<FileLock>, Failure> {
    match std::fs::metadata(output) {
        Ok(found) if !found.is_file() => Err(Failure::new(
            failure::Kind::Usage,
            "OUTPUT_INVALID",
            format!("{} is no regular file", output.display()),
            "name a file: images are written sparse and renamed when they are whole",
        )),
        Ok(_) if !replace => Err(exists(output)),
        Ok(_) => File::open(output)
            .map_err(|e| Failure::io(format_args!("open {}", output.display()), &e))
            .and_then(|file| lock_output(&file, output))
            .map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::io(
            format_args!("look at {}", output.display()),
            &error,
        )),
    }
}

/// A capture service holds this lock of each of its volumes: writing to one past it would escape its tracking, and
/// replacing one would leave its clients writing to a file without a name.
fn lock_output(file: &File, output: &Path) -> Result<FileLock, Failure> {
    FileLock::of_file(file, output).map_err(|error| match error {
        LockError::Owned { .. } => Failure::new(
            failure::Kind::Conflict,
            "OUTPUT_IN_USE",
            format!("{} is in use, by a capture service or another command", output.display()),
            "name another file; to bring a protected volume back, remove the volume first, or write the image to it through NBD",
        ),
        LockError::Io { source, .. } => {
            Failure::io(format_args!("lock {}", output.display()), &source)
        }
    })
}

fn exists(output: &Path) -> Failure {
    Failure::new(
        failure::Kind::Conflict,
        "OUTPUT_EXISTS",
        format!("{} exists", output.display()),
        "name another file, or replace it with --force",
    )
}

/// `.NAME.tidemark-RANDOM` in the output's folder.
fn temporary_beside(output: &Path) -> Result<PathBuf, Failure> {
    let name = match output.file_name().and_then(|name| name.to_str()) {
        Some(name) if name != "-" => name,
        _ => {
            return Err(Failure::new(
                failure::Kind::Usage,
                "OUTPUT_INVALID",
                format!("{} names no file", output.display()),
                "name a file: images are written sparse and renamed when they are whole",
            ));
        }
    };
    let random = uuid::Uuid::new_v4().simple();
    Ok(output.with_file_name(format!(".{name}.tidemark-{random}")))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_output_appears_only_when_it_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("a.img");
        let image = ImageFile::create(&output, 1 << 20, false).unwrap();
        image.file().write_all_at(b"data", 4096).unwrap();
        assert!(!output.exists());
        image.finish().unwrap();
        assert_eq!(names(dir.path()), ["a.img"]);
        let found = fs::metadata(&output).unwrap();
        assert_eq!(found.len(), 1 << 20);
        assert!(found.blocks() * 512 <= 8192, "it is sparse");
    }

    #[test]
    fn a_file_that_is_not_finished_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("a.img");
        drop(ImageFile::create(&output, 4096, false).unwrap());
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn an_output_that_exists_is_replaced_only_by_force() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("a.img");
        fs::write(&output, b"old").unwrap();
        let failure = ImageFile::create(&output, 4096, false).unwrap_err();
        assert_eq!(failure.reason(), "OUTPUT_EXISTS");
        let image = ImageFile::create(&output, 4096, true).unwrap();
        assert_eq!(fs::read(&output).unwrap(), b"old");
        image.finish().unwrap();
        assert_eq!(fs::metadata(&output).unwrap().len(), 4096);
    }

    #[test]
    fn an_output_that_comes_to_exist_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("a.img");
        let image = ImageFile::create(&output, 4096, false).unwrap();
        fs::write(&output, b"somebody else's").unwrap();
        let failure = image.finish().unwrap_err();
        assert_eq!(failure.reason(), "OUTPUT_EXISTS");
        assert_eq!(fs::read(&output).unwrap(), b"somebody else's");
        assert_eq!(names(dir.path()), ["a.img"]);
    }

    #[test]
    fn folders_devices_and_standard_output_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for output in [
            dir.path(),
            Path::new("/dev/null"),
            Path::new("-"),
            Path::new("a/.."),
        ] {
            let failure = ImageFile::create(output, 4096, true).unwrap_err();
            assert_eq!(failure.reason(), "OUTPUT_INVALID", "{}", output.display());
        }
    }

    #[test]
    fn a_patched_file_keeps_what_is_not_written_and_gets_holes_for_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("a.img");
        fs::write(&output, vec![7; 1 << 20]).unwrap();
        let image = ImageFile::patch(&output, 1 << 20).unwrap();
        image.zero(4096, 512 << 10).unwrap();
        image.file().write_all_at(&[9; 4096], 0).unwrap();
        image.finish().unwrap();
        let content = fs::read(&output).unwrap();
        assert!(content[..4096].iter().all(|&b| b == 9));
        assert!(content[4096..4096 + (512 << 10)].iter().all(|&b| b == 0));
        assert!(content[4096 + (512 << 10)..].iter().all(|&b| b == 7));
        assert!(fs::metadata(&output).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn a_file_that_a_capture_service_owns_is_neither_replaced_nor_patched() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("a.img");
        fs::write(&output, [7; 4096]).unwrap();
        let owner = FileLock::of_file(&File::open(&output).unwrap(), &output).unwrap();
        for refused in [
            ImageFile::create(&output, 4096, true),
            ImageFile::patch(&output, 4096),
        ] {
            assert_eq!(refused.unwrap_err().reason(), "OUTPUT_IN_USE");
        }
        assert_eq!(names(dir.path()), ["a.img"]);
        drop(owner);
        ImageFile::create(&output, 4096, true)
            .unwrap()
            .finish()
            .unwrap();
    }

    #[test]
    fn only_a_file_of_the_right_length_is_patched() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("a.img");
        assert!(ImageFile::patch(&output, 4096).is_err());
        fs::write(&output, b"short").unwrap();
        let failure = ImageFile::patch(&output, 4096).unwrap_err();
        assert_eq!(failure.reason(), "OUTPUT_MISMATCH");
        assert_eq!(fs::read(&output).unwrap(), b"short");
    }
}
