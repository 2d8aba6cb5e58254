//! Stands before the gRPC services: finds out who calls, and lets through what the rules allow.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, Request as HttpRequest, Response as HttpResponse, header::AUTHORIZATION};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tidemark_identity::{
    Roles,
    rules::{self, Lasts, Rule, Sends, Who},
};
use tidemark_proto::{Reason, RpcError};
use tokio::time::{Sleep, sleep, timeout};
use tonic::{Extensions, Status, body::Body};
use tower::{Layer, Service};

pub use tidemark_identity::Caller;

use crate::{gate::Gate, peer::Peer};

/// How long the one message of a call may take to arrive.
const REQUEST_MAX: Duration = Duration::from_secs(30);
/// How long a call that only tells what there is may take to be answered.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// How long a connection may last before it has made a call with an identity that is known: enough for a slow link, and
/// for whoever asks after the service's health.
pub const ADMISSION_MAX: Duration = Duration::from_secs(30);

/// Whoever makes a call. Without a shield before the service that is this process itself.
#[must_use]
pub fn caller(extensions: &Extensions) -> Caller {
    extensions.get::<Caller>().cloned().unwrap_or(Caller::Local)
}

/// Puts a [`Shield`] before a service.
#[derive(Debug, Clone)]
pub struct ShieldLayer {
    gate: Arc<Gate>,
    times: Times,
}

/// How long a call may take.
#[derive(Debug, Clone, Copy)]
struct Times {
    request_max: Duration,
    answer_max: Duration,
}

impl ShieldLayer {
    /// Lets in whom the gate knows.
    #[must_use]
    pub fn new(gate: Arc<Gate>) -> Self {
        Self {
            gate,
            times: Times {
                request_max: REQUEST_MAX,
                answer_max: ANSWER_MAX,
            },
        }
    }
}

impl<S> Layer<S> for ShieldLayer {
    type Service = Shield<S>;

    fn layer(&self, inner: S) -> Shield<S> {
        Shield {
            gate: Arc::clone(&self.gate),
            times: self.times,
            inner,
        }
    }
}

/// A service that only those get to whom the rules allow it.
#[derive(Debug, Clone)]
pub struct Shield<S> {
    gate: Arc<Gate>,
    times: Times,
    inner: S,
}

impl<S> Shield<S> {
    /// Who calls, and what the call takes.
    fn check<B>(
        &self,
        request: &HttpRequest<B>,
    ) -> Result<(Option<Caller>, &'static Rule), Status> {
        let path = request.uri().path();
        let Some(rule) = rules::rule(path) else {
            return Err(Status::unimplemented(format!("there is no call {path}")));
        };
        let roles = match rule.who {
            Who::Anybody => return Ok((None, rule)),
            Who::Known => None,
            Who::Having(roles) => Some(roles),
        };
        let peer = request.extensions().get::<Peer>();
        let unknown = Peer::new(None);
        let peer = peer.unwrap_or(&unknown);
        let caller = bearer(request.headers())
            .and_then(|token| self.gate.identify(peer, token))
            .inspect_err(|error| self.gate.log_refusal(peer, &error.message))?;
        // Whoever is known is no stranger, even where this call is not for them.
        peer.admit();
        if let (Some(roles), Caller::Known(identity)) = (roles, &caller)
            && !identity.roles().meets(roles)
        {
            let error = denied(&identity.name, identity.roles(), path, roles);
            self.gate.log_refusal(peer, &error.message);
            return Err(error.into());
        }
        Ok((Some(caller), rule))
    }
}

fn denied(name: &str, has: Roles, path: &str, needs: Roles) -> RpcError {
    let call = path.rsplit('.').next().unwrap_or(path);
    RpcError::new(
        Reason::PermissionDenied,
        format!("identity {name:?} may not call {call}: it has the roles {has}"),
        format!(
            "{call} takes one of the roles {needs}; the service's file of identities says who has which"
        ),
    )
}

