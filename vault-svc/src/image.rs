//! Reads a generation: finds its blocks window by window, and verifies every byte before it is served.

pub mod restore;

use std::{collections::HashMap, ops::Range, sync::Arc};

use bytes::Bytes;
use tidemark_block::{
    BlockIndex, Extent, FrameDecoder, Geometry, SegmentId, UnverifiedFrame, VerifiedFrame,
};
use tidemark_proto::{Reason, RpcError};
use vault_core::{
    image::overlay,
    manifest::{Generation, Manifest},
};

use crate::{
    cache::Cache,
    error::of_store,
    store::StoreError,
    volume::{Lease, Volume},
};

/// A frame in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FrameAt {
    pub(crate) segment: SegmentId,
    pub(crate) at: u64,
    pub(crate) len: u32,
    /// Blocks of the whole frame.
    pub(crate) blocks: u16,
}

impl FrameAt {
    fn range(&self) -> Range<u64> {
        self.at..self.at + u64::from(self.len)
    }
}

/// A run of blocks with data, and the frame that holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DataPiece {
    pub(crate) blocks: Extent,
    pub(crate) frame: FrameAt,
    /// The place of the first of these blocks among the frame's.
    pub(crate) first: u16,
}

/// One generation of a volume. While it is open, nothing it needs is deleted.
#[derive(Debug)]
pub struct ImageReader {
    volume: Arc<Volume>,
    manifest: Arc<Manifest>,
    generation: Generation,
    frames: FrameCache,
    _lease: Lease,
}

impl ImageReader {
    /// Opens a generation; zero stands for the newest.
    pub(crate) fn open(volume: Arc<Volume>, generation: u64) -> Result<Self, RpcError> {
        let (lease, manifest) = volume.leases.take(|| {
            let manifest = volume.manifest();
            (manifest.version, manifest)
        });
        let found = if generation == 0 {
            manifest.head()
        } else {
            manifest.generation(tidemark_block::GenerationId::new(generation))
        };
        let Some(generation) = found.cloned() else {
            return Err(no_generation(&manifest, generation));
        };
        Ok(Self {
            volume,
            manifest,
            generation,
            frames: FrameCache::new(FRAME_CACHE_BYTES),
            _lease: lease,
        })
    }

    /// What is read.
    #[must_use]
    pub const fn generation(&self) -> &Generation {
        &self.generation
    }

    /// The shape of the image.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.manifest.geometry
    }

    /// The runs of blocks with data in one window, ascending; all else in it is zero.
    pub(crate) async fn window(&self, window: Extent) -> Result<Vec<DataPiece>, RpcError> {
        let newest = self.generation.sequence();
        let read = async {
            let everything = tidemark_block::Sequence::ZERO;
            let mut records = self
                .volume
                .segments(&self.manifest, window, everything)
                .await?;
            records.retain(|record| record.sequences.0 <= newest);
            let indexes = self.volume.indexes(&self.manifest, &records).await?;
            Ok((records, indexes))
        };
        let (records, indexes) = read.await.map_err(|e: StoreError| of_store(&e))?;
        let work = tokio::task::spawn_blocking(move || {
            let pieces = overlay(indexes.iter().map(AsRef::as_ref), window, newest);
            let data = pieces.into_iter().filter_map(|piece| {
                let entry =
                    &indexes[piece.source.index as usize].entries()[piece.source.entry as usize];
                let skip = piece.blocks.start().since(entry.blocks.start()).get();
                (!entry.zero).then(|| DataPiece {
                    blocks: piece.blocks,
                    frame: FrameAt {
                        segment: records[piece.source.index as usize].id,
                        at: entry.frame_at,
                        len: entry.frame_len,
                        blocks: entry.frame_blocks,
                    },
                    first: entry.first_in_frame + u16::try_from(skip).unwrap_or(0),
                })
            });
            data.collect()
        });
        work.await
            .map_err(|_| RpcError::internal("a reader failed"))
    }

    /// The blocks that segments touch, ascending: all else is zero, however large the volume.
    pub(crate) async fn spans(&self) -> Result<Vec<Extent>, RpcError> {
        let mut spans: Vec<Extent> = self
            .manifest
            .tail
            .iter()
            .map(|record| record.blocks)
            .collect();
        for page in &self.manifest.pages {
            let records = self
                .volume
                .page(page.name)
                .await
                .map_err(|e| of_store(&e))?;
            spans.extend(records.iter().map(|record| record.blocks));
            spans = merged(spans);
        }
        Ok(merged(spans))
    }

    /// The bytes of `blocks`, all verified.
    ///
    /// # Errors
    /// The store can't be read, or is corrupt: nothing of it is given then.
    #[cfg(test)]
    pub(crate) async fn read(&self, blocks: Extent) -> Result<Vec<u8>, RpcError> {
        let geometry = self.geometry();
        let size = geometry.block_size().as_usize();
        let blocks = blocks.intersect(geometry.all());
        let count = usize::try_from(blocks.count().get()).unwrap_or(usize::MAX);
        let mut image = vec![0; count.saturating_mul(size)];
        let mut at = blocks.start();
        while at < blocks.end() {
            let window = vault_core::image::window_of(geometry, at);
            let pieces: Vec<_> = self
                .window(window)
                .await?
                .into_iter()
                .filter(|piece| !piece.blocks.intersect(blocks).is_empty())
                .collect();
            for part in pieces.chunks(64) {
                let frames = fetch(&self.volume, geometry, part, &self.frames).await?;
                for piece in part {
                    for (block, bytes) in blocks_of(&frames, piece)? {
                        if blocks.contains(block) {
                            let to = usize::try_from(block.since(blocks.start()).get())
                                .unwrap_or(0)
                                * size;
                            image[to..to + size].copy_from_slice(bytes);
                        }
                    }
                }
            }
            at = window.end();
        }
        Ok(image)
    }
}

