//! `docs/CLI.md` says what the program does: every subcommand, flag, exit code and field.

use std::{collections::BTreeSet, path::Path};

use clap::CommandFactory;
use serde_json::Value;
use tidemark_cli::{args::Cli, failure::Kind};

use crate::help::COMMANDS;

fn manual() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/CLI.md");
    std::fs::read_to_string(path).unwrap()
}

/// The part of the manual under `## tidemark COMMAND` or `### tidemark COMMAND`.
fn section(manual: &str, title: &str) -> String {
    let mut lines = manual
        .lines()
        .skip_while(|line| line.trim_start_matches('#').trim() != title || !line.starts_with('#'));
    assert!(
        lines.next().is_some(),
        "docs/CLI.md has no section \"{title}\""
    );
    lines
        .take_while(|line| !line.starts_with('#'))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn the_manual_has_every_subcommand_with_every_flag_and_no_other() {
    let manual = manual();
    for path in COMMANDS {
        let mut command = Cli::command();
        for name in *path {
            command = command.find_subcommand(name).unwrap().clone();
        }
        let flags: BTreeSet<_> = command
            .get_arguments()
            .filter_map(|arg| arg.get_long())
            .filter(|flag| !["help", "version"].contains(flag))
            .map(str::to_owned)
            .collect();
        let text = section(&manual, &format!("tidemark {}", path.join(" ")));
        let told: BTreeSet<_> = text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
            .filter_map(|word| word.strip_prefix("--"))
            .filter(|flag| flag.starts_with(|c: char| c.is_ascii_lowercase()))
            .filter(|flag| !["json", "capture", "vault"].contains(flag))
            .map(str::to_owned)
            .collect();
        assert_eq!(told, flags, "{path:?}");
    }
}

#[test]
fn the_manual_lists_every_exit_code() {
    let text = section(&manual(), "Exit codes");
    for kind in [
        Kind::Failed,
        Kind::Usage,
        Kind::NotFound,
        Kind::Conflict,
        Kind::Fenced,
        Kind::Unavailable,
        Kind::Corrupt,
        Kind::Denied,
        Kind::Interrupted,
    ] {
        let row = format!("| {} |", kind.exit_code());
        assert!(text.contains(&row), "{row}");
    }
}

/// Field names of the objects that the unit tests' snapshots show.
fn fields_of(snapshot: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!(
        "src/command/snapshots/tidemark_cli__command__{snapshot}.snap"
    ));
    let text = std::fs::read_to_string(path).unwrap();
    let json = text.splitn(3, "---\n").nth(2).unwrap();
    let object: Value = serde_json::from_str(json).unwrap();
    let mut fields = BTreeSet::new();
    collect(&object, &mut fields);
    fields
}

fn collect(value: &Value, fields: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                fields.insert(name.clone());
                collect(value, fields);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, fields)),
        _ => {}
    }
}

#[test]
fn the_manual_names_every_field_of_the_json_that_is_printed() {
    let manual = manual();
    for snapshot in [
        "status__tests__the_status_shows_both_services_and_how_far_back_the_vault_is-2",
        "ship__tests__a_receipt_is_printed_for_people_and_for_programs-2",
        "generation__tests__a_generation_is_printed_for_people_and_for_programs-3",
        "restore__tests__what_was_written_and_verified_is_told-2",
        "snapshot__tests__a_snapshot_is_printed_for_people_and_for_programs",
    ] {
        for field in fields_of(snapshot) {
            assert!(
                manual.contains(&format!("`{field}`")),
                "{snapshot}: `{field}`"
            );
        }
    }
}
