//! A whole image as a stream of batches: what Restore sends.
//!
//! Blocks ascend. A stored frame goes out as it is where all of its blocks are the image's and nothing lies between
//! them; the others are packed anew. Several batches are fetched and verified ahead, in order, so that the reader
//! of the stream and the store work at the same time.

use std::sync::Arc;

use futures::{Stream, StreamExt, TryStreamExt};
use tidemark_block::{
    BlockIndex, Checksum128, CodecChoice, Extent, FrameEncoder, Geometry, frame::blocks_max,
};
use tidemark_proto::{RpcError, convert::FrameBatch};

use vault_core::image::DataPiece;

use super::{Frames, ImageReader, blocks_of};

/// Batches fetched ahead.
const AHEAD: usize = 4;
/// Decoded bytes of a batch, about.
const BATCH_BYTES: u64 = 1 << 20;
/// Frames that a batch is made of, at most.
const BATCH_FRAMES: usize = 64;
/// Encoded bytes read for a batch, about: a frame may be read for one of its blocks.
const BATCH_READ_BYTES: u64 = 8 << 20;

/// A batch, and how many blocks it has.
#[derive(Debug, Clone)]
pub struct RestoredBatch {
    /// As it is sent.
    pub batch: FrameBatch,
    /// Blocks with data in it.
    pub blocks: u64,
}

/// Pieces that are sent together, up to the watermark `end`.
#[derive(Debug)]
struct Chunk {
    pieces: Vec<DataPiece>,
    end: BlockIndex,
}

/// The batches of an image, ascending. Ends at the first error.
pub fn batches(reader: Arc<ImageReader>) -> impl Stream<Item = Result<RestoredBatch, RpcError>> {
    let geometry = reader.geometry();
    let windows = {
        let reader = Arc::clone(&reader);
        futures::stream::once(async move { reader.spans().await })
            .map_ok(move |spans| futures::stream::iter(touched(geometry, spans).map(Ok)))
            .try_flatten()
    };
    let maps = {
        let reader = Arc::clone(&reader);
        windows.map(move |window: Result<Extent, RpcError>| {
            let reader = Arc::clone(&reader);
            async move {
                let window = window?;
                let pieces: Vec<_> = reader.map(window).await?.pieces(window).collect();
                Ok::<_, RpcError>(chunks(geometry, &pieces, window.end()))
            }
        })
    };
    // One map is made while the one before it is sent.
    maps.buffered(2)
        .map_ok(|chunks| futures::stream::iter(chunks.into_iter().map(Ok::<_, RpcError>)))
        .try_flatten()
        .map(move |chunk| {
            let reader = Arc::clone(&reader);
            async move { pack(&reader, geometry, chunk?).await }
        })
        .buffered(AHEAD)
}

/// The windows that ascending spans touch, each once.
fn touched(geometry: Geometry, spans: Vec<Extent>) -> impl Iterator<Item = Extent> {
    let mut behind = BlockIndex::ZERO;
    spans
        .into_iter()
        .flat_map(move |span| vault_core::image::windows(geometry, span))
        .filter(move |window| {
            let new = window.start() >= behind;
            behind = behind.max(window.end());
            new
        })
}

/// Adjacent pieces of the same frame; never taken apart.
fn runs(pieces: &[DataPiece]) -> impl Iterator<Item = &[DataPiece]> {
    pieces.chunk_by(|a, b| a.frame == b.frame)
}

