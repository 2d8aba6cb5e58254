//! Real databases on filesystems on volumes, written without pause while intervals ship: each generation, restored and
//! mounted, is one that the database itself recovers, with whole transactions only, and with all that it had said were
//! committed. Mounting needs root and loop devices.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
};

use crate::{
    programs::{Split, args, run, wait_for},
    scene::{Disk, mounts_are_ours, unmount_where_it_failed},
};

#[path = "databases/group.rs"]
mod group;
#[path = "databases/postgres.rs"]
mod postgres;
#[path = "databases/python.rs"]
mod python;
#[path = "databases/recipes.rs"]
mod recipes;
#[path = "databases/seats.rs"]
mod seats;
#[path = "databases/sqlite.rs"]
mod sqlite;
#[path = "databases/tutorial.rs"]
mod tutorial;
#[path = "databases/world.rs"]
mod world;

pub(crate) use python::make_agent;

/// How many intervals ship by themselves while a database is written.
const INTERVALS: usize = 20;
const NAME: &str = "db";

/// What a database lies on.
#[derive(Debug, Clone, Copy)]
struct Filesystem {
    make: &'static [&'static str],
    mount: &'static str,
    check: &'static [&'static str],
    /// The least it can be made on.
    size_min: u64,
}

const EXT4: Filesystem = Filesystem {
    make: &["mkfs.ext4", "-q", "-F"],
    mount: "noatime",
    check: &["e2fsck", "-fn"],
    size_min: 8 << 20,
};

const XFS: Filesystem = Filesystem {
    make: &["mkfs.xfs", "-q", "-f"],
    mount: "noatime",
    check: &["xfs_repair", "-n", "-f"],
    size_min: 300 << 20,
};

impl Filesystem {
    fn programs(&self) -> Vec<&'static str> {
        vec![self.make[0], self.check[0], "losetup"]
    }

    fn run_on(words: &[&str], file: &Path) {
        let words = words.iter().map(std::ffi::OsStr::new);
        let words: Vec<_> = words.chain([file.as_os_str()]).collect();
        run(words[0].to_str().unwrap(), &words[1..]);
    }
}

/// Both services, and a filesystem on a volume's file, mounted.
struct Scene {
    // First, so that it is unmounted before the services end.
    disk: Option<Disk>,
    services: Split,
    filesystem: Filesystem,
    dir: tempfile::TempDir,
    _mounts: RwLockReadGuard<'static, ()>,
}

impl Scene {
    /// With intervals of one second, cut at that very moment: there is no waiting for a better one.
    fn new(filesystem: Filesystem, size: u64) -> Self {
        Self::with_flags(filesystem, size, &["--interval-max=1s"])
    }

