//! Moves the live blocks of segments into new ones.
//!
//! Victims are merged in the order of their blocks, window by window, so the new segments lie side by side where the
//! old ones lay over each other. A frame whose blocks are all alive and lie together is copied as it is; of the
//! others the live blocks are packed anew. Each block keeps its sequence.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use tidemark_block::{
    BlockIndex, Checksum128, Codec, CodecChoice, Epoch, Extent, FrameDecoder, FrameEncoder,
    GenerationId, Geometry, IntervalId, SegmentId, Sequence, UnverifiedFrame, frame::blocks_max,
};
use tidemark_proto::RpcError;
use vault_core::{
    image::{ByWindow, DataPiece, FrameAt, LivePiece, live_pieces},
    manifest::Manifest,
    segment::{
        SealedSegment, SegmentIndex, SegmentKind, SegmentOrigin, SegmentRecord, SegmentWriter,
    },
};

use super::reclaim::{Known, Rewritten};
use crate::{
    error::of_store,
    image::{FrameCache, Frames, blocks_of, fetch},
    volume::Volume,
};

/// Encoded bytes fetched at a time.
const FETCH_BYTES: u64 = 8 << 20;
/// Memory for verified frames of which other blocks come later in the same rewrite.
const FRAMES_BYTES_MAX: usize = 32 << 20;
/// Live blocks looked at together.
const GATHER_BLOCKS: u64 = 1 << 15;
/// Frames with blocks of several generations are packed in so many layers at most.
const LAYERS: usize = 8;
/// Level for blocks that came compressed.
const ZSTD_LEVEL: i32 = 3;

/// A live run of blocks with data.
#[derive(Debug, Clone, Copy)]
struct LiveData {
    piece: DataPiece,
    sequence: Sequence,
}

/// The live runs of victims in some windows, by block, then the newest first.
#[derive(Debug, Default)]
struct Gathered {
    data: Vec<LiveData>,
    zeroes: Vec<(Extent, Sequence)>,
    blocks: u64,
}

impl Volume {
    /// Writes the live blocks of `victims` to new segments. On failure nothing is left behind.
    pub(super) async fn rewrite(
        self: &Arc<Self>,
        manifest: &Arc<Manifest>,
        victims: &[SegmentRecord],
        known: Known<'_>,
        segment_bytes: u64,
    ) -> Result<Rewritten, RpcError> {
        let mut written = Vec::new();
        match self
            .rewrite_into(manifest, victims, known, segment_bytes, &mut written)
            .await
        {
            Ok(()) => Ok(Rewritten {
                bytes: written.iter().map(|record| record.file_len).sum(),
                segments: written,
            }),
            Err(error) => {
                self.delete_unnamed(&written).await;
                Err(error)
            }
        }
    }

    async fn rewrite_into(
        self: &Arc<Self>,
        manifest: &Arc<Manifest>,
        victims: &[SegmentRecord],
        known: Known<'_>,
        segment_bytes: u64,
        written: &mut Vec<SegmentRecord>,
    ) -> Result<(), RpcError> {
        let (known, complete) = match known {
            Known::All(all) => (all, true),
            Known::Victims => (victims, false),
        };
        let names: Arc<HashSet<SegmentId>> =
            Arc::new(victims.iter().map(|record| record.id).collect());
        let cache = FrameCache::new(FRAMES_BYTES_MAX);
        let mut packer = Packer::new(self.id, manifest.geometry, segment_bytes);
        let mut gathered = Gathered::default();
        for (window, here) in ByWindow::new(manifest.geometry, known) {
            if !here.iter().any(|record| names.contains(&record.id)) {
                continue;
            }
            let indexes = self
                .indexes(manifest, &here)
                .await
                .map_err(|e| of_store(&e))?;
            let retained = manifest.retained();
            let names = Arc::clone(&names);
            let work = tokio::task::spawn_blocking(move || {
                let pieces = live_pieces(indexes.iter().map(AsRef::as_ref), window, &retained);
                gathered.add(&here, &indexes, &names, &pieces, complete);
                gathered
            });
            gathered = work.await.map_err(|_| failed())?;
            // A frame of scattered blocks reaches over many windows; seen together it may still be whole.
            if gathered.blocks >= GATHER_BLOCKS {
                let full = std::mem::take(&mut gathered);
                packer = self
                    .pack(manifest.geometry, packer, full, &cache, written)
                    .await?;
            }
        }
        packer = self
            .pack(manifest.geometry, packer, gathered, &cache, written)
            .await?;
        let work = tokio::task::spawn_blocking(move || {
            packer.flush_all();
            packer.close();
            packer
        });
        let mut packer = work.await.map_err(|_| failed())?;
        self.put_sealed(&mut packer, written).await
    }