/// The token of a call. A header that is none is refused: its sender believes it to be one.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, RpcError> {
    let Some(header) = headers.get(AUTHORIZATION) else {
        return Ok(None);
    };
    let token = header.to_str().ok().and_then(|text| {
        let (scheme, token) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    match token {
        Some(token) if !token.is_empty() => Ok(Some(token)),
        _ => Err(RpcError::new(
            Reason::Unauthenticated,
            "the header authorization holds no bearer token",
            "send `authorization: Bearer TOKEN`, or no such header",
        )),
    }
}

impl<S, R> Service<HttpRequest<Body>> for Shield<S>
where
    S: Service<HttpRequest<Body>, Response = HttpResponse<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = HttpResponse<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: HttpRequest<Body>) -> Self::Future {
        let (caller, rule) = match self.check(&request) {
            Ok(checked) => checked,
            Err(status) => {
                let refused = status.into_http();
                return Box::pin(std::future::ready(Ok(refused)));
            }
        };
        if let Some(caller) = caller {
            request.extensions_mut().insert(caller);
        }
        if rule.sends == Sends::One {
            let deadline = self.times.request_max;
            request = request.map(|body| Body::new(Timely::new(body, deadline)));
        }
        let answer = self.inner.call(request);
        if rule.lasts == Lasts::AsItTakes {
            return Box::pin(answer);
        }
        let answer_max = self.times.answer_max;
        Box::pin(async move {
            timeout(answer_max, answer)
                .await
                .unwrap_or_else(|_| Ok(unanswered(rule.path, answer_max).into_http()))
        })
    }
}

fn unanswered(path: &str, after: Duration) -> Status {
    let call = path.rsplit('.').next().unwrap_or(path);
    let error = RpcError::new(
        Reason::TooSlow,
        format!("{call} is not answered within {after:?}"),
        "the disk or the store of the service may be stuck: look at its log, and try again",
    );
    error.into()
}

/// A request that must have arrived in time.
#[derive(Debug)]
struct Timely {
    body: Body,
    deadline: Pin<Box<Sleep>>,
    allowed: Duration,
}

impl Timely {
    fn new(body: Body, allowed: Duration) -> Self {
        Self {
            body,
            deadline: Box::pin(sleep(allowed)),
            allowed,
        }
    }
}

