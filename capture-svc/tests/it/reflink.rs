//! The engine `reflink` on real filesystems: writers of every kind against a model.

use std::{
    fs::{self, File},
    path::PathBuf,
    sync::Arc,
};

use capture_svc::engine::{
    EngineError, EngineOptions, EngineSetup, Trust,
    reflink::{CloneReader, IntervalCut, Reflink},
};
use tidemark_block::{BlockSet, BlockSize, Extent, Geometry, VolumeId};

use crate::{
    disk::{CLONING, Disk},
    writer::{BLOCK, BLOCKS},
};

#[path = "reflink/crash.rs"]
mod crash;
#[path = "reflink/exact.rs"]
mod exact;
#[path = "reflink/fit.rs"]
mod fit;
#[path = "reflink/service.rs"]
mod service;
#[path = "reflink/stalled.rs"]
mod stalled;

struct Scene {
    // Before the disk, so that it is closed first.
    engine: Option<Arc<Reflink>>,
    options: EngineOptions,
    state: tempfile::TempDir,
    disk: Disk,
}

const VOLUME: VolumeId = VolumeId::from_bytes([9; 16]);

fn geometry() -> Geometry {
    Geometry::new((BLOCKS * BLOCK) as u64, BlockSize::MIN).unwrap()
}

fn new_file(path: &PathBuf) {
    let file = File::create(path).unwrap();
    file.set_len(geometry().length()).unwrap();
}

impl Scene {
    fn new(kind: &str) -> Option<Self> {
        let disk = Disk::new(kind, 512)?;
        let mut scene = Self {
            engine: None,
            options: EngineOptions::default(),
            state: tempfile::tempdir().unwrap(),
            disk,
        };
        new_file(&scene.file());
        scene.engine = Some(scene.create().unwrap());
        Some(scene)
    }

    fn create(&self) -> Result<Arc<Reflink>, EngineError> {
        let options = self.options.clone();
        Reflink::create(EngineSetup {
            dir: self.state.path(),
            volume: VOLUME,
            file: &self.file(),
            geometry: geometry(),
            options,
        })
    }

    fn file(&self) -> PathBuf {
        self.disk.path("data.img")
    }

    fn engine(&self) -> &Arc<Reflink> {
        self.engine.as_ref().unwrap()
    }

    /// As after a kill: nothing was closed.
    fn open_again(&mut self) -> Trust {
        self.engine = None;
        let (engine, trust) = self.try_open().unwrap();
        self.engine = Some(engine);
        trust
    }

    fn try_open(&self) -> Result<(Arc<Reflink>, Trust), EngineError> {
        let options = self.options.clone();
        Reflink::open(EngineSetup {
            dir: self.state.path(),
            volume: VOLUME,
            file: &self.file(),
            geometry: geometry(),
            options,
        })
    }

    fn clone_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.disk.clones().unwrap()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    /// Ships the next interval: what it was, on `image`, that of the base.
    fn ship(&self, image: &mut [u8]) -> IntervalCut {
        let cut = self.engine().begin_interval().unwrap();
        apply(image, &cut);
        self.engine().commit_interval(cut.epoch).unwrap();
        cut
    }
}

fn read(reader: &CloneReader, extent: Extent) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(geometry().bytes(extent.count())).unwrap()];
    reader.read_blocks(extent, &mut bytes).unwrap();
    bytes
}

fn whole(reader: &CloneReader) -> Vec<u8> {
    read(reader, geometry().all())
}

/// Makes the image of the base that of the cut, by what the interval holds.
fn apply(image: &mut [u8], cut: &IntervalCut) {
    apply_blocks(image, &cut.changed, &cut.reader);
}

fn apply_blocks(image: &mut [u8], changed: &BlockSet, reader: &CloneReader) {
    for extent in changed.extents() {
        let at = usize::try_from(extent.start().get()).unwrap() * BLOCK;
        let bytes = read(reader, extent);
        image[at..at + bytes.len()].copy_from_slice(&bytes);
        // What is said to be zero is.
        let data = reader.data_extents(extent).unwrap();
        for block in extent.iter().filter(|block| !data.contains(*block)) {
            let at = usize::try_from(block.get()).unwrap() * BLOCK;
            assert!(image[at..at + BLOCK].iter().all(|byte| *byte == 0));
        }
    }
}
