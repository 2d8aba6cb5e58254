//! Filesystems made in files and mounted, which only root can do.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::writer::BLOCK;

/// Mounted until it is dropped.
pub(crate) struct Disk {
    at: PathBuf,
    dir: TempDir,
}

/// Filesystems that clone files.
pub(crate) const CLONING: [&str; 2] = ["xfs", "btrfs"];

impl Disk {
    /// A new filesystem of this kind. Without root a test is skipped, and fails in CI.
    pub(crate) fn new(kind: &str, mebibytes: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "mounting needs root"
            );
            println!("skipped: mounting needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("disk.img"), dir.path().join("disk"));
        File::create(&image)
            .unwrap()
            .set_len(mebibytes << 20)
            .unwrap();
        fs::create_dir(&at).unwrap();
        let made = Command::new(format!("/sbin/mkfs.{kind}"))
            .arg("-q")
            .arg(&image)
            .output();
        let made = made.unwrap();
        assert!(made.status.success(), "{made:?}");
        let disk = Self { at, dir };
        disk.mount();
        Some(disk)
    }

    /// Mounts it; it is mounted to begin with.
    pub(crate) fn mount(&self) {
        let mounted = Command::new("mount")
            .args(["-o", "loop"])
            .arg(self.dir.path().join("disk.img"))
            .arg(&self.at)
            .output();
        let mounted = mounted.unwrap();
        assert!(mounted.status.success(), "{mounted:?}");
    }

    /// Unmounts it, while nobody has a file of it open.
    pub(crate) fn unmount(&self) {
        let unmounted = Command::new("umount").arg(&self.at).output().unwrap();
        assert!(unmounted.status.success(), "{unmounted:?}");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    /// The directory of clones that there is beside the files, if any.
    pub(crate) fn clones(&self) -> Option<PathBuf> {
        let entries = fs::read_dir(&self.at).unwrap();
        let mut paths = entries.map(|entry| entry.unwrap().path());
        paths.find(|path| name(path).starts_with(".tidemark-"))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a failed test may still have files open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// Which pages of the file are in the page cache.
#[allow(unsafe_code)]
pub(crate) fn resident(file: &File) -> Vec<bool> {
    // SAFETY: the file is not cut short while it is mapped, and nothing is read from the map.
    let map = unsafe { memmap2::Mmap::map(file).unwrap() };
    let mut pages = vec![0_u8; map.len().div_ceil(BLOCK)];
    // SAFETY: the range is that of the map, and there is a byte for each of its pages.
    let told = unsafe {
        libc::mincore(
            map.as_ptr().cast_mut().cast(),
            map.len(),
            pages.as_mut_ptr(),
        )
    };
    assert_eq!(told, 0);
    pages.iter().map(|page| page & 1 == 1).collect()
}
