//! Taking up the parts of an interval that a broken stream left behind.

use tidemark_block::{
    Checksum128, Coherence, CutReason, Epoch, GenerationId, IntervalHeader, MemoryTable, Sequence,
    Trigger, WriterTerm,
};
use vault_core::{
    ingest::{IngestError, Interval},
    segment::{SealedSegment, SegmentIndex, decode_checksums},
};

use crate::samples::{INTERVAL, VOLUME, extent, frame, geometry};

const PART_BYTES_MAX: u64 = 16 << 20;

fn header() -> IntervalHeader {
    IntervalHeader {
        volume: VOLUME,
        term: WriterTerm::new(1),
        interval: INTERVAL,
        base: GenerationId::ZERO,
        geometry: geometry(100),
        epoch: Epoch::new(3),
        cut_time_ms: 1_700_000_000_000,
        coherence: Coherence::Crash,
        reason: CutReason::default(),
        trigger: Trigger::Request,
    }
}

fn interval() -> Interval {
    Interval::new(header(), Sequence::new(1), PART_BYTES_MAX)
}

/// Receives the blocks, all below `end`, as one part.
fn receive(interval: &mut Interval, blocks: &[u64], end: u64) -> SealedSegment {
    let view = MemoryTable::new(geometry(100));
    interval.begin_batch(extent(0, end).end()).unwrap();
    interval
        .frame(0, &view, &frame(geometry(100), blocks, 1))
        .unwrap();
    interval.end_batch(0, 1);
    interval.take_open().unwrap()
}

fn resume(interval: &mut Interval, part: &SealedSegment) {
    let record = part.footer.record;
    let section = |from: u64, to: u64| {
        let (from, to) = (usize::try_from(from).unwrap(), usize::try_from(to).unwrap());
        part.bytes.slice(from..to)
    };
    let index = section(record.index_at, record.checksums_at());
    let index = SegmentIndex::decode(&index, &record, geometry(100)).unwrap();
    let end = record.checksums_at() + u64::from(record.checksums_len);
    let checksums: Vec<Checksum128> =
        decode_checksums(&section(record.checksums_at(), end), &record).unwrap();
    let view = MemoryTable::new(geometry(100));
    interval
        .resume(&view, &part.footer, &index, &checksums)
        .unwrap();
}

#[test]
fn parts_that_follow_each_other_are_taken_up() {
    let mut before = interval();
    let first = receive(&mut before, &[1, 2], 10);
    let second = receive(&mut before, &[15], 20);

    let mut after = interval();
    assert!(after.continues(&first.footer).unwrap());
    assert!(
        !after.continues(&second.footer).unwrap(),
        "not the next part"
    );
    resume(&mut after, &first);
    assert!(after.continues(&second.footer).unwrap());
    resume(&mut after, &second);
    assert_eq!(after.durable_prefix().end.get(), 20);
}

/// A stream that broke may have a part on its way while the next stream divides the same blocks differently.
#[test]
fn a_part_that_leaves_a_gap_is_not_taken_up() {
    let mut before = interval();
    receive(&mut before, &[1, 2], 10);
    let late = receive(&mut before, &[15], 20);

    let mut again = interval();
    let shorter = receive(&mut again, &[1], 2);
    let mut after = interval();
    resume(&mut after, &shorter);
    assert_eq!(late.footer.record.id.part, 1);
    assert!(
        !after.continues(&late.footer).unwrap(),
        "block 2 is in neither part"
    );
}

#[test]
fn a_part_of_another_cut_or_base_is_a_conflict() {
    let part = receive(&mut interval(), &[1, 2], 10);
    type Change = fn(&mut IntervalHeader);
    let changes: [(&str, Change); 3] = [
        ("epoch", |header| header.epoch = Epoch::new(4)),
        ("cut time", |header| header.cut_time_ms += 1),
        ("base generation", |header| {
            header.base = GenerationId::new(1);
        }),
    ];
    for (what, change) in changes {
        let mut other = header();
        change(&mut other);
        let other = Interval::new(other, Sequence::new(1), PART_BYTES_MAX);
        assert_eq!(
            other.continues(&part.footer),
            Err(IngestError::Conflict(what))
        );
    }
}
