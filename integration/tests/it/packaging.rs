//! What others run Tidemark with: charts for Kubernetes, units for systemd.

use std::{fs, os::unix::net::UnixDatagram, process::Command};

use tidemark_identity::Identities;

use crate::{
    compose::have_python_tool,
    docs::root,
    programs::{Process, free_addr, have, program, wait_for},
};

#[test]
fn charts_render_as_agreed_fit_every_kubernetes_and_refuse_what_can_not_be_meant() {
    let python = root().join("integration/.venv/bin/python");
    if !have_python_tool(&python.with_file_name("kubernetes-validate")) {
        return;
    }
    let output = Command::new(python)
        .arg(root().join("integration/charts/check.py"))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}{errors}");
}

fn render(name: &str) -> String {
    let path = format!("integration/charts/golden/{name}.yaml");
    fs::read_to_string(root().join(path)).unwrap()
}

/// A file of a ConfigMap.
fn file_of(render: &str, name: &str) -> String {
    let (_, after) = render.split_once(&format!("  {name}: |\n")).unwrap();
    let lines = after.lines().map_while(|line| line.strip_prefix("    "));
    lines.map(|line| format!("{line}\n")).collect()
}

/// The variables of the sidecar whose names begin so.
fn variables_of<'a>(render: &'a str, prefix: &str) -> Vec<(&'a str, &'a str)> {
    let name_of = |line: &'a str| line.trim().strip_prefix("- name: ");
    let value_of = |line: &'a str| Some(line.trim().strip_prefix("value: ")?.trim_matches('"'));
    let lines: Vec<_> = render.lines().collect();
    let pairs = lines.windows(2);
    pairs
        .filter_map(|pair| Some((name_of(pair[0])?, value_of(pair[1])?)))
        .filter(|(name, _)| name.starts_with(prefix))
        .collect()
}

#[test]
fn what_the_charts_render_is_what_the_services_understand() {
    let dir = tempfile::tempdir().unwrap();
    for (name, has_identities) in [
        ("tidemark-secret", true),
        ("tidemark-cert-manager", true),
        ("tidemark-everything", false),
        ("tidemark-least", false),
    ] {
        let render = render(name);
        let config = dir.path().join("vault.toml");
        fs::write(&config, file_of(&render, "vault.toml")).unwrap();
        let mut vault = program("vault-svc");
        vault.arg("--config").arg(&config).arg("--print-config");
        vault.env("VAULT_LISTEN", "0.0.0.0:7402");
        let output = vault.output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
        if has_identities {
            Identities::parse(&file_of(&render, "identities.toml")).unwrap();
        }
    }
    let known = file_of(&render("tidemark-secret"), "identities.toml");
    let known = Identities::parse(&known).unwrap();
    assert!(known.named("edge-7").is_some() && known.named("dashboard").is_some());
    for name in ["nbd", "file", "fuse", "scan"] {
        let render = render(&format!("example-app-{name}"));
        let mut capture = program("capture-svc");
        let variables = variables_of(&render, "CAPTURE_");
        assert!(variables.len() > 6, "{name}: {variables:?}");
        capture.envs(variables).arg("--print-config");
        let output = capture.output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
    }
}

/// The units in a folder, with programs that are there.
fn units() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = root().join("packaging/systemd");
    for service in ["vault", "capture"] {
        let name = format!("tidemark-{service}.service");
        let unit = fs::read_to_string(from.join(&name)).unwrap();
        let installed = format!("ExecStart=/usr/bin/{service}-svc\n");
        assert!(unit.contains(&installed), "{name}");
        let unit = unit.replace(&installed, "ExecStart=/bin/true\n");
        fs::write(dir.path().join(name), unit).unwrap();
    }
    dir
}

/// What systemd itself says of the units, among them nothing that it doubts.
fn analyze(dir: &tempfile::TempDir, args: &[&str]) -> String {
    let output = Command::new("systemd-analyze")
        .args(args)
        .current_dir(dir.path())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {told}{errors}");
    assert_eq!(errors, "", "{args:?}");
    told
}

