//! What somebody does who meets Tidemark for the first time, and what scripts rely on.

use std::{fs, os::unix::fs::MetadataExt};

use crate::{
    nbd::Client,
    programs::{Up, args, program},
};

#[test]
fn a_first_user_protects_a_file_writes_ships_and_restores_it() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let file = dir.path().join("data.img");

    let added = up.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", "64MiB"
    ]);
    assert_eq!(added["volume"], "data");
    assert_eq!(added["state"], "serving");
    assert_eq!(added["size"], 64 << 20);
    let created = fs::metadata(&file).unwrap();
    assert_eq!(
        (created.len(), created.blocks()),
        (64 << 20, 0),
        "created, sparse"
    );

    let empty = up.cli.json(args!["ship", "data"]);
    assert_eq!(empty["generation"], 1);

    let mut client = Client::connect(&up.socket, "data").unwrap();
    assert_eq!(client.size, 64 << 20);
    client.write(5 << 20, &[7; 300_000]).unwrap();
    client.flush().unwrap();

    let receipt = up.cli.json(args!["ship", "data"]);
    assert_eq!(receipt["volume"], "data");
    assert_eq!(receipt["generation"], 2);
    assert_eq!(receipt["created"], true);
    assert_eq!(receipt["changed_blocks"], 300_000_u64.div_ceil(4096));
    assert!(receipt["bytes_sent"].as_u64().unwrap() > 0);
    assert!(receipt["coherence"].is_string());

    client.write(0, &[9; 4096]).unwrap();
    let second = up.cli.json(args!["ship", "data"]);
    assert_eq!(
        (&second["generation"], &second["changed_blocks"]),
        (&3.into(), &1.into())
    );

    let generations = up.cli.generations("data");
    assert_eq!(generations.len(), 3);
    assert_eq!(generations[1]["image_digest"], receipt["image_digest"]);
    for field in ["generation", "cut_time", "current_through", "image_digest"] {
        assert!(!generations[2][field].is_null(), "{field}");
    }

    let restored = dir.path().join("restored.img");
    let told = up.cli.json(args!["restore", "data@2", restored]);
    assert_eq!(told["image_digest"], receipt["image_digest"]);
    let mut expected = vec![0; 64 << 20];
    expected[5 << 20..(5 << 20) + 300_000].fill(7);
    assert!(fs::read(&restored).unwrap() == expected);
    assert!(
        fs::metadata(&restored).unwrap().blocks() * 512 < 1 << 20,
        "sparse"
    );

    up.cli.json(args!["restore", "data", restored, "--force"]);
    assert!(
        fs::read(&restored).unwrap() == fs::read(&file).unwrap(),
        "the newest is the file"
    );
    up.process.terminate();
}

#[test]
fn an_interval_without_changes_makes_no_generation_but_moves_the_time() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let file = dir.path().join("data.img");
    fs::write(&file, vec![3; 1 << 20]).unwrap();
    up.cli.json(args!["volume", "add", "data", "--file", file]);
    let first = up.cli.json(args!["ship", "data"]);
    assert_eq!(first["generation"], 1, "an adopted file is shipped whole");
    let before = up.cli.generations("data");

    // Written, but with what was there.
    Client::connect(&up.socket, "data")
        .unwrap()
        .write(0, &[3; 8192])
        .unwrap();
    let second = up.cli.json(args!["ship", "data"]);
    assert_eq!(second["created"], false);
    assert_eq!(second["generation"], 1);
    assert_eq!(second["image_digest"], first["image_digest"]);
    let after = up.cli.generations("data");
    assert_eq!(after.len(), 1);
    let through = |list: &[serde_json::Value]| {
        let text = list[0]["current_through"].as_str().unwrap();
        let (seconds, fraction) = text
            .trim_end_matches('Z')
            .split_once('.')
            .unwrap_or((text.trim_end_matches('Z'), ""));
        // Trailing zeroes of the fraction are not printed.
        format!("{seconds}.{fraction:0<3}")
    };
    assert!(through(&after) > through(&before));
}

