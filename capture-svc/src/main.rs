//! The `capture-svc` program: configuration, logs, signals.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use capture_svc::config::{Config, Flags, Settings};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// The Tidemark capture service: protects volume files and ships what changes to a vault.
///
/// Each setting can be given in the configuration file, as CAPTURE_NAME in the environment, or as a flag; later ones
/// win.
#[derive(Debug, Parser)]
#[command(name = "capture-svc", version)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(long, env = "CAPTURE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the configuration that results, and exit.
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    tidemark_disk::heap::keep_small();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("capture-svc: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let config = Config::load(
        arguments.config.as_deref(),
        std::env::vars_os(),
        arguments.flags,
    )?;
    if arguments.print_config {
        print!("{}", config.to_toml());
        return Ok(());
    }
    tidemark_telemetry::init("capture-svc", config.log_format, &config.log_filter)?;
    if let Err(error) = tidemark_disk::descriptors::raise_limit() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(serve(config));
    // Blocking work that is stuck in a disk must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    result
}

async fn serve(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let running = capture_svc::start(config).await?;
    tracing::info!(control = %running.control_addr(), "the capture service is up");
    for endpoint in running.nbd_endpoints() {
        tracing::info!(%endpoint, "NBD");
    }
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // It logs by itself what became of it.
            _ = hangup.recv() => drop(running.reload()),
        }
    }
    tracing::info!("stopping");
    running.shutdown().await
}
