//! Segments: immutable objects that hold frames, an extent index, and the checksums of their blocks.
//!
//! A received part of an interval is a segment, written once, when it arrives; a commit only names it. The three
//! sections behind the frames each have a checksum of their own, so that each is read and verified alone: a reader
//! of blocks fetches the index, then single frames; a replay of the checksum table fetches index and checksums and
//! no frame. `docs/FORMAT-VAULT.md` has every byte.

mod index;
mod writer;

use thiserror::Error;
use tidemark_block::{
    BlockCount, BlockIndex, Checksum128, Epoch, Extent, GenerationId, Geometry, IntervalId,
    SegmentId, Sequence, VolumeId,
    wire::{self, ENVELOPE_LEN, Reader, WireError},
};

pub use index::{IndexEntry, SegmentIndex, decode_checksums};
pub use writer::{SealedSegment, SegmentWriter};

/// First bytes of a segment.
pub const HEADER_MAGIC: [u8; 8] = *b"TMVSEGMT";
/// First bytes of the index section.
pub const INDEX_MAGIC: [u8; 8] = *b"TMVINDEX";
/// First bytes of the checksum section.
pub const CHECKSUMS_MAGIC: [u8; 8] = *b"TMVCHECK";
/// First bytes of the footer.
pub const FOOTER_MAGIC: [u8; 8] = *b"TMVFOOTR";
/// The version that this release writes, and the newest it reads.
pub const VERSION: u16 = 1;
/// Bytes of the header's payload.
pub const HEADER_PAYLOAD_LEN: usize = 48;
/// Where the frames begin.
pub const FRAMES_AT: u64 = (ENVELOPE_LEN + HEADER_PAYLOAD_LEN) as u64;
/// Bytes per index entry.
pub const ENTRY_LEN: usize = 40;
/// Bytes of the footer's payload.
pub const FOOTER_PAYLOAD_LEN: usize = 200;
/// Bytes of the footer, which ends the object.
pub const FOOTER_LEN: u64 = (ENVELOPE_LEN + FOOTER_PAYLOAD_LEN) as u64;
/// The most entries of one segment: bounds the memory of an index.
pub const ENTRIES_MAX: usize = 1 << 18;
/// The most blocks with data of one segment: bounds the checksum section.
pub const DATA_BLOCKS_MAX: u64 = 1 << 18;
/// The most bytes of one object, so that sums over a whole manifest stay within 64 bits.
pub const FILE_LEN_MAX: u64 = 1 << 40;
/// Bit 0 of an entry's flags: the blocks are zero, and no frame holds them.
pub const FLAG_ZERO: u32 = 1;

/// Why a stored object is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FormatError {
    /// The envelope or a field.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The object is another one than its name says.
    #[error("the object is of {found}, its name says {expected}")]
    Misplaced {
        /// Inside.
        found: String,
        /// By its name.
        expected: String,
    },
}

/// Which way a segment came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// A part of an interval, as it was received.
    Received,
    /// Live blocks of older segments, written by reclaim.
    Rewritten,
}

impl SegmentKind {
    pub(crate) const fn code(self) -> u32 {
        match self {
            Self::Received => 0,
            Self::Rewritten => 1,
        }
    }

    pub(crate) fn from_code(code: u32) -> Result<Self, WireError> {
        match code {
            0 => Ok(Self::Received),
            1 => Ok(Self::Rewritten),
            _ => Err(WireError::Range("segment kind")),
        }
    }
}

/// What the writer of a segment knows before its first frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentOrigin {
    /// The volume.
    pub volume: VolumeId,
    /// Its shape.
    pub geometry: Geometry,
    /// Interval or rewrite, and part.
    pub id: SegmentId,
    /// Which of the two.
    pub kind: SegmentKind,
    /// The generation that the interval changes; zero for a rewrite.
    pub base: GenerationId,
    /// The source's epoch that the cut closed; zero for a rewrite.
    pub epoch: Epoch,
    /// The interval's cut time; zero for a rewrite.
    pub cut_time_ms: u64,
}

