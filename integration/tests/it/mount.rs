//! `tidemark mount` and `tidemark umount`: real filesystems, dirty journals, and whatever is killed. They need root and
//! loop devices.

#[path = "mount/refused.rs"]
mod refused;

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use serde_json::Value;
use tidemark_integration::small_disk::may_mount;

use crate::{
    programs::{args, have, run, wait_for},
    scene::{Scene, assert_same, run_on, sums, write_tree},
};

/// A filesystem: how it is made, how large, and how it is checked.
struct Kind {
    name: &'static str,
    make: &'static [&'static str],
    size: &'static str,
    check: &'static [&'static str],
}

const EXT4: Kind = Kind {
    name: "ext4",
    make: &["mkfs.ext4", "-q", "-F"],
    size: "64MiB",
    check: &["e2fsck", "-fn"],
};
const XFS: Kind = Kind {
    name: "xfs",
    make: &["mkfs.xfs", "-q", "-f"],
    size: "320MiB",
    check: &["xfs_repair", "-n", "-f"],
};

const BTRFS: Kind = Kind {
    name: "btrfs",
    make: &["mkfs.btrfs", "-q", "-f"],
    size: "192MiB",
    check: &["btrfs", "check"],
};

impl Scene {
    /// A volume with a filesystem; none where this machine can't.
    fn with(kind: &Kind) -> Option<Self> {
        if !may_mount() || !have(&[kind.make[0], kind.check[0], "nbdcopy", "cmp", "losetup"]) {
            return None;
        }
        let scene = Self::new(kind.size);
        run_on(kind.make, &scene.volume());
        Some(scene)
    }

    fn dir_at(&self, name: &str) -> PathBuf {
        let at = self.path(name);
        fs::create_dir_all(&at).unwrap();
        at
    }

    fn mount(&self, what: &str, at: &Path) -> Value {
        let told = self.services.cli.json(args!["mount", what, at]);
        assert_eq!(told["at"], at.to_str().unwrap());
        assert_eq!(told["alive"], true);
        told
    }

    fn unmount(&self, at: &Path) {
        let told = self.services.cli.json(args!["umount", at]);
        assert_eq!(told["clean"], true, "{told}");
    }

    /// Of this test's mounts: volume and snapshot, directory, whether they are alive.
    fn mounted(&self) -> Vec<(String, bool)> {
        let told = self.services.cli.json(args!["mount"]);
        let ours = told
            .as_array()
            .unwrap()
            .iter()
            .filter(|one| Path::new(one["at"].as_str().unwrap()).starts_with(self.dir.path()));
        ours.map(|one| {
            let snapshot = one["snapshot"]
                .as_u64()
                .map_or(String::new(), |n| format!("@{n}"));
            let volume = one["volume"].as_str().unwrap();
            (
                format!("{volume}{snapshot}"),
                one["alive"].as_bool().unwrap(),
            )
        })
        .collect()
    }

    /// Nothing is mounted, no loop device is left, no file is open.
    fn assert_nothing_is_left(&self) {
        assert_eq!(self.mounted(), []);
        wait_for("the files to be closed", || {
            (self.clients() == 0).then_some(())
        });
        assert_eq!(loop_devices(self.dir.path()), [""; 0]);
    }
}

/// Files below a directory that loop devices have.
fn loop_devices(below: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").unwrap();
    devices
        .filter_map(|entry| {
            fs::read_to_string(entry.unwrap().path().join("loop/backing_file")).ok()
        })
        .filter(|file| file.starts_with(below.to_str().unwrap()))
        .collect()
}

