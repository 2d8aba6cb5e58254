//! Whether requests are worth handing over before they are performed.
//!
//! A hand-over lets the next request be received while this one blocks; where requests are quick, or come one at a time,
//! it only costs. So slow device calls are remembered as long as they kept others waiting, and quick ones forget them.
//! None of the numbers is exact among threads, and none needs to be.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// A device call of at least this long is a slow one. Handing a request to another thread costs some 10 µs.
const SLOW: Duration = Duration::from_micros(100);
/// The slowness that one call adds at most, and that is remembered at most, in µs. A machine that is busy elsewhere
/// makes a call look slow now and then; that must not matter for long.
const SLOWNESS_STEP_MAX: u32 = 500;
const SLOWNESS_MAX: u32 = 2_000;
/// What a quick call takes off: about what a hand-over costs, so that both sides of the bargain weigh the same.
const DECAY_QUICK: u32 = 2;
/// What a slow call takes off that kept nobody waiting.
const DECAY_ALONE: u32 = 50;

#[derive(Debug, Default)]
pub(crate) struct Pace {
    slowness: AtomicU32,
    performing: AtomicU32,
    more: AtomicBool,
}

impl Pace {
    /// Whether to hand over before performing.
    pub(crate) fn is_slow(&self) -> bool {
        self.slowness.load(Ordering::Relaxed) > 0
    }

    /// A request begins; `more`: another one has arrived already.
    pub(crate) fn begin(&self, more: bool) {
        self.performing.fetch_add(1, Ordering::Relaxed);
        if self.more.load(Ordering::Relaxed) != more {
            self.more.store(more, Ordering::Relaxed);
        }
    }

    pub(crate) fn end(&self) {
        self.performing.fetch_sub(1, Ordering::Relaxed);
    }

    /// A device call took so long. `arrived` looks whether another request has arrived meanwhile.
    pub(crate) fn note(&self, took: Duration, arrived: impl FnOnce() -> bool) {
        let before = self.slowness.load(Ordering::Relaxed);
        let after = if took < SLOW {
            before.saturating_sub(DECAY_QUICK)
        } else if self.performing.load(Ordering::Relaxed) > 1
            || self.more.load(Ordering::Relaxed)
            || arrived()
        {
            let step = u32::try_from(took.as_micros())
                .unwrap_or(u32::MAX)
                .min(SLOWNESS_STEP_MAX);
            (before + step).min(SLOWNESS_MAX)
        } else {
            before.saturating_sub(DECAY_ALONE)
        };
        if after != before {
            self.slowness.store(after, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(5);
    const BLOCKED: Duration = Duration::from_millis(2);

    #[test]
    fn slow_calls_that_keep_others_waiting_lead_to_hand_overs_until_quick_ones_outweigh_them() {
        let pace = Pace::default();
        pace.begin(true);
        pace.note(BLOCKED, || false);
        assert!(pace.is_slow());
        for _ in 0..SLOWNESS_STEP_MAX / DECAY_QUICK {
            assert!(pace.is_slow());
            pace.note(QUICK, || true);
        }
        assert!(!pace.is_slow());
    }

    #[test]
    fn slow_calls_one_at_a_time_are_not_handed_over() {
        let pace = Pace::default();
        for _ in 0..100 {
            pace.begin(false);
            pace.note(BLOCKED, || false);
            pace.end();
            assert!(!pace.is_slow());
        }
    }
}
