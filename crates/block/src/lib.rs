//! Units, geometry, block sets, checksums, image digests and frames.
//!
//! Everything here is pure: no I/O, clock, thread or random source. Both services build on it, so what is decided
//! here (what a checksum covers, how a digest is put together, what a frame looks like) is decided once.
//!
//! Bytes that came off a wire or a disk are [`frame::UnverifiedFrame`] or [`verified::UnverifiedBlock`] until their
//! checksum has been checked; only then are they [`frame::VerifiedFrame`] and [`verified::VerifiedBlock`]. There is
//! no other way from the one to the other.

pub mod block_set;
pub mod checksum;
pub mod digest;
pub mod extent;
pub mod frame;
pub mod geometry;
pub mod ids;
pub mod interval;
pub mod units;
pub mod verified;
pub mod wire;

pub use block_set::BlockSet;
pub use checksum::{Checksum128, block_checksum, is_zero, xxh3_128};
pub use digest::{DigestUpdate, ImageDigest, MemoryTable, TableView, image_digest};
pub use extent::Extent;
pub use frame::{
    Codec, CodecChoice, FrameDecoder, FrameEncoder, FrameError, UnverifiedFrame, VerifiedFrame,
};
pub use geometry::{BlockSize, Geometry, GeometryError};
pub use ids::{IdError, IntervalId, SegmentId, VolumeId};
pub use interval::{Coherence, CutReason, Head, IntervalHeader, IntervalSeal, Receipt, Trigger};
pub use units::{BlockCount, BlockIndex, ByteOffset, Epoch, GenerationId, Sequence, WriterTerm};
pub use verified::{UnverifiedBlock, VerifiedBlock};
