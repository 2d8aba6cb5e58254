//! Clients that break the protocol, on purpose or by accident. Each ends with the proof that others are still served.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Resource;
use tidemark_export::nbd::Limits;
use tidemark_export::nbd::limits::{OPTION_LENGTH_MAX, OPTION_SKIP_MAX, REQUEST_PAYLOAD_MAX};
use tidemark_export::nbd::request::RequestHeader;
use tidemark_export::nbd::wire::{
    IHAVEOPT, NBD_OPT_EXPORT_NAME, NBD_OPT_GO, NBD_OPT_LIST, NBD_OPT_LIST_META_CONTEXT,
    NBD_REP_ACK, NBD_REP_ERR_INVALID, NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_UNSUP,
};

use crate::client::{
    PATIENCE, Reply, TestServer, ask, closed, eventually, go_data, greet, meta_data, option,
    request,
};
use crate::devices::MemoryDevice;

const SIZE: u64 = 64 << 20;

fn server() -> TestServer {
    TestServer::new(MemoryDevice::new(SIZE))
}

/// As [`server`], but with timeouts short enough to wait for.
fn impatient_server() -> TestServer {
    let limits = Limits {
        handshake_timeout: Duration::from_millis(200),
        receive_timeout: Duration::from_millis(200),
        send_timeout: Duration::from_millis(200),
        ..Limits::default()
    };
    TestServer::with_limits(MemoryDevice::new(SIZE), limits)
}

#[test]
fn a_client_that_does_not_speak_the_protocol_is_disconnected() {
    let server = server();
    for words in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        &[0xff; 64],
        &[0; 64],
    ] {
        let mut stream = server.connect();
        stream.write_all(words).unwrap();
        assert!(closed(&mut stream));
    }
    server.assert_alive();
}

#[test]
fn an_option_with_bad_magic_ends_the_connection() {
    let server = server();
    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream.write_all(&[0x55; 16]).unwrap();
    assert!(closed(&mut stream));
    server.assert_alive();
}

#[test]
fn a_request_with_bad_magic_ends_the_connection() {
    let server = server();
    let mut client = server.client();
    client.stream.write_all(&[0x55; 28]).unwrap();
    assert!(client.is_closed());
    server.assert_alive();
}

#[test]
fn unknown_and_malformed_options_get_an_error_and_the_handshake_goes_on() {
    let server = server();
    let mut stream = server.connect();
    greet(&mut stream, 3);
    for number in [0, 4, 5, 11, 12, 999, u32::MAX] {
        assert_eq!(
            ask(&mut stream, number, b"whatever")[0].0,
            NBD_REP_ERR_UNSUP,
            "option {number}"
        );
    }
    assert_eq!(
        ask(&mut stream, NBD_OPT_GO, &[0xff; 9])[0].0,
        NBD_REP_ERR_INVALID
    );
    assert_eq!(
        ask(&mut stream, NBD_OPT_GO, &go_data("nothing", &[]))[0].0,
        NBD_REP_ERR_UNKNOWN
    );
    let before_structured = ask(
        &mut stream,
        NBD_OPT_LIST_META_CONTEXT,
        &meta_data("data", &[]),
    );
    assert_eq!(before_structured[0].0, NBD_REP_ERR_INVALID);
    assert_eq!(
        ask(&mut stream, NBD_OPT_GO, &go_data("data", &[]))
            .last()
            .unwrap()
            .0,
        NBD_REP_ACK
    );
}

#[test]
fn an_option_that_is_too_long_is_skipped_and_one_of_2_gib_ends_the_connection() {
    let server = server();
    let mut stream = server.connect();
    greet(&mut stream, 3);
    let long = vec![0; OPTION_LENGTH_MAX as usize + 1];
    assert_eq!(
        ask(&mut stream, NBD_OPT_GO, &long)[0].0,
        NBD_REP_ERR_TOO_BIG
    );
    let mut header = IHAVEOPT.to_be_bytes().to_vec();
    header.extend(NBD_OPT_GO.to_be_bytes());
    header.extend((1u32 << 31).to_be_bytes());
    const { assert!(1 << 31 > OPTION_SKIP_MAX) };
    stream.write_all(&header).unwrap();
    assert!(closed(&mut stream));
    server.assert_alive();
}

