//! One pass over the file: what is read in it, and how it differs from the base or from the pass before.

use std::{
    io,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use capture_core::scan::{
    kept::{Bits, CHUNK_BYTES, Head, chunk_count, chunk_extent},
    moment::{FileTimes, Passed},
};
use parking_lot::Mutex;
use tidemark_block::{
    BlockIndex, Checksum128, Extent, Geometry, TableView, block_checksum,
    digest::{LEAF_BLOCKS, leaf_extent, leaf_of},
    xxh3_128,
};
use tidemark_disk::ChecksumTable;

use super::{
    super::{EngineError, volume_file},
    kept::Keeper,
    source::{Source, stand_back},
};

/// Most threads that read.
const THREADS_MAX: usize = 4;
/// After so many chunks it is looked whether somebody has written meanwhile.
const LOOK_CHUNKS: u64 = 64;
/// Leaves of the table that are looked at together.
const LEAVES_AT_ONCE: usize = 4096;

/// For each chunk the checksum of its blocks' checksums; 0 where all are zero.
pub(super) type Prints = Vec<Checksum128>;

/// What a pass does with what it reads.
#[derive(Debug, Clone, Copy)]
pub(super) enum Task<'a> {
    /// What differs from the base is put aside.
    Keep {
        base: &'a ChecksumTable,
        keeper: &'a Keeper,
    },
    /// It must be what was read before.
    Compare(&'a [Checksum128]),
}

/// A pass, and all that it is made with.
pub(super) struct Pass<'a> {
    pub(super) source: &'a Source,
    pub(super) geometry: Geometry,
    pub(super) task: Task<'a>,
    /// Nobody waits for it: everyone else goes first.
    pub(super) in_background: bool,
    /// Set where a sync fails.
    pub(super) failed: &'a AtomicBool,
    /// Whether it is to end early, and as what.
    pub(super) ended: &'a (dyn Fn() -> Result<(), EngineError> + Sync),
}

/// Where the threads are.
struct Position {
    /// The next chunk.
    next: u64,
    /// Looks at where the threads are so far.
    claims: u64,
    /// Up to here the file has data, as far as it matters; bytes.
    data_until: u64,
}

enum Work {
    Data(u64),
    Hole(Range<u64>),
}

/// What the threads share.
struct Shared {
    at: Mutex<Position>,
    before: FileTimes,
    /// Nobody needs the rest.
    stop: AtomicBool,
    disagrees: AtomicBool,
}

