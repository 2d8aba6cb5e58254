//! The head of the file that a rollback is carried out from. `docs/FORMAT-CAPTURE.md` has its bytes.

use tidemark_block::{
    BlockSize, Geometry, VolumeId,
    wire::{self, ENVELOPE_LEN, Reader, WireError},
};

/// What the head begins with.
pub const MAGIC: [u8; 8] = *b"TMROLLBK";
const VERSION: u16 = 1;
const PAYLOAD_LEN: usize = 72;
/// Bytes of the head: the first frame begins here.
pub const HEAD_LEN: usize = ENVELOPE_LEN + PAYLOAD_LEN;

/// What a rollback is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Of this volume.
    pub volume: VolumeId,
    /// As it was when the plan was made.
    pub geometry: Geometry,
    /// The volume becomes what it was at the snapshot of this number.
    pub snapshot: u64,
    /// What it was before the rollback: the number of that snapshot.
    pub kept: u64,
    /// Blocks that differ.
    pub blocks: u64,
    /// How many follow the head.
    pub frames: u64,
    /// Bytes behind the head: the frames, each with its length before it.
    pub frame_bytes: u64,
}

impl Plan {
    /// As it lies in the file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(PAYLOAD_LEN);
        payload.extend_from_slice(self.volume.as_bytes());
        payload.extend_from_slice(&self.geometry.length().to_le_bytes());
        payload.extend_from_slice(&self.geometry.block_size().get().to_le_bytes());
        payload.extend_from_slice(&[0; 4]);
        for number in [
            self.snapshot,
            self.kept,
            self.blocks,
            self.frames,
            self.frame_bytes,
        ] {
            payload.extend_from_slice(&number.to_le_bytes());
        }
        wire::seal(MAGIC, VERSION, &payload)
    }

    /// Reads a head of [`HEAD_LEN`] bytes.
    ///
    /// # Errors
    /// Where it is not whole, or of another kind or version.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (_, payload) = wire::unseal(MAGIC, VERSION, bytes)?;
        let mut r = Reader::new(payload);
        let volume = VolumeId::from_bytes(r.array()?);
        let length = r.u64()?;
        let block_size = BlockSize::new(r.u32()?).map_err(|_| WireError::Range("block size"))?;
        let geometry = Geometry::new(length, block_size).map_err(|_| WireError::Range("length"))?;
        if r.u32()? != 0 {
            return Err(WireError::Range("reserved"));
        }
        let plan = Self {
            volume,
            geometry,
            snapshot: r.u64()?,
            kept: r.u64()?,
            blocks: r.u64()?,
            frames: r.u64()?,
            frame_bytes: r.u64()?,
        };
        r.end()?;
        Ok(plan)
    }
}
