//! Protobuf messages to domain types and back: the only place where a field can be missing.
//!
//! Requests are parsed once, at the edge; what lies behind it has no `Option` that isn't optional. A message that
//! can't be one of ours is [`WireError`], which is a [`Reason::RequestInvalid`].

mod digests;
mod ship;
mod term;

use bytes::Bytes;
use thiserror::Error;
use tidemark_block::{
    BlockSize, Coherence, Geometry, GeometryError, ImageDigest, IntervalId, Trigger, VolumeId,
};

pub use digests::{DIGEST_RANGES_MAX, DigestLevel, DigestRun, DigestsRequest, NodeRange};
pub use ship::{CurrentMark, FrameBatch, ShipAnswer, ShipMessage};
pub use term::{TermGrant, TermRequest};
pub use tidemark_block::Head;

use crate::{
    common::v1 as common,
    error::{Reason, RpcError},
};

/// The only digest there is today: XXH3-128 over plaintext.
pub const DIGEST_KIND_XXH3: u32 = 0;
/// The most bytes of a volume's or source's name on the wire.
pub const NAME_BYTES_MAX: usize = 255;

/// Why a message isn't one of ours.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// A field that must be there isn't.
    #[error("field `{0}` is missing")]
    Missing(&'static str),
    /// An identity, nonce or digest of the wrong length.
    #[error("field `{field}` has {len} bytes instead of 16")]
    Length {
        /// Its name in the protocol.
        field: &'static str,
        /// Bytes it has.
        len: usize,
    },
    /// A number that stands for nothing, or is out of range.
    #[error("field `{field}` is {value}, which is out of range")]
    Range {
        /// Its name in the protocol.
        field: &'static str,
        /// What it is.
        value: u64,
    },
    /// A text that is too long.
    #[error("field `{field}` is longer than {max} bytes")]
    TooLong {
        /// Its name in the protocol.
        field: &'static str,
        /// The most it may have.
        max: usize,
    },
    /// A length or block size that no volume can have.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A feature that this build doesn't have.
    #[error("{0} is not supported by this version")]
    Unsupported(&'static str),
}

impl From<WireError> for RpcError {
    fn from(error: WireError) -> Self {
        let message = error.to_string();
        match error {
            WireError::Geometry(_) => Self::new(
                Reason::GeometryInvalid,
                message,
                "give a length that is a multiple of the block size, a power of two from 4096 to 65536",
            ),
            _ => Self::invalid(message),
        }
    }
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        RpcError::from(error).into()
    }
}

fn sixteen(field: &'static str, bytes: &[u8]) -> Result<[u8; 16], WireError> {
    bytes.try_into().map_err(|_| WireError::Length {
        field,
        len: bytes.len(),
    })
}

fn text(field: &'static str, text: String) -> Result<String, WireError> {
    if text.len() > NAME_BYTES_MAX {
        return Err(WireError::TooLong {
            field,
            max: NAME_BYTES_MAX,
        });
    }
    Ok(text)
}

