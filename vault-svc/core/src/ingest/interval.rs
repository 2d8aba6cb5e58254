//! One interval on its way in: parts, the durable prefix, and the digest of the image to be.

use tidemark_block::{
    BlockIndex, Checksum128, Codec, DigestUpdate, Extent, GenerationId, IntervalHeader,
    IntervalSeal, SegmentId, Sequence, TableView, VerifiedFrame,
};

use super::{BATCH_EXTENTS_MAX, BatchError, Finished, IngestError};
use crate::segment::{
    Footer, SealedSegment, SegmentIndex, SegmentKind, SegmentOrigin, SegmentRecord, SegmentWriter,
};

/// Checksums kept in memory for the table until the commit; an interval with more has them read back from its parts.
const OVERLAY_BLOCKS_MAX: usize = 1 << 18;
/// Room for index, checksums and footer behind the frames of a part.
const TRAILER_ROOM: usize = 1 << 20;

/// The checksums of an interval's blocks, in ascending order, for the table.
#[derive(Debug, Clone, Default)]
pub struct Overlay {
    /// Blocks with data; empty checksums stand for zero blocks.
    pub runs: Vec<(Extent, Vec<Checksum128>)>,
    blocks: usize,
}

impl Overlay {
    fn push(&mut self, blocks: Extent, checksums: Vec<Checksum128>) -> bool {
        self.blocks += checksums.len() + 4;
        self.runs.push((blocks, checksums));
        self.blocks <= OVERLAY_BLOCKS_MAX
    }
}

/// An interval on its way in.
#[derive(Debug)]
pub struct Interval {
    header: IntervalHeader,
    sequence: Sequence,
    part_bytes_max: u64,
    /// For the next part; without memory where none was provided.
    buffer: Vec<u8>,
    digest: DigestUpdate,
    /// Every changed block below it has been received.
    received_end: BlockIndex,
    open: Option<OpenPart>,
    batch: Option<OpenBatch>,
    next_part: u32,
    /// Parts in order; the first `durable` of them are durable.
    parts: Vec<SegmentRecord>,
    part_ends: Vec<(BlockIndex, u64)>,
    durable: usize,
    durable_end: BlockIndex,
    changed_blocks: u64,
    frame_count: u64,
    frame_bytes: u64,
    stream_bytes: u64,
    overlay: Option<Overlay>,
}

/// A batch between its beginning and its end. It stays open when one of its frames is refused.
#[derive(Debug)]
struct OpenBatch {
    end: BlockIndex,
    /// Every further block lies at or behind it.
    behind: BlockIndex,
    extents: usize,
}

#[derive(Debug)]
struct OpenPart {
    writer: SegmentWriter,
    first: BlockIndex,
    opened_ms: u64,
}

/// The durable prefix, as it is told to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DurablePrefix {
    /// Every changed block below it is durable.
    pub end: BlockIndex,
    /// Encoded bytes of this stream that are durable.
    pub stream_bytes: u64,
}

