//! A small NBD client: one connection, one request at a time, simple replies. What a test writes is then in one known
//! order.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

const INIT: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

const GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;

/// A server that does not answer within this time is taken for dead.
const ANSWER_MAX: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    pub size: u64,
    cookie: u64,
}

impl Client {
    pub fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        stream.set_write_timeout(Some(ANSWER_MAX))?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        expect(u64::from_be_bytes(hello[..8].try_into().unwrap()), INIT)?;
        expect(u64::from_be_bytes(hello[8..16].try_into().unwrap()), OPTION)?;

        let mut go = Vec::new();
        go.extend_from_slice(&FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes());
        go.extend_from_slice(&OPTION.to_be_bytes());
        go.extend_from_slice(&GO.to_be_bytes());
        let name_len = u32::try_from(export.len()).unwrap();
        go.extend_from_slice(&(name_len + 6).to_be_bytes());
        go.extend_from_slice(&name_len.to_be_bytes());
        go.extend_from_slice(export.as_bytes());
        go.extend_from_slice(&[0, 0]);
        stream.write_all(&go)?;

        let mut size = 0;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            expect(
                u64::from_be_bytes(head[..8].try_into().unwrap()),
                OPTION_REPLY,
            )?;
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let length = u32::from_be_bytes(head[16..20].try_into().unwrap());
            let mut payload = vec![0; length as usize];
            stream.read_exact(&mut payload)?;
            match kind {
                REPLY_ACK => break,
                REPLY_INFO if payload.starts_with(&[0, 0]) => {
                    size = u64::from_be_bytes(payload[2..10].try_into().unwrap());
                }
                REPLY_INFO => {}
                other => {
                    let text = String::from_utf8_lossy(&payload).into_owned();
                    return Err(io::Error::other(format!(
                        "option refused: {other:#x} {text}"
                    )));
                }
            }
        }
        Ok(Self {
            stream,
            size,
            cookie: 0,
        })
    }

    /// The connection itself, to misuse it.
    pub fn raw(&self) -> UnixStream {
        self.stream.try_clone().unwrap()
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.request(WRITE, offset, data.len() as u64, data)?;
        self.answer(&mut [])
    }

    pub fn write_zeroes(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.request(WRITE_ZEROES, offset, length, &[])?;
        self.answer(&mut [])
    }

    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.request(READ, offset, into.len() as u64, &[])?;
        self.answer(into)
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.request(FLUSH, 0, 0, &[])?;
        self.answer(&mut [])
    }

    fn request(&mut self, kind: u16, offset: u64, length: u64, data: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let length = u32::try_from(length).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend_from_slice(&REQUEST.to_be_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes)
    }

    fn answer(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        expect(
            u32::from_be_bytes(head[..4].try_into().unwrap()).into(),
            REPLY.into(),
        )?;
        expect(
            u64::from_be_bytes(head[8..].try_into().unwrap()),
            self.cookie,
        )?;
        match i32::from_be_bytes(head[4..8].try_into().unwrap()) {
            0 => self.stream.read_exact(into),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A polite goodbye, where the server still listens.
        let _ = self.request(DISCONNECT, 0, 0, &[]);
    }
}

fn expect(found: u64, expected: u64) -> io::Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "the server said {found:#x}, not {expected:#x}"
        )))
    }
}
