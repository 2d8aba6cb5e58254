//! Devices to serve in tests and figures: sparse memory, and a plain file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use parking_lot::RwLock;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use tidemark_export::{AllocationExtent, BlockDevice, Durability, ZeroFlags};

const CHUNK: u64 = 64 << 10;

/// Sparse memory in chunks, each under a lock of its own.
pub(crate) struct MemoryDevice {
    length: u64,
    read_only: bool,
    chunks: Vec<RwLock<Option<Box<[u8]>>>>,
}

impl MemoryDevice {
    pub(crate) fn new(length: u64) -> Self {
        let chunks = (0..length.div_ceil(CHUNK))
            .map(|_| RwLock::new(None))
            .collect();
        Self {
            length,
            read_only: false,
            chunks,
        }
    }

    #[allow(dead_code, reason = "for tests")]
    pub(crate) fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Calls `each` with chunk, offset within it, and the range of the request's bytes.
    fn split(
        &self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&RwLock<Option<Box<[u8]>>>, usize, std::ops::Range<usize>),
    ) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let n = (CHUNK - at % CHUNK).min(len - done);
            each(
                &self.chunks[(at / CHUNK) as usize],
                (at % CHUNK) as usize,
                done as usize..(done + n) as usize,
            );
            done += n;
        }
        Ok(())
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only {
            Err(io::ErrorKind::PermissionDenied.into())
        } else {
            Ok(())
        }
    }
}

impl BlockDevice for MemoryDevice {
    fn length(&self) -> u64 {
        self.length
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn block_size_preferred(&self) -> u32 {
        4096
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.split(offset, buf.len() as u64, |chunk, at, range| {
            match &*chunk.read() {
                Some(bytes) => buf[range.clone()].copy_from_slice(&bytes[at..at + range.len()]),
                None => buf[range].fill(0),
            }
        })
    }
    fn write(&self, offset: u64, data: &[u8], _: Durability) -> io::Result<()> {
        self.writable()?;
        self.split(offset, data.len() as u64, |chunk, at, range| {
            let mut chunk = chunk.write();
            let bytes = chunk.get_or_insert_with(|| vec![0; CHUNK as usize].into_boxed_slice());
            bytes[at..at + range.len()].copy_from_slice(&data[range]);
        })
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn trim(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.write_zeroes(
            offset,
            len,
            ZeroFlags {
                may_punch: true,
                ..ZeroFlags::default()
            },
        )
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.writable()?;
        self.split(offset, len, |chunk, at, range| {
            let mut chunk = chunk.write();
            if range.len() as u64 == CHUNK && flags.may_punch {
                *chunk = None;
            } else if chunk.is_some() || !flags.may_punch {
                let bytes = chunk.get_or_insert_with(|| vec![0; CHUNK as usize].into_boxed_slice());
                bytes[at..at + range.len()].fill(0);
            }
        })
    }
    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<AllocationExtent>> {
        let mut out: Vec<AllocationExtent> = Vec::new();
        self.split(offset, len, |chunk, _, range| {
            let hole = chunk.read().is_none();
            match out.last_mut() {
                Some(last) if last.hole == hole => last.length += range.len() as u64,
                _ => out.push(AllocationExtent {
                    length: range.len() as u64,
                    hole,
                    zero: hole,
                }),
            }
        })?;
        out.truncate(max);
        Ok(out)
    }
}

/// A plain file.
pub(crate) struct FileDevice {
    file: File,
    length: u64,
}

impl FileDevice {
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }
}

impl BlockDevice for FileDevice {
    fn length(&self) -> u64 {
        self.length
    }
    fn read_only(&self) -> bool {
        false
    }
    fn block_size_preferred(&self) -> u32 {
        4096
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        self.file.write_all_at(data, offset)?;
        if durability.is_fua() {
            self.file.sync_data()
        } else {
            Ok(())
        }
    }
    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn trim(&self, offset: u64, len: u64, fua: bool) -> io::Result<()> {
        self.write_zeroes(
            offset,
            len,
            ZeroFlags {
                may_punch: true,
                fast_only: false,
                fua,
            },
        )
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let mode = if flags.may_punch {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        match fallocate(&self.file, mode, offset, len) {
            Ok(()) => {}
            Err(_) if flags.fast_only => return Err(io::ErrorKind::Unsupported.into()),
            Err(_) => {
                let zeroes = vec![0; 1 << 20];
                let mut done = 0;
                while done < len {
                    let n = (len - done).min(zeroes.len() as u64);
                    self.file
                        .write_all_at(&zeroes[..n as usize], offset + done)?;
                    done += n;
                }
            }
        }
        if flags.fua {
            self.file.sync_data()
        } else {
            Ok(())
        }
    }
    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<AllocationExtent>> {
        let mut out = Vec::new();
        let (mut at, end) = (offset, offset + len);
        while at < end && out.len() < max {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(found) => found.min(end),
                Err(rustix::io::Errno::NXIO) => end,
                Err(error) => return Err(error.into()),
            };
            if data > at {
                out.push(AllocationExtent {
                    length: data - at,
                    hole: true,
                    zero: true,
                });
                at = data;
            } else {
                let hole = seek(&self.file, SeekFrom::Hole(at))?.min(end);
                out.push(AllocationExtent {
                    length: hole - at,
                    hole: false,
                    zero: false,
                });
                at = hole;
            }
        }
        Ok(out)
    }
}
