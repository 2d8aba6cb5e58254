//! The `tidemark` program against services that are made up, so that they can lie.
#![allow(clippy::unwrap_used)]

#[path = "it/docs.rs"]
mod docs;
#[path = "it/fake.rs"]
mod fake;
#[path = "it/help.rs"]
mod help;
#[path = "it/pki.rs"]
mod pki;
#[path = "it/restore.rs"]
mod restore;
#[path = "it/snapshot_read.rs"]
mod snapshot_read;
#[path = "it/usage.rs"]
mod usage;

use std::{
    path::Path,
    process::{Command, Output},
};

/// The program, with nothing of this machine's environment that it heeds.
fn tidemark() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidemark"));
    command
        .env_remove("TIDEMARK_CAPTURE")
        .env_remove("TIDEMARK_VAULT")
        .env("COLUMNS", "100");
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
