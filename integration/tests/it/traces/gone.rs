//! A collector that is not there, says nothing, or goes away: nothing waits for it.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use super::{Collector, add, services, write};
use crate::programs::{Split, args, free_addr, wait_for};

/// How long the services have to end, one after the other. Whoever waited for the collector would take forever.
const END_MAX: Duration = Duration::from_secs(30);
/// How long an interval may take on a machine that is busy.
const SHIP_MAX: Duration = Duration::from_secs(10);
const FAILS: &str = "traces can't be exported";
const WORKS: &str = "traces are exported again";

fn told(services: &Split, what: &str) -> usize {
    services.logged().matches(what).count()
}

/// Ships a few intervals, none of which waits for a collector.
fn ships(services: &Split, generations: std::ops::RangeInclusive<u64>) {
    for generation in generations {
        write(services, "data", u8::try_from(generation).unwrap(), 4);
        let began = Instant::now();
        services.cli.json(args!["ship", "data"]);
        let took = began.elapsed();
        assert!(took < SHIP_MAX, "{took:?}");
        assert_eq!(services.cli.generations("data").len() as u64, generation);
    }
}

fn stops_in_time(services: Split) {
    let began = Instant::now();
    services.stop();
    assert!(began.elapsed() < END_MAX, "{:?}", began.elapsed());
}

#[test]
fn intervals_go_on_and_services_end_without_the_collector_that_they_were_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = format!("--otlp-endpoint=http://{}", free_addr());
    let mut services = services(dir.path(), &nobody);
    services.start_vault();
    services.start_capture();
    add(&services, dir.path(), "data");
    ships(&services, 2..=3);
    // Each of both says it once, however often it fails.
    wait_for("both to say so", || {
        (told(&services, FAILS) == 2).then_some(())
    });
    ships(&services, 4..=4);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(told(&services, FAILS), 2);
    stops_in_time(services);
}

#[test]
fn intervals_go_on_and_services_end_with_a_collector_that_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let hole = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("--otlp-endpoint=http://{}", hole.local_addr().unwrap());
    let mut services = services(dir.path(), &silent);
    services.start_vault();
    services.start_capture();
    add(&services, dir.path(), "data");
    ships(&services, 2..=3);
    wait_for("both to say so", || {
        (told(&services, FAILS) == 2).then_some(())
    });
    stops_in_time(services);
}

#[test]
fn a_collector_that_is_killed_and_comes_back_is_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut services = services(dir.path(), &collector.flag());
    services.start_vault();
    services.start_capture();
    add(&services, dir.path(), "data");
    collector.interval("data", 1);
    let addr = collector.addr;
    drop(collector);
    ships(&services, 2..=2);
    wait_for("both to say so", || {
        (told(&services, FAILS) == 2).then_some(())
    });
    let collector = Collector::start_at(addr);
    ships(&services, 3..=3);
    let interval = collector.interval("data", 3);
    collector.trace(&interval);
    wait_for("both to say so", || {
        (told(&services, WORKS) == 2).then_some(())
    });
    stops_in_time(services);
    assert!(
        collector
            .seen()
            .iter()
            .all(|seen| seen.says("generation") != "2")
    );
}
