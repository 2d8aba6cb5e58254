//! What doesn't fit is refused, with the reason on both sides; and what is put right holds without a restart.

use std::{fs, net::SocketAddr, path::PathBuf, process::Command, time::Duration};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use prost::Message;
use rustix::process::Signal;
use tidemark_block::{Geometry, MemoryTable, image_digest};
use tidemark_identity::Role;
use tidemark_integration::programs::{self, Process, program};
use tidemark_proto::{
    Reason, RpcError,
    capture::v1::{self as capture, CaptureStatus},
    common::v1 as common,
    vault::v1::{self as vault, ingest_client::IngestClient},
};
use tidemark_tls::{Dialer, Line};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::site::{Site, call, dial, eventually, url_of, volume_file};

const STATUS: &str = "/tidemark.vault.v1.Vault/GetStatus";

/// The vault service as a process of its own, so that its log can be read.
struct Vault {
    process: Process,
    address: SocketAddr,
    log: PathBuf,
}

impl Vault {
    /// With the certificate of `name`.
    fn start(site: &Site, name: &str) -> Self {
        let address = programs::free_addr();
        let log = site.path(&format!("log-{name}"));
        let mut command = Self::command(site, name, address);
        let file = fs::File::create(&log).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let process = Process::spawn(&mut command, "vault-svc");
        programs::wait_for("the vault", || std::net::TcpStream::connect(address).ok());
        Self {
            process,
            address,
            log,
        }
    }

    fn command(site: &Site, name: &str, address: SocketAddr) -> Command {
        let mut command = program("vault-svc");
        for (flag, value) in [
            ("--tls-cert", format!("{name}.crt")),
            ("--tls-key", format!("{name}.key")),
            ("--tls-ca", "ca.crt".to_owned()),
            ("--identities", "identities.toml".to_owned()),
            ("--store-dir", format!("store-{name}")),
            ("--state-dir", format!("state-{name}")),
        ] {
            command.arg(flag).arg(site.path(&value));
        }
        command.arg("--listen").arg(address.to_string());
        command.arg("--reserve-bytes").arg("0");
        command
    }

    fn url(&self, host: &str) -> String {
        format!("https://{host}:{}", self.address.port())
    }

    /// Waits until the log has a refusal with this reason.
    fn logs(&self, reason: &str) {
        self.logs_of("is refused", reason);
    }

    /// Waits until the log has a line with both texts.
    fn logs_of(&self, what: &str, more: &str) {
        programs::wait_for(more, || {
            let log = fs::read_to_string(&self.log).unwrap();
            let is_it = |line: &str| line.contains(what) && line.contains(more);
            log.lines().any(is_it).then_some(())
        });
    }
}

