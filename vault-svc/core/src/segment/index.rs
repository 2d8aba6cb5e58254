//! The extent index: which frame holds which version of which blocks.

use tidemark_block::{
    BlockCount, BlockIndex, Checksum128, Extent, Geometry, Sequence,
    frame::{BLOCKS_MAX, FRAME_LEN_MAX},
    wire::{self, Reader, WireError},
};

use super::{
    CHECKSUMS_MAGIC, ENTRIES_MAX, ENTRY_LEN, FLAG_ZERO, FRAMES_AT, INDEX_MAGIC, SegmentRecord,
    VERSION,
};

/// One run of adjacent blocks of one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexEntry {
    /// The blocks.
    pub blocks: Extent,
    /// Their version.
    pub sequence: Sequence,
    /// Where the frame begins, from the start of the object; 0 where the blocks are zero.
    pub frame_at: u64,
    /// Bytes of the frame; 0 where the blocks are zero.
    pub frame_len: u32,
    /// The place of the first block among the frame's.
    pub first_in_frame: u16,
    /// Blocks of the frame.
    pub frame_blocks: u16,
    /// The blocks are zero.
    pub zero: bool,
}

impl IndexEntry {
    /// The order of an index: by block, then the newest version first.
    #[must_use]
    pub fn key(&self) -> (BlockIndex, std::cmp::Reverse<Sequence>) {
        (self.blocks.start(), std::cmp::Reverse(self.sequence))
    }

    /// Bytes that a rewrite of `blocks` of this entry's blocks takes, index and checksums included.
    #[must_use]
    pub fn bytes_of(&self, blocks: BlockCount) -> u64 {
        if self.zero {
            return ENTRY_LEN as u64;
        }
        let share = u64::from(self.frame_len) * blocks.get() / u64::from(self.frame_blocks.max(1));
        share + blocks.get() * Checksum128::LEN as u64 + ENTRY_LEN as u64
    }

    /// Appends its [`ENTRY_LEN`] bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let count = u32::try_from(self.blocks.count().get()).unwrap_or(u32::MAX);
        out.extend_from_slice(&self.blocks.start().get().to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&self.frame_len.to_le_bytes());
        out.extend_from_slice(&self.sequence.get().to_le_bytes());
        out.extend_from_slice(&self.frame_at.to_le_bytes());
        out.extend_from_slice(&self.first_in_frame.to_le_bytes());
        out.extend_from_slice(&self.frame_blocks.to_le_bytes());
        let flags = if self.zero { FLAG_ZERO } else { 0 };
        out.extend_from_slice(&flags.to_le_bytes());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let start = BlockIndex::new(reader.u64()?);
        let count = BlockCount::new(reader.u32()?.into());
        let frame_len = reader.u32()?;
        let sequence = Sequence::new(reader.u64()?);
        let frame_at = reader.u64()?;
        let first_in_frame = reader.u16()?;
        let frame_blocks = reader.u16()?;
        let flags = reader.u32()?;
        if flags & !FLAG_ZERO != 0 {
            return Err(WireError::Range("index entry's flags"));
        }
        if count.get() == 0 || start.get().checked_add(count.get()).is_none() {
            return Err(WireError::Range("index entry's blocks"));
        }
        Ok(Self {
            blocks: Extent::new(start, count),
            sequence,
            frame_at,
            frame_len,
            first_in_frame,
            frame_blocks,
            zero: flags & FLAG_ZERO != 0,
        })
    }

    fn check(&self, record: &SegmentRecord, geometry: Geometry) -> Result<(), WireError> {
        if self.blocks.end() > geometry.all().end()
            || self.blocks.start() < record.blocks.start()
            || self.blocks.end() > record.blocks.end()
        {
            return Err(WireError::Range("index entry's blocks"));
        }
        if self.sequence < record.sequences.0 || self.sequence > record.sequences.1 {
            return Err(WireError::Range("index entry's sequence"));
        }
        if self.zero {
            return Ok(());
        }
        let in_frame = u64::from(self.first_in_frame) + self.blocks.count().get();
        let end = self.frame_at.checked_add(self.frame_len.into());
        let frame_fits = self.frame_at >= FRAMES_AT
            && end.is_some_and(|end| end <= record.index_at)
            && self.frame_len as usize <= FRAME_LEN_MAX;
        if !frame_fits
            || usize::from(self.frame_blocks) > BLOCKS_MAX
            || in_frame > self.frame_blocks.into()
        {
            return Err(WireError::Range("index entry's frame"));
        }
        Ok(())
    }
}

