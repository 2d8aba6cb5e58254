//! The NBD server, over its own socket: the codec, hostile clients, real clients, and what `docs/NBD.md` promises; and
//! exports as files, mounted.

#![allow(clippy::cast_possible_truncation, reason = "small numbers in tests")]
#![allow(clippy::unwrap_used, reason = "a failure to set a test up fails it")]

#[path = "it/client.rs"]
mod client;
#[path = "it/codec.rs"]
mod codec;
#[path = "it/devices.rs"]
mod devices;
#[path = "it/document.rs"]
mod document;
#[path = "it/fuse.rs"]
mod fuse;
#[path = "it/hostile.rs"]
mod hostile;
#[path = "it/real_clients.rs"]
mod real_clients;
#[path = "it/scratch.rs"]
mod scratch;
#[path = "it/serving.rs"]
mod serving;
