//! Metrics, alerts, dashboard and runbook: each names only what the others have, and other people's tools take them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
};

use clap::Parser;
use serde_json::Value;
use tidemark_cli::args::Cli;
use tidemark_integration::scrape::scrape;
use tidemark_telemetry::metrics::{Family, Kind, Unit};

use crate::{
    compose::have_python_tool,
    docs::root,
    programs::{Split, args, free_addr},
};

const ALERTS: &str = "charts/tidemark/alerts/tidemark.yaml";
const ALERT_TESTS: &str = "integration/alerts/tests.yaml";
const DASHBOARD: &str = "charts/tidemark/dashboards/tidemark.json";
/// What Prometheus itself adds.
const OF_PROMETHEUS: [&str; 1] = ["up"];

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

fn families() -> BTreeMap<&'static str, &'static Family> {
    let lists = [capture_svc::metrics::FAMILIES, vault_svc::metrics::FAMILIES].concat();
    let all = lists.into_iter().flatten();
    all.map(|family| (family.name, *family)).collect()
}

/// `promtool`, where it is: on the path, or where `integration/setup.sh` has put it.
fn promtool() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain([root().join("integration/.tools")]);
    let found = dirs.map(|dir| dir.join("promtool")).find(|at| at.is_file());
    if found.is_none() {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "promtool not found: integration/setup.sh fetches it"
        );
        println!("skipped: promtool not found; integration/setup.sh fetches it");
    }
    found
}

fn check(mut command: Command, input: &str) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {told}{errors}");
}

#[test]
fn what_the_programs_expose_is_what_a_monitor_takes() {
    let dir = tempfile::tempdir().unwrap();
    let mut services = Split::new(dir.path());
    let (capture, vault) = (free_addr(), free_addr());
    let listen = |addr: SocketAddr| vec![format!("--metrics-listen={addr}")];
    (services.capture_flags, services.vault_flags) = (listen(capture), listen(vault));
    services.start_vault();
    services.start_capture();
    let file = dir.path().join("data.img");
    fs::write(&file, vec![7; 1 << 20]).unwrap();
    services
        .cli
        .json(args!["volume", "add", "data", "--file", file]);
    services.cli.json(args!["ship", "data"]);
    for (addr, service) in [(capture, "capture-svc"), (vault, "vault-svc")] {
        let scrape = scrape(addr);
        let labels = [("service", service), ("version", env!("CARGO_PKG_VERSION"))];
        assert_eq!(scrape.value("tidemark_build_info", &labels), 1.0);
        if let Some(promtool) = promtool() {
            let mut command = Command::new(promtool);
            command.args(["check", "metrics"]);
            check(command, &scrape.text);
        }
    }
    services.stop();
}

#[test]
fn names_of_metrics_say_what_they_are() {
    for (name, family) in families() {
        assert_eq!(
            name.ends_with("_total"),
            family.kind == Kind::Counter,
            "{name}"
        );
        let base = name.trim_end_matches("_total");
        let unit = match family.unit {
            Unit::None => "",
            Unit::Seconds => "_seconds",
            Unit::Bytes => "_bytes",
        };
        assert!(base.ends_with(unit), "{name}");
        if family.unit == Unit::None {
            assert!(
                !base.ends_with("_seconds") && !base.ends_with("_bytes"),
                "{name}"
            );
        }
        assert!(family.help.trim().ends_with('.'), "{name}");
    }
}

#[test]
fn the_manual_lists_every_metric_with_its_kind_and_labels_and_no_other() {
    let manual = read("docs/TELEMETRY.md");
    let mut told = BTreeSet::new();
    for line in manual.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let name = cells[0].trim_matches('`');
        if name.contains(|c: char| !(c.is_ascii_lowercase() || c == '_')) || cells.len() != 4 {
            continue;
        }
        let family = families().get(name).copied();
        let family = family.unwrap_or_else(|| panic!("{name} is no metric"));
        assert!(told.insert(name.to_owned()), "{name} is listed twice");
        let labels = cells[2].split(", ").map(|label| label.trim_matches('`'));
        let labels: Vec<_> = labels.filter(|label| !label.is_empty()).collect();
        assert_eq!(labels, family.labels, "{name}");
        assert_eq!(
            cells[1],
            format!("{:?}", family.kind).to_lowercase(),
            "{name}"
        );
        assert_eq!(cells[3], family.help.trim(), "{name}");
    }
    let all: BTreeSet<_> = families().into_keys().map(str::to_owned).collect();
    assert_eq!(told, all);
}

