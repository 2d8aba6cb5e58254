//! How often something took how long, with the traces of some of it.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanId, TraceContextExt, TraceId};
use parking_lot::Mutex;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Upper bounds for what takes from a millisecond to an hour, in seconds.
pub const STAGE_SECONDS: &[f64] = &[
    0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
];

/// One of those that were counted, and the trace that tells of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exemplar {
    /// Its trace.
    pub trace: TraceId,
    /// The span in which it was counted.
    pub span: SpanId,
    /// Seconds.
    pub value: f64,
    /// When it was counted.
    pub at: SystemTime,
}

/// What a histogram has counted.
#[derive(Debug, Clone, PartialEq)]
pub struct HistogramCounts {
    /// Upper bounds in seconds, ascending.
    pub bounds: &'static [f64],
    /// How many lay at or below each bound and above the one before; the last is above all.
    pub buckets: Vec<u64>,
    /// The newest of each bucket that was traced.
    pub exemplars: Vec<Option<Exemplar>>,
    /// Seconds of all together.
    pub sum: f64,
}

impl HistogramCounts {
    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// Counts how long something takes. Counting takes a lock for a moment: it is for what happens a few times a second.
#[derive(Debug)]
pub struct Histogram(Mutex<HistogramCounts>);

impl Histogram {
    /// With upper bounds in seconds, ascending.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        Self(Mutex::new(HistogramCounts {
            bounds,
            buckets: vec![0; bounds.len() + 1],
            exemplars: vec![None; bounds.len() + 1],
            sum: 0.0,
        }))
    }

    /// Counts one; with its trace, if the current span is of one that is sampled.
    pub fn record(&self, took: Duration) {
        let context = tracing::Span::current().context();
        let span = context.span().span_context().clone();
        let value = took.as_secs_f64();
        let exemplar = span.is_sampled().then(|| Exemplar {
            trace: span.trace_id(),
            span: span.span_id(),
            value,
            at: SystemTime::now(),
        });
        let mut counts = self.0.lock();
        let bucket = counts.bounds.partition_point(|bound| *bound < value);
        counts.buckets[bucket] += 1;
        counts.sum += value;
        if exemplar.is_some() {
            counts.exemplars[bucket] = exemplar;
        }
    }

    /// What it has counted so far.
    #[must_use]
    pub fn counts(&self) -> HistogramCounts {
        self.0.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_the_bucket_below_it() {
        let histogram = Histogram::new(&[0.5, 1.0]);
        for ms in [0, 500, 501, 1000, 1001, 60_000] {
            histogram.record(Duration::from_millis(ms));
        }
        let counts = histogram.counts();
        assert_eq!(counts.buckets, [2, 2, 2]);
        assert_eq!((counts.count(), counts.sum), (6, 63.002));
        assert!(counts.exemplars.iter().all(Option::is_none), "no trace");
    }
}
