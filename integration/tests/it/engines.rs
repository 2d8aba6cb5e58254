//! Workloads that write the volume file themselves, with the real programs: killed at random moments, and a filesystem
//! mounted from the file all the while.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidemark_integration::small_disk::may_mount;

use crate::{
    programs::{Split, args, have, run, wait_for},
    scene::mounts_are_ours,
    workload::seed,
};

const BLOCK: usize = 4096;
const BLOCKS: usize = 1024;
const KILLS: usize = 20;

/// A filesystem in a file, mounted until it is dropped.
struct Disk(PathBuf);

impl Disk {
    fn new(dir: &Path, kind: &str, size: u64) -> Self {
        let (image, at) = (dir.join(format!("{kind}.disk")), dir.join(kind));
        File::create(&image).unwrap().set_len(size).unwrap();
        run(&format!("mkfs.{kind}"), args!["-q", image]);
        Self::mount(&image, at, "loop")
    }

    fn mount(image: &Path, at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        run("mount", args!["-o", options, image, at]);
        Self(at)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(&self.0)
            .stderr(Stdio::null())
            .status();
    }
}

/// Writes the next number into each block in turn, and pauses only while it is told to.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// In `dir` it is asked to pause, and says that it does.
    fn start(path: &Path, dir: &Path) -> Self {
        let (pause, pauses) = (dir.join("pause"), dir.join("pauses"));
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            for number in 1_u64.. {
                for block in 0..BLOCKS {
                    while pause.exists() && !told.load(SeqCst) {
                        fs::write(&pauses, []).unwrap();
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    let _ = fs::remove_file(&pauses);
                    if told.load(SeqCst) {
                        return;
                    }
                    let bytes = number.to_le_bytes();
                    file.write_all_at(&bytes, (block * BLOCK) as u64).unwrap();
                }
            }
        });
        Self { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, SeqCst);
        self.thread.join().unwrap();
    }
}

/// Whether an image is what a power cut at some moment would have left of the writer's work.
fn assert_is_a_moment(image: &[u8], what: &str) {
    let number = |block: &[u8]| u64::from_le_bytes(block[..8].try_into().unwrap());
    let numbers: Vec<_> = image.chunks_exact(BLOCK).map(number).collect();
    assert!(numbers.is_sorted_by(|a, b| a >= b), "{what}: {numbers:?}");
    assert!(numbers[0] - numbers[BLOCKS - 1] <= 1, "{what}: {numbers:?}");
}

fn services(dir: &Path, engine: &str) -> Split {
    let mut services = Split::new(dir);
    let flags = [
        "--interval-max=200ms",
        "--retry-period=100ms",
        "--scrub-period=1s",
    ];
    services.capture_flags = flags.map(str::to_owned).to_vec();
    if engine == "scan" {
        let at = dir.display();
        services.capture_flags.extend([
            format!(
                "--quiesce-pre=touch {at}/pause; until test -e {at}/pauses; do sleep 0.01; done"
            ),
            format!(
                "--quiesce-post=rm -f {at}/pause; while test -e {at}/pauses; do sleep 0.01; done"
            ),
        ]);
    }
    services.vault_flags = vec!["--retain=1000".to_owned()];
    services.start_vault();
    services.start_capture();
    services
}