#[test]
fn the_units_are_what_systemd_understands_and_leave_the_services_little() {
    if !have(&["systemd-analyze"]) {
        return;
    }
    let dir = units();
    let verify = |service: &str| {
        let unit = format!("./tidemark-{service}.service");
        analyze(&dir, &["verify", "--man=no", &unit]);
        unit
    };
    for service in ["vault", "capture"] {
        let unit = verify(service);
        // Of 100; a unit without any sandbox has 96.
        analyze(
            &dir,
            &["security", "--offline=yes", "--threshold=20", &unit],
        );
    }
    let drop_in = |service: &str, name: &str| {
        let at = dir.path().join(format!("tidemark-{service}.service.d"));
        fs::create_dir_all(&at).unwrap();
        let from = root().join("packaging/systemd").join(name);
        fs::copy(from, at.join(name)).unwrap();
    };
    for service in ["vault", "capture"] {
        drop_in(service, &format!("{service}-tls.conf"));
        verify(service);
    }
    drop_in("capture", "fuse.conf");
    verify("capture");
}

#[test]
fn with_the_drop_ins_for_certificates_the_services_are_set_up_as_their_manual_says() {
    for (service, vault, settings) in [
        (
            "vault",
            "",
            [
                r#"listen = "0.0.0.0:7402""#,
                r#"tls_cert = "/etc/tidemark/vault.crt""#,
                r#"tls_key = "/run/credentials/vault.key""#,
                r#"identities = "/etc/tidemark/identities.toml""#,
            ],
        ),
        (
            "capture",
            "https://vault.example.com:7402",
            [
                r#"vault = "https://vault.example.com:7402""#,
                r#"vault_ca = "/etc/tidemark/ca.crt""#,
                r#"vault_cert = "/etc/tidemark/source.crt""#,
                r#"vault_key = "/run/credentials/source.key""#,
            ],
        ),
    ] {
        let drop_in = root().join(format!("packaging/systemd/{service}-tls.conf"));
        let text = fs::read_to_string(drop_in).unwrap();
        let mut command = program(&format!("{service}-svc"));
        let variables = text.lines().filter_map(|l| l.strip_prefix("Environment="));
        for (key, value) in variables.map(|variable| variable.split_once('=').unwrap()) {
            command.env(key, value.replace("%d", "/run/credentials"));
        }
        if !vault.is_empty() {
            command.env("CAPTURE_VAULT", vault);
        }
        let output = command.arg("--print-config").output().unwrap();
        assert!(output.status.success(), "{service}: {output:?}");
        let told = String::from_utf8_lossy(&output.stdout);
        for setting in settings {
            assert!(told.contains(setting), "{service}: {setting}: {told}");
        }
    }
}

#[test]
fn a_service_tells_its_supervisor_that_it_is_up_when_it_serves_and_that_it_stops() {
    for service in ["vault-svc", "capture-svc"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify.sock");
        let supervisor = UnixDatagram::bind(&path).unwrap();
        supervisor.set_nonblocking(true).unwrap();
        let told = || {
            wait_for("the word to the supervisor", || {
                let mut bytes = [0; 256];
                let length = supervisor.recv(&mut bytes).ok()?;
                Some(String::from_utf8_lossy(&bytes[..length]).trim().to_owned())
            })
        };
        let listen = free_addr().to_string();
        let mut command = program(service);
        command.env("NOTIFY_SOCKET", &path);
        command.args(["--listen", &listen]);
        match service {
            "vault-svc" => {
                command.arg("--store-dir").arg(dir.path().join("store"));
                command.arg("--state-dir").arg(dir.path().join("state"));
            }
            _ => {
                command.arg("--state").arg(dir.path().join("state"));
            }
        }
        let health = || {
            let health = program(service)
                .args(["--listen", &listen, "health"])
                .output()
                .unwrap();
            (health.status.code(), health)
        };
        assert_eq!(health().0, Some(1), "{service} is not there yet");
        let process = Process::spawn(&mut command, service);
        assert_eq!(told(), "READY=1", "{service}");
        let (code, output) = health();
        assert_eq!(code, Some(0), "{service}: {output:?}");
        process.terminate();
        assert_eq!(told(), "STOPPING=1", "{service}");
    }
}
