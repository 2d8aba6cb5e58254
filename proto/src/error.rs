//! Errors of both services as they cross the wire: a coarse kind, a stable reason, what happened and what to do.
//!
//! The kind decides the gRPC code; the reason and the action travel as an encoded
//! [`ErrorDetail`] in the status details. `docs/PROTOCOL.md` lists every reason; a
//! test holds the two together. A peer's reason that this build doesn't know becomes [`Reason::Unknown`], with the
//! kind that its gRPC code stands for.

use std::fmt;

use bytes::Bytes;
use prost::Message;
use tonic::{Code, Status};

use crate::common::v1::ErrorDetail;

/// What sort of failure it is: decides what a caller does without knowing the reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request can't be right; sending it again won't help.
    Invalid,
    /// What the request names isn't there.
    NotFound,
    /// The request doesn't fit the present state; look at the state, then decide.
    Conflict,
    /// Another writer owns the volume: stop, until somebody decides.
    Fenced,
    /// Not now: try again later, with backoff.
    Unavailable,
    /// A limit or a store is full: try again after room has been made.
    Exhausted,
    /// Bytes don't match their checksums.
    Corrupt,
    /// Nobody knows who the caller is: show a certificate or a token that the service knows.
    Unauthenticated,
    /// The caller is known, and may not: ask whoever looks after the service.
    Denied,
    /// Our own fault; a human must look.
    Internal,
}

impl ErrorKind {
    /// The gRPC code that stands for it.
    #[must_use]
    pub const fn code(self) -> Code {
        match self {
            Self::Invalid => Code::InvalidArgument,
            Self::NotFound => Code::NotFound,
            Self::Conflict | Self::Fenced => Code::FailedPrecondition,
            Self::Unavailable => Code::Unavailable,
            Self::Exhausted => Code::ResourceExhausted,
            Self::Corrupt => Code::DataLoss,
            Self::Unauthenticated => Code::Unauthenticated,
            Self::Denied => Code::PermissionDenied,
            Self::Internal => Code::Internal,
        }
    }

    /// The kind of a status that carries no detail: it was made by the transport, or by a proxy.
    const fn of_bare(code: Code) -> Self {
        match code {
            Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => Self::Invalid,
            Code::NotFound => Self::NotFound,
            Code::FailedPrecondition | Code::AlreadyExists => Self::Conflict,
            Code::Unauthenticated => Self::Unauthenticated,
            Code::PermissionDenied => Self::Denied,
            Code::ResourceExhausted => Self::Exhausted,
            Code::DataLoss => Self::Corrupt,
            // A broken connection surfaces as any of these.
            Code::Ok
            | Code::Unavailable
            | Code::Unknown
            | Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Internal => Self::Unavailable,
        }
    }

    /// Whether the same request may succeed later without anything being decided.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Unavailable | Self::Exhausted)
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $kind:ident;)*) => {
        /// Why a call failed: stable, scripts may rely on it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// Every reason there is.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// As it is on the wire: upper snake case.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What sort of failure it always is.
            #[must_use]
            pub const fn kind(self) -> ErrorKind {
                match self { $(Self::$name => ErrorKind::$kind,)* }
            }
        }
    };
}

