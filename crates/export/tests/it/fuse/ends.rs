//! How a mount begins and ends, whoever is in it and whatever was left there.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tidemark_export::{ExportRegistry, FuseServer, MountError, RegistryError};

use super::requests::Aligned;
use super::{GATED, GRACE, Mounted, Watched, can_mount, errno, names};
use crate::client::eventually;
use crate::real_clients::require_tool;

#[test]
fn a_busy_mount_is_gone_from_its_directory_at_once_and_its_open_files_have_nothing_behind_them() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let file = mounted.open(0);
    file.write_all_at(b"kept", 0).unwrap();
    let export = mounted.registry.remove("data").unwrap_err();
    assert!(matches!(export, RegistryError::InUse { clients: 1, .. }));
    assert_eq!(mounted.server.stop(GRACE).cut_off, 1);
    assert_eq!(names(&mounted.path("")), [""; 0]);
    assert_eq!(errno(file.write_at(b"lost", 0)), libc::ESTALE);
    mounted.registry.remove("data").unwrap();
    assert_eq!(mounted.device_bytes(0, 4), b"kept");
    assert_eq!(mounted.server.stop(GRACE).cut_off, 0);
}

#[test]
fn a_mount_that_nobody_uses_is_unmounted_whole_and_can_be_mounted_again() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    drop(mounted.open(0));
    for _ in 0..3 {
        assert_eq!(mounted.server.stop(GRACE).cut_off, 0);
        assert_eq!(names(&mounted.path("")), [""; 0]);
        let again = FuseServer::start(Arc::clone(&mounted.registry) as _, &mounted.path(""));
        assert_eq!(names(&mounted.path("")), [".snapshots", "data.img"]);
        drop(again.unwrap());
    }
}

#[test]
fn a_stop_ends_in_time_while_a_request_waits() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    mounted.device.close_gate(true);
    let file = mounted.open(libc::O_DIRECT);
    let waiting = std::thread::spawn(move || file.write_all_at(Aligned::new(4096).bytes(), GATED));
    eventually("the write has come", || {
        mounted
            .registry
            .remove("data")
            .is_err_and(|error| matches!(error, RegistryError::InUse { clients: 1, .. }))
    });
    mounted.server.stop(Duration::from_millis(100));
    assert_eq!(names(&mounted.path("")), [""; 0]);
    mounted.device.close_gate(false);
    let _ended = waiting.join().unwrap();
}

#[test]
fn a_directory_that_must_not_be_mounted_on_is_refused_with_what_to_do() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let start = |at: &Path| FuseServer::start(Arc::clone(&mounted.registry) as _, at);
    let full = mounted.dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("a file"), "").unwrap();
    let error = start(&full).unwrap_err();
    assert!(matches!(error, MountError::NotEmpty { .. }), "{error}");
    let error = start(&mounted.path("")).unwrap_err();
    assert!(
        matches!(&error, MountError::Mounted { kind, .. } if kind == "fuse.tidemark"),
        "{error}"
    );
    let error = start(&full.join("a file")).unwrap_err();
    assert!(matches!(error, MountError::Directory { .. }), "{error}");
    assert_eq!(names(&mounted.path("")), [".snapshots", "data.img"]);
}

const AT: &str = "TIDEMARK_TEST_MOUNT";

#[test]
#[ignore = "the process that other tests start, and kill"]
fn a_server_of_its_own() {
    let at = PathBuf::from(std::env::var_os(AT).unwrap());
    let registry = Arc::new(ExportRegistry::new());
    registry.add("data", "", Watched::new()).unwrap();
    let server = FuseServer::start(registry, &at).unwrap();
    assert_eq!(names(&at), [".snapshots", "data.img"]);
    println!("\nmounted");
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(server.stop(GRACE).cut_off, 0);
    assert_eq!(names(&at), [""; 0]);
}

/// Starts this program with only that test, through another program perhaps, and waits until it has mounted.
fn serve_elsewhere(through: &[&str], at: &Path) -> std::process::Child {
    let exe = std::env::current_exe().unwrap();
    let mut words = through
        .iter()
        .map(|word| (*word).into())
        .collect::<Vec<_>>();
    words.push(exe.into_os_string());
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .args([
            "--exact",
            "fuse::ends::a_server_of_its_own",
            "--ignored",
            "--nocapture",
        ])
        .env(AT, at)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = io::BufReader::new(child.stdout.as_mut().unwrap());
    let told = io::BufRead::lines(output).any(|line| line.unwrap() == "mounted");
    assert!(told, "it did not mount");
    child
}

#[test]
fn what_a_killed_server_left_mounted_and_in_use_is_unmounted_and_mounted_anew() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("mount");
    let mut child = serve_elsewhere(&[], &at);
    let mut file = OpenOptions::new()
        .write(true)
        .open(at.join("data.img"))
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(errno(fs::metadata(&at)), libc::ENOTCONN);
    let registry = Arc::new(ExportRegistry::new());
    registry.add("data", "", Watched::new()).unwrap();
    let server = FuseServer::start(registry, &at).unwrap();
    assert_eq!(names(&at), [".snapshots", "data.img"]);
    assert!(file.write_all(b"x").is_err());
    assert_eq!(server.stop(GRACE).cut_off, 0);
    assert_eq!(names(&at), [""; 0]);
}

/// Makes what Debian has by default, seen by nobody else: a `/dev/fuse` for all, and a helper that is set-user-id.
const AS_NOBODY: &str = r#"
    dir=$1; shift
    mount -t tmpfs -o dev,suid,mode=755 tmpfs /mnt
    mknod -m 666 /mnt/fuse c 10 229
    mount --bind /mnt/fuse /dev/fuse
    mkdir /mnt/bin
    cp "$(command -v fusermount3)" /mnt/bin
    chmod 4755 /mnt/bin/fusermount3
    cp "$1" /mnt/bin/server; shift
    chown -R nobody "$dir"
    PATH=/mnt/bin:$PATH exec setpriv --reuid=nobody --regid=nogroup --clear-groups /mnt/bin/server "$@"
"#;

#[test]
fn whoever_is_not_root_mounts_and_unmounts_through_the_helper() {
    if !can_mount() || !require_tool("fusermount3", "fuse3") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (at, owned) = (dir.path().join("mount"), dir.path().to_str().unwrap());
    let mut through = vec!["unshare", "--mount", "--propagation", "private"];
    through.extend(["sh", "-ec", AS_NOBODY, "sh", owned]);
    let mut child = serve_elsewhere(&through, &at);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}
