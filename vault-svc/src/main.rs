//! The `vault-svc` program.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use vault_svc::config::{Config, Flags, Settings};

/// The Tidemark vault service: receives intervals of volumes, keeps their generations, and serves them.
///
/// Each setting can be given in the configuration file, as VAULT_NAME in the environment, or as a flag; later ones
/// win.
#[derive(Debug, Parser)]
#[command(name = "vault-svc", version)]
struct Cli {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE", env = "VAULT_CONFIG")]
    config: Option<PathBuf>,
    /// Print the configuration that results, and exit.
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    tidemark_disk::heap::keep_small();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vault-svc: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let config = Config::load(cli.config.as_deref(), std::env::vars_os(), cli.flags)?;
    if cli.print_config {
        print!("{}", config.to_toml());
        return Ok(());
    }
    tidemark_telemetry::init("vault-svc", config.log_format, &config.log)?;
    if let Err(error) = tidemark_disk::descriptors::raise_limit() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?
        .block_on(serve(config))
}

async fn serve(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let running = vault_svc::start(config).await?;
    tracing::info!(listen = %running.listen_addr, "vault serves");
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // It logs by itself what became of it.
            _ = hangup.recv() => drop(running.reload()),
        }
    }
    tracing::info!("vault stops");
    running.shutdown().await
}
