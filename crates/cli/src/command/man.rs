//! `tidemark man`.

use std::{fs, path::Path};

use clap::CommandFactory;
use clap_mangen::Man;

use crate::{
    args::{Cli, ManArgs, Program},
    failure::Failure,
    output,
};

const MANUAL: &str = "Tidemark";

/// A page, and its file within the folder of manuals.
type Page = (String, Vec<u8>);

pub(super) fn run(json: bool, args: &ManArgs) -> Result<(), Failure> {
    let pages = pages().map_err(|e| Failure::io("make the pages of the manual", &e))?;
    for (name, text) in &pages {
        write(&args.dir.join(name), text)?;
    }
    let names: Vec<_> = pages.iter().map(|(name, _)| name).collect();
    let told = format!("{} pages in {}\n", names.len(), args.dir.display());
    output::print(
        json,
        &serde_json::json!({ "dir": args.dir, "pages": names }),
        &told,
    )
}

fn write(path: &Path, text: &[u8]) -> Result<(), Failure> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir)
        .map_err(|e| Failure::io(format_args!("create {}", dir.display()), &e))?;
    fs::write(path, text).map_err(|e| Failure::io(format_args!("write {}", path.display()), &e))
}

/// The command with a page for each of its subcommands in section 1, the services in section 8.
fn pages() -> std::io::Result<Vec<Page>> {
    let mut pages = Vec::new();
    for program in Program::ALL {
        let (command, section) = match program {
            Program::Tidemark => (Cli::command(), "1"),
            Program::CaptureSvc => (capture_svc::args::Arguments::command(), "8"),
            Program::VaultSvc => (vault_svc::args::Arguments::command(), "8"),
        };
        let mut command = command.disable_help_subcommand(true);
        command.build();
        add(command, section, &mut pages)?;
    }
    Ok(pages)
}

fn add(command: clap::Command, section: &str, pages: &mut Vec<Page>) -> std::io::Result<()> {
    let below: Vec<_> = command.get_subcommands().cloned().collect();
    let page = Man::new(command).section(section).manual(MANUAL);
    let mut text = Vec::new();
    page.render(&mut text)?;
    let name = format!("man{section}/{}", page.get_filename());
    pages.push((name, text));
    below
        .into_iter()
        .try_for_each(|subcommand| add(subcommand, section, pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_and_every_subcommand_has_its_page() {
        let pages = pages().unwrap();
        let text = |name: &str| {
            let (_, text) = pages.iter().find(|(page, _)| page == name).unwrap();
            String::from_utf8(text.clone()).unwrap()
        };
        assert!(text("man1/tidemark.1").contains("Exit codes"));
        assert!(text("man1/tidemark-snapshot-create.1").contains("before\\-upgrade"));
        assert!(text("man8/capture-svc.8").contains("interval\\-max"));
        assert!(text("man8/vault-svc.8").contains("VAULT_CONFIG"));
        assert!(text("man8/vault-svc-health.8").contains("timeout"));
    }
}
