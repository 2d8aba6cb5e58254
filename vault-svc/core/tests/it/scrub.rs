//! The order in which segments are read again, and what is found wrong with one.

use std::collections::BTreeSet;

use bytes::Bytes;
use proptest::prelude::*;
use tidemark_block::{Checksum128, FrameDecoder, IntervalId, SegmentId, UnverifiedFrame};
use vault_core::{
    scrub::{NextSegments, SegmentError, SegmentFrames},
    segment::{FRAMES_AT, SealedSegment, SegmentIndex, SegmentRecord, decode_checksums},
};

use crate::samples;

fn id(name: u8) -> SegmentId {
    SegmentId {
        origin: IntervalId::from_bytes([name / 2; 16]),
        part: u32::from(name % 2),
    }
}

proptest! {
    #[test]
    fn a_pass_reads_what_stays_once_wherever_it_begins_and_whatever_comes_and_goes(
        stays in prop::collection::btree_set(any::<u8>(), 0..40),
        others in prop::collection::vec(prop::collection::btree_set(any::<u8>(), 0..20), 1..8),
        start in any::<u8>(),
        most in 1..10_usize,
    ) {
        let sample = samples::received().footer.record;
        let record = |name: &u8| SegmentRecord { id: id(*name), ..sample };
        let mut read = Vec::new();
        let mut after = None;
        for round in 0.. {
            let there: BTreeSet<u8> = stays.union(&others[round % others.len()]).copied().collect();
            let mut next = NextSegments::new(id(start), after, most);
            there.iter().map(record).for_each(|record| next.offer(record));
            let next = next.chosen();
            prop_assert!(next.len() <= most);
            let Some(last) = next.last() else { break };
            after = Some(last.id);
            read.extend(next.iter().map(|record| record.id));
        }
        let distinct: BTreeSet<_> = read.iter().copied().collect();
        prop_assert_eq!(distinct.len(), read.len(), "none twice");
        prop_assert!(stays.iter().all(|name| distinct.contains(&id(*name))));
    }
}

/// Every frame of a segment against its index and its checksum section.
fn check(
    segment: &SealedSegment,
    record: &SegmentRecord,
    index: &SegmentIndex,
    checksums: &[Checksum128],
) -> Result<usize, SegmentError> {
    let frames = SegmentFrames::new(record, index, Some(checksums))?;
    for frame in frames.frames() {
        let range = usize::try_from(frame.at).unwrap()..usize::try_from(frame.end()).unwrap();
        let bytes = Bytes::copy_from_slice(&segment.bytes[range]);
        let (found, rest) = UnverifiedFrame::split(bytes).unwrap();
        assert!(rest.is_empty());
        let found = found
            .verify(samples::geometry(10_000), &mut FrameDecoder::new())
            .unwrap();
        frames.check(frame, &found)?;
    }
    Ok(frames.frames().len())
}

fn sections(segment: &SealedSegment) -> (SegmentRecord, SegmentIndex, Vec<Checksum128>) {
    let record = segment.footer.record;
    let at = |at: u64| usize::try_from(at).unwrap();
    let (index, rest) = segment.bytes[at(record.index_at)..].split_at(record.index_len as usize);
    let index = SegmentIndex::decode(index, &record, samples::geometry(10_000)).unwrap();
    let checksums = decode_checksums(&rest[..record.checksums_len as usize], &record).unwrap();
    (record, index, checksums)
}

#[test]
fn the_frames_of_a_segment_fill_it_and_are_those_that_its_index_describes() {
    for (segment, frames) in [(samples::received(), 2), (samples::rewritten(), 2)] {
        let (record, index, checksums) = sections(&segment);
        assert_eq!(check(&segment, &record, &index, &checksums), Ok(frames));
        for wrong in 0..checksums.len() {
            let mut checksums = checksums.clone();
            checksums[wrong] = Checksum128::from_bytes([9; 16]);
            let error = check(&segment, &record, &index, &checksums).unwrap_err();
            assert!(
                matches!(
                    error,
                    SegmentError::Contradicted {
                        section: "checksum section",
                        ..
                    }
                ),
                "{error}"
            );
            assert!(error.frame().unwrap() >= FRAMES_AT);
        }
        let mut record = record;
        record.index_at += 1;
        assert_eq!(
            check(&segment, &record, &index, &checksums),
            Err(SegmentError::Gap {
                at: record.index_at - 1
            })
        );
    }
}

#[test]
fn an_index_of_other_blocks_of_the_same_shape_is_contradicted_by_the_frames() {
    let segment = samples::received();
    let (record, index, checksums) = sections(&segment);
    // The same frames in the same places, yet block 201 where block 200 is.
    let mut bytes = Vec::new();
    for entry in index.entries() {
        let mut entry = *entry;
        if entry.blocks == samples::extent(200, 201) {
            entry.blocks = samples::extent(201, 202);
        }
        entry.encode(&mut bytes);
    }
    let sealed = tidemark_block::wire::seal(
        vault_core::segment::INDEX_MAGIC,
        vault_core::segment::VERSION,
        &bytes,
    );
    let other = SegmentIndex::decode(&sealed, &record, samples::geometry(10_000)).unwrap();
    assert_eq!(
        check(&segment, &record, &other, &checksums),
        Err(SegmentError::Contradicted {
            at: FRAMES_AT,
            section: "index"
        })
    );
}
