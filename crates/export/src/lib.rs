//! Block devices served to clients: the device trait, the set of exports, the NBD server, and files in a mounted
//! directory.
//!
//! A front end (NBD, FUSE) talks to a [`BlockDevice`] and to nothing else, so that a live volume, a retained
//! generation and a test's memory device are served alike. The data path is plain blocking calls on OS threads:
//! handing a request to another thread costs about as much as performing it, so the thread that read a request
//! performs it and replies.
//!
//! In the order in which data meets them: [`exports`] (which device a name means, and who uses it),
//! [`device`] (what a request may ask of it), [`scratch`] (a device on
//! which writes are thrown away), [`errno`] (how a failure is told to the client), [`nbd`] (the server),
//! [`fuse`] (the files). Both serve by threads that take turns: `turns` (who receives), `pace` (whether another one
//! should), `watch` (who is stuck).

pub mod device;
pub mod errno;
pub mod exports;
pub mod fuse;
pub mod nbd;
mod pace;
pub mod scratch;
mod turns;
mod watch;

pub use device::{AllocationExtent, BlockDevice, Durability, ZeroFlags};
pub use exports::{
    ConnectError, ConnectedClient, Export, ExportRegistry, Exports, RegistryError, SNAPSHOT_SIGN,
};
pub use fuse::{FuseServer, MountError};
pub use nbd::{NbdAddress, NbdServer};
pub use scratch::{Scratch, ScratchRoom};
