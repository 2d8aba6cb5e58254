//! SQLite with its write-ahead log and with its rollback journal, two databases on one filesystem, each written by
//! another process without pause.
//!
//! With `synchronous = full` and a rollback journal SQLite may take back the last transaction after a power cut, because
//! it commits by removing a file and doesn't sync the directory; `extra` does. With the log `full` is enough.

use std::{path::Path, process::Command, thread};

use rustix::process::{Pid, Signal, kill_process};
use tidemark_integration::small_disk::may_mount;

use super::{Committer, EXT4, Filesystem, NAME, Scene, XFS};
use crate::programs::{args, have, run, wait_for};

const SIZE: u64 = 64 << 20;
const ACCOUNTS: u64 = 5000;
const TOTAL: u64 = ACCOUNTS * 100;

fn make(database: &Path, journal: &str) {
    let sql = format!(
        "pragma journal_mode = {journal}; pragma synchronous = extra; \
         create table account (id integer primary key, balance integer not null, filler text); \
         create table transfer (number integer primary key, amount integer); \
         create index by_balance on account (balance); \
         with recursive n(i) as (select 1 union all select i + 1 from n where i < {ACCOUNTS}) \
         insert into account select i, 100, hex(randomblob(50)) from n;"
    );
    assert_eq!(run("sqlite3", args![database, sql]).trim(), journal);
}

/// Moves an amount between two accounts, and notes that.
fn transfer(number: u64) -> String {
    let (amount, from, to) = (
        number % 17,
        number * 7919 % ACCOUNTS + 1,
        number * 104_729 % ACCOUNTS + 1,
    );
    format!(
        "begin immediate; \
         update account set balance = balance - {amount} where id = {from}; \
         update account set balance = balance + {amount} where id = {to}; \
         insert into transfer values ({number}, {amount}); \
         commit; select {number};\n"
    )
}

fn start(database: &Path, synchronous: &'static str) -> Committer {
    let mut shell = Command::new("sqlite3");
    shell.arg("-bail").arg(database);
    Committer::start(shell, move |number| {
        let text = transfer(number);
        match number {
            1 => format!("pragma synchronous = {synchronous};\n{text}"),
            _ => text,
        }
    })
}

/// How many transfers there are, in a database that is sound and in which no money was lost.
fn look(database: &Path) -> u64 {
    let sql = "pragma integrity_check; select sum(balance) from account; \
        select count(*) from transfer; select coalesce(max(number), 0) from transfer;";
    let told = run("sqlite3", args![database, sql]);
    let lines: Vec<_> = told.lines().collect();
    let total = TOTAL.to_string();
    assert_eq!(lines[..2], ["ok", total.as_str()], "{}", database.display());
    assert_eq!(lines[2], lines[3], "no transfer is missing");
    lines[2].parse().unwrap()
}

fn each_generation_is_recovered(filesystem: Filesystem) {
    if !may_mount() || !have(&[&filesystem.programs()[..], &["sqlite3"]].concat()) {
        return;
    }
    let scene = Scene::new(filesystem, SIZE);
    let names = ["wal", "delete"];
    for journal in names {
        make(&scene.at().join(journal), journal);
    }
    let first = scene.ship();
    let in_wal = start(&scene.at().join("wal"), "full");
    let in_journal = start(&scene.at().join("delete"), "extra");
    let shipped = scene.ship_while_written(first, &in_wal);
    let last = scene.ship_beside(&in_journal);
    let committed = [in_wal.end(), in_journal.end()];

    let (generations, _) = scene.generations_from(first);
    let mut before = [0, 0];
    for generation in generations {
        let found = scene.recover(generation, |at| names.map(|name| look(&at.join(name))));
        println!("generation {generation}: {found:?} transfers of {committed:?}");
        assert!(found[0] >= before[0] && found[1] >= before[1]);
        before = found;
        for shipped in shipped.iter().filter(|s| s.generation == generation) {
            shipped.assert_has(found[0]);
        }
        if generation == last.generation {
            last.assert_has(found[1]);
        }
    }
    assert!(before[0] > 0 && before[1] > 0, "both wrote");
    scene.end();
}

#[test]
fn sqlite_on_ext4_in_either_journal_mode_recovers_every_generation_that_was_cut_while_it_wrote() {
    each_generation_is_recovered(EXT4);
}

#[test]
fn sqlite_on_xfs_in_either_journal_mode_recovers_every_generation_that_was_cut_while_it_wrote() {
    each_generation_is_recovered(XFS);
}

/// The vault neither answers nor hangs up, as behind a link that is dead.
#[test]
fn a_database_is_written_on_beside_cuts_while_the_vault_is_silent_and_all_of_it_ships_afterwards() {
    if !may_mount() || !have(&[&EXT4.programs()[..], &["sqlite3"]].concat()) {
        return;
    }
    let scene = Scene::with_flags(EXT4, SIZE, &["--interval-max=1h"]);
    let database = scene.at().join("wal");
    make(&database, "wal");
    scene.ship();
    let vault = Pid::from_raw(scene.services.vault_pid().cast_signed()).unwrap();
    kill_process(vault, Signal::STOP).unwrap();

    let client = start(&database, "full");
    let cli = scene.services.cli.clone();
    let epoch = || cli.json(args!["volume", "show", NAME])["epoch"].as_u64();
    let before = epoch();
    let at_least = client.acknowledged();
    let shipping = cli.clone();
    let shipping = thread::spawn(move || shipping.json(args!["ship", NAME]));
    wait_for("the cut", || (epoch() > before).then_some(()));
    for _ in 0..5 {
        client.wait_for_more(100);
        cli.json(args!["snapshot", "create", NAME]);
    }
    client.wait_for_more(100);
    assert!(!shipping.is_finished(), "the vault is silent");
    let begun = client.begun();

    kill_process(vault, Signal::CONT).unwrap();
    let receipt = shipping.join().unwrap();
    let found = scene.recover(receipt["generation"].as_u64().unwrap(), |at| {
        look(&at.join("wal"))
    });
    assert!((at_least..=begun - 500).contains(&found), "{found}");
    let last = client.end();
    let newest = scene.ship();
    assert_eq!(scene.recover(newest, |at| look(&at.join("wal"))), last);
    scene.end();
}
