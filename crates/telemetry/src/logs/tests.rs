use std::{
    io,
    sync::{Arc, Mutex},
};

use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;

use super::*;
use crate::{
    Export,
    traces::{SpanExt, Tracing},
};

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

/// What is logged by `work`.
fn written(format: LogFormat, filter: &str, work: impl FnOnce()) -> String {
    let captured = Captured::default();
    let sink = captured.clone();
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let traces = tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_filter(tracing_subscriber::filter::filter_fn(|metadata| {
            metadata.target() == TRACED
        }));
    let lines = layer(
        "capture-svc",
        format,
        parse_filter(filter).unwrap(),
        false,
        move || sink.clone(),
    );
    let subscriber = tracing_subscriber::registry().with(traces).with(lines);
    tracing::subscriber::with_default(subscriber, work);
    let bytes = captured.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

fn logged(format: LogFormat, filter: &str) -> String {
    written(format, filter, || {
        let span = tracing::info_span!("ship", volume = "data", generation = 7);
        let _inside = span.enter();
        tracing::info!(changed_blocks = 12, "interval shipped");
        tracing::debug!("not wanted");
    })
}

/// Two lines: one within a step of a trace, and something that is none within that; one outside.
fn logged_in_trace(format: LogFormat, filter: &str) -> String {
    written(format, filter, || {
        let root = crate::traced!("interval", otel.kind = "internal", volume = "data");
        root.note("epoch", 7);
        root.in_scope(|| {
            let step = crate::step!("ship");
            let _inside = (step.enter(), tracing::info_span!("deeper").entered());
            tracing::warn!("the link is slow");
        });
        tracing::warn!("outside");
    })
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
    assert!(object.get("trace_id").is_none());
}

fn is_id(id: &str, digits: usize) -> bool {
    id.len() == digits && id.bytes().all(|b| b.is_ascii_hexdigit()) && id.contains(|c| c != '0')
}

#[test]
fn a_json_line_in_a_trace_has_the_ids_of_the_trace_and_of_its_innermost_span() {
    let lines = logged_in_trace(LogFormat::Json, "info");
    let objects: Vec<serde_json::Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let id = |key: &str| objects[0][key].as_str().unwrap().to_owned();
    assert!(
        is_id(&id("trace_id"), 32) && is_id(&id("span_id"), 16),
        "{lines}"
    );
    assert_eq!(objects[0]["spans"][1]["name"], "ship");
    assert!(objects[1].get("trace_id").is_none(), "{lines}");
}

#[test]
fn a_text_line_in_a_trace_ends_with_its_id_and_shows_no_marks() {
    // Whatever the filter, a line names the trace that it lies in.
    for filter in ["info", "warn", "off,tidemark_telemetry=warn"] {
        let lines = logged_in_trace(LogFormat::Text, filter);
        let [inside, outside] = lines.lines().collect::<Vec<_>>()[..] else {
            panic!("{filter}: {lines}")
        };
        assert!(
            inside.contains("interval{volume=\"data\"}:ship:"),
            "{lines}"
        );
        let (line, id) = inside.split_once(" trace_id=").unwrap();
        assert!(
            line.ends_with("the link is slow") && is_id(id, 32),
            "{lines}"
        );
        assert!(
            outside.ends_with("outside") && !lines.contains("otel."),
            "{lines}"
        );
    }
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

/// What is below the filter must cost nothing: it is not even asked for.
#[test]
fn nothing_below_the_filter_is_taken_note_of() {
    let level = |filter: &str| {
        let lines = layer(
            "capture-svc",
            LogFormat::Json,
            parse_filter(filter).unwrap(),
            false,
            io::sink,
        );
        let traces = Tracing::start("capture-svc", &Export::NOWHERE).unwrap();
        let subscriber = tracing_subscriber::registry()
            .with(traces.layer())
            .with(lines);
        subscriber.max_level_hint()
    };
    assert_eq!(level("info"), Some(LevelFilter::INFO));
    assert_eq!(level("error"), Some(LevelFilter::INFO));
    assert_eq!(level("info,capture_svc=debug"), Some(LevelFilter::DEBUG));
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
