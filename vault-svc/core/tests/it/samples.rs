//! Structures with fixed content.

use bytes::Bytes;
use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, CodecChoice, Coherence, CutReason, Epoch, Extent,
    FrameDecoder, FrameEncoder, GenerationId, Geometry, ImageDigest, IntervalId, SegmentId,
    Sequence, Trigger, UnverifiedFrame, VerifiedFrame, VolumeId, WriterTerm, block_checksum,
};
use vault_core::{
    manifest::{
        Condemned, CondemnedObject, CutKind, Generation, Manifest, TermRequest, grant_term,
    },
    segment::{SealedSegment, SegmentKind, SegmentOrigin, SegmentWriter},
};

pub(crate) const VOLUME: VolumeId = VolumeId::from_bytes([0x11; 16]);
pub(crate) const INTERVAL: IntervalId = IntervalId::from_bytes([0x22; 16]);

pub(crate) fn geometry(blocks: u64) -> Geometry {
    Geometry::new(blocks * 4096, BlockSize::new(4096).unwrap()).unwrap()
}

pub(crate) fn extent(start: u64, end: u64) -> Extent {
    Extent::between(BlockIndex::new(start), BlockIndex::new(end))
}

/// A block's content: the same for the same number and version.
pub(crate) fn content(block: u64, version: u64) -> Vec<u8> {
    (0..512_u64)
        .flat_map(|n| (block ^ (version << 40) ^ (n << 20)).to_le_bytes())
        .collect()
}

pub(crate) fn frame(geometry: Geometry, blocks: &[u64], version: u64) -> VerifiedFrame {
    let data: Vec<u8> = blocks
        .iter()
        .flat_map(|block| content(*block, version))
        .collect();
    let named: Vec<_> = blocks
        .iter()
        .map(|block| {
            (
                BlockIndex::new(*block),
                block_checksum(&content(*block, version)),
            )
        })
        .collect();
    let mut out = Vec::new();
    FrameEncoder::new(geometry).encode_data(&named, &data, CodecChoice::Raw, &mut out);
    let (frame, _) = UnverifiedFrame::split(Bytes::from(out)).unwrap();
    frame.verify(geometry, &mut FrameDecoder::new()).unwrap()
}

pub(crate) fn origin(geometry: Geometry, kind: SegmentKind) -> SegmentOrigin {
    let received = kind == SegmentKind::Received;
    SegmentOrigin {
        volume: VOLUME,
        geometry,
        id: SegmentId {
            origin: INTERVAL,
            part: 3,
        },
        kind,
        base: GenerationId::new(if received { 6 } else { 0 }),
        epoch: Epoch::new(if received { 40 } else { 0 }),
        cut_time_ms: if received { 1_700_000_000_000 } else { 0 },
    }
}

pub(crate) fn received() -> SealedSegment {
    let g = geometry(10_000);
    let mut writer = SegmentWriter::new(origin(g, SegmentKind::Received), Vec::new());
    writer.push(&frame(g, &[100, 101, 102, 200], 7), Sequence::new(7));
    writer.push_zero(extent(300, 5000), Sequence::new(7));
    writer.push(&frame(g, &[6000], 7), Sequence::new(7));
    writer.finish((BlockIndex::new(50), BlockIndex::new(6100)))
}

pub(crate) fn rewritten() -> SealedSegment {
    let g = geometry(10_000);
    let mut writer = SegmentWriter::new(origin(g, SegmentKind::Rewritten), Vec::new());
    let of = |sequences: &[u64]| {
        sequences
            .iter()
            .map(|s| Sequence::new(*s))
            .collect::<Vec<_>>()
    };
    writer.push_versions(&frame(g, &[100, 101, 102], 7), &of(&[7, 7, 5]));
    writer.push_versions(&frame(g, &[100, 102], 4), &of(&[4, 4]));
    writer.push_zero(extent(101, 102), Sequence::new(3));
    writer.finish((BlockIndex::ZERO, BlockIndex::ZERO))
}

pub(crate) fn generation(id: u64) -> Generation {
    Generation {
        id: GenerationId::new(id),
        parent: GenerationId::new(id - 1),
        term: WriterTerm::new(1),
        interval: IntervalId::from_bytes([u8::try_from(id).unwrap(); 16]),
        digest: ImageDigest::from_bytes([u8::try_from(100 + id).unwrap(); 16]),
        cut_time_ms: 1_700_000_000_000 + id,
        committed_time_ms: 1_700_000_001_000 + id,
        cut: CutKind {
            coherence: Coherence::Flushed,
            trigger: Trigger::IntervalMax,
        },
        reason: CutReason::default(),
        changed_blocks: 10 * id,
        frame_bytes: 1000 * id,
        epoch: Epoch::new(30 + id),
        length: 40_960_000,
    }
}

pub(crate) fn term_request(last_term: u64, nonce: u8) -> TermRequest {
    TermRequest {
        volume: VOLUME,
        name: "data".into(),
        source: "edge-1".into(),
        geometry: geometry(10_000),
        last_term: WriterTerm::new(last_term),
        nonce: [nonce; 16],
    }
}

/// As [`manifest`], with what version 2 added.
pub(crate) fn manifest_with_reasons() -> Manifest {
    let mut manifest = manifest();
    let reason = CutReason::new("agent db did not answer within 5s");
    manifest.generations[1].reason = reason.clone();
    manifest.recent[1].reason = reason;
    manifest
}

pub(crate) fn manifest() -> Manifest {
    let mut manifest = grant_term(None, &term_request(0, 0x33), 1_700_000_000_000)
        .unwrap()
        .unwrap();
    for id in 1..=3 {
        manifest = manifest.successor(1_700_000_000_000 + id);
        let mut segment = received().footer.record;
        segment.id.part = u32::try_from(id).unwrap();
        segment.sequences = (Sequence::new(id), Sequence::new(id));
        assert!(
            manifest
                .push_generation(generation(id), vec![segment])
                .is_empty()
        );
    }
    manifest.condemned.push(Condemned {
        object: CondemnedObject::Segment(SegmentId {
            origin: IntervalId::from_bytes([0x44; 16]),
            part: 9,
        }),
        length: 12345,
        version: 2,
        time_ms: 1_700_000_000_002,
    });
    manifest
}

pub(crate) fn count(blocks: u64) -> BlockCount {
    BlockCount::new(blocks)
}
