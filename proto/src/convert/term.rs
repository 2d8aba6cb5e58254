//! StartTerm: which source may write, and what the vault holds.

use bytes::Bytes;
use tidemark_block::{GenerationId, Geometry, Head, VolumeId, WriterTerm};

use super::{
    WireError, geometry, image_digest, image_digest_field, interval_id, interval_id_field, out,
    sixteen, text, volume_id, volume_id_field,
};
use crate::vault::v1 as vault;

/// A request for a writer term.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TermRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Its name at the source; shown, not unique.
    pub volume_name: String,
    /// The source's name; shown.
    pub source_name: String,
    /// The volume's shape.
    pub geometry: Geometry,
    /// The term this source last held; 0 for a volume that the vault doesn't know yet.
    pub last_term: WriterTerm,
    /// Random, durable at the source before the first call: the same nonce gets the same answer.
    pub nonce: [u8; 16],
}

impl TryFrom<vault::StartTermRequest> for TermRequest {
    type Error = WireError;

    fn try_from(m: vault::StartTermRequest) -> Result<Self, WireError> {
        Ok(Self {
            volume: volume_id(&m.volume_id)?,
            volume_name: text("volume_name", m.volume_name)?,
            source_name: text("source_name", m.source_name)?,
            geometry: geometry(m.geometry)?,
            last_term: WriterTerm::new(m.last_term),
            nonce: sixteen("nonce", &m.nonce)?,
        })
    }
}

impl From<TermRequest> for vault::StartTermRequest {
    fn from(d: TermRequest) -> Self {
        Self {
            volume_id: volume_id_field(d.volume),
            volume_name: d.volume_name,
            source_name: d.source_name,
            geometry: Some(d.geometry.into()),
            last_term: d.last_term.get(),
            nonce: out(&d.nonce),
        }
    }
}

/// The vault's answer to a [`TermRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TermGrant {
    /// The term to write under.
    pub term: WriterTerm,
    /// None while the vault's image is the all-zero one.
    pub head: Option<Head>,
    /// Encoded bytes that the source may have sent and not seen acknowledged, per stream. Above zero.
    pub bytes_in_flight_max: u64,
}

impl TryFrom<vault::StartTermResponse> for TermGrant {
    type Error = WireError;

    fn try_from(m: vault::StartTermResponse) -> Result<Self, WireError> {
        if m.term == 0 {
            return Err(WireError::Range {
                field: "term",
                value: 0,
            });
        }
        if m.bytes_in_flight_max == 0 {
            return Err(WireError::Range {
                field: "bytes_in_flight_max",
                value: 0,
            });
        }
        let head = match m.head_generation {
            0 => None,
            generation => Some(Head {
                generation: GenerationId::new(generation),
                digest: image_digest(&m.head_digest)?,
                interval: interval_id(&m.head_interval_id)?,
            }),
        };
        Ok(Self {
            term: WriterTerm::new(m.term),
            head,
            bytes_in_flight_max: m.bytes_in_flight_max,
        })
    }
}

impl From<TermGrant> for vault::StartTermResponse {
    fn from(d: TermGrant) -> Self {
        Self {
            term: d.term.get(),
            head_generation: d.head.map_or(0, |h| h.generation.get()),
            head_digest: d
                .head
                .map_or_else(Bytes::new, |h| image_digest_field(h.digest)),
            head_interval_id: d
                .head
                .map_or_else(Bytes::new, |h| interval_id_field(h.interval)),
            bytes_in_flight_max: d.bytes_in_flight_max,
        }
    }
}
