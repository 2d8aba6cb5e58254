//! The vault service: receives intervals, commits generations, keeps and serves them.
//!
//! In the order of the data: [`rpc`] → [`ship`] (one interval) → [`volume`] (manifest and checksum table) →
//! [`store`]; back out through [`image`]; beside it [`upkeep`] (retention, reclaim) and
//! [`scrub`].

pub mod args;
mod cache;
pub mod config;
mod error;
mod figures;
pub mod image;
pub mod metrics;
pub mod program;
mod rpc;
mod scrub;
mod ship;
pub mod store;
mod upkeep;
mod vault;
mod volume;

#[cfg(test)]
#[path = "../tests/it/interval.rs"]
#[allow(clippy::unwrap_used, dead_code, reason = "tests")]
mod interval;
#[cfg(test)]
mod model;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use tidemark_listen::{GREETING_MAX, Incoming};
use tidemark_proto::{
    FILE_DESCRIPTOR_SET,
    vault::v1::{ingest_server::IngestServer, vault_server::VaultServer},
};
use tidemark_telemetry::{
    CallLayer, RequestLayer,
    metrics::{CallCounts, Outlets, Process},
};
use tidemark_tls::{DialerFiles, Gate, OwnCertificates, Reloaded, ShieldLayer};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinHandle,
};
use tonic_health::ServingStatus;

pub use config::Config;
pub use vault::Vault;

use crate::{config::Settings, metrics::Sources, rpc::Service};

/// How long calls may take to end once the service stops.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// How long whoever uses the vault may take to let go of it.
const RELEASE_MAX: Duration = Duration::from_secs(5);
const RELEASE_PERIOD: Duration = Duration::from_millis(2);

/// A vault that serves until it is told to stop.
#[derive(Debug)]
pub struct Running {
    /// Where it listens; the port is the real one.
    pub listen_addr: SocketAddr,
    /// Where metrics are read, if they are.
    pub metrics_addr: Option<SocketAddr>,
    vault: Arc<Vault>,
    gate: Arc<Gate>,
    stop: watch::Sender<bool>,
    server: JoinHandle<Result<()>>,
    upkeep: JoinHandle<()>,
    scrub: JoinHandle<()>,
    reloading: JoinHandle<()>,
    measuring: JoinHandle<()>,
    expiry: JoinHandle<()>,
}

impl Running {
    /// Stops accepting work, ends streams, writes what is kept in memory, and returns when all is done and the
    /// directories may be opened again.
    ///
    /// # Errors
    /// The server had failed before, or the last writes failed; nothing committed is lost then.
    pub async fn shutdown(self) -> Result<()> {
        self.stop.send_replace(true);
        let mut server = self.server;
        let served = match tokio::time::timeout(DRAIN_MAX, &mut server).await {
            Ok(served) => served.context("join the server task").flatten(),
            Err(_) => {
                tracing::warn!("connections stay open; they are closed");
                server.abort();
                Ok(())
            }
        };
        join("upkeep", self.upkeep).await;
        join("scrub", self.scrub).await;
        let closed = self.vault.close().await;
        // These only look and tell.
        join("watch over the gate's files", self.reloading).await;
        join("metrics", self.measuring).await;
        join("watch over certificates", self.expiry).await;
        closed?;
        // Work that was cut off ends on its own; until then it holds the locks.
        let (vault, store_in_use) = (Arc::downgrade(&self.vault), self.vault.store_in_use());
        drop(self.vault);
        let waited = tokio::time::timeout(RELEASE_MAX, async {
            while vault.strong_count() > 0 || store_in_use() {
                tokio::time::sleep(RELEASE_PERIOD).await;
            }
        });
        if waited.await.is_err() {
            tracing::warn!(
                "somebody still uses the vault: its directories stay locked until the process ends"
            );
        }
        served
    }

    /// Reads certificates and identities again. What can't be used changes nothing, and is logged.
    pub fn reload(&self) -> Reloaded {
        self.gate.reload(true)
    }

    /// The vault itself.
    #[must_use]
    pub fn vault(&self) -> &Arc<Vault> {
        &self.vault
    }
}