fn keeps_its_files(kind: &Kind) {
    let Some(scene) = Scene::with(kind) else {
        return;
    };
    let (at, other) = (scene.dir_at("a mount"), scene.dir_at("other"));
    let cli = &scene.services.cli;
    let told = scene.mount("data", &at);
    assert_eq!(told["fs_type"], kind.name);
    assert_eq!(told["read_only"], false);
    write_tree(&at, 0x11);
    let expected = sums(&at);
    assert_eq!(scene.mounted(), [("data".to_owned(), true)]);

    // It can't be mounted twice, nor taken away.
    let why = cli.fails(args!["mount", "data", other], 4, "VOLUME_IN_USE");
    assert!(why.contains(at.to_str().unwrap()), "{why}");
    let why = cli.fails(args!["mount", "data", at], 4, "MOUNT_POINT_IN_USE");
    assert!(why.contains("tidemark umount"), "{why}");
    cli.fails(args!["volume", "remove", "data"], 4, "VOLUME_IN_USE");
    // A program that is in it is named.
    let mut sleeper = Command::new("sleep")
        .arg("1000")
        .current_dir(&at)
        .spawn()
        .unwrap();
    let why = cli.fails(args!["umount", at], 4, "MOUNT_IN_USE");
    assert!(why.contains(&format!("sleep ({})", sleeper.id())), "{why}");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    scene.unmount(&at);
    scene.assert_nothing_is_left();
    assert!(fs::read_dir(&at).unwrap().next().is_none());
    run_on(kind.check, &scene.volume());

    // What it is now comes back from the vault, and by another mount.
    let generation = cli.json(args!["ship", "data"])["generation"]
        .as_u64()
        .unwrap();
    let restored = cli.restore("data", generation, scene.dir.path());
    assert_same(&restored, &scene.volume());
    let given = args!["mount", "data", other, "-o", "ro,noatime"];
    assert_eq!(cli.json(given)["read_only"], true);
    assert_eq!(sums(&other), expected);
    scene.unmount(&other);
    scene.assert_nothing_is_left();
    cli.assert_scrub_is_clean("data");
    scene.services_stop();
}

#[test]
fn a_mounted_ext4_keeps_its_files_and_its_unmount_leaves_nothing() {
    keeps_its_files(&EXT4);
}

#[test]
fn a_mounted_xfs_keeps_its_files_and_its_unmount_leaves_nothing() {
    keeps_its_files(&XFS);
}

#[test]
fn a_mounted_btrfs_keeps_its_files_and_its_unmount_leaves_nothing() {
    keeps_its_files(&BTRFS);
}

/// Takes a snapshot of a filesystem that is mounted and being written to; what was synced before is given too.
fn dirty_snapshot(scene: &Scene, at: &Path) -> (String, String) {
    scene.mount("data", at);
    write_tree(at, 0x31);
    run("sync", args!["-f", at]);
    let synced = sums(at);
    let stop = AtomicBool::new(false);
    let number = std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in (0..50).cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let mut file = File::create(at.join(format!("busy-{n}"))).unwrap();
                file.write_all(&vec![n; 9_000]).unwrap();
                file.sync_all().unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(300));
        let number = scene.snapshot("busy");
        stop.store(true, Ordering::Relaxed);
        number
    });
    (number, synced)
}

/// The files of a listing are all there, whatever else is.
fn assert_has(at: &Path, expected: &str) {
    let found = sums(at);
    for line in expected.lines() {
        assert!(found.contains(line), "{line}");
    }
}

fn replays_its_journal(kind: &Kind) {
    let Some(scene) = Scene::with(kind) else {
        return;
    };
    let live = scene.dir_at("live");
    let (number, synced) = dirty_snapshot(&scene, &live);
    let before = scene.path("before");
    run(
        "nbdcopy",
        args![scene.uri(&format!("data@{number}")), before],
    );
    let plain = scene.dir_at("plain");
    let unreplayed = Command::new("mount")
        .args(["-o", "loop,ro", "-t", kind.name])
        .arg(scene.path(&format!("files/.snapshots/data/{number}.img")))
        .arg(&plain)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!unreplayed.success(), "its journal is dirty");

    // Beside the live one, and beside another of the same snapshot.
    let (then, tried) = (scene.dir_at("then"), scene.dir_at("tried"));
    let told = scene.mount(&format!("data@{number}"), &then);
    assert_eq!(told["read_only"], true);
    assert_eq!(told["snapshot"].to_string(), number);
    assert_has(&then, &synced);
    let refused = File::create(then.join("new")).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let cli = &scene.services.cli;
    let told = cli.json(args!["mount", "data@busy", tried, "--writable"]);
    assert_eq!(told["read_only"], false);
    assert_has(&tried, &synced);
    write_tree(&tried, 0x77);
    run("sync", args!["-f", tried]);
    fs::remove_dir_all(tried.join("49")).unwrap();
    assert_has(&then, &synced);
    assert_has(&live, &synced);
    assert_eq!(scene.mounted().len(), 3);
    scene.unmount(&tried);
    scene.unmount(&then);

    // What was written is gone, and the snapshot is what it was.
    scene.mount(&format!("data@{number}"), &tried);
    assert_has(&tried, &synced);
    assert!(!sums(&tried).contains("./119/"));
    scene.unmount(&tried);
    scene.unmount(&live);
    scene.assert_nothing_is_left();
    let after = scene.path("after");
    run(
        "nbdcopy",
        args![scene.uri(&format!("data@{number}")), after],
    );
    assert_same(&before, &after);
    run_on(kind.check, &scene.volume());
    scene.services_stop();
}

