//! Traces that cross from one process to another: W3C trace context, in the metadata of gRPC calls.
//!
//! What comes from outside is taken only where it is as the standard has it, and no longer than that.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{SpanContext, TraceContextExt},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::{Request, Status, metadata::MetadataMap, service::Interceptor};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
/// The most that a trace state is taken along with, as the standard has it.
const TRACESTATE_LEN_MAX: usize = 512;
/// Versions to come may have longer ones; nothing behind this is looked at.
const TRACEPARENT_LEN_MAX: usize = 128;

/// A span that others belong to, or are linked with: of this process or of another.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin(SpanContext);

impl Origin {
    /// The current span, where it belongs to a trace.
    #[must_use]
    pub fn current() -> Option<Self> {
        Self::of(&Span::current())
    }

    /// A span, where it belongs to a trace.
    #[must_use]
    pub fn of(span: &Span) -> Option<Self> {
        let context = span.context().span().span_context().clone();
        context.is_valid().then_some(Self(context))
    }

    /// What the headers of a call say; none where they don't say it as they should.
    pub(crate) fn of_headers(headers: &HeaderMap) -> Option<Self> {
        Self::read(&Headers(headers))
    }

    /// What the variables `TRACEPARENT` and `TRACESTATE` say, by which programs that start others pass it on.
    #[must_use]
    pub fn of_environment() -> Option<Self> {
        let value = |name| std::env::var(name).ok();
        Self::read(&Variables {
            parent: value("TRACEPARENT")?,
            state: value("TRACESTATE"),
        })
    }

    fn read(from: &dyn Extractor) -> Option<Self> {
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), from);
        let context = context.span().span_context().clone();
        context.is_valid().then_some(Self(context))
    }

    /// Whether the trace is exported where it began.
    pub(crate) fn is_sampled(&self) -> bool {
        self.0.is_sampled()
    }

    /// Makes a span, which has just been made, a child of this one.
    pub fn adopt(&self, span: &Span) {
        let parent = Context::new().with_remote_span_context(self.0.clone());
        // Without the layer of traces there is no trace.
        let _ = span.set_parent(parent);
    }

    /// Links a span of another trace with this one.
    pub fn link(&self, span: &Span) {
        span.add_link(self.0.clone());
    }
}

/// Only what the standard allows gets to the parser.
struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let longest = if key == TRACEPARENT {
            TRACEPARENT_LEN_MAX
        } else {
            TRACESTATE_LEN_MAX
        };
        let mut values = self.0.get_all(key).iter();
        let only = values.next().filter(|_| values.next().is_none())?;
        only.to_str().ok().filter(|text| text.len() <= longest)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

struct Variables {
    parent: String,
    state: Option<String>,
}

impl Extractor for Variables {
    fn get(&self, key: &str) -> Option<&str> {
        if key == TRACEPARENT {
            Some(&self.parent)
        } else {
            let state = self.state.as_deref();
            state.filter(|state| state.len() <= TRACESTATE_LEN_MAX)
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

/// Puts the trace into each call of a client: that of the span in which the call is made.
#[derive(Debug, Clone, Default)]
pub struct Propagate {
    origin: Option<Origin>,
}

impl Propagate {
    /// All calls belong to this one, whatever span they are made in.
    #[must_use]
    pub const fn from(origin: Option<Origin>) -> Self {
        Self { origin }
    }
}

impl Interceptor for Propagate {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(Origin(origin)) = self.origin.clone().or_else(Origin::current) {
            let context = Context::new().with_remote_span_context(origin);
            TraceContextPropagator::new()
                .inject_context(&context, &mut Metadata(request.metadata_mut()));
        }
        Ok(request)
    }
}

struct Metadata<'a>(&'a mut MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        // An empty state says nothing.
        if value.is_empty() {
            return;
        }
        let name = HeaderName::from_bytes(key.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(&value)) {
            self.0.as_mut().insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(given: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn read(given: &[(&'static str, &str)]) -> Option<Origin> {
        Origin::of_headers(&headers(given))
    }

    #[test]
    fn what_is_sent_along_is_what_was_received() {
        let origin = read(&[(TRACEPARENT, PARENT), (TRACESTATE, "vendor=1,other=2")]).unwrap();
        assert!(origin.is_sampled());
        let request = Propagate::from(Some(origin))
            .call(Request::new(()))
            .unwrap();
        let sent = |key| request.metadata().get(key).unwrap().to_str().unwrap();
        assert_eq!(sent(TRACEPARENT), PARENT);
        assert_eq!(sent(TRACESTATE), "vendor=1,other=2");
    }

    #[test]
    fn a_call_outside_of_any_trace_carries_none() {
        let request = Propagate::default().call(Request::new(())).unwrap();
        assert!(request.metadata().is_empty());
    }

    #[test]
    fn what_is_not_as_the_standard_has_it_is_not_taken() {
        let long = format!("{PARENT}-{}", "0".repeat(TRACEPARENT_LEN_MAX));
        for parent in [
            "",
            "00",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-B7AD6B7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-\u{fc}af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-\t",
            &long,
        ] {
            assert_eq!(read(&[(TRACEPARENT, parent)]), None, "{parent}");
        }
        let twice = [(TRACEPARENT, PARENT), (TRACEPARENT, PARENT)];
        assert_eq!(read(&twice), None);
    }

    #[test]
    fn a_state_that_is_none_is_left_behind_and_the_trace_goes_on() {
        let long = format!("vendor={}", "x".repeat(TRACESTATE_LEN_MAX));
        for state in ["no list", long.as_str(), "a=1,\u{fc}=2"] {
            let origin = read(&[(TRACEPARENT, PARENT), (TRACESTATE, state)]).unwrap();
            assert_eq!(origin.0.trace_state().header(), "", "{state}");
            assert_eq!(origin.0.trace_id().to_string(), TRACE);
        }
    }
}
