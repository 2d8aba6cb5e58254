//! Volumes that real programs wrote: what comes back is what they take for sound.

use std::fs;

use crate::programs::{Up, args, have, run};

#[test]
fn an_ext4_filesystem_sent_by_nbdcopy_is_restored_sound() {
    if !have(&["mkfs.ext4", "e2fsck", "debugfs", "nbdcopy"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(
        &dir.path().join("state"),
        &["--interval-max", "300ms", "--retain", "16"],
    );
    let uri = format!("nbd+unix:///disk?socket={}", up.socket.display());
    let image = dir.path().join("made.img");
    let file = dir.path().join("disk.img");
    up.cli.json(args![
        "volume", "add", "disk", "--file", file, "--size", "64MiB"
    ]);

    run(
        "mkfs.ext4",
        args!["-q", "-F", "-b", "4096", "-d", "/etc/init.d", image, "64M"],
    );
    run("nbdcopy", args!["--flush", image, uri]);
    let first = up.cli.json(args!["ship", "disk"])["generation"]
        .as_u64()
        .unwrap();
    let first_image = fs::read(&image).unwrap();

    let payload = dir.path().join("payload");
    fs::write(&payload, vec![0xa5; 3_000_000]).unwrap();
    run(
        "debugfs",
        args![
            "-w",
            "-R",
            format!("write {} payload", payload.display()),
            image
        ],
    );
    run("nbdcopy", args!["--flush", image, uri]);
    let second = up.cli.json(args!["ship", "disk"])["generation"]
        .as_u64()
        .unwrap();

    for (generation, expected) in [(first, first_image), (second, fs::read(&image).unwrap())] {
        let restored = up.cli.restore("disk", generation, dir.path());
        assert!(
            fs::read(&restored).unwrap() == expected,
            "generation {generation}"
        );
        run("e2fsck", args!["-fn", restored]);
    }
    let back = dir.path().join("back");
    let newest = up.cli.restore("disk", second, dir.path());
    run(
        "debugfs",
        args!["-R", format!("dump payload {}", back.display()), newest],
    );
    assert!(fs::read(back).unwrap() == fs::read(payload).unwrap());
    up.process.terminate();
}

#[test]
fn a_sqlite_database_copied_amid_its_work_is_restored_sound() {
    if !have(&["sqlite3", "nbdcopy"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let uri = format!("nbd+unix:///db?socket={}", up.socket.display());
    let file = dir.path().join("db.img");
    let database = dir.path().join("work.sqlite");
    up.cli.json(args![
        "volume", "add", "db", "--file", file, "--size", "16MiB"
    ]);
    let sql = |text: &str| run("sqlite3", args![database, text]);
    sql("create table t(id integer primary key, text); \
         with recursive n(i) as (select 1 union all select i + 1 from n where i < 20000) \
         insert into t select i, hex(randomblob(50)) from n;");
    let mut sums = Vec::new();
    for round in 0..4 {
        sql(&format!(
            "update t set text = hex(randomblob(50)) where id % 400 = {round};"
        ));
        run("nbdcopy", args!["--flush", database, uri]);
        let receipt = up.cli.json(args!["ship", "db"]);
        sums.push((
            receipt["generation"].as_u64().unwrap(),
            sql("select group_concat(text) from t;"),
        ));
        if round > 0 {
            let changed = receipt["changed_blocks"].as_u64().unwrap();
            assert!(
                changed < 200,
                "only what changed is shipped, not {changed} blocks"
            );
        }
    }
    let length = fs::metadata(&database).unwrap().len();
    for (generation, expected) in sums {
        let restored = up.cli.restore("db", generation, dir.path());
        fs::OpenOptions::new()
            .write(true)
            .open(&restored)
            .unwrap()
            .set_len(length)
            .unwrap();
        assert_eq!(
            run("sqlite3", args![restored, "pragma integrity_check;"]),
            "ok\n"
        );
        assert!(
            run(
                "sqlite3",
                args![restored, "select group_concat(text) from t;"]
            ) == expected
        );
    }
}
