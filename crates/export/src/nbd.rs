//! An NBD server: fixed newstyle negotiation, structured replies, `base:allocation`, on OS threads.
//!
//! What is supported, the limits, and what ordering and durability a client may rely on is written in `docs/NBD.md`.
//!
//! The codec ([`wire`], [`option`], [`negotiate`], [`request`], [`reply`]) is made of pure functions over bytes. Around
//! it: `socket` and `server` accept clients, `handshake` drives the negotiation, `session` serves requests, in turns
//! ([`crate::turns`]) by a few threads per connection, under the eye of [`crate::watch`].

mod field;
mod handshake;
pub mod limits;
pub mod negotiate;
pub mod option;
mod pool;
mod read;
mod receive;
pub mod reply;
pub mod request;
mod send;
mod server;
mod service;
mod session;
mod socket;
mod spin;
pub mod wire;

pub use limits::Limits;
pub use server::{NbdServer, StartError, StopReport};
pub use service::ClientStatus;
pub use socket::{BadAddress, NbdAddress};
