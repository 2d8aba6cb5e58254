//! Accepting the connections of a gRPC server without being at the mercy of who connects: never more at a time than
//! there may be, none that says nothing, and none with the descriptors that the service needs for its files.
//!
//! With TLS the handshake is part of a connection, and runs where the connection is served: nobody waits for the
//! handshake of another, and it has to end in time like all that comes before HTTP/2.
//!
//! What is refused is closed at once, so that its client learns of it instead of waiting. Where everybody is asked who
//! they are, and all places are taken, those who have not said it yet give way, the oldest first: whoever takes places
//! and says nothing keeps nobody out who says it.

mod connection;
pub mod health;
pub mod supervisor;

use std::{
    collections::VecDeque,
    io,
    os::fd::AsFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tidemark_disk::descriptors;
use tidemark_tls::{ADMISSION_MAX, Gate, Peer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::{Instant, Sleep, sleep},
};
use tokio_stream::Stream;

pub use connection::Connection;

/// How long a client may take to begin to speak HTTP/2.
pub const GREETING_MAX: Duration = Duration::from_secs(10);
/// How long accepting rests after a failure that trying again at once would repeat.
const PAUSE: Duration = Duration::from_millis(50);
/// Of the places, so many may be taken twice, by those who leave and those they leave for.
const LEAVING_SHARE: usize = 8;
/// Refusals are logged at most this often.
const TOLD_PERIOD: Duration = Duration::from_secs(10);

/// How long a client may take.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// To speak HTTP/2, a handshake before it included.
    greeting_max: Duration,
    /// To make a call with an identity that is known, where one is asked for.
    admission_max: Duration,
}

/// The connections of a listener, for `serve_with_incoming`. Never ends, and never fails.
#[derive(Debug)]
pub struct Incoming {
    listener: TcpListener,
    connections_max: usize,
    times: Times,
    gate: Arc<Gate>,
    counts: ConnectionCounts,
    /// In the order in which they came; some of them have gone, or have been admitted.
    strangers: VecDeque<Stranger>,
    pause: Option<Pin<Box<Sleep>>>,
    told: Option<Instant>,
}

impl Incoming {
    /// At most so many connections at a time, which begin as the gate has it.
    #[must_use]
    pub fn new(
        listener: TcpListener,
        connections_max: usize,
        greeting_max: Duration,
        gate: Arc<Gate>,
    ) -> Self {
        Self {
            listener,
            connections_max,
            times: Times {
                greeting_max,
                admission_max: ADMISSION_MAX,
            },
            gate,
            counts: ConnectionCounts::default(),
            strangers: VecDeque::new(),
            pause: None,
            told: None,
        }
    }

    /// How many there are and were, also once it is served.
    #[must_use]
    pub fn counts(&self) -> ConnectionCounts {
        self.counts.clone()
    }

    /// Takes a client in, unless there are too many.
    fn admit(&mut self, stream: TcpStream) -> Option<Connection> {
        let open = Open::new(&self.counts.open);
        let over = self.counts.open().saturating_sub(self.connections_max);
        if over > 0 {
            // This one, or the one that gives way to it and is gone in a moment.
            self.turn_away("too many connections");
            if over > self.connections_max / LEAVING_SHARE + 1 || !self.make_room() {
                return None;
            }
        }
        if descriptors::is_kept_back(stream.as_fd()) {
            self.turn_away("too many open files");
            return None;
        }
        // A connection that has failed already says so when it is read.
        let _ = stream.set_nodelay(true);
        let mut connection = Connection::new(stream, open, self.times, &self.gate);
        if let Some((peer, leave)) = connection.give_way() {
            self.strangers.push_back(Stranger { peer, leave });
            if self.strangers.len() > 2 * self.connections_max {
                self.strangers.retain(Stranger::is_one);
            }
        }
        Some(connection)
    }

    /// Has the oldest of those leave who have not said who they are; false where there is none.
    fn make_room(&mut self) -> bool {
        while let Some(stranger) = self.strangers.pop_front() {
            if stranger.is_one() && stranger.leave.send(()).is_ok() {
                return true;
            }
        }
        false
    }

    fn turn_away(&mut self, reason: &str) {
        self.counts.refused.fetch_add(1, SeqCst);
        self.tell(&reason);
    }

    fn tell(&mut self, reason: &dyn std::fmt::Display) {
        let now = Instant::now();
        if self.told.is_none_or(|told| now - told >= TOLD_PERIOD) {
            self.told = Some(now);
            tracing::warn!(%reason, "clients are turned away");
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            match ready!(this.listener.poll_accept(cx)) {
                Ok((stream, _)) => {
                    if let Some(connection) = this.admit(stream) {
                        return Poll::Ready(Some(Ok(connection)));
                    }
                }
                Err(error) if is_of_the_client(&error) => {}
                Err(error) => {
                    this.tell(&error);
                    this.pause = Some(Box::pin(sleep(PAUSE)));
                }
            }
        }
    }
}

/// The client went away before it was accepted.
fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset | Interrupted
    )
}

/// Counts of a listener's connections.
#[derive(Debug, Clone, Default)]
pub struct ConnectionCounts {
    open: Arc<AtomicUsize>,
    refused: Arc<AtomicU64>,
}

impl ConnectionCounts {
    /// Connections that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.load(SeqCst)
    }

    /// Connections that were turned away.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(SeqCst)
    }
}

/// A connection whose client may have to leave for another.
#[derive(Debug)]
struct Stranger {
    peer: Peer,
    leave: oneshot::Sender<()>,
}

impl Stranger {
    /// Whether it is still there, and has not been admitted.
    fn is_one(&self) -> bool {
        !self.peer.is_admitted() && !self.leave.is_closed()
    }
}

/// One of the connections that are open.
#[derive(Debug)]
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests;
