//! A workload that writes a file by every means there are, and knows what it must hold.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
};

use rustix::fs::{FallocateFlags, fallocate};

pub(crate) const BLOCK: usize = 4096;
pub(crate) const BLOCKS: usize = 2048;

/// Numbers that look random and come again.
pub(crate) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }
}

/// Memory that O_DIRECT takes.
pub(crate) fn aligned(bytes: &[u8]) -> memmap2::MmapMut {
    let mut map = memmap2::MmapMut::map_anon(bytes.len()).unwrap();
    map.copy_from_slice(bytes);
    map
}

/// A file with each way to write to it, and what it must hold.
pub(crate) struct Writer {
    buffered: File,
    direct: File,
    pub(crate) map: memmap2::MmapMut,
    pub(crate) model: Vec<u8>,
    pub(crate) random: Random,
}

impl Writer {
    #[allow(unsafe_code)]
    pub(crate) fn new(path: &PathBuf, seed: u64) -> Self {
        let open = || OpenOptions::new().read(true).write(true).clone();
        let buffered = open().open(path).unwrap();
        let direct = open().custom_flags(libc::O_DIRECT).open(path).unwrap();
        // SAFETY: the file is not cut short while it is mapped, and nobody holds references into the map.
        let map = unsafe { memmap2::MmapMut::map_mut(&buffered).unwrap() };
        Self {
            buffered,
            direct,
            map,
            model: vec![0; BLOCKS * BLOCK],
            random: Random(seed),
        }
    }

    pub(crate) fn one(&mut self) {
        let count = 1 + self.random.below(8);
        let block = self.random.below(BLOCKS - count);
        let (at, length) = (block * BLOCK, count * BLOCK);
        let byte = u8::try_from(1 + self.random.below(255)).unwrap();
        let what = self.random.below(10);
        let (offset, range) = (at as u64, at..at + length);
        let zero = |flags: FallocateFlags| {
            fallocate(&self.buffered, flags, offset, length as u64).unwrap();
        };
        match what {
            // Any bytes, across blocks.
            0..3 => {
                let (at, length) = (at + 100, length - 50);
                self.model[at..at + length].fill(byte);
                self.buffered
                    .write_all_at(&self.model[at..at + length], at as u64)
                    .unwrap();
            }
            3..5 => {
                self.model[range.clone()].fill(byte);
                let bytes = aligned(&self.model[range]);
                self.direct.write_all_at(&bytes, offset).unwrap();
            }
            5..8 => {
                let at = at + self.random.below(BLOCK);
                self.model[at] = byte;
                self.map[at] = byte;
            }
            8 => {
                self.model[range].fill(0);
                zero(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE);
            }
            _ => {
                // Space that is allocated and not written.
                self.model[range].fill(0);
                zero(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE);
            }
        }
    }
}
