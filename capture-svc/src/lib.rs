//! The capture service: protects volume files and ships what changes to a vault.
//!
//! [`start`] runs a whole service inside a process that has a tokio runtime; the [`program`] is that and
//! signals, `tidemark up` is that and a vault.

pub mod args;
pub mod config;
mod front;
pub mod metrics;
pub mod program;
mod quiesce;
mod registry;
mod rollback;
mod rpc;
mod scrub;
pub mod service;
pub mod uplink;
mod volume;

pub use config::Config;
pub use service::{Running, start};

pub mod engine;
