//! Failures of the layers below, as callers of the RPCs meet them: one place says which reason each has.

use tidemark_block::VolumeId;
use tidemark_proto::{Reason, RpcError};
use vault_core::{ingest::IngestError, manifest::TermError};

use crate::store::StoreError;

/// A store's failure. `StoreCorrupt` is logged where it is made, because a human must look.
pub(crate) fn of_store(error: &StoreError) -> RpcError {
    let message = error.to_string();
    match error {
        StoreError::Full(_) => full(message),
        StoreError::Missing(_) | StoreError::Corrupt { .. } => {
            tracing::error!(%error, "stored object is damaged");
            RpcError::new(
                Reason::StoreCorrupt,
                message,
                "restore another generation, and look at the store's disk; the next interval that changes these blocks mends the newest image",
            )
        }
        StoreError::Exists(_) | StoreError::Failed { .. } => RpcError::new(
            Reason::StoreUnavailable,
            message,
            "try again; if it stays, look at the vault's log and its store",
        ),
    }
}

pub(crate) fn full(message: String) -> RpcError {
    RpcError::new(
        Reason::StoreFull,
        message,
        "free space at the vault's store, or retain fewer generations, then it goes on by itself",
    )
}

pub(crate) fn of_ingest(error: &IngestError) -> RpcError {
    let message = error.to_string();
    let (reason, action) = match error {
        IngestError::Fenced { .. } => (
            Reason::Fenced,
            "another writer owns the volume: stop this one, or take over explicitly",
        ),
        IngestError::BaseNotHead { .. } => (
            Reason::BaseNotHead,
            "ask for a term again and compare with the head it names",
        ),
        IngestError::Geometry { .. } => (
            Reason::GeometryMismatch,
            "give the volume its old size, or add it as a new volume",
        ),
        IngestError::Conflict(_) => (
            Reason::IntervalConflict,
            "give the interval up and cut a new one",
        ),
        IngestError::Watermark { .. } | IngestError::OutOfOrder { .. } => (
            Reason::OutOfOrder,
            "send frames and watermarks in ascending order",
        ),
        IngestError::TooLarge(..) => (Reason::RequestInvalid, "send smaller batches"),
        IngestError::Count { .. } => (
            Reason::RequestInvalid,
            "the seal must count the whole interval",
        ),
        IngestError::Empty => (
            Reason::RequestInvalid,
            "use MarkCurrent where nothing has changed",
        ),
        IngestError::DigestMismatch { .. } => (
            Reason::DigestMismatch,
            "compare the checksum table with the vault's, then cut a new interval",
        ),
        IngestError::TooManyGenerations => (Reason::LimitReached, "retain fewer generations"),
    };
    RpcError::new(reason, message, action)
}

pub(crate) fn of_term(error: &TermError, volume: VolumeId) -> RpcError {
    let message = format!("volume {volume}: {error}");
    match error {
        TermError::Fenced { .. } => RpcError::new(
            Reason::Fenced,
            message,
            "another writer owns the volume: stop this one, or take over explicitly",
        ),
        TermError::Geometry { .. } => RpcError::new(
            Reason::GeometryMismatch,
            message,
            "give the volume its old size, or add it as a new volume",
        ),
        TermError::Unknown(_) => RpcError::new(
            Reason::VolumeNotFound,
            message,
            "check that this is the vault that has the volume; to begin anew here, add it as a new volume",
        ),
    }
}

/// A local file failed: the checksum table or the state directory.
pub(crate) fn of_io(what: &str, error: &std::io::Error) -> RpcError {
    use std::io::ErrorKind;
    if matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    ) {
        return full(format!("{what}: {error}"));
    }
    RpcError::new(
        Reason::IoFailed,
        format!("{what}: {error}"),
        "look at the disk of the vault's state directory",
    )
}

pub(crate) fn no_volume(name: &str) -> RpcError {
    RpcError::new(
        Reason::VolumeNotFound,
        format!("the vault has no volume {name:?}"),
        "list the vault's volumes",
    )
}
