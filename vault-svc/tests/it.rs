//! The vault service over real gRPC and a real directory.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

#[path = "it/full_disk.rs"]
mod full_disk;
#[path = "it/hostile.rs"]
mod hostile;
#[path = "it/interval.rs"]
mod interval;
#[path = "it/shipping.rs"]
mod shipping;
#[path = "it/source.rs"]
mod source;
