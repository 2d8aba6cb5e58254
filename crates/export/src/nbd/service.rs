//! What all connections of a server share, and the list of them.

use std::collections::HashMap;
use std::fmt;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::handshake::{HandshakeError, handshake};
use super::limits::Limits;
use super::negotiate::Agreement;
use super::pool::Pool;
use super::session::Session;
use super::socket::Stream;
use crate::exports::Exports;
use crate::watch::Watch;

pub(super) struct Service {
    pub(super) exports: Arc<dyn Exports>,
    pub(super) limits: Limits,
    pub(super) pool: Arc<Pool>,
    pub(super) watch: Watch,
    peers: Mutex<HashMap<u64, Arc<Peer>>>,
    emptied: Condvar,
    next_id: AtomicU64,
    stopping: AtomicBool,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("limits", &self.limits)
            .field("connections", &self.connections())
            .finish()
    }
}

/// One connection, from accept to close.
struct Peer {
    stream: Stream,
    name: String,
    stopping: AtomicBool,
    export: OnceLock<String>,
    session: OnceLock<Weak<Session>>,
}

impl Peer {
    /// Nothing more is received; what runs ends by itself.
    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.stream.shutdown(Shutdown::Read);
    }
}

/// A connection's entry in the list; dropping it closes the connection.
pub(super) struct Registration {
    id: u64,
    peer: Arc<Peer>,
    service: Arc<Service>,
}

impl Registration {
    pub(super) fn stream(&self) -> &Stream {
        &self.peer.stream
    }

    /// Who the client is, for logs.
    pub(super) fn name(&self) -> &str {
        &self.peer.name
    }

    pub(super) fn stopping(&self) -> bool {
        self.peer.stopping.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.peer.stream.shutdown(Shutdown::Both);
        let mut peers = self.service.peers.lock();
        peers.remove(&self.id);
        self.service.emptied.notify_all();
    }
}

/// One client, as a server's status shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientStatus {
    /// The export in use; `None` during the handshake.
    pub export: Option<String>,
    /// Address of a TCP client, or `unix`.
    pub peer: String,
}

impl Service {
    pub(super) fn new(exports: Arc<dyn Exports>, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            exports,
            pool: Arc::new(Pool::new(limits.large_buffers_max)),
            limits,
            watch: Watch::default(),
            peers: Mutex::default(),
            emptied: Condvar::new(),
            next_id: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        })
    }

    pub(super) fn connections(&self) -> usize {
        self.peers.lock().len()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn sessions(&self) -> Vec<Arc<Session>> {
        self.peers
            .lock()
            .values()
            .filter_map(|peer| peer.session.get()?.upgrade())
            .collect()
    }

    pub(super) fn clients(&self) -> Vec<ClientStatus> {
        let peers = self.peers.lock();
        peers
            .values()
            .map(|peer| ClientStatus {
                export: peer.export.get().cloned(),
                peer: peer.name.clone(),
            })
            .collect()
    }

    /// What the watch does at each tick.
    pub(super) fn look(&self) -> bool {
        // Not under the lock: the last handle of a session, when dropped, takes it.
        let sessions = self.sessions();
        let mut busy = false;
        for session in &sessions {
            busy |= session.look();
        }
        busy
    }

    /// Admits a client, unless there are too many or the server is stopping.
    pub(super) fn admit(self: &Arc<Self>, stream: Stream, name: String) -> Option<Registration> {
        let mut peers = self.peers.lock();
        if peers.len() >= self.limits.connections_max || self.is_stopping() {
            return None;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let peer = Arc::new(Peer {
            stream,
            name,
            stopping: AtomicBool::new(false),
            export: OnceLock::new(),
            session: OnceLock::new(),
        });
        peers.insert(id, Arc::clone(&peer));
        drop(peers);
        Some(Registration {
            id,
            peer,
            service: Arc::clone(self),
        })
    }

    /// The life of a connection's first thread.
    pub(super) fn serve(self: &Arc<Self>, registration: Registration) {
        let deadline = Instant::now() + self.limits.handshake_timeout;
        let peer = Arc::clone(&registration.peer);
        let entered = |agreement: &Agreement| {
            let _first = peer.export.set(agreement.client.export().name().to_owned());
        };
        let agreement = match handshake(registration.stream(), &*self.exports, deadline, entered) {
            Ok(agreement) => agreement,
            Err(HandshakeError::Aborted) => return,
            Err(error) => {
                tracing::info!(client = registration.name(), %error, "closing in the handshake");
                return;
            }
        };
        let limits = &self.limits;
        let set = registration
            .stream()
            .set_receive_timeout(limits.receive_timeout)
            .and_then(|()| registration.stream().set_send_timeout(limits.send_timeout));
        if let Err(error) = set {
            tracing::info!(client = registration.name(), %error, "closing: the connection failed");
            return;
        }
        let session = Session::new(Arc::clone(self), agreement, registration);
        let _first = peer.session.set(Arc::downgrade(&session));
        session.work(true);
    }

    /// Ends the clients of one export, or of all. Returns how many there were.
    pub(super) fn disconnect(&self, export: Option<&str>) -> usize {
        let peers = self.peers.lock();
        let chosen = peers
            .values()
            .filter(|peer| export.is_none() || peer.export.get().map(String::as_str) == export);
        chosen.map(|peer| peer.stop()).count()
    }

    /// Admits nobody any more, lets running requests end for at most `grace`, then closes what is left. Returns how
    /// many connections did not end by themselves.
    pub(super) fn stop(&self, grace: Duration) -> usize {
        self.stopping.store(true, Ordering::Release);
        self.disconnect(None);
        let left = self.wait_until_empty(grace);
        if left > 0 {
            for peer in self.peers.lock().values() {
                peer.stream.shutdown(Shutdown::Both);
            }
            // Threads that merely waited for their client end now; one that is stuck in the device does not.
            self.wait_until_empty(Duration::from_millis(100));
        }
        self.watch.stop();
        left
    }

    fn wait_until_empty(&self, at_most: Duration) -> usize {
        let deadline = Instant::now() + at_most;
        let mut peers = self.peers.lock();
        while !peers.is_empty() {
            if self.emptied.wait_until(&mut peers, deadline).timed_out() {
                break;
            }
        }
        peers.len()
    }
}
