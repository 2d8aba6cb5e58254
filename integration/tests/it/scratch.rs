//! Scratches: snapshots that real clients write to, by NBD and as files, and that never change.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;
use tidemark_integration::small_disk::may_mount;

use crate::{
    programs::{Up, args, have, run, wait_for},
    scene::{Scene, assert_same, run_on},
};

const MIB: u64 = 1 << 20;

/// Both services with a volume of 16 MiB, and its content at snapshot 1.
struct Snapshot {
    up: Up,
    dir: tempfile::TempDir,
}

impl Snapshot {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let up = Up::start(&dir.path().join("state"), &[]);
        let file = dir.path().join("data.img");
        up.cli.json(args![
            "volume", "add", "data", "--file", file, "--size", "16MiB"
        ]);
        let one = Self { up, dir };
        one.qemu_io("data", &["write -P 0x11 1M 2M", "flush"]);
        let create = args!["snapshot", "create", "data", "--label", "first"];
        one.up.cli.json(create);
        one.qemu_io("data", &["write -P 0x22 0 8M", "flush"]);
        one
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.up.socket.display())
    }

    fn qemu_io(&self, export: &str, commands: &[&str]) {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let told = Command::new("qemu-io")
            .args(["-f", "raw"])
            .args(commands)
            .arg(self.uri(export))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&told.stdout);
        assert!(
            told.status.success() && !said.contains("failed") && !said.contains("error"),
            "{said}{}",
            String::from_utf8_lossy(&told.stderr)
        );
    }

    /// The scratches of snapshot 1, as everything shows them.
    fn shows(&self, expected: &[(&str, u64, u64)]) {
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, clients, bytes)| {
                json!({ "name": name, "snapshot": 1, "clients": clients, "bytes_used": bytes })
            })
            .collect();
        let shown = || {
            let status = self.up.cli.json(args!["status"]);
            status["capture"]["volumes"][0]["scratches"].clone()
        };
        // Whoever hangs up is gone a moment later.
        wait_for("the scratches to be shown", || {
            (shown() == json!(expected)).then_some(())
        });
        let listed = self.up.cli.json(args!["snapshot", "list", "data"]);
        assert_eq!(listed[0]["scratches"], json!(expected));
    }

    fn copy(&self, export: &str, name: &str) -> PathBuf {
        let to = self.dir.path().join(name);
        run("nbdcopy", args![self.uri(export), to]);
        to
    }
}

#[test]
fn what_nbd_clients_write_to_a_scratch_is_theirs_alone_and_gone_after_the_last_of_them() {
    if !have(&["qemu-io", "nbdcopy", "nbdinfo"]) {
        return;
    }
    let one = Snapshot::new();
    let before = one.copy("data@1", "before");
    // Whatever is behind it, by number and by label.
    let check = ["read -P 0x11 1M 2M", "read -P 0 0 1M", "read -P 0 3M 13M"];
    one.qemu_io("data@1+scratch", &check);
    one.qemu_io("data@first+scratch-a", &check);
    one.qemu_io(
        "data@1+scratch",
        &[
            "write -P 0x33 1M 4k",
            "write -P 0x44 2097407 131075",
            "discard 2560k 64k",
            "write -z -u 2900k 64k",
            "write -z 15M 1M",
            "flush",
            "read -P 0x33 1M 4k",
            "read -P 0x11 1028k 1000k",
            "read -P 0x44 2097407 131075",
            "read -P 0 2560k 64k",
            "read -P 0 2900k 64k",
            "read -P 0 15M 1M",
        ],
    );
    // The last client has gone.
    one.qemu_io("data@1+scratch", &check);

    // Clients at the same time share it; another name is another one.
    let connect = |export: &str| crate::nbd::Client::connect(&one.up.socket, export).unwrap();
    let (mut first, mut other) = (connect("data@1+scratch"), connect("data@1+scratch-x1"));
    let mut second = connect("data@first+scratch");
    first.write(MIB + 5, &[0x55; 3]).unwrap();
    first.flush().unwrap();
    let mut read = [0; 5];
    second.read(MIB + 4, &mut read).unwrap();
    assert_eq!(read, [0x11, 0x55, 0x55, 0x55, 0x11]);
    other.read(MIB + 4, &mut read).unwrap();
    assert_eq!(read, [0x11; 5]);
    drop(first);
    second.read(MIB + 4, &mut read).unwrap();
    assert_eq!(read[1], 0x55);
    one.shows(&[("data@1+scratch", 1, 4096), ("data@1+scratch-x1", 1, 0)]);

    let info = run("nbdinfo", args!["--json", one.uri("data@1+scratch")]);
    for flag in [
        r#""is_read_only": false"#,
        r#""can_multi_conn": true"#,
        r#""can_trim": true"#,
        r#""can_zero": true"#,
    ] {
        assert!(info.contains(flag), "{flag} in {info}");
    }
    let listed = run("nbdinfo", args!["--list", one.uri("")]);
    assert!(!listed.contains("scratch"), "{listed}");
    for unknown in [
        "data@1+scratch-",
        "data@1+scratch-A",
        "data@2+scratch",
        "data+scratch",
    ] {
        let refused = Command::new("nbdinfo")
            .arg(one.uri(unknown))
            .output()
            .unwrap();
        assert!(!refused.status.success(), "{unknown}");
    }

    // A whole other image, and neither the snapshot nor the volume has changed.
    let noise = one.dir.path().join("noise");
    let bytes: Vec<u8> = (0..16 * MIB)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    fs::write(&noise, bytes).unwrap();
    run("nbdcopy", args![noise, one.uri("data@1+scratch-whole")]);
    assert_same(&one.copy("data@1", "after"), &before);
    one.qemu_io("data", &["read -P 0x22 0 8M"]);

    // A deleted snapshot's scratch fails as its reader does, where it isn't written over.
    one.up.cli.json(args!["snapshot", "delete", "data", "1"]);
    assert!(other.read(MIB, &mut read).is_err());
    second.read(8 * MIB, &mut read).unwrap_err();
    drop((second, other));
    one.up.process.terminate();
}