#[test]
fn an_ext4_snapshot_with_a_dirty_journal_is_mounted_and_never_changes() {
    replays_its_journal(&EXT4);
}

#[test]
fn an_xfs_snapshot_with_a_dirty_log_is_mounted_and_never_changes() {
    replays_its_journal(&XFS);
}

#[test]
fn what_was_mounted_when_the_service_was_killed_is_unmounted_and_mounted_again_with_its_data() {
    let Some(mut scene) = Scene::with(&EXT4) else {
        return;
    };
    let (at, then) = (scene.dir_at("mounted"), scene.dir_at("then"));
    let (number, _) = dirty_snapshot(&scene, &at);
    for (round, restart_first) in [(1, false), (2, true), (3, true)] {
        let seed = 0x50 + round;
        write_tree(&at, seed);
        run("sync", args!["-f", at]);
        let synced = sums(&at);
        scene.mount(&format!("data@{number}"), &then);
        write_tree(&at, seed + 100);
        // In the last round somebody is still in it.
        let busy = (round == 3).then(|| File::open(at.join(seed.to_string())).unwrap());
        scene.services.kill_capture();
        if restart_first {
            scene.services.start_capture();
        }
        let expected = [
            ("data".to_owned(), false),
            (format!("data@{number}"), false),
        ];
        assert_eq!(scene.mounted(), expected);
        for dir in [&at, &then] {
            let told = scene.services.cli.json(args!["umount", dir]);
            assert_eq!(told["clean"], false);
            assert!(fs::read_dir(dir).unwrap().next().is_none());
        }
        drop(busy);
        assert_eq!(scene.mounted(), []);
        if !restart_first {
            scene.services.start_capture();
        }
        scene.mount("data", &at);
        assert_has(&at, &synced);
        for tree in [seed, seed + 100] {
            run("rm", args!["-rf", at.join(tree.to_string())]);
        }
    }
    scene.unmount(&at);
    scene.assert_nothing_is_left();
    run_on(EXT4.check, &scene.volume());
    scene.services.cli.assert_scrub_is_clean("data");
    scene.services_stop();
}

#[test]
fn a_service_that_was_stopped_under_a_mount_can_be_unmounted_and_the_next_one_mounts_it() {
    let Some(mut scene) = Scene::with(&EXT4) else {
        return;
    };
    let at = scene.dir_at("mounted");
    scene.mount("data", &at);
    write_tree(&at, 9);
    run("sync", args!["-f", at]);
    let synced = sums(&at);
    scene.services.stop_capture();
    assert_eq!(scene.mounted(), [("data".to_owned(), false)]);
    scene.services.start_capture();
    let told = scene.services.cli.json(args!["umount", at]);
    assert_eq!(told["clean"], false);
    scene.mount("data", &at);
    assert_eq!(sums(&at), synced);
    scene.unmount(&at);
    scene.assert_nothing_is_left();
    scene.services_stop();
}

#[test]
fn a_mount_command_that_is_killed_at_any_moment_has_mounted_or_leaves_nothing() {
    const KILLS: u64 = 40;
    let Some(scene) = Scene::with(&EXT4) else {
        return;
    };
    let at = scene.dir_at("mounted");
    let (number, synced) = dirty_snapshot(&scene, &at);
    scene.unmount(&at);
    let snapshot = format!("data@{number}");
    // How long it takes here, so that the kills fall within.
    let begun = std::time::Instant::now();
    scene.mount(&snapshot, &at);
    let takes = begun.elapsed();
    scene.unmount(&at);
    let mut whole = 0;
    for kill in 0..KILLS {
        let what = if kill % 2 == 0 {
            "data"
        } else {
            snapshot.as_str()
        };
        let mut command = scene.services.cli.command(args!["mount", what, at]);
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(takes.mul_f64(1.2) * u32::try_from(kill).unwrap() / 40);
        child.kill().unwrap();
        child.wait().unwrap();
        // The kernel may still be ending what the command had begun.
        if !scene.mounted().is_empty() {
            assert_has(&at, &synced);
            scene.unmount(&at);
            whole += 1;
        }
        wait_for("nothing to be left", || {
            (loop_devices(scene.dir.path()).is_empty() && scene.clients() == 0).then_some(())
        });
        assert_eq!(scene.mounted(), []);
    }
    println!("{whole} of {KILLS} killed commands had mounted");
    scene.mount("data", &at);
    assert_has(&at, &synced);
    scene.unmount(&at);
    scene.assert_nothing_is_left();
    run_on(EXT4.check, &scene.volume());
    scene.services_stop();
}

