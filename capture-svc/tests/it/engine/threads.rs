//! Writers, cuts and readers at the same time.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
};

use capture_svc::engine::SpoolPolicy;

use super::*;

const BLOCKS: u64 = 512;

/// Each writer owns every fourth block and counts upwards in it. At a cut a block must hold a count between the one
/// that had been written before the cut was asked for and the one that was begun after it was there.
#[test]
fn concurrent_snapshots_show_each_block_as_it_was_between_the_cut_s_begin_and_end() {
    let setup = Setup::new(BLOCKS);
    let engine = setup.create();
    let done: Arc<Vec<AtomicU64>> = Arc::new((0..BLOCKS).map(|_| AtomicU64::new(0)).collect());
    let begun: Arc<Vec<AtomicU64>> = Arc::new((0..BLOCKS).map(|_| AtomicU64::new(0)).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for writer in 0..4 {
        let (engine, done, begun, stop) = (
            Arc::clone(&engine),
            Arc::clone(&done),
            Arc::clone(&begun),
            Arc::clone(&stop),
        );
        threads.push(thread::spawn(move || {
            let mut random: u64 = writer + 1;
            while !stop.load(SeqCst) {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005_u64)
                    .wrapping_add(1);
                let block = (random >> 33) % (BLOCKS / 4) * 4 + writer;
                let count = begun[usize::try_from(block).unwrap()].fetch_add(1, SeqCst) + 1;
                let bytes = count.to_le_bytes().repeat(512);
                engine
                    .write(block * BLOCK, &bytes, Durability::Volatile)
                    .unwrap();
                done[usize::try_from(block).unwrap()].store(count, SeqCst);
            }
        }));
    }
    let load = |counts: &[AtomicU64]| counts.iter().map(|c| c.load(SeqCst)).collect::<Vec<_>>();
    let mut kept = Vec::new();
    for round in 0..60 {
        let low = load(&done);
        let interval = (round % 3 == 0).then(|| engine.begin_interval().unwrap());
        let (reader, id) = match &interval {
            Some(interval) => (interval.reader.clone(), None),
            None => {
                let id = engine.create_snapshot("", round).unwrap().id;
                (engine.open_snapshot(id).unwrap(), Some(id))
            }
        };
        let high = load(&begun);
        let image = whole(&reader);
        for block in 0..usize::try_from(BLOCKS).unwrap() {
            let words = image[block * 4096..][..4096].chunks_exact(8);
            let counts: Vec<u64> = words
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                .collect();
            assert!(
                counts.iter().all(|&count| count == counts[0]),
                "block {block} is not torn"
            );
            assert!(
                (low[block]..=high[block]).contains(&counts[0]),
                "block {block}"
            );
        }
        if let Some(interval) = interval {
            engine.commit_interval(interval.epoch).unwrap();
        }
        kept.extend(id.map(|id| (id, image)));
        if kept.len() > 8 {
            let (id, image) = kept.remove(0);
            assert!(
                whole(&engine.open_snapshot(id).unwrap()) == image,
                "a snapshot doesn't change"
            );
            engine.delete_snapshot(id).unwrap();
        }
    }
    stop.store(true, SeqCst);
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    for (id, image) in kept {
        assert!(whole(&engine.open_snapshot(id).unwrap()) == image);
        engine.delete_snapshot(id).unwrap();
    }
    assert_eq!(engine.stats().spool_used, 0);
    engine.close().unwrap();
}

#[test]
fn stalled_writers_go_on_when_there_is_room() {
    let mut setup = Setup::new(64);
    setup.options.spool_bytes_max = 4 * BLOCK;
    setup.options.spool_policy = capture_svc::engine::SpoolPolicy::Stall;
    let engine = setup.create();
    engine
        .write(0, &vec![1; 64 * 4096], Durability::Volatile)
        .unwrap();
    let id = engine.create_snapshot("", 0).unwrap().id;
    let writer = {
        let engine = Arc::clone(&engine);
        thread::spawn(move || (0..32).for_each(|block| write(&engine, block, 2)))
    };
    while engine.stats().spool_used < 4 * BLOCK {
        thread::yield_now();
    }
    assert_eq!(at(&engine.open_snapshot(id).unwrap(), 3), 1);
    assert!(!writer.is_finished());
    engine.delete_snapshot(id).unwrap();
    writer.join().unwrap();
    assert_eq!(engine.stats().give_ups, 0);
}

