//! The gRPC services: parse at the edge, hand over, answer.

mod ingest;
mod reader;
mod scrub;

use std::{sync::Arc, time::Duration};

use tidemark_proto::{
    RpcError,
    vault::v1::{ingest_server::IngestServer, vault_server::VaultServer},
};
use tokio::sync::watch;
use tonic::{Status, transport::Server};

use crate::vault::Vault;

/// The most bytes of a decoded message.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
const FRAME_BYTES: u32 = 1 << 20;
const WINDOW_BYTES_MIN: u64 = 16 << 20;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Calls of one connection at the same time.
const CALLS_PER_CONNECTION_MAX: u32 = 256;

/// The most bytes of a call's headers.
const HEADER_BYTES_MAX: u32 = 16 << 10;

/// Both services over one vault.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) vault: Arc<Vault>,
    /// Turns true when the service stops.
    pub(crate) stopping: watch::Receiver<bool>,
    /// Restores at the same time.
    pub(crate) restores: Arc<tokio::sync::Semaphore>,
}

/// A server with the settings of `docs/PROTOCOL.md`.
pub(crate) fn builder(bytes_in_flight_max: u64) -> Server {
    let window = (bytes_in_flight_max / 4 * 5).max(WINDOW_BYTES_MIN);
    let window = u32::try_from(window).unwrap_or(u32::MAX).min((1 << 31) - 1);
    Server::builder()
        .initial_stream_window_size(window)
        .initial_connection_window_size(window)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(CALLS_PER_CONNECTION_MAX)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

impl Service {
    pub(crate) fn ingest(&self) -> IngestServer<Self> {
        IngestServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(crate) fn reader(&self) -> VaultServer<Self> {
        VaultServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }
}

/// Runs a call to its end even if its caller goes away: what it does to a manifest is not to be left half done.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, RpcError>> + Send + 'static,
) -> Result<T, Status> {
    tokio::spawn(work)
        .await
        .map_err(|_| Status::from(RpcError::internal("a call failed")))?
        .map_err(Status::from)
}

fn stopping() -> RpcError {
    RpcError::new(
        tidemark_proto::Reason::ShuttingDown,
        "the vault is stopping",
        "try again when it is back",
    )
}
