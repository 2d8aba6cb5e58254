//! Putting aside what differs from the base, and reading it again.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use capture_core::scan::kept::{
    HEAD_LEN_MAX, HEADER_LEN, Head, check_header, chunk_blocks, chunk_extent, encode_header,
};
use parking_lot::Mutex;
use rustix::fs::fstatvfs;
use tidemark_block::{BlockCount, BlockSet, Epoch, Extent, Geometry, VolumeId, block_checksum};
use tidemark_disk::durable;

use super::{super::EngineError, source::Source};

/// A record of so many bytes is worth being sent to the disk at once.
const WRITEBACK_MIN: u64 = 64 << 10;
const PREFIX: &str = "scan-";

/// Where what differs at a cut is put aside.
pub(super) fn path_in(dir: &Path, cut: u64) -> PathBuf {
    dir.join(format!("{PREFIX}{cut}"))
}

/// Removes what is put aside for cuts that `named` doesn't know.
pub(super) fn sweep(dir: &Path, named: impl Fn(u64) -> bool) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let cut = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.parse().ok());
        if cut.is_some_and(|cut: u64| !named(cut)) {
            durable::remove_file(&entry.path())?;
        }
    }
    Ok(())
}

/// A file that goes with this, unless it is finished.
#[derive(Debug)]
struct Unfinished {
    path: PathBuf,
    finished: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            // Best effort: the next cut replaces it, the next opening removes it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Takes what differs, from several threads. Without [`Self::finish`] nothing stays.
#[derive(Debug)]
pub(super) struct Keeper {
    path: Unfinished,
    geometry: Geometry,
    file: File,
    end: AtomicU64,
    /// Bytes that may still be put aside, records without blocks apart.
    room: AtomicU64,
    found: Mutex<(Vec<(u64, u64)>, BlockSet)>,
}

impl Keeper {
    /// Begins the file of a cut; one that an attempt before left behind is replaced.
    pub(super) fn create(
        dir: &Path,
        volume: VolumeId,
        geometry: Geometry,
        cut: u64,
        room: u64,
    ) -> io::Result<Self> {
        let path = path_in(dir, cut);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        let path = Unfinished {
            path,
            finished: false,
        };
        file.write_all_at(&encode_header(volume, geometry, cut), 0)?;
        // Others need the disk, too.
        let free = fstatvfs(&file)?;
        let room = room.min(free.f_bavail * free.f_frsize / 2);
        Ok(Self {
            path,
            geometry,
            file,
            end: AtomicU64::new(HEADER_LEN as u64),
            room: AtomicU64::new(room),
            found: Mutex::default(),
        })
    }

    /// Puts a chunk's record aside; `chunk` has the bytes of all its blocks. Where there is no room for them, the checksums
    /// alone.
    pub(super) fn put(&self, mut head: Head, chunk: &[u8]) -> io::Result<()> {
        let size = self.geometry.block_size().as_usize();
        head.with_bytes = true;
        let wanted = head.record_len(self.geometry);
        let taken = self
            .room
            .fetch_update(SeqCst, SeqCst, |room| room.checked_sub(wanted));
        head.with_bytes = taken.is_ok();
        let mut record = head.encode();
        if head.with_bytes {
            for at in head.data.ones() {
                record.extend_from_slice(&chunk[at * size..(at + 1) * size]);
            }
        }
        let length = record.len() as u64;
        let offset = self.end.fetch_add(length, SeqCst);
        self.file.write_all_at(&record, offset)?;
        if length >= WRITEBACK_MIN {
            durable::start_writeback(&self.file, offset, length);
        }
        let (index, changed) = &mut *self.found.lock();
        index.push((head.chunk, offset));
        head.add_changed_to(self.geometry, changed);
        Ok(())
    }

