//! A small NBD client that may misbehave, and the server that it talks to.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tidemark_export::nbd::Limits;
use tidemark_export::nbd::request::RequestHeader;
use tidemark_export::nbd::wire::{
    IHAVEOPT, NBD_OPT_GO, NBD_OPT_SET_META_CONTEXT, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK,
    NBDMAGIC, OPTION_REPLY_MAGIC, REQUEST_LEN, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use tidemark_export::{BlockDevice, Export, ExportRegistry, NbdAddress, NbdServer};

/// Longer than anything that a test waits for may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A server of one export, `data`, at a socket in a directory of its own.
pub(crate) struct TestServer {
    pub(crate) server: NbdServer,
    pub(crate) export: Arc<Export>,
    pub(crate) registry: Arc<ExportRegistry>,
    pub(crate) dir: TempDir,
}

impl TestServer {
    pub(crate) fn new(device: impl BlockDevice + 'static) -> Self {
        Self::with_limits(device, Limits::default())
    }

    pub(crate) fn with_limits(device: impl BlockDevice + 'static, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = Arc::new(ExportRegistry::new());
        let export = registry.add("data", "a test", Arc::new(device)).unwrap();
        let address = NbdAddress::Unix(dir.path().join("nbd.sock"));
        let exports = Arc::clone(&registry);
        let server = NbdServer::start(exports, &[address], limits).unwrap();
        Self {
            server,
            export,
            registry,
            dir,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///data?socket={}", self.socket().display())
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A client in transmission, with structured replies and `base:allocation`.
    pub(crate) fn client(&self) -> Client {
        Client::begin(self.connect(), true)
    }

    pub(crate) fn simple_client(&self) -> Client {
        Client::begin(self.connect(), false)
    }

    /// Proves that the server still serves others well.
    pub(crate) fn assert_alive(&self) {
        let mut client = self.client();
        client.write(0, b"still alive").unwrap();
        assert_eq!(client.read(0, 11).unwrap(), b"still alive");
    }
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = IHAVEOPT.to_be_bytes().to_vec();
    out.extend(number.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u32).to_be_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

/// The data of `INFO` and `GO`.
pub(crate) fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut out = string(name);
    out.extend((infos.len() as u16).to_be_bytes());
    out.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    out
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub(crate) fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = string(name);
    out.extend((queries.len() as u32).to_be_bytes());
    out.extend(queries.iter().flat_map(|query| string(query)));
    out
}

/// A request at offset 0 without flags.
pub(crate) fn request(command: u16, cookie: u64, length: u32) -> [u8; REQUEST_LEN] {
    RequestHeader {
        flags: 0,
        command,
        cookie,
        offset: 0,
        length,
    }
    .encode()
}

pub(crate) fn read_array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    stream.read_exact(&mut out)?;
    Ok(out)
}

/// Takes the greeting and sends the client's flags.
pub(crate) fn greet(stream: &mut UnixStream, flags: u32) {
    assert_eq!(read_array(stream).unwrap(), NBDMAGIC.to_be_bytes());
    assert_eq!(read_array(stream).unwrap(), IHAVEOPT.to_be_bytes());
    assert_eq!(read_array(stream).unwrap(), [0, 3]);
    stream.write_all(&flags.to_be_bytes()).unwrap();
}

/// One reply to an option: its type and data.
pub(crate) fn option_reply(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    assert_eq!(read_array(stream)?, OPTION_REPLY_MAGIC.to_be_bytes());
    let _option: [u8; 4] = read_array(stream)?;
    let kind = u32::from_be_bytes(read_array(stream)?);
    let mut data = vec![0; u32::from_be_bytes(read_array(stream)?) as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

/// All replies to an option, up to the final one.
pub(crate) fn option_replies(stream: &mut UnixStream) -> Vec<(u32, Vec<u8>)> {
    let mut all = Vec::new();
    loop {
        let reply = option_reply(stream).unwrap();
        let last = reply.0 == NBD_REP_ACK || reply.0 >> 31 == 1;
        all.push(reply);
        if last {
            return all;
        }
    }
}

/// Sends an option and returns all replies to it.
pub(crate) fn ask(stream: &mut UnixStream, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    stream.write_all(&option(number, data)).unwrap();
    option_replies(stream)
}

/// A reply of the transmission phase, or one chunk of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Simple {
        error: u32,
        cookie: u64,
    },
    Chunk {
        flags: u16,
        kind: u16,
        cookie: u64,
        payload: Vec<u8>,
    },
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    structured: bool,
    cookie: u64,
}

impl Client {
    pub(crate) fn begin(mut stream: UnixStream, structured: bool) -> Self {
        greet(&mut stream, 3);
        if structured {
            assert_eq!(
                ask(&mut stream, NBD_OPT_STRUCTURED_REPLY, &[]),
                [(NBD_REP_ACK, vec![])]
            );
            let replies = ask(
                &mut stream,
                NBD_OPT_SET_META_CONTEXT,
                &meta_data("data", &["base:allocation"]),
            );
            assert_eq!(replies.len(), 2);
        }
        let replies = ask(&mut stream, NBD_OPT_GO, &go_data("data", &[]));
        assert_eq!(replies.last().unwrap().0, NBD_REP_ACK);
        Self {
            stream,
            structured,
            cookie: 0,
        }
    }

    /// Sends a request and returns its cookie.
    pub(crate) fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> u64 {
        self.cookie += 1;
        let header = RequestHeader {
            flags,
            command,
            cookie: self.cookie,
            offset,
            length,
        };
        self.stream.write_all(&header.encode()).unwrap();
        self.stream.write_all(payload).unwrap();
        self.cookie
    }

    /// The next reply; `data` is the length of the data of a successful simple read.
    pub(crate) fn reply(&mut self) -> io::Result<Reply> {
        let magic = u32::from_be_bytes(read_array(&mut self.stream)?);
        if magic == SIMPLE_REPLY_MAGIC {
            let error = u32::from_be_bytes(read_array(&mut self.stream)?);
            let cookie = u64::from_be_bytes(read_array(&mut self.stream)?);
            return Ok(Reply::Simple { error, cookie });
        }
        assert_eq!(magic, STRUCTURED_REPLY_MAGIC);
        let flags = u16::from_be_bytes(read_array(&mut self.stream)?);
        let kind = u16::from_be_bytes(read_array(&mut self.stream)?);
        let cookie = u64::from_be_bytes(read_array(&mut self.stream)?);
        let mut payload = vec![0; u32::from_be_bytes(read_array(&mut self.stream)?) as usize];
        self.stream.read_exact(&mut payload)?;
        Ok(Reply::Chunk {
            flags,
            kind,
            cookie,
            payload,
        })
    }

    /// A request with a simple reply; its error, 0 for none.
    pub(crate) fn ask(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> u32 {
        let sent = self.send(command, flags, offset, length, payload);
        match self.reply().unwrap() {
            Reply::Simple { error, cookie } => {
                assert_eq!(cookie, sent);
                error
            }
            Reply::Chunk {
                kind,
                cookie,
                payload,
                ..
            } => {
                assert_eq!((kind, cookie), (0x8001, sent), "an error chunk");
                u32::from_be_bytes(payload[..4].try_into().unwrap())
            }
        }
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), u32> {
        match self.ask(1, 0, offset, data.len() as u32, data) {
            0 => Ok(()),
            error => Err(error),
        }
    }

    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.read_flagged(offset, length, 0).map(|(data, _)| data)
    }

    /// The content, and how many content chunks it came in.
    pub(crate) fn read_flagged(
        &mut self,
        offset: u64,
        length: u32,
        flags: u16,
    ) -> Result<(Vec<u8>, usize), u32> {
        let sent = self.send(0, flags, offset, length, &[]);
        let mut out = vec![0xee; length as usize];
        if !self.structured {
            let Reply::Simple { error, cookie } = self.reply().unwrap() else {
                panic!("not simple")
            };
            assert_eq!(cookie, sent);
            if error != 0 {
                return Err(error);
            }
            self.stream.read_exact(&mut out).unwrap();
            return Ok((out, 1));
        }
        let (mut chunks, mut failed) = (0, None);
        loop {
            let Reply::Chunk {
                flags,
                kind,
                cookie,
                payload,
            } = self.reply().unwrap()
            else {
                panic!("not a chunk")
            };
            assert_eq!(cookie, sent);
            let at = |n: usize| u64::from_be_bytes(payload[n..n + 8].try_into().unwrap());
            match kind {
                0 => {}
                1 => {
                    let start = (at(0) - offset) as usize;
                    out[start..start + payload.len() - 8].copy_from_slice(&payload[8..]);
                    chunks += 1;
                }
                2 => {
                    let start = (at(0) - offset) as usize;
                    let run = u32::from_be_bytes(payload[8..12].try_into().unwrap()) as usize;
                    out[start..start + run].fill(0);
                    chunks += 1;
                }
                0x8001 => failed = Some(u32::from_be_bytes(payload[..4].try_into().unwrap())),
                other => panic!("chunk of type {other}"),
            }
            if flags & 1 != 0 {
                return failed.map_or(Ok((out, chunks)), Err);
            }
        }
    }

    /// The descriptors of a `BLOCK_STATUS`.
    pub(crate) fn status(&mut self, offset: u64, length: u32, flags: u16) -> Vec<(u32, u32)> {
        self.send(7, flags, offset, length, &[]);
        let Reply::Chunk {
            flags: 1,
            kind: 5,
            payload,
            ..
        } = self.reply().unwrap()
        else {
            panic!("not a status")
        };
        let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        assert_eq!(number(0), 1, "the context's id");
        (4..payload.len())
            .step_by(8)
            .map(|at| (number(at), number(at + 4)))
            .collect()
    }

    /// Whether the server has closed, without a word.
    pub(crate) fn is_closed(&mut self) -> bool {
        closed(&mut self.stream)
    }

    pub(crate) fn hang_up(self) {
        self.stream.shutdown(Shutdown::Both).unwrap();
    }
}

/// Reads until the server closes. `false` where it does not, in the time given to the stream.
pub(crate) fn closed(stream: &mut UnixStream) -> bool {
    let mut scratch = [0; 65536];
    loop {
        match stream.read(&mut scratch) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}
