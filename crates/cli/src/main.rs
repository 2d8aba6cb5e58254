//! The `tidemark` program; by the names of the services, which are in it anyway, it is those (the images have one program).

use std::{env, path::Path, process::ExitCode};

use clap::Parser;
use tidemark_cli::{args::Cli, command, failure::Failure};

fn main() -> ExitCode {
    let name = env::args_os().next().unwrap_or_default();
    match Path::new(&name).file_name().and_then(|name| name.to_str()) {
        Some("capture-svc") => capture_svc::program::main(),
        Some("vault-svc") => vault_svc::program::main(),
        _ => tidemark(),
    }
}

fn tidemark() -> ExitCode {
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