fn chunks(geometry: Geometry, pieces: &[DataPiece], end: BlockIndex) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let (mut decoded, mut read, mut frames) = (0, 0, 0);
    for run in runs(pieces) {
        let bytes = run
            .iter()
            .map(|piece| geometry.bytes(piece.blocks.count()))
            .sum::<u64>();
        let encoded = run.first().map_or(0, |piece| u64::from(piece.frame.len));
        let full = decoded + bytes > BATCH_BYTES
            || read + encoded > BATCH_READ_BYTES
            || frames >= BATCH_FRAMES;
        if chunks.is_empty() || full {
            (decoded, read, frames) = (0, 0, 0);
            chunks.push(Chunk {
                pieces: Vec::new(),
                end,
            });
        }
        decoded += bytes;
        read += encoded;
        frames += 1;
        if let Some(chunk) = chunks.last_mut() {
            chunk.pieces.extend_from_slice(run);
            chunk.end = run.last().map_or(end, |piece| piece.blocks.end());
        }
    }
    // What is zero up to the window's end is known with its last batch.
    if let Some(last) = chunks.last_mut() {
        last.end = end;
    }
    chunks
}

async fn pack(
    reader: &ImageReader,
    geometry: Geometry,
    chunk: Chunk,
) -> Result<RestoredBatch, RpcError> {
    let frames = reader.fetch(&chunk.pieces).await?;
    let work = tokio::task::spawn_blocking(move || pack_frames(geometry, &frames, &chunk));
    work.await
        .map_err(|_| RpcError::internal("a reader failed"))?
}

fn pack_frames(
    geometry: Geometry,
    frames: &Frames,
    chunk: &Chunk,
) -> Result<RestoredBatch, RpcError> {
    let mut packer = Packer::new(geometry);
    let mut blocks = 0;
    for run in runs(&chunk.pieces) {
        let here = run
            .iter()
            .map(|piece| piece.blocks.count().get())
            .sum::<u64>();
        blocks += here;
        let whole = run
            .first()
            .is_some_and(|piece| u64::from(piece.frame.blocks) == here);
        if let (true, Some(frame)) = (
            whole,
            run.first().and_then(|piece| frames.get(&piece.frame)),
        ) {
            // The blocks themselves are compared too: the index is not the frame.
            for piece in run {
                blocks_of(frames, piece)?;
            }
            packer.flush();
            packer.out.extend_from_slice(frame.encoded());
            continue;
        }
        for piece in run {
            for (block, bytes) in blocks_of(frames, piece)? {
                packer.push(block, bytes, checksum_of(frames, piece, block));
            }
        }
    }
    packer.flush();
    Ok(RestoredBatch {
        batch: FrameBatch {
            end: chunk.end,
            frames: packer.out.into(),
        },
        blocks,
    })
}

fn checksum_of(frames: &Frames, piece: &DataPiece, block: BlockIndex) -> Checksum128 {
    let place = u64::from(piece.first) + block.since(piece.blocks.start()).get();
    frames
        .get(&piece.frame)
        .and_then(|frame| {
            frame
                .checksums()
                .nth(usize::try_from(place).unwrap_or(usize::MAX))
        })
        .unwrap_or_default()
}

struct Packer {
    geometry: Geometry,
    /// Made when it is needed: most frames go out as they are.
    encoder: Option<FrameEncoder>,
    blocks_max: usize,
    blocks: Vec<(BlockIndex, Checksum128)>,
    data: Vec<u8>,
    out: Vec<u8>,
}

impl Packer {
    fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            encoder: None,
            blocks_max: blocks_max(geometry.block_size()),
            blocks: Vec::new(),
            data: Vec::new(),
            out: Vec::new(),
        }
    }

    fn push(&mut self, block: BlockIndex, bytes: &[u8], checksum: Checksum128) {
        if self.blocks.len() == self.blocks_max {
            self.flush();
        }
        self.blocks.push((block, checksum));
        self.data.extend_from_slice(bytes);
    }

    fn flush(&mut self) {
        if !self.blocks.is_empty() {
            let geometry = self.geometry;
            self.encoder
                .get_or_insert_with(|| FrameEncoder::new(geometry))
                .encode_data(&self.blocks, &self.data, CodecChoice::Raw, &mut self.out);
            self.blocks.clear();
            self.data.clear();
        }
    }
}
