//! The `tidemark` program.

use std::process::ExitCode;

use clap::Parser;
use tidemark_cli::{args::Cli, command, failure::Failure};

fn main() -> ExitCode {
    tidemark_disk::heap::keep_small();
    if let Some(code) = tidemark_cli::read_device() {
        return code;
    }
    let cli = Cli::parse();
    let json = cli.global.json;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(command::run(cli)),
        Err(error) => Err(Failure::io("start the async runtime", &error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}
