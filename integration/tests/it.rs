//! End to end: the real programs, killed and asked for nonsense, with real clients.
#![allow(clippy::unwrap_used)]

use tidemark_integration::{nbd, programs};

#[path = "it/bad_input.rs"]
mod bad_input;
#[path = "it/clocks.rs"]
mod clocks;
#[path = "it/coherence.rs"]
mod coherence;
#[path = "it/compose.rs"]
mod compose;
#[path = "it/containers.rs"]
mod containers;
#[path = "it/crash.rs"]
mod crash;
#[path = "it/databases.rs"]
mod databases;
#[path = "it/demo.rs"]
mod demo;
#[path = "it/disks.rs"]
mod disks;
#[path = "it/docs.rs"]
mod docs;
#[path = "it/engines.rs"]
mod engines;
#[path = "it/files.rs"]
mod files;
#[path = "it/find_coherent.rs"]
mod find_coherent;
#[path = "it/first_use.rs"]
mod first_use;
#[path = "it/fuse.rs"]
mod fuse;
#[path = "it/kills.rs"]
mod kills;
#[path = "it/mount.rs"]
mod mount;
#[path = "it/mutants.rs"]
mod mutants;
#[path = "it/observability.rs"]
mod observability;
#[path = "it/packaging.rs"]
mod packaging;
#[path = "it/peers.rs"]
mod peers;
#[path = "it/real_clients.rs"]
mod real_clients;
#[path = "it/scene.rs"]
mod scene;
#[path = "it/scratch.rs"]
mod scratch;
#[path = "it/scrub.rs"]
mod scrub;
#[path = "it/security.rs"]
mod security;
#[path = "it/shutdown.rs"]
mod shutdown;
#[path = "it/snapshots.rs"]
mod snapshots;
#[path = "it/traces.rs"]
mod traces;
#[path = "it/unread_logs.rs"]
mod unread_logs;
#[path = "it/workload.rs"]
mod workload;
