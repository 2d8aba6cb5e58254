use std::{fs, path::PathBuf};

use tempfile::TempDir;
use tidemark_block::{BlockSize, Coherence, Extent, Geometry};

use super::*;
use crate::engine::{EngineError, EngineOptions, EngineSetup, intercept::Intercept as Engine};

const BLOCK: u64 = 4096;
const BLOCK_LEN: usize = 4096;
const BLOCKS: u64 = 1024;
const IMAGE_LEN: usize = 1024 * BLOCK_LEN;
const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

struct Rig {
    dir: TempDir,
    options: EngineOptions,
}

impl Rig {
    fn new(spool_blocks: u64) -> (Self, Arc<Engine>) {
        let dir = tempfile::tempdir().unwrap();
        let rig = Self {
            dir,
            options: EngineOptions {
                spool_bytes_max: spool_blocks * BLOCK,
                ..EngineOptions::default()
            },
        };
        fs::File::create(rig.file())
            .unwrap()
            .set_len(BLOCKS * BLOCK)
            .unwrap();
        let options = rig.options.clone();
        let engine = Engine::create(EngineSetup {
            dir: &rig.state(),
            volume: VOLUME,
            file: &rig.file(),
            geometry: geometry(),
            options,
        });
        (rig, engine.unwrap())
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("data.img")
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// As after a kill: the engine wasn't closed.
    fn open_again(&self) -> Arc<Engine> {
        let (state, file) = (self.state(), self.file());
        Engine::open(EngineSetup {
            dir: &state,
            volume: VOLUME,
            file: &file,
            geometry: geometry(),
            options: self.options.clone(),
        })
        .unwrap()
        .0
    }
}

fn geometry() -> Geometry {
    Geometry::new(BLOCKS * BLOCK, BlockSize::MIN).unwrap()
}

fn fill(engine: &Engine, blocks: impl Iterator<Item = u64>, byte: u8) {
    for block in blocks {
        let bytes = [byte; BLOCK_LEN];
        engine
            .write(block * BLOCK, &bytes, Durability::from_fua(false))
            .unwrap();
    }
}

/// Data over data, over zeroes and over holes; zeroes over data. More than one frame of each.
fn written(spool_blocks: u64) -> (Rig, Arc<Engine>, SnapshotId) {
    let (rig, engine) = Rig::new(spool_blocks);
    fill(&engine, 0..300, 1);
    let snapshot = engine.create_snapshot("good", 0).unwrap().id;
    fill(&engine, (0..200).step_by(2), 2);
    fill(&engine, 500..580, 3);
    let flags = ZeroFlags {
        may_punch: true,
        fast_only: false,
        fua: false,
    };
    engine.write_zeroes(250 * BLOCK, 40 * BLOCK, flags).unwrap();
    // Half of a block.
    engine
        .write(210 * BLOCK + 7, &[9; 2000], Durability::from_fua(false))
        .unwrap();
    (rig, engine, snapshot)
}

fn image(engine: &Engine) -> Vec<u8> {
    let mut image = vec![0; IMAGE_LEN];
    engine.read(0, &mut image).unwrap();
    image
}

fn image_at(engine: &Arc<Engine>, snapshot: SnapshotId) -> Vec<u8> {
    let mut image = vec![0; IMAGE_LEN];
    let reader = engine.open_snapshot(snapshot).unwrap();
    reader.read_blocks(geometry().all(), &mut image).unwrap();
    image
}

fn go_on(_: u64, _: u64) -> bool {
    true
}

#[test]
fn the_volume_becomes_what_it_was_and_what_it_was_before_is_kept() {
    let (rig, engine, snapshot) = written(4096);
    let (before, good) = (image(&engine), image_at(&engine, snapshot));
    let plan = decide(&rig.state(), VOLUME, &engine, snapshot, &mut go_on)
        .unwrap()
        .unwrap();
    assert_eq!(plan.blocks, 100 + 80 + 40 + 1);
    assert_eq!(
        image(&engine),
        before,
        "nothing is written before all is decided"
    );
    let done = carry_out(&rig.state(), VOLUME, &engine, &mut go_on).unwrap();
    assert_eq!(done, Some(plan));
    assert!(image(&engine) == good);
    assert!(image_at(&engine, SnapshotId(plan.kept)) == before);
    assert!(image_at(&engine, snapshot) == good);
    let tracked = engine.tracked(geometry().all());
    assert!((0..300).all(|n| tracked.contains(tidemark_block::BlockIndex::new(n))));

    // Again: nothing differs, and nothing is left of the try.
    let snapshots = engine.list_snapshots().len();
    assert_eq!(
        decide(&rig.state(), VOLUME, &engine, snapshot, &mut go_on).unwrap(),
        None
    );
    assert_eq!(engine.list_snapshots().len(), snapshots);
    assert_eq!(
        carry_out(&rig.state(), VOLUME, &engine, &mut go_on).unwrap(),
        None
    );

    // And back.
    decide(
        &rig.state(),
        VOLUME,
        &engine,
        SnapshotId(plan.kept),
        &mut go_on,
    )
    .unwrap()
    .unwrap();
    carry_out(&rig.state(), VOLUME, &engine, &mut go_on).unwrap();
    assert!(image(&engine) == before);
}

#[test]
fn what_is_kept_says_how_good_it_is() {
    for (flush, grade, reason) in [
        (
            true,
            Coherence::Flushed,
            "it was made for a rollback, without a client",
        ),
        (
            false,
            Coherence::Crash,
            "it was made for a rollback, without a client; the last write was not flushed",
        ),
    ] {
        let (rig, engine, snapshot) = written(4096);
        if flush {
            engine.flush().unwrap();
        }
        let plan = decide(&rig.state(), VOLUME, &engine, snapshot, &mut go_on)
            .unwrap()
            .unwrap();
        let listed = engine.list_snapshots();
        let kept = listed.iter().find(|info| info.id.0 == plan.kept).unwrap();
        assert_eq!(
            (kept.coherence, kept.reason.to_string().as_str()),
            (grade, reason)
        );
    }
}

#[test]
fn interrupted_anywhere_it_is_wholly_done_at_the_next_opening_or_not_at_all() {
    let mut calls = 0_u32;
    loop {
        let (rig, engine, snapshot) = written(4096);
        let (before, good) = (image(&engine), image_at(&engine, snapshot));
        let mut left = calls;
        let mut told = |_: u64, _: u64| {
            let go_on = left > 0;
            left = left.saturating_sub(1);
            go_on
        };
        let done = decide(&rig.state(), VOLUME, &engine, snapshot, &mut told)
            .and_then(|_| carry_out(&rig.state(), VOLUME, &engine, &mut told));
        let decided = is_decided(&rig.state());
        drop(engine);
        let engine = rig.open_again();
        carry_out(&rig.state(), VOLUME, &engine, &mut go_on).unwrap();
        assert!(!is_decided(&rig.state()));
        match done {
            Ok(_) => {
                assert!(image(&engine) == good);
                assert!(calls > 8, "there were {calls} places to stop at");
                return;
            }
            Err(_) if decided => assert!(image(&engine) == good, "after {calls} steps"),
            Err(_) => {
                assert!(image(&engine) == before, "after {calls} steps");
                assert_eq!(engine.list_snapshots().len(), 1, "only the one there was");
            }
        }
        calls += 1;
    }
}

#[test]
fn a_draft_that_a_crash_left_behind_is_removed_and_nothing_of_it_happens() {
    let (rig, engine, snapshot) = written(4096);
    let before = image(&engine);
    let then = engine.open_snapshot(snapshot).unwrap();
    let kept = engine.create_snapshot("before", 0).unwrap().id;
    let drafted = draft(
        &rig.state(),
        VOLUME,
        &engine,
        (snapshot, &then),
        kept,
        &mut go_on,
    );
    drop((drafted.unwrap(), then, engine));
    let engine = rig.open_again();
    assert_eq!(
        carry_out(&rig.state(), VOLUME, &engine, &mut go_on).unwrap(),
        None
    );
    assert!(image(&engine) == before);
    assert!(!rig.state().join("rollback.tmp").exists());
    assert_eq!(
        engine.list_snapshots().len(),
        1,
        "the one that was taken for it is gone"
    );
}

#[test]
fn each_flipped_bit_of_the_plan_is_refused_before_a_block_is_written() {
    let (rig, engine) = Rig::new(4096);
    fill(&engine, 3..4, 1);
    let snapshot = engine.create_snapshot("good", 0).unwrap().id;
    fill(&engine, 3..5, 2);
    let before = image(&engine);
    decide(&rig.state(), VOLUME, &engine, snapshot, &mut go_on)
        .unwrap()
        .unwrap();
    let path = rig.state().join("rollback");
    let whole = fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = carry_out(&rig.state(), VOLUME, &engine, &mut go_on).unwrap_err();
        assert!(
            format!("{error:#}").contains("restore a generation"),
            "{error:#}"
        );
    };
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        refused(&flipped);
    }
    refused(&whole[..whole.len() - 1]);
    refused(&[]);
    assert!(image(&engine) == before);
    fs::write(&path, &whole).unwrap();
    carry_out(&rig.state(), VOLUME, &engine, &mut go_on).unwrap();
    assert!(image(&engine) == image_at(&engine, snapshot));
}

#[test]
fn where_the_spool_cannot_keep_what_is_there_nothing_is_decided() {
    let (rig, engine, snapshot) = written(300);
    let before = image(&engine);
    let error = decide(&rig.state(), VOLUME, &engine, snapshot, &mut go_on).unwrap_err();
    assert!(error.downcast_ref::<RollbackError>().is_some(), "{error:#}");
    assert!(!is_decided(&rig.state()));
    assert!(image(&engine) == before);
    assert_eq!(engine.list_snapshots().len(), 1);
    let all: Vec<Extent> = engine.tracked(geometry().all()).extents().collect();
    assert!(!all.is_empty());
}

#[test]
fn a_snapshot_that_is_not_there_is_refused() {
    let (rig, engine, _) = written(4096);
    let error = decide(&rig.state(), VOLUME, &engine, SnapshotId(99), &mut go_on).unwrap_err();
    assert!(matches!(
        error.downcast_ref(),
        Some(EngineError::NoSuchSnapshot(SnapshotId(99)))
    ));
    assert_eq!(engine.list_snapshots().len(), 1);
}