reasons! {
    /// A field of the request is missing or out of range.
    RequestInvalid = "REQUEST_INVALID", Invalid;
    /// A volume's name isn't 1 to 63 of `[a-z0-9._-]`, starting with a letter or digit.
    VolumeNameInvalid = "VOLUME_NAME_INVALID", Invalid;
    /// A length or block size that no volume can have.
    GeometryInvalid = "GEOMETRY_INVALID", Invalid;
    /// The volume's file is missing, no regular file, not readable and writable, or of another length.
    VolumeFileInvalid = "VOLUME_FILE_INVALID", Invalid;
    /// No volume has this name or UUID.
    VolumeNotFound = "VOLUME_NOT_FOUND", NotFound;
    /// Several volumes have this name: the UUID says which.
    VolumeAmbiguous = "VOLUME_AMBIGUOUS", Invalid;
    /// A volume with this name, or over this file, is already there.
    VolumeExists = "VOLUME_EXISTS", Conflict;
    /// Another process owns the volume's file.
    VolumeFileInUse = "VOLUME_FILE_IN_USE", Conflict;
    /// The volume is listed, but doesn't serve; its `problem` says why.
    VolumeFailed = "VOLUME_FAILED", Conflict;
    /// Clients are connected, or snapshots are open.
    VolumeInUse = "VOLUME_IN_USE", Conflict;
    /// The engine can't be used with the volume's file, or can't do what was asked of it.
    EngineUnsupported = "ENGINE_UNSUPPORTED", Invalid;
    /// No snapshot of the volume has this number.
    SnapshotNotFound = "SNAPSHOT_NOT_FOUND", NotFound;
    /// The snapshot was broken: the spool had no room for its before-images.
    SnapshotLost = "SNAPSHOT_LOST", Conflict;
    /// The volume has as many snapshots as it may have.
    SnapshotLimit = "SNAPSHOT_LIMIT", Exhausted;
    /// The spool has no room for what must be kept; nothing was changed.
    SpoolTooSmall = "SPOOL_TOO_SMALL", Exhausted;
    /// No retained generation of the volume has this number.
    GenerationNotFound = "GENERATION_NOT_FOUND", NotFound;
    /// Another writer took the volume over: the term is no longer the current one.
    Fenced = "FENCED", Fenced;
    /// The vault knows the volume with another length or block size.
    GeometryMismatch = "GEOMETRY_MISMATCH", Conflict;
    /// The interval's base isn't the vault's newest generation.
    BaseNotHead = "BASE_NOT_HEAD", Conflict;
    /// Source and vault computed different image digests: nothing was committed.
    DigestMismatch = "DIGEST_MISMATCH", Corrupt;
    /// The interval's id is known with another header.
    IntervalConflict = "INTERVAL_CONFLICT", Conflict;
    /// Messages of a stream in the wrong order, or blocks not ascending.
    OutOfOrder = "OUT_OF_ORDER", Invalid;
    /// A frame doesn't match its checksums.
    FrameCorrupt = "FRAME_CORRUPT", Corrupt;
    /// A stored object doesn't match its checksums.
    StoreCorrupt = "STORE_CORRUPT", Corrupt;
    /// The store can't be reached or answers with errors.
    StoreUnavailable = "STORE_UNAVAILABLE", Unavailable;
    /// The store, the spool or a disk has no room.
    StoreFull = "STORE_FULL", Exhausted;
    /// A configured limit on volumes, streams or requests is reached.
    LimitReached = "LIMIT_REACHED", Exhausted;
    /// The interval was given up before it was committed; its blocks are in the next one.
    IntervalGivenUp = "INTERVAL_GIVEN_UP", Unavailable;
    /// Another request on the same object is under way.
    Busy = "BUSY", Unavailable;
    /// The service is stopping.
    ShuttingDown = "SHUTTING_DOWN", Unavailable;
    /// The workload could not be quiesced, and by its policy nothing is cut then.
    NotQuiesced = "NOT_QUIESCED", Unavailable;
    /// Who calls is not known: no certificate or token, or none that the service knows.
    Unauthenticated = "UNAUTHENTICATED", Unauthenticated;
    /// The caller's roles, or its volumes, don't cover what was asked for.
    PermissionDenied = "PERMISSION_DENIED", Denied;
    /// One side doesn't take the certificate of the other: out of date, of another CA, for another name.
    TlsRefused = "TLS_REFUSED", Unavailable;
    /// Plain text would leave the machine, and is not allowed to.
    PlainTextRefused = "PLAIN_TEXT_REFUSED", Invalid;
    /// The request didn't arrive, or wasn't answered, or its answer wasn't taken in time.
    TooSlow = "TOO_SLOW", Unavailable;
    /// The peer can't be reached, or the connection broke.
    Unreachable = "UNREACHABLE", Unavailable;
    /// The failure of a disk or a file.
    IoFailed = "IO_FAILED", Internal;
    /// Our own fault.
    Internal = "INTERNAL", Internal;
    /// A reason that this build doesn't know.
    Unknown = "UNKNOWN", Internal;
}

