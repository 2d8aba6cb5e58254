//! Logs that nobody can take: a full disk, or a pipe that nobody reads. The work goes on.

use std::{
    fs::File,
    io::Read,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use rustix::fs::OFlags;

use crate::{
    nbd::Client,
    programs::{Split, args},
};

const END_MAX: Duration = Duration::from_secs(30);
/// More than a pipe holds, and more than may wait.
const INTERVALS: u8 = 12;

/// Runs both services with their errors going there, ships, and stops.
fn works_with_errors_to(dir: &Path, to: &Path) {
    let mut services = Split::new(dir);
    let redirected = format!("exec \"$0\" \"$@\" 2>>{}", to.display());
    let shell = ["sh", "-c", &redirected].map(str::to_owned).to_vec();
    services.capture_wrapper.clone_from(&shell);
    services.vault_wrapper = shell;
    // All that anybody says.
    services.capture_flags = vec!["--log-filter=trace".to_owned()];
    services.vault_flags = vec!["--log=trace".to_owned()];
    services.start_vault();
    services.start_capture();
    let (file, size) = (dir.join("data.img"), (8 << 20).to_string());
    services.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", size
    ]);
    services.cli.json(args!["ship", "data"]);
    let mut client = Client::connect(&services.socket, "data").unwrap();
    for fill in 1..=INTERVALS {
        client.write(0, &vec![fill; 1 << 20]).unwrap();
        services.cli.json(args!["ship", "data"]);
    }
    services.assert_both_run();
    let began = Instant::now();
    services.stop();
    assert!(began.elapsed() < END_MAX, "{:?}", began.elapsed());
}

#[test]
fn a_full_disk_of_logs_holds_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    works_with_errors_to(dir.path(), Path::new("/dev/full"));
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    // Opened by its reader, who doesn't read.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let reader = rustix::fs::open(&pipe, flags, rustix::fs::Mode::empty()).unwrap();
    works_with_errors_to(dir.path(), &pipe);
    let mut told = Vec::new();
    let _ = File::from(reader).read_to_end(&mut told);
    assert!(told.len() >= 1 << 14, "{} bytes", told.len());
}

#[test]
fn a_program_that_cannot_say_why_it_fails_fails_all_the_same() {
    for name in ["capture-svc", "vault-svc"] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut command = crate::programs::program(name);
        let status = command
            .arg("--listen=nowhere")
            .stderr(full)
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(1), "{name}");
    }
}
