//! What has come over a stream, as its trace tells it.

use std::time::Duration;

use tidemark_telemetry::{SpanExt, step};
use tracing::Span;
use vault_core::segment::SealedSegment;

/// Parts of a stream whose puts are spans of their own.
const PUTS_SEEN_MAX: u64 = 64;

/// Frames that were verified, and parts that they were gathered in.
#[derive(Debug, Default)]
pub(super) struct Verified {
    frames: u64,
    bytes: u64,
    time: Duration,
    parts: u64,
}

impl Verified {
    /// A batch was verified, in so much time.
    pub(super) fn add(&mut self, frames: usize, bytes: usize, time: Duration) {
        self.frames += frames as u64;
        self.bytes += bytes as u64;
        self.time += time;
    }

    /// A part is put: the span of that, for the first ones.
    pub(super) fn put(&mut self, sealed: &SealedSegment) -> Span {
        self.parts += 1;
        if self.parts > PUTS_SEEN_MAX {
            return Span::none();
        }
        let span = step!("put segment");
        span.count("part", sealed.footer.record.id.part.into());
        span.count("bytes", sealed.bytes.len() as u64);
        span
    }

    /// Says all of it, of the span of the whole.
    pub(super) fn tell(&self, span: &Span) {
        span.count("frames", self.frames);
        span.count("bytes", self.bytes);
        span.count("parts", self.parts);
        let busy = u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX);
        span.count("busy_ms", busy);
    }
}
