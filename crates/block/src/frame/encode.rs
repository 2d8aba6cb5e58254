//! Making frames.

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

use super::{BLOCKS_MAX, CHECKSUM_AT, Codec, EXTENTS_MAX, HEADER_LEN, MAGIC, VERSION, blocks_max};
use crate::{
    checksum::Checksum128,
    extent::{Extent, coalesce},
    geometry::Geometry,
    units::{BlockCount, BlockIndex},
};

/// Compressed payloads above this share of the plain bytes (in sixteenths) are not worth decoding: raw is kept.
const WORTH_SIXTEENTHS: usize = 15;

/// What an encoder should try.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodecChoice {
    /// Plain blocks.
    Raw,
    /// zstd at this level, 1 to 19; plain blocks where it doesn't help.
    Zstd(i32),
}

/// Encodes the frames of one volume. Reuses its compression context: keep one per thread.
pub struct FrameEncoder {
    geometry: Geometry,
    zstd: zstd::bulk::Compressor<'static>,
    level: i32,
}

impl fmt::Debug for FrameEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameEncoder")
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

impl FrameEncoder {
    /// An encoder for one volume.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            zstd: zstd::bulk::Compressor::default(),
            level: zstd::DEFAULT_COMPRESSION_LEVEL,
        }
    }

    /// Appends one frame with the data of `blocks`, which ascend; `data` holds their bytes in the same order.
    /// Returns the codec that was used.
    ///
    /// # Panics
    /// Where there is no block or more than fit, where they don't ascend within the volume, or where `data` is not
    /// as long as they are together.
    pub fn encode_data(
        &mut self,
        blocks: &[(BlockIndex, Checksum128)],
        data: &[u8],
        choice: CodecChoice,
        out: &mut Vec<u8>,
    ) -> Codec {
        let size = self.geometry.block_size();
        assert!(
            !blocks.is_empty() && blocks.len() <= blocks_max(size),
            "a frame has 1 to {} blocks",
            blocks_max(size)
        );
        assert_eq!(
            data.len(),
            blocks.len() * size.as_usize(),
            "each block has its bytes"
        );
        assert!(
            blocks.windows(2).all(|pair| pair[0].0 < pair[1].0)
                && blocks
                    .last()
                    .is_some_and(|(last, _)| self.geometry.all().contains(*last)),
            "blocks ascend within the volume"
        );
        let extents: Vec<_> = coalesce(
            blocks
                .iter()
                .map(|(block, _)| Extent::new(*block, BlockCount::new(1))),
        )
        .collect();
        let start = self.begin(&extents, blocks.len(), out);
        for (_, checksum) in blocks {
            out.extend_from_slice(checksum.as_bytes());
        }
        let payload_at = out.len();
        let compressed = match choice {
            CodecChoice::Raw => false,
            CodecChoice::Zstd(level) => self.compress(data, level, out),
        };
        let codec = if compressed {
            Codec::Zstd
        } else {
            out.truncate(payload_at);
            out.extend_from_slice(data);
            Codec::Raw
        };
        let payload = out.len() - payload_at;
        finish(out, start, codec, payload);
        codec
    }

    /// Appends one frame that says that `extents` are zero.
    ///
    /// # Panics
    /// Where there is no extent or more than 64, one is longer than 2^32 - 1 blocks, or they don't ascend within
    /// the volume.
    pub fn encode_zero(&self, extents: &[Extent], out: &mut Vec<u8>) {
        assert!(
            !extents.is_empty() && extents.len() <= EXTENTS_MAX,
            "a frame has 1 to {EXTENTS_MAX} extents"
        );
        assert!(
            extents.iter().all(|extent| !extent.is_empty())
                && extents
                    .windows(2)
                    .all(|pair| pair[0].end() <= pair[1].start())
                && extents
                    .last()
                    .is_some_and(|last| last.end() <= self.geometry.all().end()),
            "extents ascend within the volume"
        );
        let start = self.begin(extents, 0, out);
        finish(out, start, Codec::Zero, 0);
    }

    fn begin(&self, extents: &[Extent], blocks: usize, out: &mut Vec<u8>) -> usize {
        debug_assert!(blocks <= BLOCKS_MAX);
        let start = out.len();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, 0, 0]);
        out.push(
            self.geometry
                .block_size()
                .get()
                .trailing_zeros()
                .to_le_bytes()[0],
        );
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&narrow::<u16, _>(extents.len()).to_le_bytes());
        out.extend_from_slice(&narrow::<u32, _>(blocks).to_le_bytes());
        out.resize(start + HEADER_LEN, 0);
        for extent in extents {
            out.extend_from_slice(&extent.start().get().to_le_bytes());
            out.extend_from_slice(&narrow::<u32, _>(extent.count().get()).to_le_bytes());
        }
        start
    }

    /// Appends the compressed `data`; false where that is not worth it, with `out` in any state past its length.
    fn compress(&mut self, data: &[u8], level: i32, out: &mut Vec<u8>) -> bool {
        if level != self.level {
            if self.zstd.set_compression_level(level).is_err() {
                return false;
            }
            self.level = level;
        }
        let at = out.len();
        let room = data.len() * WORTH_SIXTEENTHS / 16;
        out.resize(at + room, 0);
        match self.zstd.compress_to_buffer(data, &mut out[at..]) {
            Ok(written) => {
                out.truncate(at + written);
                true
            }
            // It did not fit into the room that would have been worth it.
            Err(_) => false,
        }
    }
}

fn finish(out: &mut [u8], start: usize, codec: Codec, payload: usize) {
    let frame = &mut out[start..];
    frame[5] = codec as u8;
    frame[16..20].copy_from_slice(&narrow::<u32, _>(payload).to_le_bytes());
    let mut hash = Xxh3::new();
    hash.update(&frame[..CHECKSUM_AT]);
    hash.update(&frame[HEADER_LEN..]);
    frame[CHECKSUM_AT..HEADER_LEN].copy_from_slice(&hash.digest128().to_le_bytes());
}

fn narrow<N, W>(wide: W) -> N
where
    N: TryFrom<W>,
    N::Error: fmt::Debug,
{
    N::try_from(wide).expect("bounded by the assertions on a frame's content")
}
