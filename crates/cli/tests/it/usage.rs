//! What a user gets to see who asks for what cannot be.

use crate::{
    fake::{Fake, Script, image},
    stderr, stdout, tidemark,
};

fn fails(args: &[&str], code: i32) -> String {
    let output = tidemark().args(args).output().unwrap();
    assert_eq!(
        output.status.code(),
        Some(code),
        "{args:?}: {}",
        stderr(&output)
    );
    assert_eq!(stdout(&output), "", "{args:?}");
    stderr(&output)
}

#[test]
fn flags_and_values_that_cannot_be_are_named() {
    for (args, text) in [
        (&["volume", "add", "data"][..], "--file <PATH>"),
        (
            &["volume", "add", "data", "--file", "f", "--size", "8GB"],
            "KiB, MiB, GiB",
        ),
        (
            &["volume", "add", "data", "--file", "f", "--size", "0"],
            "at least one block",
        ),
        (
            &["volume", "list", "--colour"],
            "unexpected argument '--colour'",
        ),
        (&["volumes"], "unrecognized subcommand 'volumes'"),
        (&["restore", "data@x", "o"], "\"x\" is no generation"),
        (&["restore", "data@0", "o"], "numbered from 1"),
        (
            &["snapshot", "read", "data", "0", "-o", "f"],
            "0 is not in 1..",
        ),
        (
            &[
                "snapshot", "read", "data", "2", "-o", "f", "--since", "1", "--force",
            ],
            "cannot be used with",
        ),
        (&["status", "--vault", "nowhere"], "use a URL such as"),
        (&["up", "--interval-max", "15"], "such as 15m"),
        (&["up", "--retain", "0"], "0 is not in 1.."),
    ] {
        let told = fails(args, 2);
        assert!(told.contains(text), "{args:?}: {told}");
    }
}

#[test]
fn a_service_that_does_not_run_is_named_with_how_to_start_it() {
    // Nothing listens on the port of a listener that is gone.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let url = format!("http://127.0.0.1:{port}");
    let told = fails(&["volume", "list", "--capture", &url], 5).replace(&port.to_string(), "PORT");
    insta::assert_snapshot!(told, @r"
    error: the capture service cannot be reached at http://127.0.0.1:PORT: Connection refused (os error 111)
      → start it (`tidemark up` runs both), or say where it is with --capture or TIDEMARK_CAPTURE
    ");
    let told =
        fails(&["restore", "data", "o", "--vault", &url], 5).replace(&port.to_string(), "PORT");
    insta::assert_snapshot!(told, @r"
    error: the vault service cannot be reached at http://127.0.0.1:PORT: Connection refused (os error 111)
      → start it (`tidemark up` runs both), or say where it is with --vault or TIDEMARK_VAULT
    ");
}

#[test]
fn what_a_service_says_is_told_to_people_and_to_programs() {
    let fake = Fake::serve(Script::of(&image()));
    let told = fails(&["volume", "show", "dta", "--capture", &fake.url()], 3);
    insta::assert_snapshot!(told, @r#"
    error: there is no volume "dta"
      → list those there are
    "#);
    let told = fails(
        &[
            "generation",
            "show",
            "data@9",
            "--json",
            "--vault",
            &fake.url(),
        ],
        3,
    );
    insta::assert_snapshot!(told, @r#"{"error":{"action":"list those that are retained","exit_code":3,"kind":"not_found","message":"data has no generation 9","reason":"GENERATION_NOT_FOUND"}}"#);
}

#[test]
fn addresses_come_from_the_environment_too_and_flags_win() {
    let fake = Fake::serve(Script::of(&image()));
    let output = tidemark()
        .args(["volume", "list", "--json"])
        .env("TIDEMARK_CAPTURE", fake.url())
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "[]\n", "{}", stderr(&output));
    let output = tidemark()
        .args(["--capture", &fake.url(), "volume", "list"])
        .env("TIDEMARK_CAPTURE", "http://127.0.0.1:1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn the_status_of_one_service_is_shown_though_the_other_is_down() {
    let fake = Fake::serve(Script::of(&image()));
    let output = tidemark()
        .args([
            "status",
            "--capture",
            &fake.url(),
            "--vault",
            "http://127.0.0.1:1",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(
        stdout(&output).contains("capture service 0.1.0 at"),
        "{}",
        stdout(&output)
    );
    assert!(stdout(&output).contains("the vault service cannot be reached"));
}

#[test]
fn a_shipping_whose_service_goes_away_says_that_nothing_is_lost() {
    let fake = Fake::serve(Script::of(&image()));
    let told = fails(&["ship", "data", "--capture", &fake.url()], 5);
    assert!(told.contains("nothing is lost"), "{told}");
}

#[test]
fn standard_output_that_nobody_reads_is_no_error() {
    let mut child = tidemark()
        .args(["completions", "bash"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
}

#[test]
fn by_the_name_of_a_service_the_program_is_that_service() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["capture-svc", "vault-svc"] {
        let link = dir.path().join(name);
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_tidemark"), &link).unwrap();
        let output = std::process::Command::new(&link)
            .arg("--version")
            .output()
            .unwrap();
        let version = format!("{name} {}\n", env!("CARGO_PKG_VERSION"));
        assert_eq!((stdout(&output), stderr(&output)), (version, String::new()));
    }
}
