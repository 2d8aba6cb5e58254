//! Decisions and formats of the vault service, free of I/O.
//!
//! In the order of the data: [`ingest`] takes verified frames and gathers them into [`segment`]s; [`manifest`] names
//! the segments of each generation; [`image`] finds the blocks of a generation among them; [`retention`] and
//! [`reclaim`] decide what may go; [`scrub`] checks again what is there.

pub mod image;
pub mod ingest;
pub mod manifest;
pub mod reclaim;
pub mod retention;
pub mod scrub;
pub mod segment;
