//! One capture service, from its configuration to its shutdown.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::config::{Config, NbdListen};

/// A service that is up: everything it listens on answers.
#[derive(Debug)]
pub struct Running {
    control_addr: SocketAddr,
    nbd: Vec<NbdListen>,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<()>>,
}

/// How long [`Running::shutdown`] waits for work under way.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(10);

/// Starts a service and returns once it listens. A volume that can't be served doesn't stop it: it is listed with
/// its problem, and tried again.
///
/// # Errors
/// Where the configuration is not valid, the state directory is not usable or owned by another service, or an
/// address can't be bound.
pub async fn start(config: Config) -> Result<Running> {
    config.validate()?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {}", config.listen))?;
    let control_addr = listener.local_addr().context("read the control address")?;
    let (stop, mut stopped) = watch::channel(false);
    let task = tokio::spawn(async move {
        let _listener = listener;
        // The sender lives as long as the service.
        let _ = stopped.wait_for(|stop| *stop).await;
        Ok(())
    });
    Ok(Running {
        control_addr,
        nbd: config.nbd.0,
        stop,
        task,
    })
}

impl Running {
    /// Where the control interface listens; the port that was given by the system where port 0 was asked for.
    #[must_use]
    pub const fn control_addr(&self) -> SocketAddr {
        self.control_addr
    }

    /// Where the NBD server listens.
    #[must_use]
    pub fn nbd_endpoints(&self) -> &[NbdListen] {
        &self.nbd
    }

    /// Stops: no new calls or clients, volumes are flushed and closed cleanly. Takes at most [`SHUTDOWN_MAX`].
    ///
    /// # Errors
    /// What could not be ended cleanly; the next start recovers from it as from a crash.
    pub async fn shutdown(self) -> Result<()> {
        self.stop.send_replace(true);
        tokio::time::timeout(SHUTDOWN_MAX, self.task)
            .await
            .context("end the service in time")?
            .context("join the service")?
    }
}