/// Sends the capture service a signal.
fn signal(scene: &Scene, signal: &str) {
    run(
        "kill",
        args![signal, scene.services.capture_pid().to_string()],
    );
}

#[test]
fn while_the_service_is_stopped_mount_and_umount_say_so_and_leave_everything_as_it_is() {
    let Some(scene) = Scene::with(&EXT4) else {
        return;
    };
    let (at, then) = (scene.dir_at("mounted"), scene.dir_at("then"));
    scene.mount("data", &at);
    write_tree(&at, 1);
    run("sync", args!["-f", at]);
    let snapshot = format!("data@{}", scene.snapshot(""));
    let synced = sums(&at);
    write_tree(&at, 2);

    signal(&scene, "-STOP");
    let cli = &scene.services.cli;
    let why = cli.fails(args!["mount", snapshot, then], 5, "SERVICE_SILENT");
    assert!(
        why.contains("is not mounted") && why.contains("kill -CONT"),
        "{why}"
    );
    let why = cli.fails(args!["umount", at], 5, "SERVICE_SILENT");
    assert!(why.contains("data is still mounted"), "{why}");
    let listed = cli.json(args!["mount"]);
    let listed = listed.as_array().unwrap();
    let ours = listed.iter().find(|one| one["at"] == at.to_str().unwrap());
    assert_eq!(ours.unwrap()["alive"], true);
    assert_eq!(ours.unwrap()["answers"], false);
    signal(&scene, "-CONT");

    scene.mount(&snapshot, &then);
    assert_eq!(sums(&then), synced);
    scene.unmount(&then);
    let expected = sums(&at);
    scene.unmount(&at);
    scene.assert_nothing_is_left();
    scene.mount("data", &at);
    assert_eq!(sums(&at), expected);

    // In the middle of it, whatever has been done by then.
    write_tree(&at, 3);
    for (command, done) in [("umount", 0), ("mount", 1)] {
        let words = if done == 0 {
            vec![OsStr::new(command), at.as_os_str()]
        } else {
            vec![OsStr::new(command), OsStr::new("data"), at.as_os_str()]
        };
        let running = cli.command(&words).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(15));
        signal(&scene, "-STOP");
        let ended = running.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&ended.stderr);
        assert!(
            ended.status.success() || told.contains("does not answer"),
            "{told}"
        );
        signal(&scene, "-CONT");
        // What was left behind ends by itself.
        wait_for("one state or the other", || {
            let mounted = scene.mounted().len();
            let settled = mounted == 1 || loop_devices(scene.dir.path()).is_empty();
            if settled && mounted != done {
                let _ = cli.output(&words);
            }
            (settled && mounted == done).then_some(())
        });
    }
    scene.unmount(&at);
    scene.assert_nothing_is_left();
    run_on(EXT4.check, &scene.volume());
    scene.services_stop();
}

#[test]
fn a_partition_is_mounted_by_its_number() {
    const BEGIN: u32 = 2048;
    const SECTORS: u32 = 48 << 11;
    if !may_mount() || !have(&["mkfs.ext4"]) {
        return;
    }
    let scene = Scene::new("64MiB");
    let (at, cli) = (scene.dir_at("mounted"), &scene.services.cli);
    run(
        "mkfs.ext4",
        args!["-q", "-F", "-E", "offset=1048576", scene.volume(), "48M"],
    );
    let mut table = vec![0; 512];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 12].copy_from_slice(&BEGIN.to_le_bytes());
    table[446 + 12..446 + 16].copy_from_slice(&SECTORS.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xAA]);
    let volume = File::options().write(true).open(scene.volume()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&volume, &table, 0).unwrap();
    drop(volume);

    let why = cli.fails(args!["mount", "data", at], 4, "FILESYSTEM_UNKNOWN");
    assert!(why.contains("--partition: 1"), "{why}");
    let second = args!["mount", "data", at, "--partition", "2"];
    cli.fails(second, 3, "PARTITION_NOT_FOUND");
    cli.json(args!["mount", "data", at, "--partition", "1"]);
    write_tree(&at, 3);
    let expected = sums(&at);
    scene.unmount(&at);
    let number = scene.snapshot("");
    let what = format!("data@{number}");
    cli.json(args!["mount", what, at, "--partition", "1"]);
    assert_eq!(sums(&at), expected);
    scene.unmount(&at);
    scene.assert_nothing_is_left();
    scene.services_stop();
}
