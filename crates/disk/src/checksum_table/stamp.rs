//! The stamp of a checksum table: whose it is, and the generation that is guaranteed applied.

use std::{
    io,
    path::{Path, PathBuf},
};

use tidemark_block::{
    GenerationId, Geometry, VolumeId,
    wire::{Reader, WireError},
};

use crate::record::{self, RecordError};

const MAGIC: [u8; 8] = *b"TMTABSTP";
const VERSION: u16 = 1;

/// As it lies beside the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    volume: VolumeId,
    length: u64,
    block_size: u32,
    pub(super) generation: GenerationId,
}

/// Where the stamp of the table at `path` lies.
pub(super) fn path_of(path: &Path) -> PathBuf {
    path.with_added_extension("stamp")
}

impl Stamp {
    pub(super) fn new(volume: VolumeId, geometry: Geometry, generation: GenerationId) -> Self {
        Self {
            volume,
            length: geometry.length(),
            block_size: geometry.block_size().get(),
            generation,
        }
    }

    /// Whether it is the stamp of a table of this volume and shape.
    pub(super) fn is_of(&self, volume: VolumeId, geometry: Geometry) -> bool {
        *self == Self::new(volume, geometry, self.generation)
    }

    /// The stamp of the table at `path`, if there is one.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, RecordError> {
        let Some((_, payload)) = record::read(&path_of(path), MAGIC, VERSION)? else {
            return Ok(None);
        };
        Self::decode(&payload)
            .map(Some)
            .map_err(RecordError::Damaged)
    }

    pub(super) fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(payload);
        let stamp = Self {
            volume: VolumeId::from_bytes(reader.array()?),
            length: reader.u64()?,
            block_size: reader.u32()?,
            generation: GenerationId::new(reader.u64()?),
        };
        reader.end()?;
        Ok(stamp)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(36);
        payload.extend_from_slice(self.volume.as_bytes());
        payload.extend_from_slice(&self.length.to_le_bytes());
        payload.extend_from_slice(&self.block_size.to_le_bytes());
        payload.extend_from_slice(&self.generation.get().to_le_bytes());
        payload
    }

    /// Puts it beside the table at `path`, durably.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        record::write(&path_of(path), MAGIC, VERSION, &self.encode())
    }
}
