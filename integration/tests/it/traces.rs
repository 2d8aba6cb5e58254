//! Traces of the real services, as a collector receives them.

#[path = "traces/collector.rs"]
mod collector;
#[path = "traces/gone.rs"]
mod gone;
#[path = "traces/tree.rs"]
mod tree;

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::Value;

use crate::{
    docs::root,
    nbd::Client,
    programs::{Split, args, wait_for},
    security::site::Site,
};
use collector::{Collector, Seen};

const SIZE: u64 = 4 << 20;
const BLOCK: usize = 4096;

/// Both services, which send their traces there; not started yet.
fn services(dir: &Path, endpoint: &str) -> Split {
    let mut services = Split::new(dir);
    let json = "--log-format=json".to_owned();
    services.vault_flags = vec![endpoint.to_owned(), json.clone()];
    services.capture_flags = vec![
        endpoint.to_owned(),
        json,
        "--backoff-min=50ms".to_owned(),
        "--backoff-max=100ms".to_owned(),
        "--scrub-period=0s".to_owned(),
    ];
    services
}

/// Adds a volume, and ships it for the first time.
fn add(services: &Split, dir: &Path, name: &str) {
    let file = dir.join(format!("{name}.img"));
    let size = SIZE.to_string();
    services
        .cli
        .json(args!["volume", "add", name, "--file", file, "--size", size]);
    services.cli.json(args!["ship", name]);
}

/// Writes so many blocks, as one request.
fn write(services: &Split, name: &str, fill: u8, blocks: usize) {
    let mut client = Client::connect(&services.socket, name).unwrap();
    client.write(0, &vec![fill; blocks * BLOCK]).unwrap();
}

#[test]
fn a_hosted_collector_is_verified_and_shown_a_secret_that_nobody_else_sees() {
    const SECRET: &str = "Bearer 7e1f-of-nobodys-business";
    let (dir, site) = (tempfile::tempdir().unwrap(), Site::new());
    let collector = Collector::start_with_tls((site.path("service.crt"), site.path("service.key")));
    let headers = dir.path().join("headers");
    fs::write(&headers, "Authorization: of-yesterday-and-nobodys\n").unwrap();
    let endpoint = format!("--otlp-endpoint=https://{}", collector.addr);
    let mut services = services(dir.path(), &endpoint);
    let ca = dir.path().join("ca.pem");
    let trusted = format!("--otlp-ca={}", ca.display());
    let shown = format!("--otlp-headers-file={}", headers.display());
    services
        .vault_flags
        .extend([trusted, shown, "--log=trace".to_owned()]);
    services.start_vault();
    // This one trusts the CAs of the system, and ours is none.
    services.start_capture();
    add(&services, dir.path(), "data");
    wait_for("the vault to say why not", || {
        let says = "traces can't be exported, and are lost; nothing else waits for that";
        lines(&services, says)
            .into_iter()
            .find(|line| line["service"] == "vault-svc" && line.to_string().contains("ca.pem"))
    });
    // Files that come, or change, count from the next connection and the next call on.
    fs::write(&headers, format!("# ours\nAuthorization: {SECRET}\n")).unwrap();
    fs::copy(site.ca(), &ca).unwrap();
    write(&services, "data", 1, 1);
    services.cli.json(args!["ship", "data"]);
    collector.span("the vault's span", |seen| {
        seen.name.ends_with("Ingest/Ship")
    });
    assert_eq!(collector.authorization().as_deref(), Some(SECRET));
    wait_for("the capture service to say why not", || {
        lines(
            &services,
            "traces can't be exported, and are lost; nothing else waits for that",
        )
        .into_iter()
        .find(|line| line["service"] == "capture-svc")
    });
    assert!(!services.logged().contains("nobodys"));
    services.stop();
    assert!(
        collector
            .seen()
            .iter()
            .all(|seen| seen.service() == "vault-svc")
    );
}

#[test]
fn metrics_of_both_services_come_under_their_names_and_without_a_unit_where_they_have_none() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut services = services(dir.path(), &collector.flag());
    services.start_vault();
    services.start_capture();
    add(&services, dir.path(), "data");
    for (metric, unit) in [
        ("tidemark_capture_volume_serving", ""),
        ("tidemark_capture_recovery_point_age_seconds", "s"),
        ("tidemark_vault_broken_volumes", ""),
        ("tidemark_vault_received_bytes", "By"),
    ] {
        assert_eq!(collector.unit(metric), unit, "{metric}");
    }
    services.stop();
}

/// What is between these lines of the manual.
const BEGIN: &str = "<!-- a trace, as a test has received it -->\n```text\n";
const END: &str = "```\n";

