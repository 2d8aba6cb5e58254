//! Why a command failed: what happened, what to do, and the exit code that scripts see.

use std::{fmt, io::Write, process::ExitCode};

use serde_json::json;
use tidemark_proto::{ErrorKind, Reason, RpcError};

/// Exit code of a command that was interrupted by a signal.
pub const INTERRUPTED: u8 = 130;

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    kind: Kind,
    reason: &'static str,
    message: String,
    action: String,
}

/// The coarse kind of a failure, one per exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 1: none of the others.
    Failed,
    /// 2: the request cannot be right.
    Usage,
    /// 3: what was named is not there.
    NotFound,
    /// 4: it does not fit the present state.
    Conflict,
    /// 4: another writer owns the volume.
    Fenced,
    /// 5: not reachable, or not now.
    Unavailable,
    /// 6: bytes do not match their checksums.
    Corrupt,
    /// 7: nobody knows who the caller is, or they may not.
    Denied,
    /// 130: a signal.
    Interrupted,
}

impl Kind {
    /// What a shell sees in `$?`.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict | Self::Fenced => 4,
            Self::Unavailable => 5,
            Self::Corrupt => 6,
            Self::Denied => 7,
            Self::Interrupted => INTERRUPTED,
        }
    }

    const fn of(exit_code: u8) -> Self {
        match exit_code {
            2 => Self::Usage,
            3 => Self::NotFound,
            4 => Self::Conflict,
            5 => Self::Unavailable,
            6 => Self::Corrupt,
            INTERRUPTED => Self::Interrupted,
            _ => Self::Failed,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Fenced => "fenced",
            Self::Unavailable => "unavailable",
            Self::Corrupt => "corrupt",
            Self::Denied => "denied",
            Self::Interrupted => "interrupted",
        }
    }
}

impl From<ErrorKind> for Kind {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Invalid => Self::Usage,
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::Conflict => Self::Conflict,
            ErrorKind::Fenced => Self::Fenced,
            ErrorKind::Unavailable | ErrorKind::Exhausted => Self::Unavailable,
            ErrorKind::Corrupt => Self::Corrupt,
            ErrorKind::Unauthenticated | ErrorKind::Denied => Self::Denied,
            ErrorKind::Internal => Self::Failed,
        }
    }
}

impl Failure {
    /// `reason` is stable, upper snake case; `message` says what happened to which object, `action` what to do.
    pub fn new(
        kind: Kind,
        reason: &'static str,
        message: impl Into<String>,
        action: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            reason,
            message: message.into(),
            action: action.into(),
        }
    }

    /// The failure of a file or folder of this machine; `doing` is what was tried, "write /srv/a.img".
    pub fn io(doing: impl fmt::Display, error: &std::io::Error) -> Self {
        Self::new(
            Kind::Failed,
            "IO_FAILED",
            format!("cannot {doing}: {error}"),
            "",
        )
    }

    /// Ended by SIGINT or SIGTERM.
    #[must_use]
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "INTERRUPTED", "interrupted", "")
    }

    /// A service sent what this release cannot make sense of.
    pub fn protocol(what: impl fmt::Display) -> Self {
        Self::new(
            Kind::Failed,
            "PROTOCOL",
            format!("the service's answer makes no sense: {what}"),
            "run the same release of the command and of the services",
        )
    }

    /// Another process has told it already, and ended with this code.
    pub(crate) const fn told(exit_code: u8) -> Self {
        Self {
            kind: Kind::of(exit_code),
            reason: "TOLD",
            message: String::new(),
            action: String::new(),
        }
    }

    /// Decides the exit code.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Stable, upper snake case.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        self.reason
    }

    /// What happened.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Another text for what to do, where the command knows better than the service.
    #[must_use]
    pub fn with_action(mut self, action: impl Into<String>) -> Self {
        self.action = action.into();
        self
    }

    /// Tells people, or with `json` programs, on standard error; gives the exit code.
    #[must_use]
    pub fn report(&self, json: bool) -> ExitCode {
        // Where standard error is closed nobody is left to tell.
        let _ = if self.message.is_empty() {
            Ok(())
        } else if json {
            writeln!(std::io::stderr(), "{}", self.to_json())
        } else {
            writeln!(std::io::stderr(), "{self}")
        };
        ExitCode::from(self.kind.exit_code())
    }

    /// One object on one line.
    #[must_use]
    pub fn to_json(&self) -> String {
        json!({ "error": {
            "kind": self.kind.as_str(),
            "reason": self.reason,
            "message": self.message,
            "action": self.action,
            "exit_code": self.kind.exit_code(),
        }})
        .to_string()
    }
}

/// Bytes do not match their checksums; nothing was kept.
pub fn corrupt(message: impl Into<String>) -> Failure {
    Failure::new(
        Kind::Corrupt,
        "VERIFICATION_FAILED",
        message,
        "try again; where it happens again, look at the service's log: stored data or memory is damaged",
    )
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        if !self.action.is_empty() {
            write!(f, "\n  → {}", self.action)?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

impl From<RpcError> for Failure {
    fn from(error: RpcError) -> Self {
        Self::new(
            error.kind.into(),
            error.reason.as_str(),
            error.message,
            error.action,
        )
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        RpcError::from_status(&status).into()
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<RpcError>() {
            Ok(rpc) => rpc.into(),
            Err(error) => Self::new(
                Kind::Failed,
                Reason::Internal.as_str(),
                format!("{error:#}"),
                "",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_rpc_error_has_its_exit_code() {
        for (kind, code) in [
            (ErrorKind::Internal, 1),
            (ErrorKind::Invalid, 2),
            (ErrorKind::NotFound, 3),
            (ErrorKind::Conflict, 4),
            (ErrorKind::Fenced, 4),
            (ErrorKind::Unavailable, 5),
            (ErrorKind::Exhausted, 5),
            (ErrorKind::Corrupt, 6),
            (ErrorKind::Unauthenticated, 7),
            (ErrorKind::Denied, 7),
        ] {
            assert_eq!(Kind::from(kind).exit_code(), code, "{kind:?}");
        }
    }

    #[test]
    fn what_another_process_has_told_ends_with_its_code() {
        for code in [1, 2, 3, 4, 5, 6, INTERRUPTED] {
            assert_eq!(Failure::told(code).kind().exit_code(), code);
        }
    }

    #[test]
    fn an_error_says_what_happened_and_what_to_do() {
        let failure = Failure::from(RpcError::new(
            Reason::VolumeNotFound,
            "there is no volume \"dta\"",
            "list the volumes",
        ));
        insta::assert_snapshot!(failure, @r#"
        error: there is no volume "dta"
          → list the volumes
        "#);
        insta::assert_snapshot!(
            failure.to_json(),
            @r#"{"error":{"action":"list the volumes","exit_code":3,"kind":"not_found","message":"there is no volume \"dta\"","reason":"VOLUME_NOT_FOUND"}}"#
        );
    }

    #[test]
    fn an_error_without_anything_to_do_is_one_line() {
        let failure = Failure::io("write a.img", &std::io::Error::from_raw_os_error(28));
        assert_eq!(
            failure.to_string(),
            "error: cannot write a.img: No space left on device (os error 28)"
        );
    }
}
