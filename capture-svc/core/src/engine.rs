//! The `intercept` engine's decisions: which blocks changed, what they were before, what is durable before what.
//!
//! In the order in which a write meets them: the request's steps ([`mod@write`]), the intent map ([`intent`]), the spool
//! of before-images ([`spool`]), the dirty map ([`dirty`]), the recorded blocks ([`ring`]). Then what ends an epoch
//! ([`cut`]), what reads an old one ([`read`], [`snapshots`]), and what opens a volume ([`trust`], [`examine`],
//! [`recover`]). [`damage`] names what was found not to be as it was left; [`capture`] holds it together; [`media`] is all it stands on. `docs/CRASH-RULES.md` has the rules.

pub mod capture;
pub mod cut;
pub mod damage;
pub mod dirty;
pub mod examine;
pub mod group;
pub mod intent;
pub mod media;
pub mod read;
pub mod records;
pub mod recover;
pub mod ring;
pub mod snapshots;
pub mod spool;
pub mod trust;
mod words;
pub mod write;
