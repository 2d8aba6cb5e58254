//! The records of a volume's state that are replaced as a whole, and their bytes (`docs/FORMAT-CAPTURE.md`).
//!
//! Each is always there, also where it says nothing, and names its volume: one that is missing, or another volume's,
//! is never taken for one that says nothing.

mod identity;
pub mod old;

use thiserror::Error;
use tidemark_block::{
    BlockSet, Coherence, CutReason, Extent, Geometry, GeometryError, VolumeId,
    wire::{Reader, WireError, seal, unseal},
};

pub use identity::{FileIdentity, IDENTITY_MAGIC, Identity, Place, SEALED, Seals};

use super::media::Map;

/// Version of the records, and of the files whose words have changed since 0.1.0.
const VERSION: u16 = 2;
/// Magic of [`encode_carry`].
pub const CARRY_MAGIC: [u8; 8] = *b"TMCARRY\0";
/// Magic of [`encode_interval`].
pub const CUT_MAGIC: [u8; 8] = *b"TMCUTSET";
/// Magic of [`Changes::encode`].
pub const CHANGES_MAGIC: [u8; 8] = *b"TMCHANGE";
const CHANGES_VERSION: u16 = 1;
/// Magic of [`SnapshotTable::encode`].
pub const SNAPSHOTS_MAGIC: [u8; 8] = *b"TMSNAPS\0";
/// Of the snapshots with their grades.
const SNAPSHOTS_VERSION: u16 = 3;
/// Why a snapshot whose grade was not recorded is no better than as after a power cut.
pub const UNGRADED: &str = "no grade was recorded";
/// Magic of the header of `tracking`.
pub const TRACKING_MAGIC: [u8; 8] = *b"TMTRACK\0";
/// Magic of the header of `dirty.0` and `dirty.1`.
pub const DIRTY_MAGIC: [[u8; 8]; 2] = [*b"TMDIRTY0", *b"TMDIRTY1"];
/// Magic of the header of `spool.slots`.
pub const SLOTS_MAGIC: [u8; 8] = *b"TMSLOTS\0";
const SLOTS_VERSION: u16 = 1;
/// Epochs and numbers only ever rise: there must be room to.
const COUNTER_MAX: u64 = 1 << 62;
/// The most bytes of a snapshot's label.
pub const LABEL_MAX: usize = 255;

/// Why a record can't be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RecordError {
    /// The bytes are not such a record.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It names an impossible geometry.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A label isn't text.
    #[error("a label is not UTF-8")]
    Label,
    /// Another volume's.
    #[error("it is that of volume {0}")]
    Volume(VolumeId),
    /// That of another cut.
    #[error("it is that of cut {0}")]
    Cut(u64),
    /// Of a version that an opening has converted.
    #[error("it is of version {0}, which is converted at an opening and not found after it")]
    Old(u16),
}

/// The header of a mapped file: whose it is. A file with another header isn't ours.
#[must_use]
pub fn encode_map_header(map: Map, volume: VolumeId, geometry: Geometry) -> Vec<u8> {
    match map {
        Map::Slots => map_header(map, SLOTS_VERSION, volume, geometry),
        Map::Tracking | Map::Dirty(_) => map_header(map, VERSION, volume, geometry),
    }
}

fn map_header(map: Map, version: u16, volume: VolumeId, geometry: Geometry) -> Vec<u8> {
    let magic = match map {
        Map::Tracking => TRACKING_MAGIC,
        Map::Dirty(parity) => DIRTY_MAGIC[usize::from(parity & 1)],
        Map::Slots => SLOTS_MAGIC,
    };
    let mut payload = volume.as_bytes().to_vec();
    payload.extend_from_slice(&geometry.length().to_le_bytes());
    payload.extend_from_slice(&geometry.block_size().get().to_le_bytes());
    seal(magic, version, &payload)
}

/// The fields behind the volume, which must be the one expected.
fn open_record(
    magic: [u8; 8],
    version: u16,
    bytes: &[u8],
    volume: VolumeId,
) -> Result<Reader<'_>, RecordError> {
    let (found, payload) = unseal(magic, version, bytes)?;
    if found != version {
        return Err(RecordError::Old(found));
    }
    owned(payload, volume)
}

