//! What the data path has done, for whoever looks for a good moment to cut: counters and one time, no lock.
//!
//! A write costs three additions or maxima of atomics in one cache line of their own and one look at the clock; a read
//! costs nothing. A write counts before it enters an epoch, so that a count taken after a flip holds every write of
//! the epoch that was closed.

use std::{
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    time::{Duration, Instant},
};

use capture_core::coherence::Seen;

/// The counters of one volume. The alignment keeps them out of other data's cache lines.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Activity {
    opened: Instant,
    begun: AtomicU64,
    ended: AtomicU64,
    /// All writes up to this number were followed by a completed flush.
    flushed: AtomicU64,
    /// When the last write ended, in microseconds since `opened`; 0 before the first one.
    last_write_us: AtomicU64,
}

/// One look at the counters.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    begun: u64,
    in_flight: bool,
    flushed: bool,
    last_write: Instant,
}

impl Sample {
    /// With times since a moment of somebody else's.
    #[must_use]
    pub fn since(self, origin: Instant) -> Seen {
        Seen {
            begun: self.begun,
            in_flight: self.in_flight,
            flushed: self.flushed,
            last_write: Some(self.last_write.saturating_duration_since(origin)),
            unseen: false,
        }
    }
}

/// A write under way; it ends where this is dropped, whatever became of it.
#[derive(Debug)]
pub(super) struct Writing<'a>(&'a Activity);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let now = u64::try_from(self.0.opened.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.0.last_write_us.fetch_max(now, SeqCst);
        self.0.ended.fetch_add(1, SeqCst);
    }
}

impl Writing<'_> {
    /// A flush is about to be made as part of this write, after its data: as [`Activity::flush_begins`].
    pub(super) fn flush_begins(&self) -> Flushing {
        self.0.flush_after(1)
    }
}

/// What a flush that has begun will have covered when it has succeeded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flushing(Option<u64>);

impl Activity {
    pub(super) fn new() -> Self {
        Self {
            opened: Instant::now(),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            last_write_us: AtomicU64::new(0),
        }
    }

    /// Before the write enters its epoch.
    pub(super) fn write_begins(&self) -> Writing<'_> {
        self.begun.fetch_add(1, SeqCst);
        Writing(self)
    }

    /// A flush covers what had ended when it began; with writes under way there is no boundary.
    pub(super) fn flush_begins(&self) -> Flushing {
        self.flush_after(0)
    }

    fn flush_after(&self, own: u64) -> Flushing {
        // In this order: if they agree, none was under way at the moment between.
        let ended = self.ended.load(SeqCst);
        let begun = self.begun.load(SeqCst);
        Flushing((ended + own == begun).then_some(begun))
    }

    pub(super) fn flush_succeeded(&self, flushing: Flushing) {
        if let Flushing(Some(begun)) = flushing {
            self.flushed.fetch_max(begun, SeqCst);
        }
    }

    pub(super) fn sample(&self) -> Sample {
        let ended = self.ended.load(SeqCst);
        let begun = self.begun.load(SeqCst);
        let last_write = Duration::from_micros(self.last_write_us.load(SeqCst));
        Sample {
            begun,
            in_flight: ended != begun,
            // Where nothing was written since the opening, whether the last write before it was flushed isn't known.
            flushed: begun > 0 && self.flushed.load(SeqCst) >= begun,
            last_write: self.opened + last_write,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(activity: &Activity) -> (u64, bool, bool) {
        let sample = activity.sample();
        (sample.begun, sample.in_flight, sample.flushed)
    }

    #[test]
    fn only_a_flush_that_began_after_the_end_of_every_write_is_a_boundary() {
        let activity = Activity::new();
        assert_eq!(state(&activity), (0, false, false));
        let first = activity.write_begins();
        assert_eq!(state(&activity), (1, true, false));
        let early = activity.flush_begins();
        drop(first);
        activity.flush_succeeded(early);
        assert_eq!(state(&activity), (1, false, false), "it began too early");
        let flushing = activity.flush_begins();
        assert_eq!(state(&activity), (1, false, false), "it has not ended");
        activity.flush_succeeded(flushing);
        assert_eq!(state(&activity), (1, false, true));
        let flushing = activity.flush_begins();
        let second = activity.write_begins();
        activity.flush_succeeded(flushing);
        assert_eq!(state(&activity), (2, true, false), "a write since");
        let third = activity.write_begins();
        let with_second = second.flush_begins();
        drop(third);
        activity.flush_succeeded(with_second);
        assert_eq!(state(&activity), (3, true, false), "another was under way");
        let with_second = second.flush_begins();
        activity.flush_succeeded(with_second);
        drop(second);
        assert_eq!(
            state(&activity),
            (3, false, true),
            "a write that is its own flush"
        );
    }

    #[test]
    fn the_last_write_is_the_one_that_ended_last() {
        let origin = Instant::now();
        let activity = Activity::new();
        let opened = activity.sample().since(origin).last_write;
        drop(activity.write_begins());
        let first = activity.sample().since(origin).last_write;
        assert!(first >= opened);
        let later = activity.sample().since(origin + Duration::from_secs(60));
        assert_eq!(later.last_write, Some(Duration::ZERO));
    }
}
