//! The decisions of the engine `reflink`: what two clones of a volume file differ in, and what is recorded of them.
//!
//! The workload writes the volume file itself. A cut is a clone of the file, which shares the file's extents; whoever
//! writes to the file afterwards gets new ones. So where two clones lie at the same places of the disk they hold the
//! same bytes, and all else may differ. `docs/CRASH-RULES.md` has the rules.

pub mod extents;
pub mod state;
