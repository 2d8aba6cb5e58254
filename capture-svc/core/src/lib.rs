//! Decisions of the capture service, free of I/O.

pub mod interval;
pub mod uplink;
