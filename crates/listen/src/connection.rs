//! One accepted connection: it must begin to speak HTTP/2 in time. From then on the server's pings watch over it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::Open;

/// The client's preface, and the header of the frame that must follow it.
const GREETING_BYTES: usize = 24 + 9;

/// A client's connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// `None` once the client has said enough.
    greeting: Option<Greeting>,
    _open: Open,
}

#[derive(Debug)]
struct Greeting {
    deadline: Pin<Box<Sleep>>,
    bytes_left: usize,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream, open: Open, greeting_max: Duration) -> Self {
        Self {
            stream,
            greeting: Some(Greeting {
                deadline: Box::pin(sleep(greeting_max)),
                bytes_left: GREETING_BYTES,
            }),
            _open: open,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(greeting) = &mut this.greeting
            && greeting.deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
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
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}
