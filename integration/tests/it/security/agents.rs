//! Agents, where the control interface of the capture service has a certificate.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use tidemark_identity::Role;
use tidemark_integration::programs::{Process, args, have, run, wait_for};

use super::{
    refusals::add,
    site::{Site, dial, url_of},
};
use crate::{coherence::agent_program, databases::make_agent};

/// What an agent has printed, on either stream.
struct Told(PathBuf);

impl Told {
    fn start(site: &Site, name: &str, mut command: Command) -> (Process, Self) {
        let path = site.path(&format!("{name}.out"));
        let file = File::create(&path).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        (Process::spawn(&mut command, name), Self(path))
    }

    fn wait_for(&self, what: &str) {
        wait_for(what, || {
            let told = fs::read_to_string(&self.0).unwrap();
            told.contains(what).then_some(())
        });
    }
}

fn agent_exec(url: &str, shown: &[(&str, &Path)]) -> Command {
    let mut command = Command::new(agent_program());
    command.args(["--capture", url, "--volume", "data"]);
    command.args(["--freeze", "true", "--thaw", "true"]);
    for (flag, path) in shown {
        command.arg(flag).arg(path);
    }
    command
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_attach_with_a_certificate_or_a_token_and_say_why_they_are_refused() {
    let site = Site::new();
    site.knows_tokens_of(&[
        ("me", &[Role::Operator], &["*"]),
        ("edge-7", &[Role::Source], &["*"]),
        ("viewer", &[Role::Viewer], &["*"]),
    ]);
    site.certificate("edge-7", &[]);
    site.certificate("viewer", &[]);
    let token = site.dialer_with_token("edge-7").files.token.unwrap();
    let vault = site.vault().await;
    let config = site.capture_config(&url_of(&vault), "edge-7");
    let capture = capture_svc::start(config).await.unwrap();
    let url = format!("https://{}", capture.control_addr());
    let me = dial(&site.dialer_with_token("me"), &url).await.unwrap();
    add(&site, &me).await;

    let (ca, path) = (site.ca(), |name: &str| site.path(name));
    let of = |name: &str| (path(&format!("{name}.crt")), path(&format!("{name}.key")));
    for (name, says) in [
        ("edge-7", "attached"),
        ("viewer", "may not call Coherence/Attach"),
    ] {
        let (cert, key) = of(name);
        let shown = [
            ("--tls-ca", &*ca),
            ("--tls-cert", &*cert),
            ("--tls-key", &*key),
        ];
        let (_agent, told) = Told::start(&site, name, agent_exec(&url, &shown));
        told.wait_for(says);
    }
    let shown = [("--tls-ca", &*ca), ("--token-file", &*token)];
    let (_agent, told) = Told::start(&site, "token", agent_exec(&url, &shown));
    told.wait_for("attached");

    if !have(&["sqlite3"]) {
        return;
    }
    let Some(agent) = make_agent(&path("")) else {
        return;
    };
    let database = path("app.db");
    run("sqlite3", args![database, "create table t (n integer)"]);
    let python = |url: &str, shown: &[(&str, &Path)]| {
        let mut command = Command::new(agent.join("bin/python"));
        command.arg(agent.join("sqlite_agent.py"));
        command.args(["--capture", url, "--volume", "data", "--hint"]);
        command.arg("--database").arg(&database);
        for (flag, path) in shown {
            command.arg(flag).arg(path);
        }
        command
    };
    let (cert, key) = of("edge-7");
    let shown = [
        ("--tls-ca", &*ca),
        ("--tls-cert", &*cert),
        ("--tls-key", &*key),
    ];
    let (by_certificate, told) = Told::start(&site, "python", python(&url, &shown));
    told.wait_for("hinted ");
    drop(by_certificate);
    let shown = [("--tls-ca", &*ca), ("--token-file", &*token)];
    let (_by_token, told) = Told::start(&site, "python-token", python(&url, &shown));
    told.wait_for("attached");
    let (_nobody, told) = Told::start(&site, "nobody", python(&url, &shown[..1]));
    told.wait_for("shows neither a certificate nor a token");
    for (url, why) in [
        (url.as_str(), "needs the CAs"),
        ("http://192.0.2.1:7401", "plain text"),
        ("ftp://localhost", "is no address"),
    ] {
        let output = python(url, &[]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(why), "{said}");
    }
    capture.shutdown().await.unwrap();
    vault.shutdown().await.unwrap();
}
