//! The help texts, as they are printed: changing one is a decision, not an accident.

use crate::{stdout, tidemark};

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
    &["maintain"],
    &["pki", "init"],
    &["pki", "issue"],
    &["pki", "token"],
    &["completions"],
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
    }
}