    /// Makes it durable. None, and no file, where nothing differs.
    pub(super) fn finish(mut self) -> io::Result<Option<Kept>> {
        let (mut index, changed) = self.found.into_inner();
        if changed.is_empty() {
            return Ok(None);
        }
        self.file.sync_all()?;
        if let Some(dir) = self.path.path.parent() {
            durable::sync_dir(dir)?;
        }
        index.sort_unstable();
        self.path.finished = true;
        Ok(Some(Kept {
            geometry: self.geometry,
            file: self.file,
            bytes: self.end.into_inner(),
            index,
            changed: Arc::new(changed),
        }))
    }
}

/// What was put aside at a cut.
#[derive(Debug)]
pub(super) struct Kept {
    geometry: Geometry,
    file: File,
    /// Its length.
    pub(super) bytes: u64,
    /// Each chunk with where its record begins, ascending.
    index: Vec<(u64, u64)>,
    /// The blocks that differ.
    pub(super) changed: Arc<BlockSet>,
}

impl Kept {
    /// Opens what was put aside; an error of kind [`io::ErrorKind::InvalidData`] where it isn't that.
    pub(super) fn open(
        path: &Path,
        volume: VolumeId,
        geometry: Geometry,
        cut: u64,
        bytes: u64,
    ) -> io::Result<Self> {
        let damaged = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let file = File::open(path)?;
        if file.metadata()?.len() != bytes {
            return Err(damaged(
                "it has another length than was recorded".to_owned(),
            ));
        }
        let mut header = [0; HEADER_LEN];
        file.read_exact_at(&mut header, 0)?;
        check_header(&header, volume, geometry, cut).map_err(|e| damaged(e.to_string()))?;
        let mut kept = Self {
            geometry,
            file,
            bytes,
            index: Vec::new(),
            changed: Arc::default(),
        };
        let (mut at, mut changed) = (HEADER_LEN as u64, BlockSet::new());
        while at < bytes {
            let head = kept.head_at(at)?;
            kept.index.push((head.chunk, at));
            head.add_changed_to(geometry, &mut changed);
            at += head.record_len(geometry);
        }
        if at != bytes {
            return Err(damaged("its last record is cut short".to_owned()));
        }
        kept.index.sort_unstable();
        kept.changed = Arc::new(changed);
        Ok(kept)
    }

    fn head_at(&self, offset: u64) -> io::Result<Head> {
        let mut bytes = [0; HEAD_LEN_MAX];
        let rest = self.bytes.saturating_sub(offset).min(HEAD_LEN_MAX as u64);
        let bytes = &mut bytes[..usize::try_from(rest).unwrap_or(0)];
        self.file.read_exact_at(bytes, offset)?;
        Head::decode(bytes, self.geometry)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// The record of a chunk, and where it begins; none where nothing differs in it.
    fn find(&self, chunk: u64) -> io::Result<Option<(Head, u64)>> {
        let Ok(at) = self.index.binary_search_by_key(&chunk, |(chunk, _)| *chunk) else {
            return Ok(None);
        };
        let offset = self.index[at].1;
        Ok(Some((self.head_at(offset)?, offset)))
    }
}

/// Reads the blocks that differ from the base, as they were at the cut. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct ScanReader(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    /// None where nothing differs.
    kept: Option<Kept>,
    source: Arc<Source>,
    cut: Epoch,
    geometry: Geometry,
    volume: VolumeId,
}

impl ScanReader {
    pub(super) fn new(
        kept: Option<Kept>,
        source: Arc<Source>,
        volume: VolumeId,
        geometry: Geometry,
        cut: u64,
    ) -> Self {
        Self(Arc::new(Opened {
            kept,
            source,
            cut: Epoch::new(cut),
            geometry,
            volume,
        }))
    }

    /// The blocks that differ from the base.
    pub(super) fn changed(&self) -> Arc<BlockSet> {
        let kept = self.0.kept.as_ref();
        kept.map(|kept| Arc::clone(&kept.changed))
            .unwrap_or_default()
    }

    /// The last epoch that is seen.
    #[must_use]
    pub fn cut(&self) -> Epoch {
        self.0.cut
    }

    /// The volume's geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    /// Reads whole blocks, all of which differ from the base; `buffer` has the length of the extent.
    ///
    /// # Errors
    /// [`EngineError::GivenUp`] where a block that there was no room for has changed since, or what was put aside is
    /// damaged; [`EngineError::OutOfRange`] for other blocks.
    pub fn read_blocks(&self, extent: Extent, buffer: &mut [u8]) -> Result<(), EngineError> {
        let geometry = self.geometry();
        if extent.end() > geometry.all().end()
            || buffer.len() as u64 != geometry.bytes(extent.count())
        {
            return Err(EngineError::OutOfRange);
        }
        let mut rest = buffer;
        for (chunk, part) in by_chunk(geometry, extent) {
            let length = usize::try_from(geometry.bytes(part.count())).unwrap_or(rest.len());
            let here;
            (here, rest) = rest.split_at_mut(length);
            let found = self.kept().and_then(|kept| kept.find(chunk).transpose());
            match found {
                Some(Ok((head, offset))) => self.read_chunk(&head, offset, part, here)?,
                Some(Err(error)) => return Err(self.lost(&error)),
                None => return Err(EngineError::OutOfRange),
            }
        }
        Ok(())
    }

