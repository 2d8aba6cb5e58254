//! Fuzz targets: every decoder and state machine that reads from a wire or a disk.
//!
//! Each target takes any bytes and panics where a property doesn't hold: nothing panics, memory stays in proportion
//! to the input, what decodes encodes to the same again, and machines keep their invariants. Structures with a
//! checksum are tried as they come and with the checksum made right, since nothing would get past it otherwise.
//!
//! `make fuzz` drives them under libFuzzer (crate `run`, which is not a member of the workspace); the test `corpus`
//! replays the kept inputs.

pub mod bounded;
pub mod capture_records;
pub mod config;
pub mod frame;
pub mod identities;
pub mod ingest;
mod input;
pub mod manifest;
pub mod messages;
pub mod nbd;
pub mod nbd_session;
pub mod recovery;
pub mod segment;
pub mod uplink;
pub mod uplink_records;
pub mod wire;

// The stamp, which `uplink_records` compiles in, reads and writes its file by this module.
use tidemark_disk::record;

/// What runs one input.
pub type Target = fn(&[u8]);

/// Every target under its name, which is that of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("capture_records", capture_records::run),
    ("config", config::run),
    ("frame", frame::run),
    ("identities", identities::run),
    ("ingest", ingest::run),
    ("manifest", manifest::run),
    ("messages", messages::run),
    ("nbd_handshake", nbd::handshake),
    ("nbd_session", nbd_session::run),
    ("nbd_transmission", nbd::transmission),
    ("recovery", recovery::run),
    ("segment", segment::run),
    ("uplink", uplink::run),
    ("uplink_records", uplink_records::run),
    ("wire", wire::run),
];
