//! The agent in Python: its modules made as its guide says, and what it does when the service goes away.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use crate::{
    coherence::agent_program,
    docs::{root, shell_blocks},
    nbd::Client,
    programs::{Process, Split, args, have, run, wait_for},
};

/// Has `agent` in a home directory as the guide makes it. The modules that its first block would install are those that
/// `integration/setup.sh` has installed; without them a test is skipped, and fails in CI.
pub(crate) fn make_agent(home: &Path) -> Option<PathBuf> {
    let Ok(modules) = fs::canonicalize(root().join("integration/.venv/bin")) else {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "the Python modules are missing: integration/setup.sh installs them"
        );
        println!("skipped: the Python modules are missing; integration/setup.sh installs them");
        return None;
    };
    let agent = home.join("agent");
    let python = agent.join("bin/python");
    fs::create_dir_all(agent.join("bin")).unwrap();
    let modules = modules.join("python");
    fs::write(
        &python,
        format!("#!/bin/sh\nexec {} \"$@\"\n", modules.display()),
    )
    .unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();

    let guide = fs::read_to_string(root().join("crates/agent/examples/python/README.md")).unwrap();
    let [_install, make] = shell_blocks(&guide)[..] else {
        panic!("the guide has two blocks");
    };
    let made = Command::new("bash")
        .args(["-euc", make])
        .env("HOME", home)
        .current_dir(root())
        .status();
    assert!(made.unwrap().success());
    Some(agent)
}

/// Whether somebody holds the lock of all writers.
fn is_locked(database: &Path) -> bool {
    let try_it = Command::new("sqlite3")
        .arg(database)
        .arg("begin immediate; rollback;")
        .output()
        .unwrap();
    !try_it.status.success()
}

#[test]
fn the_agent_in_python_lets_go_when_the_service_is_killed_and_attaches_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    if !have(&["sqlite3"]) {
        return;
    }
    let Some(agent) = make_agent(dir.path()) else {
        return;
    };
    let mut services = Split::new(dir.path());
    services.capture_flags = vec!["--interval-max=1h".into(), "--quiesce-timeout=1h".into()];
    services.start_vault();
    services.start_capture();
    let file = path("data.img");
    services.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", "1MiB"
    ]);
    services.cli.json(args!["ship", "data"]);
    let database = path("app.db");
    run("sqlite3", args![database, "create table t (n integer)"]);

    let mut python = Command::new(agent.join("bin/python"));
    python
        .arg(agent.join("sqlite_agent.py"))
        .args(["--capture", &services.cli.capture, "--volume", "data"])
        .arg("--database")
        .arg(&database)
        .stdout(File::create(path("python.out")).unwrap());
    let _python = Process::spawn(&mut python, "sqlite_agent.py");
    let attached = |times: usize| {
        wait_for("the agent", || {
            let told = fs::read_to_string(path("python.out")).unwrap();
            (told.matches("attached\n").count() == times).then_some(())
        });
    };
    attached(1);
    // It is asked after the first one holds still, and never does.
    let mut other = Command::new(agent_program());
    other
        .args(["--capture", &services.cli.capture, "--volume", "data"])
        .arg("--freeze")
        .arg(format!(
            "touch {}; sleep 1000",
            path("other.freezing").display()
        ))
        .arg("--thaw")
        .arg(format!("touch {}", path("other.thawed").display()))
        .stdout(File::create(path("other.out")).unwrap());
    let other = Process::spawn(&mut other, "agent_exec");
    wait_for("the other agent", || {
        let told = fs::read_to_string(path("other.out")).unwrap();
        told.contains("attached").then_some(())
    });
    let write = |services: &Split, content| {
        let mut client = Client::connect(&services.socket, "data").unwrap();
        client.write(0, &[content; 4096]).unwrap();
    };
    write(&services, 1);
    let cli = services.cli.clone();
    let shipped = thread::spawn(move || cli.output(args!["ship", "data"]));
    wait_for("the freezes", || {
        path("other.freezing").exists().then_some(())
    });
    assert!(is_locked(&database));
    services.kill_capture();
    assert!(!shipped.join().unwrap().status.success());
    wait_for("the thaw", || (!is_locked(&database)).then_some(()));

    wait_for("the other's thaw", || {
        path("other.thawed").exists().then_some(())
    });
    other.kill();
    services.start_capture();
    attached(2);
    write(&services, 2);
    let receipt = services.cli.json(args!["ship", "data"]);
    assert_eq!(receipt["coherence"], "quiesced", "{receipt}");
    wait_for("the thaw", || (!is_locked(&database)).then_some(()));
    services.stop();
}
