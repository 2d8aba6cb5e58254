//! One accepted connection: with TLS it must end its handshake in time, then begin to speak HTTP/2 in time, then show
//! who it is in time. From then on the server's pings watch over it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tidemark_tls::{Gate, Peer, linger, told};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::oneshot,
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::{Open, Times};

/// The client's preface, and the header of the frame that must follow it.
const GREETING_BYTES: usize = 24 + 9;

type Handshake = tokio_rustls::FallibleAccept<TcpStream>;

/// A client's connection.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: Peer,
    gate: Arc<Gate>,
    /// `None` once the client has said enough.
    greeting: Option<Greeting>,
    /// `None` once the client has been admitted.
    pub(crate) admission: Option<Admission>,
    _open: Open,
}

enum Stream {
    Plain(TcpStream),
    Handshake(Box<Handshake>),
    Tls(Box<TlsStream<TcpStream>>),
    /// The handshake has failed.
    Ended,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Handshake(_) => "Handshake",
            Self::Tls(_) => "Tls",
            Self::Ended => "Ended",
        })
    }
}

#[derive(Debug)]
struct Greeting {
    deadline: Pin<Box<Sleep>>,
    bytes_left: usize,
}

/// What a client is given to say who it is.
#[derive(Debug)]
pub(crate) struct Admission {
    deadline: Pin<Box<Sleep>>,
    /// Comes where it has to leave for another.
    leave: Option<oneshot::Receiver<()>>,
}

impl Admission {
    pub(crate) fn within(time: Duration) -> Self {
        Self {
            deadline: Box::pin(sleep(time)),
            leave: None,
        }
    }

    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        let leave = self.leave.as_mut().map(|leave| Pin::new(leave).poll(cx));
        match leave {
            Some(Poll::Ready(Ok(()))) => return true,
            // Nobody is left who could ask for it.
            Some(Poll::Ready(Err(_))) => self.leave = None,
            Some(Poll::Pending) | None => {}
        }
        self.deadline.as_mut().poll(cx).is_ready()
    }
}

impl Connection {
    pub(crate) fn new(stream: TcpStream, open: Open, times: Times, gate: &Arc<Gate>) -> Self {
        let peer = Peer::new(stream.peer_addr().ok());
        let stream = match gate.acceptor() {
            None => Stream::Plain(stream),
            Some(acceptor) => Stream::Handshake(Box::new(acceptor.accept(stream).into_fallible())),
        };
        Self {
            stream,
            peer,
            gate: Arc::clone(gate),
            greeting: Some(Greeting {
                deadline: Box::pin(sleep(times.greeting_max)),
                bytes_left: GREETING_BYTES,
            }),
            admission: (!gate.asks_nobody()).then(|| Admission::within(times.admission_max)),
            _open: open,
        }
    }

    /// Its client, and what has it leave; none where nobody is asked who they are.
    pub(crate) fn give_way(&mut self) -> Option<(Peer, oneshot::Sender<()>)> {
        let admission = self.admission.as_mut()?;
        let (sender, leave) = oneshot::channel();
        admission.leave = Some(leave);
        Some((self.peer.clone(), sender))
    }

    /// Whether the client has taken too long with what it must do, or has to leave for another.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        if let Some(greeting) = &mut self.greeting
            && greeting.deadline.as_mut().poll(cx).is_ready()
        {
            return true;
        }
        if self.peer.is_admitted() {
            self.admission = None;
        }
        self.admission
            .as_mut()
            .is_some_and(|admission| admission.is_over(cx))
    }

    /// Ends the handshake.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Stream::Handshake(handshake) = &mut self.stream else {
            return Poll::Ready(Ok(()));
        };
        match ready!(Pin::new(handshake.as_mut()).poll(cx)) {
            Ok(stream) => {
                let (_, session) = stream.get_ref();
                self.peer
                    .showed(session.peer_certificates().unwrap_or_default());
                self.stream = Stream::Tls(Box::new(stream));
                Poll::Ready(Ok(()))
            }
            Err((error, stream)) => {
                self.stream = Stream::Ended;
                // Who goes away, as a probe of the port does, was not refused.
                if let Some(why) = told(&error) {
                    self.gate.log_refusal(&self.peer, &why);
                }
                tokio::spawn(linger(stream));
                Poll::Ready(Err(error))
            }
        }
    }

    /// The open stream, as `poll` wants it.
    fn poll_with<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut (dyn Both + '_)>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        ready!(self.poll_open(cx))?;
        match &mut self.stream {
            Stream::Plain(stream) => poll(Pin::new(stream), cx),
            Stream::Tls(stream) => poll(Pin::new(stream.as_mut()), cx),
            Stream::Handshake(_) | Stream::Ended => {
                Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
            }
        }
    }
}

/// A stream of bytes in both directions.
trait Both: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Both for T {}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.is_late(cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        ready!(this.poll_with(cx, |stream, cx| stream.poll_read(cx, buf)))?;
        if let Some(greeting) = &mut this.greeting {
            let read = buf.filled().len() - before;
            greeting.bytes_left = greeting.bytes_left.saturating_sub(read);
            if greeting.bytes_left == 0 {
                this.greeting = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |stream, cx| stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        // TCP is, and TLS takes what it is given.
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_with(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if matches!(self.stream, Stream::Handshake(_) | Stream::Ended) {
            // There is nothing to take leave of.
            self.stream = Stream::Ended;
            return Poll::Ready(Ok(()));
        }
        self.poll_with(cx, |stream, cx| stream.poll_shutdown(cx))
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}