impl Reason {
    /// The reason with this text on the wire.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|r| r.as_str() == text)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failed call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// What sort of failure it is. Follows from the reason, save for [`Reason::Unknown`] from a peer.
    pub kind: ErrorKind,
    /// Stable.
    pub reason: Reason,
    /// What happened, to which object.
    pub message: String,
    /// What the caller can do about it, one sentence; may be empty.
    pub action: String,
}

impl RpcError {
    /// `message` says what happened to which object, `action` what the caller can do.
    pub fn new(reason: Reason, message: impl Into<String>, action: impl Into<String>) -> Self {
        Self {
            kind: reason.kind(),
            reason,
            message: message.into(),
            action: action.into(),
        }
    }

    /// A field of a request that is missing or out of range.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(
            Reason::RequestInvalid,
            message,
            "correct the request; docs/PROTOCOL.md describes its fields",
        )
    }

    /// Our own fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(
            Reason::Internal,
            message,
            "see the log of the service and report it",
        )
    }

    /// What a status received from a peer, or made by the transport, stands for.
    #[must_use]
    pub fn from_status(status: &Status) -> Self {
        let detail = ErrorDetail::decode(status.details())
            .ok()
            .filter(|detail| !detail.reason.is_empty());
        let message = status.message().to_owned();
        match detail {
            Some(detail) => match Reason::from_text(&detail.reason) {
                Some(reason) => Self::new(reason, message, detail.action),
                None => Self {
                    kind: ErrorKind::of_bare(status.code()),
                    reason: Reason::Unknown,
                    message: format!("{message} ({})", detail.reason),
                    action: detail.action,
                },
            },
            None => Self::bare(status, message),
        }
    }

    fn bare(status: &Status, message: String) -> Self {
        if let Some(refused) = tls_refused(status) {
            return refused;
        }
        let kind = ErrorKind::of_bare(status.code());
        let message = if message.is_empty() {
            status.code().description().to_owned()
        } else {
            message
        };
        match kind {
            ErrorKind::Unavailable => Self::new(
                Reason::Unreachable,
                format!("the peer can't be reached: {message}"),
                "check that the service runs and that its address is right",
            ),
            kind => Self {
                kind,
                reason: Reason::Unknown,
                message,
                action: String::new(),
            },
        }
    }
}

impl From<RpcError> for Status {
    fn from(error: RpcError) -> Self {
        let detail = ErrorDetail {
            reason: error.reason.as_str().to_owned(),
            action: error.action,
        };
        Status::with_details(
            error.kind.code(),
            error.message,
            Bytes::from(detail.encode_to_vec()),
        )
    }
}

impl From<Status> for RpcError {
    fn from(status: Status) -> Self {
        Self::from_status(&status)
    }
}

/// What the text of an error begins with that says why TLS has failed. HTTP/2 keeps nothing of an error but its text.
pub const TLS_REFUSED_MARK: &str = "TLS is refused: ";

