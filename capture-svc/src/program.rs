//! The `capture-svc` program: configuration, logs, signals.

use std::{io::Write, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::Parser;
use tidemark_listen::{health::check_local, supervisor};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::{Arguments, Command},
    config::{Config, Settings},
};

/// The whole program, with the arguments of the process. Says on stderr what went wrong.
#[must_use]
pub fn main() -> ExitCode {
    tidemark_disk::heap::keep_small();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever has closed it doesn't want it.
            let _ = writeln!(std::io::stderr(), "capture-svc: {error:#}");
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
    if let Some(Command::Health { timeout }) = arguments.command {
        return health(&config, timeout);
    }
    let telemetry = tidemark_telemetry::init(config.telemetry())?;
    if let Err(error) = tidemark_disk::descriptors::raise_limit() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(serve(config));
    // Blocking work that is stuck in a disk must not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(500));
    telemetry.shutdown();
    result
}

/// Asks a service that runs with this configuration.
fn health(config: &Config, patience: Duration) -> Result<()> {
    let at = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(check_local(config.listen, config.is_tls(), patience))
        .with_context(|| format!("ask the capture service that listens on {}", config.listen))?;
    println!("the capture service serves at {at}");
    Ok(())
}

async fn serve(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let running = crate::start(config).await?;
    tracing::info!(control = %running.control_addr(), "the capture service is up");
    for endpoint in running.nbd_endpoints() {
        tracing::info!(%endpoint, "NBD");
    }
    supervisor::ready();
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // It logs by itself what became of it.
            _ = hangup.recv() => drop(running.reload()),
        }
    }
    tracing::info!("stopping");
    supervisor::stopping();
    running.shutdown().await
}
