//! kill -9 of each service while a client writes: it goes on by itself, nothing is lost, nothing is half there.

use std::{fs, time::Duration};

use crate::{
    programs::{Split, args, wait_for},
    workload::{Writer, seed},
};

const SIZE: usize = 32 << 20;

fn services(dir: &std::path::Path) -> Split {
    let mut services = Split::new(dir);
    services.capture_flags = [
        "--interval-max=400ms",
        "--backoff-max=500ms",
        "--scrub-period=1s",
        "--retry-period=200ms",
    ]
    .map(str::to_owned)
    .to_vec();
    services.vault_flags = vec!["--retain=6".into()];
    services.start_vault();
    services.start_capture();
    let file = dir.join("data.img");
    services.cli.json(args![
        "volume",
        "add",
        "data",
        "--file",
        file,
        "--size",
        SIZE.to_string()
    ]);
    services
}

/// Ends the writing, ships the rest, and checks every retained generation, the volume and the tracking.
pub(crate) fn settle_and_check(services: &Split, writer: &mut Writer, dir: &std::path::Path) {
    writer.stop();
    let all = writer.done();
    let receipt = wait_for("the last interval", || {
        let output = services
            .cli
            .command(args!["ship", "data", "--json"])
            .output()
            .unwrap();
        output
            .status
            .success()
            .then(|| serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap())
    });
    let volume = fs::read(dir.join("data.img")).unwrap();
    assert_eq!(
        writer.moment_of(&volume),
        all,
        "the volume holds every write"
    );

    // Retires what would otherwise be retired while it is looked at.
    services.cli.json(args!["maintain"]);
    let generations = services.cli.generations("data");
    assert!(!generations.is_empty());
    let mut last = 0;
    for generation in &generations {
        let number = generation["generation"].as_u64().unwrap();
        let image = services.cli.restore("data", number, dir);
        last = writer.assert_within(&image, last..=all);
        fs::remove_file(image).unwrap();
    }
    assert_eq!(last, all, "the newest generation is the volume");
    assert_eq!(
        receipt["generation"],
        generations.last().unwrap()["generation"]
    );
    services.cli.assert_scrub_is_clean("data");
}

/// Until the vault has committed something after the kill: it went on by itself.
pub(crate) fn goes_on(services: &Split) {
    let head = || {
        let generations = services.cli.generations("data");
        generations
            .last()
            .map_or(0, |g| g["generation"].as_u64().unwrap())
    };
    let before = head();
    wait_for("an interval after the restart", || {
        (head() > before).then_some(())
    });
}

#[test]
fn the_capture_service_killed_again_and_again_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut services = services(dir.path());
    let mut writer = Writer::start(services.socket.clone(), "data", SIZE, seed(0xca));
    for round in 0..5 {
        writer.wait_for(200 + 130 * round);
        services.kill_capture();
        services.start_capture();
        goes_on(&services);
    }
    assert!(writer.retries() > 0, "the kills hit the writer");
    settle_and_check(&services, &mut writer, dir.path());
    services.stop();
}

#[test]
fn the_vault_killed_again_and_again_delays_intervals_and_no_writes() {
    let dir = tempfile::tempdir().unwrap();
    let mut services = services(dir.path());
    let mut writer = Writer::start(services.socket.clone(), "data", SIZE, seed(0x7a));
    for round in 0..5 {
        writer.wait_for(200 + 130 * round);
        services.kill_vault();
        // The writer does not wait for the vault.
        writer.wait_for(300);
        services.start_vault();
        goes_on(&services);
    }
    assert_eq!(writer.retries(), 0, "no write ever failed");
    settle_and_check(&services, &mut writer, dir.path());
    services.stop();
}

#[test]
fn both_services_killed_at_the_same_moment_find_their_way_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut services = services(dir.path());
    let mut writer = Writer::start(services.socket.clone(), "data", SIZE, seed(0xb0));
    for round in 0..3 {
        writer.wait_for(300);
        services.kill_capture();
        services.kill_vault();
        if round % 2 == 0 {
            services.start_capture();
            std::thread::sleep(Duration::from_millis(300));
            services.start_vault();
        } else {
            services.start_vault();
            services.start_capture();
        }
        goes_on(&services);
    }
    settle_and_check(&services, &mut writer, dir.path());
    services.stop();
}

#[test]
fn many_writers_at_once_survive_the_kills_each_in_its_own_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut services = services(dir.path());
    let part = SIZE / 8;
    let first_seed = seed(0xe0);
    let mut writers: Vec<_> = (0..8)
        .map(|n| {
            let seed = first_seed + n as u64;
            let (socket, bytes) = (services.socket.clone(), n * part..(n + 1) * part);
            Writer::start_in(socket, "data", bytes, seed)
        })
        .collect();
    for writer in &writers[..3] {
        writer.wait_for(150);
        services.kill_capture();
        services.start_capture();
        goes_on(&services);
    }
    writers.iter_mut().for_each(Writer::stop);
    services.cli.json(args!["ship", "data"]);
    services.cli.json(args!["maintain"]);
    let mut last = [0; 8];
    for generation in services.cli.generations("data") {
        let number = generation["generation"].as_u64().unwrap();
        let image = fs::read(services.cli.restore("data", number, dir.path())).unwrap();
        let moments: Vec<_> = writers.iter().map(|w| w.moment_of(&image)).collect();
        for (before, now) in last.iter_mut().zip(&moments) {
            assert!(
                *before <= *now,
                "generation {number} goes back in time: {moments:?}"
            );
            *before = *now;
        }
    }
    assert!(
        writers
            .iter()
            .zip(&last)
            .all(|(writer, last)| writer.done() == *last)
    );
    services.cli.assert_scrub_is_clean("data");
    services.stop();
}

#[test]
fn intervals_cut_under_load_are_the_volume_at_one_moment() {
    let dir = tempfile::tempdir().unwrap();
    let services = services(dir.path());
    let mut writer = Writer::start(services.socket.clone(), "data", SIZE, seed(0x1d));
    for _ in 0..4 {
        writer.wait_for(150);
        let before = writer.done();
        let receipt = services.cli.json(args!["ship", "data"]);
        let after = writer.begun();
        let number = receipt["generation"].as_u64().unwrap();
        let image = services.cli.restore("data", number, dir.path());
        writer.assert_within(&image, before..=after);
    }
    settle_and_check(&services, &mut writer, dir.path());
    services.stop();
}
