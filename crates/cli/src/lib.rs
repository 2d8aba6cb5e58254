//! The `tidemark` command: what people and scripts drive both services with.
//!
//! [`args`] says what can be asked for, [`command`] does it, one module per family of subcommands, [`report`] and
//! [`mod@format`] decide what programs and people see, [`failure`] what they see when it did not work. Images on their
//! way into a file are verified in [`image`]; what is mounted is attached and taken off in `attach`.

pub mod args;
mod attach;
pub mod command;
pub mod connect;
pub mod failure;
pub mod format;
pub mod image;
pub mod output;
pub mod parse;
pub mod pki;
pub mod progress;
pub mod report;

pub use attach::aside::read_device;