#[test]
fn everything_is_still_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let file = dir.path().join("data.img");
    let up = Up::start(&state, &[]);
    up.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", "8MiB"
    ]);
    Client::connect(&up.socket, "data")
        .unwrap()
        .write(4096, &[1; 4096])
        .unwrap();
    let snapshot = up
        .cli
        .json(args!["snapshot", "create", "data", "--label", "kept"]);
    Client::connect(&up.socket, "data")
        .unwrap()
        .write(4096, &[2; 4096])
        .unwrap();
    let receipt = up.cli.json(args!["ship", "data"]);
    up.process.terminate();

    let up = Up::start(&state, &[]);
    let shown = up.cli.json(args!["volume", "show", "data"]);
    assert_eq!(shown["generation"], receipt["generation"]);
    assert_eq!(shown["changed_blocks"], 0, "a clean stop leaves no doubt");
    let mut block = [0; 4096];
    Client::connect(&up.socket, "data")
        .unwrap()
        .read(4096, &mut block)
        .unwrap();
    assert_eq!(block, [2; 4096]);
    assert_eq!(
        up.cli.generations("data").last().unwrap()["image_digest"],
        receipt["image_digest"]
    );
    let listed = up.cli.json(args!["snapshot", "list", "data"]);
    assert_eq!(listed[0]["snapshot"], snapshot["snapshot"]);
    assert_eq!(listed[0]["label"], "kept");
    let output = dir.path().join("kept.img");
    up.cli
        .json(args!["snapshot", "read", "data", "1", "--output", output]);
    assert!(
        fs::read(&output).unwrap()[4096..8192]
            .iter()
            .all(|&b| b == 1)
    );
}

#[test]
fn intervals_ship_by_themselves_by_time_and_by_changed_blocks_and_old_generations_retire() {
    let dir = tempfile::tempdir().unwrap();
    let flags = [
        "--interval-max",
        "1h",
        "--changed-blocks-max",
        "16",
        "--retain",
        "2",
    ];
    let up = Up::start(&dir.path().join("state"), &flags);
    let file = dir.path().join("data.img");
    up.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", "8MiB"
    ]);
    let mut client = Client::connect(&up.socket, "data").unwrap();
    for round in 1..=4_u8 {
        let head = up.cli.json(args!["volume", "show", "data"])["generation"]
            .as_u64()
            .unwrap();
        client
            .write(u64::from(round) << 20, &[round; 64 << 10])
            .unwrap();
        crate::programs::wait_for("the interval of 16 changed blocks", || {
            let shown = up.cli.json(args!["volume", "show", "data"]);
            (shown["generation"].as_u64().unwrap() > head).then_some(())
        });
    }
    let generations = crate::programs::wait_for("retirement", || {
        let generations = up.cli.generations("data");
        (generations.len() == 2).then_some(generations)
    });
    assert!(
        generations
            .iter()
            .any(|g| g["trigger"] == "changed_blocks_max")
    );
    drop(up);

    let up = Up::start(&dir.path().join("timed"), &["--interval-max", "300ms"]);
    let file = dir.path().join("timed.img");
    up.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", "8MiB"
    ]);
    // Before that the vault doesn't know the volume, and the write could become part of it.
    crate::programs::wait_for("the first generation", || {
        let shown = up.cli.json(args!["volume", "show", "data"]);
        (shown["generation"].as_u64().unwrap() > 0).then_some(())
    });
    Client::connect(&up.socket, "data")
        .unwrap()
        .write(0, &[1; 4096])
        .unwrap();
    crate::programs::wait_for("an interval by time", || {
        let generations = up.cli.generations("data");
        let timed =
            |g: &serde_json::Value| g["changed_blocks"] == 1 && g["trigger"] == "interval_max";
        generations.iter().any(timed).then_some(())
    });
}

