//! The airline: seats are booked and given back without pause, and whoever reads a snapshot meanwhile finds each seat
//! either free or taken.

use std::{fs, path::Path, process::Command};

use tidemark_integration::small_disk::may_mount;

use super::{Committer, EXT4, NAME, Scene, Shipped};
use crate::programs::{args, have, run};

const SEATS: u64 = 400;
const SNAPSHOTS: usize = 24;
/// Bookings between two snapshots.
const BETWEEN: u64 = 50;

/// A booking changes both tables, their indexes and a third table: some ten pages, by way of a journal.
const MAKE: &str = "create table free (seat integer primary key, row text); \
    create table taken (seat integer primary key, passenger text); \
    create table booking (number integer primary key); \
    create index by_passenger on taken (passenger); \
    with recursive n(i) as (select 1 union all select i + 1 from n where i < 400) \
    insert into free select i, hex(randomblob(200)) from n;";

/// Books a seat, or gives it back if it is taken.
fn booking(number: u64) -> String {
    let seat = number * 7919 % SEATS + 1;
    format!(
        "begin immediate; \
         create temp table moved as select seat from free where seat = {seat}; \
         insert into free select seat, hex(randomblob(200)) from taken where seat = {seat}; \
         delete from taken where seat = {seat}; \
         delete from free where seat in (select seat from moved); \
         insert into taken select seat, 'passenger {number}' from moved; \
         drop table moved; \
         insert into booking values ({number}); \
         commit; select {number};\n"
    )
}

/// How many bookings there are, where each seat is either free or taken.
fn look(database: &Path) -> u64 {
    let sql = "pragma integrity_check; \
        select count(*) from free where seat in (select seat from taken); \
        select count(*) from (select seat from free union select seat from taken); \
        select count(*) from booking;";
    let told = run("sqlite3", args![database, sql]);
    let lines: Vec<_> = told.lines().collect();
    assert_eq!(lines[..3], ["ok", "0", "400"], "{told}");
    lines[3].parse().unwrap()
}

/// A snapshot's image, by the way of its file or by NBD.
fn copy(scene: &Scene, number: u64, by_nbd: bool) -> std::path::PathBuf {
    let copy = scene.path("snapshot.img");
    if by_nbd {
        let socket = scene.services.socket.display();
        let uri = format!("nbd+unix:///{NAME}@{number}?socket={socket}");
        run("nbdcopy", args![uri, copy]);
    } else {
        let file = scene.path(&format!("files/.snapshots/{NAME}/{number}.img"));
        run("cp", args!["--sparse=always", file, copy]);
    }
    copy
}

fn booked_in(scene: &Scene, number: u64, by_nbd: bool) -> u64 {
    let image = copy(scene, number, by_nbd);
    let booked = scene.recover_image(&image, |at| look(&at.join("seats")));
    fs::remove_file(image).unwrap();
    booked
}

#[test]
fn a_reader_of_snapshots_never_sees_a_seat_both_free_and_taken_while_seats_are_booked() {
    let needed = [&EXT4.programs()[..], &["sqlite3", "nbdcopy"]].concat();
    if !may_mount() || !have(&needed) {
        return;
    }
    let scene = Scene::new(EXT4, 48 << 20);
    let database = scene.at().join("seats");
    run("sqlite3", args![database, MAKE]);
    let mut shell = Command::new("sqlite3");
    shell
        .args(["-bail", "-cmd", "pragma synchronous = extra"])
        .arg(&database);
    let bookings = Committer::start(shell, booking);

    let mut taken: Vec<(u64, u64)> = Vec::new();
    for round in 0..SNAPSHOTS {
        bookings.wait_for_more(BETWEEN);
        let at_least = bookings.acknowledged();
        let snapshot = scene.services.cli.json(args!["snapshot", "create", NAME]);
        let at_most = bookings.begun();
        let number = snapshot["snapshot"].as_u64().unwrap();
        let booked = booked_in(&scene, number, round % 2 == 0);
        let window = Shipped {
            generation: number,
            at_least,
            at_most,
        };
        window.assert_has(booked);
        taken.push((number, booked));
    }
    // Read again, the other way round, while it all goes on: they are what they were.
    for (round, (number, booked)) in taken.into_iter().enumerate().step_by(5) {
        assert_eq!(booked_in(&scene, number, round % 2 == 1), booked);
    }
    bookings.wait_for_more(1);
    bookings.end();
    scene.end();
}
