//! `docs/SECURITY.md` sets it up word by word: so does this.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use tidemark_integration::programs::{self, Process, bin_dir, program};

use crate::docs::{root, shell_blocks};

/// A shell in `dir` that finds our programs, and nothing of this machine's environment that they heed.
fn shell(dir: &Path, text: &str) -> Command {
    let mut command = Command::new("bash");
    for (key, value) in program("tidemark").get_envs() {
        if value.is_none() {
            command.env_remove(key);
        }
    }
    let path = format!("{}:{}", bin_dir().display(), std::env::var("PATH").unwrap());
    command
        .args(["-euo", "pipefail", "-c", text])
        .env("PATH", path)
        .current_dir(dir);
    command
}

fn done(mut command: Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let told = String::from_utf8_lossy(&stdout).into_owned();
    assert!(
        status.success(),
        "{told}\n{}",
        String::from_utf8_lossy(&stderr)
    );
    told
}

#[test]
fn the_manual_sets_up_a_vault_a_source_and_a_person_word_by_word() {
    let page = fs::read_to_string(root().join("docs/SECURITY.md")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (at, pki) = (dir.path(), dir.path().join("pki"));
    let (vault, control) = (programs::free_addr(), programs::free_addr());
    let here = page
        .replace("vault.example.com", "localhost")
        .replace("7402", &vault.port().to_string())
        .replace("/etc/tidemark", &pki.display().to_string());
    let blocks = shell_blocks(&here);
    let [make, serve, ship, ask] = blocks[..] else {
        panic!("{} blocks of commands", blocks.len());
    };
    done(shell(at, make));
    for secret in ["ca.key", "vault.key", "edge-7.key", "me.key"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(pki.join(secret)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
    let serve = format!(
        "exec {} --store-dir {}/store --state-dir {}/vault",
        serve.trim(),
        at.display(),
        at.display()
    );
    let _vault = Process::spawn(&mut shell(at, &serve), "vault-svc");
    let ship = format!(
        "exec {} --listen {control} --state {}/state --nbd unix:{}/nbd.sock",
        ship.trim(),
        at.display(),
        at.display()
    );
    let _capture = Process::spawn(&mut shell(at, &ship), "capture-svc");
    programs::wait_for("both services", || {
        std::net::TcpStream::connect(vault).ok()?;
        std::net::TcpStream::connect(control).ok()
    });
    let url = format!("http://{control}");
    let add = format!(
        "tidemark --capture {url} volume add data --file {}/data.img --size 1MiB",
        at.display()
    );
    done(shell(at, &add));
    done(shell(at, &format!("tidemark --capture {url} ship data")));
    let listed = done(shell(&pki, ask));
    assert!(listed.contains('1'), "{listed}");
    // Whoever is nobody sees nothing.
    let stranger = format!(
        "tidemark --json --vault https://localhost:{} --tls-ca ca.crt status",
        vault.port()
    );
    let output = shell(&pki, &format!("{stranger} --capture {url}"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
}
