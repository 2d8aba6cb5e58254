//! Whether to compress: only while the link, not the processor, is the bottleneck.
//!
//! Whoever encodes measures how long it worked on a batch and how long it then waited for room on the link. Mostly
//! waiting means that something behind is the bottleneck; hardly waiting means that the processor is, and that
//! compression would slow the interval down. What is behind may be the vault's disk or processor as well as the link,
//! and at a rate that a core hardly compresses at it is not the link that is helped: two services on one machine took
//! 17.6 s for an image of 4.6 GiB compressed, and 11.1 s raw.

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

/// Follows the time spent waiting for the link, and its rate.
#[derive(Debug, Clone)]
pub struct CodecPolicy {
    rule: CodecRule,
    compress: bool,
    recent: Recent,
}

/// Sums over batches, of which each weighs less than the one after it.
#[derive(Debug, Clone, Default)]
struct Recent {
    /// Seconds.
    whole: f64,
    /// Seconds of it that were spent waiting.
    waited: f64,
    /// Encoded bytes.
    sent: f64,
}

/// What the sums keep of their value with each batch.
const KEPT: f64 = 0.9;
/// Compress above this share of waiting.
const LINK_BOUND: f64 = 0.5;
/// Stop compressing below this one.
const PROCESSOR_BOUND: f64 = 0.05;
/// Bytes a second from which on compression doesn't begin: a third of what one core compresses.
const FAST_LINK: f64 = 128.0 * 1_048_576.0;

impl CodecPolicy {
    /// Begins without compression, unless the rule says otherwise.
    #[must_use]
    pub fn new(rule: CodecRule) -> Self {
        Self {
            rule,
            compress: rule == CodecRule::Zstd,
            recent: Recent::default(),
        }
    }

    /// Whether the next frames are to be compressed.
    #[must_use]
    pub const fn compress(&self) -> bool {
        self.compress
    }

    /// Takes note of one batch of so many encoded bytes: time spent on it, and time waited for room on the link.
    pub fn batch(&mut self, encoded_bytes: usize, worked: Duration, waited: Duration) {
        let whole = worked + waited;
        if self.rule != CodecRule::Auto || whole.is_zero() {
            return;
        }
        let recent = &mut self.recent;
        recent.whole = recent.whole * KEPT + whole.as_secs_f64();
        recent.waited = recent.waited * KEPT + waited.as_secs_f64();
        #[allow(clippy::cast_precision_loss, reason = "a rate")]
        {
            recent.sent = recent.sent * KEPT + encoded_bytes as f64;
        }
        let share = recent.waited / recent.whole;
        self.compress = if self.compress {
            share >= PROCESSOR_BOUND
        } else {
            share > LINK_BOUND && recent.sent / recent.whole < FAST_LINK
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    const BATCH: usize = 1 << 20;

    fn after(policy: &mut CodecPolicy, count: u32, worked: Duration, waited: Duration) -> bool {
        for _ in 0..count {
            policy.batch(BATCH, worked, waited);
        }
        policy.compress()
    }

    #[test]
    fn compression_follows_the_bottleneck() {
        let mut policy = CodecPolicy::new(CodecRule::Auto);
        assert!(!policy.compress());
        let raw = !after(&mut policy, 10, MS, Duration::ZERO);
        assert!(raw, "a link that is never waited for gets raw frames");
        assert!(
            after(&mut policy, 10, MS, 20 * MS),
            "a slow one gets compressed ones"
        );
        assert!(
            after(&mut policy, 10, 5 * MS, MS),
            "a little waiting keeps them"
        );
        assert!(!after(&mut policy, 60, 5 * MS, Duration::ZERO));
    }

    /// 1 MiB in 4 ms is 250 MiB/s: whatever is waited for, a core that compresses would be waited for as well.
    #[test]
    fn a_fast_link_gets_raw_frames_even_where_it_is_waited_for() {
        let mut policy = CodecPolicy::new(CodecRule::Auto);
        assert!(!after(&mut policy, 50, MS, 3 * MS));
        assert!(after(&mut policy, 10, MS, 30 * MS));
    }

    #[test]
    fn a_rule_is_kept_whatever_is_measured() {
        for (rule, compress) in [(CodecRule::Raw, false), (CodecRule::Zstd, true)] {
            let mut policy = CodecPolicy::new(rule);
            for (worked, waited) in [(0, 9), (9, 0), (0, 0)] {
                assert_eq!(after(&mut policy, 1, worked * MS, waited * MS), compress);
            }
        }
    }
}
