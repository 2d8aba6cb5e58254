//! One test for each rule of `docs/CRASH-RULES.md`, under the rule's name.
//!
//! Where a rule speaks of an order of durable writes, its test crashes at each operation of a scenario in turn, once
//! as a process crash and once as a power loss.

use std::sync::atomic::Ordering::SeqCst;

use capture_core::engine::{
    capture::{CaptureError, EPOCH_SEAL_WORD, EPOCH_WORD, RING_WORD, epoch_seal},
    cut::Purpose,
    intent::{IntentMap, PAGE_LEN, encode_page},
    media::{Map, Media},
    read::SnapshotRead,
    recover::Outcome,
    ring::Ring,
    trust::{Judgement, Reason},
    write::{Change, Step},
};
use tidemark_block::{BlockIndex, block_checksum};

use crate::{
    bench::{BLOCK, BLOCKS, Bench, SEED, blocks, bytes, extent, snapshot, volume},
    sim::Faults,
};

/// Prepares, then crashes the scenario at each of its operations, in both ways, and reopens; calls `check` with how
/// far the scenario came (nothing where it crashed). All of that with several seeds.
fn at_each_operation<T>(
    prepare: impl Fn() -> Bench,
    scenario: impl Fn(&Bench) -> Result<T, CaptureError>,
    check: impl Fn(&Bench, bool, Option<T>),
) {
    for (power, seed) in (0..8).flat_map(|seed| [(false, seed), (true, seed)]) {
        SEED.set(seed);
        for operation in 0.. {
            let bench = prepare();
            bench.sim.crash_in(operation);
            let done = scenario(&bench).ok();
            let crashed = bench.sim.has_crashed();
            let (bench, _) = bench.reopen(power);
            check(&bench, power, done);
            if !crashed {
                assert!(operation > 0, "the scenario does something");
                break;
            }
        }
    }
}

#[test]
fn a_request_keeps_the_epoch_of_its_entry() {
    let bench = Bench::new();
    let epoch = bench.capture.epoch();
    let op = bench.op(3, Change::Data(bytes(1)));
    let cut = bench.capture.begin_cut(Purpose::Interval).unwrap();
    assert!(!bench.capture.is_settled(epoch));
    assert_eq!(bench.capture.epoch(), epoch + 1);
    bench.write(4, 1);
    assert_eq!(op.epoch(), epoch);
    bench.finish(op).unwrap();
    assert!(bench.capture.is_settled(epoch));
    bench.capture.finish_cut(cut).unwrap();
    assert_eq!(blocks(&bench.capture.open_interval().unwrap().changed), [3]);
    assert_eq!((bench.read(epoch, 3), bench.read(epoch, 4)), (1, 0));
}

#[test]
fn the_image_of_a_cut_has_every_request_that_ended_before_the_flip_and_none_that_entered_after() {
    let bench = Bench::new();
    bench.write(1, 1);
    let old = bench.op(2, Change::Data(bytes(2)));
    let cut = bench.capture.begin_cut(Purpose::Interval).unwrap();
    let epoch = cut.epoch();
    // Enters after the flip, is first on the block: the old request's write counts as the new epoch's.
    bench.write(2, 3);
    bench.finish(old).unwrap();
    bench.capture.finish_cut(cut).unwrap();
    assert_eq!((bench.read(epoch, 1), bench.read(epoch, 2)), (1, 0));
    bench.capture.commit_interval(epoch).unwrap();
    assert_eq!(
        bench.tracked(),
        [2],
        "the live block differs from the generation"
    );
}

#[test]
fn the_before_image_is_safe_before_the_block_changes() {
    let prepare = || {
        let bench = Bench::new();
        bench.write(5, 1);
        bench.cut(snapshot());
        bench
    };
    at_each_operation(
        prepare,
        |bench| bench.try_write(5, 2),
        |bench, power, _| {
            for snapshot in bench.capture.snapshots() {
                assert_eq!(bench.read(snapshot.cut, 5), 1);
            }
            assert_eq!(bench.capture.snapshots().len(), usize::from(!power));
        },
    );
}