#[test]
fn the_trace_of_an_interval_goes_over_both_services_and_is_that_of_the_manual() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut services = services(dir.path(), &collector.flag());
    for flag in [
        "--changed-blocks-max=3",
        "--quiesce-pre=true",
        "--quiesce-post=true",
    ] {
        services.capture_flags.push(flag.to_owned());
    }
    services.start_vault();
    services.start_capture();
    add(&services, dir.path(), "data");
    let before = services.cli.generations("data").len() as u64;
    write(&services, "data", 7, 3);
    let interval = collector.interval("data", before + 1);
    let spans = collector.trace(&interval);
    assert!(
        interval.parent.is_empty() && !interval.failed,
        "{interval:?}"
    );
    for span in &spans {
        let within = |outer: &Seen| outer.start_ns <= span.start_ns && span.end_ns <= outer.end_ns;
        if span.service() == interval.service() {
            assert!(within(&interval), "{span:?} {interval:?}");
        }
        assert!(!span.failed, "{span:?}");
    }
    resources_name_service_version_run_and_host(&spans);
    let epoch = format!(" epoch={}", interval.says("epoch"));
    let tree = tree::render(&spans).replace(&epoch, " epoch=2");
    let path = root().join("docs/TELEMETRY.md");
    let page = fs::read_to_string(&path).unwrap();
    let (head, rest) = page.split_once(BEGIN).unwrap();
    let (shown, tail) = rest.split_once(END).unwrap();
    if std::env::var_os("TIDEMARK_BLESS").is_some() {
        fs::write(&path, format!("{head}{BEGIN}{tree}{END}{tail}")).unwrap();
        return;
    }
    assert_eq!(
        shown, tree,
        "TIDEMARK_BLESS=1 writes it into docs/TELEMETRY.md"
    );
    services.stop();
}

fn resources_name_service_version_run_and_host(spans: &[Seen]) {
    let told = |key: &str| -> BTreeSet<_> {
        spans
            .iter()
            .map(|span| span.resource[key].clone())
            .collect()
    };
    assert_eq!(
        told("service.name"),
        ["capture-svc", "vault-svc"].map(str::to_owned).into()
    );
    assert_eq!(told("service.version").len(), 1);
    assert_eq!(told("service.instance.id").len(), 2);
    assert_eq!(told("host.name").len(), 1);
}

/// The lines of both logs that say this, in JSON.
fn lines(services: &Split, message: &str) -> Vec<Value> {
    let logged = services.logged();
    let lines = logged
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["message"] == message).collect()
}

#[test]
fn volumes_shipped_at_once_have_traces_of_their_own_each_in_that_of_its_command() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut services = services(dir.path(), &collector.flag());
    services.start_vault();
    services.start_capture();
    for name in ["data", "logs"] {
        add(&services, dir.path(), name);
        write(&services, name, 1, 8);
    }
    let of = |digit: &str| (digit.repeat(32), digit.repeat(16));
    let asked = [("data", of("a")), ("logs", of("b"))];
    let shipping = asked.clone().map(|(name, (trace, parent))| {
        let mut command = services.cli.command(args!["ship", name]);
        command.env("TRACEPARENT", format!("00-{trace}-{parent}-01"));
        command.spawn().unwrap()
    });
    for mut ship in shipping {
        assert!(ship.wait().unwrap().success());
    }
    for (name, (trace, parent)) in asked {
        let interval = collector.span("the interval's span", |seen| {
            seen.name == "interval" && seen.trace == trace
        });
        let spans = collector.trace(&interval);
        let call = collector.span("the call's span", |seen| seen.id == interval.parent);
        assert_eq!(call.name, "tidemark.capture.v1.Capture/TriggerInterval");
        assert_eq!((&*call.parent, call.says("peer")), (&*parent, "local"));
        let volumes: BTreeSet<_> = spans.iter().map(|span| span.says("volume")).collect();
        assert_eq!(volumes, ["", name].into());
        let both = ["committed", "generation committed"];
        for message in both {
            let line = lines(&services, message)
                .into_iter()
                .find(|line| line["trace_id"] == trace);
            let line = line.unwrap_or_else(|| panic!("{message}: {}", services.logged()));
            let span = line["span_id"].as_str().unwrap();
            assert!(spans.iter().any(|seen| seen.id == span), "{line}");
        }
    }
    // What is none is not taken; the call is the first span then.
    write(&services, "data", 2, 1);
    let hostile = "00-ffffffffffffffffffffffffffffffff-\u{1b}[31m-01";
    let mut command = services.cli.command(args!["ship", "data"]);
    assert!(
        command
            .env("TRACEPARENT", hostile)
            .status()
            .unwrap()
            .success()
    );
    let interval = collector.interval("data", 3);
    let call = collector.span("the call's span", |seen| seen.id == interval.parent);
    assert_eq!(call.parent, "");
    assert!(!services.logged().contains("[31m"));
    // Looking is not traced, but where a trace asks for it.
    services.cli.json(args!["status"]);
    services.stop();
    let looked = |seen: &Seen| seen.name.contains("/Get") || seen.name.contains("/List");
    assert!(!collector.seen().iter().any(looked));
}

