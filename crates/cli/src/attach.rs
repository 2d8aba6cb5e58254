//! A file's filesystem, attached to a directory of this machine, and taken off again.
//!
//! What there is lives in the kernel alone: a loop device over the file, and a mount of it. No list of ours can be wrong
//! about it, and there is nothing to tidy up. The device ends with its last user, and until the last step, which gives
//! the mount its directory, the command is the only one: killed before it, nothing is left, killed after it, the mount
//! is whole. Devices carry a mark, by which the mounts that are ours are told from everybody else's.
//!
//! In the order in which they are used: [`point`] (the directory), [`filesystem`] (what is in the file),
//! [`loop_device`], [`mount`], and for what is there already [`mounted`]. What the kernel may not come back from is done
//! [`aside`].

pub(crate) mod aside;
pub(crate) mod filesystem;
pub(crate) mod loop_device;
pub(crate) mod mount;
pub(crate) mod mounted;
pub(crate) mod point;