    fn kept(&self) -> Option<&Kept> {
        self.0.kept.as_ref()
    }

    fn read_chunk(
        &self,
        head: &Head,
        offset: u64,
        part: Extent,
        buffer: &mut [u8],
    ) -> Result<(), EngineError> {
        let geometry = self.geometry();
        let start = chunk_extent(geometry, head.chunk).start();
        let size = geometry.block_size().as_usize();
        let places: Vec<_> = part
            .iter()
            .map(|block| usize::try_from(block.since(start).get()).unwrap_or(usize::MAX))
            .collect();
        if !places.iter().all(|at| head.changed.has(*at)) {
            return Err(EngineError::OutOfRange);
        }
        let found = |at: &usize| head.find(geometry, *at);
        let mut rest = buffer;
        for run in places.chunk_by(|a, b| head.data.has(*a) == head.data.has(*b)) {
            let here;
            (here, rest) = rest.split_at_mut(run.len() * size);
            let Some((within, _)) = found(&run[0]) else {
                here.fill(0);
                continue;
            };
            let first = start.plus(BlockCount::new(run[0] as u64));
            let read = if head.with_bytes {
                let kept = self.kept().ok_or(EngineError::OutOfRange)?;
                kept.file.read_exact_at(here, offset + within)
            } else {
                self.0.source.read(here, geometry.offset_of(first).get())
            };
            read.map_err(|error| self.unread(head, &error))?;
            let sums = run.iter().filter_map(found).map(|(_, sum)| sum);
            let same = here.chunks_exact(size).map(block_checksum).eq(sums);
            if !same && head.with_bytes {
                let damaged = format!("what was put aside from block {first} on is damaged");
                return Err(self.lost(&io::Error::new(io::ErrorKind::InvalidData, damaged)));
            } else if !same {
                // There was no room for it, and it has changed since.
                return Err(EngineError::GivenUp(self.cut()));
            }
        }
        Ok(())
    }

    fn unread(&self, head: &Head, error: &io::Error) -> EngineError {
        match head.with_bytes {
            true => self.lost(error),
            false => EngineError::io("read the volume file", io::Error::from(error.kind())),
        }
    }

    /// What was put aside can't be read: the next cut puts it aside anew.
    fn lost(&self, error: &io::Error) -> EngineError {
        tracing::error!(
            volume = %self.0.volume, cut = %self.cut(), %error,
            "what was put aside for the interval can't be read: it is given up, and made anew; check the disk of the state \
             directory"
        );
        EngineError::GivenUp(self.cut())
    }

    /// The blocks of the extent that differ from the base and hold something else than zeroes.
    ///
    /// # Errors
    /// As [`Self::read_blocks`].
    pub fn data_extents(&self, extent: Extent) -> Result<BlockSet, EngineError> {
        let geometry = self.geometry();
        let mut found = BlockSet::new();
        let Some(kept) = self.kept() else {
            return Ok(found);
        };
        let extent = extent.intersect(geometry.all());
        if extent.is_empty() {
            return Ok(found);
        }
        let first = extent.start().get() / chunk_blocks(geometry);
        let from = kept.index.partition_point(|(chunk, _)| *chunk < first);
        for (chunk, offset) in &kept.index[from..] {
            let whole = chunk_extent(geometry, *chunk);
            if whole.start() >= extent.end() {
                break;
            }
            let head = kept.head_at(*offset).map_err(|error| self.lost(&error))?;
            for at in head.data.ones() {
                let block = whole.start().plus(BlockCount::new(at as u64));
                if extent.contains(block) {
                    found.insert(Extent::new(block, BlockCount::new(1)));
                }
            }
        }
        Ok(found)
    }
}

/// The parts of an extent, with the chunk that each lies in.
fn by_chunk(geometry: Geometry, extent: Extent) -> impl Iterator<Item = (u64, Extent)> {
    let blocks = chunk_blocks(geometry);
    let first = extent.start().get() / blocks;
    let end = extent.end().get().div_ceil(blocks);
    (first..end).map(move |chunk| (chunk, chunk_extent(geometry, chunk).intersect(extent)))
}
