//! A spool that is full, and what is freed in it.

use shuttle::thread;

use crate::{
    explore,
    history::Kind,
    rig::{Policy, Rig, Setting, request_at_random},
};

#[test]
fn a_reader_of_a_cut_that_is_given_up_gets_an_error_and_never_wrong_bytes() {
    explore(|| {
        let rig = Rig::new(Setting {
            policy: Policy::GiveUp,
            slots: 1,
            ..Setting::default()
        });
        rig.write(0);
        rig.write(1);
        let id = rig.snapshot().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                rig.write(0);
                rig.write(1);
            });
            scope.spawn(|| rig.write(1));
            scope.spawn(|| rig.look_at(id, 3));
            scope.spawn(|| {
                if let Some(id) = rig.snapshot() {
                    rig.look_at(id, 1);
                }
            });
        });
        rig.finish();
    });
}

#[test]
fn a_full_spool_costs_intervals_and_none_of_their_blocks() {
    explore(|| {
        let rig = Rig::new(Setting {
            policy: Policy::GiveUp,
            slots: 2,
            ..Setting::default()
        });
        rig.write(0);
        rig.write(1);
        rig.write(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                request_at_random(&rig);
                request_at_random(&rig);
            });
            scope.spawn(|| rig.request(Kind::Data, 0, 12));
            scope.spawn(|| {
                rig.ship();
                rig.ship();
            });
            scope.spawn(|| rig.look_for_gaps());
        });
        rig.finish();
    });
}

#[test]
fn whoever_waits_for_room_goes_on_when_a_cut_closes() {
    explore(|| {
        let rig = Rig::new(Setting {
            slots: 1,
            ..Setting::default()
        });
        rig.write(0);
        rig.write(1);
        let id = rig.snapshot().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                rig.write(0);
                rig.write(1);
            });
            scope.spawn(|| rig.write(1));
            scope.spawn(|| rig.look_at(id, 2));
            scope.spawn(|| rig.delete(id));
        });
        rig.finish();
    });
}

#[test]
fn a_block_that_was_copied_for_a_request_that_never_wrote_it_is_in_the_next_interval() {
    explore(|| {
        let rig = Rig::new(Setting {
            slots: 1,
            ..Setting::default()
        });
        rig.write(0);
        rig.write(1);
        thread::scope(|scope| {
            scope.spawn(|| rig.write(0));
            // Copies block 0, finds no room for block 1, and is refused in the end unless the interval closes before.
            scope.spawn(|| rig.request(Kind::Data, 0, 8));
            scope.spawn(|| {
                rig.ship();
                rig.close();
            });
        });
        rig.finish();
    });
}

#[test]
fn a_before_image_that_no_cut_needs_any_more_is_not_kept() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        rig.write(0);
        let id = rig.snapshot().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| rig.write(0));
            scope.spawn(|| rig.look_at(id, 1));
            scope.spawn(|| rig.delete(id));
        });
        rig.check_the_spool_is_empty();
        rig.finish();
    });
}