/// The names of metrics in an expression, and the labels that it picks or sums by.
fn named_in(expression: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut names = BTreeSet::new();
    let mut labels = BTreeSet::new();
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for (at, _) in expression.match_indices(is_word) {
        if expression[..at].ends_with(is_word) {
            continue;
        }
        let word: String = expression[at..]
            .chars()
            .take_while(|c| is_word(*c))
            .collect();
        let rest = expression[at + word.len()..].trim_start();
        if word.starts_with("tidemark_") || word.starts_with("process_") || word == "up" {
            names.insert(word);
        } else if rest.starts_with("=~") || rest.starts_with("=\"") || rest.starts_with("!=\"") {
            labels.insert(word);
        }
    }
    for by in ["by (", "without (", "on ("] {
        for part in expression.split(by).skip(1) {
            let inside = part.split(')').next().unwrap();
            labels.extend(inside.split(',').map(|label| label.trim().to_owned()));
        }
    }
    (names, labels)
}

/// Each metric is one that there is, and each label one of theirs or of those that a monitor adds.
fn assert_known(expression: &str) {
    let families = families();
    let (names, labels) = named_in(expression);
    assert!(!names.is_empty(), "{expression}");
    let mut known: BTreeSet<_> = ["job", "instance", "le"].into();
    for name in names {
        if OF_PROMETHEUS.contains(&name.as_str()) {
            continue;
        }
        let family = families.get(name.as_str()).copied().or_else(|| {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|s| name.strip_suffix(s));
            let family = families.get(base?).copied()?;
            (family.kind == Kind::Histogram).then_some(family)
        });
        let family = family.unwrap_or_else(|| panic!("{name} in {expression}"));
        known.extend(family.labels);
    }
    for label in labels {
        assert!(known.contains(label.as_str()), "{label} in {expression}");
    }
}

/// Name, expression and link of each alert.
fn alerts() -> Vec<(String, String, String)> {
    let text = read(ALERTS);
    let rules = text.split("      - alert: ").skip(1);
    let rules = rules.map(|rule| {
        let name = rule.lines().next().unwrap().trim().to_owned();
        let (_, after) = rule.split_once("        expr: ").unwrap();
        let mut lines = after.lines();
        let first = lines.next().unwrap();
        let rest = lines.take_while(|line| line.starts_with("          "));
        let rest: Vec<_> = rest.map(str::trim).collect();
        let expression = format!("{} {}", first.trim_start_matches("|-"), rest.join(" "));
        let (_, link) = rule.split_once("runbook_url: ").unwrap();
        (name, expression, link.lines().next().unwrap().to_owned())
    });
    rules.collect()
}

