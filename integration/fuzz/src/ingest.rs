//! The vault's receiving side: headers, batches, seals, broken streams and resumed ones in any order and of any
//! content. Nothing is committed unless both digests agree; what is committed is what was sent, to the block; a
//! manifest that breaks an invariant is never made.

use std::collections::BTreeMap;

use bytes::Bytes;
use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, Checksum128, Coherence, CutReason, Epoch, Extent,
    GenerationId, Geometry, ImageDigest, IntervalHeader, IntervalId, IntervalSeal, MemoryTable,
    SegmentId, Sequence, Trigger, VolumeId, WriterTerm, image_digest,
};
use vault_core::{
    ingest::{Admission, BatchError, IngestError, Interval, admit},
    manifest::{Manifest, TermRequest, check_invariants, grant_term},
    segment::{FOOTER_LEN, Footer, SealedSegment, SegmentIndex, decode_checksums},
};

use crate::{
    frame::{encoded, encoded_zero, geometry as frame_geometry, verified},
    input::Input,
};

const VOLUME: VolumeId = VolumeId::from_bytes([0x11; 16]);
const BLOCKS: u64 = 1100;
const PART_BYTES: u64 = 16 << 10;
const NOW: u64 = 1_700_000_000_000;
const STEPS: usize = 48;

fn geometry() -> Geometry {
    Geometry::new(BLOCKS * 4096, BlockSize::MIN).expect("blocks of 4 KiB")
}

/// Checksums by block; zero is a change, too.
type Changes = BTreeMap<u64, Checksum128>;

/// A stream under way, and what it should amount to.
struct Stream {
    interval: Interval,
    /// Of all parts, sealed or open.
    changes: Changes,
    frames: u64,
    /// Of the open part only.
    open: Changes,
    open_frames: u64,
}

/// A durable part of an interval.
struct Part {
    object: Bytes,
    changes: Changes,
    frames: u64,
}

struct Vault {
    manifest: Manifest,
    table: MemoryTable,
    parts: BTreeMap<(IntervalId, u32), Part>,
    stream: Option<Stream>,
    epoch: u64,
}

impl Vault {
    fn new() -> Self {
        let request = TermRequest {
            volume: VOLUME,
            name: "data".to_owned(),
            source: "edge".to_owned(),
            geometry: geometry(),
            last_term: WriterTerm::ZERO,
            nonce: [0; 16],
        };
        let manifest = grant_term(None, &request, NOW)
            .expect("a first term")
            .expect("is new");
        Self {
            manifest,
            table: MemoryTable::new(geometry()),
            parts: BTreeMap::new(),
            stream: None,
            epoch: 1,
        }
    }

    fn header(&self, input: &mut Input<'_>) -> IntervalHeader {
        let odd = input.u8();
        let off = |bit: u8| u64::from(odd >> bit & 1);
        let blocks = BLOCKS + off(7) * off(6);
        IntervalHeader {
            volume: VOLUME,
            term: WriterTerm::new(self.manifest.term.get() + off(0) * off(1)),
            interval: IntervalId::from_bytes([input.u8() % 5; 16]),
            base: GenerationId::new(self.manifest.head_id().get() + off(2) * off(3)),
            geometry: Geometry::new(blocks * 4096, BlockSize::MIN).expect("blocks of 4 KiB"),
            epoch: Epoch::new(self.epoch + off(4) * off(5)),
            cut_time_ms: NOW + u64::from(input.u8() % 2),
            coherence: Coherence::Crash,
            reason: CutReason::default(),
            trigger: Trigger::Request,
        }
    }

    fn begin(&mut self, input: &mut Input<'_>) {
        self.stream = None;
        let header = self.header(input);
        match admit(&self.manifest, &header) {
            Ok(Admission::Committed(receipt)) => {
                assert_eq!(receipt.interval, header.interval);
                assert!(self.manifest.committed(header.interval).is_some());
            }
            Ok(Admission::Open(sequence)) => {
                assert_eq!(
                    (header.term, header.base),
                    (self.manifest.term, self.manifest.head_id())
                );
                assert_eq!(header.geometry, geometry());
                self.resume(header, sequence);
            }
            Err(_) => {}
        }
    }

