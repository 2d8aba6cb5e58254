//! Nonsense, and things that are not as they were left: each is told with what to do, nothing is lost, nothing is half
//! done.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    nbd::Client,
    programs::{Split, Up, args, free_addr, program, run, wait_for},
    scene::in_a_namespace,
};

const SIZE: u64 = 1 << 20;

/// Services with one volume, "data", that has generations; its capture service is stopped.
struct Stopped {
    dir: tempfile::TempDir,
    services: Option<Split>,
    file: PathBuf,
    generations: usize,
}

impl Stopped {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut services = Split::new(dir.path());
        services.capture_flags = vec![
            "--retry-period=100ms".into(),
            "--backoff-min=50ms".into(),
            "--backoff-max=200ms".into(),
        ];
        services.start_vault();
        services.start_capture();
        let file = dir.path().join("data.img");
        let cli = services.cli.clone();
        cli.json(args![
            "volume",
            "add",
            "data",
            "--file",
            file,
            "--size",
            SIZE.to_string()
        ]);
        cli.json(args!["ship", "data"]);
        Client::connect(&services.socket, "data")
            .unwrap()
            .write(0, &[1; 8192])
            .unwrap();
        cli.json(args!["ship", "data"]);
        let generations = cli.generations("data").len();
        services.stop_capture();
        Self {
            dir,
            services: Some(services),
            file,
            generations,
        }
    }

    fn services(&mut self) -> &mut Split {
        self.services.as_mut().unwrap()
    }

    /// The service starts all the same, lists the volume as failed, and says why; its generation stays.
    fn fails_with(&mut self, texts: &[&str]) {
        self.services().start_capture();
        let cli = self.services().cli.clone();
        let shown = cli.json(args!["volume", "show", "data"]);
        assert_eq!(shown["state"], "failed", "{shown}");
        let problem = shown["problem"].as_str().unwrap();
        for text in texts {
            assert!(problem.contains(text), "\"{text}\" is not in: {problem}");
        }
        let told = cli.fails(args!["ship", "data"], 4, "VOLUME_FAILED");
        assert!(told.contains(problem), "{told}");
        assert!(Client::connect(&self.services().socket, "data").is_err());
        assert_eq!(cli.generations("data").len(), self.generations);
    }

    /// After the trouble has been removed the volume serves again by itself, and what was written is there.
    fn serves_again(&mut self) {
        let services = self.services();
        let cli = services.cli.clone();
        wait_for("the volume to serve again", || {
            (cli.json(args!["volume", "show", "data"])["state"] == "serving").then_some(())
        });
        let mut block = [0; 8192];
        let mut client = Client::connect(&services.socket, "data").unwrap();
        client.read(0, &mut block).unwrap();
        assert_eq!(block, [1; 8192]);
        client.write(4096, &[2; 4096]).unwrap();
        cli.json(args!["ship", "data"]);
        let newest = cli.generations("data").last().unwrap()["generation"]
            .as_u64()
            .unwrap();
        let restored = cli.restore("data", newest, self.dir.path());
        assert!(fs::read(restored).unwrap() == fs::read(&self.file).unwrap());
    }
}

#[test]
fn a_volume_file_that_is_gone_is_told_and_serves_again_once_it_is_back() {
    let mut stopped = Stopped::new();
    let aside = stopped.dir.path().join("aside");
    fs::rename(&stopped.file, &aside).unwrap();
    stopped.fails_with(&["data.img"]);
    assert!(!stopped.file.exists(), "no empty file in its place");
    fs::rename(&aside, &stopped.file).unwrap();
    stopped.serves_again();
}

