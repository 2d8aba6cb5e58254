//! What comes over the limits is refused, and others are served all the same.

use bytes::Bytes;
use tidemark_identity::Role;
use tidemark_proto::{ErrorKind, Reason};

use super::{
    rude,
    site::{Site, call, dial, url_of},
};

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
