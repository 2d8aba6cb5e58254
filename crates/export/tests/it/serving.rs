//! What well-behaved clients get: the handshake's ways, each command, concurrency, sockets, and a clean stop.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tidemark_export::nbd::wire::{
    NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME, NBD_OPT_INFO, NBD_OPT_LIST, NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NBD_REP_INFO, NBD_REP_META_CONTEXT, NBD_REP_SERVER,
};
use tidemark_export::nbd::{Limits, StartError};
use tidemark_export::{
    AllocationExtent, BlockDevice, Durability, ExportRegistry, NbdAddress, NbdServer,
    RegistryError, ZeroFlags,
};

use crate::client::{
    Client, Reply, TestServer, ask, closed, eventually, go_data, greet, meta_data, option, string,
};
use crate::devices::{FileDevice, MemoryDevice};

const SIZE: u64 = 64 << 20;

/// A device whose calls wait for a gate where the test closes it.
#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, closed: bool) {
        *self.closed.lock() = closed;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let mut closed = self.closed.lock();
        while *closed {
            self.opened.wait(&mut closed);
        }
    }
}

/// Memory whose writes at offset 0, and flushes, pass a gate; whose reads fail at `BAD` and panic at `PANIC`.
struct Gated {
    memory: MemoryDevice,
    gate: Arc<Gate>,
}

const BAD: u64 = 48 << 20;
const PANIC: u64 = 50 << 20;

impl Gated {
    fn new() -> (Self, Arc<Gate>) {
        let gate = Arc::new(Gate::default());
        (
            Self {
                memory: MemoryDevice::new(SIZE),
                gate: Arc::clone(&gate),
            },
            gate,
        )
    }
}

impl BlockDevice for Gated {
    fn length(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn block_size_preferred(&self) -> u32 {
        4096
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let holds = |at| (offset..offset + buf.len() as u64).contains(&at);
        assert!(!holds(PANIC), "a bug in the device");
        if holds(BAD) {
            return Err(io::Error::other("a bad sector"));
        }
        self.memory.read(offset, buf)
    }
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        if offset == 0 {
            self.gate.pass();
        }
        self.memory.write(offset, data, durability)
    }
    fn flush(&self) -> io::Result<()> {
        self.gate.pass();
        Ok(())
    }
    fn trim(&self, offset: u64, len: u64, fua: bool) -> io::Result<()> {
        self.memory.trim(offset, len, fua)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        if flags.fast_only {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.memory.write_zeroes(offset, len, flags)
    }
    fn extents(&self, offset: u64, len: u64, _: usize) -> io::Result<Vec<AllocationExtent>> {
        Ok(vec![AllocationExtent {
            length: len + offset,
            hole: false,
            zero: false,
        }])
    }
}

#[test]
fn the_old_way_into_transmission_works_with_and_without_padding() {
    let server = TestServer::new(MemoryDevice::new(SIZE));
    for (flags, padding) in [(1u32, 124usize), (3, 0)] {
        let mut stream = server.connect();
        greet(&mut stream, flags);
        stream
            .write_all(&option(NBD_OPT_EXPORT_NAME, b"data"))
            .unwrap();
        let mut answer = vec![0xee; 10 + padding];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..8], SIZE.to_be_bytes());
        assert!(answer[10..].iter().all(|byte| *byte == 0));
        let header = tidemark_export::nbd::request::RequestHeader {
            flags: 0,
            command: 3,
            cookie: 5,
            offset: 0,
            length: 0,
        };
        stream.write_all(&header.encode()).unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4]);
    }
}

