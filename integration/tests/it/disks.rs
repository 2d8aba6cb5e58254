//! Disks and spools without room: told, nothing lost, the source writes on (or waits, where that is the policy), and
//! everything goes on by itself once there is room.

use std::path::Path;

use tidemark_integration::small_disk::SmallDisk;

use crate::{
    crash::{goes_on, settle_and_check},
    programs::{Split, args, wait_for},
    workload::{Writer, seed},
};

const SIZE: usize = 16 << 20;

struct Scene {
    services: Split,
    writer: Writer,
    // Last, so that the services end before it goes.
    dir: tempfile::TempDir,
}

/// Both services, a volume, a writer that is never to fail, and a generation.
fn scene(name: u64, set: impl FnOnce(&mut Split)) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let mut services = Split::new(dir.path());
    services.capture_flags = [
        "--interval-max=200ms",
        "--backoff-min=50ms",
        "--backoff-max=300ms",
        "--scrub-period=500ms",
        // Incompressible, as far as anybody's disk is concerned.
        "--codec=raw",
    ]
    .map(str::to_owned)
    .to_vec();
    services.vault_flags = [
        "--retain=3",
        "--reader-grace=200ms",
        "--maintenance-period=200ms",
        "--part-bytes-max=256KiB",
        "--reserve-bytes=4MiB",
    ]
    .map(str::to_owned)
    .to_vec();
    set(&mut services);
    services.start_vault();
    services.start_capture();
    add(&services, dir.path());
    services.cli.json(args!["ship", "data"]);
    let writer = Writer::start(services.socket.clone(), "data", SIZE, seed(name));
    goes_on(&services);
    Scene {
        dir,
        services,
        writer,
    }
}

fn add(services: &Split, dir: &Path) {
    let (file, size) = (dir.join("data.img"), SIZE.to_string());
    services.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", size
    ]);
}

impl Scene {
    /// What the status says of the uplink's trouble, once it says it. So much room is left until then: what becomes free
    /// meanwhile is taken.
    fn trouble(&self, disk: &SmallDisk, room: u64) -> String {
        wait_for("the trouble to be told", || {
            disk.fill_but(room);
            let shown = self.services.cli.json(args!["volume", "show", "data"]);
            assert_eq!(shown["state"], "serving", "{shown}");
            let error = shown["uplink"]["error"].as_str().unwrap().to_owned();
            (!error.is_empty()).then_some(error)
        })
    }

    /// Every generation that is listed can be restored, and is the volume of some moment.
    fn generations_are_whole(&self) {
        let cli = &self.services.cli;
        for listed in cli.generations("data") {
            let generation = listed["generation"].as_u64().unwrap();
            let path = self.dir.path().join("restored");
            let which = format!("data@{generation}");
            let output = cli.output(args!["restore", which, path, "--force", "--json"]);
            let told = String::from_utf8_lossy(&output.stderr);
            // It may have been retired since it was listed.
            if !told.contains("GENERATION_NOT_FOUND") {
                assert!(output.status.success(), "{told}");
                self.writer.assert_within(&path, 0..=self.writer.begun());
            }
        }
    }

    fn ends_well(mut self) {
        goes_on(&self.services);
        assert_eq!(self.writer.retries(), 0, "no write ever failed");
        settle_and_check(&self.services, &mut self.writer, self.dir.path());
        self.services.stop();
    }
}

#[test]
fn a_vault_that_is_full_amid_an_interval_refuses_it_and_takes_it_when_there_is_room() {
    let mount = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(mount.path(), 192) else {
        return;
    };
    let scene = scene(0xf0, |services| services.store = mount.path().join("store"));
    // Room for a part or two: the next interval ends amid its frames.
    let told = scene.trouble(&disk, 600 << 10);
    assert!(told.contains("room") || told.contains("full"), "{told}");
    scene.writer.wait_for(500);
    scene.generations_are_whole();
    disk.make_room();
    scene.ends_well();
}

#[test]
fn a_vault_whose_disk_stays_full_while_it_reclaims_keeps_what_it_lists() {
    let mount = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(mount.path(), 192) else {
        return;
    };
    let scene = scene(0xf1, |services| services.store = mount.path().join("store"));
    for _ in 0..20 {
        // Whatever retiring and reclaiming set free is taken away again.
        disk.fill_but(0);
        let output = scene.services.cli.output(args!["maintain", "--json"]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() || told.contains("STORE_FULL"),
            "{told}"
        );
        scene.writer.wait_for(50);
    }
    scene.trouble(&disk, 0);
    scene.generations_are_whole();
    disk.make_room();
    scene.ends_well();
}

#[test]
fn a_source_whose_state_disk_is_full_fails_no_write_and_ships_when_there_is_room() {
    let mount = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(mount.path(), 96) else {
        return;
    };
    let scene = scene(0xf2, |services| {
        services.capture_state = mount.path().join("state");
        services.capture_flags.push("--spool-bytes-max=8MiB".into());
    });
    scene.trouble(&disk, 0);
    // Writers may have to wait for room, but are not failed.
    scene.generations_are_whole();
    disk.make_room();
    scene.ends_well();
}

#[test]
fn a_full_spool_gives_up_the_interval_and_the_writer_goes_on() {
    let mut scene = scene(0xf3, |services| {
        services.capture_flags.push("--spool-bytes-max=1MiB".into());
    });
    scene.services.stop_vault();
    // More than the spool holds is written over blocks of the cut that can't be shipped.
    scene.writer.wait_for(3_000);
    assert!(scene.services.logged().contains("the spool is full"));
    scene.services.start_vault();
    scene.ends_well();
}

#[test]
fn a_full_spool_that_stalls_makes_the_writer_wait_until_the_interval_is_shipped() {
    let mut scene = scene(0xf4, |services| {
        services.capture_flags.push("--spool-bytes-max=1MiB".into());
        services.capture_flags.push("--spool-full=stall".into());
    });
    scene.services.stop_vault();
    let shown = wait_for("the spool to be full", || {
        let shown = scene.services.cli.json(args!["volume", "show", "data"]);
        (shown["spool_bytes_used"] == shown["spool_bytes_max"]).then_some(shown)
    });
    assert_eq!(shown["state"], "serving", "{shown}");
    let begun = wait_for("the writer to wait", || {
        let begun = scene.writer.begun();
        std::thread::sleep(std::time::Duration::from_millis(300));
        (scene.writer.begun() == begun).then_some(begun)
    });
    assert_eq!(scene.writer.done(), begun - 1, "one write waits");
    scene.services.start_vault();
    scene.writer.wait_for(500);
    assert!(!scene.services.logged().contains("given up"));
    scene.ends_well();
}
