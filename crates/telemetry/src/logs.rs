//! The log: lines on standard error, for people or for collectors.
//!
//! A line names its level, its target and the spans it lies in; in the JSON format also the service, for collectors that
//! see several. Where it lies in a trace it carries the trace's id, in the JSON format the span's too.

mod ids;
mod writer;

use std::{fmt, io::IsTerminal, str::FromStr};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer,
    fmt::{MakeWriter, format},
    registry::LookupSpan,
};

pub(crate) use writer::Lines;

use crate::traces::{REQUEST, TRACED};
use ids::{Identified, Known, WithoutMarks};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people: one line per event, coloured on a terminal.
    #[default]
    Text,
    /// For collectors: one JSON object per line.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl FromStr for LogFormat {
    type Err = UnknownLogFormat;

    fn from_str(text: &str) -> Result<Self, UnknownLogFormat> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(UnknownLogFormat(other.to_owned())),
        }
    }
}

/// A log format that is neither `text` nor `json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownLogFormat(String);

impl fmt::Display for UnknownLogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown log format \"{}\": use text or json", self.0)
    }
}

impl std::error::Error for UnknownLogFormat {}

/// A log filter that can't be parsed, and what to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadFilter(String);

impl fmt::Display for BadFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadFilter {}

/// Whether lines are coloured.
pub(crate) fn colours() -> bool {
    std::io::stderr().is_terminal()
}

/// The directives of a filter. Spans of traces and requests are always seen, so that whatever is logged within them names
/// them.
pub(crate) fn parse_filter(filter: &str) -> Result<EnvFilter> {
    let mut parsed = EnvFilter::builder().parse(filter).map_err(|error| {
        BadFilter(format!("log filter \"{filter}\": {error}; use directives such as \"info\" or \"info,capture_svc=debug\""))
    })?;
    for target in [TRACED, REQUEST] {
        parsed = parsed.add_directive(format!("{target}=info").parse()?);
    }
    Ok(parsed)
}

/// Writes the lines of `service`; to be put over the layer of traces, whose ids it asks for.
pub(crate) fn layer<S, W>(
    service: &'static str,
    format: LogFormat,
    filter: EnvFilter,
    colours: bool,
    writer: W,
) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'l> LookupSpan<'l> + Send + Sync,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let known = Known::default();
    match format {
        LogFormat::Text => {
            let format = Identified::text(format::format().with_ansi(colours), known.clone());
            let lines = lines
                .with_ansi(colours)
                .fmt_fields(WithoutMarks::default())
                .event_format(format);
            Box::new(lines.and_then(known).with_filter(filter))
        }
        LogFormat::Json => {
            let inner = format::json()
                .flatten_event(true)
                .with_current_span(false)
                .with_span_list(true);
            let lines = lines
                .fmt_fields(format::JsonFields::new())
                .event_format(Identified::json(service, inner, known.clone()));
            Box::new(lines.and_then(known).with_filter(filter))
        }
    }
}

#[cfg(test)]
mod tests;