#[test]
fn a_volume_file_of_another_length_is_told_and_left_alone() {
    for length in [SIZE - 4096, SIZE + 4096] {
        let mut stopped = Stopped::new();
        let file = fs::OpenOptions::new()
            .write(true)
            .open(&stopped.file)
            .unwrap();
        file.set_len(length).unwrap();
        stopped.fails_with(&[&length.to_string(), &SIZE.to_string()]);
        assert_eq!(fs::metadata(&stopped.file).unwrap().len(), length);
        // It was zero at its end, so nothing is lost by either.
        file.set_len(SIZE).unwrap();
        stopped.serves_again();
    }
}

#[test]
fn a_read_only_volume_file_is_told() {
    let mut stopped = Stopped::new();
    let file = stopped.file.clone();
    if rustix::process::geteuid().is_root() {
        // Root writes to files without write permission: only a read-only mount keeps it from it.
        let mount = format!(
            "mount --bind '{0}' '{0}' && mount -o remount,bind,ro '{0}' && exec \"$@\"",
            file.display()
        );
        let _alone = in_a_namespace();
        stopped.services().capture_wrapper = ["unshare", "--mount", "sh", "-c", &mount, "sh"]
            .map(str::to_owned)
            .to_vec();
        stopped.fails_with(&["data.img"]);
        stopped.services().capture_wrapper.clear();
        stopped.services().stop_capture();
        stopped.services().start_capture();
    } else {
        let mut permissions = fs::metadata(&file).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&file, permissions).unwrap();
        stopped.fails_with(&["data.img"]);
        run("chmod", args!["u+w", file]);
    }
    stopped.serves_again();
}

/// Writes a file like the volume's, but for its second half, beside it.
fn other_file(stopped: &Stopped) -> (PathBuf, Vec<u8>) {
    let mut content = fs::read(&stopped.file).unwrap();
    let half = content.len() / 2;
    content[half..half + 8192].fill(9);
    let other = stopped.dir.path().join("other");
    fs::write(&other, &content).unwrap();
    (other, content)
}

#[test]
fn a_volume_file_that_was_replaced_by_another_is_told_and_left_alone_until_it_is_readopted() {
    let mut stopped = Stopped::new();
    stopped.services().start_capture();
    let cli = stopped.services().cli.clone();
    cli.json(args!["snapshot", "create", "data"]);
    stopped.services().stop_capture();
    let aside = stopped.dir.path().join("aside");
    let (other, content) = other_file(&stopped);
    fs::rename(&stopped.file, &aside).unwrap();
    fs::rename(&other, &stopped.file).unwrap();
    stopped.fails_with(&["data.img", "replaced", "inode", "tidemark volume readopt"]);
    assert!(fs::read(&stopped.file).unwrap() == content, "left alone");

    // With the recorded file all is as it was, the snapshot included.
    fs::rename(&stopped.file, &other).unwrap();
    fs::rename(&aside, &stopped.file).unwrap();
    stopped.serves_again();
    let snapshots = |cli: &crate::programs::Cli| {
        let listed = cli.json(args!["snapshot", "list", "data"]);
        listed.as_array().unwrap().len()
    };
    assert_eq!(snapshots(&cli), 1);
    stopped.generations = cli.generations("data").len();
    stopped.services().stop_capture();

    fs::rename(&other, &stopped.file).unwrap();
    stopped.fails_with(&["replaced"]);
    let shown = cli.json(args!["volume", "readopt", "data"]);
    assert_eq!(shown["state"], "serving", "{shown}");
    assert_eq!(snapshots(&cli), 0, "it was of the other file");
    cli.json(args!["ship", "data"]);
    let newest = cli.generations("data").last().unwrap().clone();
    // Two blocks that differ since the copy was made, one that was written meanwhile.
    assert_eq!(newest["changed_blocks"], 3, "{newest}");
    let number = newest["generation"].as_u64().unwrap();
    let restored = cli.restore("data", number, stopped.dir.path());
    assert!(fs::read(restored).unwrap() == content);
}