#[test]
fn a_volume_is_added_at_each_start_where_that_is_wanted_but_never_as_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let (file, other) = (dir.path().join("data.img"), dir.path().join("other.img"));
    let add = |more: &[&'static str]| {
        let mut args: Vec<_> = args!["volume", "add", "data", "--if-missing", "--file"].to_vec();
        args.push(file.as_os_str());
        args.extend(more.iter().map(|word| std::ffi::OsStr::new(*word)));
        args
    };
    let first = up.cli.json(&add(&["--size", "8MiB"]));
    for same in [
        &["--size", "8MiB"][..],
        &[],
        &["--engine", "auto"],
        &["--engine", "intercept"],
    ] {
        assert_eq!(up.cli.json(&add(same))["id"], first["id"], "{same:?}");
    }
    for (differs, told) in [
        (&["--size", "16MiB"][..], "length"),
        (&["--block-size", "64KiB"], "block size"),
        (&["--engine", "reflink"], "engine"),
    ] {
        let error = up.cli.fails(&add(differs), 4, "VOLUME_EXISTS");
        assert!(error.contains(told), "{error}");
    }
    let elsewhere = args!["volume", "add", "data", "--if-missing", "--file", other];
    let error = up.cli.fails(elsewhere, 4, "VOLUME_EXISTS");
    assert!(error.contains("file is"), "{error}");
    let twice = args!["volume", "add", "twice", "--if-missing", "--file", file];
    let error = up.cli.fails(twice, 4, "VOLUME_EXISTS");
    assert!(error.contains("file of volume data"), "{error}");
    let without = args!["volume", "add", "data", "--file", file];
    up.cli.fails(without, 4, "VOLUME_EXISTS");
}

#[test]
fn services_say_whether_they_serve() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let health = up.cli.json(args!["health"]);
    for service in ["capture", "vault"] {
        assert_eq!(health[service]["serving"], true, "{health}");
    }
    let vault = up.cli.json(args!["health", "vault"]);
    assert!(vault["capture"].is_null(), "only what was asked: {vault}");
    let cli = up.cli.clone();
    up.process.terminate();
    let error = cli.fails(args!["health", "--timeout", "1m"], 5, "NOT_SERVING");
    assert!(error.contains("capture service at") && error.contains("vault service at"));
}

#[test]
fn volumes_are_listed_shown_and_removed_and_their_files_stay() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let file = dir.path().join("a.img");
    up.cli.json(args![
        "volume",
        "add",
        "a",
        "--file",
        file,
        "--size",
        "1MiB",
        "--block-size",
        "64KiB"
    ]);
    let listed = up.cli.json(args!["volume", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["block_size"], 65536);
    let by_id = up
        .cli
        .json(args!["volume", "show", listed[0]["id"].as_str().unwrap()]);
    assert_eq!(by_id["volume"], "a");
    up.cli.json(args!["ship", "a"]);
    up.cli.json(args!["volume", "remove", "a"]);
    assert_eq!(
        up.cli
            .json(args!["volume", "list"])
            .as_array()
            .unwrap()
            .len(),
        0
    );
    assert!(file.exists());
    let status = up.cli.json(args!["status"]);
    assert_eq!(
        status["vault"]["volumes"][0]["volume"], "a",
        "its generations stay"
    );
    assert_eq!(status["capture"]["reachable"], true);
}

#[test]
fn every_command_speaks_to_people_too() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let file = dir.path().join("data.img");
    let output = dir.path().join("out.img");
    for args in [
        args!["volume", "add", "data", "--file", file, "--size", "1MiB"] as &[_],
        args!["volume", "list"],
        args!["volume", "show", "data"],
        args!["snapshot", "create", "data"],
        args!["snapshot", "list", "data"],
        args!["snapshot", "read", "data", "1", "--output", output],
        args!["snapshot", "delete", "data", "1"],
        args!["ship", "data"],
        args!["generation", "list", "data"],
        args!["generation", "show", "data"],
        args!["restore", "data", output, "--force"],
        args!["status"],
        args!["maintain", "--dry-run"],
        args!["maintain", "data"],
        args!["volume", "remove", "data"],
    ] {
        let told = up.cli.output(args);
        let errors = String::from_utf8_lossy(&told.stderr);
        assert!(told.status.success(), "{args:?}: {errors}");
        assert!(!told.stdout.is_empty(), "{args:?}");
        assert_eq!(errors, "", "{args:?}: no bar where there is no terminal");
    }
}

#[test]
fn one_state_folder_has_one_tidemark_up() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let up = Up::start(&state, &[]);
    let second = program("tidemark")
        .args(["up", "--state"])
        .arg(&state)
        .args([
            "--capture-listen",
            "127.0.0.1:0",
            "--vault-listen",
            "127.0.0.1:0",
        ])
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(4));
    let told = String::from_utf8_lossy(&second.stderr);
    assert!(told.contains("in use by another process"), "{told}");
    drop(up);
}
