//! Reading frames that came off a wire or a disk.

use std::fmt;

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::{
    CHECKSUM_AT, Codec, EXTENT_LEN, EXTENTS_MAX, FrameError, HEADER_LEN, MAGIC, VERSION,
    blocks_max, check_extents,
};
use crate::{
    checksum::Checksum128,
    extent::Extent,
    geometry::{BlockSize, Geometry},
    units::{BlockCount, BlockIndex},
    verified::{UnverifiedBlock, VerifiedBlock},
    wire::{Reader, WireError},
};

/// Decodes payloads. Reuses its context: keep one per thread.
#[derive(Default)]
pub struct FrameDecoder {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameDecoder").finish_non_exhaustive()
    }
}

impl FrameDecoder {
    /// A decoder for frames of any volume.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

/// A whole frame as it came off a wire or a disk: its fields are in range, its bytes unproven.
#[derive(Debug, Clone)]
pub struct UnverifiedFrame {
    encoded: Bytes,
    codec: Codec,
    block_size: BlockSize,
    extents: Vec<Extent>,
    checksums_at: usize,
    payload_at: usize,
}

impl UnverifiedFrame {
    /// Takes one whole frame off the front of `bytes`, and gives what is left.
    ///
    /// # Errors
    /// Where no whole frame with fields in range begins there.
    pub fn split(mut bytes: Bytes) -> Result<(Self, Bytes), FrameError> {
        let left = bytes.len();
        let header = bytes.get(..HEADER_LEN).ok_or(FrameError::Short {
            wanted: HEADER_LEN,
            left,
        })?;
        let header = Header::read(header)?;
        let checksums_at = HEADER_LEN + header.extents * EXTENT_LEN;
        let payload_at = checksums_at + header.blocks * Checksum128::LEN;
        let wanted = payload_at + header.payload;
        if left < wanted {
            return Err(FrameError::Short { wanted, left });
        }
        let encoded = bytes.split_to(wanted);
        let extents = read_extents(&encoded[HEADER_LEN..checksums_at])?;
        let blocks = extents
            .iter()
            .map(|extent| extent.count().get())
            .sum::<u64>();
        if header.codec != Codec::Zero && blocks != header.blocks as u64 {
            return Err(FrameError::Range("number of blocks"));
        }
        let frame = Self {
            encoded,
            codec: header.codec,
            block_size: header.block_size,
            extents,
            checksums_at,
            payload_at,
        };
        Ok((frame, bytes))
    }

    /// Its extents, unproven: for finding the way, not for deciding.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Checks the encoded bytes, decodes them, and checks every block.
    ///
    /// # Errors
    /// Where anything is not as it was written, or doesn't belong to a volume of this shape.
    pub fn verify(
        self,
        geometry: Geometry,
        decoder: &mut FrameDecoder,
    ) -> Result<VerifiedFrame, FrameError> {
        self.check_encoded()?;
        if self.block_size != geometry.block_size() {
            return Err(FrameError::BlockSize {
                found: self.block_size,
                expected: geometry.block_size(),
            });
        }
        check_extents(&self.extents, geometry)?;
        let size = self.block_size.as_usize();
        let payload = self.encoded.slice(self.payload_at..);
        let decoded_len = (self.payload_at - self.checksums_at) / Checksum128::LEN * size;
        let data = match self.codec {
            Codec::Zero | Codec::Raw => payload,
            Codec::Zstd => {
                let mut data = Vec::with_capacity(decoded_len);
                match decoder.zstd.decompress_to_buffer(&payload, &mut data) {
                    Ok(written) if written == decoded_len => Bytes::from(data),
                    _ => return Err(FrameError::Payload(decoded_len)),
                }
            }
            Codec::Delta => return Err(FrameError::Unknown("codec")),
        };
        if data.len() != decoded_len {
            return Err(FrameError::Payload(decoded_len));
        }
        let frame = VerifiedFrame { frame: self, data };
        for (block, bytes, expected) in frame.parts() {
            UnverifiedBlock::new(block, bytes, expected).verify()?;
        }
        Ok(frame)
    }

    fn check_encoded(&self) -> Result<(), FrameError> {
        let mut hash = Xxh3::new();
        hash.update(&self.encoded[..CHECKSUM_AT]);
        hash.update(&self.encoded[HEADER_LEN..]);
        let found = Checksum128::from_bytes(hash.digest128().to_le_bytes());
        let mut stored = [0; Checksum128::LEN];
        stored.copy_from_slice(&self.encoded[CHECKSUM_AT..HEADER_LEN]);
        let stored = Checksum128::from_bytes(stored);
        if found == stored {
            Ok(())
        } else {
            Err(FrameError::Corrupt { found, stored })
        }
    }
}

/// A frame whose encoded bytes and blocks have all been checked.
#[derive(Debug, Clone)]
pub struct VerifiedFrame {
    frame: UnverifiedFrame,
    data: Bytes,
}

impl VerifiedFrame {
    /// The frame as it is sent and stored.
    #[must_use]
    pub const fn encoded(&self) -> &Bytes {
        &self.frame.encoded
    }

    /// How its payload is encoded.
    #[must_use]
    pub const fn codec(&self) -> Codec {
        self.frame.codec
    }

    /// Its extents, ascending. With [`Codec::Zero`] all of their blocks are zero.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.frame.extents
    }