/// Waits for a task to end; that it failed keeps nothing else from ending well.
async fn join(task: &'static str, handle: JoinHandle<()>) {
    if let Err(error) = handle.await {
        tracing::error!(task, %error, "a task failed");
    }
}

/// Opens the vault and serves it.
///
/// # Errors
/// The configuration is invalid, a directory is in use or belongs to another vault, or the address is taken.
pub async fn start(config: Config) -> Result<Running> {
    config.validate()?;
    let listen = config.listen;
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("listen on {listen}"))?;
    let vault = Vault::open(config).await?;
    serve(vault, listener).await
}

/// Serves an open vault.
///
/// # Errors
/// The listener fails.
pub async fn serve(vault: Arc<Vault>, listener: TcpListener) -> Result<Running> {
    let listen_addr = listener
        .local_addr()
        .context("read the listener's address")?;
    let gate = Gate::open(vault.config().gate().files()).context("set up who may call")?;
    if !vault.config().gate().is_safe() {
        tracing::warn!(listen = %listen_addr, "other machines are served in plain text, as allow_plain_text has it");
    }
    let (stop, stopping) = watch::channel(false);
    let config = vault.config();
    let metrics = Outlets::open(config.metrics_listen, &config.telemetry()).await?;
    let metrics_addr = metrics.addr();
    if !vault.config().gate().metrics_are_safe() {
        tracing::warn!(metrics_listen = %vault.config().metrics_listen, "other machines may read metrics in plain text, as metrics_plain_text or allow_plain_text has it");
    }
    let service = Service {
        restores: Arc::new(Semaphore::new(vault.config().restores_max as usize)),
        vault: Arc::clone(&vault),
        stopping: stopping.clone(),
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_service_status("", ServingStatus::Serving).await;
    health.set_serving::<IngestServer<Service>>().await;
    health.set_serving::<VaultServer<Service>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let reflection_v1 = reflection()
        .build_v1()
        .context("build the reflection service")?;
    let reflection_v1alpha = reflection()
        .build_v1alpha()
        .context("build the reflection service")?;
    let calls = CallCounts::default();
    let restores = Arc::clone(&service.restores);
    let router = rpc::builder(vault.config().bytes_in_flight_max.get())
        .layer(calls.clone())
        .layer(RequestLayer)
        .layer(ShieldLayer::new(Arc::clone(&gate)))
        .layer(CallLayer)
        .add_service(health_service)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha)
        .add_service(service.ingest())
        .add_service(service.reader());
    let connections_max = vault.config().connections_max as usize;
    let incoming = Incoming::new(listener, connections_max, GREETING_MAX, Arc::clone(&gate));
    let sources = Sources {
        process: Process::new("vault-svc", env!("CARGO_PKG_VERSION")),
        vault: Arc::clone(&vault),
        gate: Arc::clone(&gate),
        restores,
        connections: incoming.counts(),
        calls,
    };
    let read = Arc::new(move || sources.read());
    let measuring = tokio::spawn(metrics.run(read, stopping.clone()));
    let mut signal = stopping.clone();
    let server = tokio::spawn(async move {
        router
            .serve_with_incoming_shutdown(incoming, async move {
                let _ = signal.wait_for(|stop| *stop).await;
                health
                    .set_service_status("", ServingStatus::NotServing)
                    .await;
                health.set_not_serving::<IngestServer<Service>>().await;
                health.set_not_serving::<VaultServer<Service>>().await;
            })
            .await
            .context("serve")
    });
    let period = vault.config().tls_reload_period.get();
    let reloading = tokio::spawn(Arc::clone(&gate).watch(period, stopping.clone()));
    let own = OwnCertificates::new(Arc::clone(&gate), DialerFiles::default());
    let expiry = tokio::spawn(Arc::new(own).watch(stopping.clone()));
    let upkeep = tokio::spawn(Arc::clone(&vault).look_after(stopping.clone()));
    let scrub = tokio::spawn(Arc::clone(&vault).scrub_always(stopping));
    Ok(Running {
        listen_addr,
        metrics_addr,
        vault,
        gate,
        stop,
        server,
        upkeep,
        scrub,
        reloading,
        measuring,
        expiry,
    })
}
