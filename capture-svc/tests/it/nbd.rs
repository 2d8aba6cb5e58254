//! A small NBD client: what a workload does, one request at a time.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

#[derive(Debug)]
pub(crate) struct Nbd {
    stream: UnixStream,
    pub(crate) length: u64,
    cookie: u64,
}

impl Nbd {
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        let mut out = 3u32.to_be_bytes().to_vec();
        out.extend_from_slice(b"IHAVEOPT");
        out.extend_from_slice(&1u32.to_be_bytes());
        out.extend_from_slice(&u32::try_from(export.len()).unwrap().to_be_bytes());
        out.extend_from_slice(export.as_bytes());
        stream.write_all(&out)?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        let mut length = [0; 8];
        length.copy_from_slice(&answer[..8]);
        Ok(Self {
            stream,
            length: u64::from_be_bytes(length),
            cookie: 0,
        })
    }

    fn request(&mut self, kind: u16, offset: u64, len: u32, data: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let mut out = REQUEST_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&0u16.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], REPLY_MAGIC.to_be_bytes());
        match u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(i32::try_from(code).unwrap())),
        }
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.request(1, offset, u32::try_from(data.len()).unwrap(), data)
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.request(0, offset, u32::try_from(len).unwrap(), &[])?;
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.request(3, 0, 0, &[])
    }

    pub(crate) fn trim(&mut self, offset: u64, len: u32) -> io::Result<()> {
        self.request(4, offset, len, &[])
    }
}