fn out(bytes: &[u8; 16]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

/// A volume's identity, from a field of 16 bytes.
///
/// # Errors
/// Where it has another length.
pub fn volume_id(bytes: &[u8]) -> Result<VolumeId, WireError> {
    sixteen("volume_id", bytes).map(VolumeId::from_bytes)
}

/// An interval's identity, from a field of 16 bytes.
///
/// # Errors
/// Where it has another length.
pub fn interval_id(bytes: &[u8]) -> Result<IntervalId, WireError> {
    sixteen("interval_id", bytes).map(IntervalId::from_bytes)
}

/// An image digest, from a field of 16 bytes.
///
/// # Errors
/// Where it has another length.
pub fn image_digest(bytes: &[u8]) -> Result<ImageDigest, WireError> {
    sixteen("image_digest", bytes).map(ImageDigest::from_bytes)
}

/// The field for an identity.
#[must_use]
pub fn volume_id_field(id: VolumeId) -> Bytes {
    out(id.as_bytes())
}

/// The field for an identity.
#[must_use]
pub fn interval_id_field(id: IntervalId) -> Bytes {
    out(id.as_bytes())
}

/// The field for a digest.
#[must_use]
pub fn image_digest_field(digest: ImageDigest) -> Bytes {
    out(digest.as_bytes())
}

/// A geometry that must be there.
///
/// # Errors
/// Where it is missing or no volume can have it.
pub fn geometry(message: Option<common::Geometry>) -> Result<Geometry, WireError> {
    message.ok_or(WireError::Missing("geometry"))?.try_into()
}

impl TryFrom<common::Geometry> for Geometry {
    type Error = WireError;

    fn try_from(m: common::Geometry) -> Result<Self, WireError> {
        Ok(Self::new(m.length, BlockSize::new(m.block_size)?)?)
    }
}

impl From<Geometry> for common::Geometry {
    fn from(g: Geometry) -> Self {
        Self {
            length: g.length(),
            block_size: g.block_size().get(),
        }
    }
}

fn coded<T>(
    field: &'static str,
    code: i32,
    from_code: fn(u8) -> Option<T>,
) -> Result<T, WireError> {
    u8::try_from(code)
        .ok()
        .and_then(from_code)
        .ok_or(WireError::Range {
            field,
            value: u64::from(code.unsigned_abs()),
        })
}

/// How good a cut is, from its number.
///
/// # Errors
/// Where the number stands for nothing.
pub fn coherence(code: i32) -> Result<Coherence, WireError> {
    coded("coherence", code, Coherence::from_code)
}

/// Why a cut was made, from its number.
///
/// # Errors
/// Where the number stands for nothing.
pub fn trigger(code: i32) -> Result<Trigger, WireError> {
    coded("trigger", code, Trigger::from_code)
}

#[cfg(test)]
mod tests {
    use tidemark_block::{
        BlockCount, BlockIndex, Checksum128, CutReason, Epoch, GenerationId, IntervalHeader,
        IntervalSeal, Receipt, WriterTerm,
    };

    use super::*;
    use crate::vault::v1 as vault;

    fn geometry_of(blocks: u64) -> Geometry {
        Geometry::new(blocks * 4096, BlockSize::MIN).unwrap()
    }

    fn header() -> IntervalHeader {
        IntervalHeader {
            volume: VolumeId::from_bytes([1; 16]),
            term: WriterTerm::new(3),
            interval: IntervalId::from_bytes([2; 16]),
            base: GenerationId::new(9),
            geometry: geometry_of(5),
            epoch: Epoch::new(7),
            cut_time_ms: 1_700_000_000_000,
            coherence: Coherence::Flushed,
            reason: CutReason::new("agent db went away"),
            trigger: Trigger::Request,
        }
    }

    fn receipt() -> Receipt {
        Receipt {
            volume: VolumeId::from_bytes([1; 16]),
            interval: IntervalId::from_bytes([2; 16]),
            generation: GenerationId::new(10),
            created: true,
            image_digest: ImageDigest::from_bytes([5; 16]),
            changed_blocks: BlockCount::new(4),
            frame_bytes: 77,
            cut_time_ms: 1,
            committed_time_ms: 2,
            coherence: Coherence::Crash,
            reason: CutReason::new("writes without a pause"),
            trigger: Trigger::Resync,
        }
    }

    #[test]
    fn every_message_of_a_ship_stream_survives_the_wire() {
        for message in [
            ShipMessage::Header(header()),
            ShipMessage::Frames(FrameBatch {
                end: BlockIndex::new(4),
                frames: Bytes::from_static(b"frames"),
            }),
            ShipMessage::Seal(IntervalSeal {
                changed_blocks: BlockCount::new(4),
                frame_count: 1,
                image_digest: ImageDigest::from_bytes([5; 16]),
            }),
        ] {
            let wire = vault::ShipRequest::from(message.clone());
            assert_eq!(ShipMessage::try_from(wire), Ok(message));
        }
        for answer in [
            ShipAnswer::Ready {
                durable_end: BlockIndex::new(3),
            },
            ShipAnswer::Ack {
                durable_end: BlockIndex::new(3),
                durable_bytes: 8,
            },
            ShipAnswer::Receipt(receipt()),
        ] {
            let wire = vault::ShipResponse::from(answer.clone());
            assert_eq!(ShipAnswer::try_from(wire), Ok(answer));
        }
    }

    #[test]
    fn terms_marks_and_digests_survive_the_wire() {
        let request = TermRequest {
            volume: VolumeId::from_bytes([1; 16]),
            volume_name: "data".into(),
            source_name: "host".into(),
            geometry: geometry_of(5),
            last_term: WriterTerm::ZERO,
            nonce: [9; 16],
        };
        let wire = vault::StartTermRequest::from(request.clone());
        assert_eq!(TermRequest::try_from(wire), Ok(request));
        let head = Head {
            generation: GenerationId::new(2),
            digest: ImageDigest::from_bytes([4; 16]),
            interval: IntervalId::from_bytes([2; 16]),
        };
        for head in [None, Some(head)] {
            let grant = TermGrant {
                term: WriterTerm::new(1),
                head,
                bytes_in_flight_max: 1,
            };
            let wire = vault::StartTermResponse::from(grant.clone());
            assert_eq!(TermGrant::try_from(wire), Ok(grant));
        }
        let mark = CurrentMark {
            volume: VolumeId::from_bytes([1; 16]),
            term: WriterTerm::new(3),
            interval: IntervalId::from_bytes([2; 16]),
            generation: GenerationId::new(2),
            image_digest: ImageDigest::from_bytes([4; 16]),
            cut_time_ms: 5,
        };
        let wire = vault::MarkCurrentRequest::from(mark.clone());
        assert_eq!(CurrentMark::try_from(wire), Ok(mark));
        let digests = DigestsRequest {
            volume: VolumeId::from_bytes([1; 16]),
            term: WriterTerm::new(3),
            generation: GenerationId::new(2),
            level: DigestLevel::Group,
            ranges: vec![NodeRange { start: 5, count: 2 }],
        };
        let wire = vault::GetBlockDigestsRequest::from(digests.clone());
        assert_eq!(DigestsRequest::try_from(wire), Ok(digests));
        let run = DigestRun {
            start: 5,
            digests: vec![
                Checksum128::from_bytes([1; 16]),
                Checksum128::from_bytes([2; 16]),
            ],
        };
        let wire = vault::GetBlockDigestsResponse::from(run.clone());
        assert_eq!(DigestRun::try_from(wire), Ok(run));
    }

    #[test]
    fn a_header_that_lacks_or_bends_anything_is_refused() {
        type Bend = fn(&mut vault::IntervalHeader);
        let cases: [(Bend, WireError); 8] = [
            (
                |h| h.volume_id = Bytes::from_static(b"short"),
                WireError::Length {
                    field: "volume_id",
                    len: 5,
                },
            ),
            (
                |h| h.interval_id = Bytes::new(),
                WireError::Length {
                    field: "interval_id",
                    len: 0,
                },
            ),
            (|h| h.geometry = None, WireError::Missing("geometry")),
            (
                |h| {
                    h.geometry = Some(common::Geometry {
                        length: 4096,
                        block_size: 512,
                    })
                },
                WireError::Geometry(GeometryError::BlockSize(512)),
            ),
            (
                |h| h.coherence = 0,
                WireError::Range {
                    field: "coherence",
                    value: 0,
                },
            ),
            (
                |h| h.trigger = 99,
                WireError::Range {
                    field: "trigger",
                    value: 99,
                },
            ),
            (
                |h| h.digest_kind = 1,
                WireError::Unsupported("this kind of digest"),
            ),
            (
                |h| h.key_id = Bytes::from_static(b"k"),
                WireError::Unsupported("encryption at the source"),
            ),
        ];
        for (bend, expected) in cases {
            let mut wire = vault::IntervalHeader::from(header());
            bend(&mut wire);
            assert_eq!(IntervalHeader::try_from(wire), Err(expected));
        }
        let empty = vault::ShipRequest { message: None };
        assert_eq!(
            ShipMessage::try_from(empty),
            Err(WireError::Missing("message"))
        );
    }

    #[test]
    fn ranges_of_nodes_are_bounded() {
        let request = |ranges| vault::GetBlockDigestsRequest {
            volume_id: Bytes::from_static(&[1; 16]),
            term: 1,
            generation: 1,
            level: 1,
            ranges,
        };
        let range = |start, count| vault::NodeRange { start, count };
        assert!(DigestsRequest::try_from(request(vec![range(0, 1); DIGEST_RANGES_MAX])).is_ok());
        for ranges in [
            vec![range(0, 1); DIGEST_RANGES_MAX + 1],
            vec![range(0, 0)],
            vec![range(u64::MAX, 1)],
        ] {
            assert!(matches!(
                DigestsRequest::try_from(request(ranges)),
                Err(WireError::Range { .. })
            ));
        }
    }

    #[test]
    fn the_numbers_of_the_wire_are_the_codes_of_the_domain() {
        for (wire, domain) in [
            (common::Coherence::Crash, Coherence::Crash),
            (common::Coherence::Lull, Coherence::Lull),
            (common::Coherence::Flushed, Coherence::Flushed),
            (common::Coherence::Quiesced, Coherence::Quiesced),
        ] {
            assert_eq!(coherence(wire.into()), Ok(domain));
        }
        for (wire, domain) in [
            (common::Trigger::Initial, Trigger::Initial),
            (common::Trigger::IntervalMax, Trigger::IntervalMax),
            (common::Trigger::ChangedBlocksMax, Trigger::ChangedBlocksMax),
            (common::Trigger::Request, Trigger::Request),
            (common::Trigger::Resync, Trigger::Resync),
            (common::Trigger::Schedule, Trigger::Schedule),
            (common::Trigger::Hint, Trigger::Hint),
        ] {
            assert_eq!(trigger(wire.into()), Ok(domain));
        }
    }
}