/// That one side refuses the certificate of the other, where that is why.
fn tls_refused(error: &(dyn std::error::Error + 'static)) -> Option<RpcError> {
    // The deepest text is it: those around it quote it.
    let (mut next, mut told) = (Some(error), None);
    while let Some(error) = next {
        let text = error.to_string();
        told = text
            .find(TLS_REFUSED_MARK)
            .map(|at| text[at..].to_owned())
            .or(told);
        next = error.source();
    }
    told.map(|told| {
        RpcError::new(
            Reason::TlsRefused,
            told,
            "give that side a certificate that is valid, of a CA that the other side trusts, and for its name: docs/SECURITY.md",
        )
    })
}

impl From<tonic::transport::Error> for RpcError {
    fn from(error: tonic::transport::Error) -> Self {
        if let Some(refused) = tls_refused(&error) {
            return refused;
        }
        // The outermost text is only "transport error"; the cause says what.
        let mut message = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            message = cause.to_string();
            source = cause.source();
        }
        Self::new(
            Reason::Unreachable,
            format!("the peer can't be reached: {message}"),
            "check that the service runs and that its address is right",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_wire() {
        for &reason in Reason::ALL {
            let error = RpcError::new(reason, "what happened", "what to do");
            let status = Status::from(error.clone());
            assert_eq!(status.code(), reason.kind().code());
            assert_eq!(RpcError::from_status(&status), error);
        }
    }

    #[test]
    fn a_status_of_the_transport_is_unreachable() {
        for code in [
            Code::Unavailable,
            Code::Unknown,
            Code::Cancelled,
            Code::Internal,
        ] {
            let error = RpcError::from_status(&Status::new(code, "h2 broke"));
            assert_eq!(
                (error.kind, error.reason),
                (ErrorKind::Unavailable, Reason::Unreachable)
            );
            assert!(error.message.contains("h2 broke"));
        }
        let error = RpcError::from_status(&Status::unimplemented("no such method"));
        assert_eq!(
            (error.kind, error.reason),
            (ErrorKind::Invalid, Reason::Unknown)
        );
    }

    #[test]
    fn what_tls_says_is_the_reason_however_deep_it_lies() {
        let text = format!("{TLS_REFUSED_MARK}the peer says: our certificate is no longer valid");
        let io = std::io::Error::other(text.clone());
        let mut status = Status::unknown("transport error");
        status.set_source(std::sync::Arc::new(io));
        let error = RpcError::from_status(&status);
        assert_eq!(error.reason, Reason::TlsRefused);
        assert_eq!(error.message, text);
        assert!(error.kind.is_transient());
    }

    #[test]
    fn a_reason_of_a_newer_peer_keeps_its_kind_and_its_text() {
        let detail = ErrorDetail {
            reason: "MOON_PHASE".into(),
            action: "wait".into(),
        };
        let status = Status::with_details(
            Code::ResourceExhausted,
            "not tonight",
            detail.encode_to_vec().into(),
        );
        let error = RpcError::from_status(&status);
        assert_eq!(
            (error.kind, error.reason),
            (ErrorKind::Exhausted, Reason::Unknown)
        );
        assert!(error.message.contains("MOON_PHASE"));
        assert_eq!(error.action, "wait");
    }

    #[test]
    fn every_reason_is_documented() {
        let page = include_str!("../../docs/PROTOCOL.md");
        let rows: Vec<(&str, &str)> = page
            .lines()
            .skip_while(|line| !line.starts_with("| reason | kind"))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `")?.split(" | ");
                Some((cells.next()?.trim_end_matches('`'), cells.next()?))
            })
            .collect();
        let coded: Vec<_> = Reason::ALL
            .iter()
            .map(|r| (r.as_str(), format!("{:?}", r.kind())))
            .collect();
        let coded: Vec<_> = coded.iter().map(|(r, k)| (*r, k.as_str())).collect();
        assert_eq!(rows, coded);
    }

    #[test]
    fn reasons_are_upper_snake_case_and_distinct() {
        let mut seen = std::collections::HashSet::new();
        for reason in Reason::ALL {
            let text = reason.as_str();
            assert!(
                text.bytes().all(|c| c.is_ascii_uppercase() || c == b'_'),
                "{text}"
            );
            assert!(seen.insert(text), "{text}");
        }
    }
}
