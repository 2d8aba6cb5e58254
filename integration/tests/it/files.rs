//! Files that others change, cut short, copy or roll back: never a wrong image, never in silence, and never the end of
//! the service.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tidemark_integration::small_disk::may_mount;

use crate::{
    crash::{goes_on, settle_and_check},
    nbd::Client,
    programs::{Split, args, run, wait_for},
    scene::in_a_namespace,
    workload::{Writer, seed},
};

const SIZE: usize = 8 << 20;
const EIO: i32 = 5;

struct Scene {
    services: Split,
    file: PathBuf,
    // Last, so that the services end before it goes.
    dir: tempfile::TempDir,
}

/// Both services, and a volume with a generation.
fn scene(interval_max: &str) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let mut services = Split::new(dir.path());
    services.capture_flags = vec![
        format!("--interval-max={interval_max}"),
        "--backoff-max=300ms".into(),
        "--scrub-period=400ms".into(),
        "--retry-period=100ms".into(),
    ];
    services.vault_flags = vec!["--retain=6".into()];
    services.start_vault();
    services.start_capture();
    let file = dir.path().join("data.img");
    add(&services, "data", &file);
    services.cli.json(args!["ship", "data"]);
    Scene {
        dir,
        services,
        file,
    }
}

fn add(services: &Split, name: &str, file: &Path) {
    let size = SIZE.to_string();
    services
        .cli
        .json(args!["volume", "add", name, "--file", file, "--size", size]);
}

fn copy(from: &Path, to: &Path) {
    run("rm", args!["-rf", to]);
    run("cp", args!["-a", from, to]);
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn client(&self) -> Client {
        Client::connect(&self.services.socket, "data").unwrap()
    }

    fn shown(&self) -> Value {
        self.services.cli.json(args!["volume", "show", "data"])
    }

    fn mismatches(&self) -> u64 {
        self.shown()["scrub"]["mismatches"].as_u64().unwrap()
    }

    /// Ships, and the generation is the file.
    fn assert_newest_is_the_file(&self) {
        let receipt = self.services.cli.json(args!["ship", "data"]);
        let number = receipt["generation"].as_u64().unwrap();
        let image = self.services.cli.restore("data", number, self.dir.path());
        assert!(fs::read(image).unwrap() == fs::read(&self.file).unwrap());
    }
}

#[test]
fn a_volume_file_cut_short_while_it_is_served_gives_errors_not_a_dead_service() {
    let scene = scene("1h");
    add(&scene.services, "other", &scene.path("other.img"));
    let mut client = scene.client();
    client.write(0, &vec![7; SIZE]).unwrap();
    scene.services.cli.json(args!["ship", "data"]);
    client.write(0, &vec![8; SIZE / 2]).unwrap();
    let file = File::options().write(true).open(&scene.file).unwrap();
    file.set_len(SIZE as u64 / 4).unwrap();

    let mut block = [0; 4096];
    client.read(0, &mut block).unwrap();
    assert_eq!(block, [8; 4096]);
    let failed = client.read(SIZE as u64 / 2, &mut block).unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(EIO));
    // No interval is made of what is no longer there; why is told.
    let before = scene.services.cli.generations("data").len();
    let mut shipping = scene
        .services
        .cli
        .command(args!["ship", "data"])
        .spawn()
        .unwrap();
    let told = wait_for("the trouble to be told", || {
        let shown = scene.shown();
        let told =
            [&shown["problem"], &shown["uplink"]["error"]].map(|v| v.as_str().unwrap().to_owned());
        let told = told.concat();
        (!told.is_empty()).then_some(told)
    });
    println!("told: {told}");
    assert_eq!(scene.services.cli.generations("data").len(), before);
    // The volume beside it doesn't notice.
    let mut other = Client::connect(&scene.services.socket, "other").unwrap();
    other.write(0, &[3; 4096]).unwrap();
    scene.services.cli.json(args!["ship", "other"]);

    // What was cut off reads as zeroes once the length is back; nobody wrote that through us.
    file.set_len(SIZE as u64).unwrap();
    assert!(shipping.wait().unwrap().success());
    wait_for("the source scrub to find it", || {
        (scene.mismatches() > 0).then_some(())
    });
    wait_for("all of it to be in a generation", || {
        let receipt = scene.services.cli.json(args!["ship", "data"]);
        let number = receipt["generation"].as_u64().unwrap();
        let image = scene.services.cli.restore("data", number, scene.dir.path());
        (fs::read(image).unwrap() == fs::read(&scene.file).unwrap()).then_some(())
    });
    scene.services.stop();
}

