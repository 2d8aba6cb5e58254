//! Peers that send nonsense, say nothing, want everything, or vanish: others are served meanwhile, memory stays within
//! bounds, and nothing is left of it afterwards.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tidemark_proto::{
    capture::v1::{WatchStatusRequest, capture_client::CaptureClient},
    vault::v1::{ShipRequest, ingest_client::IngestClient},
};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::{
    crash::{goes_on, settle_and_check},
    nbd::Client,
    programs::{Split, args, have, wait_for},
    workload::{Writer, seed},
};

const SIZE: usize = 8 << 20;
/// What a service may grow by, whatever a thousand peers do.
const GROWTH_MAX: u64 = 192 << 20;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

struct Scene {
    services: Split,
    writer: Writer,
    // Last, so that the services end before it goes.
    dir: tempfile::TempDir,
}

fn scene(name: u64, set: impl FnOnce(&mut Split)) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let mut services = Split::new(dir.path());
    services.capture_flags = [
        "--interval-max=200ms",
        "--backoff-max=300ms",
        "--scrub-period=500ms",
    ]
    .map(str::to_owned)
    .to_vec();
    set(&mut services);
    services.start_vault();
    services.start_capture();
    let (file, size) = (dir.path().join("data.img"), SIZE.to_string());
    services.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", size
    ]);
    services.cli.json(args!["ship", "data"]);
    let writer = Writer::start(services.socket.clone(), "data", SIZE, seed(name));
    goes_on(&services);
    Scene {
        dir,
        services,
        writer,
    }
}

impl Scene {
    fn ends_well(mut self) {
        goes_on(&self.services);
        assert_eq!(self.writer.retries(), 0, "no write ever failed");
        settle_and_check(&self.services, &mut self.writer, self.dir.path());
        self.services.stop();
    }
}

/// Bytes of memory that a process holds for itself.
fn memory_of(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let anonymous = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    };
    anonymous("RssAnon:") + anonymous("RssShmem:")
}

fn assert_grew_within_bounds(pid: u32, before: u64) {
    let grown = memory_of(pid).saturating_sub(before);
    assert!(grown < GROWTH_MAX, "grew by {grown} bytes");
}

/// Connections that have sent this and then keep still. One that was refused is among them.
fn connections(url: &str, count: usize, sent: &[u8]) -> Vec<TcpStream> {
    let addr = url.strip_prefix("http://").unwrap();
    (0..count)
        .map(|_| {
            let mut stream = TcpStream::connect(addr).unwrap();
            // Whoever is refused may be told so before it has sent all.
            let _ = stream.write_all(sent);
            stream
        })
        .collect()
}

fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}

