//! Traces: which spans are exported, and what they say.
//!
//! A span of `tracing` belongs to a trace where its target is [`TRACED`]; [`traced!`](crate::traced) and
//! [`step!`](crate::step) make such. Ids are given out, written into the log and sent along with calls whether there is a
//! collector or not.

mod export;
pub(crate) mod resource;
mod settings;

use std::{fmt::Display, time::Duration};

use anyhow::Result;
use opentelemetry::trace::{Status, TracerProvider};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::{Level, Span, Subscriber, level_filters::LevelFilter};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};

pub(crate) use export::{Headers, standard_headers};
pub use settings::{CollectorSettings, Export, SampleRatio};

use export::Exporting;

/// The target of spans that belong to traces.
pub const TRACED: &str = "tidemark::trace";
/// The target of spans that name requests in the log, and belong to no trace.
pub const REQUEST: &str = "tidemark::request";

/// A span of a trace, as `tracing::info_span!` makes it.
#[macro_export]
macro_rules! traced {
    ($($span:tt)*) => { ::tracing::info_span!(target: $crate::TRACED, $($span)*) };
}

/// A span of the trace that the current span belongs to; none where that belongs to no trace.
#[macro_export]
macro_rules! step {
    ($($span:tt)*) => {
        if $crate::in_trace() { $crate::traced!($($span)*) } else { ::tracing::Span::none() }
    };
}

/// Whether the current span belongs to a trace.
#[must_use]
pub fn in_trace() -> bool {
    Span::current()
        .metadata()
        .is_some_and(|metadata| metadata.target() == TRACED)
}

/// What is told of a span beside its name. Goes to the trace only; what is to be in log lines, too, is a field.
pub trait SpanExt {
    /// A property in words.
    fn note(&self, key: &'static str, value: impl Display);
    /// A number of something.
    fn count(&self, key: &'static str, number: u64);
    /// What it stands for has been done, whatever failed on the way.
    fn succeed(&self);
    /// What it stands for has failed; `reason` is one of the stable codes.
    fn fail(&self, reason: &str, message: &str);
}

impl SpanExt for Span {
    fn note(&self, key: &'static str, value: impl Display) {
        if !self.is_disabled() {
            self.set_attribute(key, value.to_string());
        }
    }

    fn count(&self, key: &'static str, number: u64) {
        self.set_attribute(key, i64::try_from(number).unwrap_or(i64::MAX));
    }

    fn succeed(&self) {
        self.set_status(Status::Ok);
    }

    fn fail(&self, reason: &str, message: &str) {
        self.note("error.type", reason);
        self.set_status(Status::error(message.to_owned()));
    }
}

/// The traces of this process.
#[derive(Debug)]
pub(crate) struct Tracing {
    provider: SdkTracerProvider,
    exporting: Option<Exporting>,
}

impl Tracing {
    /// Begins to give out ids, and to export where that is configured. Nothing is connected to yet.
    ///
    /// # Errors
    /// The export can't be set up as it is configured.
    pub(crate) fn start(service: &'static str, export: &Export) -> Result<Self> {
        let sampler = Sampler::TraceIdRatioBased(export.sample_ratio.get());
        let provider = SdkTracerProvider::builder()
            .with_resource(resource::of(service))
            .with_sampler(Sampler::ParentBased(Box::new(sampler)));
        Ok(match &export.collector {
            None => Self {
                provider: provider.build(),
                exporting: None,
            },
            Some(collector) => {
                let (exporting, processor) = Exporting::start(collector)?;
                Self {
                    provider: provider.with_span_processor(processor).build(),
                    exporting: Some(exporting),
                }
            }
        })
    }

    /// Makes spans of traces out of those of `tracing`; warnings and errors within them are their events.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'l> LookupSpan<'l>,
    {
        let is_wanted = filter_fn(|metadata| {
            if metadata.is_span() {
                metadata.target() == TRACED
            } else {
                *metadata.level() <= Level::WARN
            }
        });
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("tidemark"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .with_error_events_to_status(false)
            .with_error_events_to_exceptions(false)
            .with_filter(is_wanted.with_max_level_hint(LevelFilter::INFO))
    }

    /// Exports what is left, for at most so long.
    pub(crate) fn end(&mut self, patience: Duration) {
        // What becomes of it is seen by the exporter.
        let _ = self.provider.shutdown_with_timeout(patience);
        if let Some(exporting) = self.exporting.take() {
            exporting.end();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