#[test]
fn information_is_given_as_asked_for() {
    let server = TestServer::new(MemoryDevice::new(SIZE).read_only());
    let mut stream = server.connect();
    greet(&mut stream, 3);
    let all = [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE, 77];
    let replies = ask(&mut stream, NBD_OPT_INFO, &go_data("", &all));
    let of = |kind: u16| {
        replies
            .iter()
            .find(|(_, data)| data.starts_with(&kind.to_be_bytes()))
            .map(|(_, data)| &data[2..])
    };
    assert!(replies[..4].iter().all(|(kind, _)| *kind == NBD_REP_INFO));
    assert_eq!(
        of(NBD_INFO_NAME),
        Some(&b"data"[..]),
        "the empty name means the only export"
    );
    assert_eq!(of(NBD_INFO_DESCRIPTION), Some(&b"a test"[..]));
    assert_eq!(
        of(NBD_INFO_BLOCK_SIZE),
        Some(&[0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0][..])
    );
    let export = of(NBD_INFO_EXPORT).unwrap();
    assert_eq!(export[..8], SIZE.to_be_bytes());
    let flags = u16::from_be_bytes([export[8], export[9]]);
    assert_eq!(flags & 0b1111, 0b1111, "flags, read-only, flush, FUA");
    assert_eq!(
        flags & (1 << 5 | 1 << 6 | 1 << 7),
        0,
        "no trim, no zeroes, no DF before structured replies"
    );
    assert_eq!(replies.last().unwrap().0, NBD_REP_ACK);

    assert_eq!(
        ask(&mut stream, NBD_OPT_INFO, &go_data("data", &[])).len(),
        2,
        "nothing asked, nothing but the export"
    );
    let mut listed = string("data");
    listed.extend(b"a test");
    assert_eq!(
        ask(&mut stream, NBD_OPT_LIST, &[]),
        [(NBD_REP_SERVER, listed), (NBD_REP_ACK, vec![])]
    );

    ask(&mut stream, NBD_OPT_STRUCTURED_REPLY, &[]);
    for queries in [&[][..], &["base:"], &["base:allocation", "x:y"]] {
        let replies = ask(
            &mut stream,
            NBD_OPT_LIST_META_CONTEXT,
            &meta_data("data", queries),
        );
        assert_eq!(
            replies[0],
            (NBD_REP_META_CONTEXT, b"\0\0\0\0base:allocation".to_vec())
        );
    }
    assert_eq!(
        ask(
            &mut stream,
            NBD_OPT_LIST_META_CONTEXT,
            &meta_data("data", &["qemu:x"])
        )
        .len(),
        1
    );
    assert_eq!(
        ask(&mut stream, NBD_OPT_ABORT, &[]),
        [(NBD_REP_ACK, vec![])]
    );
    assert!(closed(&mut stream));
}

#[test]
fn bytes_at_any_offset_are_read_back_as_written() {
    let server = TestServer::new(MemoryDevice::new(SIZE));
    for mut client in [server.client(), server.simple_client()] {
        let mut model = vec![0u8; 5 << 20];
        client.ask(6, 0, 0, model.len() as u32, &[]);
        let ranges = [
            (0, 1),
            (513, 100_003),
            (65_535, 65_537),
            (4095, 2),
            (1 << 20, 3 << 20),
            (7, 1 << 20),
            (99_999, 0),
        ];
        for (seed, (offset, length)) in (1u8..).zip(ranges) {
            let data: Vec<u8> = (0..length)
                .map(|n: usize| (n as u8).wrapping_mul(31).wrapping_add(seed))
                .collect();
            client.write(offset as u64, &data).unwrap();
            model[offset..offset + length].copy_from_slice(&data);
            assert_eq!(client.read(offset as u64, length as u32).unwrap(), data);
        }
        assert!(client.read(0, model.len() as u32).unwrap() == model);
        assert!(client.read_flagged(1, 4 << 20, 0).unwrap().0 == model[1..(4 << 20) + 1]);
    }
}

#[test]
fn without_large_buffers_large_requests_pass_in_small_pieces() {
    let limits = Limits {
        large_buffers_max: 0,
        ..Limits::default()
    };
    let server = TestServer::with_limits(MemoryDevice::new(SIZE), limits);
    let data: Vec<u8> = (0..3_000_001u32).map(|n| (n % 251) as u8).collect();
    for mut client in [server.client(), server.simple_client()] {
        client.write(17, &data).unwrap();
        assert!(client.read(17, data.len() as u32).unwrap() == data);
    }
    let (read, chunks) = server
        .client()
        .read_flagged(17, data.len() as u32, 4)
        .unwrap();
    assert!(read == data);
    assert_eq!(chunks, 1, "DF");
}

#[test]
fn holes_are_sent_as_holes_unless_the_reply_must_not_be_divided() {
    let server = TestServer::new(MemoryDevice::new(SIZE));
    let mut client = server.client();
    client.write(1 << 20, &vec![5; 1 << 20]).unwrap();
    client.send(0, 0, 0, 1 << 20, &[]);
    let Reply::Chunk {
        flags: 1, kind: 2, ..
    } = client.reply().unwrap()
    else {
        panic!("not one hole")
    };
    let (data, chunks) = client.read_flagged(0, 3 << 20, 4).unwrap();
    assert_eq!(chunks, 1);
    assert!(
        data[..1 << 20].iter().all(|byte| *byte == 0)
            && data[1 << 20..2 << 20].iter().all(|byte| *byte == 5)
    );
    let (same, chunks) = client.read_flagged(0, 3 << 20, 0).unwrap();
    assert!(chunks > 2 && same == data);
}

