//! A snapshot as a read-only block device.
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
    AllocationExtent, BlockDevice, Durability, Export, SNAPSHOT_SIGN, ZeroFlags,
};

use crate::engine::{Engine, EngineError, SnapshotId, SnapshotInfo, SnapshotReader};

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

/// The exports of a volume's snapshots. Each stays the same one for as long as its snapshot is there.
#[derive(Debug, Default)]
pub(crate) struct SnapshotExports(Mutex<BTreeMap<SnapshotId, Arc<Export>>>);

impl SnapshotExports {
    /// All of them, oldest first, each with its snapshot.
    pub(crate) fn list(
        &self,
        volume: &str,
        engine: &Arc<Engine>,
    ) -> Vec<(SnapshotInfo, Arc<Export>)> {
        let mut known = self.0.lock();
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

    /// The one with this number, or the newest with this label.
    pub(crate) fn find(
        &self,
        volume: &str,
        engine: &Arc<Engine>,
        text: &str,
    ) -> Option<Arc<Export>> {
        let all = self.list(volume, engine);
        let number = all.iter().find(|(info, _)| info.id.to_string() == text);
        let labelled = || {
            let newest = all.iter().rev();
            newest
                .into_iter()
                .find(|(info, _)| !text.is_empty() && info.label == text)
        };
        number
            .or_else(labelled)
            .map(|(_, export)| Arc::clone(export))
    }
}