#[test]
fn blocks_written_behind_our_back_are_found_told_and_shipped() {
    let scene = scene("200ms");
    let mut writer = Writer::start_in(
        scene.services.socket.clone(),
        "data",
        0..SIZE / 2,
        seed(0xbe),
    );
    goes_on(&scene.services);
    let file = File::options().write(true).open(&scene.file).unwrap();
    // Into what was never written: nothing of ours is under way there.
    for block in [1500, 1501, 2047] {
        file.write_all_at(&[9; 4096], block * 4096).unwrap();
    }
    wait_for("the source scrub to find all three", || {
        (scene.mismatches() == 3).then_some(())
    });
    assert!(scene.services.logged().contains("ERROR"), "a human is told");
    writer.stop();
    scene.assert_newest_is_the_file();
    scene.services.stop();
}

#[test]
fn a_second_service_on_the_same_state_is_refused_and_the_first_goes_on() {
    let scene = scene("200ms");
    let mut writer = Writer::start(scene.services.socket.clone(), "data", SIZE, seed(0x2c));
    let second = crate::programs::program("capture-svc")
        .args(["--listen", "127.0.0.1:0"])
        .args(["--vault", &scene.services.cli.vault])
        .arg("--state")
        .arg(&scene.services.capture_state)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{told}");
    assert!(
        told.contains(scene.services.capture_state.to_str().unwrap()),
        "{told}"
    );
    goes_on(&scene.services);
    assert_eq!(writer.retries(), 0);
    settle_and_check(&scene.services, &mut writer, scene.dir.path());
    scene.services.stop();
}

#[test]
fn of_two_sources_with_one_volume_the_later_is_served_and_the_other_is_fenced() {
    if !may_mount() {
        return;
    }
    let mut first = scene("1h");
    first.client().write(0, &[1; 8192]).unwrap();
    first.services.cli.json(args!["ship", "data"]);
    first.services.stop_capture();
    let other = tempfile::tempdir().unwrap();
    let copied = other.path().join("copy.img");
    copy(&first.file, &copied);
    copy(&first.services.capture_state, &other.path().join("capture"));

    // Another machine with a copy of everything: the same paths, other files.
    let mut second = Split::new(other.path());
    second.cli.vault.clone_from(&first.services.cli.vault);
    second
        .capture_flags
        .clone_from(&first.services.capture_flags);
    let bind = format!(
        "mount --bind '{}' '{}' && exec \"$@\"",
        copied.display(),
        first.file.display()
    );
    let _alone = in_a_namespace();
    second.capture_wrapper = ["unshare", "--mount", "sh", "-c", &bind, "sh"]
        .map(str::to_owned)
        .to_vec();
    second.start_capture();
    second.cli.json(args!["volume", "readopt", "data"]);
    Client::connect(&second.socket, "data")
        .unwrap()
        .write(8192, &[2; 4096])
        .unwrap();
    let taken = second.cli.json(args!["ship", "data"]);

    first.services.start_capture();
    first.client().write(4096, &[3; 4096]).unwrap();
    let told = first.services.cli.fails(args!["ship", "data"], 4, "FENCED");
    assert!(told.contains("writer"), "{told}");
    assert_eq!(first.shown()["uplink"]["state"], "fenced");
    // It goes on serving: fencing protects the vault, not the workload.
    first.client().write(4096, &[4; 4096]).unwrap();

    let newest = second.cli.generations("data").pop().unwrap();
    assert_eq!(newest["generation"], taken["generation"]);
    let number = taken["generation"].as_u64().unwrap();
    let image = second.cli.restore("data", number, other.path());
    assert!(fs::read(image).unwrap() == fs::read(&copied).unwrap());
    second.stop_capture();
    first.services.stop();
}

