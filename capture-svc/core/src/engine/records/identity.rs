//! Who owns a volume's state, and how it was left.

use tidemark_block::{
    BlockSize, Checksum128, Geometry, VolumeId,
    wire::{Reader, WireError, seal, unseal},
};

use super::{
    super::{damage::StateFile, media::Record},
    COUNTER_MAX, RecordError, VERSION,
};

/// Magic of [`Identity::encode`].
pub const IDENTITY_MAGIC: [u8; 8] = *b"TMIDENT\0";
/// Version of a state that has neither digests nor records that say nothing.
const VERSION_OLD: u16 = 1;

/// The files whose digests a clean close leaves, in their order. `intent` and `spool.data` are not among them: every
/// part of them is sealed by itself.
pub const SEALED: [StateFile; 7] = [
    StateFile::Tracking,
    StateFile::Dirty(0),
    StateFile::Dirty(1),
    StateFile::Slots,
    StateFile::Record(Record::Carry),
    StateFile::Record(Record::Interval),
    StateFile::Record(Record::Snapshots),
];

/// The digests of the files of [`SEALED`].
pub type Seals = [Checksum128; SEALED.len()];

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
    /// Written by 0.1.0, and so is the rest of the state, or part of it. Never written any more.
    pub old: bool,
    /// What the files were when it was closed cleanly. None once they may have changed.
    pub seals: Option<Seals>,
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
        let marks = u32::from(self.clean)
            | u32::from(self.failed) << 1
            | u32::from(self.seals.is_some()) << 2;
        payload.extend_from_slice(&marks.to_le_bytes());
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
        for digest in self.seals.unwrap_or([Checksum128::ZERO; SEALED.len()]) {
            payload.extend_from_slice(digest.as_bytes());
        }
        seal(IDENTITY_MAGIC, VERSION, &payload)
    }

    /// Decodes the record.
    ///
    /// # Errors
    /// Where the bytes are no such record.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let (version, payload) = unseal(IDENTITY_MAGIC, VERSION, bytes)?;
        let old = version == VERSION_OLD;
        let mut reader = Reader::new(payload);
        let volume = VolumeId::from_bytes(reader.array()?);
        let length = reader.u64()?;
        let geometry = Geometry::new(length, BlockSize::new(reader.u32()?)?)?;
        let (clean, failed, sealed) = match reader.u32()? {
            0 => (false, false, false),
            1 => (true, false, false),
            2 => (false, true, false),
            5 if !old => (true, false, true),
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
        let mut seals = [Checksum128::ZERO; SEALED.len()];
        if !old {
            for digest in &mut seals {
                *digest = Checksum128::from_bytes(reader.array()?);
            }
        }
        if !sealed && seals.iter().any(|digest| !digest.is_zero()) {
            return Err(WireError::Range("seals").into());
        }
        reader.end()?;
        Ok(Self {
            volume,
            geometry,
            clean,
            failed,
            old,
            seals: sealed.then_some(seals),
            epoch_limit,
            file,
            state,
        })
    }
}
