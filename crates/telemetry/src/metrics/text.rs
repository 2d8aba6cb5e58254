//! A reading as text: in Prometheus' own format, or in OpenMetrics, which has room for exemplars.

use std::{
    fmt::{self, Write},
    time::UNIX_EPOCH,
};

use super::{
    Family, HistogramCounts, Kind, Number, Point, Reading, Unit, Value, histogram::Exemplar,
};

/// How a reading is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text, 0.0.4.
    Prometheus,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// What a client takes, by its header `accept`.
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// As the header `content-type` has it.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Writes a reading.
    #[must_use]
    pub fn write(self, reading: &Reading) -> String {
        let mut out = String::new();
        for (family, points) in reading.families() {
            self.family(&mut out, family, points)
                .unwrap_or_else(|_| unreachable!("a text takes all that is written to it"));
        }
        if self == Self::OpenMetrics {
            out.push_str("# EOF\n");
        }
        out
    }

    fn family(self, out: &mut String, family: &Family, points: &[Point]) -> fmt::Result {
        let (name, kind) = (family.name, family.kind);
        let shown = match self {
            Self::OpenMetrics => name.strip_suffix("_total").unwrap_or(name),
            Self::Prometheus => name,
        };
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram => "histogram",
        };
        let help = Escaped {
            text: family.help.trim(),
            quotes: self == Self::OpenMetrics,
        };
        writeln!(out, "# HELP {shown} {help}")?;
        writeln!(out, "# TYPE {shown} {kind}")?;
        let unit = match family.unit {
            Unit::None => None,
            Unit::Seconds => Some("seconds"),
            Unit::Bytes => Some("bytes"),
        };
        if let (Self::OpenMetrics, Some(unit)) = (self, unit) {
            writeln!(out, "# UNIT {shown} {unit}")?;
        }
        for point in points {
            match &point.value {
                Value::Number(number) => {
                    out.push_str(name);
                    labels(out, family, point, None)?;
                    writeln!(out, " {number}")?;
                }
                Value::Histogram(counts) => self.histogram(out, family, point, counts)?,
            }
        }
        Ok(())
    }

    fn histogram(
        self,
        out: &mut String,
        family: &Family,
        point: &Point,
        counts: &HistogramCounts,
    ) -> fmt::Result {
        let name = family.name;
        let mut below = 0;
        let bounds = counts.bounds.iter().copied().chain([f64::INFINITY]);
        for ((bound, count), exemplar) in bounds.zip(&counts.buckets).zip(&counts.exemplars) {
            below += count;
            write!(out, "{name}_bucket")?;
            labels(out, family, point, Some(bound))?;
            write!(out, " {below}")?;
            if let (Self::OpenMetrics, Some(exemplar)) = (self, exemplar) {
                write!(out, "{exemplar}")?;
            }
            out.push('\n');
        }
        for (suffix, number) in [
            ("_sum", Number::Measure(counts.sum)),
            ("_count", Number::Count(below)),
        ] {
            write!(out, "{name}{suffix}")?;
            labels(out, family, point, None)?;
            writeln!(out, " {number}")?;
        }
        Ok(())
    }
}

fn labels(out: &mut String, family: &Family, point: &Point, bound: Option<f64>) -> fmt::Result {
    let mut separator = '{';
    for (name, value) in family.labels.iter().zip(&point.labels) {
        let value = Escaped {
            text: value,
            quotes: true,
        };
        write!(out, "{separator}{name}=\"{value}\"")?;
        separator = ',';
    }
    if let Some(bound) = bound {
        write!(out, "{separator}le=\"{}\"", Number::Measure(bound))?;
        separator = ',';
    }
    if separator == ',' {
        out.push('}');
    }
    Ok(())
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Measure(measure) if measure == f64::INFINITY => f.write_str("+Inf"),
            Self::Measure(measure) => write!(f, "{measure:?}"),
        }
    }
}

impl fmt::Display for Exemplar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trace, span, value, ..
        } = self;
        let at = self.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = at.as_secs_f64();
        write!(
            f,
            " # {{trace_id=\"{trace}\",span_id=\"{span}\"}} {value:?} {at:.3}"
        )
    }
}

/// A text between quotes, or behind `# HELP`, where Prometheus' own format leaves quotes as they are.
struct Escaped<'a> {
    text: &'a str,
    quotes: bool,
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.text.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' if self.quotes => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use opentelemetry::trace::{SpanId, TraceId};

    use super::*;
    use crate::metrics::Histogram;

    crate::families! {
        /// Of the tests.
        LIST:
        /// Bytes that were "sent".
        SENT = "test_sent_bytes_total", Counter, Bytes, [volume];
        /// How long it took.
        TOOK = "test_took_seconds", Histogram, Seconds, [stage];
        /// How many there are.
        THERE = "test_there", Gauge, None, [];
    }

    fn reading() -> Reading {
        let mut reading = Reading::of(&[LIST]);
        reading.add(&SENT, &["a\"b\\c\nd"], u64::MAX);
        reading.add(&SENT, &["data"], 0);
        reading.add(&THERE, &[], 0.25);
        let histogram = Histogram::new(&[0.5, 1.0]);
        histogram.record(Duration::from_millis(250));
        histogram.record(Duration::from_secs(7));
        let mut counts = histogram.counts();
        counts.exemplars[2] = Some(Exemplar {
            trace: TraceId::from(7),
            span: SpanId::from(9),
            value: 7.0,
            at: UNIX_EPOCH + Duration::from_millis(1_500),
        });
        reading.push(&TOOK, &["ship"], Value::Histogram(counts));
        reading
    }

    #[test]
    fn prometheus_text() {
        insta::assert_snapshot!(Format::Prometheus.write(&reading()));
    }

    #[test]
    fn open_metrics_with_an_exemplar() {
        insta::assert_snapshot!(Format::OpenMetrics.write(&reading()));
    }

    #[test]
    fn the_format_is_the_one_that_is_accepted() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert_eq!(Format::accepted(prometheus), Format::OpenMetrics);
        for other in ["", "*/*", "text/plain"] {
            assert_eq!(Format::accepted(other), Format::Prometheus);
        }
    }
}
