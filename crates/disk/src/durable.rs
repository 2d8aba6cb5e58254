//! Writes that survive a power loss once they have returned.
//!
//! A file's content is durable after an fsync of the file, its name after an fsync of its directory. Whatever
//! replaces a file does so by a rename of a synced temporary, so that a reader finds the old or the new content.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FallocateFlags, RenameFlags, fallocate},
    io::Errno,
};

#[cfg(test)]
mod ext4;

/// Name ending of files that are not complete yet. Whatever carries it after a crash can be removed.
pub const TEMPORARY_SUFFIX: &str = ".tmp";

/// Replaces `path` by a file with this content, durably.
///
/// # Errors
/// Where the temporary can't be written, synced or renamed; `path` then has its old content, or is absent as before.
pub fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = temporary_of(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    rename(&temporary, path)
}

/// Starts to write a range of a file to the disk and doesn't wait for it, so that the sync at the end of a long write
/// finds little left to do. Only a hint: what fails shows at that sync.
pub fn start_writeback(file: &File, offset: u64, length: u64) {
    #[cfg(target_os = "linux")]
    if let (Ok(offset), Ok(length)) = (offset.try_into(), length.try_into()) {
        #[allow(unsafe_code)]
        // SAFETY: an open descriptor and plain numbers; no memory is passed.
        let _ = unsafe {
            libc::sync_file_range(
                file.as_raw_fd(),
                offset,
                length,
                libc::SYNC_FILE_RANGE_WRITE,
            )
        };
    }
}

/// Gives a file another name in the same directory, replacing what has it, durably.
///
/// # Errors
/// Where the rename or the directory's sync fails. After the latter either name may be found.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_dir(parent(to))
}

/// Gives a file another name in the same directory that nothing has yet, durably.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] where something has the name; else as [`rename`].
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A filesystem that cannot rename like that: a second name is never put over one that is there.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)?;
        }
        other => other?,
    }
    sync_dir(parent(to))
}

