//! What a service says of the calls that it receives: an id for each, and a span of a trace for those that do something.
//!
//! Two layers, with the gate that finds out who calls between them. [`RequestLayer`] comes first: it gives each call an
//! id, which is in the log lines of the call, whoever made it, and in its answer. [`CallLayer`] comes behind the gate: what
//! a stranger sends is no part of any trace.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tidemark_identity::{
    Caller,
    rules::{self, Lasts, Rule, Who},
};
use tidemark_proto::RpcError;
use tonic::{Code, Status, body::Body, codegen::Bytes};
use tower::{BoxError, Layer, Service};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestId, RequestId, SetRequestId};
use tracing::{Instrument, Span, field::Empty};

use crate::{
    propagation::Origin,
    traces::{REQUEST, SpanExt},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest id of a client's own.
const REQUEST_ID_LEN_MAX: usize = 64;

/// Gives each call an id, unless its client has given it one that will do: at most 64 letters, digits and `-_.`.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestLayer;

impl<S> Layer<S> for RequestLayer {
    type Service = Identify<S>;

    fn layer(&self, inner: S) -> Identify<S> {
        let named = PropagateRequestId::x_request_id(Named { inner });
        Identify {
            inner: SetRequestId::x_request_id(named, MakeRequestUuid),
        }
    }
}

/// A service whose calls have ids.
#[derive(Clone)]
pub struct Identify<S> {
    inner: SetRequestId<PropagateRequestId<Named<S>>, MakeRequestUuid>,
}

impl<S> std::fmt::Debug for Identify<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identify").finish_non_exhaustive()
    }
}

impl<S, B, R> Service<Request<B>> for Identify<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = <SetRequestId<PropagateRequestId<Named<S>>, MakeRequestUuid> as Service<
        Request<B>,
    >>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if !has_good_id(request.headers()) {
            request.headers_mut().remove(&REQUEST_ID);
        }
        self.inner.call(request)
    }
}

/// One id, which can be put into a log as it is.
fn has_good_id(headers: &HeaderMap) -> bool {
    let mut ids = headers.get_all(&REQUEST_ID).iter();
    let (Some(id), None) = (ids.next(), ids.next()) else {
        return false;
    };
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    !id.is_empty() && id.len() <= REQUEST_ID_LEN_MAX && id.as_bytes().iter().all(is_plain)
}

/// A service whose calls are named in the log.
#[derive(Debug, Clone)]
pub struct Named<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Named<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = tracing::instrument::Instrumented<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let id = request.extensions().get::<RequestId>();
        let id = id.and_then(|id| id.header_value().to_str().ok());
        // Only what there is: the path of any other call is whatever its sender likes.
        let known = rules::rule(request.uri().path());
        let rpc = known.map(|rule| &rule.path[1..]);
        let span = tracing::info_span!(target: REQUEST, "request", id, rpc);
        let _inside = span.enter();
        self.inner.call(request).instrument(span.clone())
    }
}

/// Makes a span of each call that does something, and of each that belongs to somebody's trace already.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallLayer;

impl<S> Layer<S> for CallLayer {
    type Service = Calls<S>;

    fn layer(&self, inner: S) -> Calls<S> {
        Calls { inner }
    }
}

/// A service whose calls are spans of traces.
#[derive(Debug, Clone)]
pub struct Calls<S> {
    inner: S,
}

/// Names the volume that the current call is about.
pub fn about_volume(name: &str) {
    Span::current().record("volume", name);
}

/// The span of a call; none where it is not to be seen in traces.
fn span_of<B>(request: &Request<B>) -> Option<Span> {
    let rule = rules::rule(request.uri().path())?;
    let origin = Origin::of_headers(request.headers());
    if !is_traced(rule, origin.as_ref().is_some_and(Origin::is_sampled)) {
        return None;
    }
    let path = &rule.path[1..];
    let (service, method) = path.split_once('/')?;
    let span = crate::traced!(
        "call",
        otel.name = path,
        otel.kind = "server",
        volume = Empty
    );
    if let Some(origin) = origin {
        origin.adopt(&span);
    }
    span.note("rpc.system", "grpc");
    span.note("rpc.service", service);
    span.note("rpc.method", method);
    if let Some(caller) = request.extensions().get::<Caller>() {
        span.note("peer", caller.name());
    }
    if let Some(Ok(id)) = request.headers().get(&REQUEST_ID).map(HeaderValue::to_str) {
        span.note("request_id", id);
    }
    Some(span)
}

/// Calls that only look come often, and are of interest where somebody's trace asks for them. An agent's lasts as long as
/// the agent, and a span is seen when it ends.
fn is_traced(rule: &Rule, is_asked_for: bool) -> bool {
    let is_ours = matches!(rule.who, Who::Having(_)) && !rule.path.ends_with("/Attach");
    is_ours && (is_asked_for || rule.lasts == Lasts::AsItTakes)
}

impl<S, R> Service<Request<Body>> for Calls<S>
where
    S: Service<Request<Body>, Response = Response<R>>,
    S::Future: Send + 'static,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Some(span) = span_of(&request) else {
            let answer = self.inner.call(request);
            return Box::pin(async move { Ok(answer.await?.map(Body::new)) });
        };
        let answer = span.in_scope(|| self.inner.call(request));
        Box::pin(async move {
            let answer = answer.instrument(span.clone()).await?;
            // A call that fails at once says so in its headers.
            note_status(&span, answer.headers());
            Ok(answer.map(|body| {
                Body::new(Answer {
                    body: Box::pin(body),
                    span,
                })
            }))
        })
    }
}

/// Notes how a call has ended, where these headers or trailers say it.
fn note_status(span: &Span, headers: &HeaderMap) {
    let Some(status) = Status::from_header_map(headers) else {
        return;
    };
    let code = status.code();
    span.count(
        "rpc.grpc.status_code",
        u64::from((code as i32).unsigned_abs()),
    );
    if code != Code::Ok {
        let error = RpcError::from(status);
        span.fail(error.reason.as_str(), &error.message);
    }
}

/// The body of an answer: the span of its call lasts as long.
struct Answer<R> {
    body: Pin<Box<R>>,
    span: Span,
}

impl<R: HttpBody> HttpBody for Answer<R> {
    type Data = R::Data;
    type Error = R::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<R::Data>, R::Error>>> {
        let this = &mut *self;
        let _within = this.span.enter();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            note_status(&this.span, trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
