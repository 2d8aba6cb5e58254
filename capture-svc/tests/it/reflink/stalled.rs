//! A disk that doesn't answer holds up changes of the record, and nothing else.

use std::{
    fs::{self, OpenOptions},
    io::Read,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    sync::{Arc, mpsc},
    thread,
};

use capture_svc::engine::{EngineError, reflink::Reflink};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tidemark_block::{BlockCount, BlockIndex, Extent};

use super::{BLOCK, BLOCKS, Scene};
use crate::rig::PATIENCE;

/// More snapshots than a pipe holds the record of.
const SNAPSHOTS: usize = 16;

fn ask(engine: &Reflink) -> (u64, u64, bool, usize, u64) {
    let tracked = engine.tracked(super::geometry().all()).len().get();
    (
        engine.epoch().get(),
        engine.stats().changed_blocks,
        engine.open_interval().is_some(),
        engine.list_snapshots().len(),
        tracked,
    )
}

#[test]
fn figures_are_told_as_they_were_recorded_while_the_disk_holds_a_change_of_the_record_up() {
    let Some(scene) = Scene::new("xfs") else {
        return;
    };
    let mut image = vec![0; BLOCKS * BLOCK];
    scene.ship(&mut image);
    let engine = scene.engine();
    for _ in 0..SNAPSHOTS {
        engine.create_snapshot(&"x".repeat(255), 0).unwrap();
    }
    let cut = engine.begin_interval().unwrap();
    let before = ask(engine);

    // What the record is written to is a pipe, which holds less than the record has and isn't read.
    let temporary = scene.state.path().join("reflink.tmp");
    mknodat(
        CWD,
        &temporary,
        FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let mut pipe = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&temporary)
        .unwrap();
    #[allow(unsafe_code)]
    // SAFETY: plain numbers and an open descriptor.
    let holds = unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    let record = fs::metadata(scene.state.path().join("reflink")).unwrap();
    assert!(holds > 0 && record.len() > u64::try_from(holds).unwrap());
    let writer = Arc::clone(engine);
    let committing = thread::spawn(move || writer.commit_interval(cut.epoch));
    let mut first = [0];
    while pipe.read(&mut first).ok() != Some(1) {
        assert!(!committing.is_finished());
        thread::yield_now();
    }

    let (tell, told) = mpsc::channel();
    let asker = Arc::clone(engine);
    thread::spawn(move || tell.send(ask(&asker)).unwrap());
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), before);
    assert!(!committing.is_finished());

    // It ends as a write that failed: a pipe can't be synced.
    let mut rest = Vec::new();
    while !committing.is_finished() {
        let _ = pipe.read_to_end(&mut rest);
        thread::yield_now();
    }
    let failed = committing.join().unwrap().unwrap_err();
    assert!(matches!(failed, EngineError::Io { .. }), "{failed}");
    assert_eq!(ask(engine), before);
    fs::remove_file(&temporary).unwrap();
    let third = Extent::new(BlockIndex::new(3), BlockCount::new(1));
    engine.doubt(&std::iter::once(third).collect()).unwrap();
    assert_eq!(ask(engine).4, 1);
}
