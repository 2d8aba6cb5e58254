//! The engine on real files: what the model test can't show, because it needs threads, signals and a filesystem.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use capture_svc::engine::{
    EngineError, EngineOptions, EngineSetup, Trust,
    intercept::{Intercept as Engine, SnapshotReader},
};
use tempfile::TempDir;
use tidemark_block::{BlockIndex, BlockSet, BlockSize, Extent, Geometry, VolumeId};
use tidemark_export::{BlockDevice, Durability, ZeroFlags};

#[path = "engine/bad_input.rs"]
mod bad_input;
#[path = "engine/crash.rs"]
mod crash;
#[path = "engine/damage.rs"]
mod damage;
#[path = "engine/threads.rs"]
mod threads;
#[path = "engine/upgrade.rs"]
mod upgrade;

const BLOCK: u64 = 4096;

/// A volume in a directory of its own.
struct Setup {
    dir: TempDir,
    blocks: u64,
    id: VolumeId,
    options: EngineOptions,
}

impl Setup {
    fn new(blocks: u64) -> Self {
        let setup = Self {
            dir: tempfile::tempdir().unwrap(),
            blocks,
            id: volume(),
            options: EngineOptions::default(),
        };
        File::create(setup.file())
            .unwrap()
            .set_len(blocks * BLOCK)
            .unwrap();
        setup
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("volume.img")
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn geometry(&self) -> Geometry {
        Geometry::new(self.blocks * BLOCK, BlockSize::MIN).unwrap()
    }

    fn create(&self) -> Arc<Engine> {
        let (state, file) = (self.state(), self.file());
        Engine::create(EngineSetup {
            dir: &state,
            volume: self.id,
            file: &file,
            geometry: self.geometry(),
            options: self.options.clone(),
        })
        .unwrap()
    }

    fn open(&self) -> (Arc<Engine>, Trust) {
        self.try_open().unwrap()
    }

    fn try_open(&self) -> Result<(Arc<Engine>, Trust), EngineError> {
        let (state, file) = (self.state(), self.file());
        Engine::open(EngineSetup {
            dir: &state,
            volume: self.id,
            file: &file,
            geometry: self.geometry(),
            options: self.options.clone(),
        })
    }

    fn readopt(&self) -> Result<(Arc<Engine>, Trust), EngineError> {
        let (state, file) = (self.state(), self.file());
        Engine::readopt(EngineSetup {
            dir: &state,
            volume: self.id,
            file: &file,
            geometry: self.geometry(),
            options: self.options.clone(),
        })
    }
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([7; 16])
}

fn extent(start: u64, count: u64) -> Extent {
    Extent::between(BlockIndex::new(start), BlockIndex::new(start + count))
}

fn set(extents: &[(u64, u64)]) -> BlockSet {
    extents
        .iter()
        .map(|&(start, count)| extent(start, count))
        .collect()
}

fn write(engine: &Engine, block: u64, byte: u8) {
    engine
        .write(block * BLOCK, &[byte; 4096], Durability::Volatile)
        .unwrap();
}

fn at(reader: &SnapshotReader, block: u64) -> u8 {
    let mut bytes = [0; 4096];
    reader.read_blocks(extent(block, 1), &mut bytes).unwrap();
    assert!(
        bytes.iter().all(|&byte| byte == bytes[0]),
        "a block is never torn"
    );
    bytes[0]
}

fn whole(reader: &SnapshotReader) -> Vec<u8> {
    let geometry = reader.geometry();
    let mut bytes = vec![0; usize::try_from(geometry.length()).unwrap()];
    reader.read_blocks(geometry.all(), &mut bytes).unwrap();
    bytes
}

fn contents(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[test]
fn an_interval_has_the_blocks_written_since_the_last_one_as_they_were_at_its_cut() {
    let setup = Setup::new(1000);
    let engine = setup.create();
    write(&engine, 3, 1);
    engine
        .write(10 * BLOCK - 5, &[2; 10], Durability::Fua)
        .unwrap();
    let interval = engine.begin_interval().unwrap();
    assert_eq!(*interval.changed, set(&[(3, 1), (9, 2)]));
    write(&engine, 3, 9);
    assert_eq!(at(&interval.reader, 3), 1);
    assert!(matches!(
        engine.begin_interval(),
        Err(EngineError::IntervalOpen(_))
    ));
    engine.commit_interval(interval.epoch).unwrap();
    assert!(matches!(
        engine.commit_interval(interval.epoch),
        Err(EngineError::NoInterval(_))
    ));
    let interval = engine.begin_interval().unwrap();
    assert_eq!(*interval.changed, set(&[(3, 1)]));
    assert_eq!(at(&interval.reader, 3), 9);
    engine.give_up_interval().unwrap();
    assert_eq!(engine.tracked(extent(0, 1000)), set(&[(3, 1)]));
}

#[test]
fn a_new_volume_s_first_interval_is_what_is_no_hole() {
    let setup = Setup::new(1000);
    let file = File::options().write(true).open(setup.file()).unwrap();
    file.write_all_at(&[1; 4096], 500 * BLOCK).unwrap();
    let engine = setup.create();
    assert_eq!(*engine.begin_interval().unwrap().changed, set(&[(500, 1)]));
}

#[test]
fn snapshots_overlap_and_each_shows_its_cut() {
    let setup = Setup::new(64);
    let engine = setup.create();
    let mut snapshots = Vec::new();
    for n in 1..=40_u8 {
        write(&engine, u64::from(n % 7), n);
        let info = engine.create_snapshot(&format!("n{n}"), n.into()).unwrap();
        snapshots.push((info.id, contents(&setup.file())));
    }
    for (id, _) in snapshots
        .extract_if(.., |(id, _)| id.0 % 3 == 0)
        .collect::<Vec<_>>()
    {
        engine.delete_snapshot(id).unwrap();
    }
    for (id, image) in &snapshots {
        assert!(
            whole(&engine.open_snapshot(*id).unwrap()) == *image,
            "snapshot {id}"
        );
    }
    let changed = engine
        .changed_between(snapshots[0].0, snapshots[1].0)
        .unwrap();
    assert_eq!(changed, set(&[(2, 1)]));
    for (id, _) in snapshots {
        engine.delete_snapshot(id).unwrap();
    }
    assert_eq!(engine.stats().spool_used, 0);
}

#[test]
fn a_snapshot_that_is_deleted_stays_readable_for_who_reads_it() {
    let setup = Setup::new(64);
    let engine = setup.create();
    write(&engine, 1, 1);
    let id = engine.create_snapshot("", 0).unwrap().id;
    let reader = engine.open_snapshot(id).unwrap();
    write(&engine, 1, 2);
    engine.delete_snapshot(id).unwrap();
    assert!(matches!(
        engine.open_snapshot(id),
        Err(EngineError::NoSuchSnapshot(_))
    ));
    write(&engine, 1, 3);
    assert_eq!(at(&reader, 1), 1);
    assert_eq!(engine.stats().spool_used, BLOCK);
    drop(reader);
    assert_eq!(engine.stats().spool_used, 0);
}

#[test]
fn a_thousand_and_twenty_four_snapshots_and_no_more() {
    let setup = Setup::new(64);
    let engine = setup.create();
    for n in 0..1024 {
        engine.create_snapshot("", n).unwrap();
    }
    assert!(matches!(
        engine.create_snapshot("", 0),
        Err(EngineError::TooManySnapshots(1024))
    ));
    assert_eq!(engine.list_snapshots().len(), 1024);
}

#[test]
fn zeroes_and_trims_are_tracked_and_leave_holes() {
    let setup = Setup::new(1024);
    let engine = setup.create();
    engine
        .write(0, &vec![5; 1024 * 4096], Durability::Volatile)
        .unwrap();
    let interval = engine.begin_interval().unwrap();
    engine.commit_interval(interval.epoch).unwrap();
    drop(interval);
    let punch = ZeroFlags {
        may_punch: true,
        ..ZeroFlags::default()
    };
    engine.write_zeroes(100, 10 * BLOCK, punch).unwrap();
    engine.trim(100 * BLOCK + 1, 10 * BLOCK, false).unwrap();
    engine
        .write_zeroes(200 * BLOCK, BLOCK, ZeroFlags::default())
        .unwrap();
    assert_eq!(
        engine.tracked(extent(0, 1024)),
        set(&[(0, 11), (101, 9), (200, 1)])
    );
    let mut model = vec![5; 1024 * 4096];
    model[100..100 + 10 * 4096].fill(0);
    model[101 * 4096..110 * 4096].fill(0);
    model[200 * 4096..201 * 4096].fill(0);
    assert!(contents(&setup.file()) == model);
    assert!(
        fs::metadata(setup.file()).unwrap().blocks() * 512 < 1010 * BLOCK,
        "zeroes leave holes"
    );
    let allocation = engine.extents(0, 1024 * BLOCK, 3).unwrap();
    assert!(!allocation[0].hole);
    assert_eq!(
        (allocation[1].length, allocation[1].hole),
        (9 * BLOCK, true)
    );

    engine.create_snapshot("", 0).unwrap();
    engine.trim(300 * BLOCK, BLOCK, false).unwrap();
    assert_eq!(engine.stats().trims_ignored, 1);
    assert!(
        !engine
            .tracked(extent(300, 1))
            .contains(BlockIndex::new(300))
    );
}

#[test]
fn a_sparse_volume_stays_sparse_and_a_large_one_is_cut_at_once() {
    let setup = Setup::new(1 << 28);
    let engine = setup.create();
    write(&engine, (1 << 28) - 1, 1);
    write(&engine, 1 << 27, 2);
    for n in 0..3 {
        let before = std::time::Instant::now();
        let interval = engine.begin_interval().unwrap();
        assert_eq!(interval.changed.len().get(), if n == 0 { 2 } else { 0 });
        let data = interval.reader.data_extents(extent(0, 1 << 28)).unwrap();
        assert!(data.len().get() < 64);
        engine.commit_interval(interval.epoch).unwrap();
        println!("interval {n} of 1 TiB took {:?}", before.elapsed());
    }
    assert!(fs::metadata(setup.file()).unwrap().blocks() * 512 < 1 << 20);
}

#[test]
fn a_full_spool_gives_up_the_oldest_cut_or_stalls_by_policy() {
    let mut setup = Setup::new(64);
    setup.options.spool_bytes_max = 8 * BLOCK;
    let engine = setup.create();
    engine
        .write(0, &vec![1; 64 * 4096], Durability::Volatile)
        .unwrap();
    let interval = engine.begin_interval().unwrap();
    let (cut, reader) = (interval.epoch, interval.reader);
    (0..8).for_each(|block| write(&engine, block, 2));
    let snapshot = engine.create_snapshot("", 0).unwrap().id;
    assert_eq!(at(&reader, 3), 1);
    write(&engine, 20, 2);
    assert_eq!(engine.stats().give_ups, 1);
    assert!(engine.open_interval().is_none());
    assert!(matches!(
        engine.commit_interval(cut),
        Err(EngineError::NoInterval(_))
    ));
    let mut block = [0; 4096];
    let read = reader.read_blocks(extent(3, 1), &mut block);
    assert!(matches!(read, Err(EngineError::GivenUp(found)) if found == cut));
    assert_eq!(engine.tracked(extent(0, 64)).len().get(), 64);
    let reader = engine.open_snapshot(snapshot).unwrap();
    assert_eq!((at(&reader, 3), at(&reader, 20)), (2, 1));
    (30..50).for_each(|block| write(&engine, block, 3));
    assert!(engine.list_snapshots().is_empty());
    assert!(matches!(
        reader.read_blocks(extent(30, 1), &mut block),
        Err(EngineError::GivenUp(_))
    ));
}
