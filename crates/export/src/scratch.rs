//! A writable view of a device that can't be written: what is written to it lives in a temporary file and is thrown
//! away with it, and the device below never changes.
//!
//! That is how a filesystem whose journal must be replayed is mounted from a snapshot, and how somebody tries out on
//! real data what a repair or an upgrade would do.
//!
//! **Where a block is read from** is one of three: the file (`stored`), nowhere (`zeroed`), else the device below. A
//! block moves only between the first two, or from the device to one of them, and a block that is partly written is
//! filled from below first. What the sets say of a block is true before and after each change, so that reading takes
//! no lock but theirs: the bytes are there before the block is `stored`, and what the file holds of a block that isn't
//! `stored` is never looked at, whatever a failed write has left there.
//!
//! **Room** is shared by all scratches of a service and bounded; a write that would pass it fails with `ENOSPC`, as on a
//! full disk. The file has no name, so that nothing is left of it whatever ends the service. Nothing is ever synced:
//! what is thrown away at the end needs no durability.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use rustix::fs::{FallocateFlags, fallocate};
use tidemark_block::{BlockCount, BlockIndex, BlockSet, Extent, Geometry};

use crate::device::{AllocationExtent, BlockDevice, Durability, ZeroFlags};

/// Blocks that share a lock of changes, and the most that one step of a request changes.
const STEP: BlockCount = BlockCount::new(256);
/// Locks of changes.
const LOCKS: u64 = 64;

/// Where scratches keep what is written to them, and how much all of them together may keep.
#[derive(Debug)]
pub struct ScratchRoom {
    dir: PathBuf,
    bytes_max: u64,
    bytes_used: AtomicU64,
}

impl ScratchRoom {
    /// Room for `bytes_max` bytes in files of `dir`, which must exist by the first write.
    #[must_use]
    pub fn new(dir: PathBuf, bytes_max: u64) -> Self {
        Self {
            dir,
            bytes_max,
            bytes_used: AtomicU64::new(0),
        }
    }

    /// Bytes that all scratches keep now.
    #[must_use]
    pub fn bytes_used(&self) -> u64 {
        self.bytes_used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> io::Result<()> {
        self.bytes_used
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes)
                    .filter(|used| *used <= self.bytes_max)
            })
            .map(|_| ())
            .map_err(|_| io::ErrorKind::StorageFull.into())
    }

    fn give_back(&self, bytes: u64) {
        self.bytes_used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Where the blocks are that aren't read from below. No block is in both.
#[derive(Debug, Default)]
struct Blocks {
    stored: BlockSet,
    zeroed: BlockSet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Below,
    Stored,
    Zeroed,
}

impl Blocks {
    fn place(&self, block: BlockIndex) -> Place {
        if self.stored.contains(block) {
            Place::Stored
        } else if self.zeroed.contains(block) {
            Place::Zeroed
        } else {
            Place::Below
        }
    }

    /// The runs of an extent, ascending, with the place of each.
    fn runs(&self, of: Extent) -> Vec<(Place, Extent)> {
        let (stored, zeroed) = (
            self.stored.intersect_extent(of),
            self.zeroed.intersect_extent(of),
        );
        let mut own: Vec<_> = stored
            .extents()
            .map(|run| (Place::Stored, run))
            .chain(zeroed.extents().map(|run| (Place::Zeroed, run)))
            .collect();
        own.sort_unstable_by_key(|(_, run)| run.start());
        let (mut runs, mut at) = (Vec::with_capacity(own.len() * 2 + 1), of.start());
        for (place, run) in own {
            runs.push((Place::Below, Extent::between(at, run.start())));
            runs.push((place, run));
            at = run.end();
        }
        runs.push((Place::Below, Extent::between(at, of.end())));
        runs.retain(|(_, run)| !run.is_empty());
        runs
    }
}

/// A throw-away writable view of another device.
pub struct Scratch {
    below: Arc<dyn BlockDevice>,
    geometry: Geometry,
    room: Arc<ScratchRoom>,
    /// Made by the first write.
    file: OnceLock<File>,
    making: Mutex<()>,
    blocks: RwLock<Blocks>,
    /// Held while blocks of a group change.
    changing: Vec<Mutex<()>>,
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch")
            .field("geometry", &self.geometry)
            .field("stored", &self.blocks.read().stored.len())
            .finish_non_exhaustive()
    }
}