/// A verified index in memory.
#[derive(Debug, Clone)]
pub struct SegmentIndex {
    entries: Vec<IndexEntry>,
    /// For each entry, the place of its first checksum in the checksum section.
    checksum_at: Vec<u32>,
    /// The places of entries longer than a frame: runs of zeroes. The others are found by binary search.
    long: Vec<u32>,
}

impl SegmentIndex {
    /// Reads the index section of a segment.
    ///
    /// # Errors
    /// The bytes are damaged, or contradict the record.
    pub fn decode(
        bytes: &[u8],
        record: &SegmentRecord,
        geometry: Geometry,
    ) -> Result<Self, WireError> {
        let (_, payload) = wire::unseal(INDEX_MAGIC, VERSION, bytes)?;
        let count = payload.len() / ENTRY_LEN;
        if payload.len() % ENTRY_LEN != 0 || count > ENTRIES_MAX {
            return Err(WireError::Range("index's length"));
        }
        let mut reader = Reader::new(payload);
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let entry = IndexEntry::decode(&mut reader)?;
            entry.check(record, geometry)?;
            if entries
                .last()
                .is_some_and(|last: &IndexEntry| last.key() >= entry.key())
            {
                return Err(WireError::Range("index's order"));
            }
            entries.push(entry);
        }
        let index = Self::new(entries)?;
        if index.data_blocks() != record.data_blocks.get() {
            return Err(WireError::Range("index's blocks"));
        }
        Ok(index)
    }

    fn new(entries: Vec<IndexEntry>) -> Result<Self, WireError> {
        let mut checksum_at = Vec::with_capacity(entries.len() + 1);
        let mut long = Vec::new();
        let mut at = 0_u64;
        for (entry, place) in entries.iter().zip(0_u32..) {
            checksum_at.push(u32::try_from(at).map_err(|_| WireError::Range("index's blocks"))?);
            if !entry.zero {
                at += entry.blocks.count().get();
            }
            if entry.blocks.count().get() > BLOCKS_MAX as u64 {
                long.push(place);
            }
        }
        checksum_at.push(u32::try_from(at).map_err(|_| WireError::Range("index's blocks"))?);
        Ok(Self {
            entries,
            checksum_at,
            long,
        })
    }

    fn data_blocks(&self) -> u64 {
        self.checksum_at.last().copied().unwrap_or(0).into()
    }

    /// All entries, in order.
    #[must_use]
    pub fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }

    /// The places of the entries that touch `window`.
    pub fn touching(&self, window: Extent) -> impl Iterator<Item = usize> + '_ {
        let reach = BLOCKS_MAX as u64;
        let from = window.start().get().saturating_sub(reach - 1);
        let first = self
            .entries
            .partition_point(|entry| entry.blocks.start().get() < from);
        let behind = self
            .entries
            .partition_point(|entry| entry.blocks.start() < window.end());
        let touches = move |entry: &IndexEntry| !entry.blocks.intersect(window).is_empty();
        let short = (first..behind).filter(move |&at| {
            self.entries[at].blocks.count().get() <= reach && touches(&self.entries[at])
        });
        let long = self
            .long
            .iter()
            .map(|&at| at as usize)
            .filter(move |&at| touches(&self.entries[at]));
        short.chain(long)
    }

    /// The places of an entry's checksums in the checksum section; empty where its blocks are zero.
    #[must_use]
    pub fn checksums_of(&self, at: usize) -> std::ops::Range<usize> {
        self.checksum_at[at] as usize..self.checksum_at[at + 1] as usize
    }

    /// Bytes of memory it takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.entries.capacity() * size_of::<IndexEntry>()
            + (self.checksum_at.capacity() + self.long.capacity()) * 4
    }
}

/// Reads the checksum section of a segment.
///
/// # Errors
/// The bytes are damaged, or contradict the record.
pub fn decode_checksums(
    bytes: &[u8],
    record: &SegmentRecord,
) -> Result<Vec<Checksum128>, WireError> {
    let (_, payload) = wire::unseal(CHECKSUMS_MAGIC, VERSION, bytes)?;
    let (chunks, rest) = payload.as_chunks::<{ Checksum128::LEN }>();
    if !rest.is_empty() || chunks.len() as u64 != record.data_blocks.get() {
        return Err(WireError::Range("checksum section's length"));
    }
    Ok(chunks
        .iter()
        .copied()
        .map(Checksum128::from_bytes)
        .collect())
}
