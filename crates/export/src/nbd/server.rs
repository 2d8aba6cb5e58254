//! Starting, watching over and stopping a server.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tidemark_disk::descriptors;

use super::limits::Limits;
use super::service::{ClientStatus, Service};
use super::socket::{Listener, NbdAddress};
use crate::exports::Exports;

/// How long accepting pauses after a failure such as having no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a server that is dropped without [`NbdServer::stop`] lets running requests end.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No listener at this address.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// Where.
        address: NbdAddress,
        /// Why not.
        source: io::Error,
    },
    /// No thread, or no wake-up socket.
    #[error("cannot start the NBD server: {0}")]
    Thread(#[from] io::Error),
}

/// How a stop went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopReport {
    /// Connections that had to be cut off because they did not end within the grace. Their requests may still run.
    pub cut_off: usize,
}

/// A running NBD server. Dropping it stops it.
#[derive(Debug)]
pub struct NbdServer {
    service: Arc<Service>,
    addresses: Vec<NbdAddress>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    wake: UnixStream,
    threads: Vec<JoinHandle<()>>,
}

impl NbdServer {
    /// Listens at every address and serves from now on.
    ///
    /// # Errors
    /// [`StartError`]: nothing is served then. For a unix socket that a living server owns the kind is
    /// [`io::ErrorKind::AddrInUse`].
    pub fn start(
        exports: Arc<dyn Exports>,
        addresses: &[NbdAddress],
        limits: Limits,
    ) -> Result<Self, StartError> {
        let listen = |address: &NbdAddress| {
            Listener::bind(address).map_err(|source| StartError::Listen {
                address: address.clone(),
                source,
            })
        };
        let listeners = addresses
            .iter()
            .map(listen)
            .collect::<Result<Vec<_>, _>>()?;
        let bound = listeners
            .iter()
            .map(Listener::address)
            .collect::<io::Result<Vec<_>>>()?;
        let service = Service::new(exports, limits);
        let (wake, woken) = UnixStream::pair()?;

        let accepting = Arc::clone(&service);
        let accept = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || accept(&accepting, &listeners, &woken))?;
        let watching = Arc::clone(&service);
        let running = Mutex::new(Some(Running {
            wake,
            threads: vec![accept],
        }));
        let server = Self {
            service,
            addresses: bound,
            running,
        };
        let watch = std::thread::Builder::new()
            .name("nbd-watch".to_owned())
            .spawn(move || watching.watch.keep(|| watching.look()))?;
        if let Some(running) = server.running.lock().as_mut() {
            running.threads.push(watch);
        }
        Ok(server)
    }

    /// Where it listens, with the ports that were chosen.
    #[must_use]
    pub fn addresses(&self) -> &[NbdAddress] {
        &self.addresses
    }

    /// The connections of this moment.
    #[must_use]
    pub fn clients(&self) -> Vec<ClientStatus> {
        self.service.clients()
    }

    /// Ends the clients of one export: their running requests end, then their connections close. Returns how many
    /// there were; that they are gone is seen by [`crate::Export::clients`].
    pub fn disconnect(&self, export: &str) -> usize {
        self.service.disconnect(Some(export))
    }

    /// Stops accepting, lets running requests end for at most `grace`, closes everything. Repeating it does nothing.
    pub fn stop(&self, grace: Duration) -> StopReport {
        let Some(running) = self.running.lock().take() else {
            return StopReport { cut_off: 0 };
        };
        // Closing our end wakes the acceptor; its listeners close with it.
        drop(running.wake);
        let cut_off = self.service.stop(grace);
        for thread in running.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the NBD server panicked");
            }
        }
        StopReport { cut_off }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop(DROP_GRACE);
    }
}

fn accept(service: &Arc<Service>, listeners: &[Listener], woken: &UnixStream) {
    let mut failing = false;
    while !service.is_stopping() {
        let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(woken, PollFlags::IN)];
        fds.extend(
            listeners
                .iter()
                .map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)),
        );
        if let Err(error) = poll(&mut fds, None) {
            if error != Errno::INTR {
                pause(&mut failing, &error.into());
            }
            continue;
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        for (listener, fd) in listeners.iter().zip(&fds[1..]) {
            if !fd.revents().is_empty() {
                match accept_one(service, listener) {
                    Ok(()) => failing = false,
                    Err(error) => pause(&mut failing, &error),
                }
            }
        }
    }
}

/// Whoever can't be accepted still waits: without a pause this would spin. Told once, until somebody is accepted.
fn pause(failing: &mut bool, error: &io::Error) {
    if !std::mem::replace(failing, true) {
        tracing::warn!(%error, "clients can't be accepted; trying on");
    }
    std::thread::sleep(ACCEPT_PAUSE);
}

fn accept_one(service: &Arc<Service>, listener: &Listener) -> io::Result<()> {
    let (stream, name) = match listener.accept() {
        Ok(accepted) => accepted,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
            ) =>
        {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    if descriptors::is_kept_back(stream.as_fd()) {
        tracing::info!("a client was turned away: too many open files");
        return Ok(());
    }
    let Some(registration) = service.admit(stream, name) else {
        tracing::info!("a client was turned away: too many connections");
        return Ok(());
    };
    let serving = Arc::clone(service);
    let thread = std::thread::Builder::new().name("nbd-connection".to_owned());
    if let Err(error) = thread.spawn(move || serving.serve(registration)) {
        tracing::warn!(%error, "a client was turned away: no thread for it");
    }
    Ok(())
}
