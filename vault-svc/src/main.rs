//! The `vault-svc` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    vault_svc::program::main()
}