    async fn pack(
        &self,
        geometry: Geometry,
        mut packer: Packer,
        live: Gathered,
        cache: &FrameCache,
        written: &mut Vec<SegmentRecord>,
    ) -> Result<Packer, RpcError> {
        for (blocks, sequence) in live.zeroes {
            packer.zero(blocks, sequence);
        }
        let items = items(live.data);
        for group in fetch_groups(&items) {
            let pieces: Vec<_> = group.iter().map(Item::piece).collect();
            let frames = fetch(self, geometry, &pieces, cache).await?;
            let group = group.to_vec();
            let work = tokio::task::spawn_blocking(move || {
                for item in &group {
                    match item {
                        Item::Whole(at, sequences) => packer.copy(&frames, at, sequences),
                        Item::Part(live) => packer.add(&frames, live)?,
                    }
                }
                Ok::<_, RpcError>(packer)
            });
            packer = work.await.map_err(|_| failed())??;
            self.put_sealed(&mut packer, written).await?;
        }
        Ok(packer)
    }

    async fn put_sealed(
        &self,
        packer: &mut Packer,
        written: &mut Vec<SegmentRecord>,
    ) -> Result<(), RpcError> {
        for sealed in packer.sealed.drain(..) {
            let record = sealed.footer.record;
            // Noted first: should the put fail half way, the object is deleted.
            written.push(record);
            self.store
                .put_segment(record.id, sealed.bytes)
                .await
                .map_err(|e| of_store(&e))?;
        }
        Ok(())
    }
}

fn failed() -> RpcError {
    RpcError::internal("a rewrite failed")
}

impl Gathered {
    /// Adds the pieces of victims, resolved to frames.
    fn add(
        &mut self,
        records: &[SegmentRecord],
        indexes: &[Arc<SegmentIndex>],
        victims: &HashSet<SegmentId>,
        pieces: &[LivePiece],
        complete: bool,
    ) {
        for live in pieces {
            let at = live.piece.source.index as usize;
            if !victims.contains(&records[at].id) {
                continue;
            }
            let entry = &indexes[at].entries()[live.piece.source.entry as usize];
            let blocks = live.piece.blocks;
            if entry.zero {
                if !(complete && live.oldest) {
                    self.add_zero(blocks, entry.sequence);
                }
                continue;
            }
            self.blocks += blocks.count().get();
            let skip = blocks.start().since(entry.blocks.start()).get();
            self.data.push(LiveData {
                piece: DataPiece {
                    blocks,
                    frame: FrameAt {
                        segment: records[at].id,
                        at: entry.frame_at,
                        len: entry.frame_len,
                        blocks: entry.frame_blocks,
                    },
                    first: entry.first_in_frame + u16::try_from(skip).unwrap_or(0),
                },
                sequence: entry.sequence,
            });
        }
    }

    /// Windows cut long runs of zeroes: they are put together again.
    fn add_zero(&mut self, blocks: Extent, sequence: Sequence) {
        match self.zeroes.last_mut() {
            Some((last, of)) if last.end() == blocks.start() && *of == sequence => {
                *last = Extent::between(last.start(), blocks.end());
            }
            _ => {
                self.blocks += 1;
                self.zeroes.push((blocks, sequence));
            }
        }
    }
}