#[test]
fn alerts_go_by_metrics_that_there_are() {
    assert!(alerts().len() > 12);
    for (name, expression, _) in alerts() {
        assert!(expression.len() > 10, "{name}: {expression}");
        assert_known(&expression);
    }
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert_eq!(panels[0]["title"], "Recovery point", "first");
    let mut expressions = 0;
    for panel in panels {
        for target in panel["targets"].as_array().into_iter().flatten() {
            assert_known(target["expr"].as_str().unwrap());
            assert_eq!(target["datasource"]["uid"], "${datasource}");
            expressions += 1;
        }
    }
    assert!(expressions > 40);
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables
        .iter()
        .map(|v| v["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["datasource", "source", "volume"]);
    for variable in &variables[1..] {
        assert_known(variable["definition"].as_str().unwrap());
    }
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len());
}

#[test]
fn each_alert_has_a_section_in_the_runbook_and_each_section_an_alert() {
    let runbook = read("docs/OPERATIONS.md");
    let sections: BTreeSet<_> = runbook.split("\n## ").skip(1).collect();
    let titled: BTreeMap<_, _> = sections
        .iter()
        .map(|section| section.split_once('\n').unwrap())
        .collect();
    let names: BTreeSet<_> = alerts()
        .into_iter()
        .map(|(name, _, link)| {
            assert_eq!(link, format!("docs/OPERATIONS.md#{}", name.to_lowercase()));
            name
        })
        .collect();
    let sections: BTreeSet<_> = titled.keys().map(|&title| title.to_owned()).collect();
    assert_eq!(names, sections);
    for (title, text) in titled {
        for part in ["**At risk.**", "**Look.**", "**Do.**"] {
            assert!(text.contains(part), "{title}: {part}");
        }
        assert!(
            text.contains("**Over** when ") || text.contains("**Over** after "),
            "{title}: when it is over"
        );
    }
    for link in runbook.split("](#").skip(1) {
        let anchor = link.split(')').next().unwrap();
        assert!(
            names.iter().any(|name| name.to_lowercase() == anchor),
            "{anchor}"
        );
    }
}

#[test]
fn the_runbooks_commands_are_commands() {
    let runbook = read("docs/OPERATIONS.md");
    let commands = runbook
        .lines()
        .filter_map(|line| line.strip_prefix("$ tidemark "));
    let mut count = 0;
    for command in commands {
        let words = command.split(' ').map(|word| match word {
            "VOLUME" | "NAME" => "data",
            "NUMBER" => "1",
            "FILE" => "/volumes/data.img",
            word => word,
        });
        let parsed = Cli::try_parse_from(std::iter::once("tidemark").chain(words));
        assert!(parsed.is_ok(), "{command}: {}", parsed.unwrap_err());
        count += 1;
    }
    assert!(count > 20);
}

#[test]
fn every_alert_is_shown_to_fire_by_promtool() {
    let tests = read(ALERT_TESTS);
    for (name, ..) in alerts() {
        let named = format!("alertname: {name}\n");
        let fires = tests.split(&named).skip(1);
        let fires = fires.map(|rest| rest.trim_start().lines().next().unwrap().trim().to_owned());
        assert!(
            fires.clone().any(|next| next == "exp_alerts:"),
            "{name} has no test"
        );
    }
    let Some(promtool) = promtool() else { return };
    let mut command = Command::new(promtool);
    command
        .args(["test", "rules"])
        .arg(root().join(ALERT_TESTS));
    check(command, "");
}

#[test]
fn the_profile_observability_is_put_together_from_what_is_there() {
    let compose = root().join("integration/.venv/bin/docker-compose");
    if !have_python_tool(&compose) {
        return;
    }
    let output = Command::new(&compose)
        .arg("--file")
        .arg(root().join("docker/compose.yaml"))
        .args(["--profile", "observability", "config", "--format", "json"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let composed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let services = &composed["services"];
    for name in ["collector", "prometheus", "grafana"] {
        let service = &services[name];
        assert_eq!(service["profiles"][0], "observability", "{name}");
        let (_, tag) = service["image"].as_str().unwrap().rsplit_once(':').unwrap();
        assert!(tag.contains(|c: char| c.is_ascii_digit()), "{name}: {tag}");
        for mount in service["volumes"].as_array().unwrap() {
            if mount["type"] == "bind" {
                let source = mount["source"].as_str().unwrap();
                assert!(fs::metadata(source).is_ok(), "{name}: {source}");
            }
        }
        for port in service["ports"].as_array().into_iter().flatten() {
            assert_eq!(port["host_ip"], "127.0.0.1", "{name}");
        }
    }
    let scraped = read("docker/observability/prometheus.yaml");
    for (service, key) in [("vault", "VAULT"), ("capture", "CAPTURE")] {
        let listen = &services[service]["environment"][format!("{key}_METRICS_LISTEN")];
        let (_, port) = listen.as_str().unwrap().rsplit_once(':').unwrap();
        assert!(
            scraped.contains(&format!("\"{service}:{port}\"")),
            "{service}"
        );
        assert!(scraped.contains(&format!("job_name: tidemark-{service}\n")));
    }
    if let Some(promtool) = promtool() {
        // As the container has it: the rules where they are mounted.
        let rules = root().join("charts/tidemark/alerts");
        let here = scraped.replace("/etc/prometheus/alerts", rules.to_str().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prometheus.yaml");
        fs::write(&path, here).unwrap();
        let mut command = Command::new(promtool);
        command.args(["check", "config"]).arg(path);
        check(command, "");
    }
}

/// Every pipeline of the collector is made of parts that are configured.
#[test]
fn the_collectors_pipelines_are_made_of_parts_that_it_has() {
    let python = root().join("integration/.venv/bin/python");
    if !have_python_tool(&python) {
        return;
    }
    let output = Command::new(python)
        .args([
            "-c",
            "import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1])), sys.stdout)",
        ])
        .arg(root().join("docker/observability/collector.yaml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let config: Value = serde_json::from_slice(&output.stdout).unwrap();
    let pipelines = config["service"]["pipelines"].as_object().unwrap();
    assert!(pipelines.contains_key("traces") && pipelines.contains_key("metrics"));
    for (name, pipeline) in pipelines {
        for kind in ["receivers", "processors", "exporters"] {
            let parts = pipeline[kind].as_array().unwrap();
            assert!(!parts.is_empty(), "{name}: {kind}");
            for part in parts {
                assert!(
                    config[kind].get(part.as_str().unwrap()).is_some(),
                    "{name}: {part}"
                );
            }
        }
    }
    let endpoint = &config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"];
    assert_eq!(endpoint, "0.0.0.0:4317");
}
