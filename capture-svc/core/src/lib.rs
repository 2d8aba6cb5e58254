//! Decisions of the capture service, free of I/O.

pub mod codec;
pub mod coherence;
pub mod engine;
pub mod interval;
pub mod kind;
pub mod reflink;
pub mod rollback;
pub mod scan;
mod sync;
pub mod uplink;