    fn with_flags(filesystem: Filesystem, size: u64, flags: &[&str]) -> Self {
        let mounts = mounts_are_ours();
        let dir = tempfile::tempdir().unwrap();
        // Databases run as users of their own.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut services = Split::new(dir.path());
        services.capture_flags = vec![format!(
            "--fuse-mount={}",
            dir.path().join("files").display()
        )];
        services
            .capture_flags
            .extend(flags.iter().map(|&flag| flag.to_owned()));
        services.vault_flags = vec!["--retain=200".into()];
        services.start_vault();
        services.start_capture();
        let mut scene = Self {
            disk: None,
            services,
            filesystem,
            dir,
            _mounts: mounts,
        };
        let size = size.max(filesystem.size_min).to_string();
        let file = scene.path("db.img");
        scene
            .services
            .cli
            .json(args!["volume", "add", NAME, "--file", file, "--size", size]);
        Filesystem::run_on(filesystem.make, &scene.volume());
        scene.disk = Some(Disk::mount(
            &scene.volume(),
            scene.path("mounted"),
            true,
            filesystem.mount,
        ));
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn volume(&self) -> PathBuf {
        self.path("files/db.img")
    }

    /// Where the filesystem is mounted.
    fn at(&self) -> &Path {
        &self.disk.as_ref().unwrap().at
    }

    /// Ships now, and gives the generation.
    fn ship(&self) -> u64 {
        let receipt = self.services.cli.json(args!["ship", NAME]);
        receipt["generation"].as_u64().unwrap()
    }

    /// Ships now: whatever was acknowledged before that is in the generation, whatever has not begun after it is not.
    fn ship_beside(&self, client: &Committer) -> Shipped {
        let at_least = client.acknowledged();
        let generation = self.ship();
        let at_most = client.begun();
        Shipped {
            generation,
            at_least,
            at_most,
        }
    }

    /// Numbers of the generations from `first` on; of all, and of those that intervals of their own accord made.
    fn generations_from(&self, first: u64) -> (Vec<u64>, usize) {
        let mut all = self.services.cli.generations(NAME);
        all.retain(|generation| generation["generation"].as_u64().unwrap() >= first);
        let by_themselves = all.iter().filter(|g| g["trigger"] == "interval_max");
        let by_themselves = by_themselves.count();
        let numbers = all.iter().map(|g| g["generation"].as_u64().unwrap());
        (numbers.collect(), by_themselves)
    }

    /// Waits until intervals have shipped by themselves while the clients write, and ships some in between.
    fn ship_while_written(&self, first: u64, client: &Committer) -> Vec<Shipped> {
        let mut shipped = Vec::new();
        for intervals in 1..=INTERVALS {
            wait_for("the next interval", || {
                (self.generations_from(first).1 >= intervals).then_some(())
            });
            if intervals % 4 == 0 {
                shipped.push(self.ship_beside(client));
            }
        }
        shipped
    }

    /// Restores a generation, mounts it so that the filesystem's journal is replayed, has `look` recover what is there,
    /// and checks the filesystem.
    fn recover<T>(&self, generation: u64, look: impl FnOnce(&Path) -> T) -> T {
        let restored = self.services.cli.restore(NAME, generation, self.dir.path());
        let found = self.recover_image(&restored, look);
        fs::remove_file(restored).unwrap();
        found
    }

    fn recover_image<T>(&self, image: &Path, look: impl FnOnce(&Path) -> T) -> T {
        let disk = Disk::mount(
            image,
            self.path("recovered"),
            false,
            // An XFS refuses the identity of one that is mounted.
            match self.filesystem.make[0] {
                "mkfs.xfs" => "nouuid",
                _ => "defaults",
            },
        );
        let found = look(&disk.at);
        disk.unmount();
        Filesystem::run_on(self.filesystem.check, image);
        found
    }

    /// Unmounts; nothing that was written has been missed, and the services end in peace.
    fn end(mut self) {
        self.disk.take().unwrap().unmount();
        let scrubbed = self.services.cli.json(args!["scrub", NAME]);
        assert_eq!(scrubbed["mismatches"], 0, "{scrubbed}");
        self.services.stop_capture();
        self.services.stop_vault();
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if thread::panicking() {
            self.disk = None;
        }
        unmount_where_it_failed(self.dir.path());
    }
}

/// How many transactions of a [`Committer`] a generation must have, and can have.
#[derive(Debug, Clone, Copy)]
struct Shipped {
    generation: u64,
    at_least: u64,
    at_most: u64,
}

impl Shipped {
    fn assert_has(&self, found: u64) {
        assert!(
            (self.at_least..=self.at_most).contains(&found),
            "{self:?}, but it has {found}"
        );
    }
}

/// A client of a SQL shell: numbered transactions, one after the other without pause. It keeps count of those that the
/// database has said are committed.
struct Committer {
    begun: Arc<AtomicU64>,
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Committer {
    /// The shell ends at the first error. It reads transactions from standard input, each of which prints its number
    /// once it is committed.
    fn start(mut shell: Command, transaction: impl Fn(u64) -> String + Send + 'static) -> Self {
        let mut shell = shell
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let [begun, acknowledged] = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let (counted, told, stopped) = (begun.clone(), acknowledged.clone(), stop.clone());
        let thread = thread::spawn(move || {
            let mut to = shell.stdin.take().unwrap();
            let mut lines = BufReader::new(shell.stdout.take().unwrap()).lines();
            while !stopped.load(SeqCst) {
                let number = counted.fetch_add(1, SeqCst) + 1;
                to.write_all(transaction(number).as_bytes()).unwrap();
                let line = lines.next().unwrap().unwrap();
                assert_eq!(line, number.to_string());
                told.store(number, SeqCst);
            }
            drop(to);
            assert!(shell.wait().unwrap().success());
        });
        let client = Self {
            begun,
            acknowledged,
            stop,
            thread,
        };
        client.wait_for_more(1);
        client
    }

    fn begun(&self) -> u64 {
        self.begun.load(SeqCst)
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(SeqCst)
    }

    /// Waits until so many more are committed.
    fn wait_for_more(&self, more: u64) {
        let wanted = self.acknowledged() + more;
        wait_for("transactions", || {
            assert!(!self.thread.is_finished(), "the client ended");
            (self.acknowledged() >= wanted).then_some(())
        });
    }

    /// How many it has committed.
    fn end(self) -> u64 {
        self.stop.store(true, SeqCst);
        self.thread.join().unwrap();
        self.acknowledged.load(SeqCst)
    }
}
