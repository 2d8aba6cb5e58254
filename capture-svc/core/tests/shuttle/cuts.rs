//! Cuts under way while others write, read, ship and delete; there is room in the spool.

use shuttle::{
    rand::{Rng, thread_rng},
    thread,
};

use crate::{
    explore,
    history::Kind,
    rig::{Rig, Setting, request_at_random},
};

fn stripes_at_random() -> Setting {
    Setting {
        stripe_blocks: thread_rng().gen_range(1..=2),
        ..Setting::default()
    }
}

#[test]
fn a_snapshot_is_the_image_of_its_cut_while_two_write_to_one_block() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        rig.write(1);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    rig.write(1);
                    rig.write(1);
                });
            }
            scope.spawn(|| {
                let id = rig.snapshot().unwrap();
                rig.look_at(id, 2);
            });
        });
        rig.finish();
    });
}

#[test]
fn a_snapshot_is_the_image_of_its_cut_whatever_is_written_to_parts_of_its_blocks() {
    explore(|| {
        let rig = Rig::new(stripes_at_random());
        rig.write(0);
        rig.write(1);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..2 {
                        request_at_random(&rig);
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..2 {
                    let id = rig.snapshot().unwrap();
                    rig.look_at(id, 1);
                }
            });
        });
        rig.finish();
    });
}

#[test]
fn a_trim_beside_cuts_is_in_their_images_as_a_whole_or_not_at_all() {
    explore(|| {
        let rig = Rig::new(stripes_at_random());
        rig.write(0);
        rig.write(1);
        thread::scope(|scope| {
            scope.spawn(|| rig.request(Kind::Trim, 0, 8));
            scope.spawn(|| rig.request(Kind::Data, 2, 4));
            scope.spawn(|| {
                rig.ship();
                rig.ship();
            });
            scope.spawn(|| {
                let id = rig.snapshot().unwrap();
                rig.look_at(id, 2);
            });
        });
        rig.finish();
    });
}

#[test]
fn intervals_applied_in_order_are_the_images_of_their_cuts() {
    explore(|| {
        let rig = Rig::new(stripes_at_random());
        rig.write(1);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    rig.write(1);
                    request_at_random(&rig);
                });
            }
            scope.spawn(|| {
                rig.ship();
                rig.ship();
            });
        });
        rig.finish();
    });
}

#[test]
fn what_differs_from_the_base_is_tracked_at_every_moment() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        thread::scope(|scope| {
            scope.spawn(|| {
                rig.write(1);
                request_at_random(&rig);
            });
            scope.spawn(|| {
                rig.ship();
                rig.ship();
            });
            scope.spawn(|| {
                for _ in 0..4 {
                    rig.look_for_gaps();
                }
            });
        });
        rig.finish();
    });
}

#[test]
fn an_interval_given_up_and_blocks_in_doubt_are_in_the_next_one() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        rig.write(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                rig.write(1);
                rig.write(0);
            });
            scope.spawn(|| {
                rig.cut_an_interval();
                rig.give_up_interval();
                rig.look_for_gaps();
                rig.ship();
            });
            scope.spawn(|| {
                rig.doubt(2);
                rig.look_for_gaps();
            });
        });
        rig.finish();
    });
}

#[test]
fn a_reader_sees_its_snapshot_to_the_end_though_it_is_deleted() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        rig.write(0);
        let older = rig.snapshot().unwrap();
        rig.write(0);
        let newer = rig.snapshot().unwrap();
        thread::scope(|scope| {
            for id in [older, newer] {
                let rig = &rig;
                scope.spawn(move || rig.look_at(id, 2));
            }
            scope.spawn(|| {
                rig.delete(newer);
                rig.delete(older);
            });
            scope.spawn(|| {
                rig.write(0);
                rig.write(1);
            });
        });
        rig.finish();
    });
}

#[test]
fn a_sweep_leaves_what_a_cut_begun_meanwhile_needs() {
    explore(|| {
        let rig = Rig::new(Setting::default());
        rig.write(1);
        let older = rig.snapshot().unwrap();
        rig.write(1);
        thread::scope(|scope| {
            scope.spawn(|| rig.delete(older));
            scope.spawn(|| {
                rig.snapshot();
                rig.write(1);
            });
        });
        rig.finish();
    });
}