impl HttpBody for Timely {
    type Data = <Body as HttpBody>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let this = &mut *self;
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Pending => {}
            ready => return ready,
        }
        if this.deadline.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let slow = RpcError::new(
            Reason::TooSlow,
            format!("the request has not arrived within {:?}", this.allowed),
            "check the link, and send it again",
        );
        Poll::Ready(Some(Err(slow.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::convert::Infallible;

    use http_body::Frame;
    use tidemark_identity::token::TokenHash;

    use super::*;
    use crate::gate::GateFiles;

    const CALL: &str = "/tidemark.vault.v1.Vault/GetStatus";

    /// A body of which nothing ever comes.
    struct Stalled;

    impl HttpBody for Stalled {
        type Data = tonic::codegen::Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Self::Data>, Infallible>>> {
            Poll::Pending
        }
    }

    /// Reads its request to the end, and answers with the error of it; never where there is none.
    fn shield(
        request_max: Duration,
        answer_max: Duration,
    ) -> impl Service<
        HttpRequest<Body>,
        Response = HttpResponse<Option<Status>>,
        Error = Infallible,
        Future: Send,
    > {
        let inner = tower::service_fn(|request: HttpRequest<Body>| async {
            let mut body = request.into_body();
            let frame = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
            match frame.and_then(Result::err) {
                Some(error) => Ok::<_, Infallible>(HttpResponse::new(Some(error))),
                None => std::future::pending().await,
            }
        });
        Shield {
            gate: Gate::open(GateFiles::default()).unwrap(),
            times: Times {
                request_max,
                answer_max,
            },
            inner,
        }
    }

    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_request_that_does_not_arrive_is_not_waited_for() {
        let request = HttpRequest::post(CALL).body(Body::new(Stalled)).unwrap();
        let answer = shield(SHORT, LONG).call(request).await.unwrap();
        let error = RpcError::from(answer.into_body().unwrap());
        assert_eq!(error.reason, Reason::TooSlow);
    }

    #[tokio::test]
    async fn who_only_looks_is_not_kept_waiting_and_work_is_waited_for() {
        let request = |path: &str| HttpRequest::post(path).body(Body::empty()).unwrap();
        let answer = shield(LONG, SHORT).call(request(CALL)).await.unwrap();
        let error = RpcError::from(Status::from_header_map(answer.headers()).unwrap());
        assert_eq!(error.reason, Reason::TooSlow);
        assert!(error.message.contains("Vault/GetStatus"), "{error}");
        let mut waiting = shield(LONG, SHORT);
        let work = waiting.call(request("/tidemark.vault.v1.Vault/Maintain"));
        assert!(timeout(SHORT * 3, work).await.is_err());
    }

    /// Two who come with tokens, and a call of one of them.
    #[tokio::test]
    async fn a_call_is_let_through_where_its_caller_has_a_role_that_it_takes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identities");
        let token = |name: &str| format!("the-token-of-{name}");
        let identity = |name: &str, role| {
            let hash = TokenHash::of(&token(name)).to_hex();
            format!(
                "[[identity]]\nname = '{name}'\nroles = ['{role}']\nvolumes = ['*']\ntoken_sha256 = '{hash}'\n"
            )
        };
        let text = identity("desk", "viewer") + &identity("edge-7", "source");
        std::fs::write(&path, text).unwrap();
        let gate = Gate::open(GateFiles {
            identities: Some(path),
            ..GateFiles::default()
        })
        .unwrap();
        let inner = tower::service_fn(|_: HttpRequest<Body>| async {
            Ok::<_, Infallible>(HttpResponse::new(()))
        });
        let asked = async |name: &str, call: &str| {
            let request = HttpRequest::post(call)
                .header(AUTHORIZATION, format!("Bearer {}", token(name)))
                .body(Body::empty());
            let mut shield = ShieldLayer::new(Arc::clone(&gate)).layer(inner);
            let answer = shield.call(request.unwrap()).await.unwrap();
            Status::from_header_map(answer.headers()).map(|status| RpcError::from(status).reason)
        };
        assert_eq!(asked("desk", CALL).await, None);
        let denied = Some(Reason::PermissionDenied);
        assert_eq!(asked("edge-7", CALL).await, denied);
        let work = "/tidemark.vault.v1.Vault/Maintain";
        assert_eq!(asked("desk", work).await, denied);
        let unknown = Some(Reason::Unauthenticated);
        assert_eq!(asked("nobody", CALL).await, unknown);
    }

    #[tokio::test]
    async fn who_is_unknown_stays_a_stranger() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identities");
        std::fs::write(&path, "").unwrap();
        let gate = Gate::open(GateFiles {
            identities: Some(path),
            ..GateFiles::default()
        });
        let inner = tower::service_fn(|_: HttpRequest<Body>| async {
            Ok::<_, Infallible>(HttpResponse::new(()))
        });
        let mut shield = ShieldLayer::new(gate.unwrap()).layer(inner);
        let peer = Peer::new(None);
        for call in [CALL, "/grpc.health.v1.Health/Check", "/no/call"] {
            let mut request = HttpRequest::post(call).body(Body::empty()).unwrap();
            request.extensions_mut().insert(peer.clone());
            shield.call(request).await.unwrap();
            assert!(!peer.is_admitted(), "{call}");
        }
    }

    #[test]
    fn a_header_that_is_no_bearer_token_is_refused() {
        let with = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, text.parse().unwrap());
            headers
        };
        assert_eq!(bearer(&HeaderMap::new()).unwrap(), None);
        assert_eq!(bearer(&with("Bearer abc")).unwrap(), Some("abc"));
        assert_eq!(bearer(&with("bearer  abc ")).unwrap(), Some("abc"));
        for text in ["", "abc", "Basic abc", "Bearer", "Bearer "] {
            let error = bearer(&with(text)).unwrap_err();
            assert_eq!(error.reason, Reason::Unauthenticated, "{text}");
        }
    }
}
