//! The NBD server itself, on a socket: a handshake, then any stream of requests. Every reply is whole, belongs to a
//! request, and ends it once.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::OnceLock,
    time::Duration,
};

use tidemark_export::{
    NbdAddress, NbdServer,
    nbd::{
        Limits,
        request::RequestHeader,
        wire::{
            GREETING_LEN, IHAVEOPT, NBD_CMD_BLOCK_STATUS, NBD_CMD_READ, NBD_OPT_EXPORT_NAME,
            NBD_OPT_SET_META_CONTEXT, NBD_OPT_STRUCTURED_REPLY, SIMPLE_REPLY_MAGIC,
            STRUCTURED_REPLY_MAGIC,
        },
    },
};

use crate::{
    input::Input,
    nbd::{LENGTH, exports},
};

const REQUESTS: usize = 24;
const PATIENCE: Duration = Duration::from_secs(20);

fn socket() -> &'static PathBuf {
    static SERVER: OnceLock<(NbdServer, PathBuf)> = OnceLock::new();
    let (_, path) = SERVER.get_or_init(|| {
        let name = format!("tidemark-fuzz-{}", std::process::id());
        let path = std::env::temp_dir().join(name).join("nbd");
        let address = NbdAddress::Unix(path.clone());
        let server = NbdServer::start(exports(), &[address], Limits::default());
        (server.expect("a new socket"), path)
    });
    path
}

fn option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.extend_from_slice(&IHAVEOPT.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&u32::try_from(data.len()).expect("small").to_be_bytes());
    out.extend_from_slice(data);
}

/// What the client sends, and what it may expect.
struct Script {
    sent: Vec<u8>,
    /// Bytes of answers to the handshake.
    answers: usize,
    structured: bool,
    /// By cookie.
    requests: BTreeMap<u64, RequestHeader>,
}

fn script(input: &mut Input<'_>) -> Script {
    let kinds = input.u8();
    let (structured, status) = (kinds & 1 == 1, kinds & 3 == 3);
    let name: &[u8] = if kinds & 4 == 4 { b"ro" } else { b"rw" };
    let mut sent = 3_u32.to_be_bytes().to_vec();
    let mut answers = GREETING_LEN + 10;
    if structured {
        option(&mut sent, NBD_OPT_STRUCTURED_REPLY, &[]);
        answers += 20;
    }
    if status {
        let mut data = 2_u32.to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 15]);
        data.extend_from_slice(b"base:allocation");
        option(&mut sent, NBD_OPT_SET_META_CONTEXT, &data);
        answers += 20 + 4 + 15 + 20;
    }
    option(&mut sent, NBD_OPT_EXPORT_NAME, name);
    let mut requests = BTreeMap::new();
    for cookie in 1..=REQUESTS as u64 {
        if input.is_empty() {
            break;
        }
        let flags = u16::from(input.u8());
        let command = u16::from(input.u8() % 10);
        let far = input.u8();
        let (offset, length) = match far {
            255 => (input.u64(), input.u32()),
            _ => (input.below(LENGTH), u32::from(input.u16())),
        };
        let header = RequestHeader {
            flags,
            command,
            cookie,
            offset,
            length,
        };
        sent.extend_from_slice(&header.encode());
        // A write's data may be cut short by the end of the stream.
        let payload = header.payload_len() as usize;
        sent.resize(sent.len() + payload.min(2 * usize::from(u16::MAX)), 0x77);
        requests.insert(cookie, header);
    }
    // What no longer is a request.
    sent.extend_from_slice(input.bytes(if kinds & 8 == 8 { 64 } else { 0 }));
    Script {
        sent,
        answers,
        structured,
        requests,
    }
}

fn converse(sent: Vec<u8>) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket()).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut writing = stream.try_clone().expect("a socket");
    let writer = std::thread::spawn(move || {
        // The server may close first, after nonsense.
        let _closed = writing.write_all(&sent);
        let _closed = writing.shutdown(Shutdown::Write);
    });
    let mut received = Vec::new();
    let mut piece = [0; 16 << 10];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => received.extend_from_slice(&piece[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            // The fuzzer's own clock is a signal.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("the server neither answers nor closes: {error}"),
        }
    }
    assert!(writer.join().is_ok());
    received
}

/// Big-endian fields off the front.
fn be32(input: &mut Input<'_>) -> u32 {
    u32::from_be_bytes(input.u32().to_le_bytes())
}

fn be64(input: &mut Input<'_>) -> u64 {
    u64::from_be_bytes(input.u64().to_le_bytes())
}

/// The data of a simple reply, or of a chunk, must be of the request's range.
fn check_replies(script: &Script, received: &[u8]) {
    let mut open = script.requests.clone();
    let mut input = Input::new(received);
    let mut told: BTreeMap<u64, u64> = BTreeMap::new();
    while !input.is_empty() {
        match be32(&mut input) {
            SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (be32(&mut input), be64(&mut input));
                let request = open.remove(&cookie).expect("a request is answered once");
                if error == 0 && request.command == NBD_CMD_READ {
                    assert!(!script.structured);
                    let length = request.length as usize;
                    assert_eq!(input.bytes(length), vec![0x5a; length]);
                }
            }
            STRUCTURED_REPLY_MAGIC => {
                assert!(script.structured);
                let kinds = be32(&mut input);
                let (cookie, length) = (be64(&mut input), be32(&mut input) as usize);
                let payload = input.bytes(length);
                assert_eq!(payload.len(), length, "a chunk is whole");
                let request = open[&cookie];
                let covered = check_chunk(&request, kinds & 0xFFFF, payload);
                *told.entry(cookie).or_default() += covered.unwrap_or(0);
                if kinds >> 16 == 1 {
                    open.remove(&cookie);
                    if covered.is_some() && request.command == NBD_CMD_READ {
                        assert_eq!(told[&cookie], u64::from(request.length));
                    }
                }
            }
            magic => panic!("{magic:#x} is no reply"),
        }
    }
}

/// Checks a chunk; gives the bytes of the range that it covers, or nothing for an error.
fn check_chunk(request: &RequestHeader, kind: u32, payload: &[u8]) -> Option<u64> {
    let mut fields = Input::new(payload);
    match kind {
        0 => {
            assert!(payload.is_empty());
            Some(0)
        }
        1 | 2 => {
            assert_eq!(request.command, NBD_CMD_READ);
            let offset = be64(&mut fields);
            let length = if kind == 1 {
                payload.len() as u64 - 8
            } else {
                u64::from(be32(&mut fields))
            };
            assert!(length > 0 && offset >= request.offset);
            assert!(offset + length <= request.offset + u64::from(request.length));
            Some(length)
        }
        5 => {
            assert_eq!(request.command, NBD_CMD_BLOCK_STATUS);
            assert!(payload.len() >= 12 && payload.len() % 8 == 4);
            Some(0)
        }
        _ => {
            assert_eq!(kind, 1 << 15 | 1, "a kind that was agreed upon");
            assert!(be32(&mut fields) != 0);
            None
        }
    }
}

/// A client's connection.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    if input.flag() {
        // From the first byte on whatever comes.
        let received = converse(input.rest().to_vec());
        assert!(received.len() >= GREETING_LEN, "every client is greeted");
        return;
    }
    let script = script(&mut input);
    let received = converse(script.sent.clone());
    let (_, replies) = received.split_at(script.answers.min(received.len()));
    check_replies(&script, replies);
}
