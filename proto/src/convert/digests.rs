//! GetBlockDigests: the vault's checksum table, for resync.

use tidemark_block::{Checksum128, GenerationId, VolumeId, WriterTerm};

use super::{WireError, volume_id, volume_id_field};
use crate::vault::v1 as vault;

/// The most ranges of one [`DigestsRequest`].
pub const DIGEST_RANGES_MAX: usize = 4096;

/// A level of the tree of checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestLevel {
    /// 32 groups each: 4 MiB of 4 KiB blocks.
    Leaf,
    /// 32 blocks each.
    Group,
    /// The checksums of blocks.
    Block,
}

/// Node numbers at one level: `[start, start + count)`, within 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeRange {
    /// The first node.
    pub start: u64,
    /// How many; at least one.
    pub count: u64,
}

/// Asks for parts of the vault's checksum table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DigestsRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Under which term the source writes.
    pub term: WriterTerm,
    /// Must be the head: the table is that of the head.
    pub generation: GenerationId,
    /// Of the nodes.
    pub level: DigestLevel,
    /// At most [`DIGEST_RANGES_MAX`].
    pub ranges: Vec<NodeRange>,
}

impl TryFrom<vault::GetBlockDigestsRequest> for DigestsRequest {
    type Error = WireError;

    fn try_from(m: vault::GetBlockDigestsRequest) -> Result<Self, WireError> {
        if m.ranges.len() > DIGEST_RANGES_MAX {
            return Err(WireError::Range {
                field: "ranges",
                value: m.ranges.len() as u64,
            });
        }
        let range = |r: vault::NodeRange| match r.start.checked_add(r.count) {
            Some(_) if r.count > 0 => Ok(NodeRange {
                start: r.start,
                count: r.count,
            }),
            _ => Err(WireError::Range {
                field: "count",
                value: r.count,
            }),
        };
        Ok(Self {
            volume: volume_id(&m.volume_id)?,
            term: WriterTerm::new(m.term),
            generation: GenerationId::new(m.generation),
            level: match vault::DigestLevel::try_from(m.level) {
                Ok(vault::DigestLevel::Leaf) => DigestLevel::Leaf,
                Ok(vault::DigestLevel::Group) => DigestLevel::Group,
                Ok(vault::DigestLevel::Block) => DigestLevel::Block,
                Ok(vault::DigestLevel::Unspecified) | Err(_) => {
                    return Err(WireError::Range {
                        field: "level",
                        value: u64::from(m.level.unsigned_abs()),
                    });
                }
            },
            ranges: m.ranges.into_iter().map(range).collect::<Result<_, _>>()?,
        })
    }
}

impl From<DigestsRequest> for vault::GetBlockDigestsRequest {
    fn from(d: DigestsRequest) -> Self {
        Self {
            volume_id: volume_id_field(d.volume),
            term: d.term.get(),
            generation: d.generation.get(),
            level: match d.level {
                DigestLevel::Leaf => vault::DigestLevel::Leaf,
                DigestLevel::Group => vault::DigestLevel::Group,
                DigestLevel::Block => vault::DigestLevel::Block,
            }
            .into(),
            ranges: d
                .ranges
                .into_iter()
                .map(|r| vault::NodeRange {
                    start: r.start,
                    count: r.count,
                })
                .collect(),
        }
    }
}

/// A run of nodes that are not zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DigestRun {
    /// The first node.
    pub start: u64,
    /// One after the other.
    pub digests: Vec<Checksum128>,
}

impl TryFrom<vault::GetBlockDigestsResponse> for DigestRun {
    type Error = WireError;

    fn try_from(m: vault::GetBlockDigestsResponse) -> Result<Self, WireError> {
        let (digests, rest) = m.digests.as_chunks::<16>();
        if !rest.is_empty() {
            return Err(WireError::Length {
                field: "digests",
                len: rest.len(),
            });
        }
        if m.start.checked_add(digests.len() as u64).is_none() {
            return Err(WireError::Range {
                field: "start",
                value: m.start,
            });
        }
        Ok(Self {
            start: m.start,
            digests: digests
                .iter()
                .map(|d| Checksum128::from_bytes(*d))
                .collect(),
        })
    }
}

impl From<DigestRun> for vault::GetBlockDigestsResponse {
    fn from(d: DigestRun) -> Self {
        Self {
            start: d.start,
            digests: d
                .digests
                .iter()
                .flat_map(|c| *c.as_bytes())
                .collect::<Vec<u8>>()
                .into(),
        }
    }
}
