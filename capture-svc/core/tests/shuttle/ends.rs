//! The end of the process, or of the power, at any point of a schedule; the close; records that find no room; flushes.

use capture_core::engine::cut::Purpose;
use shuttle::{
    rand::{Rng, thread_rng},
    thread,
};

use crate::{
    BLOCKS, explore,
    memory::Puts,
    rig::{Policy, Rig, Setting, request_at_random},
};

#[test]
fn a_process_that_ends_at_any_moment_leaves_exact_snapshots_and_a_superset_of_the_changes() {
    explore(|| {
        let setting = Setting::default();
        let rig = Rig::new(setting);
        rig.write(1);
        let first = rig.snapshot().unwrap();
        let end = thread::scope(|scope| {
            scope.spawn(|| {
                rig.write(1);
                request_at_random(&rig);
            });
            scope.spawn(|| request_at_random(&rig));
            scope.spawn(|| {
                rig.ship();
                rig.ship();
            });
            scope.spawn(|| {
                rig.snapshot();
                rig.delete(first);
            });
            scope.spawn(|| rig.end_somewhere()).join().unwrap()
        });
        rig.finish();
        end.reopen(setting, false);
    });
}

#[test]
fn a_call_under_way_at_the_close_changes_nothing_of_what_the_close_has_sealed() {
    explore(|| {
        let setting = Setting::default();
        let rig = Rig::new(setting);
        rig.write(1);
        let first = rig.snapshot().unwrap();
        rig.write(1);
        rig.cut_an_interval();
        let sealed = thread::scope(|scope| {
            scope.spawn(|| rig.delete(first));
            scope.spawn(|| match thread_rng().r#gen() {
                true => rig.commit_what_is_open(),
                false => rig.give_up_interval(),
            });
            scope.spawn(|| rig.doubt(2));
            scope.spawn(|| rig.snapshot());
            scope.spawn(|| rig.seal()).join().unwrap()
        });
        assert!(sealed == rig.capture.media().sealed());
        rig.end_here().reopen(setting, false);
    });
}

#[test]
fn power_that_is_lost_at_any_moment_leaves_what_differs_within_the_doubtful_regions() {
    explore(|| {
        let setting = Setting::default();
        let rig = Rig::new(setting);
        rig.write(1);
        let end = thread::scope(|scope| {
            scope.spawn(|| {
                rig.write(0);
                rig.write(3);
            });
            scope.spawn(|| rig.write(2));
            scope.spawn(|| {
                rig.ship();
                rig.ship();
            });
            scope.spawn(|| rig.flush());
            scope.spawn(|| rig.end_somewhere()).join().unwrap()
        });
        rig.finish();
        end.reopen(setting, true);
    });
}

#[test]
fn a_flush_makes_durable_what_had_ended_before_it_though_another_is_under_way() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        thread::scope(|scope| {
            for block in 0..2 {
                let rig = &rig;
                scope.spawn(move || {
                    rig.write(block);
                    rig.flush();
                });
            }
            scope.spawn(|| {
                rig.flush();
                rig.ship();
            });
        });
        rig.finish();
    });
}

#[test]
fn a_sync_that_began_before_a_cut_had_settled_does_not_count_for_it() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        rig.write(0);
        thread::scope(|scope| {
            scope.spawn(|| rig.flush());
            scope.spawn(|| {
                rig.write(1);
                rig.cut_an_interval();
            });
        });
        rig.commit_what_is_open();
        rig.finish();
    });
}

#[test]
fn a_region_cleared_while_its_page_is_written_is_not_taken_for_durable() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        rig.write(0);
        rig.cut_an_interval();
        thread::scope(|scope| {
            // Of another region, on the same page.
            scope.spawn(|| rig.write(BLOCKS - 1));
            scope.spawn(|| rig.commit_what_is_open());
        });
        // The page is written again before the next write to the region is shipped.
        rig.cut_an_interval();
        rig.write(0);
        rig.commit_what_is_open();
        rig.finish();
    });
}

#[test]
fn records_that_find_no_room_cost_cuts_and_none_of_their_blocks() {
    explore(|| {
        let setting = Setting {
            policy: if thread_rng().r#gen() {
                Policy::Stall
            } else {
                Policy::GiveUp
            },
            ..Setting::default()
        };
        let rig = Rig::new(setting);
        rig.write(1);
        rig.snapshot();
        *rig.capture.media().puts.lock() = Puts::FindNoRoom(2);
        let end = thread::scope(|scope| {
            scope.spawn(|| {
                rig.write(1);
                request_at_random(&rig);
            });
            scope.spawn(|| {
                rig.ship();
                rig.ship();
            });
            scope.spawn(|| {
                for _ in 0..3 {
                    if let Some(id) = rig.snapshot() {
                        rig.look_at(id, 1);
                    }
                }
            });
            scope.spawn(|| rig.look_for_gaps());
            scope.spawn(|| rig.end_somewhere()).join().unwrap()
        });
        rig.finish();
        end.reopen(setting, false);
    });
}

#[test]
fn a_record_of_which_nobody_knows_whether_it_was_replaced_stops_the_work_and_breaks_no_snapshot() {
    explore(|| {
        let setting = Setting::default();
        let rig = Rig::new(setting);
        rig.write(1);
        let first = rig.snapshot().unwrap();
        *rig.capture.media().puts.lock() = Puts::EndUnknown(3);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    rig.write(1);
                    rig.write(1);
                });
            }
            scope.spawn(|| rig.ship());
            scope.spawn(|| {
                rig.snapshot();
                rig.delete(first);
            });
        });
        let end = rig.end_here();
        rig.finish();
        end.reopen(setting, false);
    });
}

#[test]
fn a_sweep_under_way_leaves_what_a_cut_needs_of_which_only_the_disk_knows() {
    explore(|| {
        let setting = Setting::default();
        let rig = Rig::new(setting);
        rig.write(1);
        let first = rig.snapshot().unwrap();
        *rig.capture.media().puts.lock() = Puts::EndUnknownOfInterval;
        thread::scope(|scope| {
            scope.spawn(|| rig.delete(first));
            scope.spawn(|| rig.cut_and(Purpose::Interval, || rig.write(1)));
        });
        rig.end_here().reopen(setting, false);
    });
}
