//! Traces that cross from one process to another: W3C trace context, in the metadata of gRPC calls.
//!
//! What comes from outside is taken only where it is as the standard has it, and no longer than that.

use std::task::{Context as TaskContext, Poll};

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{SpanContext, TraceContextExt},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tower::Service;
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

/// A connection that puts the trace into each call: that of the span in which the call is made, or always the same.
#[derive(Debug, Clone)]
pub struct Propagating<S> {
    inner: S,
    origin: Option<Origin>,
}

impl<S> Propagating<S> {
    /// Each call is part of what it is made in.
    pub const fn current(inner: S) -> Self {
        Self {
            inner,
            origin: None,
        }
    }

    /// All calls are part of `origin`, where there is one.
    pub const fn from(origin: Option<Origin>, inner: S) -> Self {
        Self { inner, origin }
    }
}

impl<S, B> Service<Request<B>> for Propagating<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        if let Some(Origin(origin)) = self.origin.clone().or_else(Origin::current) {
            let context = Context::new().with_remote_span_context(origin);
            let mut headers = Sent(request.headers_mut());
            TraceContextPropagator::new().inject_context(&context, &mut headers);
        }
        self.inner.call(request)
    }
}

struct Sent<'a>(&'a mut HeaderMap);

impl Injector for Sent<'_> {
    fn set(&mut self, key: &str, value: String) {
        // An empty state says nothing.
        if value.is_empty() {
            return;
        }
        let name = HeaderName::from_bytes(key.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(&value)) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

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

    /// The headers of a call.
    fn sent_by(origin: Option<Origin>) -> HeaderMap {
        let seen = |request: Request<()>| {
            let headers = request.headers().clone();
            std::future::ready(Ok::<_, Infallible>(headers))
        };
        let mut connection = Propagating::from(origin, tower::service_fn(seen));
        let answer = connection.call(Request::new(()));
        answer.into_inner().unwrap()
    }

    fn read(given: &[(&'static str, &str)]) -> Option<Origin> {
        Origin::of_headers(&headers(given))
    }

    #[test]
    fn what_is_sent_along_is_what_was_received() {
        let origin = read(&[(TRACEPARENT, PARENT), (TRACESTATE, "vendor=1,other=2")]).unwrap();
        assert!(origin.is_sampled());
        let headers = sent_by(Some(origin));
        let sent = |key| headers[key].to_str().unwrap();
        assert_eq!(sent(TRACEPARENT), PARENT);
        assert_eq!(sent(TRACESTATE), "vendor=1,other=2");
    }

    #[test]
    fn a_call_outside_of_any_trace_carries_none() {
        assert!(sent_by(None).is_empty());
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
