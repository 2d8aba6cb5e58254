//! The connection to the vault.

use std::time::Duration;

use capture_core::uplink::Failure;
use tidemark_block::Receipt;
use tidemark_proto::{
    ErrorKind, Reason, RpcError,
    convert::{CurrentMark, TermGrant, TermRequest, WireError},
    vault::v1::ingest_client::IngestClient,
};
use tidemark_telemetry::Propagating;
use tidemark_tls::{Dialer, Line};
use tonic::transport::Endpoint;

/// The most bytes of a message, decoded.
const MESSAGE_LEN_MAX: usize = 4 << 20;
const CONNECT_MAX: Duration = Duration::from_secs(10);
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_MAX: Duration = Duration::from_secs(20);
/// The least window, in bytes.
const WINDOW_MIN: u32 = 16 << 20;
/// The longest a short call may take.
const CALL_MAX: Duration = Duration::from_secs(60);

/// The generated client; each call is part of the trace that it is made in.
pub(crate) type Client = IngestClient<Propagating<Line>>;

/// A client of the vault's Ingest service.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    client: Client,
}

impl Link {
    /// Connects.
    pub(crate) async fn connect(vault: &str, dialer: &Dialer) -> Result<Self, RpcError> {
        let tune = |endpoint: Endpoint| {
            endpoint
                .connect_timeout(CONNECT_MAX)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE_MAX)
                .keep_alive_while_idle(true)
                .initial_stream_window_size(WINDOW_MIN)
                .initial_connection_window_size(WINDOW_MIN)
        };
        let line = dialer.dial(vault, tune).await.map_err(|error| RpcError {
            message: format!("vault {vault}: {}", error.message),
            ..error
        })?;
        Ok(Self {
            client: IngestClient::new(Propagating::current(line))
                .max_decoding_message_size(MESSAGE_LEN_MAX)
                .max_encoding_message_size(MESSAGE_LEN_MAX),
        })
    }

    /// The generated client, for streams.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Asks for the writer term.
    pub(crate) async fn start_term(&self, request: TermRequest) -> Result<TermGrant, RpcError> {
        let mut client = self.client();
        let answer =
            within(client.start_term(tidemark_proto::vault::v1::StartTermRequest::from(request)))
                .await?;
        answer.into_inner().try_into().map_err(bad_answer)
    }

    /// Says that nothing has changed.
    pub(crate) async fn mark_current(&self, mark: CurrentMark) -> Result<Receipt, RpcError> {
        let mut client = self.client();
        let answer =
            within(client.mark_current(tidemark_proto::vault::v1::MarkCurrentRequest::from(mark)))
                .await?;
        answer.into_inner().try_into().map_err(bad_answer)
    }
}

async fn within<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, RpcError> {
    match tokio::time::timeout(CALL_MAX, call).await {
        Ok(answer) => answer.map_err(RpcError::from),
        Err(_) => Err(stalled()),
    }
}

/// The vault says nothing.
pub(crate) fn stalled() -> RpcError {
    RpcError::new(
        Reason::Unreachable,
        "the vault doesn't answer",
        "check the vault's log and the link",
    )
}

/// An answer that is none of ours.
pub(crate) fn bad_answer(error: WireError) -> RpcError {
    RpcError::new(
        Reason::Unknown,
        format!("the vault's answer makes no sense: {error}"),
        "check that the vault's version fits this one",
    )
}

/// What a failed call to the vault, other than StartTerm, means for the uplink. `FENCED` is not the last word then: a
/// vault that was put back from a copy doesn't know the term any more, and grants it again when it is asked for.
pub(crate) fn failure_of(error: &RpcError) -> Failure {
    match (error.kind, error.reason) {
        (_, Reason::DigestMismatch | Reason::FrameCorrupt) => Failure::Mismatch,
        (_, Reason::BaseNotHead) => Failure::HeadMoved,
        (
            ErrorKind::Unavailable
            | ErrorKind::Exhausted
            | ErrorKind::Fenced
            | ErrorKind::Unauthenticated
            | ErrorKind::Denied,
            _,
        )
        | (_, Reason::StoreCorrupt | Reason::GeometryMismatch | Reason::IoFailed) => {
            Failure::Transient
        }
        _ => Failure::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_meaning_for_the_uplink() {
        let meaning = |reason| failure_of(&RpcError::new(reason, "", ""));
        assert_eq!(meaning(Reason::BaseNotHead), Failure::HeadMoved);
        assert_eq!(meaning(Reason::DigestMismatch), Failure::Mismatch);
        assert_eq!(meaning(Reason::FrameCorrupt), Failure::Mismatch);
        assert_eq!(meaning(Reason::IntervalConflict), Failure::Refused);
        for reason in [
            Reason::Unreachable,
            Reason::StoreFull,
            Reason::StoreUnavailable,
            Reason::StoreCorrupt,
            Reason::Busy,
            Reason::ShuttingDown,
            Reason::LimitReached,
            Reason::Fenced,
            Reason::Unauthenticated,
            Reason::PermissionDenied,
            Reason::TlsRefused,
        ] {
            assert_eq!(meaning(reason), Failure::Transient, "{reason}");
        }
    }
}
