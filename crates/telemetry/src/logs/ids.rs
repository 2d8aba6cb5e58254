//! What is put into each line beside what the formats of `tracing-subscriber` have: the service, and the ids of the trace
//! and the span that it lies in.

use std::{
    error::Error,
    fmt::{self, Debug},
    sync::{Arc, OnceLock},
};

use opentelemetry::trace::{SpanContext, TraceContextExt};
use tracing::{
    Dispatch, Event, Subscriber,
    dispatcher::WeakDispatch,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    field::{MakeVisitor, VisitFmt, VisitOutput},
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{DefaultFields, DefaultVisitor, Writer},
    },
    registry::LookupSpan,
};

/// Where the ids are asked for: known once the subscriber is in use.
#[derive(Debug, Clone, Default)]
pub(super) struct Known(Arc<OnceLock<WeakDispatch>>);

impl<S: Subscriber> Layer<S> for Known {
    fn on_register_dispatch(&self, subscriber: &Dispatch) {
        // A layer is put into one subscriber.
        let _ = self.0.set(subscriber.downgrade());
    }
}

impl Known {
    /// The innermost span of a trace that the event lies in.
    fn span_of<S, N>(&self, context: &FmtContext<'_, S, N>) -> Option<SpanContext>
    where
        S: Subscriber + for<'l> LookupSpan<'l>,
        N: for<'w> FormatFields<'w> + 'static,
    {
        let dispatch = self.0.get()?.upgrade()?;
        context.event_scope()?.find_map(|span| {
            let context = tracing_opentelemetry::get_otel_context(&span.id(), &dispatch)?;
            let found = context.span().span_context().clone();
            found.is_valid().then_some(found)
        })
    }
}

#[derive(Debug, Clone, Copy)]
enum Form {
    Text,
    Json { service: &'static str },
}

/// A format whose lines carry ids.
#[derive(Debug)]
pub(super) struct Identified<F> {
    form: Form,
    inner: F,
    known: Known,
}

impl<F> Identified<F> {
    /// The id of the trace at the end of the line.
    pub(super) const fn text(inner: F, known: Known) -> Self {
        let form = Form::Text;
        Self { form, inner, known }
    }

    /// The service and both ids in front of the other fields.
    pub(super) const fn json(service: &'static str, inner: F, known: Known) -> Self {
        let form = Form::Json { service };
        Self { form, inner, known }
    }
}

impl<S, N, F> FormatEvent<S, N> for Identified<F>
where
    S: Subscriber + for<'l> LookupSpan<'l>,
    N: for<'w> FormatFields<'w> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.inner
            .format_event(context, Writer::new(&mut line), event)?;
        let ids = self.known.span_of(context);
        match (self.form, ids) {
            (Form::Text, None) => writer.write_str(&line),
            (Form::Text, Some(ids)) => {
                writeln!(
                    writer,
                    "{} trace_id={}",
                    line.trim_end_matches('\n'),
                    ids.trace_id()
                )
            }
            (Form::Json { service }, ids) => {
                // The inner format writes one object per line.
                let Some(fields) = line.strip_prefix('{') else {
                    return writer.write_str(&line);
                };
                write!(writer, "{{\"service\":\"{service}\",")?;
                if let Some(ids) = ids {
                    let (trace, span) = (ids.trace_id(), ids.span_id());
                    write!(writer, "\"trace_id\":\"{trace}\",\"span_id\":\"{span}\",")?;
                }
                writer.write_str(fields)
            }
        }
    }
}

/// Fields as people read them, without those that are marks for the layer of traces.
#[derive(Debug, Default)]
pub(super) struct WithoutMarks(DefaultFields);

impl<'w> MakeVisitor<Writer<'w>> for WithoutMarks {
    type Visitor = Unmarked<'w>;

    fn make_visitor(&self, target: Writer<'w>) -> Unmarked<'w> {
        Unmarked(self.0.make_visitor(target))
    }
}

#[derive(Debug)]
pub(super) struct Unmarked<'w>(DefaultVisitor<'w>);

fn is_mark(field: &Field) -> bool {
    field.name().starts_with("otel.")
}

impl Visit for Unmarked<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if !is_mark(field) {
            self.0.record_str(field, value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        if !is_mark(field) {
            self.0.record_error(field, value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if !is_mark(field) {
            self.0.record_debug(field, value);
        }
    }
}

impl VisitOutput<fmt::Result> for Unmarked<'_> {
    fn finish(self) -> fmt::Result {
        self.0.finish()
    }
}

impl VisitFmt for Unmarked<'_> {
    fn writer(&mut self) -> &mut dyn fmt::Write {
        self.0.writer()
    }
}
