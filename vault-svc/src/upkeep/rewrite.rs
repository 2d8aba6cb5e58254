//! Moves the live blocks of segments into new ones.
//!
//! Victims are merged in the order of their blocks, window by window, so the new segments lie side by side where the
//! old ones lay over each other. A frame whose blocks are all alive is copied as it is; of the others the live
//! blocks are packed anew. Each block keeps its sequence.

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
    image::{ByWindow, LivePiece, live_pieces},
    manifest::Manifest,
    segment::{
        SealedSegment, SegmentIndex, SegmentKind, SegmentOrigin, SegmentRecord, SegmentWriter,
    },
};

use super::reclaim::{Known, Rewritten};
use crate::{
    error::of_store,
    image::{DataPiece, FRAME_CACHE_BYTES, FrameAt, FrameCache, Frames, blocks_of, fetch},
    volume::Volume,
};

/// Encoded bytes fetched at a time.
const FETCH_BYTES: u64 = 8 << 20;
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
        let cache = FrameCache::new(FRAME_CACHE_BYTES);
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
        let (whole, parts) = by_wholeness(live.data);
        for group in fetch_groups(&whole, |frame: &(FrameAt, Vec<Sequence>)| {
            u64::from(frame.0.len)
        }) {
            let pieces: Vec<_> = group.iter().map(|(frame, _)| whole_piece(*frame)).collect();
            let frames = fetch(self, geometry, &pieces, cache).await?;
            let group = group.to_vec();
            let work = tokio::task::spawn_blocking(move || {
                for (at, sequences) in &group {
                    packer.copy(&frames, at, sequences);
                }
                packer
            });
            packer = work.await.map_err(|_| failed())?;
            self.put_sealed(&mut packer, written).await?;
        }
        for group in fetch_groups(&parts, |live: &LiveData| u64::from(live.piece.frame.len)) {
            let pieces: Vec<_> = group.iter().map(|live| live.piece).collect();
            let frames = fetch(self, geometry, &pieces, cache).await?;
            let group = group.to_vec();
            let work = tokio::task::spawn_blocking(move || {
                group
                    .iter()
                    .try_for_each(|live| packer.add(&frames, live))
                    .map(|()| packer)
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

/// Frames that are alive as a whole, with the sequences of their blocks; and the pieces of the others.
fn by_wholeness(data: Vec<LiveData>) -> (Vec<(FrameAt, Vec<Sequence>)>, Vec<LiveData>) {
    let mut alive: HashMap<FrameAt, Vec<(u16, Sequence)>> = HashMap::new();
    for live in &data {
        let places = alive.entry(live.piece.frame).or_default();
        let count = u16::try_from(live.piece.blocks.count().get()).unwrap_or(u16::MAX);
        places.extend(
            (live.piece.first..live.piece.first + count).map(|place| (place, live.sequence)),
        );
    }
    let is_whole = |frame: &FrameAt| {
        alive
            .get(frame)
            .is_some_and(|places| places.len() == usize::from(frame.blocks))
    };
    let mut whole: Vec<(FrameAt, Vec<Sequence>)> = Vec::new();
    let mut seen = HashSet::new();
    let mut parts = Vec::new();
    for live in data {
        let frame = live.piece.frame;
        if !is_whole(&frame) {
            parts.push(live);
        } else if seen.insert(frame) {
            let mut places = alive.get(&frame).cloned().unwrap_or_default();
            places.sort_unstable_by_key(|(place, _)| *place);
            whole.push((
                frame,
                places.into_iter().map(|(_, sequence)| sequence).collect(),
            ));
        }
    }
    (whole, parts)
}

fn whole_piece(frame: FrameAt) -> DataPiece {
    DataPiece {
        blocks: Extent::between(BlockIndex::ZERO, BlockIndex::ZERO),
        frame,
        first: 0,
    }
}

/// Slices whose frames have about [`FETCH_BYTES`] together.
fn fetch_groups<T>(items: &[T], len: impl Fn(&T) -> u64) -> impl Iterator<Item = &[T]> {
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |item: &&T| {
            bytes += len(item);
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
            .get_or_insert_with(|| SegmentWriter::new(origin, 1 << 20))
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