fn out_of_range() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

impl Scratch {
    /// A view of `below`, a device of this geometry, that nobody has written to.
    #[must_use]
    pub fn new(below: Arc<dyn BlockDevice>, geometry: Geometry, room: Arc<ScratchRoom>) -> Self {
        Self {
            below,
            geometry,
            room,
            file: OnceLock::new(),
            making: Mutex::new(()),
            blocks: RwLock::default(),
            changing: (0..LOCKS).map(|_| Mutex::new(())).collect(),
        }
    }

    /// Bytes that it keeps now.
    #[must_use]
    pub fn bytes_used(&self) -> u64 {
        self.geometry.bytes(self.blocks.read().stored.len())
    }

    fn file(&self) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let _one_at_a_time = self.making.lock();
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = tempfile::tempfile_in(&self.room.dir)?;
        Ok(self.file.get_or_init(|| file))
    }

    fn in_range(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.geometry.spans(offset, length) {
            Ok(())
        } else {
            Err(out_of_range())
        }
    }

    fn start(&self, run: Extent) -> u64 {
        self.geometry.offset_of(run.start()).get()
    }

    fn end(&self, run: Extent) -> u64 {
        self.geometry.offset_of(run.end()).get()
    }

    fn lock_of(&self, step: Extent) -> &Mutex<()> {
        let group = step.start().get() / STEP.get() % LOCKS;
        &self.changing[usize::try_from(group).unwrap_or_default()]
    }

    /// Cuts an extent into steps, none of which crosses from one lock to another.
    fn steps(of: Extent) -> impl Iterator<Item = Extent> {
        let first = of.start().get() / STEP.get();
        let last = of.end().get().div_ceil(STEP.get());
        (first..last)
            .map(move |group| Extent::new(BlockIndex::new(group * STEP.get()), STEP).intersect(of))
    }

    /// Writes the part of a request that lies in one step: room is taken for blocks that have none, their bytes go to
    /// the file, and from then on they are read from there.
    fn write_step(&self, step: Extent, offset: u64, data: &[u8]) -> io::Result<()> {
        let _alone = self.lock_of(step).lock();
        let held = self.blocks.read().stored.intersect_extent(step).len();
        let lacking = BlockCount::new(step.count().get() - held.get());
        let bytes = self.geometry.bytes(lacking);
        self.room.take(bytes)?;
        if let Err(error) = self.write_file(step, offset, data) {
            self.room.give_back(bytes);
            return Err(error);
        }
        let blocks = &mut *self.blocks.write();
        blocks.stored.insert(step);
        blocks.zeroed.remove(step);
        Ok(())
    }

    /// Only the first and the last block of a step can be partly written.
    fn write_file(&self, step: Extent, offset: u64, data: &[u8]) -> io::Result<()> {
        let one = BlockCount::new(1);
        let end = offset + data.len() as u64;
        let (mut at, mut rest) = (offset, data);
        if self.start(step) < offset {
            let first = Extent::new(step.start(), one);
            let length = to_index(self.end(first).min(end) - offset)?;
            let (part, after) = rest.split_at(length);
            self.write_part(first, at, part)?;
            (at, rest) = (at + part.len() as u64, after);
        }
        if !rest.is_empty() && end < self.end(step) {
            let last = Extent::new(BlockIndex::new(step.end().get() - 1), one);
            let (before, part) = rest.split_at(to_index(self.start(last) - at)?);
            self.write_part(last, self.start(last), part)?;
            rest = before;
        }
        self.file()?.write_all_at(rest, at)
    }

    /// Writes a part of one block; the rest of it comes from where the block is now.
    fn write_part(&self, block: Extent, offset: u64, part: &[u8]) -> io::Result<()> {
        let begin = self.start(block);
        let mut whole = vec![0; self.geometry.block_size().as_usize()];
        let place = self.blocks.read().place(block.start());
        match place {
            Place::Stored => return self.file()?.write_all_at(part, offset),
            Place::Zeroed => {}
            Place::Below => self.below.read(begin, &mut whole)?,
        }
        let from = to_index(offset - begin)?;
        whole[from..from + part.len()].copy_from_slice(part);
        self.file()?.write_all_at(&whole, begin)
    }

    /// From now on the blocks of one step read as zeroes and take no room.
    fn zero_step(&self, step: Extent) -> io::Result<()> {
        let _alone = self.lock_of(step).lock();
        let held = self.blocks.read().stored.intersect_extent(step);
        for run in held.extents() {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let length = self.geometry.bytes(run.count());
            fallocate(self.file()?, mode, self.start(run), length)?;
        }
        {
            let blocks = &mut *self.blocks.write();
            blocks.zeroed.insert(step);
            blocks.stored.remove(step);
        }
        self.room.give_back(self.geometry.bytes(held.len()));
        Ok(())
    }

    /// Writes zeroes as data.
    fn write_zero_bytes(&self, offset: u64, length: u64) -> io::Result<()> {
        let most = self.geometry.bytes(STEP);
        let zeroes = vec![0; to_index(length.min(most))?];
        let mut done = 0;
        while done < length {
            let part = (length - done).min(most);
            self.write(
                offset + done,
                &zeroes[..to_index(part)?],
                Durability::Volatile,
            )?;
            done += part;
        }
        Ok(())
    }
}