/// The fields behind the volume, which must be the one expected.
fn owned(payload: &[u8], volume: VolumeId) -> Result<Reader<'_>, RecordError> {
    let mut reader = Reader::new(payload);
    let owner = VolumeId::from_bytes(reader.array()?);
    if owner == volume {
        Ok(reader)
    } else {
        Err(RecordError::Volume(owner))
    }
}

/// Appends how good the moment of a cut was, and why no better.
pub(crate) fn put_grade(out: &mut Vec<u8>, coherence: Coherence, reason: &CutReason) {
    out.push(coherence.code());
    reason.encode(out);
}

/// Reads what [`put_grade`] wrote.
pub(crate) fn grade(reader: &mut Reader<'_>) -> Result<(Coherence, CutReason), WireError> {
    let coherence = Coherence::from_code(reader.u8()?).ok_or(WireError::Range("coherence"))?;
    Ok((coherence, CutReason::decode(reader)?))
}

/// That of a snapshot of before grades were recorded.
pub(crate) fn no_grade() -> (Coherence, CutReason) {
    (Coherence::Crash, CutReason::new(UNGRADED))
}

/// Encodes the carry.
#[must_use]
pub fn encode_carry(volume: VolumeId, carry: &BlockSet) -> Vec<u8> {
    let mut payload = volume.as_bytes().to_vec();
    payload.extend_from_slice(&carry.encode());
    seal(CARRY_MAGIC, VERSION, &payload)
}

/// Decodes the carry of a volume with these blocks.
///
/// # Errors
/// Where the bytes are no carry, or one of another volume.
pub fn decode_carry(bytes: &[u8], volume: VolumeId, all: Extent) -> Result<BlockSet, RecordError> {
    let reader = open_record(CARRY_MAGIC, VERSION, bytes, volume)?;
    Ok(BlockSet::decode(reader.rest(), all)?)
}

/// Encodes the open interval: its cut and the blocks that changed up to it; or that none is open.
#[must_use]
pub fn encode_interval(volume: VolumeId, open: Option<(u64, &BlockSet)>) -> Vec<u8> {
    let nothing = BlockSet::new();
    let (cut, changed) = open.unwrap_or((0, &nothing));
    let mut payload = volume.as_bytes().to_vec();
    payload.extend_from_slice(&cut.to_le_bytes());
    payload.extend_from_slice(&changed.encode());
    seal(CUT_MAGIC, VERSION, &payload)
}

/// Decodes what [`encode_interval`] made.
///
/// # Errors
/// Where the bytes are no such record.
pub fn decode_interval(
    bytes: &[u8],
    volume: VolumeId,
    all: Extent,
) -> Result<Option<(u64, BlockSet)>, RecordError> {
    let mut reader = open_record(CUT_MAGIC, VERSION, bytes, volume)?;
    let cut = reader.u64()?;
    let changed = BlockSet::decode(reader.rest(), all)?;
    match (cut, changed.is_empty()) {
        (0, true) => Ok(None),
        (0, false) => Err(WireError::Range("cut").into()),
        _ => Ok(Some((cut, changed))),
    }
}

/// The blocks that changed in some epochs, for whoever asks what changed between two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// The last of the epochs.
    pub cut: u64,
    /// The cut of the record before this one, 0 for none: what the next older epochs changed is there.
    pub since: u64,
    /// The blocks.
    pub blocks: BlockSet,
}

impl Changes {
    /// The record's bytes.
    #[must_use]
    pub fn encode(&self, volume: VolumeId) -> Vec<u8> {
        let mut payload = volume.as_bytes().to_vec();
        payload.extend_from_slice(&self.cut.to_le_bytes());
        payload.extend_from_slice(&self.since.to_le_bytes());
        payload.extend_from_slice(&self.blocks.encode());
        seal(CHANGES_MAGIC, CHANGES_VERSION, &payload)
    }