#[test]
fn the_allocation_is_told_within_the_range_and_one_extent_at_a_time_where_asked() {
    let server = TestServer::new(MemoryDevice::new(SIZE));
    let mut client = server.client();
    client.write(65536, &[1; 65536]).unwrap();
    assert_eq!(
        client.status(0, 1 << 20, 0),
        [(65536, 3), (65536, 0), ((1 << 20) - 131_072, 3)]
    );
    assert_eq!(client.status(70_000, 10, 0), [(10, 0)]);
    assert_eq!(client.status(0, 1 << 20, 8), [(65536, 3)]);
    assert_eq!(client.ask(7, 0, SIZE - 1, 2, &[]), 22);
}

#[test]
fn trim_zeroes_and_cache_do_what_they_say() {
    let server = TestServer::new(MemoryDevice::new(SIZE));
    let mut client = server.client();
    client.write(0, &[1; 300_000]).unwrap();
    assert_eq!(client.ask(6, 0, 100, 65536 * 2, &[]), 0);
    let mut expected = vec![1; 300_000];
    expected[100..100 + 65536 * 2].fill(0);
    assert!(client.read(0, 300_000).unwrap() == expected);
    assert_eq!(client.ask(6, 2, 0, 300_000, &[]), 0, "NO_HOLE");
    assert_eq!(
        client.status(0, 262_144, 0),
        [(262_144, 0)],
        "allocated, as asked"
    );
    assert_eq!(client.ask(4, 1, 0, 65536, &[]), 0, "trim with FUA");
    assert_eq!(client.ask(5, 0, 0, 65536, &[]), 0, "cache");
    assert_eq!(client.ask(6, 16, 0, 65536, &[]), 0, "fast");
    for command in [0, 1, 4, 5, 6] {
        if command != 0 {
            assert_eq!(
                client.ask(command, 0, SIZE, 0, &[]),
                0,
                "nothing to do for command {command}"
            );
        }
    }
    assert_eq!(client.read(5, 0).unwrap(), []);
}

#[test]
fn a_read_only_export_refuses_whatever_changes_it() {
    let server = TestServer::new(MemoryDevice::new(SIZE).read_only());
    let mut client = server.client();
    assert_eq!(client.write(0, b"no"), Err(1));
    assert_eq!(client.ask(4, 0, 0, 512, &[]), 1);
    assert_eq!(client.ask(6, 0, 0, 512, &[]), 1);
    assert_eq!(client.ask(3, 0, 0, 0, &[]), 0, "a flush is harmless");
    assert_eq!(client.read(0, 2).unwrap(), [0, 0]);
}

#[test]
fn a_failing_device_fails_its_request_only() {
    let (device, _gate) = Gated::new();
    let server = TestServer::new(device);
    for mut client in [server.client(), server.simple_client()] {
        assert_eq!(client.read(BAD - 100, 4096), Err(5));
        assert_eq!(client.read(BAD - (1 << 19), 1 << 20), Err(5), "a large one");
        assert_eq!(client.read(PANIC, 1), Err(5), "a panic");
        assert_eq!(client.ask(6, 16, 0, 4096, &[]), 95, "not fast");
        assert_eq!(client.read(0, 4).unwrap(), [0; 4]);
    }
    let mut client = server.client();
    // The failure lies behind the first piece: the content has begun, and an error chunk ends it.
    assert_eq!(
        client.read_flagged(BAD - (3 << 20), 4 << 20, 4),
        Err(5),
        "undivided"
    );
    assert_eq!(client.read(0, 4).unwrap(), [0; 4]);
    let mut simple = server.simple_client();
    simple.send(0, 0, BAD - (3 << 20), 4 << 20, &[]);
    assert!(
        simple.is_closed(),
        "a simple reply has no other way to tell"
    );
}

#[test]
fn requests_go_on_while_one_blocks_and_are_answered_out_of_order() {
    let (device, gate) = Gated::new();
    let server = TestServer::new(device);
    for (command, length) in [(1u16, 4u32), (3, 0)] {
        let mut client = server.client();
        gate.set(true);
        let stuck = client.send(command, 0, 0, length, &vec![1; length as usize]);
        for n in 0..100u64 {
            client.write(4096 + n * 10, b"quick").unwrap();
            assert_eq!(client.read(4096 + n * 10, 5).unwrap(), b"quick");
        }
        gate.set(false);
        assert_eq!(
            client.reply().unwrap(),
            Reply::Simple {
                error: 0,
                cookie: stuck
            }
        );
    }
}

