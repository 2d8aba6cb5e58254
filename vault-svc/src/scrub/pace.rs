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
        self.bytes += bytes;
        #[allow(clippy::cast_precision_loss, reason = "a rate")]
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second_max);
        // What was not used is not made up for.
        self.due = self.due.max(Instant::now()) + takes;
        tokio::time::sleep_until(self.due).await;
    }

    /// Between two objects, when nothing is held: waits until this much of the period has passed.
    pub(crate) async fn between(&mut self) {
        if self.bytes_total == 0 {
            return;
        }
        #[allow(clippy::cast_precision_loss, reason = "a share")]
        let share = (self.bytes as f64 / self.bytes_total as f64).min(1.0);
        tokio::time::sleep_until(self.begun + self.period.mul_f64(share)).await;
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

    #[tokio::test(start_paused = true)]
    async fn a_pass_is_spread_over_its_period_and_stays_below_the_greatest_rate() {
        let began = Instant::now();
        let mut pace = Pace::over(Duration::from_secs(100), 1000, 50);
        for _ in 0..10 {
            pace.spent(50).await;
            pace.spent(50).await;
            pace.between().await;
        }
        assert_eq!(began.elapsed().as_secs(), 100, "spread");
        let began = Instant::now();
        let mut pace = Pace::over(Duration::from_secs(10), 1000, 50);
        for _ in 0..10 {
            pace.spent(100).await;
            pace.between().await;
        }
        assert_eq!(began.elapsed().as_secs(), 20, "the rate rules");
        let began = Instant::now();
        let mut pace = Pace::unbounded();
        pace.spent(1 << 40).await;
        pace.between().await;
        assert_eq!(began.elapsed().as_secs(), 0, "unbounded");
    }
}
