//! The vault service: receives intervals, commits generations, keeps and serves them.

pub mod config;

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tidemark_proto::FILE_DESCRIPTOR_SET;
use tokio::{sync::watch, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

pub use config::Config;

/// A vault that serves until it is told to stop.
#[derive(Debug)]
pub struct Running {
    /// Where it listens; the port is the real one.
    pub listen_addr: SocketAddr,
    stop: watch::Sender<bool>,
    server: JoinHandle<Result<()>>,
}

impl Running {
    /// Stops accepting work, ends streams, writes what is kept in memory, and returns when all is done.
    ///
    /// # Errors
    /// The server had failed before, or the last writes failed; nothing committed is lost then.
    pub async fn shutdown(self) -> Result<()> {
        self.stop.send_replace(true);
        self.server.await.context("join the server task")?
    }
}

/// Opens the vault and serves it.
///
/// # Errors
/// The configuration is invalid, a directory belongs to another vault, or the address is taken.
pub async fn start(config: Config) -> Result<Running> {
    config.validate()?;
    let listener = tokio::net::TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {}", config.listen))?;
    let listen_addr = listener
        .local_addr()
        .context("read the listener's address")?;
    let (stop, mut stopping) = watch::channel(false);
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("build the reflection service")?;
    let server = tokio::spawn(async move {
        Server::builder()
            .add_service(health_service)
            .add_service(reflection)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async move {
                let _ = stopping.wait_for(|stop| *stop).await;
            })
            .await
            .context("serve")
    });
    Ok(Running {
        listen_addr,
        stop,
        server,
    })
}