#[test]
fn a_dirty_block_has_been_copied() {
    // A crash leaves a dirty bit in the open epoch's map; the next process must copy the block all the same.
    let bench = Bench::new();
    bench.write(5, 1);
    let (bench, _) = bench.reopen(false);
    assert_eq!(bench.tracked(), [5]);
    // The map that had the bit is used again in the epoch after the next.
    let cut = bench.cut(snapshot());
    bench.write(5, 2);
    assert_eq!(bench.read(cut, 5), 1);
}

#[test]
fn a_copied_block_is_dirty() {
    let bench = Bench::with(|tuning| tuning.spool.slots_max = 1);
    bench.write(1, 1);
    bench.write(2, 1);
    let mut old = bench.op(1, Change::Data(bytes(2)));
    let cut = bench.capture.begin_cut(Purpose::Interval).unwrap();
    // The new epoch's request copies block 1, and finds no room for block 2.
    let two = Box::leak(vec![3; 2 * BLOCK].into_boxed_slice());
    let mut new = bench.op(1, Change::Data(two));
    while bench.step(&mut new).unwrap() != Step::AwaitSpool {}
    bench.run_up_to_the_write(&mut old);
    bench.finish(old).unwrap();
    let epoch = cut.epoch();
    bench.capture.finish_cut(cut).unwrap();
    assert_eq!(bench.read(epoch, 1), 1);
    bench.capture.commit_interval(epoch).unwrap();
    assert_eq!(
        bench.tracked(),
        [1],
        "the generation doesn't have what the old request wrote"
    );
}

#[test]
fn a_write_that_fails_half_way_leaves_its_blocks_dirty() {
    let bench = Bench::new();
    let cut = bench.cut(Purpose::Interval);
    bench.capture.commit_interval(cut).unwrap();
    let mut op = bench.op(
        6,
        Change::Data(Box::leak(vec![1; 2 * BLOCK].into_boxed_slice())),
    );
    bench.run_up_to_the_write(&mut op);
    bench.sim.crash_in(0);
    assert!(bench.step(&mut op).is_err());
    let (bench, _) = bench.reopen(false);
    assert_eq!(bench.tracked(), [6, 7]);
}

#[test]
fn a_trim_may_be_ignored_but_never_untracked() {
    let bench = Bench::new();
    (0..5).for_each(|block| bench.write(block, 1));
    let interval = bench.cut(Purpose::Interval);
    bench.capture.commit_interval(interval).unwrap();
    bench
        .finish(bench.op(
            4,
            Change::Trim {
                length: BLOCK as u64,
            },
        ))
        .unwrap();
    assert_eq!(bench.tracked(), [4], "nobody needs it: a trim is a write");
    let cut = bench.cut(snapshot());
    bench.write(1, 2);
    let length = 3 * BLOCK as u64;
    bench.finish(bench.op(0, Change::Trim { length })).unwrap();
    // Blocks 0 and 2 are needed by the snapshot, block 1 has its before-image already.
    assert_eq!(bench.capture.counters.trims_ignored.load(SeqCst), 2);
    assert_eq!(bench.tracked(), [1, 4]);
    let volume = bench.sim.volume();
    assert_eq!((volume[0], volume[BLOCK], volume[2 * BLOCK]), (1, 0, 1));
    assert_eq!([0, 1, 2].map(|block| bench.read(cut, block)), [1, 1, 1]);
    bench
        .finish(bench.op(
            0,
            Change::Zeroes {
                length,
                allocated: false,
            },
        ))
        .unwrap();
    assert_eq!(bench.tracked(), [0, 1, 2, 4]);
    assert_eq!([0, 1, 2].map(|block| bench.read(cut, block)), [1, 1, 1]);
}

#[test]
fn a_snapshot_reader_checks_the_index_after_the_copy() {
    let bench = Bench::new();
    bench.write(5, 1);
    let cut = bench.cut(snapshot());
    let view = bench.capture.open_cut(cut).unwrap();
    let mut buffer = vec![0; BLOCK];
    let mut read = SnapshotRead::new(view, extent(5, 1));
    read.before_images(&bench.capture, &mut buffer).unwrap();
    bench.write(5, 2);
    read.live(&bench.capture, &mut buffer).unwrap();
    assert_eq!(buffer[0], 2);
    read.recheck(&bench.capture, &mut buffer).unwrap();
    assert_eq!(buffer[0], 1);
}

