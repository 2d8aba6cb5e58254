//! All of it at once, as chance will have it.

use shuttle::{
    rand::{Rng, thread_rng},
    thread,
};

use crate::{
    BLOCKS, explore,
    memory::Puts,
    rig::{Policy, Rig, Setting, request_at_random},
};

fn anything() -> Setting {
    let mut random = thread_rng();
    let full = random.r#gen();
    Setting {
        policy: if full { Policy::GiveUp } else { Policy::Stall },
        slots: if full {
            random.gen_range(1..4)
        } else {
            4 * BLOCKS
        },
        stripe_blocks: random.gen_range(1..=2),
        ..Setting::default()
    }
}

#[test]
fn whatever_threads_do_at_the_same_time_images_are_exact_and_nothing_is_lost_or_left_over() {
    explore(|| {
        let setting = anything();
        let rig = Rig::new(setting);
        rig.write(0);
        rig.write(1);
        let first = rig.snapshot();
        if thread_rng().gen_range(0..4) == 0 {
            *rig.capture.media().puts.lock() = Puts::FindNoRoom(4);
        }
        let end = thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    request_at_random(&rig);
                    request_at_random(&rig);
                });
            }
            scope.spawn(|| {
                rig.ship();
                rig.ship();
            });
            scope.spawn(|| {
                if let Some(id) = rig.snapshot() {
                    rig.look_at(id, 2);
                    rig.delete(id);
                }
                rig.flush();
            });
            scope.spawn(|| {
                if let Some(id) = first {
                    rig.look_at(id, 1);
                    rig.delete(id);
                }
                rig.look_for_gaps();
                rig.snapshot();
            });
            scope.spawn(|| rig.end_somewhere()).join().unwrap()
        });
        rig.finish();
        end.reopen(setting, thread_rng().r#gen());
    });
}