/// What is moved at once.
#[derive(Debug, Clone)]
enum Item {
    /// A frame as it is, with the sequences of its blocks.
    Whole(FrameAt, Vec<Sequence>),
    /// Some blocks of a frame.
    Part(LiveData),
}

impl Item {
    fn piece(&self) -> DataPiece {
        match self {
            Self::Part(live) => live.piece,
            Self::Whole(frame, _) => DataPiece {
                blocks: Extent::between(BlockIndex::ZERO, BlockIndex::ZERO),
                frame: *frame,
                first: 0,
            },
        }
    }
}

/// What is alive of one frame.
#[derive(Debug, Default)]
struct AliveFrame {
    /// Places in the frame and their sequences.
    places: Vec<(u16, Sequence)>,
    /// The first and the last of its blocks among all that are moved.
    among_all: Option<(u64, u64)>,
}

impl AliveFrame {
    /// A frame is copied where all of it is alive, and few blocks of others lie between its own: copying frames
    /// that lie over each other would leave them so.
    fn is_copied(&self, at: &FrameAt) -> bool {
        let own = u64::from(at.blocks);
        self.places.len() as u64 == own
            && self
                .among_all
                .is_some_and(|(first, last)| last - first < 2 * own)
    }
}

/// Copies and parts, in the order of their first blocks.
fn items(data: Vec<LiveData>) -> Vec<Item> {
    let mut alive: HashMap<FrameAt, AliveFrame> = HashMap::new();
    let mut behind = 0;
    for live in &data {
        let frame = alive.entry(live.piece.frame).or_default();
        let count = live.piece.blocks.count().get();
        let first = live.piece.first;
        let places = first..first + u16::try_from(count).unwrap_or(u16::MAX);
        frame
            .places
            .extend(places.map(|place| (place, live.sequence)));
        let (start, _) = frame.among_all.unwrap_or((behind, behind));
        behind += count;
        frame.among_all = Some((start, behind - 1));
    }
    let mut items = Vec::new();
    let mut copied = HashSet::new();
    for live in data {
        let at = live.piece.frame;
        match alive.get_mut(&at) {
            Some(frame) if frame.is_copied(&at) => {
                if copied.insert(at) {
                    frame.places.sort_unstable_by_key(|(place, _)| *place);
                    items.push(Item::Whole(
                        at,
                        frame.places.iter().map(|(_, sequence)| *sequence).collect(),
                    ));
                }
            }
            _ => items.push(Item::Part(live)),
        }
    }
    items
}

/// Slices whose frames have about [`FETCH_BYTES`] together.
fn fetch_groups(items: &[Item]) -> impl Iterator<Item = &[Item]> {
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let mut seen = HashSet::new();
        let fits = |item: &&Item| {
            let frame = item.piece().frame;
            if seen.insert(frame) {
                bytes += u64::from(frame.len);
            }
            bytes <= FETCH_BYTES
        };
        let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (group, behind) = rest.split_at(count);
        rest = behind;
        (!group.is_empty()).then_some(group)
    })
}

/// Blocks that will share a frame.
#[derive(Debug, Default)]
struct Layer {
    blocks: Vec<(BlockIndex, Checksum128)>,
    sequences: Vec<Sequence>,
    data: Vec<u8>,
    compressed: bool,
}

/// Gathers frames into new segments.
struct Packer {
    geometry: Geometry,
    segment_bytes: u64,
    volume: tidemark_block::VolumeId,
    origin: IntervalId,
    next_part: u32,
    writer: Option<SegmentWriter>,
    sealed: Vec<SealedSegment>,
    /// Versions of one block can't share a frame: the newest are packed in the first layer, and so on.
    layers: Vec<Layer>,
    encoder: FrameEncoder,
    decoder: FrameDecoder,
}

impl Packer {
    fn new(volume: tidemark_block::VolumeId, geometry: Geometry, segment_bytes: u64) -> Self {
        Self {
            geometry,
            segment_bytes,
            volume,
            origin: IntervalId::from_bytes(*uuid::Uuid::new_v4().as_bytes()),
            next_part: 0,
            writer: None,
            sealed: Vec::new(),
            layers: Vec::new(),
            encoder: FrameEncoder::new(geometry),
            decoder: FrameDecoder::new(),
        }
    }

