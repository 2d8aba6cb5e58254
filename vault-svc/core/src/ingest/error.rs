//! Why an interval is refused.

use thiserror::Error;
use tidemark_block::{BlockIndex, Extent, GenerationId, Geometry, ImageDigest, WriterTerm};

/// Why an interval, or a part of it, is refused. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IngestError {
    /// Another writer owns the volume.
    #[error("term {found} is not the current one: {current} is")]
    Fenced {
        /// The header's.
        found: WriterTerm,
        /// The current one.
        current: WriterTerm,
    },
    /// The interval changes another generation than the newest.
    #[error("the interval's base is generation {found}, the newest is {head}")]
    BaseNotHead {
        /// The header's.
        found: GenerationId,
        /// The newest.
        head: GenerationId,
    },
    /// The volume has another shape.
    #[error("the vault knows the volume as {known}, the interval is of {found}")]
    Geometry {
        /// At the vault.
        known: Geometry,
        /// In the header.
        found: Geometry,
    },
    /// Its id is known with another header.
    #[error("the interval's id is known with another {0}")]
    Conflict(&'static str),
    /// A batch's end doesn't rise, or lies behind the volume's.
    #[error("a batch ends at block {found}, the one before it at {last}")]
    Watermark {
        /// Of the batch.
        found: BlockIndex,
        /// Of the one before it.
        last: BlockIndex,
    },
    /// A frame's blocks are not behind those before them, or not within their batch.
    #[error("block {block} is not in the range {range} that is next")]
    OutOfOrder {
        /// The block.
        block: BlockIndex,
        /// Where it should be.
        range: Extent,
    },
    /// The seal counts other blocks or frames than were received.
    #[error("the seal counts {sealed} {what}, {received} were received")]
    Count {
        /// Blocks or frames.
        what: &'static str,
        /// By the seal.
        sealed: u64,
        /// Received.
        received: u64,
    },
    /// A batch is too large.
    #[error("a batch has at most {0} {1}")]
    TooLarge(usize, &'static str),
    /// Nothing was changed: that is told by MarkCurrent.
    #[error("an interval without changes makes no generation")]
    Empty,
    /// Both sides computed different digests.
    #[error("the source computed image digest {source_digest}, the vault {vault_digest}")]
    DigestMismatch {
        /// In the seal.
        source_digest: ImageDigest,
        /// From table and frames.
        vault_digest: ImageDigest,
    },
    /// The volume has as many generations as a manifest holds.
    #[error("the volume has too many generations")]
    TooManyGenerations,
}

/// A refusal, or a table that can't be read.
#[derive(Debug, Error)]
pub enum BatchError<E> {
    /// The peer's fault.
    #[error(transparent)]
    Refused(#[from] IngestError),
    /// Ours.
    #[error("the checksum table can't be read")]
    Table(E),
}
