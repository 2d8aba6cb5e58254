//! The engine `scan` on real filesystems: writers of every kind against a model.

use std::{fs::File, path::PathBuf, sync::Arc, time::Duration};

use capture_svc::engine::{
    CutAt, EngineError, EngineOptions, EngineSetup, Trust,
    scan::{IntervalCut, Scan},
};
use tidemark_block::{BlockSize, Geometry, VolumeId, block_checksum};
use tidemark_disk::ChecksumTable;

use crate::{
    disk::Disk,
    writer::{BLOCK, BLOCKS},
};

#[path = "scan/crash.rs"]
mod crash;
#[path = "scan/exact.rs"]
mod exact;
#[path = "scan/held.rs"]
mod held;
#[path = "scan/service.rs"]
mod service;
#[path = "scan/unsteady.rs"]
mod unsteady;

const KINDS: [&str; 3] = ["ext4", "xfs", "btrfs"];
const VOLUME: VolumeId = VolumeId::from_bytes([8; 16]);

fn geometry() -> Geometry {
    Geometry::new((BLOCKS * BLOCK) as u64, BlockSize::MIN).unwrap()
}

struct Scene {
    // Before the disk, so that it is closed first.
    engine: Option<Arc<Scan>>,
    options: EngineOptions,
    geometry: Geometry,
    state: tempfile::TempDir,
    table: ChecksumTable,
    disk: Disk,
}

impl Scene {
    fn new(kind: &str) -> Option<Self> {
        Self::with(kind, geometry(), EngineOptions::default())
    }

    fn with(kind: &str, geometry: Geometry, options: EngineOptions) -> Option<Self> {
        let disk = Disk::new(kind, (geometry.length() >> 20) + 512)?;
        let state = tempfile::tempdir().unwrap();
        let file = disk.path("data.img");
        let made = File::create(&file).unwrap();
        made.set_len(geometry.length()).unwrap();
        let create = Scan::create(EngineSetup {
            dir: state.path(),
            volume: VOLUME,
            file: &file,
            geometry,
            options: options.clone(),
        });
        Some(Self {
            engine: Some(create.unwrap()),
            table: ChecksumTable::create(&state.path().join("table"), VOLUME, geometry).unwrap(),
            options,
            geometry,
            state,
            disk,
        })
    }

    fn file(&self) -> PathBuf {
        self.disk.path("data.img")
    }

    fn engine(&self) -> &Arc<Scan> {
        self.engine.as_ref().unwrap()
    }

    /// As after a kill: nothing was closed.
    fn open_again(&mut self) -> Trust {
        self.engine = None;
        let (engine, trust) = self.try_open().unwrap();
        self.engine = Some(engine);
        trust
    }

    fn try_open(&self) -> Result<(Arc<Scan>, Trust), EngineError> {
        let options = self.options.clone();
        Scan::open(EngineSetup {
            dir: self.state.path(),
            volume: VOLUME,
            file: &self.file(),
            geometry: self.geometry,
            options,
        })
    }

    /// Where anybody may write, and does at most for a moment.
    fn live(&self) -> CutAt<'_> {
        CutAt {
            base: Some(&self.table),
            lull_wait_max: Duration::from_secs(20),
            lull_min: Duration::from_millis(1),
            ..CutAt::default()
        }
    }

    fn quiesced(&self) -> CutAt<'_> {
        CutAt {
            quiesced: true,
            base: Some(&self.table),
            ..CutAt::default()
        }
    }

    /// What an uplink does once the generation is committed.
    fn commit(&self, cut: &IntervalCut, image: &[u8]) {
        for extent in cut.changed.extents() {
            for block in extent.iter() {
                let at = usize::try_from(block.get()).unwrap() * BLOCK;
                let sum = block_checksum(&image[at..at + BLOCK]);
                self.table.apply([(block, sum)]).unwrap();
            }
        }
        self.engine().commit_interval(cut.epoch).unwrap();
    }

    /// What is put aside, by name.
    fn put_aside(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.state.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("scan-")).collect()
    }

    fn bytes_put_aside(&self) -> u64 {
        let files = self.put_aside();
        let lengths = files
            .iter()
            .map(|name| std::fs::metadata(self.state.path().join(name)));
        lengths.flatten().map(|metadata| metadata.len()).sum()
    }
}

/// Makes the image of the base that of the cut, by what the interval holds.
fn apply(image: &mut [u8], cut: &IntervalCut) -> Result<(), EngineError> {
    for extent in cut.changed.extents() {
        let at = usize::try_from(extent.start().get()).unwrap() * BLOCK;
        let length = usize::try_from(extent.count().get()).unwrap() * BLOCK;
        cut.reader
            .read_blocks(extent, &mut image[at..at + length])?;
        // What is said to be zero is, and the other way round.
        let data = cut.reader.data_extents(extent)?;
        for block in extent.iter() {
            let at = usize::try_from(block.get()).unwrap() * BLOCK;
            let zero = image[at..at + BLOCK].iter().all(|byte| *byte == 0);
            assert_eq!(zero, !data.contains(block));
        }
    }
    Ok(())
}
