//! The directory that a filesystem is to be mounted on, or taken off.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tidemark_disk::mount_table::uppermost_at;

use super::loop_device::backing_file_of_ours;
use crate::failure::{Failure, Kind};

fn invalid(at: &Path, what: &str) -> Failure {
    Failure::new(
        Kind::Usage,
        "MOUNT_POINT_INVALID",
        format!("cannot mount at {}: {what}", at.display()),
        "name an empty directory that exists",
    )
}

fn in_use(at: &Path, what: &str, action: String) -> Failure {
    Failure::new(
        Kind::Conflict,
        "MOUNT_POINT_IN_USE",
        format!("cannot mount at {}: {what}", at.display()),
        action,
    )
}

/// An empty directory where nothing is mounted; gives its path without symbolic links.
pub(crate) fn free(at: &Path) -> Result<PathBuf, Failure> {
    let path = absolute(at)?;
    let off = || {
        format!(
            "run `tidemark umount {}` first, or name another directory",
            path.display()
        )
    };
    let top = uppermost_at(&path).map_err(|e| Failure::io("read the table of mounts", &e))?;
    if let Some(top) = top {
        let ours = backing_file_of_ours(&top.source).is_some();
        return Err(if ours {
            in_use(at, "a volume or snapshot is mounted there already", off())
        } else {
            let what = format!("a filesystem of type {} is mounted there", top.kind);
            in_use(
                at,
                &what,
                "unmount it first, or name another directory".into(),
            )
        });
    }
    match fs::read_dir(&path).and_then(|mut entries| entries.next().transpose()) {
        Ok(None) => Ok(path),
        Ok(Some(_)) => Err(invalid(at, "the directory is not empty")),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(invalid(at, "it is not a directory"))
        }
        Err(error) => Err(invalid(at, &error.to_string())),
    }
}

/// The path without symbolic links. The last part is not looked at where it can't be: what is mounted there may be dead.
pub(crate) fn absolute(at: &Path) -> Result<PathBuf, Failure> {
    let error = match at.canonicalize() {
        Ok(path) => return Ok(path),
        Err(error) => error,
    };
    if error.kind() == io::ErrorKind::NotFound {
        return Err(Failure::new(
            Kind::NotFound,
            "MOUNT_POINT_INVALID",
            format!("there is no directory {}", at.display()),
            "name one that exists",
        ));
    }
    let parent = match at.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Err(invalid(at, &error.to_string())),
    };
    match (parent.canonicalize(), at.file_name()) {
        (Ok(parent), Some(name)) => Ok(parent.join(name)),
        _ => Err(invalid(at, &error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_empty_directory_is_mounted_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("full/entry")).unwrap();
        fs::create_dir(path("empty")).unwrap();
        fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink(path("empty"), path("link")).unwrap();
        let empty = path("empty").canonicalize().unwrap();
        assert_eq!(free(&path("link")).unwrap(), empty);
        for (name, reason, kind) in [
            ("full", "MOUNT_POINT_INVALID", Kind::Usage),
            ("file", "MOUNT_POINT_INVALID", Kind::Usage),
            ("file/below", "MOUNT_POINT_INVALID", Kind::Usage),
            ("none", "MOUNT_POINT_INVALID", Kind::NotFound),
        ] {
            let refused = free(&path(name)).unwrap_err();
            assert_eq!(
                (refused.reason(), refused.kind()),
                (reason, kind),
                "{refused}"
            );
        }
        let taken = free(Path::new("/proc")).unwrap_err();
        assert_eq!(taken.reason(), "MOUNT_POINT_IN_USE");
    }
}
