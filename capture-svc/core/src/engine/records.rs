//! The records of a volume's state that are replaced as a whole, and their bytes (`docs/FORMAT-CAPTURE.md`).

use thiserror::Error;
use tidemark_block::{
    BlockSet, BlockSize, Extent, Geometry, GeometryError, VolumeId,
    wire::{Reader, WireError, seal, unseal},
};

const VERSION: u16 = 1;
/// Magic of [`encode_carry`].
pub const CARRY_MAGIC: [u8; 8] = *b"TMCARRY\0";
/// Magic of [`encode_cut`].
pub const CUT_MAGIC: [u8; 8] = *b"TMCUTSET";
/// Magic of [`SnapshotTable::encode`].
pub const SNAPSHOTS_MAGIC: [u8; 8] = *b"TMSNAPS\0";
/// Magic of [`Identity::encode`].
pub const IDENTITY_MAGIC: [u8; 8] = *b"TMIDENT\0";
/// Magic of the header of `tracking`.
pub const TRACKING_MAGIC: [u8; 8] = *b"TMTRACK\0";
/// Magic of the header of `dirty.0` and `dirty.1`.
pub const DIRTY_MAGIC: [[u8; 8]; 2] = [*b"TMDIRTY0", *b"TMDIRTY1"];
/// Magic of the header of `spool.slots`.
pub const SLOTS_MAGIC: [u8; 8] = *b"TMSLOTS\0";
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
}

/// The header of a mapped file: whose it is. A file with another header isn't ours.
#[must_use]
pub fn encode_map_header(magic: [u8; 8], volume: VolumeId, geometry: Geometry) -> Vec<u8> {
    let mut payload = volume.as_bytes().to_vec();
    payload.extend_from_slice(&geometry.length().to_le_bytes());
    payload.extend_from_slice(&geometry.block_size().get().to_le_bytes());
    seal(magic, VERSION, &payload)
}

/// Encodes the carry.
#[must_use]
pub fn encode_carry(carry: &BlockSet) -> Vec<u8> {
    seal(CARRY_MAGIC, VERSION, &carry.encode())
}

/// Decodes the carry of a volume with these blocks.
///
/// # Errors
/// Where the bytes are no carry, or one of another volume.
pub fn decode_carry(bytes: &[u8], all: Extent) -> Result<BlockSet, RecordError> {
    let (_, payload) = unseal(CARRY_MAGIC, VERSION, bytes)?;
    Ok(BlockSet::decode(payload, all)?)
}

/// Encodes a cut and the blocks that changed up to it: the open interval, or the changes since another cut.
#[must_use]
pub fn encode_cut(cut: u64, changed: &BlockSet) -> Vec<u8> {
    let mut payload = cut.to_le_bytes().to_vec();
    payload.extend_from_slice(&changed.encode());
    seal(CUT_MAGIC, VERSION, &payload)
}

/// Decodes what [`encode_cut`] made.
///
/// # Errors
/// Where the bytes are no such record.
pub fn decode_cut(bytes: &[u8], all: Extent) -> Result<(u64, BlockSet), RecordError> {
    let (_, payload) = unseal(CUT_MAGIC, VERSION, bytes)?;
    let mut reader = Reader::new(payload);
    let cut = reader.u64()?;
    Ok((cut, BlockSet::decode(reader.rest(), all)?))
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
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = self.last_id.to_le_bytes().to_vec();
        payload.extend_from_slice(&(self.snapshots.len() as u64).to_le_bytes());
        for snapshot in &self.snapshots {
            for field in [snapshot.id, snapshot.cut, snapshot.time_ms] {
                payload.extend_from_slice(&field.to_le_bytes());
            }
            let label = &snapshot.label.as_bytes()[..snapshot.label.len().min(LABEL_MAX)];
            payload.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
            payload.extend_from_slice(label);
        }
        seal(SNAPSHOTS_MAGIC, VERSION, &payload)
    }

    /// Decodes the record.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let (_, payload) = unseal(SNAPSHOTS_MAGIC, VERSION, bytes)?;
        let mut reader = Reader::new(payload);
        let last_id = reader.u64()?;
        let count = reader.u64()?;
        let mut snapshots = Vec::new();
        for _ in 0..count {
            let (id, cut, time_ms) = (reader.u64()?, reader.u64()?, reader.u64()?);
            let length = reader.u8()?;
            let label = std::str::from_utf8(reader.bytes(length.into())?)
                .map_err(|_| RecordError::Label)?;
            snapshots.push(Snapshot {
                id,
                cut,
                time_ms,
                label: label.to_owned(),
            });
        }
        reader.end()?;
        let ascending = snapshots.is_sorted_by(|a, b| a.cut < b.cut);
        let numbered = last_id <= COUNTER_MAX && snapshots.iter().all(|s| s.id <= last_id);
        if !numbered {
            Err(WireError::Range("number of a snapshot").into())
        } else if ascending {
            Ok(Self { last_id, snapshots })
        } else {
            Err(WireError::Range("order of snapshots").into())
        }
    }
}

