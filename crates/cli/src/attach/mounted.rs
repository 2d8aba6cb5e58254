//! What is mounted by us, and how it ends.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::join_all;
use rustix::{
    io::Errno,
    mount::{UnmountFlags, unmount},
};
use serde::Serialize;
use tidemark_disk::mount_table::{Mounted, mounts, uppermost_at};

use super::{
    aside::{self, Answer},
    loop_device::{answers, backing_file_of_ours, wait_until_gone},
    point,
};
use crate::failure::{Failure, Kind};

/// How long a device has to end after its last user.
const GONE_MAX: Duration = Duration::from_secs(10);
/// Programs that a message names.
const HOLDERS_MAX: usize = 5;

/// A mounted volume or snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Ours {
    pub(crate) volume: String,
    /// Its number; `null` where it is the volume itself.
    pub(crate) snapshot: Option<u64>,
    pub(crate) at: PathBuf,
    /// The loop device.
    pub(crate) device: PathBuf,
    pub(crate) fs_type: String,
    pub(crate) read_only: bool,
    /// Whether the service still serves it. It never will again where it doesn't.
    pub(crate) alive: bool,
    /// Whether the service answers now: not while it is stopped.
    pub(crate) answers: bool,
}

/// How an unmount went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unmounted {
    /// Everything that was written had reached the service.
    pub(crate) clean: bool,
    /// Programs use it still; it has no name any more.
    pub(crate) lazily: bool,
}

/// Which volume or snapshot a file of the service's directory is. What the directory is called doesn't matter: where it
/// was unmounted meanwhile the kernel leaves it out.
fn named(file: &Path) -> Option<(String, Option<u64>)> {
    let name = file.file_name()?.to_str()?.strip_suffix(".img")?;
    let mut above = file.parent()?.components().rev();
    let (volume, snapshots) = (above.next(), above.next());
    if snapshots.is_some_and(|dir| dir.as_os_str() == ".snapshots") {
        let number = name.split('+').next()?.parse().ok()?;
        let volume = volume?.as_os_str().to_str()?;
        return Some((volume.to_owned(), Some(number)));
    }
    Some((name.to_owned(), None))
}

impl Ours {
    /// None where the mount is somebody else's. Nobody is asked whether it is alive.
    fn of(mounted: &Mounted) -> Option<Self> {
        let (volume, snapshot) = named(&backing_file_of_ours(&mounted.source)?)?;
        Some(Self {
            volume,
            snapshot,
            at: mounted.at.clone(),
            device: mounted.source.clone(),
            fs_type: mounted.kind.clone(),
            read_only: mounted.read_only,
            alive: true,
            answers: true,
        })
    }

    /// All of them, in the order in which they were mounted.
    pub(crate) async fn list() -> Result<Vec<Self>, Failure> {
        let all = mounts().map_err(|e| Failure::io("read the table of mounts", &e))?;
        let asked = all.iter().filter_map(Self::of).map(Self::asked);
        Ok(join_all(asked).await)
    }

    async fn asked(self) -> Self {
        let answer = aside::ask(&self.device).await;
        Self {
            alive: answer != Answer::Dead,
            answers: answer == Answer::Served,
            ..self
        }
    }

    /// The one at a directory, as if it were alive.
    pub(crate) fn at(dir: &Path) -> Result<Self, Failure> {
        let path = point::absolute(dir)?;
        let top = uppermost_at(&path).map_err(|e| Failure::io("read the table of mounts", &e))?;
        let Some(top) = top else {
            return Err(Failure::new(
                Kind::NotFound,
                "NOT_MOUNTED",
                format!("nothing is mounted at {}", dir.display()),
                "`tidemark mount` lists what is",
            ));
        };
        Self::of(&top).ok_or_else(|| {
            Failure::new(
                Kind::Conflict,
                "NOT_OURS",
                format!(
                    "what is mounted at {} (type {}, from {}) is no volume or snapshot that this command has mounted",
                    dir.display(),
                    top.kind,
                    top.source.display()
                ),
                "unmount it with umount",
            )
        })
    }

    /// Unmounts it, and waits until its device has ended. Where the service has ended under it, it is taken off its
    /// directory even while programs use it: they can't get anything from it any more. It may never return.
    pub(crate) fn unmount(&self) -> Result<Unmounted, Failure> {
        let (file, alive) = (backing_file_of_ours(&self.device), answers(&self.device));
        // What can't be written is told now; unmounting doesn't.
        let synced = || File::open(&self.at).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
        let clean = alive && synced().is_ok();
        let lazily = match unmount(&self.at, UnmountFlags::NOFOLLOW) {
            Ok(()) => false,
            Err(Errno::BUSY) if alive => return Err(self.busy()),
            Err(Errno::BUSY) => {
                let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                unmount(&self.at, flags).map_err(|errno| self.failed(errno))?;
                true
            }
            Err(errno) => return Err(self.failed(errno)),
        };
        let gone = file.is_none_or(|file| lazily || wait_until_gone(&self.device, &file, GONE_MAX));
        if !gone {
            return Err(Failure::new(
                Kind::Conflict,
                "MOUNT_IN_USE",
                format!(
                    "{} is unmounted, but {} is still in use: another mount of it, or a program that has it open",
                    self.at.display(),
                    self.device.display()
                ),
                "end that; the device then ends by itself",
            ));
        }
        Ok(Unmounted { clean, lazily })
    }

    fn failed(&self, errno: Errno) -> Failure {
        Failure::io(format!("unmount {}", self.at.display()), &errno.into())
    }

    fn busy(&self) -> Failure {
        let holders = holders(&self.at);
        let by = if holders.is_empty() {
            String::new()
        } else {
            format!(" by {}", holders.join(", "))
        };
        Failure::new(
            Kind::Conflict,
            "MOUNT_IN_USE",
            format!("{} is in use{by}", self.at.display()),
            "end what uses it, or leave the directory, then run this again",
        )
    }
}

/// Programs that have something below a directory open, as far as the kernel's links tell: name and process id.
fn holders(at: &Path) -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let below = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(at));
    let holds = |process: &Path| {
        let open = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        ["cwd", "root", "exe"]
            .iter()
            .any(|link| below(process.join(link)))
            || open.map(|entry| entry.path()).any(below)
    };
    processes
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let process = entry.path();
            let name = fs::read_to_string(process.join("comm")).ok()?;
            holds(&process).then(|| format!("{} ({pid})", name.trim()))
        })
        .take(HOLDERS_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_and_snapshot_are_known_by_the_file_even_where_its_directory_is_unmounted() {
        for (file, volume, snapshot) in [
            ("/mnt/tidemark/data.img", "data", None),
            ("/data.img", "data", None),
            ("/mnt/.snapshots/data/3+scratch-1f.img", "data", Some(3)),
            ("/.snapshots/data/12.img", "data", Some(12)),
        ] {
            let expected = Some((volume.to_owned(), snapshot));
            assert_eq!(named(Path::new(file)), expected, "{file}");
        }
        for other in ["/", "/data.raw", "/.snapshots/data/x.img"] {
            assert_eq!(named(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_program_that_is_in_a_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().canonicalize().unwrap();
        assert_eq!(holders(&at), [""; 0]);
        let _open = File::create(at.join("open")).unwrap();
        let told = holders(&at).join(" ");
        assert!(
            told.contains(&format!("({})", std::process::id())),
            "{told}"
        );
    }
}