/// A backup copied to the old path after the file was lost: filesystems give the inode's number again.
#[test]
fn a_volume_file_that_was_removed_and_copied_back_is_not_taken_for_the_recorded_one() {
    for kill in [false, true] {
        let mut stopped = Stopped::new();
        if kill {
            stopped.services().start_capture();
            stopped.services().kill_capture();
        }
        let (other, content) = other_file(&stopped);
        fs::remove_file(&stopped.file).unwrap();
        fs::copy(&other, &stopped.file).unwrap();
        stopped.fails_with(&["data.img", "replaced"]);
        assert!(fs::read(&stopped.file).unwrap() == content, "left alone");
        let cli = stopped.services().cli.clone();
        cli.json(args!["volume", "readopt", "data"]);
        stopped.serves_again();
    }
}

/// kill -9 at any moment of a readoption: the file is refused as before, or every block is compared.
#[test]
fn a_readoption_that_is_killed_is_done_whole_or_not_at_all() {
    let mut stopped = Stopped::new();
    for round in 0..8 {
        let (other, content) = other_file(&stopped);
        fs::rename(&other, &stopped.file).unwrap();
        stopped.services().start_capture();
        let cli = stopped.services().cli.clone();
        let mut asked = cli
            .command(args!["volume", "readopt", "data"])
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(4 * round));
        stopped.services().kill_capture();
        asked.wait().unwrap();
        stopped.services().start_capture();
        let shown = cli.json(args!["volume", "show", "data"]);
        if shown["state"] == "failed" {
            assert!(shown["problem"].as_str().unwrap().contains("replaced"));
            cli.json(args!["volume", "readopt", "data"]);
        }
        let receipt = cli.json(args!["ship", "data"]);
        let number = receipt["generation"].as_u64().unwrap();
        let restored = cli.restore("data", number, stopped.dir.path());
        assert!(fs::read(restored).unwrap() == content, "round {round}");
        // So that the next file differs from the vault's again.
        let mut client = Client::connect(&stopped.services().socket, "data").unwrap();
        client.write(SIZE / 2, &[1; 8192]).unwrap();
        drop(client);
        cli.json(args!["ship", "data"]);
        stopped.services().stop_capture();
    }
}

#[test]
fn a_file_has_one_owner() {
    let mut stopped = Stopped::new();
    stopped.services().start_capture();
    let cli = stopped.services().cli.clone();
    let file = stopped.file.clone();
    cli.fails(
        args!["volume", "add", "again", "--file", file],
        4,
        "VOLUME_EXISTS",
    );
    cli.fails(
        args!["volume", "add", "data", "--file", file],
        4,
        "VOLUME_EXISTS",
    );
    let linked = stopped.dir.path().join("linked.img");
    fs::hard_link(&file, &linked).unwrap();
    cli.fails(
        args!["volume", "add", "linked", "--file", linked],
        4,
        "VOLUME_EXISTS",
    );

    let other = Up::start(&stopped.dir.path().join("other"), &[]);
    let told = other.cli.fails(
        args!["volume", "add", "data", "--file", file],
        4,
        "VOLUME_FILE_IN_USE",
    );
    assert!(told.contains("data.img"), "{told}");
    assert_eq!(
        other
            .cli
            .json(args!["volume", "list"])
            .as_array()
            .unwrap()
            .len(),
        0
    );
    stopped.serves_again();
}

