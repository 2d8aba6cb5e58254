//! Volumes as files of a mounted directory, with filesystems on them. Mounting needs root and loop devices.

use std::{
    fs::{self, File, OpenOptions},
    io::Read,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    process::Command,
    time::Instant,
};

use tidemark_integration::small_disk::may_mount;

use crate::{
    programs::{args, bin_dir, have, run, wait_for},
    scene::{Disk, END_MAX, Scene, assert_same, run_on, sums, write_tree},
};

/// `ESTALE`.
const STALE: i32 = 116;

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

/// Memory that direct I/O takes.
struct Aligned {
    bytes: Vec<u8>,
    from: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + 4096];
        let from = bytes.as_ptr().align_offset(4096);
        Self { bytes, from }
    }

    fn first(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + length]
    }
}

#[test]
fn requests_of_every_size_from_512_bytes_to_4_mib_are_exact_through_a_loop_device() {
    const LENGTH: usize = 24 << 20;
    const LARGEST: usize = 4 << 20;
    const O_DIRECT: i32 = 0o40000;
    if !may_mount() || !have(&["losetup"]) {
        return;
    }
    let scene = Scene::new("24MiB");
    let sizes: Vec<usize> = (9..=22)
        .map(|power| 1 << power)
        .flat_map(|size| [size, size + 512, size * 3 / 2 / 512 * 512])
        .filter(|size| *size <= LARGEST)
        .collect();
    let mut model = vec![0; LENGTH];
    let mut space = Aligned::new(LARGEST);
    for (loop_direct, open_flags) in [(true, O_DIRECT), (true, 0), (false, O_DIRECT), (false, 0)] {
        let direct = if loop_direct {
            "--direct-io=on"
        } else {
            "--direct-io=off"
        };
        let volume = scene.volume();
        let set = args!["--find", "--show", direct, volume];
        let path = run("losetup", set).trim().to_owned();
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(open_flags)
            .open(&path)
            .unwrap();
        for (n, &size) in sizes.iter().enumerate() {
            // Anywhere, on no boundary but a sector's.
            let at = (n * 7_919 * 512) % (LENGTH - size) / 512 * 512;
            for (byte, value) in space.first(size).iter_mut().zip(n * 31..) {
                *byte = u8::try_from(value % 251).unwrap();
            }
            device.write_all_at(space.first(size), at as u64).unwrap();
            model[at..at + size].copy_from_slice(space.first(size));
            let mut read = Aligned::new(size);
            device.read_exact_at(read.first(size), at as u64).unwrap();
            assert!(read.first(size) == space.first(size), "{size} at {at}");
        }
        device.sync_all().unwrap();
        for (n, &size) in sizes.iter().enumerate() {
            let at = (n * 104_729 * 512) % (LENGTH - size) / 512 * 512;
            device.read_exact_at(space.first(size), at as u64).unwrap();
            assert!(*space.first(size) == model[at..at + size], "{size} at {at}");
        }
        drop(device);
        run("losetup", args!["--detach", path]);
        assert!(fs::read(scene.volume()).unwrap() == model);
    }
    wait_for("the files are closed", || {
        (scene.clients() == 0).then_some(())
    });
    assert!(fs::read(scene.path("data.img")).unwrap() == model);
    scene.services_stop();
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
