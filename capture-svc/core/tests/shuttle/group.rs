//! Volumes that are cut at one instant, while a workload writes to one what follows from what it wrote to the other.

use shuttle::thread;

use crate::{
    explore,
    rig::{Rig, Setting},
};

/// The block that is written again and again.
const BLOCK: u64 = 1;

/// How many writes of the block a snapshot shows.
fn writes_seen(rig: &Rig, snapshot: u64) -> u64 {
    rig.look_at(snapshot, 1);
    let snapshots = rig.snapshots.lock();
    let image = snapshots[&snapshot].image.as_ref().unwrap();
    // Requests are numbered from 1 as they begin, and nothing else is written.
    image[usize::try_from(BLOCK).unwrap()][0]
}

#[test]
fn no_snapshot_of_a_group_shows_an_effect_without_its_cause() {
    explore(|| {
        let (log, data) = (Rig::new(Setting::default()), Rig::new(Setting::default()));
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..3 {
                    log.write(BLOCK);
                    data.write(BLOCK);
                }
            });
            // Cuts of one volume alone come in between.
            scope.spawn(|| data.ship());
            scope.spawn(|| {
                let [of_log, of_data] = Rig::snapshots_together([&log, &data]);
                let (causes, effects) = (writes_seen(&log, of_log), writes_seen(&data, of_data));
                assert!(
                    (effects..=effects + 1).contains(&causes),
                    "{causes} records of the log and {effects} of the data"
                );
            });
        });
        log.finish();
        data.finish();
    });
}

#[test]
fn every_writer_gets_through_between_the_cuts_of_two_groups() {
    explore(|| {
        let (one, other) = (Rig::new(Setting::default()), Rig::new(Setting::default()));
        thread::scope(|scope| {
            for rig in [&one, &other] {
                scope.spawn(|| {
                    rig.write(BLOCK);
                    rig.write(0);
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    for (rig, snapshot) in [&one, &other]
                        .into_iter()
                        .zip(Rig::snapshots_together([&one, &other]))
                    {
                        rig.look_at(snapshot, 1);
                    }
                });
            }
        });
        one.finish();
        other.finish();
    });
}