#[test]
fn a_file_that_cannot_be_a_volume_is_refused_and_nothing_is_left_of_the_attempt() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let path = |name: &str| dir.path().join(name);
    fs::write(path("odd.img"), vec![0; 5000]).unwrap();
    fs::write(path("empty.img"), b"").unwrap();
    fs::write(path("good.img"), vec![0; 8192]).unwrap();
    let add = |name: &str, file: &Path, more: &[&str], code: i32, reason: &str| {
        let mut all = args!["volume", "add", name, "--file", file].to_vec();
        all.extend(more.iter().map(std::ffi::OsStr::new));
        up.cli.fails(&all, code, reason)
    };
    add("a", &path("none.img"), &[], 2, "VOLUME_FILE_INVALID");
    add(
        "a",
        &path("none/none.img"),
        &["--size", "1MiB"],
        2,
        "VOLUME_FILE_INVALID",
    );
    add("a", dir.path(), &[], 2, "VOLUME_FILE_INVALID");
    add("a", Path::new("/dev/null"), &[], 2, "VOLUME_FILE_INVALID");
    add("a", &path("odd.img"), &[], 2, "GEOMETRY_INVALID");
    add("a", &path("empty.img"), &[], 2, "GEOMETRY_INVALID");
    add(
        "a",
        &path("none.img"),
        &["--size", "5000"],
        2,
        "GEOMETRY_INVALID",
    );
    add(
        "a",
        &path("good.img"),
        &["--size", "16KiB"],
        2,
        "VOLUME_FILE_INVALID",
    );
    add(
        "a",
        &path("good.img"),
        &["--block-size", "64KiB"],
        2,
        "GEOMETRY_INVALID",
    );
    add(
        "a",
        &path("good.img"),
        &["--block-size", "5000"],
        2,
        "GEOMETRY_INVALID",
    );
    add(
        "a",
        &path("good.img"),
        &["--block-size", "512"],
        2,
        "GEOMETRY_INVALID",
    );
    for name in ["", "A", "-a", "a/b", "a@1", "..", &"a".repeat(64)] {
        // A name that begins with a dash would be a flag.
        if !name.starts_with('-') {
            add(name, &path("good.img"), &[], 2, "VOLUME_NAME_INVALID");
        }
    }
    assert_eq!(
        up.cli.json(args!["volume", "list"]),
        Value::Array(Vec::new())
    );
    assert!(!path("none.img").exists());
    assert_eq!(fs::metadata(path("odd.img")).unwrap().len(), 5000);
    up.cli
        .json(args!["volume", "add", "a", "--file", path("good.img")]);
}

#[test]
fn names_and_numbers_that_are_not_there_are_told() {
    let mut stopped = Stopped::new();
    stopped.services().start_capture();
    let cli = stopped.services().cli.clone();
    let output = stopped.dir.path().join("output");
    for arguments in [
        args!["volume", "show", "none"] as &[_],
        args!["volume", "remove", "none"],
        args!["volume", "readopt", "none"],
        args!["snapshot", "create", "none"],
        args!["snapshot", "list", "none"],
        args!["snapshot", "read", "none", "1", "--output", output],
        args!["ship", "none"],
        args!["generation", "list", "none"],
        args!["generation", "show", "none@1"],
        args!["restore", "none", output],
    ] {
        let told = cli.fails(arguments, 3, "VOLUME_NOT_FOUND");
        assert!(told.contains("none"), "{told}");
    }
    cli.fails(
        args!["generation", "show", "data@9"],
        3,
        "GENERATION_NOT_FOUND",
    );
    cli.fails(
        args!["restore", "data@9", output],
        3,
        "GENERATION_NOT_FOUND",
    );
    cli.fails(
        args!["snapshot", "delete", "data", "9"],
        3,
        "SNAPSHOT_NOT_FOUND",
    );
    cli.fails(
        args!["snapshot", "read", "data", "9", "--output", output],
        3,
        "SNAPSHOT_NOT_FOUND",
    );
    assert!(!output.exists());
}

#[test]
fn a_volume_in_use_is_removed_only_by_force() {
    let mut stopped = Stopped::new();
    stopped.services().start_capture();
    let cli = stopped.services().cli.clone();
    let client = Client::connect(&stopped.services().socket, "data").unwrap();
    cli.fails(args!["volume", "remove", "data"], 4, "VOLUME_IN_USE");
    drop(client);
    cli.json(args!["volume", "remove", "data", "--force"]);
    assert!(stopped.file.exists());
    assert_eq!(cli.generations("data").len(), stopped.generations);
}

