//! The decisions of the engine `scan`: when what was read of a file is the file as it was at one moment, and what is
//! recorded of it.
//!
//! The workload writes the volume file itself, and the filesystem clones nothing. So the file is read, each block is
//! compared with the checksum table, and the bytes of those that differ are put aside ([`kept`]). That takes a while, in
//! which the file may change; [`moment`] decides whether it did. Timestamps alone prove nothing: a second store through a
//! dirty mapping, and a write that is under way at both looks, leave them as they are. `docs/ENGINES.md` has the rule,
//! `docs/CRASH-RULES.md` what survives what.

pub mod kept;
pub mod moment;
pub mod state;