#[test]
fn replies_held_back_leave_when_the_next_request_blocks() {
    let (device, gate) = Gated::new();
    let server = TestServer::new(device);
    let mut client = server.client();
    for _ in 0..20 {
        gate.set(true);
        // One piece, so that all of it is received at once: some quick requests, then one that blocks.
        let mut bytes = Vec::new();
        let header =
            |command, cookie, offset, length| tidemark_export::nbd::request::RequestHeader {
                flags: 0,
                command,
                cookie,
                offset,
                length,
            };
        for cookie in 0..5 {
            bytes.extend(header(1, cookie, 4096, 3).encode());
            bytes.extend(b"abc");
        }
        bytes.extend(header(1, 99, 0, 3).encode());
        bytes.extend(b"abc");
        client.stream.write_all(&bytes).unwrap();
        // Not necessarily in order, since the connection has learned that this device is slow.
        let mut cookies = vec![];
        for _ in 0..5 {
            let Reply::Simple { error: 0, cookie } = client.reply().unwrap() else {
                panic!("failed")
            };
            cookies.push(cookie);
        }
        cookies.sort_unstable();
        assert_eq!(cookies, [0, 1, 2, 3, 4]);
        gate.set(false);
        assert_eq!(
            client.reply().unwrap(),
            Reply::Simple {
                error: 0,
                cookie: 99
            }
        );
    }
}

#[test]
fn as_many_requests_block_at_a_time_as_the_limit_says_and_all_are_answered() {
    let (device, gate) = Gated::new();
    let limits = Limits {
        requests_in_flight_max: 3,
        thread_idle_timeout: Duration::from_millis(20),
        ..Limits::default()
    };
    let server = TestServer::with_limits(device, limits);
    for _ in 0..3 {
        let mut client = server.client();
        gate.set(true);
        let mut sent: Vec<u64> = (0..20).map(|_| client.send(3, 0, 0, 0, &[])).collect();
        gate.set(false);
        while !sent.is_empty() {
            let Reply::Simple { error: 0, cookie } = client.reply().unwrap() else {
                panic!("failed")
            };
            sent.retain(|other| *other != cookie);
        }
        // Extra threads end when idle; the connection lives on.
        std::thread::sleep(Duration::from_millis(60));
        client.write(8192, b"alive").unwrap();
    }
}

#[test]
fn many_clients_at_once_each_see_their_own_bytes() {
    let server = TestServer::new(MemoryDevice::new(SIZE));
    std::thread::scope(|scope| {
        for n in 0..16u64 {
            let mut client = if n % 2 == 0 {
                server.client()
            } else {
                server.simple_client()
            };
            scope.spawn(move || {
                for round in 0..50u64 {
                    let at = n * (1 << 20) + round * 3000;
                    let data =
                        vec![(n * 50 + round) as u8; 5000 + (round as usize * 7919) % 90_000];
                    client.write(at, &data).unwrap();
                    assert!(client.read(at, data.len() as u32).unwrap() == data);
                }
            });
        }
    });
    eventually("every client is gone", || server.export.clients() == 0);
}

#[test]
fn an_export_in_use_is_kept_until_its_clients_are_disconnected() {
    let server = TestServer::new(MemoryDevice::new(SIZE));
    let mut client = server.client();
    assert_eq!(server.server.clients()[0].export.as_deref(), Some("data"));
    let refused = server.registry.remove("data").unwrap_err();
    assert_eq!(
        refused,
        RegistryError::InUse {
            name: "data".to_owned(),
            clients: 1
        }
    );
    client.write(0, b"still served").unwrap();
    assert_eq!(server.server.disconnect("data"), 1);
    assert!(client.is_closed());
    eventually("the client is gone", || {
        server.registry.remove("data").is_ok()
    });
}

#[test]
fn a_stop_lets_running_requests_end_and_closes_the_rest() {
    let (device, gate) = Gated::new();
    let server = TestServer::new(device);
    let mut client = server.client();
    let mut idle = server.client();
    client.write(4096, b"x").unwrap();
    gate.set(true);
    let running = client.send(3, 0, 0, 0, &[]);
    // The reply proves that the flush before it has been received.
    client.write(4096, b"y").unwrap();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| server.server.stop(Duration::from_secs(20)));
        assert!(idle.is_closed());
        gate.set(false);
        assert_eq!(
            client.reply().unwrap(),
            Reply::Simple {
                error: 0,
                cookie: running
            }
        );
        assert!(client.is_closed());
        assert_eq!(stop.join().unwrap().cut_off, 0);
    });
    assert!(!server.socket().exists());
    assert_eq!(server.export.clients(), 0);
}