impl Interval {
    /// Starts an interval that [`super::admit`] let in.
    #[must_use]
    pub fn new(header: IntervalHeader, sequence: Sequence, part_bytes_max: u64) -> Self {
        let digest = DigestUpdate::new(header.geometry);
        Self {
            header,
            sequence,
            part_bytes_max,
            buffer: Vec::new(),
            digest,
            received_end: BlockIndex::ZERO,
            open: None,
            batch: None,
            next_part: 0,
            parts: Vec::new(),
            part_ends: Vec::new(),
            durable: 0,
            durable_end: BlockIndex::ZERO,
            changed_blocks: 0,
            frame_count: 0,
            frame_bytes: 0,
            stream_bytes: 0,
            overlay: Some(Overlay::default()),
        }
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &IntervalHeader {
        &self.header
    }

    /// Whether a part found in the store is the next one of this interval; parts of a sequence that is not to be
    /// had any more, or that leave a gap, are not.
    ///
    /// # Errors
    /// It is, but was made under another header.
    pub fn continues(&self, footer: &Footer) -> Result<bool, IngestError> {
        let next = footer.record.id.part == self.next_part
            && footer.watermark.0 == self.received_end
            && footer.record.kind == SegmentKind::Received;
        if footer.origin.epoch != self.header.epoch {
            return Err(IngestError::Conflict("epoch"));
        }
        if footer.origin.cut_time_ms != self.header.cut_time_ms {
            return Err(IngestError::Conflict("cut time"));
        }
        if footer.origin.base != self.header.base {
            return Err(IngestError::Conflict("base generation"));
        }
        let sequences = footer.record.sequences;
        let empty = footer.record.blocks.is_empty();
        Ok(next && (empty || sequences == (self.sequence, self.sequence)))
    }

    /// Takes up a part that is durable already, from its index and checksum sections.
    ///
    /// # Errors
    /// The table can't be read, or the part's blocks are not in order.
    pub fn resume<V: TableView>(
        &mut self,
        view: &V,
        footer: &Footer,
        index: &SegmentIndex,
        checksums: &[Checksum128],
    ) -> Result<(), BatchError<V::Error>> {
        let range = Extent::between(footer.watermark.0, footer.watermark.1);
        for (at, entry) in index.entries().iter().enumerate() {
            self.check_next(entry.blocks, range)?;
            self.note(
                view,
                entry.blocks,
                &checksums[index.checksums_of(at)],
                entry.zero,
            )?;
        }
        self.frame_count += footer.frame_count;
        self.frame_bytes += footer.record.frame_bytes();
        self.received_end = footer.watermark.1;
        self.next_part += 1;
        self.parts.push(footer.record);
        self.part_ends.push((footer.watermark.1, 0));
        self.durable = self.parts.len();
        self.durable_end = self.received_end;
        Ok(())
    }

    /// Begins a batch that brings everything below `end`. Its frames follow one by one, so that only one is decoded
    /// at a time, then [`Self::end_batch`].
    ///
    /// # Errors
    /// The watermark doesn't rise: the stream is to be closed.
    pub fn begin_batch(&mut self, end: BlockIndex) -> Result<(), IngestError> {
        if end <= self.received_end || end > self.header.geometry.all().end() {
            return Err(IngestError::Watermark {
                found: end,
                last: self.received_end,
            });
        }
        self.batch = Some(OpenBatch {
            end,
            behind: self.received_end,
            extents: 0,
        });
        Ok(())
    }

    /// Takes a frame of the batch that was begun.
    ///
    /// # Errors
    /// Its blocks are out of order, or there are too many: the stream is to be closed. The table can't be read:
    /// likewise. The batch can't be ended then, and nothing of it is ever put.
    ///
    /// # Panics
    /// Where no batch was begun.
    pub fn frame<V: TableView>(
        &mut self,
        now_ms: u64,
        view: &V,
        frame: &VerifiedFrame,
    ) -> Result<(), BatchError<V::Error>> {
        let received_end = self.received_end;
        let batch = self.batch.as_mut().expect("a frame comes within a batch");
        for extent in frame.extents() {
            if extent.start() < batch.behind || extent.end() > batch.end {
                return Err(IngestError::OutOfOrder {
                    block: extent.start(),
                    range: Extent::between(received_end, batch.end),
                }
                .into());
            }
            batch.behind = extent.end();
        }
        batch.extents += frame.extents().len();
        if batch.extents > BATCH_EXTENTS_MAX {
            return Err(IngestError::TooLarge(BATCH_EXTENTS_MAX, "runs of blocks").into());
        }
        self.note_frame(view, frame)?;
        self.frame_count += 1;
        self.frame_bytes += frame.encoded().len() as u64;
        let sequence = self.sequence;
        self.open_part(now_ms).writer.push(frame, sequence);
        Ok(())
    }

    /// Ends the batch, of so many bytes. Afterwards [`Self::take_full`] says whether a part is to be put.
    pub fn end_batch(&mut self, now_ms: u64, encoded_bytes: u64) {
        if let Some(batch) = self.batch.take() {
            // Also a batch without frames moves the watermark: its part must say so.
            self.open_part(now_ms);
            self.received_end = batch.end;
            self.stream_bytes += encoded_bytes;
        }
    }

    /// Gives the memory of a part that was put to the next one.
    pub fn provide(&mut self, buffer: Vec<u8>) {
        self.buffer = buffer;
    }

    fn open_part(&mut self, now_ms: u64) -> &mut OpenPart {
        let first = self.received_end;
        let room = usize::try_from(self.part_bytes_max).unwrap_or(0);
        let origin = self.origin();
        let buffer = &mut self.buffer;
        self.open.get_or_insert_with(|| {
            let mut buffer = std::mem::take(buffer);
            buffer.clear();
            buffer.reserve(room + TRAILER_ROOM);
            OpenPart {
                writer: SegmentWriter::new(origin, buffer),
                first,
                opened_ms: now_ms,
            }
        })
    }

    fn origin(&self) -> SegmentOrigin {
        SegmentOrigin {
            volume: self.header.volume,
            geometry: self.header.geometry,
            id: SegmentId {
                origin: self.header.interval,
                part: self.next_part,
            },
            kind: SegmentKind::Received,
            base: self.header.base,
            epoch: self.header.epoch,
            cut_time_ms: self.header.cut_time_ms,
        }
    }

    fn check_next(&self, blocks: Extent, range: Extent) -> Result<(), IngestError> {
        let next = self.digest.next().max(range.start());
        if blocks.start() < next || blocks.end() > range.end() {
            return Err(IngestError::OutOfOrder {
                block: blocks.start(),
                range: Extent::between(next.min(range.end()), range.end()),
            });
        }
        Ok(())
    }

    fn note_frame<V: TableView>(
        &mut self,
        view: &V,
        frame: &VerifiedFrame,
    ) -> Result<(), BatchError<V::Error>> {
        let zero = frame.codec() == Codec::Zero;
        let mut checksums = frame.checksums();
        for &extent in frame.extents() {
            let count = usize::try_from(extent.count().get()).unwrap_or(usize::MAX);
            let own: Vec<_> = checksums
                .by_ref()
                .take(if zero { 0 } else { count })
                .collect();
            self.note(view, extent, &own, zero)?;
        }
        Ok(())
    }

    fn note<V: TableView>(
        &mut self,
        view: &V,
        blocks: Extent,
        checksums: &[Checksum128],
        zero: bool,
    ) -> Result<(), BatchError<V::Error>> {
        if zero {
            self.digest
                .push_zero(view, blocks)
                .map_err(BatchError::Table)?;
        } else {
            for (block, &checksum) in blocks.iter().zip(checksums) {
                self.digest
                    .push(view, block, checksum)
                    .map_err(BatchError::Table)?;
            }
        }
        self.changed_blocks += blocks.count().get();
        let kept = self
            .overlay
            .as_mut()
            .is_some_and(|overlay| overlay.push(blocks, checksums.to_vec()));
        if !kept {
            self.overlay = None;
        }
        Ok(())
    }

    /// The open part, where it is full.
    pub fn take_full(&mut self) -> Option<SealedSegment> {
        let full = self
            .open
            .as_ref()
            .is_some_and(|part| part.writer.is_full(self.part_bytes_max));
        if full { self.take_open() } else { None }
    }

    /// Whether frames or a watermark wait in a part that is not yet being put.
    #[must_use]
    pub const fn has_open(&self) -> bool {
        self.open.is_some() && self.batch.is_none()
    }

    /// When the open part was begun.
    #[must_use]
    pub fn opened_ms(&self) -> Option<u64> {
        self.open.as_ref().map(|part| part.opened_ms)
    }

    /// Seals the open part, whatever is in it.
    pub fn take_open(&mut self) -> Option<SealedSegment> {
        // A part with half a batch has no watermark that could be told.
        if self.batch.is_some() {
            return None;
        }
        let part = self.open.take()?;
        let sealed = part.writer.finish((part.first, self.received_end));
        self.next_part += 1;
        self.parts.push(sealed.footer.record);
        self.part_ends.push((self.received_end, self.stream_bytes));
        Some(sealed)
    }

    /// The next part, in order, has become durable.
    pub fn part_durable(&mut self) -> DurablePrefix {
        if let Some(&(end, stream_bytes)) = self.part_ends.get(self.durable) {
            self.durable += 1;
            self.durable_end = end;
            return DurablePrefix { end, stream_bytes };
        }
        self.durable_prefix()
    }

    /// What is durable now.
    #[must_use]
    pub fn durable_prefix(&self) -> DurablePrefix {
        let stream_bytes = self
            .durable
            .checked_sub(1)
            .map_or(0, |last| self.part_ends[last].1);
        DurablePrefix {
            end: self.durable_end,
            stream_bytes,
        }
    }

    /// Compares the seal with what was received, and the digests.
    ///
    /// # Errors
    /// They differ, or the table can't be read. Nothing is committed.
    ///
    /// # Panics
    /// Where a part is not durable yet: the driver waits for all of them first.
    pub fn finish<V: TableView>(
        self,
        view: &V,
        seal: &IntervalSeal,
    ) -> Result<Finished, BatchError<V::Error>> {
        assert!(
            self.open.is_none() && self.durable == self.parts.len(),
            "an interval is finished when all its parts are durable"
        );
        for (what, sealed, received) in [
            ("blocks", seal.changed_blocks.get(), self.changed_blocks),
            ("frames", seal.frame_count, self.frame_count),
        ] {
            if sealed != received {
                return Err(IngestError::Count {
                    what,
                    sealed,
                    received,
                }
                .into());
            }
        }
        if self.changed_blocks == 0 && self.header.base != GenerationId::ZERO {
            return Err(IngestError::Empty.into());
        }
        let digest = self.digest.finish(view).map_err(BatchError::Table)?;
        if digest != seal.image_digest {
            return Err(IngestError::DigestMismatch {
                source_digest: seal.image_digest,
                vault_digest: digest,
            }
            .into());
        }
        // A part that only moves the watermark has nothing that an image could need.
        let segments = self
            .parts
            .into_iter()
            .filter(|part| !part.blocks.is_empty());
        Ok(Finished {
            header: self.header,
            sequence: self.sequence,
            segments: segments.collect(),
            digest,
            changed_blocks: self.changed_blocks,
            frame_bytes: self.frame_bytes,
            overlay: self.overlay,
        })
    }
}