    fn writer(&mut self) -> &mut SegmentWriter {
        if self
            .writer
            .as_ref()
            .is_some_and(|writer| writer.is_full(self.segment_bytes))
        {
            self.close();
        }
        let origin = SegmentOrigin {
            volume: self.volume,
            geometry: self.geometry,
            id: SegmentId {
                origin: self.origin,
                part: self.next_part,
            },
            kind: SegmentKind::Rewritten,
            base: GenerationId::ZERO,
            epoch: Epoch::ZERO,
            cut_time_ms: 0,
        };
        self.writer
            .get_or_insert_with(|| SegmentWriter::new(origin, Vec::with_capacity(1 << 20)))
    }

    fn close(&mut self) {
        if let Some(writer) = self.writer.take()
            && !writer.is_empty()
        {
            self.sealed
                .push(writer.finish((BlockIndex::ZERO, BlockIndex::ZERO)));
            self.next_part += 1;
        }
    }

    fn zero(&mut self, blocks: Extent, sequence: Sequence) {
        self.writer().push_zero(blocks, sequence);
    }

    fn copy(&mut self, frames: &Frames, at: &FrameAt, sequences: &[Sequence]) {
        if let Some(frame) = frames.get(at) {
            self.writer().push_versions(frame, sequences);
        }
    }

    fn add(&mut self, frames: &Frames, live: &LiveData) -> Result<(), RpcError> {
        let compressed = frames
            .get(&live.piece.frame)
            .is_some_and(|frame| frame.codec() == Codec::Zstd);
        let places = usize::from(live.piece.first)..;
        let checksums: Vec<_> = frames
            .get(&live.piece.frame)
            .map(|frame| frame.checksums().skip(places.start).collect())
            .unwrap_or_default();
        for ((block, bytes), checksum) in blocks_of(frames, &live.piece)?.into_iter().zip(checksums)
        {
            let layer = self.layer_for(block);
            let layer = &mut self.layers[layer];
            layer.blocks.push((block, checksum));
            layer.sequences.push(live.sequence);
            layer.data.extend_from_slice(bytes);
            layer.compressed |= compressed;
        }
        Ok(())
    }

    /// The first layer whose blocks all lie before `block`.
    fn layer_for(&mut self, block: BlockIndex) -> usize {
        let full = blocks_max(self.geometry.block_size());
        let free = |layer: &Layer| layer.blocks.last().is_none_or(|(last, _)| *last < block);
        let at = match self.layers.iter().position(free) {
            Some(at) => at,
            None if self.layers.len() < LAYERS => {
                self.layers.push(Layer::default());
                self.layers.len() - 1
            }
            None => {
                self.flush(LAYERS - 1);
                LAYERS - 1
            }
        };
        if self.layers[at].blocks.len() >= full {
            self.flush(at);
        }
        at
    }

    fn flush(&mut self, at: usize) {
        let layer = std::mem::take(&mut self.layers[at]);
        if layer.blocks.is_empty() {
            return;
        }
        let choice = if layer.compressed {
            CodecChoice::Zstd(ZSTD_LEVEL)
        } else {
            CodecChoice::Raw
        };
        let mut encoded = Vec::with_capacity(layer.data.len() + 4096);
        self.encoder
            .encode_data(&layer.blocks, &layer.data, choice, &mut encoded);
        // What is written is verified like what is received: memory is not above suspicion either.
        let frame = UnverifiedFrame::split(encoded.into())
            .and_then(|(frame, _)| frame.verify(self.geometry, &mut self.decoder));
        match frame {
            Ok(frame) => self.writer().push_versions(&frame, &layer.sequences),
            Err(error) => panic!("a frame that was just encoded is damaged: {error}"),
        }
    }

    fn flush_all(&mut self) {
        (0..self.layers.len()).for_each(|at| self.flush(at));
    }
}