#[test]
fn a_before_image_is_freed_only_when_no_open_cut_reads_it() {
    let bench = Bench::new();
    bench.write(5, 1);
    let cuts: Vec<u64> = (0..3).map(|_| bench.cut(snapshot())).collect();
    bench.write(5, 2);
    cuts.iter()
        .for_each(|cut| assert_eq!(bench.read(*cut, 5), 1));
    let view = bench.capture.open_snapshot(3).unwrap();
    for id in [1, 3, 2] {
        assert_eq!(bench.capture.spool().used(), (1, 1));
        bench.capture.delete_snapshot(id).unwrap();
    }
    assert_eq!(bench.capture.spool().used(), (1, 1), "a reader has it open");
    bench.capture.close_view(&view);
    assert_eq!(bench.capture.spool().used(), (0, 0));
}

#[test]
fn intent_is_durable_before_the_region_is_written() {
    let base = Bench::new().sim.volume();
    at_each_operation(
        Bench::new,
        |bench| bench.try_write(3, 1).and_then(|()| bench.try_write(9, 1)),
        |bench, _, _| bench.assert_superset_of(&base),
    );
}

#[test]
fn intent_is_cleared_only_after_commit_and_sync() {
    let bench = Bench::new();
    bench.write(3, 1);
    assert_eq!(bench.capture.intent().set_regions(), [0]);
    bench.capture.sync().unwrap();
    assert_eq!(
        bench.capture.intent().set_regions(),
        [0],
        "synced, not committed"
    );
    bench.write(3, 2);
    let cut = bench.cut(Purpose::Interval);
    let syncs = bench.sim.0.syncs.load(SeqCst);
    bench.sim.set_faults(Faults {
        sync: Some(1),
        ..Faults::default()
    });
    assert!(bench.capture.commit_interval(cut).is_err());
    assert_eq!(
        bench.capture.intent().set_regions(),
        [0],
        "committed, not synced"
    );
    bench.sim.set_faults(Faults::default());
    let (bench, outcome) = bench.reopen(false);
    assert!(matches!(outcome, Outcome::PowerLoss(_)));
    let cut = bench.cut(Purpose::Interval);
    bench.capture.commit_interval(cut).unwrap();
    assert!(bench.sim.0.syncs.load(SeqCst) > syncs);
    assert_eq!(bench.capture.intent().set_regions(), []);
}

#[test]
fn clearing_intent_loses_the_race_to_a_writer() {
    let bench = Bench::new();
    bench.write(3, 1);
    let cut = bench.cut(Purpose::Interval);
    // Has seen the bit before the clearer comes, and writes afterwards.
    let mut op = bench.op(2, Change::Data(bytes(1)));
    bench.run_up_to_the_write(&mut op);
    bench.capture.commit_interval(cut).unwrap();
    assert_eq!(bench.capture.intent().set_regions(), [0]);
    bench.finish(op).unwrap();
    let base = bench.sim.volume();
    let (bench, _) = bench.reopen(true);
    bench.assert_superset_of(&base);
}

#[test]
fn hot_regions_stay() {
    let bench = Bench::with(|tuning| tuning.hot_regions_max = 1);
    bench.write(1, 1);
    let first = bench.cut(Purpose::Interval);
    bench.capture.commit_interval(first).unwrap();
    assert_eq!(bench.capture.intent().set_regions(), [0]);
    bench.write(5, 1);
    bench.cut(snapshot());
    bench.write(9, 1);
    let second = bench.cut(Purpose::Interval);
    bench.capture.commit_interval(second).unwrap();
    assert_eq!(
        bench.capture.intent().set_regions(),
        [2],
        "the latest, as many as may stay"
    );
    let third = bench.cut(Purpose::Interval);
    bench.capture.commit_interval(third).unwrap();
    assert_eq!(
        bench.capture.intent().set_regions(),
        [],
        "not written since"
    );
}