/// A snapshot, a spool of one block that is used, and a writer that has found it full.
fn with_a_waiting_writer(
    policy: SpoolPolicy,
    prepare: impl Fn(&Setup),
) -> (Setup, Arc<Engine>, thread::JoinHandle<std::io::Result<()>>) {
    let mut setup = Setup::new(16);
    setup.options.spool_bytes_max = BLOCK;
    setup.options.spool_policy = policy;
    let engine = setup.create();
    write(&engine, 1, 1);
    write(&engine, 5, 1);
    engine.create_snapshot("", 0).unwrap();
    write(&engine, 1, 2);
    prepare(&setup);
    let copied = engine.stats().blocks_copied;
    let writer = Arc::clone(&engine);
    // Of its two blocks the first has been zero and needs no room.
    let writer = thread::spawn(move || writer.write(4 * BLOCK, &[2; 8192], Durability::Volatile));
    while engine.stats().blocks_copied == copied {
        thread::yield_now();
    }
    (setup, engine, writer)
}

fn fill_the_disk(setup: &Setup) {
    let temporary = setup.state().join("snapshots.tmp");
    std::os::unix::fs::symlink("/dev/full", temporary).unwrap();
}

#[test]
fn writers_go_on_while_a_cut_waits_for_the_last_request_of_its_epoch() {
    let (_setup, engine, waiting) = with_a_waiting_writer(SpoolPolicy::Stall, |_| {});
    let first = engine.list_snapshots()[0].id;
    let epoch = engine.epoch();
    let cutter = Arc::clone(&engine);
    let cutter = thread::spawn(move || cutter.create_snapshot("", 1));
    while engine.epoch() == epoch {
        thread::yield_now();
    }
    // Of blocks that have been zero, whose content before the cut needs no room.
    for content in 1..100 {
        (8..16).for_each(|block| write(&engine, block, content));
    }
    assert!(!waiting.is_finished() && !cutter.is_finished());
    engine.delete_snapshot(first).unwrap();
    waiting.join().unwrap().unwrap();
    let cut = engine
        .open_snapshot(cutter.join().unwrap().unwrap().id)
        .unwrap();
    assert_eq!(
        at(&cut, 5),
        2,
        "the request belongs to the epoch that it began in"
    );
    (8..16).for_each(|block| assert_eq!(at(&cut, block), 0));
}

#[test]
fn a_close_ends_a_cut_that_waits_for_a_stalled_writer() {
    let (setup, engine, writer) = with_a_waiting_writer(SpoolPolicy::Stall, |_| {});
    let epoch = engine.epoch();
    let cutter = Arc::clone(&engine);
    let cutter = thread::spawn(move || cutter.create_snapshot("", 1));
    while engine.epoch() == epoch {
        thread::yield_now();
    }
    let (done, closed) = std::sync::mpsc::channel();
    let closer = Arc::clone(&engine);
    let closer = thread::spawn(move || done.send(closer.close()).unwrap());
    closed
        .recv_timeout(std::time::Duration::from_secs(30))
        .expect("the close ends")
        .unwrap();
    let refused = writer.join().unwrap().unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ESHUTDOWN));
    closer.join().unwrap();
    cutter.join().unwrap().unwrap();
    drop(engine);
    assert_eq!(setup.open().1, Trust::Clean);
}

#[test]
fn writers_wait_while_there_is_no_disk_space_to_give_up_a_cut() {
    let (setup, engine, writer) = with_a_waiting_writer(SpoolPolicy::GiveUp, fill_the_disk);
    assert!(!writer.is_finished());
    assert_eq!(engine.list_snapshots().len(), 1);
    fs::remove_file(setup.state().join("snapshots.tmp")).unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(engine.stats().give_ups, 1);
    assert!(!engine.stats().poisoned);

    let (_setup, engine, writer) = with_a_waiting_writer(SpoolPolicy::GiveUp, fill_the_disk);
    engine.close().unwrap();
    let refused = writer.join().unwrap().unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ESHUTDOWN));
}
