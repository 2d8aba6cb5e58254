//! SIGTERM ends either service cleanly and soon, whatever is under way.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    crash::goes_on,
    nbd::Client,
    programs::{Split, args},
    workload::{Writer, seed},
};

const SIZE: usize = 64 << 20;
const END_MAX: Duration = Duration::from_secs(10);

struct Scene {
    services: Split,
    writer: Writer,
    // Last, so that the services end before it goes.
    dir: tempfile::TempDir,
}

fn scene(name: u64) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let mut services = Split::new(dir.path());
    services.capture_flags = [
        "--interval-max=300ms",
        "--backoff-max=300ms",
        "--scrub-period=1s",
        "--codec=raw",
    ]
    .map(str::to_owned)
    .to_vec();
    services.start_vault();
    services.start_capture();
    let (file, size) = (dir.path().join("data.img"), SIZE.to_string());
    services.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", size
    ]);
    services.cli.json(args!["ship", "data"]);
    // The log's part is small; the rest of the volume is for bulk.
    let part = 0..SIZE / 8;
    let writer = Writer::start_in(services.socket.clone(), "data", part, seed(name));
    goes_on(&services);
    Scene {
        dir,
        services,
        writer,
    }
}

impl Scene {
    /// Makes the interval large that is cut next.
    fn bulk(&self, fill: u8) {
        let mut client = Client::connect(&self.services.socket, "data").unwrap();
        for offset in (SIZE / 8..SIZE).step_by(1 << 20) {
            client.write(offset as u64, &vec![fill; 1 << 20]).unwrap();
        }
    }

    fn stop_capture_in_time(&mut self) {
        let began = Instant::now();
        self.services.stop_capture();
        assert!(began.elapsed() < END_MAX, "{:?}", began.elapsed());
    }

    fn ends_well(mut self) {
        goes_on(&self.services);
        self.writer.stop();
        self.services.cli.json(args!["ship", "data"]);
        let newest = self.services.cli.generations("data").pop().unwrap();
        let number = newest["generation"].as_u64().unwrap();
        let image = self.services.cli.restore("data", number, self.dir.path());
        let volume = fs::read(self.dir.path().join("data.img")).unwrap();
        assert!(fs::read(image).unwrap() == volume);
        assert_eq!(self.writer.moment_of(&volume), self.writer.done());
        self.services.cli.assert_scrub_is_clean("data");
        self.services.stop();
    }
}

#[test]
fn sigterm_under_load_with_an_interval_in_flight_ends_both_services_in_time() {
    let mut scene = scene(0x71);
    scene.bulk(1);
    scene.stop_capture_in_time();
    scene.services.start_capture();
    scene.bulk(2);
    let began = Instant::now();
    scene.services.stop_vault();
    assert!(began.elapsed() < END_MAX, "{:?}", began.elapsed());
    scene.services.start_vault();
    scene.ends_well();
}

#[test]
fn sigterm_with_the_vault_dead_or_silent_ends_the_capture_service_in_time() {
    let mut scene = scene(0x72);
    scene.bulk(1);
    scene.services.kill_vault();
    scene.writer.wait_for(100);
    scene.stop_capture_in_time();
    scene.services.start_vault();
    scene.services.start_capture();
    goes_on(&scene.services);

    let pid = Pid::from_raw(scene.services.vault_pid().cast_signed()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    scene.bulk(2);
    scene.stop_capture_in_time();
    kill_process(pid, Signal::CONT).unwrap();
    scene.services.start_capture();
    scene.ends_well();
}
