//! The help texts, as they are printed: changing one is a decision, not an accident.

use crate::{stderr, stdout, tidemark};

/// Every subcommand, in the order of the manual.
pub(crate) const COMMANDS: &[&[&str]] = &[
    &["up"],
    &["volume", "add"],
    &["volume", "list"],
    &["volume", "show"],
    &["volume", "remove"],
    &["volume", "readopt"],
    &["snapshot", "create"],
    &["snapshot", "list"],
    &["snapshot", "read"],
    &["snapshot", "rollback"],
    &["snapshot", "delete"],
    &["ship"],
    &["scrub"],
    &["generation", "list"],
    &["generation", "common"],
    &["generation", "show"],
    &["restore"],
    &["find-coherent"],
    &["mount"],
    &["umount"],
    &["status"],
    &["health"],
    &["maintain"],
    &["pki", "init"],
    &["pki", "issue"],
    &["pki", "token"],
    &["completions"],
    &["man"],
];

pub(crate) fn help(command: &[&str]) -> String {
    let output = tidemark().args(command).arg("--help").output().unwrap();
    assert!(output.status.success(), "{command:?}");
    stdout(&output)
}

#[test]
fn every_subcommand_explains_itself() {
    insta::assert_snapshot!("tidemark", help(&[]));
    for command in COMMANDS {
        insta::assert_snapshot!(command.join("-"), help(command));
    }
}

#[test]
fn there_are_completions_for_every_common_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let output = tidemark().args(["completions", shell]).output().unwrap();
        assert!(stdout(&output).contains("generation"), "{shell}");
        let service = ["completions", shell, "--program", "capture-svc"];
        let output = tidemark().args(service).output().unwrap();
        assert!(stdout(&output).contains("interval-max"), "{shell}");
    }
}

#[test]
fn the_manual_is_written_where_it_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("share/man");
    let output = tidemark().arg("man").arg(&pages).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    for page in [
        "man1/tidemark.1",
        "man1/tidemark-restore.1",
        "man8/capture-svc.8",
    ] {
        assert!(pages.join(page).is_file(), "{page}");
    }
    let output = tidemark()
        .arg("man")
        .arg(pages.join("man1/tidemark.1"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot create"), "a file is there");
}