fn killed_while_the_workload_writes_on(kind: &str, engine: &str) {
    if !may_mount() || !have(&["mkfs.xfs", "mkfs.btrfs"]) {
        return;
    }
    let _mounts = mounts_are_ours();
    let seed = seed(7);
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path(), kind, 512 << 20);
    let mut services = services(dir.path(), engine);
    let file = disk.0.join("data.img");
    File::create(&file)
        .unwrap()
        .set_len((BLOCKS * BLOCK) as u64)
        .unwrap();
    let added = services.cli.json(args![
        "volume", "add", "data", "--file", file, "--engine", engine
    ]);
    assert_eq!(added["engine"], engine);
    let writer = Writer::start(&file, dir.path());
    for _ in 0..KILLS {
        std::thread::sleep(Duration::from_millis(rng.random_range(20..500)));
        services.kill_capture();
        services.start_capture();
    }
    wait_for("a generation after the last kill", || {
        let base = services.cli.json(args!["volume", "show", "data"])["generation"].as_u64();
        base.filter(|base| *base > 3)
    });
    writer.stop();
    wait_for("an interval that ships", || {
        let done = services
            .cli
            .output(args!["ship", "data", "--wait-for-vault", "10s"]);
        done.status.success().then_some(())
    });
    let generations = services.cli.generations("data");
    assert!(generations.len() > 3, "seed {seed}");
    for generation in &generations {
        let number = generation["generation"].as_u64().unwrap();
        let restored = services.cli.restore("data", number, dir.path());
        let image = fs::read(&restored).unwrap();
        assert_is_a_moment(&image, &format!("generation {number}, seed {seed}"));
        fs::remove_file(restored).unwrap();
    }
    let newest = generations
        .iter()
        .filter_map(|g| g["generation"].as_u64())
        .max()
        .unwrap();
    let restored = services.cli.restore("data", newest, dir.path());
    assert!(
        fs::read(restored).unwrap() == fs::read(&file).unwrap(),
        "seed {seed}"
    );
    services.cli.assert_scrub_is_clean("data");
    let clones = || {
        let entries = fs::read_dir(&disk.0).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let clones = paths.filter(|path| path.is_dir());
        clones.flat_map(|dir| fs::read_dir(dir).unwrap()).count()
    };
    // Beside the clone of the base there is that of an interval while it is under way, five times a second.
    wait_for("no clone but that of the base", || {
        (clones() == usize::from(engine == "reflink")).then_some(())
    });
    services.cli.json(args!["volume", "remove", "data"]);
    assert_eq!(clones(), 0);
    services.stop();
}

#[test]
fn a_service_killed_while_a_workload_writes_its_file_on_xfs_ships_only_moments_of_it() {
    killed_while_the_workload_writes_on("xfs", "reflink");
}

#[test]
fn a_service_killed_while_a_workload_writes_its_file_on_btrfs_ships_only_moments_of_it() {
    killed_while_the_workload_writes_on("btrfs", "reflink");
}

#[test]
fn a_service_killed_while_it_scans_the_file_of_a_workload_that_it_makes_pause_ships_only_moments_of_it()
 {
    killed_while_the_workload_writes_on("ext4", "scan");
}

#[test]
fn a_service_without_privileges_protects_a_file_that_it_may_only_read() {
    if !may_mount() || !have(&["mkfs.xfs", "setpriv"]) {
        return;
    }
    let _mounts = mounts_are_ours();
    const NOBODY: u32 = 65_534;
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path(), "xfs", 512 << 20);
    let own = |path: &Path| std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    own(dir.path());
    own(&disk.0);
    let mut services = Split::new(dir.path());
    let wrapper = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--no-new-privs",
    ];
    services.capture_wrapper = wrapper.map(str::to_owned).to_vec();
    services.start_vault();
    services.start_capture();
    // Root's file, in a folder of the service's user.
    let file = disk.0.join("data.img");
    let content: Vec<u8> = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect();
    fs::write(&file, &content).unwrap();
    services.cli.json(args![
        "volume", "add", "data", "--file", file, "--engine", "reflink"
    ]);
    services.cli.json(args!["ship", "data"]);
    let written = OpenOptions::new().write(true).open(&file).unwrap();
    written.write_all_at(b"changed", 777_777).unwrap();
    let receipt = services.cli.json(args!["ship", "data"]);
    assert_eq!(receipt["changed_blocks"], 1);
    let generation = receipt["generation"].as_u64().unwrap();
    let restored = services.cli.restore("data", generation, dir.path());
    assert!(fs::read(restored).unwrap() == fs::read(&file).unwrap());
    // Where it may not write it says so.
    std::os::unix::fs::chown(&disk.0, Some(0), Some(0)).unwrap();
    let other = disk.0.join("other.img");
    fs::write(&other, &content).unwrap();
    let told = services.cli.fails(
        args![
            "volume", "add", "other", "--file", other, "--engine", "reflink"
        ],
        2,
        "ENGINE_UNSUPPORTED",
    );
    assert!(
        told.contains("write access to the folder of the volume file"),
        "{told}"
    );
    services.stop();
}