/// The fixed end of a segment: where everything is, and what it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// As given to the writer.
    pub origin: SegmentOrigin,
    /// Every changed block of the interval in this range is in this part; start and end are equal for a rewrite.
    pub watermark: (BlockIndex, BlockIndex),
    /// Frames.
    pub frame_count: u64,
    /// Blocks that are zero.
    pub zero_blocks: BlockCount,
    /// What a manifest says of it.
    pub record: SegmentRecord,
}

/// What a manifest says of a segment: enough to plan with, and to read its index in one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentRecord {
    /// Its name.
    pub id: SegmentId,
    /// How it came to be.
    pub kind: SegmentKind,
    /// Least and greatest sequence of its entries.
    pub sequences: (Sequence, Sequence),
    /// From its first block to behind its last one.
    pub blocks: Extent,
    /// Bytes of the whole object.
    pub file_len: u64,
    /// Where the index section begins, which is where the frames end.
    pub index_at: u64,
    /// Bytes of the index section; the checksum section follows it.
    pub index_len: u32,
    /// Bytes of the checksum section.
    pub checksums_len: u32,
    /// Blocks with data.
    pub data_blocks: BlockCount,
}

/// Bytes of a record in a manifest.
pub const RECORD_LEN: usize = 88;

impl SegmentRecord {
    /// Bytes of its frames.
    #[must_use]
    pub const fn frame_bytes(&self) -> u64 {
        self.index_at.saturating_sub(FRAMES_AT)
    }

    /// Where the checksum section begins.
    #[must_use]
    pub const fn checksums_at(&self) -> u64 {
        self.index_at + self.index_len as u64
    }

    /// Appends the record's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.id.origin.as_bytes());
        out.extend_from_slice(&self.id.part.to_le_bytes());
        out.extend_from_slice(&self.kind.code().to_le_bytes());
        for word in [
            self.sequences.0.get(),
            self.sequences.1.get(),
            self.blocks.start().get(),
            self.blocks.end().get(),
            self.file_len,
            self.index_at,
        ] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.index_len.to_le_bytes());
        out.extend_from_slice(&self.checksums_len.to_le_bytes());
        out.extend_from_slice(&self.data_blocks.get().to_le_bytes());
    }

    /// Reads a record and checks that its sections fill the object.
    ///
    /// # Errors
    /// The bytes are cut short or contradict each other.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let origin = IntervalId::from_bytes(reader.array()?);
        let part = reader.u32()?;
        let kind = SegmentKind::from_code(reader.u32()?)?;
        let sequences = (Sequence::new(reader.u64()?), Sequence::new(reader.u64()?));
        let blocks = read_extent(reader, "segment's blocks")?;
        let record = Self {
            id: SegmentId { origin, part },
            kind,
            sequences,
            blocks,
            file_len: reader.u64()?,
            index_at: reader.u64()?,
            index_len: reader.u32()?,
            checksums_len: reader.u32()?,
            data_blocks: BlockCount::new(reader.u64()?),
        };
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> Result<(), WireError> {
        let end = self
            .index_at
            .checked_add(u64::from(self.index_len) + u64::from(self.checksums_len) + FOOTER_LEN);
        if self.index_at < FRAMES_AT || end != Some(self.file_len) || self.file_len > FILE_LEN_MAX {
            return Err(WireError::Range("segment's sections"));
        }
        let blocks = self.data_blocks.get();
        if blocks > DATA_BLOCKS_MAX
            || ENVELOPE_LEN as u64 + blocks * Checksum128::LEN as u64 != self.checksums_len.into()
        {
            return Err(WireError::Range("segment's checksum section"));
        }
        if self.sequences.0 > self.sequences.1 {
            return Err(WireError::Range("segment's sequences"));
        }
        Ok(())
    }
}