fn garbage(rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = vec![0; 64 << 10];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// A crowd at one service.
struct Crowd {
    silent: Vec<TcpStream>,
    noisy: Vec<TcpStream>,
    _halting: Vec<TcpStream>,
    _greeted: Vec<TcpStream>,
}

impl Crowd {
    fn at(url: &str, rng: &mut StdRng) -> Self {
        let mut noisy = Vec::new();
        for _ in 0..50 {
            noisy.extend(connections(url, 1, &garbage(rng)));
            // A frame that is longer than any may be.
            let mut frame = garbage(rng);
            frame[0] = 0xff;
            noisy.extend(connections(url, 1, &[PREFACE, &frame].concat()));
        }
        Self {
            silent: connections(url, 600, b""),
            noisy,
            _halting: connections(url, 200, &PREFACE[..10]),
            _greeted: connections(url, 100, PREFACE),
        }
    }
}

#[test]
fn nonsense_and_silence_on_a_thousand_connections_keep_nobody_else_from_being_served() {
    let scene = scene(0x90, |_| {});
    let cli = &scene.services.cli;
    let mut rng = StdRng::seed_from_u64(seed(0x91));
    let pids = [scene.services.vault_pid(), scene.services.capture_pid()];
    let before = pids.map(memory_of);
    let mut crowds = [&cli.vault, &cli.capture].map(|url| Crowd::at(url, &mut rng));
    goes_on(&scene.services);
    cli.json(args!["status"]);
    for (pid, before) in pids.into_iter().zip(before) {
        assert_grew_within_bounds(pid, before);
    }
    for crowd in &mut crowds {
        wait_for("nonsense to be cut off", || {
            crowd.noisy.iter_mut().all(is_closed).then_some(())
        });
        wait_for("silence to be cut off", || {
            crowd.silent.iter_mut().all(is_closed).then_some(())
        });
    }
    drop(crowds);
    scene.ends_well();
}

async fn channel(url: &str) -> Channel {
    let endpoint = Endpoint::from_shared(url.to_owned()).unwrap();
    endpoint.connect().await.unwrap()
}

#[test]
fn a_thousand_streams_that_send_nothing_keep_nobody_else_from_being_served() {
    let scene = scene(0x92, |_| {});
    let cli = &scene.services.cli;
    let pids = [scene.services.vault_pid(), scene.services.capture_pid()];
    let before = pids.map(memory_of);
    let runtime = Runtime::new().unwrap();
    let held = runtime.block_on(async {
        let mut held = Vec::new();
        for _ in 0..5 {
            let mut vault = IngestClient::new(channel(&cli.vault).await);
            let mut capture = CaptureClient::new(channel(&cli.capture).await);
            for _ in 0..200 {
                let (sender, receiver) = mpsc::channel::<ShipRequest>(1);
                let answers = vault.ship(ReceiverStream::new(receiver)).await.unwrap();
                let watched = capture.watch_status(WatchStatusRequest::default()).await;
                held.push((sender, answers, watched.unwrap()));
            }
        }
        held
    });
    assert_eq!(held.len(), 1000);
    goes_on(&scene.services);
    cli.json(args!["ship", "data"]);
    cli.json(args!["status"]);
    for (pid, before) in pids.into_iter().zip(before) {
        assert_grew_within_bounds(pid, before);
    }
    drop(held);
    drop(runtime);
    scene.ends_well();
}

const READ: u16 = 0;
const WRITE: u16 = 1;

fn request(kind: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(7_u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

#[test]
fn nbd_clients_that_vanish_never_read_or_want_too_much_harm_nobody_else() {
    let scene = scene(0x93, |_| {});
    let pid = scene.services.capture_pid();
    let before = memory_of(pid);
    let mut held = Vec::new();
    for _ in 0..20 {
        let connect = || Client::connect(&scene.services.socket, "data").unwrap();
        // Vanishes amid the payload of a write.
        let client = connect();
        let mut raw = client.raw();
        raw.write_all(&request(WRITE, 0, 1 << 20)).unwrap();
        raw.write_all(&[0; 1000]).unwrap();
        raw.shutdown(std::net::Shutdown::Both).unwrap();
        // Announces two GiB.
        let client = connect();
        let mut raw = client.raw();
        raw.write_all(&request(READ, 0, 1 << 31)).unwrap();
        raw.write_all(&request(WRITE, 0, 1 << 31)).unwrap();
        held.push(client);
        // Asks and asks and never reads an answer.
        let client = connect();
        let mut raw = client.raw();
        raw.set_nonblocking(true).unwrap();
        let asked = request(READ, 0, 4 << 20);
        let refused = (0..100_000).find_map(|_| raw.write_all(&asked).err());
        assert!(refused.is_some(), "it is not heard for ever");
        held.push(client);
    }
    goes_on(&scene.services);
    assert_grew_within_bounds(pid, before);
    drop(held);
    scene.ends_well();
}

/// A command that runs a service with so few file descriptors.
fn with_descriptors(count: u32) -> Vec<String> {
    vec!["prlimit".into(), format!("--nofile={count}:{count}")]
}

/// Opens connections until the service has no descriptor for another.
fn exhaust(url: &str) -> Vec<TcpStream> {
    let mut held = connections(url, 300, PREFACE);
    wait_for("those without a descriptor to be refused", || {
        held.iter_mut().any(is_closed).then_some(())
    });
    held
}

#[test]
fn a_capture_service_without_file_descriptors_refuses_clients_and_keeps_those_it_has() {
    if !have(&["prlimit"]) {
        return;
    }
    let scene = scene(0x94, |services| {
        services.capture_wrapper = with_descriptors(100)
    });
    let held = exhaust(&scene.services.cli.capture);
    // Through the other door there is no more room either.
    let connect = || Client::connect(&scene.services.socket, "data");
    let clients: Vec<_> = (0..100).map_while(|_| connect().ok()).collect();
    assert!(clients.len() < 100);
    scene.writer.wait_for(500);
    drop((held, clients));
    scene.ends_well();
}

#[test]
fn a_vault_without_file_descriptors_refuses_clients_and_takes_intervals_again_afterwards() {
    if !have(&["prlimit"]) {
        return;
    }
    let scene = scene(0x95, |services| {
        services.vault_wrapper = with_descriptors(80)
    });
    let held = exhaust(&scene.services.cli.vault);
    scene.writer.wait_for(500);
    std::thread::sleep(Duration::from_millis(500));
    drop(held);
    scene.ends_well();
}
