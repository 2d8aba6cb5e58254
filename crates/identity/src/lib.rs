//! Who calls, and what they may do.
//!
//! A certificate or a token says who somebody is; the operator's file of [`Identities`] says which roles that name has
//! and which volumes they hold for. [`rules`] says which roles each call takes; a call without a rule is refused, and a
//! test holds the rules and the protocol together. Whether a call may touch the volume that it names, [`Caller`]
//! decides where the volume is known.
//!
//! Nothing here does I/O or knows of TLS.

mod caller;
mod identities;
mod pattern;
mod role;
pub mod rules;
pub mod token;

pub use caller::{Caller, Denied};
pub use identities::{Identities, IdentitiesError, Identity};
pub use pattern::{Pattern, PatternError};
pub use role::{Role, Roles};
