//! Counts the calls that a service receives, by what became of each.
//!
//! The layer comes before all others, so that whom the gate refuses is counted, too.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;
use tidemark_identity::rules;
use tidemark_proto::RpcError;
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::{CALLS, Reading};

/// What no rule knows is one call: its path is whatever the caller likes.
const UNKNOWN: &str = "unknown";
const OK: &str = "OK";
/// Who called went away before the end.
const CANCELLED: &str = "CANCELLED";

type Key = (&'static str, &'static str);

/// The counts, and the layer that counts.
#[derive(Debug, Clone, Default)]
pub struct CallCounts(Arc<Mutex<BTreeMap<Key, u64>>>);

impl CallCounts {
    /// Tells of them.
    pub fn read(&self, reading: &mut Reading) {
        for ((call, result), count) in &*self.0.lock() {
            reading.add(&CALLS, &[call, result], *count);
        }
    }

    fn count(&self, call: &'static str, result: &'static str) {
        *self.0.lock().entry((call, result)).or_default() += 1;
    }
}

impl<S> Layer<S> for CallCounts {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted {
            counts: self.clone(),
            inner,
        }
    }
}

/// A service whose calls are counted.
#[derive(Debug, Clone)]
pub struct Counted<S> {
    counts: CallCounts,
    inner: S,
}

/// A call that is not counted yet; who drops it has gone away.
#[derive(Debug)]
struct Open {
    counts: CallCounts,
    call: &'static str,
    is_counted: bool,
}

impl Open {
    fn end(&mut self, result: &'static str) {
        if !self.is_counted {
            self.is_counted = true;
            self.counts.count(self.call, result);
        }
    }

    /// Where these headers or trailers say how the call has ended.
    fn look_at(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.end(match status.code() {
                Code::Ok => OK,
                _ => RpcError::from(status).reason.as_str(),
            });
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.end(CANCELLED);
    }
}

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = Response<Answer<R>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let rule = rules::rule(request.uri().path());
        let mut open = Open {
            counts: self.counts.clone(),
            call: rule.map_or(UNKNOWN, |rule| rule.path.trim_start_matches('/')),
            is_counted: false,
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // A call that fails at once says so in its headers.
            open.look_at(answer.headers());
            Ok(answer.map(|body| Answer {
                body: Box::pin(body),
                open,
            }))
        })
    }
}

/// The body of an answer, at whose end it is known what became of the call.
#[derive(Debug)]
pub struct Answer<R> {
    body: Pin<Box<R>>,
    open: Open,
}

impl<R: HttpBody> HttpBody for Answer<R> {
    type Data = R::Data;
    type Error = R::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<R::Data>, R::Error>>> {
        let frame = ready!(self.body.as_mut().poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            self.open.look_at(trailers);
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
mod tests {
    use std::convert::Infallible;

    use http_body_util::Empty;
    use tidemark_proto::Reason;
    use tonic::codegen::Bytes;

    use super::*;

    #[tokio::test]
    async fn each_call_is_counted_once_by_what_became_of_it() {
        let counts = CallCounts::default();
        let inner = tower::service_fn(|request: Request<()>| async move {
            let mut answer = Response::new(Empty::<Bytes>::new());
            let status = match request.uri().query() {
                Some("fenced") => Some(RpcError::new(Reason::Fenced, "no", "stop").into()),
                Some("unknown") => Some(Status::unimplemented("none")),
                Some("ok") => Some(Status::ok("")),
                _ => None,
            };
            if let Some(status) = status {
                status.add_header(answer.headers_mut()).unwrap();
            }
            Ok::<_, Infallible>(answer)
        });
        let mut service = counts.layer(inner);
        for uri in [
            "/tidemark.vault.v1.Ingest/StartTerm?fenced",
            "/tidemark.vault.v1.Ingest/StartTerm?fenced",
            "/tidemark.vault.v1.Ingest/StartTerm?ok",
            "/tidemark.vault.v1.Ingest/Ship",
            "/whatever/it/likes?unknown",
        ] {
            let request = Request::get(uri).body(()).unwrap();
            drop(service.call(request).await.unwrap());
        }
        let expected = [
            (("tidemark.vault.v1.Ingest/Ship", "CANCELLED"), 1),
            (("tidemark.vault.v1.Ingest/StartTerm", "FENCED"), 2),
            (("tidemark.vault.v1.Ingest/StartTerm", "OK"), 1),
            (("unknown", "UNKNOWN"), 1),
        ];
        assert_eq!(*counts.0.lock(), expected.into());
    }
}
