//! Receiving one interval: what is admitted, what a batch must look like, and what a commit needs.
//!
//! The state machine is handed verified frames only ([`tidemark_block::VerifiedFrame`] is the only type it takes), so
//! nothing unverified is ever stored or counted. It gathers frames into parts, knows the durable prefix, and computes the
//! digest of the image on the way, so that the seal finds it almost done. Every refusal leaves it, and the volume,
//! as they were.

mod commit;
mod error;
mod interval;

use tidemark_block::{IntervalHeader, Receipt, Sequence};

pub use commit::{CLOCK_AHEAD_MAX_MS, Finished, believed_cut_time};
pub use error::{BatchError, IngestError};
pub use interval::{DurablePrefix, Interval, Overlay};

use crate::{manifest::Manifest, segment::ENTRIES_MAX};

/// The most bytes of a batch's frames.
pub const BATCH_BYTES_MAX: usize = 2 << 20;
/// The most runs of adjacent blocks in a batch: bounds what it adds to an index.
pub const BATCH_EXTENTS_MAX: usize = ENTRIES_MAX / 2;
/// What a header leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// The interval is committed: this is its receipt.
    Committed(Receipt),
    /// Go on; its blocks get this sequence.
    Open(Sequence),
}

/// Decides on a header.
///
/// # Errors
/// The term is stale, the base isn't the head, or the volume has another shape.
pub fn admit(manifest: &Manifest, header: &IntervalHeader) -> Result<Admission, IngestError> {
    if header.geometry != manifest.geometry {
        return Err(IngestError::Geometry {
            known: manifest.geometry,
            found: header.geometry,
        });
    }
    if header.term != manifest.term {
        return Err(IngestError::Fenced {
            found: header.term,
            current: manifest.term,
        });
    }
    if let Some(recent) = manifest.committed(header.interval) {
        if recent.epoch != header.epoch {
            return Err(IngestError::Conflict("epoch"));
        }
        return Ok(Admission::Committed(recent.receipt(manifest.volume)));
    }
    if header.base != manifest.head_id() {
        return Err(IngestError::BaseNotHead {
            found: header.base,
            head: manifest.head_id(),
        });
    }
    if manifest.generations.len() >= crate::manifest::GENERATIONS_MAX {
        return Err(IngestError::TooManyGenerations);
    }
    Ok(Admission::Open(Sequence::new(
        manifest.next_generation.get(),
    )))
}