fn to_index(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| out_of_range())
}

impl BlockDevice for Scratch {
    fn length(&self) -> u64 {
        self.geometry.length()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn block_size_preferred(&self) -> u32 {
        self.geometry.block_size().get()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let length = buf.len() as u64;
        self.in_range(offset, length)?;
        if buf.is_empty() {
            return Ok(());
        }
        let runs = self
            .blocks
            .read()
            .runs(self.geometry.covering(offset, length));
        for (place, run) in runs {
            let from = self.start(run).max(offset);
            let to = self.end(run).min(offset + length);
            let part = &mut buf[to_index(from - offset)?..to_index(to - offset)?];
            match place {
                Place::Below => self.below.read(from, part)?,
                Place::Zeroed => part.fill(0),
                Place::Stored => self.file()?.read_exact_at(part, from)?,
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _: Durability) -> io::Result<()> {
        let length = data.len() as u64;
        self.in_range(offset, length)?;
        if data.is_empty() {
            return Ok(());
        }
        for step in Self::steps(self.geometry.covering(offset, length)) {
            let from = self.start(step).max(offset);
            let to = self.end(step).min(offset + length);
            let part = &data[to_index(from - offset)?..to_index(to - offset)?];
            self.write_step(step, from, part)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.in_range(offset, len)?;
        // The parts of blocks at both ends stay as they are.
        Self::steps(self.geometry.contained(offset, len)).try_for_each(|step| self.zero_step(step))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.in_range(offset, len)?;
        if !flags.may_punch {
            if flags.fast_only {
                return Err(io::ErrorKind::Unsupported.into());
            }
            return self.write_zero_bytes(offset, len);
        }
        let whole = self.geometry.contained(offset, len);
        if whole.is_empty() {
            return self.write_zero_bytes(offset, len);
        }
        self.write_zero_bytes(offset, self.start(whole) - offset)?;
        Self::steps(whole).try_for_each(|step| self.zero_step(step))?;
        self.write_zero_bytes(self.end(whole), offset + len - self.end(whole))
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<AllocationExtent>> {
        self.in_range(offset, len)?;
        let end = offset + len;
        let Some(near) = Self::steps(self.geometry.covering(offset, len)).next() else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        let runs = self.blocks.read().runs(near);
        for (place, run) in runs {
            let from = self.start(run).max(offset);
            let length = self.end(run).min(end) - from;
            let room = max - found.len();
            if room == 0 {
                break;
            }
            match place {
                Place::Below => {
                    let below = self.below.extents(from, length, room)?;
                    let told: u64 = below.iter().map(|extent| extent.length).sum();
                    found.extend(below);
                    if told < length {
                        break;
                    }
                }
                own => found.push(AllocationExtent {
                    length,
                    hole: own == Place::Zeroed,
                    zero: own == Place::Zeroed,
                }),
            }
        }
        Ok(found)
    }

    fn cache(&self, offset: u64, len: u64) -> io::Result<()> {
        self.below.cache(offset, len)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let stored = self.blocks.get_mut().stored.len();
        self.room.give_back(self.geometry.bytes(stored));
    }
}
