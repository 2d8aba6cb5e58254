//! The `capture-svc` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    capture_svc::program::main()
}