#[test]
fn a_trace_goes_on_where_the_link_was_cut_and_says_what_failed() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut services = services(dir.path(), &collector.flag());
    services.start_vault();
    services.start_capture();
    add(&services, dir.path(), "data");
    services.kill_vault();
    write(&services, "data", 1, 8);
    let mut ship = services.cli.command(args!["ship", "data"]);
    let mut ship = ship.spawn().unwrap();
    wait_for("a failure", || {
        let failures = lines(&services, "ask the vault for the writer term");
        failures
            .into_iter()
            .find(|line| line["trace_id"].is_string())
    });
    services.start_vault();
    assert!(ship.wait().unwrap().success());
    let interval = collector.interval("data", 2);
    assert!(!interval.failed);
    let spans = collector.trace(&interval);
    let children = |name: &str, failed: bool| {
        let mut children = spans.iter();
        children
            .any(|span| span.name == name && span.failed == failed && span.parent == interval.id)
    };
    let tree = tree::render(&spans);
    for (name, failed) in [
        ("connect", true),
        ("wait", false),
        ("connect", false),
        ("ship", false),
    ] {
        assert!(children(name, failed), "{name} {failed}:\n{tree}");
    }
    let failed = spans
        .iter()
        .find(|span| span.name == "connect" && span.failed)
        .unwrap();
    assert_eq!(failed.says("error.type"), "UNREACHABLE");

    // One that is on its way when the service stops is another trace after that, under the interval's id.
    services.kill_vault();
    write(&services, "data", 2, 8);
    let mut ship = services.cli.command(args!["ship", "data"]);
    let mut ship = ship.spawn().unwrap();
    wait_for("the cut", || {
        (lines(&services, "cut").len() >= 3).then_some(())
    });
    services.stop_capture();
    assert!(!ship.wait().unwrap().success());
    let stopped = collector.span("the span that was ended", |seen| {
        seen.name == "interval" && seen.failed
    });
    assert_eq!(stopped.says("error.type"), "SHUTTING_DOWN");
    services.start_vault();
    services.start_capture();
    let resumed = collector.interval("data", 3);
    assert_eq!(resumed.says("resumed"), "true");
    assert_eq!(resumed.says("interval"), stopped.says("interval"));
    assert_ne!(resumed.trace, stopped.trace);
    services.stop();
}

#[test]
fn a_request_whose_first_cut_failed_is_in_its_trace_with_the_interval_that_answers_it() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut services = services(dir.path(), &collector.flag());
    services.start_vault();
    services.start_capture();
    add(&services, dir.path(), "data");
    let shown = services.cli.json(args!["volume", "show", "data"]);
    let volumes = services.capture_state.join("volumes");
    let record = volumes.join(shown["id"].as_str().unwrap()).join("uplink");
    // A folder can't be replaced by a file, so that the cut can't be recorded.
    let kept = fs::read(&record).unwrap();
    fs::remove_file(&record).unwrap();
    fs::create_dir(&record).unwrap();
    write(&services, "data", 1, 8);
    let trace = "c".repeat(32);
    let mut ship = services.cli.command(args!["ship", "data"]);
    ship.env("TRACEPARENT", format!("00-{trace}-{}-01", "c".repeat(16)));
    let mut ship = ship.spawn().unwrap();
    let failed = collector.span("the interval that came to nothing", |seen| {
        seen.name == "interval" && seen.failed
    });
    fs::remove_dir(&record).unwrap();
    fs::write(&record, kept).unwrap();
    assert!(ship.wait().unwrap().success());
    let interval = collector.interval("data", 2);
    assert_eq!((&failed.trace, &interval.trace), (&trace, &trace));
    assert_eq!(failed.parent, interval.parent);
    // The next one that nobody asks for is nobody's.
    write(&services, "data", 2, 8);
    services.cli.json(args!["ship", "data"]);
    assert_ne!(collector.interval("data", 3).trace, trace);
    services.stop();
}

#[test]
fn volumes_of_a_group_have_their_own_traces_linked_with_that_of_their_cut() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::start();
    let mut services = services(dir.path(), &collector.flag());
    services
        .capture_flags
        .push("--groups=both=data,logs".to_owned());
    services.start_vault();
    services.start_capture();
    for name in ["data", "logs"] {
        add(&services, dir.path(), name);
    }
    let group = collector.span("the group's span", |seen| {
        seen.name == "group" && seen.says("volumes") == "data,logs"
    });
    let cut = collector.span("the cut", |seen| {
        seen.trace == group.trace && seen.name == "cut"
    });
    assert_eq!(cut.parent, group.id);
    assert_eq!(group.links.len(), 2);
    let volumes = group.links.iter().map(|trace| {
        let interval = collector.span("the interval's span", |seen| {
            seen.trace == *trace && seen.name == "interval"
        });
        let finding = collector.span("the search", |seen| {
            seen.trace == *trace && seen.name == "find moment"
        });
        assert_eq!(finding.links, std::slice::from_ref(&group.trace));
        interval.says("volume").to_owned()
    });
    let volumes: BTreeSet<_> = volumes.collect();
    assert_eq!(volumes, ["data", "logs"].map(str::to_owned).into());
    services.stop();
}
