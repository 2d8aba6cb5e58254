//! Ship and MarkCurrent: intervals on their way.

use bytes::Bytes;
use tidemark_block::{
    BlockCount, BlockIndex, CutReason, Epoch, GenerationId, ImageDigest, IntervalHeader,
    IntervalId, IntervalSeal, Receipt, VolumeId, WriterTerm,
};

use super::{
    DIGEST_KIND_XXH3, WireError, coherence, geometry, image_digest, image_digest_field,
    interval_id, interval_id_field, trigger, volume_id, volume_id_field,
};
use crate::{common::v1 as common, vault::v1 as vault};

impl TryFrom<vault::IntervalHeader> for IntervalHeader {
    type Error = WireError;

    fn try_from(m: vault::IntervalHeader) -> Result<Self, WireError> {
        if m.digest_kind != DIGEST_KIND_XXH3 {
            return Err(WireError::Unsupported("this kind of digest"));
        }
        if !m.key_id.is_empty() {
            return Err(WireError::Unsupported("encryption at the source"));
        }
        Ok(Self {
            volume: volume_id(&m.volume_id)?,
            term: WriterTerm::new(m.term),
            interval: interval_id(&m.interval_id)?,
            base: GenerationId::new(m.base_generation),
            geometry: geometry(m.geometry)?,
            epoch: Epoch::new(m.epoch),
            cut_time_ms: m.cut_time_ms,
            coherence: coherence(m.coherence)?,
            reason: CutReason::new(&m.coherence_reason),
            trigger: trigger(m.trigger)?,
        })
    }
}

impl From<IntervalHeader> for vault::IntervalHeader {
    fn from(d: IntervalHeader) -> Self {
        Self {
            volume_id: volume_id_field(d.volume),
            term: d.term.get(),
            interval_id: interval_id_field(d.interval),
            base_generation: d.base.get(),
            geometry: Some(d.geometry.into()),
            epoch: d.epoch.get(),
            cut_time_ms: d.cut_time_ms,
            coherence: i32::from(d.coherence.code()),
            trigger: i32::from(d.trigger.code()),
            digest_kind: DIGEST_KIND_XXH3,
            key_id: Bytes::new(),
            coherence_reason: d.reason.to_string(),
        }
    }
}

impl TryFrom<vault::IntervalSeal> for IntervalSeal {
    type Error = WireError;

    fn try_from(m: vault::IntervalSeal) -> Result<Self, WireError> {
        Ok(Self {
            changed_blocks: BlockCount::new(m.changed_blocks),
            frame_count: m.frame_count,
            image_digest: image_digest(&m.image_digest)?,
        })
    }
}

impl From<IntervalSeal> for vault::IntervalSeal {
    fn from(d: IntervalSeal) -> Self {
        Self {
            changed_blocks: d.changed_blocks.get(),
            frame_count: d.frame_count,
            image_digest: image_digest_field(d.image_digest),
        }
    }
}

/// Frames of an interval, or of a restore: every block below `end` has been sent with or before them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameBatch {
    /// The watermark after this batch.
    pub end: BlockIndex,
    /// Whole encoded frames, not verified.
    pub frames: Bytes,
}

impl From<vault::FrameBatch> for FrameBatch {
    fn from(m: vault::FrameBatch) -> Self {
        Self {
            end: BlockIndex::new(m.end_block),
            frames: m.frames,
        }
    }
}

impl From<FrameBatch> for vault::FrameBatch {
    fn from(d: FrameBatch) -> Self {
        Self {
            end_block: d.end.get(),
            frames: d.frames,
        }
    }
}

/// One message of a source's `Ship` stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShipMessage {
    /// The first one.
    Header(IntervalHeader),
    /// In ascending order of blocks.
    Frames(FrameBatch),
    /// The last one.
    Seal(IntervalSeal),
}

impl TryFrom<vault::ShipRequest> for ShipMessage {
    type Error = WireError;

    fn try_from(m: vault::ShipRequest) -> Result<Self, WireError> {
        use vault::ship_request::Message;
        Ok(match m.message.ok_or(WireError::Missing("message"))? {
            Message::Header(header) => Self::Header(header.try_into()?),
            Message::Frames(batch) => Self::Frames(batch.into()),
            Message::Seal(seal) => Self::Seal(seal.try_into()?),
        })
    }
}

impl From<ShipMessage> for vault::ShipRequest {
    fn from(d: ShipMessage) -> Self {
        use vault::ship_request::Message;
        Self {
            message: Some(match d {
                ShipMessage::Header(header) => Message::Header(header.into()),
                ShipMessage::Frames(batch) => Message::Frames(batch.into()),
                ShipMessage::Seal(seal) => Message::Seal(seal.into()),
            }),
        }
    }
}

