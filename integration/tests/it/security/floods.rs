//! Peers that keep to the letter of HTTP/2 and send what costs a service more than them: their connection is closed, or
//! nothing more is read from it, and who is connected beside them notices nothing.

use std::net::SocketAddr;

use bytes::Bytes;
use tidemark_proto::{
    capture::v1::{WatchStatusRequest, capture_client::CaptureClient},
    vault::v1::{ShipRequest, ingest_client::IngestClient},
};
use tidemark_tls::{Dialer, Line};
use tokio::{
    sync::mpsc,
    time::{Duration, timeout},
};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    rude::{self, Peer, frame},
    site::{PATIENCE, Site, call, dial},
};

/// A reason of GOAWAY: the peer is told to calm down.
const ENHANCE_YOUR_CALM: u8 = 11;
/// More than any limit of a service, and more than a socket takes without being read.
const MANY: usize = 2_000_000;

/// A service, and somebody who uses it.
struct Place {
    address: SocketAddr,
    /// Calls: one that only looks, and one whose request is a stream.
    look: &'static str,
    stream: &'static str,
    line: Line,
}

impl Place {
    async fn of(address: SocketAddr, look: &'static str, stream: &'static str) -> Self {
        let url = format!("http://{address}");
        Self {
            address,
            look,
            stream,
            line: dial(&Dialer::default(), &url).await.unwrap(),
        }
    }

    async fn serves(&self) {
        call(&self.line, self.look, Bytes::new()).await.unwrap();
    }
}

/// Both services, with somebody's long streams at each.
struct Scene {
    vault: vault_svc::Running,
    capture: capture_svc::Running,
    places: [Place; 2],
    _site: Site,
}

impl Scene {
    async fn new() -> Self {
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
            ..capture_svc::Config::default()
        };
        let capture = capture_svc::start(capture).await.unwrap();
        let places = [
            Place::of(
                vault.listen_addr,
                "/tidemark.vault.v1.Vault/GetStatus",
                "/tidemark.vault.v1.Ingest/Ship",
            )
            .await,
            Place::of(
                capture.control_addr(),
                "/tidemark.capture.v1.Capture/GetStatus",
                "/tidemark.capture.v1.Coherence/Attach",
            )
            .await,
        ];
        Self {
            vault,
            capture,
            places,
            _site: site,
        }
    }

    /// Runs `attack` at each service; somebody's streams and calls go on beside it.
    async fn survives(self, attack: impl AsyncFn(&Place)) {
        let [vault, capture] = &self.places;
        let (_sender, receiver) = mpsc::channel::<ShipRequest>(1);
        let shipping = IngestClient::new(vault.line.clone())
            .ship(ReceiverStream::new(receiver))
            .await;
        let mut shipping = shipping.unwrap().into_inner();
        let watching = CaptureClient::new(capture.line.clone())
            .watch_status(WatchStatusRequest::default())
            .await;
        let mut watching = watching.unwrap().into_inner();
        assert!(watching.message().await.unwrap().is_some());
        for place in &self.places {
            attack(place).await;
            timeout(PATIENCE, place.serves()).await.unwrap();
        }
        let still = Duration::from_millis(20);
        assert!(timeout(still, shipping.message()).await.is_err());
        assert!(timeout(still, watching.message()).await.is_err());
        drop(self.places);
        self.capture.shutdown().await.unwrap();
        self.vault.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_are_reset_as_fast_as_they_are_made_end_the_connection() {
    let reset = |place: &Place| {
        let call = |n: u32| {
            let stream = 2 * n + 1;
            let cancel = frame(rude::RST_STREAM, 0, stream, &[0, 0, 0, 8]);
            [rude::call(stream, place.stream, &[]), cancel].concat()
        };
        (0..5000).flat_map(call).collect::<Vec<_>>()
    };
    let attack = async |place: &Place| {
        let mut peer = Peer::connect(place.address).await;
        peer.flood(&reset(place)).await;
        assert_eq!(peer.closed().await, Some(ENHANCE_YOUR_CALM));
    };
    Scene::new().await.survives(attack).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_do_not_end_and_headers_that_grow_are_not_gathered() {
    let attack = async |place: &Place| {
        let mut peer = Peer::connect(place.address).await;
        peer.send(&rude::open_head(1, place.look)).await.unwrap();
        let more = frame(rude::CONTINUATION, 0, 1, &rude::header(&[b'x'; 1000]));
        peer.flood(&more.repeat(2000)).await;
        assert!(peer.closed().await.is_none_or(|reason| reason != 0));
        // 5,000 times 3,900 bytes are more than 16 KiB by far.
        let mut peer = Peer::connect(place.address).await;
        peer.flood(&rude::call(1, place.look, &rude::bomb(5000)))
            .await;
        assert!(peer.closed().await.is_none_or(|reason| reason != 0));
    };
    Scene::new().await.survives(attack).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reads_no_answers_is_not_answered_without_bound() {
    let attack = async |place: &Place| {
        // What asks for an answer by itself; none is read.
        let mut held = Vec::new();
        for kind in [
            frame(rude::PING, 0, 0, &[7; 8]),
            frame(rude::SETTINGS, 0, 0, &[0, 4, 0, 0, 255, 255]),
        ] {
            let mut peer = Peer::connect(place.address).await;
            peer.flood(&kind.repeat(MANY)).await;
            held.push(peer);
        }
        let mut peer = Peer::connect_without_room(place.address).await;
        let calls = (0..2000).flat_map(|n| rude::whole_call(2 * n + 1, place.look));
        peer.flood(&calls.collect::<Vec<_>>()).await;
        held.push(peer);
        timeout(PATIENCE, place.serves()).await.unwrap();
    };
    Scene::new().await.survives(attack).await;
}
