//! Decisions of the capture service, free of I/O.

pub mod engine;
pub mod interval;
pub mod uplink;
