use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{Extent, block_checksum};

fn geometry(blocks: u64) -> Geometry {
    Geometry::new(blocks * 4096, BlockSize::MIN).unwrap()
}

fn extent(start: u64, end: u64) -> Extent {
    Extent::between(BlockIndex::new(start), BlockIndex::new(end))
}

/// Bytes that zstd can make smaller, or not.
fn block(seed: u64, compressible: bool) -> Vec<u8> {
    let mut state = seed;
    (0..4096)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let byte = (state >> 56).to_le_bytes()[0];
            if compressible { byte & 3 | 1 } else { byte }
        })
        .collect()
}

fn encode(blocks: &[(u64, Vec<u8>)], choice: CodecChoice) -> (Codec, Vec<u8>) {
    let places: Vec<_> = blocks
        .iter()
        .map(|(n, bytes)| (BlockIndex::new(*n), block_checksum(bytes)))
        .collect();
    let data = blocks
        .iter()
        .flat_map(|(_, bytes)| bytes.clone())
        .collect::<Vec<_>>();
    let mut out = Vec::new();
    let codec = FrameEncoder::new(geometry(1000)).encode_data(&places, &data, choice, &mut out);
    (codec, out)
}

fn verify(bytes: Vec<u8>) -> Result<VerifiedFrame, FrameError> {
    let (frame, rest) = UnverifiedFrame::split(Bytes::from(bytes))?;
    assert!(rest.is_empty());
    frame.verify(geometry(1000), &mut FrameDecoder::new())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_encoded_comes_back(
        blocks in prop::collection::btree_map(0..1000u64, (any::<u64>(), any::<bool>()), 1..=64),
        zstd in any::<bool>(),
    ) {
        let blocks: Vec<_> = blocks.into_iter().map(|(n, (seed, soft))| (n, block(seed, soft))).collect();
        let choice = if zstd { CodecChoice::Zstd(1) } else { CodecChoice::Raw };
        let (codec, bytes) = encode(&blocks, choice);
        prop_assert!(bytes.len() <= FRAME_LEN_MAX);
        let frame = verify(bytes.clone()).unwrap();
        prop_assert_eq!(frame.codec(), codec);
        prop_assert_eq!(frame.encoded(), &bytes);
        let back: Vec<_> =
            frame.blocks().map(|b| (b.block().get(), b.bytes().to_vec())).collect();
        prop_assert_eq!(back, blocks);
    }

    #[test]
    fn no_bytes_make_reading_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), real in any::<bool>()) {
        if real && bytes.len() >= 8 {
            bytes[..8].copy_from_slice(b"TMFR\x01\x01\x00\x0c");
        }
        if let Ok((frame, _)) = UnverifiedFrame::split(Bytes::from(bytes)) {
            let _ = frame.verify(geometry(1000), &mut FrameDecoder::new());
        }
    }
}

#[test]
fn every_flipped_bit_of_a_frame_is_seen() {
    for (choice, expected) in [
        (CodecChoice::Raw, Codec::Raw),
        (CodecChoice::Zstd(3), Codec::Zstd),
    ] {
        let (codec, bytes) = encode(&[(3, block(1, true)), (9, block(2, true))], choice);
        assert_eq!(codec, expected);
        for place in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[place] ^= 1 << (place % 8);
            // A header may then announce fewer bytes than there are: what is left over is not a frame.
            let seen = match UnverifiedFrame::split(Bytes::from(damaged)) {
                Ok((frame, _)) => frame
                    .verify(geometry(1000), &mut FrameDecoder::new())
                    .is_err(),
                Err(_) => true,
            };
            assert!(seen, "byte {place}");
        }
    }
}

#[test]
fn a_frame_cut_anywhere_is_not_whole() {
    let (_, bytes) = encode(&[(3, block(1, true))], CodecChoice::Zstd(3));
    for length in 0..bytes.len() {
        let cut = Bytes::copy_from_slice(&bytes[..length]);
        assert!(
            matches!(UnverifiedFrame::split(cut), Err(FrameError::Short { .. })),
            "{length}"
        );
    }
}

