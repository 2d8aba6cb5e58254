//! The `vault-svc` program.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tidemark_telemetry::LogFormat;
use tokio::signal::unix::{SignalKind, signal};
use vault_svc::{
    Config,
    config::{ByteSize, Span},
};

/// Receives intervals of volumes, keeps their generations, and serves them.
#[derive(Debug, Parser)]
#[command(name = "vault-svc", version)]
struct Cli {
    /// TOML file with any of the settings that --print-config shows.
    #[arg(long, value_name = "FILE", env = "VAULT_CONFIG")]
    config: Option<PathBuf>,
    /// Print the settings in effect as TOML and exit.
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    flags: Flags,
}

/// Settings on the command line; the rest is set in the file or as VAULT_… in the environment.
#[derive(Debug, clap::Args, Serialize)]
struct Flags {
    /// Address to listen on.
    #[arg(long, value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<SocketAddr>,
    /// Directory of the object store.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    store_dir: Option<PathBuf>,
    /// Directory of local state.
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    state_dir: Option<PathBuf>,
    /// Generations kept per volume.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    retain: Option<u32>,
    /// How long condemned objects stay readable.
    #[arg(long, value_name = "TIME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    reader_grace: Option<Span>,
    /// Memory for parts being received.
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    ingest_bytes_max: Option<ByteSize>,
    /// Filter of log lines.
    #[arg(long, value_name = "FILTER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<String>,
    /// text or json.
    #[arg(long, value_name = "FORMAT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_format: Option<LogFormat>,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vault-svc: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let config = Config::load(cli.config.as_deref(), &cli.flags)?;
    if cli.print_config {
        print!("{}", config.to_toml()?);
        return Ok(());
    }
    tidemark_telemetry::init("vault-svc", config.log_format, &config.log)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?
        .block_on(serve(config))
}

async fn serve(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let running = vault_svc::start(config).await?;
    tracing::info!(listen = %running.listen_addr, "vault serves");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("vault stops");
    running.shutdown().await
}