    /// Decodes the record of a cut.
    ///
    /// # Errors
    /// Where the bytes are no such record, or another cut's.
    pub fn decode(
        bytes: &[u8],
        volume: VolumeId,
        cut: u64,
        all: Extent,
    ) -> Result<Self, RecordError> {
        let mut reader = open_record(CHANGES_MAGIC, CHANGES_VERSION, bytes, volume)?;
        let (found, since) = (reader.u64()?, reader.u64()?);
        if found != cut {
            return Err(RecordError::Cut(found));
        }
        if since >= cut {
            return Err(WireError::Range("cut before").into());
        }
        let blocks = BlockSet::decode(reader.rest(), all)?;
        Ok(Self { cut, since, blocks })
    }
}

/// A user's snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, from 1.
    pub id: u64,
    /// Its cut.
    pub cut: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// The cut of the newest record of changes when it was taken, 0 for none.
    pub changes: u64,
    /// How good the moment of its cut was.
    pub coherence: Coherence,
    /// Why it was no better.
    pub reason: CutReason,
    /// At most [`LABEL_MAX`] bytes.
    pub label: String,
}

/// All snapshots of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotTable {
    /// The highest number given so far.
    pub last_id: u64,
    /// Oldest first.
    pub snapshots: Vec<Snapshot>,
}

impl SnapshotTable {
    /// The record's bytes.
    #[must_use]
    pub fn encode(&self, volume: VolumeId) -> Vec<u8> {
        let mut payload = volume.as_bytes().to_vec();
        payload.extend_from_slice(&self.last_id.to_le_bytes());
        payload.extend_from_slice(&(self.snapshots.len() as u64).to_le_bytes());
        for snapshot in &self.snapshots {
            for field in [
                snapshot.id,
                snapshot.cut,
                snapshot.time_ms,
                snapshot.changes,
            ] {
                payload.extend_from_slice(&field.to_le_bytes());
            }
            put_grade(&mut payload, snapshot.coherence, &snapshot.reason);
            let label = &snapshot.label.as_bytes()[..snapshot.label.len().min(LABEL_MAX)];
            payload.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
            payload.extend_from_slice(label);
        }
        seal(SNAPSHOTS_MAGIC, SNAPSHOTS_VERSION, &payload)
    }

    /// Decodes the record, that without grades too.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(bytes: &[u8], volume: VolumeId) -> Result<Self, RecordError> {
        let (version, payload) = unseal(SNAPSHOTS_MAGIC, SNAPSHOTS_VERSION, bytes)?;
        if version < VERSION {
            return Err(RecordError::Old(version));
        }
        Self::read(owned(payload, volume)?, version)
    }

    /// Reads the fields as a version has them.
    fn read(mut reader: Reader<'_>, version: u16) -> Result<Self, RecordError> {
        let last_id = reader.u64()?;
        let count = reader.u64()?;
        let mut snapshots = Vec::new();
        for _ in 0..count {
            let (id, cut, time_ms) = (reader.u64()?, reader.u64()?, reader.u64()?);
            let changes = match version {
                ..VERSION => 0,
                VERSION.. => reader.u64()?,
            };
            let (coherence, reason) = match version {
                ..SNAPSHOTS_VERSION => no_grade(),
                SNAPSHOTS_VERSION.. => grade(&mut reader)?,
            };
            let length = reader.u8()?;
            let label = std::str::from_utf8(reader.bytes(length.into())?)
                .map_err(|_| RecordError::Label)?;
            snapshots.push(Snapshot {
                id,
                cut,
                time_ms,
                changes,
                coherence,
                reason,
                label: label.to_owned(),
            });
        }
        reader.end()?;
        let ascending = snapshots.is_sorted_by(|a, b| a.cut < b.cut);
        let numbered = last_id <= COUNTER_MAX && snapshots.iter().all(|s| s.id <= last_id);
        if !numbered {
            Err(WireError::Range("number of a snapshot").into())
        } else if !ascending {
            Err(WireError::Range("order of snapshots").into())
        } else if snapshots.iter().any(|s| s.changes > s.cut) {
            Err(WireError::Range("changes of a snapshot").into())
        } else {
            Ok(Self { last_id, snapshots })
        }
    }
}
