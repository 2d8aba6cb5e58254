//! One initialisation of logs for both services, and [`metrics`].
//!
//! Logs go to standard error, so that a program's own output stays clean. Each line names its level, its target and the
//! spans it lies in; in the JSON format also the service, for collectors that see several.

pub mod metrics;

use std::{fmt, io::IsTerminal, str::FromStr};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use tracing_subscriber::{
    EnvFilter, fmt::MakeWriter, layer::SubscriberExt, util::SubscriberInitExt,
};

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

/// Starts logging for this process; call it once, before anything else logs.
///
/// `service` is the program's name. `filter` is a list of directives such as `info` or `info,capture_svc=debug`
/// (those of `RUST_LOG`, which the services pass in from their own configuration).
///
/// # Errors
/// The filter cannot be parsed, or logging has been started before.
pub fn init(service: &'static str, format: LogFormat, filter: &str) -> Result<()> {
    let filter = parse_filter(filter)?;
    let colours = std::io::stderr().is_terminal();
    subscriber(service, format, filter, colours, std::io::stderr)
        .try_init()
        .context("start logging")
}

fn parse_filter(filter: &str) -> Result<EnvFilter> {
    EnvFilter::builder().parse(filter).map_err(|error| {
        anyhow!("log filter \"{filter}\": {error}; use directives such as \"info\" or \"info,capture_svc=debug\"")
    })
}

fn subscriber<W>(
    service: &'static str,
    format: LogFormat,
    filter: EnvFilter,
    colours: bool,
    writer: W,
) -> Box<dyn tracing::Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let base = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text => Box::new(base.with(lines.with_ansi(colours))),
        LogFormat::Json => Box::new(
            base.with(
                lines
                    .json()
                    .flatten_event(true)
                    .with_current_span(false)
                    .with_span_list(true)
                    .map_event_format(|inner| WithService { service, inner }),
            ),
        ),
    }
}

/// Puts `"service":"…"` in front of the fields of each JSON line.
struct WithService<F> {
    service: &'static str,
    inner: F,
}

impl<S, N, F> tracing_subscriber::fmt::FormatEvent<S, N> for WithService<F>
where
    S: tracing::Subscriber + for<'l> tracing_subscriber::registry::LookupSpan<'l>,
    N: for<'w> tracing_subscriber::fmt::FormatFields<'w> + 'static,
    F: tracing_subscriber::fmt::FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &tracing_subscriber::fmt::FmtContext<'_, S, N>,
        mut writer: tracing_subscriber::fmt::format::Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.inner.format_event(
            context,
            tracing_subscriber::fmt::format::Writer::new(&mut line),
            event,
        )?;
        // The inner formatter writes one JSON object per line.
        match line.strip_prefix('{') {
            Some(fields) => write!(writer, "{{\"service\":\"{}\",{fields}", self.service),
            None => writer.write_str(&line),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, filter: &str) -> String {
        let captured = Captured::default();
        let sink = captured.clone();
        let subscriber = subscriber(
            "capture-svc",
            format,
            parse_filter(filter).unwrap(),
            false,
            move || sink.clone(),
        );
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("ship", volume = "data", generation = 7);
            let _inside = span.enter();
            tracing::info!(changed_blocks = 12, "interval shipped");
            tracing::debug!("not wanted");
        });
        let bytes = captured.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_text_line_names_level_span_fields_and_message() {
        let line = logged(LogFormat::Text, "info");
        assert_eq!(line.lines().count(), 1, "{line}");
        for part in [
            "INFO",
            "ship{volume=\"data\" generation=7}",
            "interval shipped",
            "changed_blocks=12",
        ] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
    }

    #[test]
    fn a_json_line_is_one_object_with_service_spans_and_fields() {
        let line = logged(LogFormat::Json, "info");
        assert_eq!(line.lines().count(), 1, "{line}");
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(object["service"], "capture-svc");
        assert_eq!(object["level"], "INFO");
        assert_eq!(object["message"], "interval shipped");
        assert_eq!(object["changed_blocks"], 12);
        assert_eq!(object["spans"][0]["generation"], 7);
    }

    #[test]
    fn the_filter_decides_per_module_what_is_logged() {
        assert_eq!(logged(LogFormat::Text, "warn"), "");
        assert_eq!(
            logged(LogFormat::Text, "warn,tidemark_telemetry=debug")
                .lines()
                .count(),
            2
        );
    }

    #[test]
    fn a_filter_that_cannot_be_parsed_is_named_in_the_error() {
        let error = parse_filter("capture_svc=loud").unwrap_err().to_string();
        assert!(error.contains("capture_svc=loud"), "{error}");
    }

    #[test]
    fn log_formats_are_text_and_json_and_nothing_else() {
        assert_eq!("text".parse(), Ok(LogFormat::Text));
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        let error = "xml".parse::<LogFormat>().unwrap_err().to_string();
        assert_eq!(error, "unknown log format \"xml\": use text or json");
    }
}