    /// Takes up what is durable of the interval, as the driver does.
    fn resume(&mut self, header: IntervalHeader, sequence: Sequence) {
        let id = header.interval;
        let mut stream = Stream {
            interval: Interval::new(header, sequence, PART_BYTES),
            changes: Changes::new(),
            frames: 0,
            open: Changes::new(),
            open_frames: 0,
        };
        let mut good = 0;
        while let Some(part) = self.parts.get(&(id, good)) {
            let (footer, index, checksums) = read(&part.object, id, good);
            match stream.interval.continues(&footer) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_conflict) => return,
            }
            stream
                .interval
                .resume(&self.table, &footer, &index, &checksums)
                .expect("a part that this machine sealed is in order");
            stream.changes.extend(&part.changes);
            stream.frames += part.frames;
            good += 1;
        }
        self.parts
            .retain(|(interval, part), _| *interval != id || *part < good);
        self.stream = Some(stream);
    }

    /// A batch of a few frames; where one is refused the stream is closed.
    fn batch(&mut self, input: &mut Input<'_>) {
        let Some(mut stream) = self.stream.take() else {
            return;
        };
        let end = BlockIndex::new(input.below(BLOCKS + 20));
        if stream.interval.begin_batch(end).is_err() {
            return;
        }
        let (mut changes, mut bytes) = (Changes::new(), 0);
        let frames = u64::from(input.u8() % 4);
        for _ in 0..frames {
            let Some(frame) = frame(input) else { return };
            bytes += frame.len() as u64;
            let Some((frame, _)) = verified(frame.into(), geometry()) else {
                return;
            };
            match stream.interval.frame(NOW, &self.table, &frame) {
                Ok(()) => {}
                Err(BatchError::Refused(_)) => return,
                Err(BatchError::Table(never)) => match never {},
            }
            let mut sums = frame.checksums();
            for block in frame.extents().iter().flat_map(|extent| extent.iter()) {
                assert!(block < end, "a block lies before its batch's end");
                let sum = sums.next().unwrap_or(Checksum128::ZERO);
                let again = changes.insert(block.get(), sum);
                assert!(again.is_none() && !stream.changes.contains_key(&block.get()));
            }
        }
        stream.interval.end_batch(NOW, bytes);
        stream.changes.extend(&changes);
        stream.open.extend(changes);
        stream.frames += frames;
        stream.open_frames += frames;
        if let Some(sealed) = stream.interval.take_full() {
            self.put(&mut stream, sealed);
        }
        self.stream = Some(stream);
    }

    fn put(&mut self, stream: &mut Stream, sealed: SealedSegment) {
        let id = sealed.footer.record.id;
        assert_eq!(sealed.footer.record.file_len, sealed.bytes.len() as u64);
        let (footer, index, _) = read(&sealed.bytes, id.origin, id.part);
        assert_eq!(footer, sealed.footer);
        let named = index.entries().iter().flat_map(|entry| entry.blocks.iter());
        assert!(named.map(BlockIndex::get).eq(stream.open.keys().copied()));
        let part = Part {
            object: sealed.bytes,
            changes: std::mem::take(&mut stream.open),
            frames: std::mem::take(&mut stream.open_frames),
        };
        self.parts.insert((id.origin, id.part), part);
        let prefix = stream.interval.part_durable();
        assert_eq!(prefix, stream.interval.durable_prefix());
        assert_eq!(prefix.end, sealed.footer.watermark.1);
    }

    fn put_open(&mut self) {
        if let Some(mut stream) = self.stream.take() {
            if let Some(sealed) = stream.interval.take_open() {
                self.put(&mut stream, sealed);
            }
            self.stream = Some(stream);
        }
    }

    fn changed(&self, changes: &Changes) -> (MemoryTable, ImageDigest) {
        let mut table = self.table.clone();
        for (&block, &sum) in changes {
            table.set(BlockIndex::new(block), sum);
        }
        let Ok(digest) = image_digest(&table);
        (table, digest)
    }

    fn seal(&mut self, input: &mut Input<'_>) {
        self.put_open();
        let Some(stream) = self.stream.take() else {
            return;
        };
        let (table, digest) = self.changed(&stream.changes);
        let odd = input.u8();
        let mut seal = IntervalSeal {
            changed_blocks: BlockCount::new(stream.changes.len() as u64),
            frame_count: stream.frames,
            image_digest: digest,
        };
        match odd % 8 {
            0 => seal.image_digest = ImageDigest::from_bytes([input.u8(); 16]),
            1 => seal.frame_count = u64::from(input.u8()),
            2 => seal.changed_blocks = BlockCount::new(input.u64()),
            _ => {}
        }
        let right = seal.image_digest == digest
            && seal.frame_count == stream.frames
            && seal.changed_blocks.get() == stream.changes.len() as u64;
        let empty = stream.changes.is_empty() && self.manifest.head().is_some();
        let finished = match stream.interval.finish(&self.table, &seal) {
            Ok(finished) => finished,
            Err(BatchError::Refused(error)) => {
                assert!(!right || (empty && error == IngestError::Empty), "{error}");
                return;
            }
            Err(BatchError::Table(never)) => match never {},
        };
        assert!(
            right && !empty,
            "nothing is committed unless counts and digests match"
        );
        assert_eq!(finished.digest, digest);
        // A term, or another interval, may have come between.
        let Ok((next, pages)) = finished.commit(&self.manifest, NOW) else {
            return;
        };
        assert!(pages.is_empty());
        assert_eq!(check_invariants(&next, Some(&self.manifest)), Ok(()));
        assert_eq!(next.head().map(|head| head.digest), Some(digest));
        let again = Manifest::decode(&next.encode(), VOLUME, next.version);
        assert_eq!(again.as_ref(), Ok(&next));
        for segment in &finished.segments {
            assert!(
                self.parts
                    .contains_key(&(segment.id.origin, segment.id.part))
            );
        }
        self.parts
            .retain(|(interval, _), _| *interval != finished.header.interval);
        self.manifest = next;
        self.table = table;
        self.epoch += 1;
    }

    fn term(&mut self, input: &mut Input<'_>) {
        let request = TermRequest {
            volume: VOLUME,
            name: "data".to_owned(),
            source: "edge".to_owned(),
            geometry: geometry(),
            last_term: WriterTerm::new(self.manifest.term.get() - u64::from(input.flag())),
            nonce: [input.u8(); 16],
        };
        if let Ok(Some(next)) = grant_term(Some(&self.manifest), &request, NOW) {
            assert_eq!(check_invariants(&next, Some(&self.manifest)), Ok(()));
            self.manifest = next;
            // The driver ends the older writer's stream.
            if input.flag() {
                self.stream = None;
            }
        }
    }
}

