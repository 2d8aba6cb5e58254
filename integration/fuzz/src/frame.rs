//! Frames: bytes to blocks, with the checksums as they came or made right, and blocks to bytes and back.

use std::cell::RefCell;

use bytes::Bytes;
use tidemark_block::{
    BlockIndex, BlockSize, Codec, CodecChoice, Extent, FrameDecoder, FrameEncoder, Geometry,
    UnverifiedFrame, VerifiedFrame, block_checksum,
    frame::{BLOCKS_MAX, DECODED_LEN_MAX, EXTENTS_MAX, HEADER_LEN, blocks_max},
    xxh3_128,
};

use crate::{bounded::bounded, input::Input};

const EXTENT_LEN: usize = 12;

thread_local! {
    static DECODER: RefCell<FrameDecoder> = RefCell::default();
    static ENCODER: RefCell<FrameEncoder> = RefCell::new(FrameEncoder::new(geometry()));
}

/// 4,096 blocks of 4 KiB.
pub(crate) fn geometry() -> Geometry {
    Geometry::new(4096 * 4096, BlockSize::MIN).expect("blocks of 4 KiB")
}

/// Splits and verifies one frame of a volume of [`geometry`], and what follows it.
pub(crate) fn verified(bytes: Bytes, geometry: Geometry) -> Option<(VerifiedFrame, Bytes)> {
    let (frame, rest) = UnverifiedFrame::split(bytes).ok()?;
    let frame = DECODER.with_borrow_mut(|decoder| frame.verify(geometry, decoder).ok())?;
    Some((frame, rest))
}

/// Encodes blocks of [`geometry`], each filled with its number and a byte.
pub(crate) fn encoded(blocks: &[u64], fill: u8, zstd: bool) -> Vec<u8> {
    let mut data = Vec::with_capacity(blocks.len() * 4096);
    let mut named = Vec::with_capacity(blocks.len());
    for &block in blocks {
        let start = data.len();
        data.resize(start + 4096, fill);
        data[start..start + 8].copy_from_slice(&(block * u64::from(fill)).to_le_bytes());
        named.push((BlockIndex::new(block), block_checksum(&data[start..])));
    }
    let choice = if zstd {
        CodecChoice::Zstd(1)
    } else {
        CodecChoice::Raw
    };
    let mut out = Vec::new();
    ENCODER.with_borrow_mut(|encoder| encoder.encode_data(&named, &data, choice, &mut out));
    out
}

/// Encodes a frame that says that extents of [`geometry`] are zero.
pub(crate) fn encoded_zero(extents: &[Extent]) -> Vec<u8> {
    let mut out = Vec::new();
    ENCODER.with_borrow(|encoder| encoder.encode_zero(extents, &mut out));
    out
}

/// Makes the checksums right: that of each block of a raw frame, then that of the whole.
fn reseal(frame: &mut [u8]) {
    let Some(header) = frame.first_chunk::<HEADER_LEN>() else {
        return;
    };
    let number = |at: usize, length: usize| {
        let mut wide = [0; 8];
        wide[..length].copy_from_slice(&header[at..at + length]);
        usize::try_from(u64::from_le_bytes(wide)).expect("at most 32 bits")
    };
    let (codec, log) = (header[5], header[7]);
    let (extents, blocks, payload) = (number(10, 2), number(12, 4), number(16, 4));
    let sums_at = HEADER_LEN + extents * EXTENT_LEN;
    let payload_at = sums_at + blocks * 16;
    let end = payload_at + payload;
    if end > frame.len() {
        return;
    }
    if codec == 1 && log == 12 {
        for n in 0..blocks.min(payload / 4096) {
            let at = payload_at + n * 4096;
            let sum = *block_checksum(&frame[at..at + 4096]).as_bytes();
            frame[sums_at + n * 16..][..16].copy_from_slice(&sum);
        }
    }
    let covered = [&frame[..32], &frame[HEADER_LEN..end]].concat();
    frame[32..48].copy_from_slice(xxh3_128(&covered).as_bytes());
}

fn check(frame: &VerifiedFrame, bytes: &[u8], geometry: Geometry) {
    assert!(
        bytes.starts_with(frame.encoded()),
        "a frame is its own bytes"
    );
    assert!(frame.extents().len() <= EXTENTS_MAX && frame.data().len() <= DECODED_LEN_MAX);
    let mut next = BlockIndex::ZERO;
    for extent in frame.extents() {
        assert!(extent.start() >= next && !extent.is_empty());
        next = extent.end();
    }
    assert!(next <= geometry.all().end());
    let blocks: Vec<_> = frame.blocks().collect();
    match frame.codec() {
        Codec::Zero => assert!(blocks.is_empty()),
        _ => assert_eq!(blocks.len() as u64, frame.block_count().get()),
    }
    assert!(blocks.len() <= BLOCKS_MAX);
    for block in &blocks {
        assert_eq!(block_checksum(block.bytes()), block.checksum());
    }
}

fn decode(data: &[u8], resealed: bool) {
    let mut bytes = data.to_vec();
    if resealed {
        reseal(&mut bytes);
    }
    let log = bytes.get(7).map_or(12, |log| u32::from(*log).clamp(12, 16));
    let size = BlockSize::new(1 << log).expect("a power of two");
    let geometry = Geometry::new(4096 << log, size).expect("whole blocks");
    let shared = Bytes::from(bytes.clone());
    if let Some((frame, rest)) = bounded(2 * DECODED_LEN_MAX, || verified(shared, geometry)) {
        check(&frame, &bytes, geometry);
        assert_eq!(frame.encoded().len() + rest.len(), bytes.len());
    }
}

fn round_trip(mut input: Input<'_>) {
    let zero = input.flag();
    let mut next = 0;
    if zero {
        let mut extents = Vec::new();
        while !input.is_empty() && extents.len() < EXTENTS_MAX {
            let start = next + input.below(100);
            next = start + 1 + input.below(1000);
            if next > 4096 {
                break;
            }
            extents.push(Extent::between(
                BlockIndex::new(start),
                BlockIndex::new(next),
            ));
        }
        if extents.is_empty() {
            return;
        }
        let bytes = encoded_zero(&extents);
        let (frame, _) =
            verified(bytes.clone().into(), geometry()).expect("an encoded frame decodes");
        assert_eq!(
            (frame.extents(), frame.codec()),
            (&extents[..], Codec::Zero)
        );
        return;
    }
    let (zstd, fill) = (input.flag(), input.u8());
    let mut blocks = Vec::new();
    while !input.is_empty() && blocks.len() < blocks_max(BlockSize::MIN).min(6) {
        next += u64::from(input.u8());
        if next >= 4096 {
            break;
        }
        blocks.push(next);
        next += 1;
    }
    if blocks.is_empty() {
        return;
    }
    let mut bytes = encoded(&blocks, fill, zstd);
    let (frame, rest) =
        verified(bytes.clone().into(), geometry()).expect("an encoded frame decodes");
    assert!(rest.is_empty());
    check(&frame, &bytes, geometry());
    let found: Vec<_> = frame.blocks().map(|block| block.block().get()).collect();
    assert_eq!(found, blocks);
    // One flipped bit: seen by the checksum, or with that made right still no harm.
    let at = usize::from(input.u16()) % bytes.len();
    bytes[at] ^= 1 << (input.u8() % 8);
    assert!(verified(bytes.clone().into(), geometry()).is_none());
    decode(&bytes, true);
}

/// Frames.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 3 {
        0 => decode(input.rest(), false),
        1 => decode(input.rest(), true),
        _ => round_trip(input),
    }
}