#[test]
fn a_state_folder_of_another_volume_is_refused() {
    let mut stopped = Stopped::new();
    stopped.services().start_capture();
    let cli = stopped.services().cli.clone();
    let other_file = stopped.dir.path().join("other.img");
    let other = cli.json(args![
        "volume",
        "add",
        "other",
        "--file",
        other_file,
        "--size",
        SIZE.to_string()
    ]);
    let data = cli.json(args!["volume", "show", "data"]);
    stopped.services().stop_capture();
    let volumes = stopped.dir.path().join("capture/volumes");
    let folder = |volume: &Value| volumes.join(volume["id"].as_str().unwrap());
    let aside = stopped.dir.path().join("aside");
    fs::rename(folder(&data), &aside).unwrap();
    run("cp", args!["-a", folder(&other), folder(&data)]);
    stopped.services().start_capture();
    let listed = cli.json(args!["volume", "list"]);
    let failed: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .filter(|v| v["state"] == "failed")
        .collect();
    assert_eq!(failed.len(), 1, "{listed}");
    assert!(!failed[0]["problem"].as_str().unwrap().is_empty());
    assert!(
        fs::read(&stopped.file).unwrap()[..8192]
            .iter()
            .all(|&b| b == 1),
        "left alone"
    );

    stopped.services().stop_capture();
    fs::remove_dir_all(folder(&data)).unwrap();
    fs::rename(&aside, folder(&data)).unwrap();
    stopped.services().start_capture();
    stopped.serves_again();
}

#[test]
fn a_vault_that_cannot_be_reached_delays_shipping_and_nothing_else() {
    let mut stopped = Stopped::new();
    stopped.services().kill_vault();
    stopped.services().start_capture();
    let cli = stopped.services().cli.clone();
    let mut client = Client::connect(&stopped.services().socket, "data").unwrap();
    client.write(0, &[1; 8192]).unwrap();
    client.write(500_000, &[5; 5000]).unwrap();
    cli.json(args!["snapshot", "create", "data"]);
    let shown = wait_for("the trouble to be told", || {
        let shown = cli.json(args!["volume", "show", "data"]);
        (shown["uplink"]["error"] != "").then_some(shown)
    });
    assert!(
        shown["uplink"]["error"]
            .as_str()
            .unwrap()
            .contains("reached"),
        "{shown}"
    );
    let told = cli.fails(
        args!["ship", "data", "--wait-for-vault", "500ms"],
        5,
        "UNREACHABLE",
    );
    assert!(told.contains("nothing is lost"), "{told}");
    cli.fails(args!["generation", "list", "data"], 5, "UNREACHABLE");
    stopped.services().start_vault();
    stopped.serves_again();
}

#[test]
fn unknown_settings_and_flags_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    for (name, good, bad) in [
        ("capture-svc", "interval_max", "intervall_max"),
        ("vault-svc", "retain", "retian"),
    ] {
        fs::write(&file, format!("{bad} = 3\n")).unwrap();
        let output = program(name).arg("--config").arg(&file).output().unwrap();
        assert!(!output.status.success());
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains(bad), "{name}: {told}");
        let printed = program(name).arg("--print-config").output().unwrap();
        assert!(
            printed.status.success(),
            "{}",
            String::from_utf8_lossy(&printed.stderr)
        );
        assert!(String::from_utf8_lossy(&printed.stdout).contains(good));
        let output = program(name).arg("--no-such-flag").output().unwrap();
        assert_eq!(output.status.code(), Some(2));
    }
}

#[test]
fn an_address_that_is_taken_is_told_with_the_flag_that_chooses_another() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    for (flag, other) in [
        ("--capture-listen", "--vault-listen"),
        ("--vault-listen", "--capture-listen"),
    ] {
        let output = program("tidemark")
            .args(["up", flag, &addr, other, &free_addr().to_string()])
            .arg("--state")
            .arg(dir.path().join("state"))
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{told}");
        assert!(told.contains(&addr) && told.contains(flag), "{told}");
    }
}