/// Rolls the vault's store back to a copy, under a writer; `restarts`: with a writer term between copy and roll back.
fn roll_the_store_back(name: u64, restarts: bool) {
    let mut scene = scene("200ms");
    let mut writer = Writer::start(scene.services.socket.clone(), "data", SIZE, seed(name));
    goes_on(&scene.services);
    let (store, backup) = (scene.services.store.clone(), scene.path("backup"));
    scene.services.stop_vault();
    copy(&store, &backup);
    scene.services.start_vault();
    goes_on(&scene.services);
    if restarts {
        scene.services.kill_capture();
        scene.services.start_capture();
        goes_on(&scene.services);
    }
    scene.services.stop_vault();
    copy(&backup, &store);
    scene.services.start_vault();
    goes_on(&scene.services);
    settle_and_check(&scene.services, &mut writer, scene.dir.path());
    scene.services.stop();
}

#[test]
fn a_store_rolled_back_to_an_older_copy_gets_what_differs() {
    roll_the_store_back(0x5b, false);
}

#[test]
fn a_store_rolled_back_behind_a_writer_term_gets_what_differs() {
    roll_the_store_back(0x5c, true);
}

/// Rolls the capture service's state back to a copy that was taken while it ran; `shipped`: with a generation between.
fn roll_the_state_back(shipped: bool) {
    let mut scene = scene("1h");
    let mut client = scene.client();
    client.write(0, &[1; 64 << 10]).unwrap();
    scene.services.cli.json(args!["ship", "data"]);
    let (state, backup) = (scene.services.capture_state.clone(), scene.path("backup"));
    copy(&state, &backup);
    client.write(1 << 20, &[2; 64 << 10]).unwrap();
    if shipped {
        scene.services.cli.json(args!["ship", "data"]);
    }
    client.write(4 << 20, &[3; 64 << 10]).unwrap();
    scene.services.kill_capture();
    copy(&backup, &state);
    scene.services.start_capture();
    scene.assert_newest_is_the_file();
    scene.services.cli.assert_scrub_is_clean("data");
    scene.services.stop();
}

#[test]
fn a_state_rolled_back_behind_a_generation_is_compared_with_the_vault() {
    roll_the_state_back(true);
}

#[test]
fn a_state_rolled_back_to_before_writes_that_were_not_shipped_misses_none_of_them() {
    roll_the_state_back(false);
}

#[test]
fn a_state_rolled_back_behind_a_writer_term_is_fenced_and_says_so() {
    let mut scene = scene("1h");
    scene.client().write(0, &[1; 4096]).unwrap();
    scene.services.cli.json(args!["ship", "data"]);
    let (state, backup) = (scene.services.capture_state.clone(), scene.path("backup"));
    scene.services.stop_capture();
    copy(&state, &backup);
    scene.services.start_capture();
    scene.client().write(0, &[2; 4096]).unwrap();
    let receipt = scene.services.cli.json(args!["ship", "data"]);
    scene.services.stop_capture();
    copy(&backup, &state);
    scene.services.start_capture();
    let told = scene.services.cli.fails(args!["ship", "data"], 4, "FENCED");
    assert!(told.contains("writer"), "{told}");
    let newest = scene.services.cli.generations("data").pop().unwrap();
    assert_eq!(newest["generation"], receipt["generation"]);
    scene.services.stop();
}
