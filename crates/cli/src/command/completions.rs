//! `tidemark completions`.

use clap::CommandFactory;

use crate::{
    args::{Cli, CompletionsArgs, Program},
    failure::Failure,
    output,
};

pub(super) fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut command = match args.program {
        Program::Tidemark => Cli::command(),
        Program::CaptureSvc => capture_svc::args::Arguments::command(),
        Program::VaultSvc => vault_svc::args::Arguments::command(),
    };
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    output::print(false, &(), &String::from_utf8_lossy(&script))
}