/// Reads first block and the one behind the last.
pub(crate) fn read_extent(
    reader: &mut Reader<'_>,
    what: &'static str,
) -> Result<Extent, WireError> {
    let start = BlockIndex::new(reader.u64()?);
    let end = BlockIndex::new(reader.u64()?);
    if start > end {
        return Err(WireError::Range(what));
    }
    Ok(Extent::between(start, end))
}

/// The header of a segment, as bytes.
#[must_use]
pub fn encode_header(origin: &SegmentOrigin) -> Vec<u8> {
    let mut payload = Vec::with_capacity(HEADER_PAYLOAD_LEN);
    payload.extend_from_slice(origin.volume.as_bytes());
    payload.extend_from_slice(origin.id.origin.as_bytes());
    payload.extend_from_slice(&origin.id.part.to_le_bytes());
    payload.extend_from_slice(&origin.geometry.block_size().get().to_le_bytes());
    payload.extend_from_slice(&origin.geometry.length().to_le_bytes());
    wire::seal(HEADER_MAGIC, VERSION, &payload)
}

impl Footer {
    /// As bytes, [`FOOTER_LEN`] of them.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(FOOTER_PAYLOAD_LEN);
        payload.extend_from_slice(self.origin.volume.as_bytes());
        self.record.encode(&mut payload);
        for word in [
            self.origin.geometry.length(),
            self.origin.geometry.block_size().get().into(),
            self.origin.base.get(),
            self.origin.epoch.get(),
            self.origin.cut_time_ms,
            self.watermark.0.get(),
            self.watermark.1.get(),
            self.frame_count,
            self.zero_blocks.get(),
        ] {
            payload.extend_from_slice(&word.to_le_bytes());
        }
        payload.resize(FOOTER_PAYLOAD_LEN, 0);
        wire::seal(FOOTER_MAGIC, VERSION, &payload)
    }

    /// Reads the last [`FOOTER_LEN`] bytes of an object that is named `id` and has `file_len` bytes.
    ///
    /// # Errors
    /// The bytes are damaged, or belong to another volume, segment or length.
    pub fn decode(
        bytes: &[u8],
        volume: VolumeId,
        geometry: Geometry,
        id: SegmentId,
        file_len: u64,
    ) -> Result<Self, FormatError> {
        let (_, payload) = wire::unseal(FOOTER_MAGIC, VERSION, bytes)?;
        if payload.len() != FOOTER_PAYLOAD_LEN {
            return Err(WireError::Range("footer's length").into());
        }
        let mut reader = Reader::new(payload);
        let found = VolumeId::from_bytes(reader.array()?);
        if found != volume {
            return Err(misplaced(&found, &volume));
        }
        let record = SegmentRecord::decode(&mut reader)?;
        if record.id != id {
            return Err(misplaced(&record.id, &id));
        }
        if record.file_len != file_len {
            return Err(WireError::Range("segment's length").into());
        }
        if (reader.u64()?, reader.u64()?) != (geometry.length(), geometry.block_size().get().into())
        {
            return Err(WireError::Range("segment's geometry").into());
        }
        let origin = SegmentOrigin {
            volume,
            geometry,
            id,
            kind: record.kind,
            base: GenerationId::new(reader.u64()?),
            epoch: Epoch::new(reader.u64()?),
            cut_time_ms: reader.u64()?,
        };
        let watermark = read_extent(&mut reader, "segment's watermark")?;
        let footer = Self {
            origin,
            watermark: (watermark.start(), watermark.end()),
            frame_count: reader.u64()?,
            zero_blocks: BlockCount::new(reader.u64()?),
            record,
        };
        if reader.rest().iter().any(|byte| *byte != 0) {
            return Err(WireError::Range("reserved field").into());
        }
        Ok(footer)
    }
}

pub(crate) fn misplaced(
    found: &impl std::fmt::Display,
    expected: &impl std::fmt::Display,
) -> FormatError {
    FormatError::Misplaced {
        found: found.to_string(),
        expected: expected.to_string(),
    }
}
