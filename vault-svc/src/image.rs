//! Reads a generation: finds its blocks window by window, and verifies every byte before it is served.
//!
//! What is found is kept: maps of windows, which tell where each block is, and verified frames of which only a part
//! was needed. So a read near an earlier one costs a lookup and at most one read of a frame. Both caches are shared by
//! all readers of a vault and bounded in bytes. A map names segments, and segments are replaced by reclaim, so a map
//! is kept under the checksum of the list of segments that it was made from ([`Manifest::chain`]): a reader finds
//! maps of what its own manifest names and of nothing else. Frames need no such care: a segment never changes.

pub mod restore;

use std::{cell::RefCell, collections::HashMap, ops::Range, sync::Arc};

use bytes::Bytes;
use tidemark_block::{
    BlockIndex, Checksum128, Extent, FrameDecoder, GenerationId, Geometry, SegmentId, Sequence,
    UnverifiedFrame, VerifiedFrame, VolumeId,
};
use tidemark_proto::{Reason, RpcError};
use vault_core::{
    image::{DataPiece, ExtentMap, FrameAt, window_of},
    manifest::{Generation, Manifest},
};

use crate::{
    cache::Cache,
    error::of_store,
    store::StoreError,
    volume::{Lease, Volume},
};

/// Memory for maps, all readers together: of 128 GiB whose frames are whole, or of 2 GiB of scattered blocks.
pub(crate) const MAPS_BYTES_MAX: usize = 16 << 20;
/// Memory for verified frames, all readers together: a restore wants one of each segment that lies over another.
pub(crate) const FRAMES_BYTES_MAX: usize = 64 << 20;

/// A window of an image, and the segments that it was made from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct MapKey {
    volume: VolumeId,
    newest: Sequence,
    chain: Checksum128,
    window: BlockIndex,
}

/// Maps of windows that were read.
pub(crate) type MapCache = Cache<MapKey, ExtentMap>;

