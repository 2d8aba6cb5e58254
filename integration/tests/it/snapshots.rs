//! Snapshots that overlap, read while the volume is written.

use std::{fs, path::PathBuf};

use crate::{
    programs::{Up, args},
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
