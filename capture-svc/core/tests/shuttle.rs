//! The engine's threads in every order that a scheduler can think of: writers, flips and settles, snapshot readers,
//! the shipper, deletions, and a spool that is full, on one block and on its neighbours.
//!
//! Shuttle runs each scenario again and again and decides at every lock and every atomic who goes next: at random, and
//! by priorities that change now and then (PCT), which finds what takes a long pause of one thread. What must hold
//! is in `history`, `rig` and `memory`: exact images, a superset of the changes, nothing freed too early, nothing left
//! over, and an end to every wait.
//!
//! - `SHUTTLE_ITERATIONS=n` runs each scenario as often as wanted under each scheduler, from a seed of its own.
//! - A schedule that fails is printed. `SHUTTLE_SCHEDULE=… cargo test -p capture-core --features shuttle --test shuttle
//!   NAME` runs that one again.
//!
//! Shuttle knows sequentially consistent orders only: what a weaker one allows beyond them is not seen here. Every
//! atomic of the engine is used with `SeqCst`, but for two of `ring.rs`:
//! - The flag `busy` of a place is a spin lock, taken with `Acquire` and let go with `Release`: who takes it sees what
//!   its last holder did. More is not asked, since the words of the record are `SeqCst` themselves. One look at them
//!   is taken without the flag, by whoever is about to write to a block; the record that it must not miss is of that
//!   block, made under the stripe's lock that it holds now. A failed attempt is `Relaxed`: only another one follows.
//! - The counter `writes` is `Relaxed`: it chooses which writes are recorded, and any choice is right.
//!
//! Bytes of the volume are copied by plain loads. A copy comes before the look at the index because that look takes
//! and leaves a lock which the writer takes before it writes, and before a look at any atomic because `read_volume`
//! promises that nothing overtakes it.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "shuttle/checks.rs"]
mod checks;
#[path = "shuttle/chunks.rs"]
mod chunks;
#[path = "shuttle/cuts.rs"]
mod cuts;
#[path = "shuttle/ends.rs"]
mod ends;
#[path = "shuttle/group.rs"]
mod group;
#[path = "shuttle/history.rs"]
mod history;
#[path = "shuttle/memory.rs"]
mod memory;
#[path = "shuttle/readers.rs"]
mod readers;
#[path = "shuttle/rig.rs"]
mod rig;
#[path = "shuttle/room.rs"]
mod room;
#[path = "shuttle/together.rs"]
mod together;

use shuttle::{
    Config, MaxSteps, Runner,
    scheduler::{PctScheduler, RandomScheduler, ReplayScheduler},
};
use tidemark_block::{BlockSize, Geometry, VolumeId};

pub(crate) const BLOCK: usize = 4096;
pub(crate) const BLOCKS: u64 = 4;
pub(crate) const REGION_BLOCKS: u64 = 2;
/// Runs of a scenario under each scheduler.
const ITERATIONS: usize = 1500;
/// Changes of priority, plus one, in a run of PCT.
const DEPTHS: [usize; 2] = [2, 4];
/// Steps of a run that has come to no end.
const STEPS_MAX: usize = 100_000;
const SEED: u64 = 1;

pub(crate) fn geometry() -> Geometry {
    Geometry::new(BLOCKS * BLOCK as u64, BlockSize::MIN).unwrap()
}

pub(crate) fn volume() -> VolumeId {
    VolumeId::from_bytes([1; 16])
}

fn setting(name: &str) -> Option<String> {
    #[allow(
        clippy::disallowed_methods,
        reason = "which schedules to run is no decision of the crate"
    )]
    std::env::var(name).ok()
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    config.silence_warnings = true;
    config
        .ungraceful_shutdown_config
        .immediately_return_on_panic = true;
    config
}

/// Runs a scenario under each scheduler; the same schedules each time, unless more are asked for.
pub(crate) fn explore(scenario: fn()) {
    if let Some(schedule) = setting("SHUTTLE_SCHEDULE") {
        Runner::new(ReplayScheduler::new_from_encoded(&schedule), config()).run(scenario);
        return;
    }
    let wanted = setting("SHUTTLE_ITERATIONS").map(|text| text.parse().expect("a number"));
    let random = match wanted {
        Some(iterations) => RandomScheduler::new(iterations),
        None => RandomScheduler::new_from_seed(SEED, ITERATIONS),
    };
    Runner::new(random, config()).run(scenario);
    for depth in DEPTHS {
        let pct = match wanted {
            Some(iterations) => PctScheduler::new(depth, iterations),
            None => PctScheduler::new_from_seed(SEED, depth, ITERATIONS),
        };
        Runner::new(pct, config()).run(scenario);
    }
}