#[test]
fn a_stop_does_not_wait_for_ever_for_a_stuck_device() {
    let (device, gate) = Gated::new();
    let server = TestServer::new(device);
    let mut client = server.client();
    gate.set(true);
    client.send(3, 0, 0, 0, &[]);
    client.write(4096, b"y").unwrap();
    assert_eq!(server.server.stop(Duration::from_millis(50)).cut_off, 1);
    assert!(client.is_closed());
    gate.set(false);
    eventually("the stuck request has ended", || {
        server.export.clients() == 0
    });
}

#[test]
fn a_socket_appears_with_mode_0600_in_a_directory_with_mode_0700() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/nbd.sock");
    let start = || {
        NbdServer::start(
            Arc::new(ExportRegistry::new()),
            &[NbdAddress::Unix(path.clone())],
            Limits::default(),
        )
    };
    let server = start().unwrap();
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_dead_servers_socket_is_replaced_and_a_living_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let start = || {
        NbdServer::start(
            Arc::new(ExportRegistry::new()),
            &[NbdAddress::Unix(path.clone())],
            Limits::default(),
        )
    };
    let kind = |error| match error {
        StartError::Listen { source, .. } => source.kind(),
        StartError::Thread(error) => panic!("{error}"),
    };

    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind");
    let ours = start().unwrap();
    assert_eq!(
        kind(start().unwrap_err()),
        io::ErrorKind::AddrInUse,
        "one of our own"
    );
    drop(ours);

    let others = UnixListener::bind(&path).unwrap();
    assert_eq!(
        kind(start().unwrap_err()),
        io::ErrorKind::AddrInUse,
        "somebody else's"
    );
    drop(others);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(kind(start().unwrap_err()), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn tcp_is_served_too_without_delay() {
    let registry = Arc::new(ExportRegistry::new());
    registry
        .add("data", "", Arc::new(MemoryDevice::new(SIZE)))
        .unwrap();
    let server = NbdServer::start(
        registry,
        &["127.0.0.1:0".parse().unwrap()],
        Limits::default(),
    )
    .unwrap();
    let NbdAddress::Tcp(address) = server.addresses()[0] else {
        panic!("not TCP")
    };
    assert_ne!(address.port(), 0);
    let mut stream = TcpStream::connect(address).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting[..8], *b"NBDMAGIC");
    assert_eq!(server.clients().len(), 1);
    server.stop(Duration::from_secs(5));
    assert_eq!(stream.read(&mut greeting).unwrap(), 0);
}

#[test]
fn addresses_are_read_as_they_are_written() {
    for text in [
        "unix:/run/tidemark/nbd.sock",
        "127.0.0.1:10809",
        "[::1]:10809",
    ] {
        assert_eq!(text.parse::<NbdAddress>().unwrap().to_string(), text);
    }
    assert_eq!(
        "tcp:127.0.0.1:1".parse::<NbdAddress>().unwrap().to_string(),
        "127.0.0.1:1"
    );
    for text in ["unix:", "nonsense", "", "127.0.0.1"] {
        assert!(text.parse::<NbdAddress>().is_err(), "{text:?}");
    }
}

#[test]
fn a_file_is_served_sparse_and_stays_so() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let server = TestServer::new(FileDevice::new(file.try_clone().unwrap()).unwrap());
    let mut client: Client = server.client();
    client.write(1 << 20, &vec![1; 1 << 20]).unwrap();
    assert_eq!(client.ask(6, 0, 1 << 20, 1 << 20, &[]), 0);
    assert_eq!(client.ask(3, 0, 0, 0, &[]), 0);
    assert!(
        client
            .status(0, 4 << 20, 0)
            .iter()
            .all(|(_, state)| *state == 3)
    );
}

#[test]
fn a_connection_that_spins_serves_like_any_other() {
    let limits = Limits {
        spin_max: Duration::from_micros(100),
        ..Limits::default()
    };
    let server = TestServer::with_limits(MemoryDevice::new(SIZE), limits);
    let mut client = server.client();
    for n in 0..2000u64 {
        client.write(n * 100, &n.to_be_bytes()).unwrap();
        assert_eq!(client.read(n * 100, 8).unwrap(), n.to_be_bytes());
    }
    client.write(1, &vec![9; 3 << 20]).unwrap();
    assert!(client.read(1, 3 << 20).unwrap() == vec![9; 3 << 20]);
}
