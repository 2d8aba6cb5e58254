//! A snapshot as a read-only block device, and its scratches.
//!
//! A request opens the snapshot, reads and lets go of it: a client that stays connected keeps neither a deleted
//! snapshot's before-images nor a removed volume. From then on its requests fail with `ESTALE`.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tidemark_block::{BlockCount, Geometry};
use tidemark_export::{
    AllocationExtent, BlockDevice, Durability, Export, SNAPSHOT_SIGN, ScratchRoom, ZeroFlags,
};

use crate::engine::{Engine, EngineError, SnapshotId, SnapshotInfo, SnapshotReader};

/// What stands between a snapshot and the name of a scratch of it; the name may be empty.
const SCRATCH_SIGN: &str = "+scratch";
/// The longest name of a scratch, in bytes.
const SCRATCH_NAME_MAX: usize = 32;

/// Blocks of which the allocation is told at a time.
const EXTENT_BLOCKS_MAX: BlockCount = BlockCount::new(1 << 15);

#[derive(Debug)]
struct SnapshotDevice {
    engine: Weak<Engine>,
    snapshot: SnapshotId,
    geometry: Geometry,
}

fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

fn refused(error: &EngineError) -> io::Error {
    match error {
        EngineError::NoSuchSnapshot(_) | EngineError::GivenUp(_) => gone(),
        EngineError::Closed => io::Error::from_raw_os_error(libc::ESHUTDOWN),
        EngineError::OutOfRange => io::ErrorKind::InvalidInput.into(),
        EngineError::Io { source, .. } => {
            io::Error::from_raw_os_error(source.raw_os_error().unwrap_or(libc::EIO))
        }
        error => io::Error::other(error.to_string()),
    }
}

fn read_only() -> io::Error {
    io::ErrorKind::PermissionDenied.into()
}

impl SnapshotDevice {
    fn open(&self) -> io::Result<SnapshotReader> {
        let engine = self.engine.upgrade().ok_or_else(gone)?;
        engine
            .open_snapshot(self.snapshot)
            .map_err(|error| refused(&error))
    }

