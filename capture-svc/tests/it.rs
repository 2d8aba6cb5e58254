//! Tests of the capture service on real files, and against a whole vault.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "it/bad_input.rs"]
mod bad_input;
#[path = "it/coherence.rs"]
mod coherence;
#[path = "it/control.rs"]
mod control;
#[path = "it/damage.rs"]
mod damage;
#[path = "it/disk.rs"]
mod disk;
#[path = "it/engine.rs"]
mod engine;
#[path = "it/groups.rs"]
mod groups;
#[path = "it/metrics.rs"]
mod metrics;
#[path = "it/nbd.rs"]
mod nbd;
#[path = "it/proxy.rs"]
mod proxy;
#[path = "it/recovery.rs"]
mod recovery;
#[path = "it/reflink.rs"]
mod reflink;
#[path = "it/rig.rs"]
mod rig;
#[path = "it/scan.rs"]
mod scan;
#[path = "../../integration/src/scrape.rs"]
#[allow(dead_code, unreachable_pub, reason = "others use the rest")]
mod scrape;
#[path = "it/shipping.rs"]
mod shipping;
#[path = "it/snapshot_grades.rs"]
mod snapshot_grades;
#[path = "it/stopping.rs"]
mod stopping;
#[path = "it/writer.rs"]
mod writer;
