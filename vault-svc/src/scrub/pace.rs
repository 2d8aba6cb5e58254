//! How fast a scrub reads: spread over its period, and never above a rate.

use std::time::Duration;

use tokio::time::Instant;

/// The pace of a pass.
#[derive(Debug)]
pub(crate) struct Pace {
    begun: Instant,
    /// The whole pass takes at least so long.
    period: Duration,
    bytes_total: u64,
    bytes_per_second_max: f64,
    bytes: u64,
    /// When the bytes read so far are due at the greatest rate.
    due: Instant,
}

impl Pace {
    /// A pass over `bytes_total` in `period`, if `bytes_per_second_max` allows it.
    pub(crate) fn over(period: Duration, bytes_total: u64, bytes_per_second_max: u64) -> Self {
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
        Self::over(Duration::ZERO, 0, u64::MAX)
    }

    /// So many bytes were read: waits until they are due at the greatest rate.
    pub(crate) async fn spent(&mut self, bytes: u64) {
        tokio::time::sleep_until(self.due_after(Instant::now(), bytes)).await;
    }

    fn due_after(&mut self, now: Instant, bytes: u64) -> Instant {
        self.bytes += bytes;
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
        if self.bytes_total == 0 {
            return self.begun;
        }
        #[allow(clippy::cast_precision_loss, reason = "a share")]
        let share = (self.bytes as f64 / self.bytes_total as f64).min(1.0);
        self.begun + self.period.mul_f64(share)
    }

    /// Waits for the end of the period, at least a second.
    pub(crate) async fn rest(&self) {
        let end = self.begun + self.period;
        tokio::time::sleep_until(end.max(Instant::now() + Duration::from_secs(1))).await;
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
            now = now.max(pace.due_after(now, bytes));
            now = now.max(pace.due_between());
        }
        now.duration_since(begun).as_secs()
    }

    #[test]
    fn a_pass_is_spread_over_its_period_and_stays_below_the_greatest_rate() {
        let over = |seconds| Pace::over(Duration::from_secs(seconds), 1000, 50);
        assert_eq!(takes(over(100), 10, 100), 100, "spread");
        assert_eq!(takes(over(10), 10, 100), 20, "the rate rules");
        assert_eq!(takes(Pace::unbounded(), 10, 1 << 40), 0, "unbounded");
    }
}
