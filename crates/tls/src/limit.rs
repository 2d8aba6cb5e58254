//! Refusals are logged, but whoever is refused doesn't decide how much.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// So many lines in each period.
const LINES_MAX: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Counted {
    since: Instant,
    lines: u32,
    left_out: u64,
}

/// Bounds how often something is logged.
#[derive(Debug)]
pub(crate) struct LogLimit(Mutex<Counted>);

impl Default for LogLimit {
    fn default() -> Self {
        Self(Mutex::new(Counted {
            since: Instant::now(),
            lines: 0,
            left_out: 0,
        }))
    }
}

impl LogLimit {
    /// Whether to log now, and how many lines have been left out since the last one.
    pub(crate) fn take(&self, now: Instant) -> Option<u64> {
        let mut counted = self.0.lock();
        if now.saturating_duration_since(counted.since) >= PERIOD {
            counted.since = now;
            counted.lines = 0;
        }
        if counted.lines == LINES_MAX {
            counted.left_out += 1;
            return None;
        }
        counted.lines += 1;
        Some(std::mem::take(&mut counted.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_left_out_past_the_limit_and_counted() {
        let limit = LogLimit::default();
        let now = Instant::now();
        for _ in 0..LINES_MAX {
            assert_eq!(limit.take(now), Some(0));
        }
        assert_eq!((limit.take(now), limit.take(now)), (None, None));
        assert_eq!(limit.take(now + PERIOD), Some(2));
        assert_eq!(limit.take(now + PERIOD), Some(0));
    }
}
