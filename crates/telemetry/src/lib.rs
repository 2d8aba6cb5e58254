//! What the programs say of themselves: logs, traces and [`metrics`].
//!
//! Nothing here holds up or fails the work that it tells of. Lines and spans wait in bounded queues for threads of their
//! own; what finds no room there, or nobody to take it, is lost, counted and told of.

mod logs;
pub mod metrics;
mod propagation;
mod requests;
mod traces;

use std::time::Duration;

use anyhow::{Context, Result};
use tracing_subscriber::{layer::SubscriberExt, util::SubscriberInitExt};

pub use logs::{BadFilter, LogFormat, UnknownLogFormat};
pub use propagation::{Origin, Propagating};
pub use requests::{CallLayer, Calls, Identify, Named, RequestLayer, about_volume};
pub use traces::{CollectorSettings, Export, REQUEST, SampleRatio, SpanExt, TRACED, in_trace};

use logs::Lines;
use traces::Tracing;

/// How long the end of a process waits for spans to be exported.
const TRACES_FLUSH_MAX: Duration = Duration::from_millis(1500);
/// How long it waits for lines to be written.
const LOGS_FLUSH_MAX: Duration = Duration::from_millis(400);

/// What a process says of itself, and how.
#[derive(Debug)]
pub struct Settings<'a> {
    /// The program's name; also that of the service in traces, unless `OTEL_SERVICE_NAME` is set.
    pub service: &'static str,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Directives such as `info` or `info,capture_svc=debug`: those of `RUST_LOG`.
    pub log_filter: &'a str,
    /// Where traces go.
    pub traces: Export,
}

impl<'a> Settings<'a> {
    /// Lines for people, and traces as the standard variables say: of a program without a configuration of its own.
    #[must_use]
    pub fn plain(service: &'static str, log_filter: &'a str) -> Self {
        Self {
            service,
            log_format: LogFormat::Text,
            log_filter,
            traces: Export::standard(),
        }
    }
}

/// Keeps logs and traces going; to be held until the end of the process.
#[derive(Debug)]
#[must_use = "what was not written or exported yet is lost without it"]
pub struct Telemetry {
    lines: Lines,
    traces: Tracing,
}

/// Starts logs and traces for this process; call it once, before anything else logs.
///
/// # Errors
/// The filter cannot be parsed ([`BadFilter`]), the export can't be set up as it is configured, or logging has been started before.
pub fn init(settings: Settings<'_>) -> Result<Telemetry> {
    let filter = logs::parse_filter(settings.log_filter)?;
    let lines = Lines::to_stderr().context("start logging")?;
    let traces = Tracing::start(settings.service, &settings.traces)?;
    let logs = logs::layer(
        settings.service,
        settings.log_format,
        filter,
        logs::colours(),
        lines.clone(),
    );
    tracing_subscriber::registry()
        .with(traces.layer())
        .with(logs)
        .try_init()
        .context("start logging")?;
    settings.traces.tell();
    Ok(Telemetry { lines, traces })
}

impl Telemetry {
    /// Exports and writes what is left, as far as that takes no longer than two seconds. Blocks.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        self.traces.end(TRACES_FLUSH_MAX);
        self.lines.flush(LOGS_FLUSH_MAX);
    }
}
