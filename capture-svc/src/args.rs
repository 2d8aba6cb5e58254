//! The command line of the `capture-svc` program.

use std::{path::PathBuf, time::Duration};

use clap::{Parser, Subcommand};
use tidemark_config::Span;

use crate::config::Flags;

/// The Tidemark capture service: protects volume files and ships what changes to a vault.
///
/// Each setting can be given in the configuration file, as CAPTURE_NAME in the environment, or as a flag; later ones
/// win.
#[derive(Debug, Parser)]
#[command(name = "capture-svc", version)]
pub struct Arguments {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Configuration file (TOML).
    #[arg(long, env = "CAPTURE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the configuration that results, and exit.
    #[arg(long)]
    pub print_config: bool,
    /// One flag per setting.
    #[command(flatten)]
    pub flags: Flags,
}

/// What the program does besides serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ask the service with this configuration whether it serves; exits with 0 if so, else with 1 and the reason
    Health {
        /// How long to wait for its answer.
        #[arg(long, value_name = "TIME", default_value = "3s", value_parser = patience)]
        timeout: Duration,
    },
}

fn patience(text: &str) -> Result<Duration, String> {
    let time: Span = text.parse()?;
    if time.is_zero() {
        return Err("must be above 0s".to_owned());
    }
    Ok(time.get())
}
