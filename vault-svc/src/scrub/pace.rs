//! How fast a scrub reads: spread over its period, and never above a rate.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// The pace of a pass.
#[derive(Debug)]
pub(crate) struct Pace {
    begun: Instant,
    /// The whole pass takes at least so long.
    period: Duration,
    /// Bytes of all segments: the rest of the period is for what has come since the pass began, too.
    bytes_total: Arc<AtomicU64>,
    bytes_per_second_max: f64,
    bytes: u64,
    /// When the bytes read so far are due at the greatest rate.
    due: Instant,
}

impl Pace {
    /// A pass over `bytes_total`, whatever they come to be, in `period`, if `bytes_per_second_max` allows it.
    pub(crate) fn over(
        period: Duration,
        bytes_total: Arc<AtomicU64>,
        bytes_per_second_max: u64,
    ) -> Self {
        let now = Instant::now();
        Self {
            begun: now,
            period,
            bytes_total,
            #[allow(clippy::cast_precision_loss, reason = "a rate")]
            bytes_per_second_max: bytes_per_second_max.max(1) as f64,
            bytes: 0,
            due: now,
        }
    }

    /// As fast as the store gives.
    pub(crate) fn unbounded() -> Self {
        Self::over(Duration::ZERO, Arc::default(), u64::MAX)
    }

    /// So many bytes of segments were read: waits until they are due at the greatest rate.
    pub(crate) async fn spent(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.spent_beside(bytes).await;
    }

    /// So many bytes of what is no segment were read: waits until they are due at the greatest rate.
    pub(crate) async fn spent_beside(&mut self, bytes: u64) {
        tokio::time::sleep_until(self.due_after(Instant::now(), bytes)).await;
    }

    fn due_after(&mut self, now: Instant, bytes: u64) -> Instant {
        #[allow(clippy::cast_precision_loss, reason = "a rate")]
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second_max);
        // What was not used is not made up for.
        self.due = self.due.max(now) + takes;
        self.due
    }

    /// Between two objects, when nothing is held: waits until this much of the period has passed.
    pub(crate) async fn between(&mut self) {
        tokio::time::sleep_until(self.due_between()).await;
    }

    fn due_between(&self) -> Instant {
        let bytes_total = self.bytes_total.load(Ordering::Relaxed);
        if bytes_total == 0 {
            return self.begun;
        }
        #[allow(clippy::cast_precision_loss, reason = "a share")]
        let share = (self.bytes as f64 / bytes_total as f64).min(1.0);
        self.begun + self.period.mul_f64(share)
    }

    /// The end of the period, or in a second where that is later: passes over nothing don't chase each other.
    pub(crate) fn end(&self) -> Instant {
        let soon = Instant::now() + Duration::from_secs(1);
        soon.max(self.begun + self.period)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads so many times so much, as fast as it may; seconds that it takes.
    fn takes(mut pace: Pace, times: u32, bytes: u64) -> u64 {
        let begun = pace.begun;
        let mut now = begun;
        for _ in 0..times {
            pace.bytes += bytes;
            now = now.max(pace.due_after(now, bytes));
            now = now.max(pace.due_between());
        }
        now.duration_since(begun).as_secs()
    }

    #[test]
    fn a_pass_is_spread_over_its_period_and_stays_below_the_greatest_rate() {
        let total = || Arc::new(AtomicU64::new(1000));
        let over = |seconds| Pace::over(Duration::from_secs(seconds), total(), 50);
        assert_eq!(takes(over(100), 10, 100), 100, "spread");
        assert_eq!(takes(over(10), 10, 100), 20, "the rate rules");
        assert_eq!(takes(Pace::unbounded(), 10, 1 << 40), 0, "unbounded");
    }

    #[test]
    fn what_comes_during_a_pass_has_its_share_of_the_period() {
        let total = Arc::new(AtomicU64::new(1000));
        let mut pace = Pace::over(Duration::from_secs(100), Arc::clone(&total), u64::MAX);
        let due = |pace: &Pace| pace.due_between().duration_since(pace.begun).as_secs();
        pace.bytes = 500;
        assert_eq!(due(&pace), 50);
        total.store(2000, Ordering::Relaxed);
        pace.bytes = 1000;
        assert_eq!(due(&pace), 50, "the other half is for what has come");
        pace.bytes = 3000;
        assert_eq!(due(&pace), 100);
    }
}
