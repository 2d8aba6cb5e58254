//! An ext4 filesystem in a file, whose power can be cut. Only root can mount it.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::Command,
};

/// Mounted until it is dropped.
#[derive(Debug)]
pub(crate) struct Ext4(tempfile::TempDir);

impl Ext4 {
    /// An empty one of 16 MiB. Without root a test is skipped, and fails in CI.
    pub(crate) fn mount() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            assert!(
                std::env::var_os("CI").is_none_or(|ci| ci != "true"),
                "mounting needs root"
            );
            println!("skipped: mounting needs root");
            return None;
        }
        let made = Self(tempfile::tempdir().unwrap());
        let image = made.0.path().join("image");
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        run(Command::new("mkfs.ext4").arg("-q").arg(&image));
        Some(made.mounted())
    }

    fn mounted(self) -> Self {
        fs::create_dir(self.path()).unwrap();
        // What nobody syncs is not written by itself while a test runs.
        run(Command::new("mount")
            .args(["-o", "loop,commit=900"])
            .arg(self.0.path().join("image"))
            .arg(self.path()));
        self
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("mounted")
    }

    /// What a loss of power now would leave: the filesystem as it is on its disk, mounted again.
    pub(crate) fn after_a_loss_of_power(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(self.0.path().join("image"), dir.path().join("image")).unwrap();
        Self(dir).mounted()
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        // Not mounted where it could not be.
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}");
}
