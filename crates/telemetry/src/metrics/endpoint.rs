//! The Prometheus endpoint: `/metrics` over HTTP, and nothing else.
//!
//! It is bounded, so that whoever can reach it can't take anything from the data path: so many connections, a time for a
//! request's headers, a time for all of a connection, one reading at a time on a thread of its own. A reading that isn't
//! there in time is answered with 503.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{Format, Read};

/// Connections at the same time; others are closed at once.
const CONNECTIONS_MAX: usize = 16;
/// How long a client may take for the headers of its request.
const HEADERS_MAX: Duration = Duration::from_secs(5);
/// How long a connection may last: it is closed behind its answer.
const CONNECTION_MAX: Duration = Duration::from_secs(30);
/// How long a reading may take.
const READING_MAX: Duration = Duration::from_secs(10);
/// How long the end waits for a reading under way.
const END_MAX: Duration = Duration::from_secs(1);
/// How long accepting rests after a failure that trying again at once would repeat.
const PAUSE: Duration = Duration::from_millis(50);
/// The most bytes of a request.
const REQUEST_BYTES_MAX: usize = 16 << 10;

/// An address that is taken, and not served yet.
#[derive(Debug)]
pub(super) struct Bound {
    listener: TcpListener,
    /// Where it listens; the port is the real one.
    pub(super) addr: SocketAddr,
}

impl Bound {
    /// Takes the address.
    ///
    /// # Errors
    /// Somebody else has it, or it is none of this machine's.
    pub(super) async fn to(addr: SocketAddr) -> Result<Self> {
        let what = || format!("listen on {addr} for metrics (metrics_listen)");
        let listener = TcpListener::bind(addr).await.with_context(what)?;
        let addr = listener.local_addr().with_context(what)?;
        Ok(Self { listener, addr })
    }
}

/// What answers scrapes.
#[derive(Clone)]
pub(super) struct Endpoint {
    read: Read,
    /// One reading at a time.
    reading: Arc<Semaphore>,
    /// How long one may take, others before it included.
    patience: Duration,
    headers_max: Duration,
}

type Answer = Response<Full<Bytes>>;

impl Endpoint {
    /// Answers with what `read` gives.
    #[must_use]
    pub(super) fn new(read: Read) -> Self {
        Self {
            read,
            reading: Arc::new(Semaphore::new(1)),
            patience: READING_MAX,
            headers_max: HEADERS_MAX,
        }
    }

    /// Serves until told to stop, and closes what is open then.
    pub(super) async fn serve(self, bound: Bound, mut stop: watch::Receiver<bool>) {
        let mut open = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                accepted = bound.listener.accept() => accepted,
            };
            // Those that have ended since.
            while open.try_join_next().is_some() {}
            match accepted {
                // The client sees its connection closed, and comes again.
                Ok(_) if open.len() >= CONNECTIONS_MAX => {}
                Ok((stream, _)) => {
                    open.spawn(timeout(CONNECTION_MAX, self.clone().converse(stream)));
                }
                Err(_) => sleep(PAUSE).await,
            }
        }
        drop(bound);
        open.shutdown().await;
        // What a reading looks at is let go of when it ends.
        let _ = timeout(END_MAX, self.reading.acquire()).await;
    }

    async fn converse(self, stream: TcpStream) -> Result<(), hyper::Error> {
        let headers_max = self.headers_max;
        let answering = service_fn(move |request| {
            let endpoint = self.clone();
            async move { Ok::<_, Infallible>(endpoint.answer(request).await) }
        });
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(headers_max)
            .max_buf_size(REQUEST_BYTES_MAX)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), answering)
            .await
    }

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        if request.uri().path() != "/metrics" {
            return told(StatusCode::NOT_FOUND, "there is only /metrics\n");
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut refused = told(StatusCode::METHOD_NOT_ALLOWED, "metrics are only read\n");
            let allowed = HeaderValue::from_static("GET, HEAD");
            refused.headers_mut().insert(ALLOW, allowed);
            return refused;
        }
        let accept = request.headers().get(ACCEPT);
        let accept = accept.and_then(|accept| accept.to_str().ok());
        let format = Format::accepted(accept.unwrap_or_default());
        match timeout(self.patience, self.text(format)).await {
            Ok(Ok(text)) => {
                let mut answer = Response::new(Full::from(text));
                let content_type = HeaderValue::from_static(format.content_type());
                answer.headers_mut().insert(CONTENT_TYPE, content_type);
                answer
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "metrics can't be read");
                told(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the metrics can't be read: see the log\n",
                )
            }
            Err(_) => told(
                StatusCode::SERVICE_UNAVAILABLE,
                "the metrics were not read in time: the machine is overloaded\n",
            ),
        }
    }

    async fn text(&self, format: Format) -> io::Result<String> {
        let turn = Arc::clone(&self.reading).acquire_owned();
        let turn = turn.await.map_err(io::Error::other)?;
        let read = Arc::clone(&self.read);
        let work = tokio::task::spawn_blocking(move || {
            // Held to the end of the reading, even if nobody waits for it any more.
            let _turn = turn;
            format.write(&read())
        });
        work.await.map_err(io::Error::other)
    }
}

fn told(status: StatusCode, text: &'static str) -> Answer {
    let mut answer = Response::new(Full::from(text));
    *answer.status_mut() = status;
    let content_type = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, content_type);
    answer
}

#[cfg(test)]
mod tests;