/// Overlapping and adjacent extents as one.
fn merged(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_unstable_by_key(|extent| extent.start());
    let mut merged: Vec<Extent> = Vec::new();
    for extent in extents.into_iter().filter(|extent| !extent.is_empty()) {
        match merged.last_mut() {
            Some(last) if extent.start() <= last.end() => {
                *last = Extent::between(last.start(), last.end().max(extent.end()));
            }
            _ => merged.push(extent),
        }
    }
    merged
}

fn no_generation(manifest: &Manifest, wanted: u64) -> RpcError {
    let kept: Vec<String> = manifest
        .generations
        .iter()
        .map(|g| g.id.to_string())
        .collect();
    let message = if wanted == 0 {
        format!("volume {:?} has no generation yet", manifest.name)
    } else {
        format!("volume {:?} has no generation {wanted}", manifest.name)
    };
    let action = if kept.is_empty() {
        "ship an interval first".to_owned()
    } else {
        format!("it has {}", kept.join(", "))
    };
    RpcError::new(Reason::GenerationNotFound, message, action)
}

/// Frames that have been fetched and verified.
pub(crate) type Frames = HashMap<FrameAt, Arc<VerifiedFrame>>;

/// Verified frames of which other blocks are needed soon.
pub(crate) type FrameCache = Cache<FrameAt, VerifiedFrame>;

/// Bytes of frames that a reader keeps: one of each of the segments that may lie over each other.
pub(crate) const FRAME_CACHE_BYTES: usize = 32 << 20;

/// Fetches and verifies the frames of some pieces, each once.
pub(crate) async fn fetch(
    volume: &Volume,
    geometry: Geometry,
    pieces: &[DataPiece],
    cache: &FrameCache,
) -> Result<Frames, RpcError> {
    let mut found = Frames::new();
    let mut by_segment: HashMap<SegmentId, Vec<FrameAt>> = HashMap::new();
    for piece in pieces {
        if found.contains_key(&piece.frame) {
            continue;
        }
        if let Some(frame) = cache.get(&piece.frame) {
            found.insert(piece.frame, frame);
            continue;
        }
        let frames = by_segment.entry(piece.frame.segment).or_default();
        if !frames.contains(&piece.frame) {
            frames.push(piece.frame);
        }
    }
    let mut read: Vec<(FrameAt, Bytes)> = Vec::new();
    for (segment, frames) in by_segment {
        let ranges: Vec<_> = frames.iter().map(FrameAt::range).collect();
        let bytes = volume
            .store
            .frames(segment, &ranges)
            .await
            .map_err(|e| of_store(&e))?;
        read.extend(frames.into_iter().zip(bytes));
    }
    let verify = move || {
        let mut decoder = FrameDecoder::new();
        read.into_iter()
            .map(|(at, bytes)| {
                let whole = at.len as usize;
                let frame = UnverifiedFrame::split(bytes)
                    .and_then(|(frame, _)| frame.verify(geometry, &mut decoder))
                    .map_err(|error| (at, error.to_string()))?;
                if frame.encoded().len() != whole
                    || frame.block_count().get() != u64::from(at.blocks)
                {
                    return Err((at, "it is another frame than the index names".to_owned()));
                }
                Ok((at, Arc::new(frame)))
            })
            .collect::<Result<Vec<_>, _>>()
    };
    let verified = tokio::task::spawn_blocking(verify)
        .await
        .map_err(|_| RpcError::internal("a reader failed"))?
        .map_err(|(at, reason)| corrupt(volume, at, &reason))?;
    // A frame that is used as a whole isn't needed again.
    let mut used: HashMap<FrameAt, u64> = HashMap::new();
    for piece in pieces {
        *used.entry(piece.frame).or_insert(0) += piece.blocks.count().get();
    }
    for (at, frame) in verified {
        if used
            .get(&at)
            .is_some_and(|used| *used > 0 && *used < u64::from(at.blocks))
        {
            let bytes = frame.encoded().len() + frame.data().len();
            cache.insert(at, Arc::clone(&frame), bytes);
        }
        found.insert(at, frame);
    }
    Ok(found)
}

fn corrupt(volume: &Volume, at: FrameAt, reason: &str) -> RpcError {
    let path = volume.store.segment_path(at.segment);
    of_store(&StoreError::Corrupt {
        reason: format!("frame at byte {}: {reason}", at.at),
        path,
    })
}

/// The blocks of a piece, out of its verified frame.
pub(crate) fn blocks_of<'a>(
    frames: &'a Frames,
    piece: &DataPiece,
) -> Result<Vec<(BlockIndex, &'a [u8])>, RpcError> {
    let count = usize::try_from(piece.blocks.count().get()).unwrap_or(usize::MAX);
    let found: Vec<_> = frames
        .get(&piece.frame)
        .into_iter()
        .flat_map(|frame| frame.blocks())
        .skip(usize::from(piece.first))
        .take(count)
        .map(|block| (block.block(), block.bytes()))
        .collect();
    if found
        .iter()
        .map(|(block, _)| *block)
        .eq(piece.blocks.iter())
    {
        Ok(found)
    } else {
        // The index's own checksum was right, so this is not a flipped bit.
        Err(RpcError::new(
            Reason::StoreCorrupt,
            format!(
                "segment {}: the frame at byte {} doesn't hold blocks {}",
                piece.frame.segment, piece.frame.at, piece.blocks
            ),
            "restore another generation, and report it",
        ))
    }
}