/// Reads a part from its object, each section by itself.
fn read(object: &Bytes, origin: IntervalId, part: u32) -> (Footer, SegmentIndex, Vec<Checksum128>) {
    let length = object.len() as u64;
    let at = |place: u64| usize::try_from(place).expect("small");
    let id = SegmentId { origin, part };
    let footer = &object[at(length - FOOTER_LEN)..];
    let footer = Footer::decode(footer, VOLUME, geometry(), id, length).expect("a sealed footer");
    let record = footer.record;
    let index = &object[at(record.index_at)..at(record.checksums_at())];
    let index = SegmentIndex::decode(index, &record, geometry()).expect("a sealed index");
    let checksums = &object[at(record.checksums_at())..at(length - FOOTER_LEN)];
    let checksums = decode_checksums(checksums, &record).expect("sealed checksums");
    (footer, index, checksums)
}

/// A frame as a source may send it, in order or not, sometimes damaged.
fn frame(input: &mut Input<'_>) -> Option<Vec<u8>> {
    let kind = input.u8();
    let start = input.below(BLOCKS + 4);
    let mut bytes = if kind & 1 == 0 {
        let end = start + 1 + input.below(40);
        let first = Extent::between(BlockIndex::new(start), BlockIndex::new(end));
        let second = Extent::between(BlockIndex::new(end + 1), BlockIndex::new(end + 2));
        encoded_zero(&[first, second])
    } else {
        let gap = 1 + u64::from(kind >> 4 & 1);
        let blocks: Vec<u64> = (0..=u64::from(kind >> 5 & 1))
            .map(|n| start + n * gap)
            .collect();
        encoded(&blocks, input.u8(), kind & 2 == 2)
    };
    assert!(verified(bytes.clone().into(), frame_geometry()).is_some());
    if kind & 12 == 12 {
        let at = usize::from(input.u16()) % bytes.len();
        bytes[at] ^= 1 << (input.u8() % 8);
    }
    Some(bytes)
}

/// A vault's day.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut vault = Vault::new();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.u8() % 8 {
            0 => vault.begin(&mut input),
            1..=3 => vault.batch(&mut input),
            4 => vault.put_open(),
            // The stream breaks; what is open is lost, what is durable stays.
            5 => vault.stream = None,
            6 => vault.seal(&mut input),
            _ => vault.term(&mut input),
        }
    }
}
