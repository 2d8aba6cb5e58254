//! Services with a mounted directory, filesystems on its files, and trees of files to compare.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use crate::programs::{Split, args, run};

/// How long a service has to end after SIGTERM.
pub(crate) const END_MAX: Duration = Duration::from_secs(10);

/// Mounts that tests make, and mount namespaces.
static MOUNTS: RwLock<()> = RwLock::new(());

/// While this is held no test has a mount namespace of its own: one begins with all mounts that there are, and whatever is
/// unmounted outside stays mounted in it.
pub(crate) fn mounts_are_ours() -> RwLockReadGuard<'static, ()> {
    MOUNTS.read().unwrap_or_else(PoisonError::into_inner)
}

/// While this is held no test has anything mounted that it relies on to be unmounted.
pub(crate) fn in_a_namespace() -> RwLockWriteGuard<'static, ()> {
    MOUNTS.write().unwrap_or_else(PoisonError::into_inner)
}

/// A loop device on a file, and its filesystem where it is mounted. Dropping it lets go of both, whatever state they
/// are in.
pub(crate) struct Disk {
    pub(crate) device: String,
    pub(crate) at: PathBuf,
    is_ours: bool,
}

impl Disk {
    pub(crate) fn mount(file: &Path, at: PathBuf, direct: bool, options: &str) -> Self {
        let direct = if direct {
            "--direct-io=on"
        } else {
            "--direct-io=off"
        };
        let set = args!["--find", "--show", direct, file];
        let device = run("losetup", set).trim().to_owned();
        fs::create_dir_all(&at).unwrap();
        let disk = Self {
            device,
            at,
            is_ours: true,
        };
        run("mount", args!["-o", options, disk.device, disk.at]);
        disk
    }

    /// Unmounts, so that everything has reached the file.
    pub(crate) fn unmount(mut self) {
        run("umount", args![self.at]);
        run("losetup", args!["--detach", self.device]);
        // From now on the device may be another test's.
        self.is_ours = false;
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.is_ours {
            return;
        }
        for (program, arguments) in [
            ("umount", args!["--lazy", self.at].as_slice()),
            ("losetup", args!["--detach", self.device].as_slice()),
        ] {
            let _ = Command::new(program)
                .args(arguments)
                .stderr(Stdio::null())
                .status();
        }
    }
}

pub(crate) struct Scene {
    pub(crate) services: Split,
    // Late, so that the services end before it goes.
    pub(crate) dir: tempfile::TempDir,
    _mounts: RwLockReadGuard<'static, ()>,
}

impl Scene {
    /// Both services, a mounted directory, and a volume in it.
    pub(crate) fn new(size: &str) -> Self {
        let mounts = mounts_are_ours();
        let dir = tempfile::tempdir().unwrap();
        let mut services = Split::new(dir.path());
        services.capture_flags = vec![
            format!("--fuse-mount={}", dir.path().join("files").display()),
            "--scrub-period=1s".into(),
        ];
        services.start_vault();
        services.start_capture();
        let file = dir.path().join("data.img");
        services.cli.json(args![
            "volume", "add", "data", "--file", file, "--size", size
        ]);
        Self {
            services,
            dir,
            _mounts: mounts,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn volume(&self) -> PathBuf {
        self.path("files/data.img")
    }

    pub(crate) fn clients(&self) -> u64 {
        let shown = self.services.cli.json(args!["volume", "show", "data"]);
        assert_eq!(shown["fuse_path"], self.volume().to_str().unwrap());
        shown["clients"].as_u64().unwrap()
    }

    /// The snapshot that is taken now, by number.
    pub(crate) fn snapshot(&self, label: &str) -> String {
        let taken = ["snapshot", "create", "data", "--label", label];
        let taken = self.services.cli.json(&taken.map(std::ffi::OsStr::new));
        taken["snapshot"].to_string()
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        let socket = self.services.socket.display();
        format!("nbd+unix:///{export}?socket={socket}")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        unmount_where_it_failed(self.dir.path());
    }
}

/// After a failure nothing stays mounted below a scene's own directory, whatever state it is in: a service that is killed
/// leaves its directory mounted.
pub(crate) fn unmount_where_it_failed(dir: &Path) {
    if std::thread::panicking() {
        for at in mounts_below(dir).iter().rev() {
            let _ = Command::new("umount")
                .arg("--lazy")
                .arg(at)
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// Mount points below a directory, in the order in which they were mounted.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    // The kernel writes blanks as octal numbers.
    let points = points.map(|point| PathBuf::from(point.replace("\\040", " ")));
    points.filter(|point| point.starts_with(dir)).collect()
}

/// Files of many sizes, some of them synced.
pub(crate) fn write_tree(at: &Path, seed: u8) {
    for number in 0..40u8 {
        let dir = at.join(format!("{seed}/{}", number % 7));
        fs::create_dir_all(&dir).unwrap();
        let length = usize::from(number).pow(2) * 997 % 900_000;
        let mut file = File::create(dir.join(number.to_string())).unwrap();
        file.write_all(&vec![seed ^ number; length]).unwrap();
        if number % 5 == 0 {
            file.sync_all().unwrap();
        }
    }
}

/// Every file's checksum, by path.
pub(crate) fn sums(at: &Path) -> String {
    let listing = "find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let output = Command::new("sh")
        .args(["-ec", listing])
        .current_dir(at)
        .output()
        .unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn assert_same(one: &Path, other: &Path) {
    run("cmp", args![one, other]);
}

/// Runs a program with a file as its last argument.
pub(crate) fn run_on(words: &[&str], file: &Path) {
    let words = words.iter().map(std::ffi::OsStr::new);
    let words: Vec<_> = words.chain([file.as_os_str()]).collect();
    run(words[0].to_str().unwrap(), &words[1..]);
}

impl Scene {
    /// SIGTERM, which must end it soon and leave nothing mounted.
    pub(crate) fn services_stop(mut self) {
        let begun = Instant::now();
        self.services.stop_capture();
        assert!(begun.elapsed() < END_MAX);
        assert!(fs::read_dir(self.path("files")).unwrap().next().is_none());
        self.services.stop_vault();
    }
}
