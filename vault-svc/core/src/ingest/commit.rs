//! The manifest that a finished interval is committed by.

use tidemark_block::{ImageDigest, IntervalHeader, Sequence};

use super::{Admission, IngestError, Overlay, admit};
use crate::{
    manifest::{CutKind, Generation, Manifest, NewPage},
    segment::SegmentRecord,
};

/// How far a source's clock may be ahead of the vault's before its times are not believed.
pub const CLOCK_AHEAD_MAX_MS: u64 = 300_000;

/// A whole interval, verified and durable, with matching digests: what a commit names.
#[derive(Debug)]
pub struct Finished {
    /// As sent.
    pub header: IntervalHeader,
    /// Of its blocks.
    pub sequence: Sequence,
    /// Its segments, in order.
    pub segments: Vec<SegmentRecord>,
    /// Of the whole image.
    pub digest: ImageDigest,
    /// Blocks in all frames.
    pub changed_blocks: u64,
    /// Encoded bytes of all frames.
    pub frame_bytes: u64,
    /// For the table, where it was small enough to keep.
    pub overlay: Option<Overlay>,
}

/// The time of a cut as it is recorded at `now_ms`: a source whose clock is ahead must not make an image look more
/// recent than it can be.
#[must_use]
pub const fn believed_cut_time(cut_time_ms: u64, now_ms: u64) -> u64 {
    let latest = now_ms.saturating_add(CLOCK_AHEAD_MAX_MS);
    if cut_time_ms > latest {
        latest
    } else {
        cut_time_ms
    }
}

impl Finished {
    /// The manifest that commits it, and the pages to put before; `None` where it has become stale meanwhile.
    ///
    /// # Errors
    /// As [`admit`]: the term or the head has changed since.
    pub fn commit(
        &self,
        manifest: &Manifest,
        now_ms: u64,
    ) -> Result<(Manifest, Vec<NewPage>), IngestError> {
        match admit(manifest, &self.header)? {
            Admission::Open(sequence) if sequence == self.sequence => {}
            Admission::Open(_) | Admission::Committed(_) => {
                return Err(IngestError::BaseNotHead {
                    found: self.header.base,
                    head: manifest.head_id(),
                });
            }
        }
        let mut next = manifest.successor(now_ms);
        let older = manifest.head().map_or(0, |head| head.cut_time_ms);
        let generation = Generation {
            id: manifest.next_generation,
            parent: self.header.base,
            term: self.header.term,
            interval: self.header.interval,
            digest: self.digest,
            // Order is by number; a clock that was set back must not make it look otherwise.
            cut_time_ms: believed_cut_time(self.header.cut_time_ms, now_ms).max(older),
            committed_time_ms: next.written_ms,
            cut: CutKind {
                coherence: self.header.coherence,
                trigger: self.header.trigger,
            },
            reason: self.header.reason.clone(),
            changed_blocks: self.changed_blocks,
            frame_bytes: self.frame_bytes,
            epoch: self.header.epoch,
            length: self.header.geometry.length(),
        };
        let pages = next.push_generation(generation, self.segments.clone());
        Ok((next, pages))
    }
}