#[test]
fn a_filesystem_frozen_beneath_the_volume_file_goes_on_again_and_is_told() {
    if !may_mount() || !have(&["mkfs.xfs", "fsfreeze"]) {
        return;
    }
    let _mounts = mounts_are_ours();
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path(), "xfs", 512 << 20);
    let mut services = Split::new(dir.path());
    services.capture_flags = vec![
        "--quiesce-timeout=1s".to_owned(),
        format!("--quiesce-pre=fsfreeze --freeze {}", disk.0.display()),
        format!(
            "--quiesce-post=fsfreeze --unfreeze {} || true",
            disk.0.display()
        ),
    ];
    services.start_vault();
    services.start_capture();
    let file = disk.0.join("data.img");
    File::create(&file).unwrap().set_len(16 << 20).unwrap();
    services.cli.json(args![
        "volume", "add", "data", "--file", file, "--engine", "reflink"
    ]);
    wait_for("the cut that could not be made", || {
        let shown = services.cli.json(args!["volume", "show", "data"]);
        let told = shown["uplink"]["error"].as_str()?;
        told.contains("never the filesystem that the volume file lies on")
            .then_some(())
    });
    services.stop_capture();
    let _ = Command::new("fsfreeze")
        .arg("--unfreeze")
        .arg(&disk.0)
        .output();
    // Without that it is cut like any other.
    services.capture_flags.clear();
    services.start_capture();
    fs::write(disk.0.join("other"), b"the filesystem takes writes").unwrap();
    let receipt = services.cli.json(args!["ship", "data"]);
    assert_eq!(receipt["coherence"], "crash", "{receipt}");
    services.stop();
}

#[test]
fn a_filesystem_that_is_mounted_from_a_reflinked_file_comes_back_whole_from_every_generation() {
    if !may_mount() || !have(&["mkfs.xfs", "mkfs.ext4", "e2fsck", "fsfreeze"]) {
        return;
    }
    let _mounts = mounts_are_ours();
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path(), "xfs", 1 << 30);
    let mut services = Split::new(dir.path());
    let at = dir.path().join("mounted");
    // The filesystem is quiesced for each cut.
    services.capture_flags = vec![
        "--interval-max=1h".to_owned(),
        format!("--quiesce-pre=fsfreeze --freeze {}", at.display()),
        format!(
            "--quiesce-post=fsfreeze --unfreeze {} || true",
            at.display()
        ),
    ];
    services.start_vault();
    services.start_capture();
    let file = disk.0.join("data.img");
    File::create(&file).unwrap().set_len(64 << 20).unwrap();
    run("mkfs.ext4", args!["-q", file]);
    let mounted = Disk::mount(&file, at, "loop");
    services.cli.json(args![
        "volume", "add", "data", "--file", file, "--engine", "reflink"
    ]);
    for round in 1..4_u8 {
        let name = format!("file-{round}");
        fs::write(mounted.0.join(&name), vec![round; 3_000_000]).unwrap();
        let receipt = services.cli.json(args!["ship", "data"]);
        assert_eq!(receipt["coherence"], "quiesced", "{receipt}");
        let generation = receipt["generation"].as_u64().unwrap();
        let restored = services.cli.restore("data", generation, dir.path());
        run("e2fsck", args!["-f", "-n", restored]);
        let then = Disk::mount(&restored, dir.path().join("restored"), "loop,ro,noload");
        for earlier in 1..=round {
            let content = fs::read(then.0.join(format!("file-{earlier}"))).unwrap();
            assert!(content == vec![earlier; 3_000_000]);
        }
        drop(then);
        fs::remove_file(restored).unwrap();
    }
    run("umount", args![mounted.0]);
    services.stop();
}