async fn refused(dialer: &Dialer, url: &str) -> RpcError {
    match dial(dialer, url).await {
        Ok(line) => call(&line, STATUS, Bytes::new()).await.unwrap_err(),
        Err(error) => error,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_that_do_not_fit_are_refused_with_the_reason_on_both_sides() {
    let (site, other) = (Site::new(), Site::new());
    site.knows(&[("viewer", &[Role::Viewer], &["*"])]);
    let long_ago: Timestamp = "2020-01-01T00:00:00Z".parse().unwrap();
    let in_a_month = Timestamp::now() + SignedDuration::from_hours(24 * 30);
    site.certificate("viewer", &[]);
    site.certificate("one-address", &["127.0.0.1"]);
    site.certificate_of("too-old", &["127.0.0.1"], long_ago);
    site.certificate_of("too-new", &["127.0.0.1"], in_a_month);
    let vault = Vault::start(&site, "one-address");
    let url = vault.url("127.0.0.1");
    let good = site.dialer("viewer");
    call(&dial(&good, &url).await.unwrap(), STATUS, Bytes::new())
        .await
        .unwrap();

    // Of the client: (what it shows and trusts, what it says, what the vault logs).
    let mut of_other_ca = good.clone();
    of_other_ca.files.certificate = Some(other.certificate("viewer", &[]));
    let mut too_old = good.clone();
    too_old.files.certificate = Some(site.certificate_of("viewer-of-2020", &[], long_ago));
    let mut too_new = good.clone();
    too_new.files.certificate = Some(site.certificate_of("viewer-to-be", &[], in_a_month));
    let mut trusts_another = good.clone();
    trusts_another.files.ca = Some(other.ca());
    for (dialer, url, says, logs) in [
        (
            &of_other_ca,
            vault.url("127.0.0.1"),
            "the CA of our certificate is not trusted there",
            "of a CA that is not trusted here",
        ),
        (
            &too_old,
            vault.url("127.0.0.1"),
            "our certificate has expired",
            "the peer's certificate has expired",
        ),
        (
            &too_new,
            vault.url("127.0.0.1"),
            "or is not valid yet",
            "the peer's certificate is not valid yet",
        ),
        (
            &trusts_another,
            vault.url("127.0.0.1"),
            "of a CA that is not trusted here",
            "the CA of our certificate is not trusted there",
        ),
        (
            &good,
            vault.url("localhost"),
            "for another name",
            "our certificate is not accepted",
        ),
    ] {
        let error = refused(dialer, &url).await;
        assert_eq!(error.reason, Reason::TlsRefused, "{error}");
        assert!(error.message.contains(says), "{error}");
        assert!(!error.action.is_empty());
        vault.logs(logs);
    }
    let stranger = site.certificate("stranger", &[]);
    let error = refused(&site.dialer_with(Some(stranger)), &url).await;
    assert_eq!(error.reason, Reason::Unauthenticated);
    assert!(error.message.contains("\"stranger\""), "{error}");
    vault.logs("stranger");
    let error = refused(&site.dialer_with(None), &url).await;
    assert_eq!(error.reason, Reason::Unauthenticated);
    assert!(error.message.contains("neither a certificate"), "{error}");
    vault.logs("neither a certificate");

    for (name, says, logs, warns) in [
        (
            "too-old",
            "the peer's certificate has expired",
            "our certificate has expired",
            "has expired, and is refused",
        ),
        (
            "too-new",
            "the peer's certificate is not valid yet",
            "or is not valid yet",
            "is not valid yet, and is refused",
        ),
    ] {
        let vault = Vault::start(&site, name);
        // It knows it by itself, too.
        vault.logs_of(&format!("{name}.crt"), warns);
        let error = refused(&good, &vault.url("127.0.0.1")).await;
        assert!(error.message.contains(says), "{error}");
        vault.logs(logs);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_that_end_soon_are_told_of_by_whoever_shows_them() {
    let site = Site::new();
    let a_while_ago = Timestamp::now() - SignedDuration::from_hours(24 * 355);
    site.certificate_of("ends-soon", &["127.0.0.1"], a_while_ago);
    let vault = Vault::start(&site, "ends-soon");
    vault.logs_of("ends-soon.crt", "is shown to clients ends soon");
    vault.process.terminate();
    // What was renewed is not told of any more.
    site.certificate("ends-soon", &["127.0.0.1"]);
    let again = Vault::start(&site, "ends-soon");
    let good = site.dialer_with(None);
    refused(&good, &again.url("127.0.0.1")).await;
    again.logs("neither a certificate");
    let log = fs::read_to_string(&again.log).unwrap();
    assert!(!log.contains("ends soon"), "{log}");
}

#[test]
fn sighup_reads_certificates_and_identities_at_once() {
    let site = Site::new();
    let vault = Vault::start(&site, "service");
    vault.process.signal(Signal::HUP);
    vault.logs_of("certificates and identities", "are read again");
    fs::write(site.path("identities.toml"), "[[identity]]\n").unwrap();
    vault.process.signal(Signal::HUP);
    vault.logs_of("identities.toml", "what was read before still holds");
    vault.process.terminate();
}

#[test]
fn a_vault_whose_certificate_has_expired_is_not_restarted_for_it() {
    let site = Site::new();
    let long_ago: Timestamp = "2020-01-01T00:00:00Z".parse().unwrap();
    site.certificate_of("too-old", &["vault.example.com"], long_ago);
    let vault = Vault::start(&site, "too-old");
    let mut health = Vault::command(&site, "too-old", vault.address);
    let output = health.arg("health").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_no_service_cannot_pass_for_one() {
    let site = Site::new();
    site.certificate("localhost", &[]);
    let vault = Vault::start(&site, "localhost");
    let error = refused(&site.dialer("localhost"), &vault.url("localhost")).await;
    assert_eq!(error.reason, Reason::TlsRefused);
    assert!(error.message.contains("not for this use"), "{error}");
    vault.logs("our certificate is not for this use");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_text_is_not_sent_to_another_machine() {
    let error = refused(&Dialer::default(), "http://192.0.2.1:7402").await;
    assert_eq!(error.reason, Reason::PlainTextRefused);
    let output = program("tidemark")
        .args(["status", "--vault", "http://192.0.2.1:7402", "--json"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("PLAIN_TEXT_REFUSED"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_made_again_shows_the_certificate_that_is_there_then() {
    let site = Site::new();
    site.knows(&[("renamed", &[Role::Viewer], &["*"])]);
    site.certificate("viewer", &[]);
    let (cert, key) = site.certificate("renamed", &[]);
    let vault = site.vault().await;
    let listen = vault.listen_addr;
    let line = dial(&site.dialer("viewer"), &url_of(&vault)).await.unwrap();
    let ask = async || call(&line, STATUS, Bytes::new()).await;
    fs::copy(cert, site.path("viewer.crt")).unwrap();
    fs::copy(key, site.path("viewer.key")).unwrap();
    assert_eq!(ask().await.unwrap_err().reason, Reason::Unauthenticated);
    vault.shutdown().await.unwrap();
    let config = vault_svc::Config {
        listen,
        ..site.vault_config()
    };
    let vault = vault_svc::start(config).await.unwrap();
    eventually("the new certificate", async || ask().await.ok()).await;
    vault.shutdown().await.unwrap();
}

fn zeroes() -> (Geometry, Bytes) {
    let geometry = Geometry::new(64 << 10, tidemark_block::BlockSize::MIN).unwrap();
    let digest = image_digest(&MemoryTable::new(geometry)).unwrap();
    (
        geometry,
        tidemark_proto::convert::image_digest_field(digest),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_replaced_holds_without_a_restart_and_an_interval_goes_on_meanwhile() {
    let site = Site::new();
    site.knows(&[("edge-7", &[Role::Source], &["*"])]);
    site.certificate("edge-7", &[]);
    site.certificate("service", &["127.0.0.1"]);
    let config = vault_svc::Config {
        tls_reload_period: Duration::from_millis(20).into(),
        ..site.vault_config()
    };
    let running = vault_svc::start(config).await.unwrap();
    let by_name = format!("https://localhost:{}", running.listen_addr.port());
    let edge = site.dialer("edge-7");
    let line = dial(&edge, &url_of(&running)).await.unwrap();
    let mut ingest = IngestClient::new(line.clone());
    let (geometry, digest) = zeroes();
    let id = Bytes::from_static(&[7; 16]);
    let term = vault::StartTermRequest {
        volume_id: id.clone(),
        volume_name: "data".to_owned(),
        source_name: "edge-7".to_owned(),
        geometry: Some(geometry.into()),
        last_term: 0,
        nonce: Bytes::from_static(&[9; 16]),
    };
    ingest.start_term(term).await.unwrap();
    let (sender, receiver) = mpsc::channel(4);
    let send = async |message| {
        let request = vault::ShipRequest {
            message: Some(message),
        };
        sender.send(request).await.unwrap();
    };
    send(vault::ship_request::Message::Header(
        vault::IntervalHeader {
            volume_id: id,
            term: 1,
            interval_id: Bytes::from_static(&[3; 16]),
            geometry: Some(geometry.into()),
            epoch: 1,
            cut_time_ms: 1,
            coherence: common::Coherence::Crash.into(),
            trigger: common::Trigger::Request.into(),
            ..vault::IntervalHeader::default()
        },
    ))
    .await;
    let answers = ingest.ship(ReceiverStream::new(receiver)).await.unwrap();
    let mut answers = answers.into_inner();
    answers.message().await.unwrap().unwrap();

    // The new certificate is for a name that the old one isn't for. The key alone is of no use: the old pair holds.
    let error = dial(&edge, &by_name).await.unwrap_err();
    assert!(error.message.contains("for another name"), "{error}");
    let (cert, key) = site.certificate("next", &["localhost", "127.0.0.1"]);
    fs::copy(&key, site.path("service.key")).unwrap();
    assert!(matches!(
        running.reload(),
        tidemark_tls::Reloaded::Failed(_)
    ));
    dial(&edge, &url_of(&running)).await.unwrap();
    fs::copy(&cert, site.path("service.crt")).unwrap();
    eventually("the new certificate", async || {
        dial(&edge, &by_name).await.ok()
    })
    .await;

    send(vault::ship_request::Message::Seal(vault::IntervalSeal {
        changed_blocks: 0,
        frame_count: 0,
        image_digest: digest,
    }))
    .await;
    let receipt = loop {
        let answer = answers.message().await.unwrap().unwrap();
        if let Some(vault::ship_response::Message::Receipt(receipt)) = answer.message {
            break receipt;
        }
    };
    assert_eq!(receipt.generation, 1);

    // Rights are taken away from connections that are open, too.
    let ask = async || {
        let request = vault::MarkCurrentRequest::default().encode_to_vec();
        let path = "/tidemark.vault.v1.Ingest/MarkCurrent";
        call(&line, path, request.into()).await.unwrap_err().reason
    };
    assert_eq!(ask().await, Reason::RequestInvalid);
    site.knows(&[("edge-7", &[Role::Viewer], &["*"])]);
    eventually("another role", async || {
        (ask().await == Reason::PermissionDenied).then_some(())
    })
    .await;
    site.knows(&[]);
    eventually("no role", async || {
        (ask().await == Reason::Unauthenticated).then_some(())
    })
    .await;
    // And so they are from certificates of a CA that is no longer trusted.
    site.knows(&[("edge-7", &[Role::Source], &["*"])]);
    eventually("the role", async || {
        (ask().await == Reason::RequestInvalid).then_some(())
    })
    .await;
    fs::copy(Site::new().ca(), site.ca()).unwrap();
    eventually("another CA", async || {
        (ask().await == Reason::Unauthenticated).then_some(())
    })
    .await;
    running.shutdown().await.unwrap();
}

/// Adds the volume `data`.
pub(super) async fn add(site: &Site, line: &Line) {
    let add = capture::AddVolumeRequest {
        name: "data".to_owned(),
        file: volume_file(&site.path(""), "data"),
        length: 1 << 20,
        ..capture::AddVolumeRequest::default()
    };
    let path = "/tidemark.capture.v1.Capture/AddVolume";
    call(line, path, add.encode_to_vec().into()).await.unwrap();
}

/// The one volume, as the capture service shows it.
async fn shown(line: &Line) -> capture::Volume {
    let path = "/tidemark.capture.v1.Capture/GetStatus";
    let answer = call(line, path, Bytes::new()).await.unwrap().unwrap();
    CaptureStatus::decode(answer).unwrap().volumes.remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_uplink_ships_with_a_token_in_place_of_a_certificate() {
    let site = Site::new();
    site.knows_tokens_of(&[
        ("me", &[Role::Operator, Role::Viewer], &["*"]),
        ("edge-7", &[Role::Source], &["*"]),
    ]);
    let vault = site.vault().await;
    let token = site.dialer_with_token("edge-7").files.token.unwrap();
    let config = capture_svc::Config {
        vault_cert: PathBuf::new(),
        vault_key: PathBuf::new(),
        vault_token_file: token,
        ..site.capture_config(&url_of(&vault), "edge-7")
    };
    let running = capture_svc::start(config).await.unwrap();
    let url = format!("https://{}", running.control_addr());
    let me = dial(&site.dialer_with_token("me"), &url).await.unwrap();
    add(&site, &me).await;
    eventually("a generation", async || {
        (shown(&me).await.base_generation == 1).then_some(())
    })
    .await;
    running.shutdown().await.unwrap();
    vault.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_uplink_that_is_refused_shows_why_and_ships_once_it_is_let_in() {
    let site = Site::new();
    let operator = ("me", &[Role::Operator, Role::Viewer][..], &["*"][..]);
    site.knows(&[operator]);
    site.certificate("me", &[]);
    let long_ago: Timestamp = "2020-01-01T00:00:00Z".parse().unwrap();
    site.certificate_of("edge-7", &[], long_ago);
    let vault = vault_svc::start(vault_svc::Config {
        tls_reload_period: Duration::from_millis(20).into(),
        ..site.vault_config()
    })
    .await
    .unwrap();
    let config = site.capture_config(&url_of(&vault), "edge-7");
    let running = capture_svc::start(config).await.unwrap();
    let url = format!("https://{}", running.control_addr());
    let me = dial(&site.dialer("me"), &url).await.unwrap();
    add(&site, &me).await;
    let uplink = async || shown(&me).await;
    let shows = async |what: &str| {
        eventually(what, async || {
            let error = uplink().await.uplink.unwrap().error;
            error.contains(what).then_some(())
        })
        .await;
    };
    shows("our certificate has expired").await;
    site.certificate("edge-7", &[]);
    shows("nobody here is called \"edge-7\"").await;
    site.knows(&[operator, ("edge-7", &[Role::Viewer], &["*"])]);
    shows("may not call Ingest/StartTerm").await;
    site.knows(&[operator, ("edge-7", &[Role::Source], &["wal"])]);
    shows("has no rights to volume \"data\"").await;
    site.knows(&[operator, ("edge-7", &[Role::Source], &["data"])]);
    eventually("a generation", async || {
        (uplink().await.base_generation == 1).then_some(())
    })
    .await;
    running.shutdown().await.unwrap();
    vault.shutdown().await.unwrap();
}
