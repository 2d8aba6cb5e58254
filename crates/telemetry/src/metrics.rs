//! Metrics: what each one is, one reading of all of them, and the two ways in which a reading is told.
//!
//! A service names its families once, with [`families!`](crate::families), and fills a [`Reading`] whenever one is wanted:
//! for a scrape of its Prometheus endpoint and for each push by OTLP ([`Outlets`]). What it fills it with are the figures
//! that it keeps anyway, so nothing is counted twice, the data path pays nothing, and what is gone, as a volume that was
//! removed, is gone from the next reading, its histograms too.
//!
//! That is why this isn't made with the metrics of the OpenTelemetry SDK: there every instrument asks by itself, what a
//! histogram has once counted stays until the process ends, and exemplars are never taken (0.33).

mod calls;
mod common;
mod endpoint;
mod histogram;
mod otlp;
mod outlets;
mod text;

use std::{collections::BTreeMap, sync::Arc};

pub use calls::{Answer, CallCounts, Counted};
pub use common::{
    BUILD_INFO, CALLS, CERTIFICATE_NOT_AFTER, COMMON, CONNECTIONS, CONNECTIONS_REFUSED,
    PROCESS_START_TIME, Process,
};
use endpoint::{Bound, Endpoint};
pub use histogram::{Histogram, HistogramCounts, STAGE_SECONDS};
use otlp::Push;
pub use outlets::Outlets;
pub use text::Format;

/// What a family counts or measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What is so now.
    Gauge,
    /// What has come together since the service, or what the labels name, began.
    Counter,
    /// How often something took how long.
    Histogram,
}

/// What a family's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A count of what the name says.
    None,
    /// Seconds; of a point in time, since the Unix epoch.
    Seconds,
    /// Bytes.
    Bytes,
}

/// A metric with all its series.
#[derive(Debug)]
pub struct Family {
    /// As Prometheus has it, with unit and `_total`.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Of its numbers.
    pub unit: Unit,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// One line for people.
    pub help: &'static str,
}

/// Names the families of a service: a list (`/// what it is` and `pub LIST:`), then each of them, as `/// what it is` and
/// `NAME = "name", Kind, Unit, [label, …];`.
#[macro_export]
macro_rules! families {
    ($(#[$list_doc:meta])* $vis:vis $list:ident: $($(#[doc = $help:literal])+ $name:ident = $text:literal, $kind:ident, $unit:ident, [$($label:ident),*];)*) => {
        $(
            $(#[doc = $help])+
            $vis static $name: $crate::metrics::Family = $crate::metrics::Family {
                name: $text,
                kind: $crate::metrics::Kind::$kind,
                unit: $crate::metrics::Unit::$unit,
                labels: &[$(stringify!($label)),*],
                help: concat!($($help),+),
            };
        )*
        $(#[$list_doc])*
        $vis static $list: &[&$crate::metrics::Family] = &[$(&$name),*];
    };
}

/// A number of a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// A count.
    Count(u64),
    /// A measure.
    Measure(f64),
}

impl From<u64> for Number {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<f64> for Number {
    fn from(measure: f64) -> Self {
        Self::Measure(measure)
    }
}

impl From<bool> for Number {
    fn from(holds: bool) -> Self {
        Self::Count(holds.into())
    }
}

/// What a series holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Of a gauge or a counter.
    Number(Number),
    /// Of a histogram.
    Histogram(HistogramCounts),
}

/// One series at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// The labels' values, in the order of the family's names.
    pub labels: Vec<String>,
    /// What it holds.
    pub value: Value,
}

/// All families of a service at one moment.
#[derive(Debug)]
pub struct Reading(BTreeMap<&'static str, (&'static Family, Vec<Point>)>);

/// Takes a reading. It must not wait for a disk or a peer.
pub type Read = Arc<dyn Fn() -> Reading + Send + Sync>;

impl Reading {
    /// Of these families, without a series yet.
    #[must_use]
    pub fn of(lists: &[&'static [&'static Family]]) -> Self {
        let families = lists.iter().flat_map(|list| list.iter());
        Self(families.map(|f| (f.name, (*f, Vec::new()))).collect())
    }

    /// Adds a series; its labels in the family's order. Each combination once.
    ///
    /// # Panics
    /// The family isn't one of the reading's, or has other labels: a mistake of ours.
    pub fn add(&mut self, family: &'static Family, labels: &[&str], number: impl Into<Number>) {
        assert_ne!(family.kind, Kind::Histogram, "{}", family.name);
        self.push(family, labels, Value::Number(number.into()));
    }

    /// As [`Self::add`], of a histogram.
    ///
    /// # Panics
    /// As [`Self::add`].
    pub fn add_histogram(
        &mut self,
        family: &'static Family,
        labels: &[&str],
        histogram: &Histogram,
    ) {
        assert_eq!(family.kind, Kind::Histogram, "{}", family.name);
        self.push(family, labels, Value::Histogram(histogram.counts()));
    }

    fn push(&mut self, family: &'static Family, labels: &[&str], value: Value) {
        assert_eq!(labels.len(), family.labels.len(), "{}", family.name);
        let Some((_, points)) = self.0.get_mut(family.name) else {
            panic!("{} is in no list of families", family.name);
        };
        let labels = labels.iter().map(|&label| label.to_owned()).collect();
        points.push(Point { labels, value });
    }

    /// The families by name, each with its series.
    pub fn families(&self) -> impl Iterator<Item = (&'static Family, &[Point])> {
        self.0
            .values()
            .map(|(family, points)| (*family, &points[..]))
    }
}

/// Milliseconds since the Unix epoch, as seconds.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "a time to the millisecond")]
pub fn seconds_of_ms(ms: u64) -> f64 {
    ms as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::families! {
        /// Of the tests.
        LIST:
        /// Volumes that
        /// there are.
        VOLUMES = "test_volumes", Gauge, None, [source, volume];
    }

    #[test]
    fn a_family_has_the_help_and_labels_that_it_was_named_with() {
        assert_eq!(VOLUMES.help.trim(), "Volumes that there are.");
        assert_eq!(VOLUMES.labels, ["source", "volume"]);
        let mut reading = Reading::of(&[LIST]);
        reading.add(&VOLUMES, &["here", "data"], 1);
        let (family, points) = reading.families().next().unwrap();
        assert_eq!((family.name, points.len()), ("test_volumes", 1));
    }

    #[test]
    #[should_panic(expected = "test_volumes")]
    fn labels_that_are_missing_are_a_mistake_of_ours() {
        Reading::of(&[LIST]).add(&VOLUMES, &["here"], 1);
    }
}
