//! A filesystem with little room, which only root can mount.

use std::{
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// Mounted until it is dropped.
#[derive(Debug)]
pub struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// Makes the folder and mounts a tmpfs of this size on it. Without root a test is skipped, and fails in CI.
    pub fn mount(at: &Path, mebibytes: u32) -> Option<Self> {
        if !may_mount() {
            return None;
        }
        fs::create_dir_all(at).unwrap();
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"])
            .arg(at)
            .status()
            .unwrap();
        assert!(done.success(), "a tmpfs could not be mounted");
        Some(Self { at: at.to_owned() })
    }

    pub fn bytes_free(&self) -> u64 {
        let stat = statvfs(&self.at).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Takes everything but so many bytes of what is free now.
    pub fn fill_but(&self, left: u64) {
        let ballast = File::options()
            .create(true)
            .append(true)
            .open(self.ballast())
            .unwrap();
        let held = ballast.metadata().unwrap().len();
        let wanted = self.bytes_free().saturating_sub(left);
        if wanted > 0 {
            // Others write to the same disk meanwhile: then there is less than there seemed to be.
            match fallocate(&ballast, FallocateFlags::empty(), held, wanted) {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::StorageFull),
            }
        }
    }

    /// Gives back what [`SmallDisk::fill_but`] took.
    pub fn make_room(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }

    fn ballast(&self) -> PathBuf {
        self.at.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a service that outlives a failed test may still have files open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

/// Whether this process may mount; a test that can't is skipped, and fails in CI.
pub fn may_mount() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "mounting needs root"
    );
    println!("skipped: mounting needs root");
    false
}
