use std::sync::{Arc, Mutex};

use opentelemetry::Context;
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{Span as SdkSpan, SpanData, SpanProcessor},
};
use tracing_subscriber::layer::SubscriberExt;

use super::*;
use crate::Origin;

/// Keeps the spans that end.
#[derive(Debug, Clone, Default)]
struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanProcessor for Kept {
    fn on_start(&self, _: &mut SdkSpan, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.lock().unwrap().push(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// The traces of this thread.
pub(crate) struct Traces {
    kept: Kept,
    _here: tracing::subscriber::DefaultGuard,
}

impl Traces {
    pub(crate) fn start() -> Self {
        let kept = Kept::default();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(kept.clone())
            .build();
        let tracing = Tracing {
            provider,
            exporting: None,
        };
        let subscriber = tracing_subscriber::registry().with(tracing.layer());
        Self {
            kept,
            _here: tracing::subscriber::set_default(subscriber),
        }
    }

    /// What has ended so far.
    pub(crate) fn ended(&self) -> Vec<SpanData> {
        self.kept.0.lock().unwrap().clone()
    }

    /// What has ended since it was last taken.
    pub(crate) fn take(&self) -> Vec<SpanData> {
        std::mem::take(&mut *self.kept.0.lock().unwrap())
    }
}

pub(crate) fn attribute(span: &SpanData, key: &str) -> Option<String> {
    let mut attributes = span.attributes.iter();
    let found = attributes.find(|attribute| attribute.key.as_str() == key);
    found.map(|attribute| attribute.value.to_string())
}

#[test]
fn a_step_is_one_of_a_trace_or_none_at_all() {
    let traces = Traces::start();
    assert!(crate::step!("lonely").is_disabled());
    // What only the log is to see stands between them, and is no part of the trace.
    let logged = tracing::info_span!("uplink");
    logged.in_scope(|| {
        assert!(crate::step!("lonely").is_disabled());
        let root = crate::traced!("interval");
        root.in_scope(|| {
            assert!(in_trace());
            drop(crate::step!("ship"));
        });
    });
    let [step, root] = &traces.take()[..] else {
        panic!("two spans")
    };
    assert_eq!((&*root.name, &*step.name), ("interval", "ship"));
    assert_eq!(step.parent_span_id, root.span_context.span_id());
    assert_eq!(root.parent_span_id, opentelemetry::SpanId::INVALID);
}

#[test]
fn a_failure_marks_the_span_and_success_has_the_last_word() {
    let traces = Traces::start();
    let span = crate::traced!("interval");
    span.fail("STORE_FULL", "no room");
    span.count("bytes", u64::MAX);
    drop(span);
    let span = crate::traced!("interval");
    span.fail("UNREACHABLE", "gone");
    span.succeed();
    drop(span);
    let [failed, done] = &traces.take()[..] else {
        panic!("two spans")
    };
    assert_eq!(failed.status, Status::error("no room"));
    assert_eq!(attribute(failed, "error.type").unwrap(), "STORE_FULL");
    assert_eq!(attribute(failed, "bytes").unwrap(), i64::MAX.to_string());
    assert_eq!(done.status, Status::Ok);
}

#[test]
fn a_span_is_adopted_by_one_trace_and_linked_with_others() {
    let traces = Traces::start();
    let (asker, other) = (crate::traced!("call"), crate::traced!("call"));
    let (origin, linked) = (Origin::of(&asker).unwrap(), Origin::of(&other).unwrap());
    let root = crate::traced!("interval");
    origin.adopt(&root);
    linked.link(&root);
    let trace = Origin::of(&root).unwrap();
    drop((root, asker, other));
    let spans = traces.take();
    let [root, asker, other] = &spans[..] else {
        panic!("three spans")
    };
    assert_eq!(root.parent_span_id, asker.span_context.span_id());
    assert_eq!(root.span_context.trace_id(), asker.span_context.trace_id());
    assert_eq!(root.links[0].span_context, other.span_context);
    assert!(trace != origin && trace != linked);
}

#[test]
fn warnings_within_a_span_are_its_events_and_other_lines_are_not() {
    let traces = Traces::start();
    crate::traced!("ship").in_scope(|| {
        tracing::info!("goes on");
        tracing::warn!("the link is slow");
    });
    let span = traces.take().remove(0);
    let events: Vec<_> = span.events.iter().map(|event| &*event.name).collect();
    assert_eq!(events, ["the link is slow"]);
    assert_eq!(span.status, Status::Unset);
}
