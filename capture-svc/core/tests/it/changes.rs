//! What changed between two snapshots, where a record finds no room or an opening ends in the middle.

use capture_core::engine::{cut::Purpose, trust::Judgement};

use crate::bench::{Bench, blocks, snapshot};

fn changed(bench: &Bench) -> Vec<u64> {
    let snapshots = bench.capture.snapshots();
    let (first, last) = (snapshots.first().unwrap(), snapshots.last().unwrap());
    blocks(&bench.capture.changed_between(first.id, last.id).unwrap())
}

#[test]
fn a_cut_that_is_tried_again_keeps_what_it_had_noted_of_the_changes() {
    let prepare = || {
        let bench = Bench::with(|tuning| tuning.changes_max = 2);
        bench.write(1, 1);
        bench.cut(snapshot());
        for block in [2, 3] {
            bench.write(block, 1);
            let cut = bench.cut(Purpose::Interval);
            bench.capture.commit_interval(cut).unwrap();
        }
        bench.write(4, 1);
        bench
    };
    // The cut fails at each of its operations, and again at each of its next attempt's.
    for (first, second) in (0..8).flat_map(|first| (0..8).map(move |second| (first, second))) {
        let bench = prepare();
        for operation in [first, second] {
            bench.sim.fail_in(operation);
            let _ = bench.try_cut(snapshot());
        }
        assert!(!bench.capture.is_poisoned(), "{first} {second}");
        while bench.try_cut(snapshot()).is_err() {}
        assert_eq!(changed(&bench), [2, 3, 4], "{first} {second}");
    }
}

#[test]
fn an_opening_that_is_repeated_keeps_what_it_had_noted_of_the_changes() {
    for operation in 0..30 {
        let bench = Bench::new();
        bench.write(1, 1);
        bench.cut(snapshot());
        bench.write(2, 1);
        // Both epochs have dirty blocks when the process ends.
        let _cut = bench.capture.begin_cut(snapshot()).unwrap();
        bench.write(3, 1);
        bench.sim.restart_process();
        bench.sim.crash_in(operation);
        let exact = Judgement::Exact { clean: false };
        let _ = Bench::recovered(bench.sim.clone(), bench.tuning, exact, bench.limit);
        let (bench, _) = bench.reopen(false);
        bench.cut(snapshot());
        assert_eq!(changed(&bench), [2, 3], "{operation}");
    }
}