/// One generation of a volume. While it is open, nothing it needs is deleted.
#[derive(Debug)]
pub struct ImageReader {
    volume: Arc<Volume>,
    manifest: Arc<Manifest>,
    generation: Generation,
    /// Which segments the image is read from.
    chain: Checksum128,
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
            manifest.generation(GenerationId::new(generation))
        };
        let Some(generation) = found.cloned() else {
            return Err(no_generation(&manifest, generation));
        };
        Ok(Self {
            chain: manifest.chain(generation.sequence()),
            volume,
            manifest,
            generation,
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

    /// The map of one window.
    pub(crate) async fn map(&self, window: Extent) -> Result<Arc<ExtentMap>, RpcError> {
        let key = MapKey {
            volume: self.volume.id,
            newest: self.generation.sequence(),
            chain: self.chain,
            window: window.start(),
        };
        let maps = &self.volume.shared.maps;
        if let Some(map) = maps.get(&key) {
            return Ok(map);
        }
        let map = Arc::new(self.make_map(window).await?);
        maps.insert(key, Arc::clone(&map), map.memory());
        Ok(map)
    }

    async fn make_map(&self, window: Extent) -> Result<ExtentMap, RpcError> {
        let newest = self.generation.sequence();
        let read = async {
            let mut records = self
                .volume
                .segments(&self.manifest, window, Sequence::ZERO)
                .await?;
            records.retain(|record| record.sequences.0 <= newest);
            let indexes = self.volume.indexes(&self.manifest, &records).await?;
            Ok((records, indexes))
        };
        let (records, indexes) = read.await.map_err(|e: StoreError| of_store(&e))?;
        let work = tokio::task::spawn_blocking(move || {
            let segments: Vec<_> = records
                .iter()
                .zip(&indexes)
                .map(|(record, index)| (record.id, index.as_ref()))
                .collect();
            ExtentMap::new(&segments, window, newest)
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

    /// The bytes of `blocks`, all verified; what lies behind the image's end is left out.
    ///
    /// # Errors
    /// The store can't be read, or is corrupt: nothing of it is given then.
    pub async fn read(&self, blocks: Extent) -> Result<Vec<u8>, RpcError> {
        let geometry = self.geometry();
        let size = geometry.block_size().as_usize();
        let blocks = blocks.intersect(geometry.all());
        let count = usize::try_from(blocks.count().get()).unwrap_or(usize::MAX);
        let mut image = vec![0; count.saturating_mul(size)];
        let mut at = blocks.start();
        while at < blocks.end() {
            let window = window_of(geometry, at);
            let map = self.map(window).await?;
            let pieces: Vec<_> = map.pieces(blocks).collect();
            for part in pieces.chunks(FRAMES_AT_ONCE) {
                let frames = self.fetch(part).await?;
                for piece in part {
                    for (block, bytes) in blocks_of(&frames, piece)? {
                        let place = block.since(blocks.start()).get();
                        let to = usize::try_from(place).unwrap_or(usize::MAX) * size;
                        image[to..to + size].copy_from_slice(bytes);
                    }
                }
            }
            at = window.end();
        }
        Ok(image)
    }

    /// The frames of some pieces, verified.
    pub(crate) async fn fetch(&self, pieces: &[DataPiece]) -> Result<Frames, RpcError> {
        let cache = &self.volume.shared.frames;
        fetch(&self.volume, self.geometry(), pieces, cache).await
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

/// Verified frames of which other blocks may be needed soon.
pub(crate) type FrameCache = Cache<(VolumeId, FrameAt), VerifiedFrame>;

/// Pieces whose frames a read holds in memory together.
const FRAMES_AT_ONCE: usize = 64;

/// Fetches and verifies the frames of some pieces, each once.
pub(crate) async fn fetch(
    volume: &Volume,
    geometry: Geometry,
    pieces: &[DataPiece],
    cache: &FrameCache,
) -> Result<Frames, RpcError> {
    let mut found = Frames::new();
    // Of each frame that is to be read, how many blocks are wanted.
    let mut wanted: HashMap<FrameAt, u64> = HashMap::new();
    for piece in pieces {
        if found.contains_key(&piece.frame) {
            continue;
        }
        if let Some(blocks) = wanted.get_mut(&piece.frame) {
            *blocks += piece.blocks.count().get();
        } else if let Some(frame) = cache.get(&(volume.id, piece.frame)) {
            found.insert(piece.frame, frame);
        } else {
            wanted.insert(piece.frame, piece.blocks.count().get());
        }
    }
    // A frame that is used as a whole isn't needed again.
    let keeps = |at: &FrameAt| {
        let used = wanted.get(at).copied().unwrap_or(0);
        used > 0 && used < u64::from(at.blocks)
    };
    let mut read = read_frames(volume, wanted.keys().copied()).await?;
    for (at, bytes) in &mut read {
        // Several frames may have been read as one buffer, which one of them would keep in memory.
        if keeps(at) {
            *bytes = Bytes::copy_from_slice(bytes);
        }
    }
    let verified = tokio::task::spawn_blocking(move || verify_frames(geometry, read))
        .await
        .map_err(|_| RpcError::internal("a reader failed"))?
        .map_err(|(at, reason)| corrupt(volume, at, &reason))?;
    for (at, frame) in verified {
        if keeps(&at) {
            let extents = size_of_val(frame.extents());
            let bytes = frame.encoded().len() + frame.data().len() + extents;
            cache.insert((volume.id, at), Arc::clone(&frame), bytes);
        }
        found.insert(at, frame);
    }
    Ok(found)
}

/// Reads frames as they are stored, all of one segment in one request.
async fn read_frames(
    volume: &Volume,
    wanted: impl Iterator<Item = FrameAt>,
) -> Result<Vec<(FrameAt, Bytes)>, RpcError> {
    let mut by_segment: HashMap<SegmentId, Vec<FrameAt>> = HashMap::new();
    for at in wanted {
        by_segment.entry(at.segment).or_default().push(at);
    }
    let mut read = Vec::new();
    for (segment, mut frames) in by_segment {
        frames.sort_unstable_by_key(|frame| frame.at);
        let ranges: Vec<Range<u64>> = frames.iter().map(FrameAt::range).collect();
        let bytes = volume
            .store
            .frames(segment, &ranges)
            .await
            .map_err(|e| of_store(&e))?;
        read.extend(frames.into_iter().zip(bytes));
    }
    Ok(read)
}

thread_local! {
    static DECODER: RefCell<FrameDecoder> = RefCell::new(FrameDecoder::new());
}

/// The frames, or the one that isn't what the index says and why.
fn verify_frames(
    geometry: Geometry,
    read: Vec<(FrameAt, Bytes)>,
) -> Result<Frames, (FrameAt, String)> {
    let verify = |(at, bytes): (FrameAt, Bytes)| {
        let frame = UnverifiedFrame::split(bytes)
            .and_then(|(frame, _)| {
                DECODER.with_borrow_mut(|decoder| frame.verify(geometry, decoder))
            })
            .map_err(|error| (at, error.to_string()))?;
        let is_other = frame.encoded().len() != at.len as usize
            || frame.block_count().get() != u64::from(at.blocks);
        if is_other {
            return Err((at, "it is another frame than the index names".to_owned()));
        }
        Ok((at, Arc::new(frame)))
    };
    read.into_iter().map(verify).collect()
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