#[test]
fn an_endless_handshake_ends() {
    let server = server();
    let mut stream = server.connect();
    greet(&mut stream, 3);
    let mut options = Vec::new();
    for _ in 0..3000 {
        options.extend(option(77, &[]));
    }
    let mut writer = stream.try_clone().unwrap();
    let sent = std::thread::spawn(move || writer.write_all(&options).is_err());
    assert!(closed(&mut stream));
    sent.join().unwrap();
    server.assert_alive();
}

#[test]
fn an_unknown_export_by_the_old_option_closes_the_connection() {
    let server = server();
    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream
        .write_all(&option(NBD_OPT_EXPORT_NAME, b"nothing"))
        .unwrap();
    assert!(closed(&mut stream));
}

#[test]
fn truncated_at_any_byte_a_conversation_leaves_no_client_behind() {
    let server = server();
    let mut conversation = 3u32.to_be_bytes().to_vec();
    conversation.extend(option(8, &[]));
    conversation.extend(option(10, &meta_data("data", &["base:allocation"])));
    conversation.extend(option(NBD_OPT_GO, &go_data("data", &[3])));
    conversation.extend(request(1, 1, 64));
    conversation.extend([7; 64]);
    conversation.extend(request(0, 2, 64));
    for length in 0..=conversation.len() {
        let mut stream = server.connect();
        stream.write_all(&conversation[..length]).unwrap();
    }
    eventually("every client is gone", || {
        server.server.clients().is_empty()
    });
    assert_eq!(server.export.clients(), 0);
    server.assert_alive();
}

#[test]
fn a_write_of_2_gib_is_refused_and_the_connection_closed() {
    let server = server();
    let mut client = server.client();
    for length in [1 << 31, REQUEST_PAYLOAD_MAX + 1] {
        let sent = client.send(1, 0, 0, length, &[]);
        assert_eq!(
            client.reply().unwrap(),
            Reply::Simple {
                error: 22,
                cookie: sent
            }
        );
        assert!(client.is_closed());
        client = server.client();
    }
    server.assert_alive();
}

#[test]
fn a_read_of_2_gib_is_refused_and_the_connection_goes_on() {
    let server = server();
    let mut client = server.client();
    assert_eq!(client.ask(0, 0, 0, 1 << 31, &[]), 22);
    assert_eq!(client.ask(0, 0, 0, u32::MAX, &[]), 22);
    assert_eq!(client.read(0, 4).unwrap(), [0; 4]);
}

#[test]
fn a_refused_write_takes_its_payload_with_it() {
    let server = server();
    let mut client = server.client();
    for length in [1usize, 4096, 100_000, 3 << 20] {
        assert_eq!(client.write(SIZE - 1, &vec![1; length + 1]), Err(28));
        assert_eq!(client.read(0, 4).unwrap(), [0; 4], "still in step");
    }
    assert_eq!(client.ask(1, 1 << 9, 0, 3, b"abc"), 22, "an unknown flag");
    assert_eq!(client.read(0, 4).unwrap(), [0; 4]);
}

#[test]
fn unknown_commands_and_flags_get_an_error_and_the_connection_goes_on() {
    let server = server();
    let mut client = server.simple_client();
    for command in [8, 9, 100, u16::MAX] {
        assert_eq!(client.ask(command, 0, 0, 0, &[]), 22, "command {command}");
    }
    assert_eq!(client.ask(3, 1 << 15, 0, 0, &[]), 22);
    assert_eq!(client.ask(7, 0, 0, 512, &[]), 22, "no context was selected");
    assert_eq!(client.read(0, 4).unwrap(), [0; 4]);
}