#[test]
fn a_failed_sync_puts_everything_since_the_last_good_one_in_doubt() {
    let bench = Bench::new();
    bench.write(1, 1);
    bench.write(9, 1);
    let cut = bench.cut(Purpose::Interval);
    bench.capture.commit_interval(cut).unwrap();
    let base = bench.sim.volume();
    bench.write(9, 2);
    bench.cut(snapshot());
    bench.sim.set_faults(Faults {
        sync: Some(1),
        ..Faults::default()
    });
    assert!(bench.capture.sync().is_err());
    bench.sim.set_faults(Faults::default());
    assert_eq!(bench.try_write(1, 3), Err(CaptureError::Poisoned));
    assert_eq!(bench.capture.sync(), Err(CaptureError::Poisoned));
    assert_eq!(bench.try_cut(snapshot()), Err(CaptureError::Poisoned));
    let (bench, outcome) = bench.reopen(false);
    assert!(matches!(outcome, Outcome::PowerLoss(_)));
    assert_eq!(bench.tracked(), [8, 9, 10, 11]);
    assert!(bench.capture.snapshots().is_empty());
    bench.assert_superset_of(&base);
    bench.write(1, 3);
}

#[test]
fn after_a_failed_sync_the_disk_is_compared_not_the_cache() {
    let judgements = [
        Judgement::Exact { clean: false },
        Judgement::PowerLoss,
        Judgement::Everything(Reason::Readopted),
    ];
    for (seed, judgement) in (0..16).flat_map(|seed| judgements.clone().map(|j| (seed, j))) {
        // Heard of by the process that wrote, or only by the opening, which is then repeated.
        for heard in [true, false] {
            SEED.set(seed);
            let bench = Bench::new();
            bench.write(9, 1);
            bench.sim.set_faults(Faults {
                sync: Some(1),
                ..Faults::default()
            });
            if heard {
                assert!(bench.capture.sync().is_err());
            }
            let Bench {
                sim, tuning, limit, ..
            } = bench;
            sim.restart_process();
            let recover = || Bench::recovered(sim.clone(), tuning, judgement.clone(), limit);
            if !heard {
                assert!(recover().is_err());
            }
            sim.set_faults(Faults::default());
            recover().unwrap();
            let seen = sim.volume();
            sim.restart_machine();
            assert!(sim.volume() == seen, "{judgement:?} {heard}");
        }
    }
}

#[test]
fn a_torn_intent_page_leaves_its_predecessor() {
    let base = Bench::new().sim.volume();
    let prepare = || {
        let bench = Bench::new();
        bench.write(1, 1);
        bench.write(5, 1);
        bench
    };
    at_each_operation(
        prepare,
        |bench| bench.try_write(9, 1),
        |bench, power, _| {
            bench.assert_superset_of(&base);
            let regions = bench.capture.intent().set_regions();
            assert!(regions.starts_with(&[0, 1]));
            assert!(
                !power || regions.len() < 4,
                "no page is in doubt as a whole"
            );
        },
    );
}

#[test]
fn a_page_torn_in_its_middle_loses_nothing_that_was_durable() {
    const REGIONS: u64 = 28_000;
    let restore = |places: &[Vec<u8>; 2]| {
        IntentMap::restore(volume(), REGIONS, 0, std::slice::from_ref(places))
    };
    let mut places = [0, 1].map(|sequence| encode_page(volume(), 0, sequence, &[0; _]).to_vec());
    for region in [5, REGIONS - 1, 20_000] {
        let map = restore(&places);
        let batch = map.want(region).unwrap();
        let (place, page) = batch.pages().next().unwrap();
        let place = usize::try_from(place).unwrap();
        for reached in (0..=PAGE_LEN).step_by(512) {
            let mut torn = places.clone();
            torn[place][..reached].copy_from_slice(&page[..reached]);
            let mut found = restore(&torn).set_regions();
            found.retain(|found| *found != region);
            assert_eq!(
                found,
                restore(&places).set_regions(),
                "{reached} bytes of region {region}"
            );
        }
        places[place] = page.to_vec();
    }
}

#[test]
fn superset() {
    let scenario = |bench: &Bench| {
        bench.try_write(1, 1)?;
        bench.try_cut(snapshot())?;
        bench.try_write(2, 1)?;
        let cut = bench.try_cut(Purpose::Interval)?;
        bench.try_write(1, 2)?;
        bench.capture.give_up_interval()?;
        bench.try_write(3, 1)?;
        bench
            .try_cut(Purpose::Interval)
            .map(|second| assert!(second > cut))
    };
    let base = Bench::new().sim.volume();
    at_each_operation(Bench::new, scenario, |bench, _, _| {
        bench.assert_superset_of(&base)
    });
}

