//! What the end-to-end tests and the benchmarks of Tidemark share: the real programs, started and asked, and a small
//! NBD client. Everything here panics where a test would fail.
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    missing_docs,
    reason = "test support"
)]

pub mod nbd;
pub mod programs;
pub mod scrape;
pub mod small_disk;