#[test]
fn a_client_that_pipelines_without_reading_is_disconnected_in_time() {
    let server = impatient_server();
    let mut client = server.simple_client();
    let header = request(0, 1, 1 << 20);
    let began = Instant::now();
    while client.stream.write_all(&header).is_ok() {
        assert!(began.elapsed() < PATIENCE, "it may pipeline for ever");
    }
    eventually("the client is gone", || server.export.clients() == 0);
    server.assert_alive();
}

#[test]
fn a_client_that_stalls_in_the_middle_of_a_request_is_disconnected() {
    let server = impatient_server();
    for (length, sent) in [(64u32, 10usize), (1 << 20, 1 << 19), (32 << 20, 100)] {
        let mut client = server.client();
        client.send(1, 0, 0, length, &vec![0; sent]);
        assert!(client.is_closed(), "{length}");
    }
    server.assert_alive();
}

#[test]
fn a_client_that_idles_between_requests_is_kept() {
    let server = impatient_server();
    let mut client = server.client();
    client.write(0, b"before").unwrap();
    // Not a wait for a condition: that nothing happens is what is to be seen.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(client.read(0, 6).unwrap(), b"before");
}

#[test]
fn a_handshake_byte_by_byte_is_cut_off() {
    let server = impatient_server();
    let mut stream = server.connect();
    greet(&mut stream, 3);
    let began = Instant::now();
    let greeting = option(NBD_OPT_GO, &vec![0; 1000]);
    for byte in greeting {
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(closed(&mut stream));
    server.assert_alive();
}

/// A server of many exports, whose listing is far larger than what a socket holds; and the listing's length.
fn server_of_a_long_list() -> (TestServer, usize) {
    let server = impatient_server();
    let description = "x".repeat(4000);
    for n in 0..500 {
        let device = Arc::new(MemoryDevice::new(512));
        server
            .registry
            .add(&format!("export-{n}"), &description, device)
            .unwrap();
    }
    (server, 500 * description.len())
}

#[test]
fn a_handshake_whose_answer_is_read_bit_by_bit_is_cut_off() {
    let (server, list_bytes) = server_of_a_long_list();
    let mut stream = server.connect();
    greet(&mut stream, 3);
    stream.write_all(&option(NBD_OPT_LIST, &[])).unwrap();
    let mut read = 0;
    let mut bit = [0; 8192];
    while let Ok(n @ 1..) = stream.read(&mut bit) {
        read += n;
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(read < list_bytes, "the whole list was sent, however slowly");
    server.assert_alive();
}

#[test]
fn a_client_that_closes_its_sending_half_still_gets_its_replies() {
    let server = server();
    let mut client = server.client();
    client.write(0, &[7; 4096]).unwrap();
    let cookies: Vec<_> = (0..20).map(|_| client.send(3, 0, 0, 0, &[])).collect();
    client.stream.shutdown(Shutdown::Write).unwrap();
    let mut answered: Vec<_> = cookies
        .iter()
        .map(|_| match client.reply().unwrap() {
            Reply::Simple { error: 0, cookie } => cookie,
            other => panic!("{other:?}"),
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, cookies);
    assert!(client.is_closed());
    server.assert_alive();
}

#[test]
fn clients_that_vanish_in_the_middle_of_requests_leave_nothing_behind() {
    let server = server();
    for round in 0..50u32 {
        let mut client = server.client();
        for _ in 0..20 {
            client.send(0, 0, 0, 1 << 20, &[]);
        }
        client.send(1, 0, 0, 1 << 20, &vec![0; round as usize * 1000]);
        client.hang_up();
    }
    eventually("every client is gone", || {
        server.server.clients().is_empty()
    });
    assert_eq!(server.export.clients(), 0);
    server.assert_alive();
}

#[test]
fn overlapping_cookies_are_each_answered() {
    let server = server();
    let mut client = server.simple_client();
    let header = request(3, 42, 0);
    for _ in 0..100 {
        client.stream.write_all(&header).unwrap();
    }
    for _ in 0..100 {
        assert_eq!(
            client.reply().unwrap(),
            Reply::Simple {
                error: 0,
                cookie: 42
            }
        );
    }
}

#[test]
fn connections_past_the_limit_are_turned_away_and_room_is_made_by_those_that_end() {
    let limits = Limits {
        connections_max: 100,
        ..Limits::default()
    };
    let server = TestServer::with_limits(MemoryDevice::new(SIZE), limits);
    let mut admitted = server.client();
    let mut crowd: Vec<UnixStream> = Vec::new();
    for _ in 0..1000 {
        crowd.push(server.connect());
        assert!(server.server.clients().len() <= 100);
    }
    admitted.write(0, b"served all the while").unwrap();
    assert_eq!(admitted.read(0, 6).unwrap(), b"served");
    drop(crowd);
    eventually("the crowd has gone", || server.server.clients().len() == 1);
    server.assert_alive();
}

/// Set in the process of its own that a test runs itself in.
const ALONE: &str = "TIDEMARK_TEST_ALONE";

/// It takes every file descriptor of the process away, so it runs itself in a process of its own.
#[test]
fn without_file_descriptors_clients_wait_until_there_are_some_again() {
    const NAME: &str = "hostile::without_file_descriptors_clients_wait_until_there_are_some_again";
    if std::env::var_os(ALONE).is_none() {
        let done = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && told.contains("1 passed"), "{told}");
        return;
    }
    let server = server();
    let mut admitted = server.client();
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = Some(100);
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    let mut hogs: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    // Room for the client's end of one connection, none for the server's.
    hogs.pop();
    let mut waiting = server.connect();
    let nobody = waiting
        .set_read_timeout(Some(Duration::from_millis(300)))
        .and_then(|()| waiting.read(&mut [0]));
    assert!(nobody.is_err(), "it can't have been accepted");
    admitted.write(0, b"served meanwhile").unwrap();
    assert_eq!(admitted.read(0, 6).unwrap(), b"served");
    drop(hogs);
    waiting.set_read_timeout(Some(PATIENCE)).unwrap();
    greet(&mut waiting, 3);
    server.assert_alive();
}

#[test]
fn a_client_that_sends_on_after_its_goodbye_is_not_heard() {
    let server = server();
    let mut client = server.client();
    client.write(0, b"kept").unwrap();
    let mut bytes = request(2, 9, 0).to_vec();
    bytes.extend(request(1, 10, 4));
    bytes.extend(b"lost");
    client.stream.write_all(&bytes).unwrap();
    assert!(client.is_closed());
    assert_eq!(server.client().read(0, 4).unwrap(), b"kept");
}

#[test]
fn random_bytes_after_the_handshake_never_bring_the_server_down() {
    use proptest::test_runner::{Config, TestRunner};
    let server = server();
    let mut runner = TestRunner::new(Config {
        cases: 100,
        ..Config::default()
    });
    let strategy =
        proptest::collection::vec((0u16..12, 0u16..64, 0u64..SIZE * 2, 0u32..200_000), 1..20);
    runner
        .run(&strategy, |requests| {
            let mut client = server.client();
            for (command, flags, offset, length) in requests {
                let payload = if command == 1 { length as usize } else { 0 };
                let header = RequestHeader {
                    flags,
                    command,
                    cookie: 1,
                    offset,
                    length,
                };
                let _closed_perhaps = client.stream.write_all(&header.encode());
                let _closed_perhaps =
                    client
                        .stream
                        .write_all(&vec![3; payload.saturating_sub(payload % 3)]);
            }
            client.hang_up();
            Ok(())
        })
        .unwrap();
    eventually("every client is gone", || {
        server.server.clients().is_empty()
    });
    server.assert_alive();
}
