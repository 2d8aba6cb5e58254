//! What comes over the limits is refused, and others are served all the same.

use bytes::Bytes;
use tidemark_identity::Role;
use tidemark_proto::{ErrorKind, Reason};

use super::site::{Site, call, dial, url_of};

/// More than a message may have.
const TOO_LONG: usize = (4 << 20) + 1;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_too_long_is_refused_and_a_strangers_is_not_looked_at() {
    let site = Site::new();
    site.knows(&[("viewer", &[Role::Viewer], &["*"])]);
    site.certificate("viewer", &[]);
    let vault = site.vault().await;
    let url = url_of(&vault);
    let path = "/tidemark.vault.v1.Vault/ListGenerations";
    let long = Bytes::from(vec![0; TOO_LONG]);
    let nobody = dial(&site.dialer_with(None), &url).await.unwrap();
    let error = call(&nobody, path, long.clone()).await.unwrap_err();
    assert_eq!(error.reason, Reason::Unauthenticated);
    let viewer = dial(&site.dialer("viewer"), &url).await.unwrap();
    let error = call(&viewer, path, long).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
    assert!(error.message.contains("too large"), "{error}");
    let listed = "/tidemark.vault.v1.Vault/ListVolumes";
    call(&viewer, listed, Bytes::new()).await.unwrap();
    vault.shutdown().await.unwrap();
}

/// HTTP/2 by hand, for a peer that heeds no limit.
mod rude {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const END_HEADERS: u8 = 4;
    const ACK: u8 = 1;

    pub(super) struct Peer(TcpStream);

    /// A frame: its type, stream and payload.
    pub(super) type Frame = (u8, u32, Vec<u8>);

    impl Peer {
        pub(super) async fn connect(address: std::net::SocketAddr) -> Self {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream
                .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                .await
                .unwrap();
            let mut peer = Self(stream);
            peer.send(SETTINGS, 0, 0, &[]).await;
            // What the service allows; it is not heeded.
            while peer.frame().await.0 != SETTINGS {}
            peer.send(SETTINGS, ACK, 0, &[]).await;
            peer
        }

        async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
            let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
            let mut bytes = vec![length[1], length[2], length[3], kind, flags];
            bytes.extend_from_slice(&stream.to_be_bytes());
            bytes.extend_from_slice(payload);
            self.0.write_all(&bytes).await.unwrap();
        }

        /// Begins a call that never ends, with a header of so many bytes.
        pub(super) async fn begin(&mut self, stream: u32, path: &str, header_bytes: usize) {
            // Literals without indexing, as RFC 7541 has them; the pseudo-headers are from its static table.
            let mut block = vec![0x83, 0x86, 0x04];
            put(&mut block, path.as_bytes());
            block.push(0x01);
            put(&mut block, b"localhost");
            for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")] {
                block.push(0);
                put(&mut block, name.as_bytes());
                put(&mut block, value.as_bytes());
            }
            block.push(0);
            put(&mut block, b"x");
            put(&mut block, &vec![b'x'; header_bytes]);
            self.send(HEADERS, END_HEADERS, stream, &block).await;
        }

        pub(super) async fn frame(&mut self) -> Frame {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            self.0.read_exact(&mut payload).await.unwrap();
            (head[3], stream, payload)
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
}

const REFUSED_STREAM: [u8; 4] = [0, 0, 0, 7];

async fn calls_beyond_the_limit_are_refused(address: std::net::SocketAddr, path: &str, limit: u32) {
    let mut peer = rude::Peer::connect(address).await;
    for n in 0..limit + 5 {
        peer.begin(2 * n + 1, path, 1).await;
    }
    let mut refused = Vec::new();
    while refused.len() < 5 {
        // Those that are let in may be answered meanwhile.
        let (kind, stream, payload) = peer.answer().await;
        if kind == rude::RST_STREAM {
            assert_eq!(payload, REFUSED_STREAM);
            refused.push(stream);
        }
    }
    let beyond: Vec<_> = (limit..limit + 5).map(|n| 2 * n + 1).collect();
    assert_eq!(refused, beyond);
}

async fn headers_beyond_the_limit_are_refused(address: std::net::SocketAddr, path: &str) {
    let mut peer = rude::Peer::connect(address).await;
    peer.begin(1, path, 20 << 10).await;
    let (kind, stream, payload) = peer.answer().await;
    assert_eq!((kind, stream), (rude::HEADERS, 1));
    // 431, as Huffman's code of RFC 7541 writes it.
    assert!(
        payload.windows(3).any(|bytes| bytes == [0x69, 0x90, 0xff]),
        "{payload:x?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_headers_beyond_their_limits_are_refused_by_both_services() {
    let site = Site::new();
    let vault = vault_svc::Config {
        listen: ([127, 0, 0, 1], 0).into(),
        store_dir: site.path("store"),
        state_dir: site.path("vault"),
        ..vault_svc::Config::default()
    };
    let vault = vault_svc::start(vault).await.unwrap();
    let capture = capture_svc::Config {
        listen: ([127, 0, 0, 1], 0).into(),
        state: site.path("capture"),
        calls_max: 8,
        ..capture_svc::Config::default()
    };
    let capture = capture_svc::start(capture).await.unwrap();
    for (address, path, limit) in [
        (vault.listen_addr, "/tidemark.vault.v1.Ingest/Ship", 256),
        (
            capture.control_addr(),
            "/tidemark.capture.v1.Coherence/Attach",
            8,
        ),
    ] {
        calls_beyond_the_limit_are_refused(address, path, limit).await;
        headers_beyond_the_limit_are_refused(address, path).await;
    }
    capture.shutdown().await.unwrap();
    vault.shutdown().await.unwrap();
}
