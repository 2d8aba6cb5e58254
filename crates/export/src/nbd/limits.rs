//! What one client, and all together, may use of the server. `docs/NBD.md` states these numbers and is tested.

use std::time::Duration;

/// The longest payload of one read or write, in bytes. Told to clients as the maximum block size.
pub const REQUEST_PAYLOAD_MAX: u32 = 32 << 20;

/// The longest data of an option that is read, in bytes; a longer one is answered `NBD_REP_ERR_TOO_BIG`.
pub const OPTION_LENGTH_MAX: u32 = 64 << 10;

/// The longest data of an option that is skipped, in bytes; a client that announces more is disconnected.
pub const OPTION_SKIP_MAX: u32 = 1 << 20;

/// Options in one handshake; a client that sends more is disconnected.
pub const OPTIONS_MAX: u32 = 1024;

/// Bytes of a connection's receive buffer: several small requests arrive by one system call.
pub const RECEIVE_BUFFER_BYTES: usize = 64 << 10;

/// Bytes of the buffer that each thread of a connection owns; larger payloads use the pool of large buffers.
pub const THREAD_BUFFER_BYTES: usize = 64 << 10;

/// Bytes of one large buffer. A longer payload passes through in pieces of this size.
pub const LARGE_BUFFER_BYTES: usize = 1 << 20;

/// Large buffers kept for reuse while nobody needs them.
pub const LARGE_BUFFERS_KEPT: usize = 8;

/// Descriptors in one reply to `BLOCK_STATUS`.
pub const STATUS_EXTENTS_MAX: usize = 4096;

/// Reads of at least this many bytes ask the device for holes first, so that holes are sent as holes.
pub const HOLE_READ_MIN: u32 = 64 << 10;

/// How long a TCP client may be silent before its host is asked whether it is still there.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// How long such a question waits for its answer.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Questions without an answer after which the client is disconnected.
pub const KEEPALIVE_PROBES: u32 = 3;

/// Configurable limits of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time, over all listeners, handshakes included. Further ones are closed at once.
    pub connections_max: usize,
    /// Requests of one connection that are performed at a time, each on a thread of its own (1 to 64).
    pub requests_in_flight_max: usize,
    /// Large buffers of [`LARGE_BUFFER_BYTES`] in use at a time, over all connections. When none is left, payloads pass
    /// in pieces of [`THREAD_BUFFER_BYTES`] instead: slower, never stuck.
    pub large_buffers_max: usize,
    /// The whole handshake must end within this time.
    pub handshake_timeout: Duration,
    /// A client that has begun a request must send more of it within this time. (Between requests it may idle for ever.)
    pub receive_timeout: Duration,
    /// A client must take some of what is sent to it within this time.
    pub send_timeout: Duration,
    /// An extra thread of a connection ends after having had nothing to do for this long.
    pub thread_idle_timeout: Duration,
    /// How long a connection whose requests come one by one, and quickly, looks for the next one before it sleeps (at
    /// most 1 ms makes sense). Zero: not at all. It lowers latency on a machine with a processor to spare, and costs that
    /// processor.
    pub spin_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 256,
            requests_in_flight_max: 8,
            large_buffers_max: 64,
            handshake_timeout: Duration::from_secs(10),
            receive_timeout: Duration::from_secs(30),
            send_timeout: Duration::from_secs(30),
            thread_idle_timeout: Duration::from_secs(10),
            spin_max: Duration::ZERO,
        }
    }
}
