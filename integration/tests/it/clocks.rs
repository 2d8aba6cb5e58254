//! Wall clocks that jump: order is by number, so nothing is lost, overtaken or deleted early.

use std::{fs, path::Path};

use crate::{
    crash::{goes_on, settle_and_check},
    programs::{Split, args, have, run},
    workload::{Writer, seed},
};

const SIZE: usize = 8 << 20;
const DAY: i64 = 24 * 3600;

/// A command that runs a service under the clock that this file sets.
fn under_clock(dir: &Path, clock: &Path) -> Vec<String> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fake_clock.c");
    let library = dir.join("fake_clock.so");
    run(
        "cc",
        args!["-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"],
    );
    vec![
        "env".to_owned(),
        format!("LD_PRELOAD={}", library.display()),
        format!("FAKE_CLOCK={}", clock.display()),
    ]
}

/// Written aside and renamed: a reader finds the old or the new number.
fn set(clock: &Path, seconds: i64) {
    let aside = clock.with_extension("new");
    fs::write(&aside, seconds.to_string()).unwrap();
    fs::rename(aside, clock).unwrap();
}

#[test]
fn clocks_that_jump_in_both_directions_lose_no_interval_and_delete_none_early() {
    if !have(&["cc", "env"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let clocks = ["capture", "vault"].map(|name| dir.path().join(format!("{name}.clock")));
    clocks.iter().for_each(|clock| set(clock, 0));
    let mut services = Split::new(dir.path());
    services.capture_wrapper = under_clock(dir.path(), &clocks[0]);
    services.vault_wrapper = under_clock(dir.path(), &clocks[1]);
    services.capture_flags = ["--interval-max=200ms", "--scrub-period=500ms"]
        .map(str::to_owned)
        .to_vec();
    services.vault_flags = [
        "--retain=5",
        "--reader-grace=200ms",
        "--maintenance-period=200ms",
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
    let mut writer = Writer::start(services.socket.clone(), "data", SIZE, seed(0xc1));
    for (capture, vault) in [
        (DAY, 0),
        (-DAY, 0),
        (0, DAY),
        (0, -DAY),
        (3650 * DAY, -3650 * DAY),
        (-3650 * DAY, 3650 * DAY),
        (0, 0),
    ] {
        set(&clocks[0], capture);
        set(&clocks[1], vault);
        goes_on(&services);
        // Also what was written under another clock is read again.
        let before = writer.done();
        services.cli.json(args!["ship", "data"]);
        let newest = services.cli.generations("data").pop().unwrap();
        let number = newest["generation"].as_u64().unwrap();
        let image = services.cli.restore("data", number, dir.path());
        writer.assert_within(&image, before..=writer.begun());
    }
    let shifted = services.logged().contains("2036-");
    assert!(shifted, "the services' clocks were really set");
    services.kill_capture();
    services.kill_vault();
    set(&clocks[0], -DAY);
    services.start_vault();
    services.start_capture();
    goes_on(&services);
    settle_and_check(&services, &mut writer, dir.path());
    services.stop();
}