#[test]
fn what_does_not_shrink_stays_raw() {
    let (codec, _) = encode(&[(3, block(1, false))], CodecChoice::Zstd(3));
    assert_eq!(codec, Codec::Raw);
}

#[test]
fn a_zero_frame_covers_extents_of_any_length() {
    let g = Geometry::new(1 << 40, BlockSize::MIN).unwrap();
    let mut out = Vec::new();
    let extents = [extent(0, 1), extent(5, 1 << 28)];
    FrameEncoder::new(g).encode_zero(&extents, &mut out);
    let (frame, _) = UnverifiedFrame::split(Bytes::from(out)).unwrap();
    let frame = frame.verify(g, &mut FrameDecoder::new()).unwrap();
    assert_eq!(frame.extents(), extents);
    assert_eq!(frame.blocks().count(), 0);
    assert_eq!(frame.block_count().get(), (1 << 28) - 4);
}

#[test]
fn a_frame_of_another_volume_is_refused() {
    let (_, bytes) = encode(
        &[(3, block(1, true)), (9, block(2, true))],
        CodecChoice::Raw,
    );
    let verify = |g| {
        let (frame, _) = UnverifiedFrame::split(Bytes::from(bytes.clone())).unwrap();
        frame.verify(g, &mut FrameDecoder::new()).map(|_| ())
    };
    assert_eq!(
        verify(geometry(9)),
        Err(FrameError::Outside {
            block: BlockIndex::new(9),
            count: BlockCount::new(9)
        })
    );
    let wide = BlockSize::new(8192).unwrap();
    assert_eq!(
        verify(Geometry::new(8192 * 1000, wide).unwrap()),
        Err(FrameError::BlockSize {
            found: BlockSize::MIN,
            expected: wide
        })
    );
}

/// A frame whose own checksum is right but whose block is not what its checksum says: a lying peer, or a bug.
#[test]
fn a_block_that_belies_its_checksum_is_named() {
    let wrong = [(BlockIndex::new(3), block_checksum(&block(2, true)))];
    let mut out = Vec::new();
    FrameEncoder::new(geometry(1000)).encode_data(
        &wrong,
        &block(1, true),
        CodecChoice::Raw,
        &mut out,
    );
    match verify(out) {
        Err(FrameError::Block(corrupt)) => assert_eq!(corrupt.block, BlockIndex::new(3)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn frames_follow_each_other_in_a_batch() {
    let (_, mut bytes) = encode(&[(3, block(1, true))], CodecChoice::Raw);
    FrameEncoder::new(geometry(1000)).encode_zero(&[extent(4, 6)], &mut bytes);
    let (first, rest) = UnverifiedFrame::split(Bytes::from(bytes)).unwrap();
    let (second, rest) = UnverifiedFrame::split(rest).unwrap();
    assert_eq!(first.extents(), [extent(3, 4)]);
    assert_eq!(second.extents(), [extent(4, 6)]);
    assert!(rest.is_empty());
}

/// Frames of version 1 keep decoding: these files were written by the first release.
#[test]
fn golden_frames_keep_decoding() {
    let golden = |bytes: &[u8]| verify(bytes.to_vec()).unwrap();
    let blocks = [
        (3, block(1, true)),
        (4, block(2, true)),
        (9, block(3, true)),
    ];
    for (bytes, codec) in [
        (
            &include_bytes!("../../tests/golden/frame-v1-raw")[..],
            Codec::Raw,
        ),
        (
            include_bytes!("../../tests/golden/frame-v1-zstd"),
            Codec::Zstd,
        ),
    ] {
        let frame = golden(bytes);
        assert_eq!(frame.codec(), codec);
        let back: Vec<_> = frame
            .blocks()
            .map(|b| (b.block().get(), b.bytes().to_vec()))
            .collect();
        assert_eq!(back, blocks);
    }
    let frame = golden(include_bytes!("../../tests/golden/frame-v1-zero"));
    assert_eq!(frame.codec(), Codec::Zero);
    assert_eq!(frame.extents(), [extent(0, 5), extent(7, 1000)]);
}
