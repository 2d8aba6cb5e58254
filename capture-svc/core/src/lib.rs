//! Decisions of the capture service, free of I/O.

pub mod engine;
pub mod codec;
pub mod interval;
pub mod uplink;