    fn in_range(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.geometry.spans(offset, length) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

impl BlockDevice for SnapshotDevice {
    fn length(&self) -> u64 {
        self.geometry.length()
    }

    fn read_only(&self) -> bool {
        true
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
        let reader = self.open()?;
        let blocks = self.geometry.covering(offset, length);
        let begin = self.geometry.offset_of(blocks.start()).get();
        let whole = self.geometry.bytes(blocks.count());
        if (begin, whole) == (offset, length) {
            return reader
                .read_blocks(blocks, buf)
                .map_err(|error| refused(&error));
        }
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let mut bytes = vec![0; usize::try_from(whole).map_err(too_long)?];
        reader
            .read_blocks(blocks, &mut bytes)
            .map_err(|error| refused(&error))?;
        let from = usize::try_from(offset - begin).map_err(too_long)?;
        buf.copy_from_slice(&bytes[from..from + buf.len()]);
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8], _: Durability) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> io::Result<()> {
        Err(read_only())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<AllocationExtent>> {
        self.in_range(offset, len)?;
        let wanted = self.geometry.covering(offset, len);
        let Some(blocks) = wanted.pieces(EXTENT_BLOCKS_MAX).next() else {
            return Ok(Vec::new());
        };
        let data = self.open()?.data_extents(blocks);
        let data = data.map_err(|error| refused(&error))?;
        let end = self
            .geometry
            .offset_of(blocks.end())
            .get()
            .min(offset + len);
        let (mut at, mut found) = (offset, Vec::new());
        let mut push = |at: &mut u64, to: u64, hole: bool| {
            let to = to.min(end);
            if *at < to && found.len() < max {
                found.push(AllocationExtent {
                    length: to - *at,
                    hole,
                    zero: hole,
                });
                *at = to;
            }
        };
        for run in data.extents() {
            push(&mut at, self.geometry.offset_of(run.start()).get(), true);
            push(&mut at, self.geometry.offset_of(run.end()).get(), false);
        }
        push(&mut at, end, true);
        Ok(found)
    }
}

/// The exports of a volume's snapshots and of their scratches.
#[derive(Debug)]
pub(crate) struct SnapshotExports {
    /// Each stays the same one for as long as its snapshot is there.
    snapshots: Mutex<BTreeMap<SnapshotId, Arc<Export>>>,
    /// By snapshot and name: those that somebody knows.
    scratches: Mutex<BTreeMap<(SnapshotId, String), Weak<Export>>>,
    room: Arc<ScratchRoom>,
}

/// A snapshot's text with a scratch's name behind it: the text, and the name.
fn scratch_of(text: &str) -> Option<(&str, &str)> {
    let (snapshot, name) = text.rsplit_once(SCRATCH_SIGN)?;
    if name.is_empty() {
        return Some((snapshot, name));
    }
    let name = name.strip_prefix('-')?;
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let fits = (1..=SCRATCH_NAME_MAX).contains(&name.len()) && name.chars().all(is_plain);
    fits.then_some((snapshot, name))
}

impl SnapshotExports {
    /// Those of one volume; what is written to their scratches takes of this room.
    pub(crate) fn new(room: Arc<ScratchRoom>) -> Self {
        Self {
            snapshots: Mutex::default(),
            scratches: Mutex::default(),
            room,
        }
    }

    /// All snapshots, oldest first, each with its export.
    pub(crate) fn list(
        &self,
        volume: &str,
        engine: &Arc<Engine>,
    ) -> Vec<(SnapshotInfo, Arc<Export>)> {
        let mut known = self.snapshots.lock();
        let listed = engine.list_snapshots();
        let mut before = std::mem::take(&mut *known);
        let exports: Vec<_> = listed
            .into_iter()
            .map(|info| {
                let export = before.remove(&info.id).unwrap_or_else(|| {
                    let device = SnapshotDevice {
                        engine: Arc::downgrade(engine),
                        snapshot: info.id,
                        geometry: engine.geometry(),
                    };
                    let name = format!("{volume}{SNAPSHOT_SIGN}{}", info.id);
                    Arc::new(Export::new(name, info.label.clone(), Arc::new(device)))
                });
                (info, export)
            })
            .collect();
        known.extend(
            exports
                .iter()
                .map(|(info, export)| (info.id, Arc::clone(export))),
        );
        exports
    }

    /// The snapshot with this number, or the newest with this label; or a scratch of one that is named so.
    pub(crate) fn find(
        &self,
        volume: &str,
        engine: &Arc<Engine>,
        text: &str,
    ) -> Option<Arc<Export>> {
        let all = self.list(volume, engine);
        let number = |text: &str| all.iter().find(|(info, _)| info.id.to_string() == text);
        let label = |text: &str| {
            let mut newest = all.iter().rev();
            newest.find(|(info, _)| !text.is_empty() && info.label == text)
        };
        // A label may look like anything: numbers come first.
        let scratch = scratch_of(text);
        let (found, name) = None
            .or_else(|| Some((number(text)?, None)))
            .or_else(|| scratch.and_then(|(of, name)| Some((number(of)?, Some(name)))))
            .or_else(|| Some((label(text)?, None)))
            .or_else(|| scratch.and_then(|(of, name)| Some((label(of)?, Some(name)))))?;
        let (info, export) = found;
        Some(match name {
            None => Arc::clone(export),
            Some(name) => self.scratch(info.id, export, engine.geometry(), name),
        })
    }

    /// The scratches that clients use now, each with its snapshot.
    pub(crate) fn scratches(&self) -> Vec<(SnapshotId, Arc<Export>)> {
        let known = self.scratches.lock();
        let there = known
            .iter()
            .filter_map(|((snapshot, _), export)| Some((*snapshot, export.upgrade()?)));
        there.filter(|(_, export)| export.clients() > 0).collect()
    }

    /// The scratch of a snapshot with this name, which is the same one for as long as somebody has it.
    fn scratch(
        &self,
        id: SnapshotId,
        snapshot: &Export,
        geometry: Geometry,
        name: &str,
    ) -> Arc<Export> {
        let mut scratches = self.scratches.lock();
        scratches.retain(|_, export| export.strong_count() > 0);
        let key = (id, name.to_owned());
        if let Some(known) = scratches.get(&key).and_then(Weak::upgrade) {
            return known;
        }
        let dash = if name.is_empty() { "" } else { "-" };
        let fresh = Arc::new(Export::scratch(
            format!("{}{SCRATCH_SIGN}{dash}{name}", snapshot.name()),
            Arc::clone(snapshot.device()),
            geometry,
            Arc::clone(&self.room),
        ));
        scratches.insert(key, Arc::downgrade(&fresh));
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_is_named_behind_its_snapshot() {
        let long = "x".repeat(SCRATCH_NAME_MAX);
        for (text, parts) in [
            ("3+scratch", Some(("3", ""))),
            ("3+scratch-try7", Some(("3", "try7"))),
            ("a+scratch+scratch", Some(("a+scratch", ""))),
            (&format!("3+scratch-{long}"), Some(("3", long.as_str()))),
            (&format!("3+scratch-{long}x"), None),
            ("3+scratch-", None),
            ("3+scratch-a/b", None),
            ("3+scratch-A", None),
            ("3+scratches", None),
            ("3", None),
        ] {
            assert_eq!(scratch_of(text), parts, "{text}");
        }
    }
}