/// What tells a volume file from every other, and one life of it from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileIdentity {
    /// Of the running kernel.
    pub boot: [u8; 16],
    /// Of the mount through which the file is reached.
    pub mount: u64,
    /// UUID of the filesystem, or what stands for it.
    pub filesystem: [u8; 16],
    /// Number of the device; may change with a boot.
    pub device: u64,
    /// Number of the inode.
    pub inode: u64,
    /// Time of the last modification: seconds since 1970.
    pub modified_s: i64,
    /// And nanoseconds.
    pub modified_ns: u32,
    /// Time at which it was created: seconds since 1970; with `born_ns` 0 where the filesystem doesn't tell.
    pub born_s: i64,
    /// And nanoseconds.
    pub born_ns: u32,
}

/// What tells one life of the filesystem that holds the state from the next, and the state from a copy of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Of the mount through which it is reached.
    pub mount: u64,
    /// UUID of the filesystem, or what stands for it.
    pub filesystem: [u8; 16],
    /// Number of the device; may change with a boot.
    pub device: u64,
    /// Number of the inode of the file `tracking`.
    pub inode: u64,
    /// When that file was created: seconds since 1970; 0 with the next where the filesystem doesn't tell.
    pub born_s: i64,
    /// And nanoseconds.
    pub born_ns: u32,
}

/// Who owns the state, and how it was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The volume.
    pub volume: VolumeId,
    /// Its geometry.
    pub geometry: Geometry,
    /// Closed cleanly: all of the state is durable.
    pub clean: bool,
    /// A sync of the state's files failed: what is read of them now may not last.
    pub failed: bool,
    /// Every epoch used so far is below it.
    pub epoch_limit: u64,
    /// The volume's file.
    pub file: FileIdentity,
    /// The state's directory.
    pub state: Place,
}

impl Identity {
    /// The record's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = self.volume.as_bytes().to_vec();
        payload.extend_from_slice(&self.geometry.length().to_le_bytes());
        payload.extend_from_slice(&self.geometry.block_size().get().to_le_bytes());
        payload.extend_from_slice(
            &(u32::from(self.clean) | u32::from(self.failed) << 1).to_le_bytes(),
        );
        payload.extend_from_slice(&self.epoch_limit.to_le_bytes());
        payload.extend_from_slice(&self.file.boot);
        payload.extend_from_slice(&self.file.mount.to_le_bytes());
        payload.extend_from_slice(&self.file.filesystem);
        payload.extend_from_slice(&self.file.device.to_le_bytes());
        payload.extend_from_slice(&self.file.inode.to_le_bytes());
        payload.extend_from_slice(&self.file.modified_s.to_le_bytes());
        payload.extend_from_slice(&self.file.modified_ns.to_le_bytes());
        payload.extend_from_slice(&self.state.mount.to_le_bytes());
        payload.extend_from_slice(&self.state.filesystem);
        payload.extend_from_slice(&self.state.device.to_le_bytes());
        payload.extend_from_slice(&self.file.born_s.to_le_bytes());
        payload.extend_from_slice(&self.file.born_ns.to_le_bytes());
        payload.extend_from_slice(&self.state.inode.to_le_bytes());
        payload.extend_from_slice(&self.state.born_s.to_le_bytes());
        payload.extend_from_slice(&self.state.born_ns.to_le_bytes());
        seal(IDENTITY_MAGIC, VERSION, &payload)
    }

    /// Decodes the record.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let (_, payload) = unseal(IDENTITY_MAGIC, VERSION, bytes)?;
        let mut reader = Reader::new(payload);
        let volume = VolumeId::from_bytes(reader.array()?);
        let length = reader.u64()?;
        let geometry = Geometry::new(length, BlockSize::new(reader.u32()?)?)?;
        let (clean, failed) = match reader.u32()? {
            0 => (false, false),
            1 => (true, false),
            2 => (false, true),
            _ => return Err(WireError::Range("clean mark").into()),
        };
        let epoch_limit = reader.u64()?;
        if !(1..=COUNTER_MAX).contains(&epoch_limit) {
            return Err(WireError::Range("epoch limit").into());
        }
        let mut file = FileIdentity {
            boot: reader.array()?,
            mount: reader.u64()?,
            filesystem: reader.array()?,
            device: reader.u64()?,
            inode: reader.u64()?,
            modified_s: i64::from_le_bytes(reader.array()?),
            modified_ns: reader.u32()?,
            ..FileIdentity::default()
        };
        let mut state = Place {
            mount: reader.u64()?,
            filesystem: reader.array()?,
            device: reader.u64()?,
            ..Place::default()
        };
        file.born_s = i64::from_le_bytes(reader.array()?);
        file.born_ns = reader.u32()?;
        state.inode = reader.u64()?;
        state.born_s = i64::from_le_bytes(reader.array()?);
        state.born_ns = reader.u32()?;
        reader.end()?;
        Ok(Self {
            volume,
            geometry,
            clean,
            failed,
            epoch_limit,
            file,
            state,
        })
    }
}