impl Pass<'_> {
    /// Makes the pass. Also gives the prints of all chunks where they were put aside.
    pub(super) fn run(&self) -> Result<(Passed, Prints), EngineError> {
        let looked = |error| EngineError::io("look at the times of the volume file", error);
        let synced = |error| {
            self.failed.store(true, Relaxed);
            EngineError::io("sync the volume file", error)
        };
        let before = self.source.times().map_err(looked)?;
        self.source.sync().map_err(synced)?;
        let shared = Shared {
            at: Mutex::new(Position {
                next: 0,
                claims: 0,
                data_until: self.source.whole_until().map_err(looked)?,
            }),
            before,
            stop: AtomicBool::new(false),
            disagrees: AtomicBool::new(false),
        };
        let read = self.read_all(&shared)?;
        self.source.sync().map_err(synced)?;
        let passed = Passed {
            before,
            after: self.source.times().map_err(looked)?,
            whole: !shared.stop.load(Relaxed),
            agrees: !shared.disagrees.load(Relaxed),
        };
        Ok((passed, read))
    }

    fn read_all(&self, shared: &Shared) -> Result<Prints, EngineError> {
        let threads = thread::available_parallelism().map_or(1, |n| n.get().min(THREADS_MAX));
        let work = || {
            if self.in_background {
                stand_back();
            }
            let worked = self.work(shared);
            if worked.is_err() {
                shared.stop.store(true, Relaxed);
            }
            worked
        };
        let ended: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running.into_iter().map(|thread| thread.join()).collect()
        });
        let count = usize::try_from(chunk_count(self.geometry)).unwrap_or(usize::MAX);
        let mut prints = vec![Checksum128::ZERO; count];
        for worked in ended {
            let worked = worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            for (chunk, print) in worked? {
                prints[index(chunk)] = print;
            }
        }
        Ok(prints)
    }

    fn work(&self, shared: &Shared) -> Result<Vec<(u64, Checksum128)>, EngineError> {
        let mut buffer = vec![0; index(CHUNK_BYTES)];
        let mut prints = Vec::new();
        while !shared.stop.load(Relaxed) {
            let Some(work) = self.claim(shared)? else {
                break;
            };
            match work {
                Work::Hole(chunks) => self.pass_hole(shared, chunks)?,
                Work::Data(chunk) => {
                    let print = self.read_chunk(shared, chunk, &mut buffer)?;
                    if matches!(self.task, Task::Keep { .. }) && !print.is_zero() {
                        prints.push((chunk, print));
                    }
                }
            }
        }
        Ok(prints)
    }

    /// Whether the rest is worth the trouble.
    fn look(&self, shared: &Shared) -> Result<(), EngineError> {
        (self.ended)()?;
        let now = self.source.times();
        let now = now.map_err(|e| EngineError::io("look at the times of the volume file", e))?;
        if now != shared.before {
            shared.stop.store(true, Relaxed);
        }
        Ok(())
    }

    fn claim(&self, shared: &Shared) -> Result<Option<Work>, EngineError> {
        let (count, length) = (chunk_count(self.geometry), self.geometry.length());
        let mut at = shared.at.lock();
        if at.next >= count {
            return Ok(None);
        }
        if at.claims.is_multiple_of(LOOK_CHUNKS) {
            self.look(shared)?;
        }
        at.claims += 1;
        let from = at.next * CHUNK_BYTES;
        if from >= at.data_until {
            let (data, hole) = volume_file::next_data(self.source.file(), from, length)
                .map_err(|error| EngineError::io("look for data in the volume file", error))?;
            at.data_until = hole;
            let chunk = if data < length {
                data / CHUNK_BYTES
            } else {
                count
            };
            if chunk > at.next {
                let hole = at.next..chunk;
                at.next = chunk;
                return Ok(Some(Work::Hole(hole)));
            }
        }
        at.next += 1;
        Ok(Some(Work::Data(at.next - 1)))
    }

    fn read_chunk(
        &self,
        shared: &Shared,
        chunk: u64,
        buffer: &mut [u8],
    ) -> Result<Checksum128, EngineError> {
        let extent = chunk_extent(self.geometry, chunk);
        let bytes = &mut buffer[..index(self.geometry.bytes(extent.count()))];
        self.source
            .read(bytes, chunk * CHUNK_BYTES)
            .map_err(|error| EngineError::io("read the volume file", error))?;
        let blocks = bytes.chunks_exact(self.geometry.block_size().as_usize());
        let sums: Vec<_> = blocks.map(block_checksum).collect();
        let print = print(&sums);
        match self.task {
            Task::Keep { base, keeper } => {
                let head = compared(chunk, &sums, &known(base, extent)?);
                if !head.is_empty() {
                    keeper.put(head, bytes).map_err(kept)?;
                }
            }
            Task::Compare(prints) if prints[index(chunk)] != print => disagree(shared),
            Task::Compare(_) => {}
        }
        Ok(print)
    }

    /// What is a hole reads as zeroes.
    fn pass_hole(&self, shared: &Shared, chunks: Range<u64>) -> Result<(), EngineError> {
        let (base, keeper) = match self.task {
            Task::Compare(prints) => {
                let range = index(chunks.start)..index(chunks.end);
                if !prints[range].iter().all(|print| print.is_zero()) {
                    disagree(shared);
                }
                return Ok(());
            }
            Task::Keep { base, keeper } => (base, keeper),
        };
        let hole = Extent::between(
            chunk_extent(self.geometry, chunks.start).start(),
            chunk_extent(self.geometry, chunks.end - 1).end(),
        );
        let mut leaves = vec![Checksum128::ZERO; LEAVES_AT_ONCE];
        let last = leaf_of(BlockIndex::new(hole.end().get() - 1));
        let mut first = leaf_of(hole.start());
        while first <= last {
            let count = index(last - first + 1).min(LEAVES_AT_ONCE);
            (self.ended)()?;
            base.leaves(first, &mut leaves[..count]).map_err(table)?;
            for (leaf, sum) in (first..).zip(&leaves[..count]) {
                if !sum.is_zero() {
                    let part = leaf_extent(self.geometry, leaf).intersect(hole);
                    self.zeroed(base, keeper, part)?;
                }
            }
            first += count as u64;
        }
        Ok(())
    }

    /// Puts aside which blocks of whole chunks were something else than zeroes and are zero now.
    fn zeroed(
        &self,
        base: &ChecksumTable,
        keeper: &Keeper,
        part: Extent,
    ) -> Result<(), EngineError> {
        let blocks = capture_core::scan::kept::chunk_blocks(self.geometry);
        let first = part.start().get() / blocks;
        for chunk in first..part.end().get().div_ceil(blocks) {
            if chunk.is_multiple_of(LOOK_CHUNKS) {
                (self.ended)()?;
            }
            let extent = chunk_extent(self.geometry, chunk);
            let was = known(base, extent)?;
            let head = compared(chunk, &vec![Checksum128::ZERO; was.len()], &was);
            if !head.is_empty() {
                keeper.put(head, &[]).map_err(kept)?;
            }
        }
        Ok(())
    }
}

fn disagree(shared: &Shared) {
    shared.disagrees.store(true, Relaxed);
    shared.stop.store(true, Relaxed);
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn table(error: io::Error) -> EngineError {
    EngineError::Table(error)
}

fn kept(error: io::Error) -> EngineError {
    EngineError::io("put aside what has changed", error)
}

/// The base's checksums of a chunk, which lies in one leaf. Zero leaves are not read further.
fn known(base: &ChecksumTable, extent: Extent) -> Result<Vec<Checksum128>, EngineError> {
    debug_assert!(extent.start().get() / LEAF_BLOCKS == (extent.end().get() - 1) / LEAF_BLOCKS);
    let mut sums = vec![Checksum128::ZERO; index(extent.count().get())];
    let mut leaf = [Checksum128::ZERO];
    base.leaves(leaf_of(extent.start()), &mut leaf)
        .map_err(table)?;
    if !leaf[0].is_zero() {
        base.read_blocks(extent.start(), &mut sums).map_err(table)?;
    }
    Ok(sums)
}

fn compared(chunk: u64, is: &[Checksum128], was: &[Checksum128]) -> Head {
    let mut head = Head {
        chunk,
        changed: Bits::default(),
        data: Bits::default(),
        sums: Vec::new(),
        with_bytes: false,
    };
    for (at, (is, was)) in is.iter().zip(was).enumerate() {
        if is != was {
            head.changed.set(at);
            if !is.is_zero() {
                head.data.set(at);
                head.sums.push(*is);
            }
        }
    }
    head
}

fn print(sums: &[Checksum128]) -> Checksum128 {
    if sums.iter().all(|sum| sum.is_zero()) {
        return Checksum128::ZERO;
    }
    let bytes: Vec<u8> = sums.iter().flat_map(|sum| *sum.as_bytes()).collect();
    xxh3_128(&bytes)
}
