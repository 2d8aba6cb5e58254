//! HTTP/2 by hand, for a peer that heeds no limit.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::site::PATIENCE;

pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
const GOAWAY: u8 = 7;
pub(super) const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// How long a peer that reads nothing goes on sending to a service that takes no more.
const FULL_MAX: Duration = Duration::from_millis(300);

pub(super) struct Peer(TcpStream);

/// A frame: its type, stream and payload.
pub(super) type Frame = (u8, u32, Vec<u8>);

impl Peer {
    pub(super) async fn connect(address: SocketAddr) -> Self {
        let settings = frame(SETTINGS, 0, 0, &[]);
        Self::connect_with(address, &settings).await
    }

    /// Says that it has no room for any answer.
    pub(super) async fn connect_without_room(address: SocketAddr) -> Self {
        let initial_window_size = [0, 4, 0, 0, 0, 0];
        let settings = frame(SETTINGS, 0, 0, &initial_window_size);
        Self::connect_with(address, &settings).await
    }

    async fn connect_with(address: SocketAddr, settings: &[u8]) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut peer = Self(stream);
        let preface: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        peer.send(&[preface, settings].concat()).await.unwrap();
        // What the service allows; it is not heeded.
        while peer.frame().await.0 != SETTINGS {}
        let heard = frame(SETTINGS, ACK, 0, &[]);
        peer.send(&heard).await.unwrap();
        peer
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await
    }

    /// Sends without reading, until all is sent or the service takes no more of it.
    pub(super) async fn flood(&mut self, bytes: &[u8]) {
        // The service may have closed.
        let _ = timeout(FULL_MAX, self.send(bytes)).await;
    }

    /// Begins a call that never ends, with a header of so many bytes.
    pub(super) async fn begin(&mut self, stream: u32, path: &str, header_bytes: usize) {
        let call = call(stream, path, &header(&vec![b'x'; header_bytes]));
        self.send(&call).await.unwrap();
    }

    pub(super) async fn frame(&mut self) -> Frame {
        self.next().await.unwrap()
    }

    async fn next(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        self.0.read_exact(&mut payload).await?;
        Ok((head[3], stream, payload))
    }

    /// The next frame of a call.
    pub(super) async fn answer(&mut self) -> Frame {
        loop {
            let frame = self.frame().await;
            if [HEADERS, RST_STREAM].contains(&frame.0) {
                return frame;
            }
        }
    }

    /// Waits until the service closes the connection; gives its reason where it said one.
    pub(super) async fn closed(&mut self) -> Option<u8> {
        let mut reason = None;
        let end = async {
            while let Ok((kind, _, payload)) = self.next().await {
                if kind == GOAWAY {
                    reason = payload.get(7).copied();
                }
            }
        };
        timeout(PATIENCE, end).await.expect("it is closed in time");
        reason
    }
}

/// A frame as it is on the wire.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The head of a call whose message is still to come.
pub(super) fn call(stream: u32, path: &str, more: &[u8]) -> Vec<u8> {
    frame(
        HEADERS,
        END_HEADERS,
        stream,
        &[head(path), more.to_vec()].concat(),
    )
}

/// A whole call, whose message is empty.
pub(super) fn whole_call(stream: u32, path: &str) -> Vec<u8> {
    let message = frame(0, END_STREAM, stream, &[0; 5]);
    [call(stream, path, &[]), message].concat()
}

/// A call of which more headers follow than ever come.
pub(super) fn open_head(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, 0, stream, &head(path))
}

/// A call's headers: literals without indexing, as RFC 7541 has them; the pseudo-headers are from its static table.
fn head(path: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x04];
    put(&mut block, path.as_bytes());
    block.push(0x01);
    put(&mut block, b"localhost");
    for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")] {
        block.push(0);
        put(&mut block, name.as_bytes());
        put(&mut block, value.as_bytes());
    }
    block
}

/// One more header.
pub(super) fn header(value: &[u8]) -> Vec<u8> {
    let mut block = vec![0];
    put(&mut block, b"x");
    put(&mut block, value);
    block
}

/// Few bytes that stand for many: a header that is remembered, and that many times over.
pub(super) fn bomb(times: usize) -> Vec<u8> {
    let mut block = vec![0x40];
    put(&mut block, b"x");
    put(&mut block, &[b'x'; 3900]);
    // The newest entry of the dynamic table.
    block.extend(std::iter::repeat_n(0x80 | 62, times));
    block
}

/// A text with its length: 7 bits, and what is over that in groups of 7.
fn put(block: &mut Vec<u8>, text: &[u8]) {
    if text.len() < 127 {
        block.push(u8::try_from(text.len()).unwrap());
    } else {
        block.push(127);
        let mut rest = text.len() - 127;
        while rest >= 128 {
            block.push(u8::try_from(rest % 128).unwrap() | 128);
            rest /= 128;
        }
        block.push(u8::try_from(rest).unwrap());
    }
    block.extend_from_slice(text);
}