/// Removes a file durably. One that is absent is no error.
///
/// # Errors
/// Where it can't be removed or the directory can't be synced.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(parent(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Creates a directory durably, with the ones above it. One that exists is no error.
///
/// # Errors
/// Where one can't be created or synced.
pub fn create_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent().filter(|above| !above.as_os_str().is_empty()) {
        create_dir(above)?;
    }
    match fs::create_dir(path) {
        Ok(()) => sync_dir(parent(path)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes a directory and all it holds; the removal is durable. One that is absent is no error.
///
/// The directory gets a temporary name first, so that a crash leaves it whole or recognisably removed.
///
/// # Errors
/// Where it can't be renamed or removed.
pub fn remove_dir(path: &Path) -> io::Result<()> {
    let temporary = temporary_of(path);
    match fs::remove_dir_all(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    match rename(path, &temporary) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    fs::remove_dir_all(&temporary)?;
    sync_dir(parent(path))
}

/// Makes the names in a directory durable.
///
/// # Errors
/// Where it can't be opened or synced.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Opens a file of fixed length for reading and writing, creating it where it doesn't exist. Its space is allocated,
/// so that no later write in place finds the disk full.
///
/// # Errors
/// Where it can't be created, or there is no room for it: then it is not left behind.
pub fn open_allocated(path: &Path, length: u64) -> io::Result<File> {
    let existed = path.exists();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    let allocated = fallocate(&file, FallocateFlags::empty(), 0, length)
        .map_err(io::Error::from)
        .and_then(|()| file.set_len(length))
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_dir(parent(path)));
    if let (Err(_), false) = (&allocated, existed) {
        fs::remove_file(path)?;
    }
    allocated.map(|()| file)
}

/// Makes a file longer, from `from` (its length) to `to`, with its space allocated.
///
/// # Errors
/// Where there is no room: what the file got before the disk was full is given back, to whoever makes room.
pub fn extend_allocated(file: &File, from: u64, to: u64) -> io::Result<()> {
    if let Err(error) = fallocate(file, FallocateFlags::empty(), from, to - from) {
        file.set_len(from)?;
        return Err(error.into());
    }
    Ok(())
}

fn temporary_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(TEMPORARY_SUFFIX);
    PathBuf::from(name)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::{ext4::Ext4, *};

    #[test]
    fn a_file_is_replaced_whole_and_its_temporary_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        write_file(&path, b"old").unwrap();
        write_file(&path, b"newer").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newer");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_name_that_is_taken_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (new, old) = (dir.path().join("new"), dir.path().join("old"));
        fs::write(&new, b"new").unwrap();
        fs::write(&old, b"old").unwrap();
        let error = rename_new(&new, &old).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&old).unwrap(), b"old");
        rename_new(&new, &dir.path().join("free")).unwrap();
        assert_eq!(fs::read(dir.path().join("free")).unwrap(), b"new");
        assert!(!new.exists());
    }

    #[test]
    fn removing_what_is_absent_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        remove_file(&dir.path().join("none")).unwrap();
        remove_dir(&dir.path().join("none")).unwrap();
        let full = dir.path().join("a/b/c");
        create_dir(&full).unwrap();
        create_dir(&full).unwrap();
        write_file(&full.join("file"), b"x").unwrap();
        remove_dir(&dir.path().join("a")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_allocated_file_has_its_space_and_keeps_its_content() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map");
        let file = open_allocated(&path, 1 << 20).unwrap();
        file.write_all_at(b"kept", 5).unwrap();
        drop(file);
        let file = open_allocated(&path, 1 << 20).unwrap();
        let mut back = [0; 4];
        file.read_exact_at(&mut back, 5).unwrap();
        assert_eq!(&back, b"kept");
        assert!(file.metadata().unwrap().blocks() * 512 >= 1 << 20);
    }

    #[test]
    fn what_has_returned_survives_a_loss_of_power() {
        let Some(disk) = Ext4::mount() else {
            return;
        };
        let at = |name: &str| disk.path().join(name);
        let old = |name: &str| write_file(&at(name), b"old").unwrap();
        // Each looks at the disk before the next one syncs anything.
        let lost = || disk.after_a_loss_of_power();
        let content = |name: &str| fs::read(lost().path().join(name)).unwrap();
        let is_there = |name: &str| lost().path().join(name).exists();

        old("replaced");
        write_file(&at("replaced"), b"new").unwrap();
        assert_eq!(content("replaced"), b"new", "write_file");

        old("renamed");
        rename(&at("renamed"), &at("other")).unwrap();
        assert_eq!(content("other"), b"old", "rename");

        old("named");
        rename_new(&at("named"), &at("free")).unwrap();
        assert_eq!(content("free"), b"old", "rename_new");

        remove_file(&at("free")).unwrap();
        assert!(!is_there("free"), "remove_file");

        create_dir(&at("a/b")).unwrap();
        assert!(is_there("a/b"), "create_dir");

        write_file(&at("a/b/file"), b"x").unwrap();
        remove_dir(&at("a")).unwrap();
        assert!(!is_there("a"), "remove_dir");

        drop(open_allocated(&at("map"), 8192).unwrap());
        assert_eq!(content("map").len(), 8192, "open_allocated");
    }

    fn free_on(disk: &Ext4) -> u64 {
        let found = rustix::fs::statvfs(disk.path()).unwrap();
        found.f_bavail * found.f_frsize
    }

    /// On a filesystem whose partial allocations stay after a failure, as tmpfs's don't.
    #[test]
    fn a_file_that_cannot_grow_keeps_its_length_and_gives_the_space_back() {
        let Some(disk) = Ext4::mount() else {
            return;
        };
        let file = open_allocated(&disk.path().join("map"), 8192).unwrap();
        let free = free_on(&disk);
        let error = extend_allocated(&file, 8192, 64 << 20).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(file.metadata().unwrap().len(), 8192);
        // The filesystem may keep a block or two of its own for the extents that there were.
        assert!(free - free_on(&disk) < 64 << 10);
        extend_allocated(&file, 8192, 1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        assert!(free_on(&disk) < free);
    }
}
