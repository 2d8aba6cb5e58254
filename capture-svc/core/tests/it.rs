//! Tests of the capture service's decisions.

#![cfg(not(feature = "shuttle"))]
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "it/bench.rs"]
mod bench;
#[path = "it/changes.rs"]
mod changes;
#[path = "it/crash.rs"]
mod crash;
#[path = "it/damage.rs"]
mod damage;
#[path = "it/formats.rs"]
mod formats;
#[path = "it/model.rs"]
mod model;
#[path = "it/rules.rs"]
mod rules;
#[path = "it/sim.rs"]
mod sim;
#[path = "it/syncs.rs"]
mod syncs;
