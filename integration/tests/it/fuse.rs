//! Volumes as files of a mounted directory, with filesystems on them. Mounting needs root and loop devices.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tidemark_integration::small_disk::may_mount;

use crate::programs::{Split, args, bin_dir, have, run, wait_for};

/// `ESTALE`.
const STALE: i32 = 116;
const END_MAX: Duration = Duration::from_secs(10);

/// A loop device on a file, and its filesystem where it is mounted. Dropping it lets go of both, whatever state they
/// are in.
pub(crate) struct Disk {
    device: String,
    pub(crate) at: PathBuf,
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
        let disk = Self { device, at };
        run("mount", args!["-o", options, disk.device, disk.at]);
        disk
    }

    /// Unmounts, so that everything has reached the file.
    pub(crate) fn unmount(self) {
        run("umount", args![self.at]);
        run("losetup", args!["--detach", self.device]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
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

struct Scene {
    services: Split,
    // Last, so that the services end before it goes.
    dir: tempfile::TempDir,
}

impl Scene {
    /// Both services, a mounted directory, and a volume in it.
    fn new(size: &str) -> Self {
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
        Self { services, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn volume(&self) -> PathBuf {
        self.path("files/data.img")
    }

    fn clients(&self) -> u64 {
        let shown = self.services.cli.json(args!["volume", "show", "data"]);
        assert_eq!(shown["fuse_path"], self.volume().to_str().unwrap());
        shown["clients"].as_u64().unwrap()
    }

    /// The snapshot that is taken now, by number.
    fn snapshot(&self, label: &str) -> String {
        let taken = ["snapshot", "create", "data", "--label", label];
        let taken = self.services.cli.json(&taken.map(std::ffi::OsStr::new));
        taken["snapshot"].to_string()
    }

    fn uri(&self, export: &str) -> String {
        let socket = self.services.socket.display();
        format!("nbd+unix:///{export}?socket={socket}")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        unmount_where_it_failed(&self.path("files"));
    }
}

/// A service that a failed test kills leaves its directory mounted.
pub(crate) fn unmount_where_it_failed(files: &Path) {
    if std::thread::panicking() {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(files)
            .stderr(Stdio::null())
            .status();
    }
}

/// Files of many sizes, some of them synced.
fn write_tree(at: &Path, seed: u8) {
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
fn sums(at: &Path) -> String {
    let listing = "find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let output = Command::new("sh")
        .args(["-ec", listing])
        .current_dir(at)
        .output()
        .unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

fn assert_same(one: &Path, other: &Path) {
    run("cmp", args![one, other]);
}

/// Runs a program with a file as its last argument.
fn run_on(words: &[&str], file: &Path) {
    let words = words.iter().map(std::ffi::OsStr::new);
    let words: Vec<_> = words.chain([file.as_os_str()]).collect();
    run(words[0].to_str().unwrap(), &words[1..]);
}

fn lives_on_a_file(make: &[&str], size: &str, read_only: &str, check: &[&str]) {
    let needed = [
        make[0], check[0], "fio", "nbdcopy", "nbdinfo", "losetup", "fsfreeze", "cmp",
    ];
    if !may_mount() || !have(&needed) {
        return;
    }
    let scene = Scene::new(size);
    let cli = &scene.services.cli;
    run_on(make, &scene.volume());
    for (direct, seed) in [(false, 0x11), (true, 0x22)] {
        let disk = Disk::mount(&scene.volume(), scene.path("mounted"), direct, "noatime");
        assert!(scene.clients() >= 1, "the loop device is a client");
        write_tree(&disk.at, seed);
        run("fsfreeze", args!["--freeze", disk.at]);
        let label = format!("frozen-{seed}");
        let number = scene.snapshot(&label);
        let model = scene.path("model");
        run("nbdcopy", args![scene.uri("data"), model]);
        run("fsfreeze", args!["--unfreeze", disk.at]);
        let expected = sums(&disk.at);

        let verified = format!("--directory={}", disk.at.display());
        run(
            "fio",
            args![
                verified,
                "--name=verified",
                "--size=12M",
                "--rw=randwrite",
                "--bsrange=512-256k",
                "--bs_unaligned=1",
                "--ioengine=psync",
                "--fallocate=none",
                "--end_fsync=1",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--do_verify=1",
                "--verify_state_save=0",
                "--minimal"
            ],
        );
        fs::remove_dir_all(disk.at.join(format!("{seed}/3"))).unwrap();
        run("fstrim", args![disk.at]);

        // The snapshot is what the volume was, as a file, by NBD, and as a filesystem.
        let snapshot = scene.path(&format!("files/.snapshots/data/{number}.img"));
        assert_same(&snapshot, &model);
        let copy = scene.path("copy");
        for export in [format!("data@{number}"), format!("data@{label}")] {
            run("nbdcopy", args![scene.uri(&export), copy]);
            assert_same(&copy, &model);
        }
        let then = Disk::mount(&snapshot, scene.path("then"), direct, read_only);
        assert_eq!(sums(&then.at), expected);
        then.unmount();
        disk.unmount();

        // What it is now comes back from the vault.
        let generation = cli.json(args!["ship", "data"])["generation"]
            .as_u64()
            .unwrap();
        let restored = cli.restore("data", generation, scene.dir.path());
        assert_same(&restored, &scene.volume());
        run_on(check, &restored);
        run_on(check, &scene.volume());
    }
    wait_for("the files are closed", || {
        (scene.clients() == 0).then_some(())
    });
    cli.assert_scrub_is_clean("data");
    scene.services_stop();
}

impl Scene {
    /// SIGTERM, which must end it soon and leave nothing mounted.
    fn services_stop(mut self) {
        let begun = Instant::now();
        self.services.stop_capture();
        assert!(begun.elapsed() < END_MAX);
        assert!(fs::read_dir(self.path("files")).unwrap().next().is_none());
        self.services.stop_vault();
    }
}

#[test]
fn an_ext4_on_a_file_of_the_mount_is_exact_in_snapshots_and_generations() {
    lives_on_a_file(
        &["mkfs.ext4", "-q", "-F"],
        "96MiB",
        "ro,noload",
        &["e2fsck", "-fn"],
    );
}

#[test]
fn an_xfs_on_a_file_of_the_mount_is_exact_in_snapshots_and_generations() {
    lives_on_a_file(
        &["mkfs.xfs", "-q", "-f"],
        "320MiB",
        "ro,norecovery,nouuid",
        &["xfs_repair", "-n", "-f"],
    );
}

#[test]
fn snapshots_are_listed_and_read_by_nbd_until_they_are_deleted() {
    if !have(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let up = crate::programs::Up::start(&dir.path().join("state"), &[]);
    let file = dir.path().join("data.img");
    up.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", "1MiB"
    ]);
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", up.socket.display());
    let content = dir.path().join("content");
    fs::write(&content, vec![0x5a; 1 << 20]).unwrap();
    run("nbdcopy", args!["--flush", content, uri("data")]);
    for label in ["nightly", ""] {
        up.cli
            .json(args!["snapshot", "create", "data", "--label", label]);
    }
    let later = dir.path().join("later");
    fs::write(&later, vec![0xa5; 1 << 20]).unwrap();
    run("nbdcopy", args!["--flush", later, uri("data")]);

    let listed = run("nbdinfo", args!["--list", uri("")]);
    for expected in [
        r#"export="data":"#,
        r#"export="data@1":"#,
        r#"export="data@2":"#,
        "nightly",
    ] {
        assert!(listed.contains(expected), "{expected} in {listed}");
    }
    let info = run("nbdinfo", args!["--json", uri("data@1")]);
    assert!(info.contains(r#""is_read_only": true"#), "{info}");
    let copy = dir.path().join("copy");
    for export in ["data@1", "data@2", "data@nightly"] {
        run("nbdcopy", args![uri(export), copy]);
        assert_same(&copy, &content);
    }

    // One that is deleted while a client has it fails that client's requests, and no others.
    let mut client = crate::nbd::Client::connect(&up.socket, "data@1").unwrap();
    let mut read = [0; 200];
    client.read(4000, &mut read).unwrap();
    assert_eq!(read, [0x5a; 200]);
    up.cli.json(args!["snapshot", "delete", "data", "1"]);
    assert!(client.read(4000, &mut read).is_err());
    for gone in ["data@1", "data@nightly", "data@3", "data@", "other@1"] {
        let refused = Command::new("nbdinfo").arg(uri(gone)).output().unwrap();
        let told = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success(), "{gone}");
        assert!(told.contains("export"), "{gone}: {told}");
    }
    run("nbdcopy", args![uri("data@2"), copy]);
    assert_same(&copy, &content);
    up.process.terminate();
}

#[test]
fn a_killed_service_mounts_anew_over_a_filesystem_in_use_and_what_was_synced_is_there() {
    if !may_mount() || !have(&["mkfs.ext4", "e2fsck", "losetup"]) {
        return;
    }
    let mut scene = Scene::new("64MiB");
    run("mkfs.ext4", args!["-q", "-F", scene.volume()]);
    for (round, direct) in [(1, false), (2, true)] {
        let disk = Disk::mount(&scene.volume(), scene.path("mounted"), direct, "noatime");
        write_tree(&disk.at, round);
        run("sync", args!["-f", disk.at]);
        let expected = sums(&disk.at);
        write_tree(&disk.at, round + 100);
        scene.services.kill_capture();
        scene.services.start_capture();
        drop(disk);
        let disk = Disk::mount(&scene.volume(), scene.path("again"), direct, "noatime");
        let found = sums(&disk.at);
        for line in expected.lines() {
            assert!(found.contains(line), "{line} was synced");
        }
        // Of the files that were not synced whatever there is of them.
        run("rm", args!["-rf", disk.at.join((round + 100).to_string())]);
        disk.unmount();
        run("e2fsck", args!["-fn", scene.volume()]);
    }
    scene.services.cli.assert_scrub_is_clean("data");
    let generation = scene.services.cli.json(args!["ship", "data"])["generation"]
        .as_u64()
        .unwrap();
    let restored = scene
        .services
        .cli
        .restore("data", generation, scene.dir.path());
    assert_same(&restored, &scene.volume());
    scene.services_stop();
}

#[test]
fn sigterm_ends_the_service_in_time_while_a_filesystem_is_mounted_and_the_next_serves_it() {
    if !may_mount() || !have(&["mkfs.ext4", "e2fsck", "losetup"]) {
        return;
    }
    let mut scene = Scene::new("64MiB");
    run("mkfs.ext4", args!["-q", "-F", scene.volume()]);
    let disk = Disk::mount(&scene.volume(), scene.path("mounted"), false, "noatime");
    write_tree(&disk.at, 7);
    run("sync", args!["-f", disk.at]);
    let begun = Instant::now();
    scene.services.stop_capture();
    assert!(begun.elapsed() < END_MAX);
    assert!(fs::read_dir(scene.path("files")).unwrap().next().is_none());
    drop(disk);
    scene.services.start_capture();
    let disk = Disk::mount(&scene.volume(), scene.path("again"), false, "noatime");
    assert_eq!(sums(&disk.at).lines().count(), 40);
    disk.unmount();
    run("e2fsck", args!["-fn", scene.volume()]);
    scene.services_stop();
}

#[test]
fn a_volume_whose_file_is_open_is_removed_only_by_force() {
    if !may_mount() {
        return;
    }
    let scene = Scene::new("1MiB");
    let mut file = File::open(scene.volume()).unwrap();
    assert_eq!(scene.clients(), 1);
    let cli = &scene.services.cli;
    cli.fails(args!["volume", "remove", "data"], 4, "VOLUME_IN_USE");
    file.read_exact(&mut [0; 512]).unwrap();
    cli.json(args!["volume", "remove", "data", "--force"]);
    assert!(!scene.volume().exists());
    scene.services_stop();
}

#[test]
fn an_open_file_of_a_snapshot_is_stale_once_the_snapshot_is_deleted_and_the_others_are_not() {
    if !may_mount() {
        return;
    }
    let scene = Scene::new("1MiB");
    fs::write(scene.path("content"), vec![0x5a; 1 << 20]).unwrap();
    run(
        "dd",
        args![
            format!("if={}", scene.path("content").display()),
            format!("of={}", scene.volume().display()),
            "bs=64k",
            "conv=notrunc",
            "status=none"
        ],
    );
    let numbers = [scene.snapshot("one"), scene.snapshot("two")];
    let paths = numbers
        .clone()
        .map(|number| scene.path(&format!("files/.snapshots/data/{number}.img")));
    let open = paths.clone().map(|path| File::open(path).unwrap());
    let mut read = [0; 4096];
    let cli = &scene.services.cli;
    cli.json(args!["snapshot", "delete", "data", numbers[0]]);
    let stale = open[0].read_at(&mut read, 512 << 10).unwrap_err();
    assert_eq!(stale.raw_os_error(), Some(STALE));
    open[1].read_exact_at(&mut read, 512 << 10).unwrap();
    assert_eq!(read, [0x5a; 4096]);
    assert!(!paths[0].exists());
    assert_same(&paths[1], &scene.path("content"));
    drop(open);
    scene.services_stop();
}

#[test]
fn a_directory_that_cannot_be_mounted_on_is_named_with_what_to_do() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("a file"), "").unwrap();
    for (mount, told) in [
        (
            full.as_path(),
            "the directory is not empty: name an empty one",
        ),
        (Path::new("relative"), "must be an absolute path"),
    ] {
        let output = Command::new(bin_dir().join("capture-svc"))
            .arg("--state")
            .arg(dir.path().join("state"))
            .args(["--listen", "127.0.0.1:0", "--fuse-mount"])
            .arg(mount)
            .output()
            .unwrap();
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(told), "{said}");
    }
}