#[test]
fn a_drain_is_durable_before_the_map_is_cleared() {
    let prepare = || {
        let bench = Bench::new();
        bench.write(1, 1);
        bench.write(9, 1);
        bench
    };
    for purpose in [Purpose::Interval, snapshot()] {
        at_each_operation(
            prepare,
            |bench| bench.try_cut(purpose.clone()),
            |bench, power, _| {
                let tracked = bench.tracked();
                assert!([1, 9].iter().all(|block| tracked.contains(block)));
                assert!(power || tracked == [1, 9]);
            },
        );
    }
}

#[test]
fn a_fold_is_durable_before_the_release() {
    let prepare = || {
        let bench = Bench::new();
        bench
            .capture
            .doubt(&[extent(13, 1)].into_iter().collect())
            .unwrap();
        bench.write(1, 1);
        let cut = bench.cut(Purpose::Interval);
        assert_eq!(
            blocks(&bench.capture.open_interval().unwrap().changed),
            [1, 13]
        );
        bench.write(1, 2);
        assert_eq!(bench.read(cut, 1), 1);
        bench
    };
    at_each_operation(
        prepare,
        |bench| bench.capture.give_up_interval(),
        |bench, power, done| {
            let tracked = bench.tracked();
            assert!([1, 13].iter().all(|block| tracked.contains(block)));
            if let Some(interval) = bench.capture.open_interval() {
                assert!(!power && done.is_none());
                assert_eq!(bench.read(interval.cut, 1), 1);
            }
        },
    );
}

#[test]
fn an_interval_is_dropped_only_after_commit_and_sync() {
    // Block 13 is in doubt and in no region of the intent map: somebody wrote to it behind our back, and what was
    // shipped of it is still in the page cache only.
    let bench = Bench::new();
    bench.sim.write_volume(13 * BLOCK as u64, bytes(7)).unwrap();
    bench
        .capture
        .doubt(&[extent(13, 1)].into_iter().collect())
        .unwrap();
    let cut = bench.cut(Purpose::Interval);
    let base = bench.sim.volume();
    let bench = bench.reopen(true).0;
    bench.assert_superset_of(&base);
    assert!(bench.tracked().contains(&13));

    let prepare = || {
        let bench = Bench::new();
        bench.sim.write_volume(13 * BLOCK as u64, bytes(7)).unwrap();
        bench
            .capture
            .doubt(&[extent(13, 1)].into_iter().collect())
            .unwrap();
        assert_eq!(bench.cut(Purpose::Interval), cut);
        bench
    };
    let commit = |bench: &Bench| bench.capture.commit_interval(cut);
    at_each_operation(prepare, commit, |bench, _, _| {
        bench.assert_superset_of(&base)
    });
}

#[test]
fn a_commit_may_be_repeated() {
    let prepare = || {
        let bench = Bench::new();
        bench.write(1, 1);
        bench.cut(Purpose::Interval);
        bench.write(2, 1);
        bench
    };
    let cut = prepare().capture.epoch() - 1;
    at_each_operation(
        prepare,
        |bench| bench.capture.commit_interval(cut),
        |bench, power, done| {
            if !power {
                let again = bench.capture.commit_interval(cut);
                let dropped = again == Err(CaptureError::NoInterval(cut));
                assert!(again == Ok(()) || dropped);
                assert!(done.is_none() || dropped);
                assert_eq!(bench.tracked(), [2]);
            }
        },
    );
}

#[test]
fn a_full_spool_costs_recovery_point_not_data() {
    let prepare = || {
        let bench = Bench::with(|tuning| tuning.spool.slots_max = 2);
        (0..8).for_each(|block| bench.write(block, 1));
        bench.cut(Purpose::Interval);
        bench.write(0, 2);
        bench.cut(snapshot());
        bench.write(1, 2);
        bench
    };
    let base = Bench::new().sim.volume();
    let bench = prepare();
    bench.write(2, 2);
    assert_eq!(bench.capture.counters.give_ups.load(SeqCst), 1);
    assert!(bench.capture.open_interval().is_none());
    assert_eq!(bench.tracked(), (0..8).collect::<Vec<_>>());
    let snapshot = bench.capture.snapshots()[0].cut;
    assert_eq!(
        [0, 1, 2].map(|block| bench.read(snapshot, block)),
        [2, 1, 1]
    );
    (3..8).for_each(|block| bench.write(block, 2));
    assert!(bench.capture.snapshots().is_empty());
    at_each_operation(
        prepare,
        |bench| (2..8).try_for_each(|block| bench.try_write(block, 2)),
        |bench, _, _| {
            bench.assert_superset_of(&base);
            for snapshot in bench.capture.snapshots() {
                assert_eq!(
                    [0, 1, 2].map(|block| bench.read(snapshot.cut, block)),
                    [2, 1, 1]
                );
            }
        },
    );
}