    /// How many blocks its extents have.
    #[must_use]
    pub fn block_count(&self) -> BlockCount {
        BlockCount::new(
            self.frame
                .extents
                .iter()
                .map(|extent| extent.count().get())
                .sum(),
        )
    }

    /// Its blocks with data, ascending; none with [`Codec::Zero`].
    pub fn blocks(&self) -> impl Iterator<Item = VerifiedBlock<'_>> {
        self.parts()
            .map(|(block, bytes, checksum)| VerifiedBlock::checked(block, bytes, checksum))
    }

    /// The block at place `at` of those with data, counted from 0.
    #[must_use]
    pub fn block(&self, at: usize) -> Option<VerifiedBlock<'_>> {
        self.blocks().nth(at)
    }

    /// The checksums of its blocks with data, in the order of its extents.
    pub fn checksums(&self) -> impl Iterator<Item = Checksum128> + '_ {
        self.parts().map(|(_, _, checksum)| checksum)
    }

    /// All its decoded bytes, in the order of its extents.
    #[must_use]
    pub const fn data(&self) -> &Bytes {
        &self.data
    }

    fn parts(&self) -> impl Iterator<Item = (BlockIndex, &[u8], Checksum128)> {
        let size = self.frame.block_size.as_usize();
        let checksums = &self.frame.encoded[self.frame.checksums_at..self.frame.payload_at];
        let (checksums, _) = checksums.as_chunks::<{ Checksum128::LEN }>();
        self.frame
            .extents
            .iter()
            .flat_map(|extent| extent.iter())
            .zip(self.data.chunks_exact(size))
            .zip(checksums)
            .map(|((block, bytes), checksum)| (block, bytes, Checksum128::from_bytes(*checksum)))
    }
}

struct Header {
    codec: Codec,
    block_size: BlockSize,
    extents: usize,
    blocks: usize,
    payload: usize,
}

impl Header {
    fn read(header: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Reader::new(header);
        let mut read = || -> Result<_, WireError> {
            Ok((
                fields.array::<4>()?,
                fields.array::<4>()?,
                fields.u16()?,
                fields.u16()?,
                fields.u32()?,
                fields.u32()?,
                fields.u32()?,
                fields.u64()?,
            ))
        };
        let (magic, kinds, features, extents, blocks, payload, reserved, key) =
            read().map_err(|_| FrameError::Short {
                wanted: HEADER_LEN,
                left: header.len(),
            })?;
        let [version, codec, digest_kind, block_log] = kinds;
        if magic != MAGIC {
            return Err(FrameError::Magic);
        }
        if version > VERSION {
            return Err(FrameError::Version(version));
        }
        let codec = match codec {
            0 => Codec::Zero,
            1 => Codec::Raw,
            2 => Codec::Zstd,
            3 => Codec::Delta,
            _ => return Err(FrameError::Unknown("codec")),
        };
        if features != 0 {
            return Err(FrameError::Unknown("features"));
        }
        if digest_kind != 0 {
            return Err(FrameError::Unknown("digest kind"));
        }
        if key != 0 {
            return Err(FrameError::Unknown("key"));
        }
        let block_size = 1u32
            .checked_shl(u32::from(block_log))
            .and_then(|size| BlockSize::new(size).ok())
            .ok_or(FrameError::Range("block size"))?;
        let size = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
        let header = Self {
            codec,
            block_size,
            extents: usize::from(extents),
            blocks: size(blocks),
            payload: size(payload),
        };
        header.check(version, reserved)?;
        Ok(header)
    }

    fn check(&self, version: u8, reserved: u32) -> Result<(), FrameError> {
        if version == 0 || reserved != 0 {
            return Err(FrameError::Range("version or reserved field"));
        }
        if self.extents == 0 || self.extents > EXTENTS_MAX {
            return Err(FrameError::Range("number of extents"));
        }
        let blocks_fit = match self.codec {
            Codec::Zero => self.blocks == 0,
            _ => self.blocks > 0 && self.blocks <= blocks_max(self.block_size),
        };
        if !blocks_fit {
            return Err(FrameError::Range("number of blocks"));
        }
        let decoded = self.blocks * self.block_size.as_usize();
        let payload_fits = match self.codec {
            Codec::Zero | Codec::Raw => self.payload == decoded,
            Codec::Zstd | Codec::Delta => self.payload > 0 && self.payload <= decoded,
        };
        if payload_fits {
            Ok(())
        } else {
            Err(FrameError::Range("payload length"))
        }
    }
}

fn read_extents(bytes: &[u8]) -> Result<Vec<Extent>, FrameError> {
    let mut extents = Vec::with_capacity(bytes.len() / EXTENT_LEN);
    let mut next = 0;
    let (records, _) = bytes.as_chunks::<EXTENT_LEN>();
    for record in records {
        let mut fields = Reader::new(record);
        let (Ok(start), Ok(count)) = (fields.u64(), fields.u32()) else {
            return Err(FrameError::Range("extent"));
        };
        let end = start
            .checked_add(u64::from(count))
            .ok_or(FrameError::Range("extent"))?;
        if start < next || count == 0 {
            return Err(FrameError::Range("extent"));
        }
        extents.push(Extent::between(
            BlockIndex::new(start),
            BlockIndex::new(end),
        ));
        next = end;
    }
    Ok(extents)
}
