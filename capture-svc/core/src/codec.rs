//! Whether to compress: only while the link, not the processor, is the bottleneck.
//!
//! Whoever encodes measures how long it worked on a batch and how long it then waited for room on the link. Mostly
//! waiting means that the link is the bottleneck and compression is free; hardly waiting means that the processor is,
//! and that compression would slow the interval down.

use std::time::Duration;

/// What the configuration says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodecRule {
    /// By what is the bottleneck.
    Auto,
    /// Never compressed.
    Raw,
    /// Always compressed.
    Zstd,
}

/// Follows the share of time spent waiting for the link.
#[derive(Debug, Clone)]
pub struct CodecPolicy {
    rule: CodecRule,
    compress: bool,
    waiting: f64,
}

/// Weight of the newest batch.
const NEWEST: f64 = 0.3;
/// Compress above this share of waiting.
const LINK_BOUND: f64 = 0.5;
/// Stop compressing below this one.
const PROCESSOR_BOUND: f64 = 0.05;

impl CodecPolicy {
    /// Begins without compression, unless the rule says otherwise.
    #[must_use]
    pub const fn new(rule: CodecRule) -> Self {
        Self {
            rule,
            compress: matches!(rule, CodecRule::Zstd),
            waiting: 0.0,
        }
    }

    /// Whether the next frames are to be compressed.
    #[must_use]
    pub const fn compress(&self) -> bool {
        self.compress
    }

    /// Takes note of one batch: time spent on it, and time waited for room on the link.
    pub fn batch(&mut self, worked: Duration, waited: Duration) {
        let whole = worked + waited;
        if self.rule != CodecRule::Auto || whole.is_zero() {
            return;
        }
        let share = waited.as_secs_f64() / whole.as_secs_f64();
        self.waiting += (share - self.waiting) * NEWEST;
        if self.compress {
            self.compress = self.waiting >= PROCESSOR_BOUND;
        } else {
            self.compress = self.waiting > LINK_BOUND;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn compression_follows_the_bottleneck() {
        let mut policy = CodecPolicy::new(CodecRule::Auto);
        assert!(!policy.compress());
        for _ in 0..10 {
            policy.batch(MS, Duration::ZERO);
        }
        assert!(!policy.compress(), "a fast link gets raw frames");
        for _ in 0..10 {
            policy.batch(MS, 20 * MS);
        }
        assert!(policy.compress(), "a slow one gets compressed ones");
        for _ in 0..10 {
            policy.batch(5 * MS, MS);
        }
        assert!(policy.compress(), "a little waiting keeps them");
        for _ in 0..30 {
            policy.batch(5 * MS, Duration::ZERO);
        }
        assert!(!policy.compress());
    }

    #[test]
    fn a_rule_is_kept_whatever_is_measured() {
        for (rule, compress) in [(CodecRule::Raw, false), (CodecRule::Zstd, true)] {
            let mut policy = CodecPolicy::new(rule);
            for (worked, waited) in [(0, 9), (9, 0), (0, 0)] {
                policy.batch(worked * MS, waited * MS);
                assert_eq!(policy.compress(), compress);
            }
        }
    }
}
