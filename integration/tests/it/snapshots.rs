//! Snapshots that overlap, read while the volume is written.

use std::{fs, path::PathBuf, process::Stdio, time::Duration};

use tidemark_integration::nbd::Client;

use crate::{
    programs::{Split, Up, args},
    workload::Writer,
};

const SIZE: usize = 16 << 20;

#[test]
fn overlapping_snapshots_read_under_load_are_the_volume_at_their_cuts() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &["--interval-max", "500ms"]);
    let file = dir.path().join("data.img");
    up.cli.json(args![
        "volume",
        "add",
        "data",
        "--file",
        file,
        "--size",
        SIZE.to_string()
    ]);
    let mut writer = Writer::start(up.socket.clone(), "data", SIZE, 0x5a);

    let mut cuts = Vec::new();
    for _ in 0..8 {
        writer.wait_for(120);
        let before = writer.done();
        let snapshot = up.cli.json(args!["snapshot", "create", "data"]);
        cuts.push((
            snapshot["snapshot"].as_u64().unwrap(),
            before..=writer.begun(),
        ));
    }
    let image = |name: String| -> PathBuf { dir.path().join(name) };
    let mut moments = Vec::new();
    for (snapshot, within) in &cuts {
        let output = image(format!("{snapshot}.img"));
        up.cli.json(args![
            "snapshot",
            "read",
            "data",
            snapshot.to_string(),
            "--output",
            output
        ]);
        moments.push(writer.assert_within(&output, within.clone()));
    }
    assert!(moments.is_sorted());

    // Read again, after many more writes, and only as the difference to the one before.
    writer.wait_for(500);
    for pair in cuts.windows(2) {
        let (older, newer) = (pair[0].0, pair[1].0);
        let patched = image("patched.img".into());
        fs::copy(image(format!("{older}.img")), &patched).unwrap();
        up.cli.json(args![
            "snapshot",
            "read",
            "data",
            newer.to_string(),
            "--since",
            older.to_string(),
            "--output",
            patched
        ]);
        assert!(fs::read(&patched).unwrap() == fs::read(image(format!("{newer}.img"))).unwrap());
    }

    // Deleting some leaves the others as they were.
    for (snapshot, _) in cuts.iter().step_by(2) {
        up.cli
            .json(args!["snapshot", "delete", "data", snapshot.to_string()]);
    }
    for (snapshot, _) in cuts.iter().skip(1).step_by(2) {
        let again = image("again.img".into());
        up.cli.json(args![
            "snapshot",
            "read",
            "data",
            snapshot.to_string(),
            "--output",
            again,
            "--force"
        ]);
        assert!(fs::read(&again).unwrap() == fs::read(image(format!("{snapshot}.img"))).unwrap());
    }
    up.cli.fails(
        args!["snapshot", "delete", "data", "1"],
        3,
        "SNAPSHOT_NOT_FOUND",
    );
    writer.stop();
    up.process.terminate();
}

#[test]
fn a_rollback_is_refused_under_clients_happens_as_a_whole_and_is_shipped() {
    const SIZE: usize = 64 << 20;
    const PIECE: usize = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    let mut split = Split::new(dir.path());
    split.start_vault();
    split.start_capture();
    let file = dir.path().join("data.img");
    let size = SIZE.to_string();
    split.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", size
    ]);
    let image = |split: &Split| {
        let mut image = vec![0; SIZE];
        let mut client = Client::connect(&split.socket, "data").unwrap();
        for (at, piece) in (0..).step_by(PIECE).zip(image.chunks_mut(PIECE)) {
            client.read(at, piece).unwrap();
        }
        image
    };
    let mut client = Client::connect(&split.socket, "data").unwrap();
    for at in (0..SIZE as u64 / 2).step_by(PIECE) {
        client.write(at, &vec![1; PIECE]).unwrap();
    }
    let good = split.cli.json(args!["snapshot", "create", "data"]);
    let good = good["snapshot"].as_u64().unwrap().to_string();
    for at in (SIZE as u64 / 4..SIZE as u64 * 3 / 4).step_by(PIECE) {
        client.write(at, &vec![2; PIECE]).unwrap();
    }
    client.write_zeroes(0, 4 << 20).unwrap();

    let rollback = args!["snapshot", "rollback", "data", good];
    split.cli.fails(rollback, 4, "VOLUME_IN_USE");
    let before = image(&split);
    let missing = args!["snapshot", "rollback", "data", "99", "--force"];
    split.cli.fails(missing, 3, "SNAPSHOT_NOT_FOUND");
    assert!(image(&split) == before);
    let mut connected_still = [0; 512];
    client.read(0, &mut connected_still).unwrap();
    drop(client);

    // Killed in the middle, sooner or later.
    let expected = {
        let mut expected = vec![0; SIZE];
        expected[..SIZE / 2].fill(1);
        expected
    };
    let mut done = false;
    for wait_ms in [5, 20, 60, 120, 250] {
        let mut command = split.cli.command(rollback);
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait_ms));
        split.kill_capture();
        child.wait().unwrap();
        split.start_capture();
        let found = image(&split);
        assert!(done || found == before || found == expected);
        done = found == expected;
    }
    let told = split
        .cli
        .json(args!["snapshot", "rollback", "data", good, "--force"]);
    assert!(image(&split) == expected);
    if done {
        assert!(told["kept_snapshot"].is_null());
    } else {
        assert!(told["changed_blocks"].as_u64().unwrap() > 8000);
    }

    // What the volume was before is still there, and goes back in, whoever is connected.
    let snapshots = split.cli.json(args!["snapshot", "list", "data"]);
    let kept = snapshots.as_array().unwrap().last().unwrap()["snapshot"]
        .as_u64()
        .unwrap();
    let mut client = Client::connect(&split.socket, "data").unwrap();
    let told = split.cli.json(args![
        "snapshot",
        "rollback",
        "data",
        kept.to_string(),
        "--force"
    ]);
    assert!(told["kept_snapshot"].as_u64().unwrap() > kept);
    assert!(client.read(0, &mut [0; 4096]).is_err());
    assert!(image(&split) == before);
    let shipped = split.cli.json(args!["ship", "data"]);
    let restored = split
        .cli
        .restore("data", shipped["generation"].as_u64().unwrap(), dir.path());
    assert!(fs::read(restored).unwrap() == before);
    assert_eq!(split.cli.json(args!["scrub", "data"])["mismatches"], 0);
    split.stop();
}