#[test]
fn a_record_that_finds_no_room_gives_up_nothing_and_stops_nothing() {
    let bench = Bench::with(|tuning| tuning.spool.slots_max = 1);
    (0..3).for_each(|block| bench.write(block, 1));
    let interval = bench.cut(Purpose::Interval);
    let snapshot = bench.cut(snapshot());
    bench.write(0, 2);
    bench.sim.set_faults(Faults {
        put: Some(1),
        ..Faults::default()
    });
    let full = bench.capture.relieve().unwrap_err();
    assert!(matches!(full, CaptureError::Media(_)), "{full}");
    assert!(!bench.capture.is_poisoned());
    assert_eq!(
        [interval, snapshot].map(|cut| bench.read(cut, 0)),
        [1, 1],
        "both are still there"
    );
    bench.sim.set_faults(Faults::default());
    bench.write(1, 2);
    assert!(bench.capture.counters.give_ups.load(SeqCst) > 0);
    assert!(!bench.capture.is_poisoned());
    assert_eq!(bench.tracked(), [0, 1, 2]);
}

#[test]
fn opening_may_be_repeated() {
    let base = Bench::new().sim.volume();
    for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
        for operation in 0.. {
            let bench = Bench::new();
            bench.write(1, 1);
            bench.cut(Purpose::Interval);
            bench.write(2, 1);
            bench.cut(snapshot());
            bench.write(1, 2);
            let judge = |power: bool| {
                if power {
                    bench.sim.restart_machine();
                    Judgement::PowerLoss
                } else {
                    bench.sim.restart_process();
                    Judgement::Exact { clean: false }
                }
            };
            let judgement = judge(first);
            bench.sim.crash_in(operation);
            let _ = Bench::recovered(bench.sim.clone(), bench.tuning, judgement, bench.limit);
            let crashed = bench.sim.has_crashed();
            // The identity still has the boot of before the first crash.
            let again = judge(second);
            let judgement = if first { Judgement::PowerLoss } else { again };
            let (again, _) =
                Bench::recovered(bench.sim.clone(), bench.tuning, judgement, bench.limit).unwrap();
            again.assert_superset_of(&base);
            if let (Some(snapshot), Some(interval)) = (
                again.capture.snapshots().first(),
                again.capture.open_interval(),
            ) {
                assert_eq!([1, 2].map(|block| again.read(snapshot.cut, block)), [1, 1]);
                assert_eq!([1, 2].map(|block| again.read(interval.cut, block)), [1, 0]);
            } else {
                assert!(first || second);
            }
            if !crashed {
                break;
            }
        }
    }
}

#[test]
fn an_opening_that_ends_early_forgets_no_change_between_snapshots() {
    for operation in 0.. {
        let bench = Bench::new();
        bench.cut(snapshot());
        bench.write(1, 1);
        // The process ends amid a cut: both dirty maps have something.
        let _cut = bench.capture.begin_cut(snapshot()).unwrap();
        bench.write(2, 1);
        let judgement = Judgement::Exact { clean: false };
        bench.sim.restart_process();
        bench.sim.crash_in(operation);
        let open = || {
            Bench::recovered(
                bench.sim.clone(),
                bench.tuning,
                judgement.clone(),
                bench.limit,
            )
        };
        let _ = open();
        let crashed = bench.sim.has_crashed();
        bench.sim.restart_process();
        let (again, _) = open().unwrap();
        again.cut(snapshot());
        let changed = again.capture.changed_between(1, 2).unwrap();
        assert_eq!(blocks(&changed), [1, 2], "{operation}");
        if !crashed {
            break;
        }
    }
}

