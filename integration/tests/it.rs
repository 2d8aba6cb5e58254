//! End to end: the real programs, killed and asked for nonsense, with real clients.
#![allow(clippy::unwrap_used)]

use tidemark_integration::{nbd, programs};

#[path = "it/bad_input.rs"]
mod bad_input;
#[path = "it/crash.rs"]
mod crash;
#[path = "it/demo.rs"]
mod demo;
#[path = "it/docs.rs"]
mod docs;
#[path = "it/first_use.rs"]
mod first_use;
#[path = "it/real_clients.rs"]
mod real_clients;
#[path = "it/snapshots.rs"]
mod snapshots;
#[path = "it/workload.rs"]
mod workload;
