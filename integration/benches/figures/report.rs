//! The lines of the report.

use std::time::{Duration, Instant};

use serde_json::json;

/// What a figure is held to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// Printed for what it tells.
    None,
}

impl Bound {
    fn holds(self, value: f64) -> Option<bool> {
        match self {
            Self::AtMost(bound) => Some(value <= bound),
            Self::AtLeast(bound) => Some(value >= bound),
            Self::None => None,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Report {
    json: bool,
    missed: Vec<String>,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        println!(
            "{:<58} {:>12} {:>12} {:>8}  held to",
            "figure", "ours", "peer", "ratio"
        );
        Self {
            json,
            missed: Vec::new(),
        }
    }

    pub(crate) fn section(&mut self, name: &str) {
        println!("\n{name}");
    }

    /// `ours / peer` against its bound; both in `unit`.
    pub(crate) fn ratio(&mut self, what: &str, unit: &str, ours: f64, peer: f64, bound: Bound) {
        let ratio = ours / peer;
        self.line(what, unit, ours, Some(peer), ratio, "x", bound);
    }

    /// A figure that needs no peer.
    pub(crate) fn alone(&mut self, what: &str, unit: &str, ours: f64, bound: Bound) {
        self.line(what, unit, ours, None, ours, unit, bound);
    }

    #[allow(clippy::too_many_arguments, reason = "the columns of a line")]
    fn line(
        &mut self,
        what: &str,
        unit: &str,
        ours: f64,
        peer: Option<f64>,
        judged: f64,
        judged_unit: &str,
        bound: Bound,
    ) {
        let holds = bound.holds(judged);
        let held = match (bound, holds) {
            (Bound::AtMost(b), Some(ok)) => format!("<= {b} {judged_unit} {}", verdict(ok)),
            (Bound::AtLeast(b), Some(ok)) => format!(">= {b} {judged_unit} {}", verdict(ok)),
            _ => String::new(),
        };
        let number = |value: f64| format!("{value:.*} {unit}", if value < 100.0 { 2 } else { 0 });
        println!(
            "{what:<58} {:>12} {:>12} {:>8}  {held}",
            number(ours),
            peer.map(number).unwrap_or_default(),
            peer.map(|_| format!("{judged:.2}x")).unwrap_or_default(),
        );
        if self.json {
            println!(
                "{}",
                json!({"figure": what, "unit": unit, "ours": ours, "peer": peer, "judged": judged, "held": holds})
            );
        }
        if holds == Some(false) {
            self.missed.push(what.to_owned());
        }
    }

    pub(crate) fn close(self) {
        println!();
        if self.missed.is_empty() {
            println!("every bound held");
        } else {
            println!("missed: {}", self.missed.join("; "));
        }
    }
}

fn verdict(ok: bool) -> &'static str {
    if ok { "held" } else { "MISSED" }
}

/// The middle one, or the mean of the two middle ones, of at least one value.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

/// Milliseconds that `work` takes, and what it gives.
pub(crate) fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(f64, T)> {
    let begun = Instant::now();
    let value = work()?;
    Ok((millis(begun.elapsed()), value))
}

pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