#[test]
fn epochs_never_come_back() {
    let bench = Bench::new();
    (0..5).for_each(|_| {
        bench.cut(snapshot());
    });
    let epoch = bench.capture.epoch();
    bench.sim.words(Map::Tracking)[EPOCH_WORD].store(1, SeqCst);
    let (bench, _) = bench.reopen(true);
    assert!(bench.capture.epoch() > epoch);
    let epoch = bench.capture.epoch();
    let (bench, _) = bench.reopen(false);
    assert_eq!(bench.capture.epoch(), epoch + 1);
}

#[test]
fn mapped_words_that_nobody_stored_put_everything_in_doubt() {
    // Of 16 blocks each level of a dirty map is one word: a bit above the lowest names a word that isn't there.
    let stray = [
        (Map::Dirty(0), 0, 1 << 5),
        (Map::Dirty(1), 1, 1 << 63),
        (Map::Tracking, EPOCH_WORD, u64::MAX),
    ];
    for (map, word, bits) in stray {
        let bench = Bench::new();
        bench.write(3, 1);
        bench.sim.words(map)[word].store(bits, SeqCst);
        let (bench, outcome) = bench.reopen(false);
        assert!(matches!(outcome, Outcome::Everything(_)), "{outcome:?}");
        assert_eq!(bench.tracked().len() as u64, BLOCKS);
        bench.write(4, 1);
        let (bench, outcome) = bench.reopen(false);
        assert_eq!(outcome, Outcome::ProcessCrash);
        assert_eq!(bench.tracked().len() as u64, BLOCKS);
    }
}

#[test]
fn an_epoch_counter_that_fell_behind_a_recorded_cut_puts_everything_in_doubt() {
    for purpose in [snapshot(), Purpose::Interval] {
        let bench = Bench::new();
        bench.write(3, 1);
        let cut = bench.cut(purpose);
        let words = bench.sim.words(Map::Tracking);
        words[EPOCH_WORD].store(cut, SeqCst);
        words[EPOCH_SEAL_WORD].store(epoch_seal(cut), SeqCst);
        let (bench, outcome) = bench.reopen(false);
        assert!(matches!(outcome, Outcome::Everything(_)), "{outcome:?}");
        assert!(bench.capture.epoch() > cut);
        assert_eq!(bench.tracked().len() as u64, BLOCKS);
    }
}

#[test]
fn an_epoch_that_was_about_to_open_counts_as_the_open_one() {
    let bench = Bench::new();
    bench.write(3, 1);
    let next = bench.capture.epoch() + 1;
    // The process ended amid the flip.
    bench.sim.words(Map::Tracking)[EPOCH_SEAL_WORD].store(epoch_seal(next), SeqCst);
    let (bench, outcome) = bench.reopen(false);
    assert_eq!(outcome, Outcome::ProcessCrash);
    assert_eq!(bench.capture.epoch(), next + 1);
    assert_eq!(bench.tracked(), [3]);
}

#[test]
fn a_recorded_block_is_invalid_while_it_is_written() {
    let bench = Bench::new();
    let recorded = |bench: &Bench| {
        Ring::records(&bench.sim.words(Map::Tracking)[RING_WORD..])
            .map(Result::unwrap)
            .collect::<Vec<_>>()
    };
    // One in sixteen is recorded, the first among them.
    bench.write(5, 1);
    assert_eq!(
        recorded(&bench),
        [(BlockIndex::new(5), block_checksum(bytes(1)))]
    );
    let mut op = bench.op(5, Change::Data(bytes(2)));
    bench.run_up_to_the_write(&mut op);
    assert_eq!(recorded(&bench), []);
    bench.finish(op).unwrap();
    (0..15).for_each(|_| bench.write(5, 3));
    assert_eq!(
        recorded(&bench),
        [(BlockIndex::new(5), block_checksum(bytes(3)))]
    );
    let (bench, outcome) = bench.reopen(false);
    assert_eq!(outcome, Outcome::ProcessCrash);
    bench.sim.write_volume(5 * BLOCK as u64, bytes(4)).unwrap();
    let (bench, outcome) = bench.reopen(false);
    assert!(matches!(outcome, Outcome::Everything(_)));
    assert_eq!(bench.tracked().len() as u64, BLOCKS);
}