/// One message of the vault's side of a `Ship` stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShipAnswer {
    /// To the header: every changed block below this one is durable, go on from here.
    Ready {
        /// 0 for a new interval.
        durable_end: BlockIndex,
    },
    /// Parts became durable.
    Ack {
        /// Every changed block below this one is durable.
        durable_end: BlockIndex,
        /// Encoded bytes of this stream that are durable.
        durable_bytes: u64,
    },
    /// The interval is committed; the last message.
    Receipt(Receipt),
}

impl TryFrom<vault::ShipResponse> for ShipAnswer {
    type Error = WireError;

    fn try_from(m: vault::ShipResponse) -> Result<Self, WireError> {
        use vault::ship_response::Message;
        Ok(match m.message.ok_or(WireError::Missing("message"))? {
            Message::Ready(ready) => Self::Ready {
                durable_end: BlockIndex::new(ready.durable_end_block),
            },
            Message::Ack(ack) => Self::Ack {
                durable_end: BlockIndex::new(ack.durable_end_block),
                durable_bytes: ack.durable_bytes,
            },
            Message::Receipt(receipt) => Self::Receipt(receipt.try_into()?),
        })
    }
}

impl From<ShipAnswer> for vault::ShipResponse {
    fn from(d: ShipAnswer) -> Self {
        use vault::ship_response::Message;
        Self {
            message: Some(match d {
                ShipAnswer::Ready { durable_end } => Message::Ready(vault::Ready {
                    durable_end_block: durable_end.get(),
                }),
                ShipAnswer::Ack {
                    durable_end,
                    durable_bytes,
                } => Message::Ack(vault::Ack {
                    durable_end_block: durable_end.get(),
                    durable_bytes,
                }),
                ShipAnswer::Receipt(receipt) => Message::Receipt(receipt.into()),
            }),
        }
    }
}

impl TryFrom<common::Receipt> for Receipt {
    type Error = WireError;

    fn try_from(m: common::Receipt) -> Result<Self, WireError> {
        Ok(Self {
            volume: volume_id(&m.volume_id)?,
            interval: interval_id(&m.interval_id)?,
            generation: GenerationId::new(m.generation),
            created: m.created,
            image_digest: image_digest(&m.image_digest)?,
            changed_blocks: BlockCount::new(m.changed_blocks),
            frame_bytes: m.frame_bytes,
            cut_time_ms: m.cut_time_ms,
            committed_time_ms: m.committed_time_ms,
            coherence: coherence(m.coherence)?,
            reason: CutReason::new(&m.coherence_reason),
            trigger: trigger(m.trigger)?,
        })
    }
}

impl From<Receipt> for common::Receipt {
    fn from(d: Receipt) -> Self {
        Self {
            volume_id: volume_id_field(d.volume),
            interval_id: interval_id_field(d.interval),
            generation: d.generation.get(),
            created: d.created,
            image_digest: image_digest_field(d.image_digest),
            changed_blocks: d.changed_blocks.get(),
            frame_bytes: d.frame_bytes,
            cut_time_ms: d.cut_time_ms,
            committed_time_ms: d.committed_time_ms,
            coherence: i32::from(d.coherence.code()),
            trigger: i32::from(d.trigger.code()),
            coherence_reason: d.reason.to_string(),
        }
    }
}

/// Says that an interval had no changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CurrentMark {
    /// The volume.
    pub volume: VolumeId,
    /// Under which term the source writes.
    pub term: WriterTerm,
    /// The interval without changes.
    pub interval: IntervalId,
    /// What is still current; 0 where the image still is the all-zero one.
    pub generation: GenerationId,
    /// Of the image, as the source computed it.
    pub image_digest: ImageDigest,
    /// When the cut was made.
    pub cut_time_ms: u64,
}

impl TryFrom<vault::MarkCurrentRequest> for CurrentMark {
    type Error = WireError;

    fn try_from(m: vault::MarkCurrentRequest) -> Result<Self, WireError> {
        Ok(Self {
            volume: volume_id(&m.volume_id)?,
            term: WriterTerm::new(m.term),
            interval: interval_id(&m.interval_id)?,
            generation: GenerationId::new(m.generation),
            image_digest: image_digest(&m.image_digest)?,
            cut_time_ms: m.cut_time_ms,
        })
    }
}

impl From<CurrentMark> for vault::MarkCurrentRequest {
    fn from(d: CurrentMark) -> Self {
        Self {
            volume_id: volume_id_field(d.volume),
            term: d.term.get(),
            interval_id: interval_id_field(d.interval),
            generation: d.generation.get(),
            image_digest: image_digest_field(d.image_digest),
            cut_time_ms: d.cut_time_ms,
        }
    }
}