#[test]
fn what_is_written_to_a_scratch_file_is_thrown_away_with_it_and_bounded() {
    if !may_mount() || !have(&["mkfs.ext4", "e2fsck", "nbdcopy"]) {
        return;
    }
    let mut scene = Scene::new("64MiB");
    scene.services.stop_capture();
    let bound = "--scratch-bytes-max=8MiB".to_owned();
    scene.services.capture_flags.push(bound);
    scene.services.start_capture();
    run_on(&["mkfs.ext4", "-q", "-F"], &scene.volume());
    let number = scene.snapshot("made");
    let files = scene.path("files/.snapshots/data");
    let file = |name: &str| files.join(format!("{number}{name}.img"));
    let before = scene.path("before");
    fs::copy(file(""), &before).unwrap();

    // Another filesystem is made on it, checked, and gone with its last user.
    let scratch = file("+scratch");
    let mode = fs::metadata(&scratch).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let held = OpenOptions::new().read(true).open(&scratch).unwrap();
    run_on(&["mkfs.ext4", "-q", "-F", "-L", "other"], &scratch);
    run_on(&["e2fsck", "-fn"], &scratch);
    let label = |path: &Path| fs::read(path).unwrap()[1024 + 120..][..5].to_vec();
    assert_eq!(label(&scratch), b"other");
    drop(held);
    wait_for("the scratch to be thrown away", || {
        (label(&scratch) != b"other").then_some(())
    });
    assert_same(&scratch, &before);
    let listed = fs::read_dir(&files).unwrap();
    assert_eq!(listed.count(), 1);

    // Only so much, for all together; and what is there stays right.
    let open = |name: &str| {
        let path = file(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    };
    let (one, two) = (open("+scratch-one"), open("+scratch-two"));
    one.write_all_at(&vec![7; 6 << 20], 20 << 20).unwrap();
    let refused = two.write_all_at(&vec![8; 6 << 20], 20 << 20).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(28), "ENOSPC");
    drop(one);
    wait_for("its room to be free", || {
        two.write_all_at(&vec![8; 6 << 20], 20 << 20).ok()
    });
    let mut read = vec![0; 6 << 20];
    two.read_exact_at(&mut read, 20 << 20).unwrap();
    assert!(read.iter().all(|&byte| byte == 8));

    // Whatever ends the service leaves no file behind.
    scene.services.kill_capture();
    let state = fs::read_dir(&scene.services.capture_state).unwrap();
    let names: Vec<_> = state.map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        names
            .iter()
            .all(|name| ["volumes", "lock"].contains(&name.to_str().unwrap())),
        "{names:?}"
    );
    drop(two);
    scene.services.start_capture();
    // It answers once its files are there.
    assert_eq!(scene.clients(), 0);
    assert_same(&file(""), &before);
    scene.services_stop();
}
