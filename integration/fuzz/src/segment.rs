//! Segments: footer, index and checksum sections, and what is computed from an index that decodes.

use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, Extent, Geometry, IntervalId, SegmentId, Sequence, VolumeId,
    wire::{self, ENVELOPE_LEN, Reader},
};
use vault_core::{
    image::{ExtentMap, live_pieces, overlay, windows},
    segment::{
        CHECKSUMS_MAGIC, ENTRY_LEN, FOOTER_LEN, FOOTER_MAGIC, FRAMES_AT, Footer, INDEX_MAGIC,
        SegmentIndex, SegmentKind, SegmentRecord, decode_checksums,
    },
};

use crate::{
    bounded::bounded,
    input::Input,
    wire::{raw_or_sealed, room},
};

const VOLUME: VolumeId = VolumeId::from_bytes([0x11; 16]);
const ID: SegmentId = SegmentId {
    origin: IntervalId::from_bytes([0x22; 16]),
    part: 3,
};

fn geometry() -> Geometry {
    Geometry::new(10_000 * 4096, BlockSize::MIN).expect("blocks of 4 KiB")
}

fn footer(mut input: Input<'_>) {
    let (sealed, bytes) = raw_or_sealed(&mut input, FOOTER_MAGIC);
    // The length is what the store tells of the object; here it is what the footer says, where it says one.
    let said = input.rest().get(16 + 56..16 + 64);
    let length = said.map_or(0, |bytes| Reader::new(bytes).u64().unwrap_or(0));
    let id = if input.rest().get(16..32) == Some(ID.origin.as_bytes()) {
        ID
    } else {
        SegmentId { part: 0, ..ID }
    };
    let decoded = bounded(room(&bytes), || {
        Footer::decode(&bytes, VOLUME, geometry(), id, length)
    });
    if let Ok(footer) = decoded {
        assert_eq!(footer.record.id, id);
        let record = &footer.record;
        assert_eq!(
            record.checksums_at() + u64::from(record.checksums_len) + FOOTER_LEN,
            length
        );
        assert!(record.frame_bytes() <= length && record.blocks.end() >= record.blocks.start());
        if sealed {
            assert_eq!(footer.encode(), bytes, "a footer has one encoding");
        }
    }
    record(input.rest());
}

fn record(bytes: &[u8]) {
    if let Ok(record) = SegmentRecord::decode(&mut Reader::new(bytes)) {
        let mut again = Vec::new();
        record.encode(&mut again);
        assert!(bytes.starts_with(&again), "a record has one encoding");
    }
}

/// A record that an index may belong to, from the entries' own words.
fn record_of(payload: &[u8], input: &mut Input<'_>) -> SegmentRecord {
    let mut data_blocks = 0;
    for entry in payload.chunks_exact(ENTRY_LEN) {
        let mut reader = Reader::new(&entry[8..]);
        let count = reader.u32().unwrap_or(0);
        if entry[36] & 1 == 0 {
            data_blocks += u64::from(count);
        }
    }
    let data_blocks = data_blocks.min(1 << 18);
    let checksums_len = u32::try_from(ENVELOPE_LEN as u64 + 16 * data_blocks).unwrap_or(u32::MAX);
    let index_len = u32::try_from(ENVELOPE_LEN + payload.len()).unwrap_or(u32::MAX);
    let index_at = FRAMES_AT + u64::from(input.u32());
    SegmentRecord {
        id: ID,
        kind: SegmentKind::Rewritten,
        sequences: (Sequence::ZERO, Sequence::new(1 + input.below(50))),
        blocks: geometry().all(),
        file_len: index_at + u64::from(index_len) + u64::from(checksums_len) + FOOTER_LEN,
        index_at,
        index_len,
        checksums_len,
        data_blocks: BlockCount::new(data_blocks),
    }
}

fn index(mut input: Input<'_>) {
    let blocks = 40 * (1 + u64::from(input.u8()));
    let geometry = Geometry::new(blocks * 4096, BlockSize::MIN).expect("blocks of 4 KiB");
    let newest = Sequence::new(input.below(50));
    let mut words = Input::new(input.bytes(6));
    let record = record_of(&input.rest()[input.rest().len().min(1)..], &mut words);
    let (_, bytes) = raw_or_sealed(&mut input, INDEX_MAGIC);
    let Ok(index) = bounded(room(&bytes), || {
        SegmentIndex::decode(&bytes, &record, geometry)
    }) else {
        return;
    };
    let mut checksums = 0;
    for (at, entry) in index.entries().iter().enumerate() {
        let own = index.checksums_of(at);
        assert_eq!(own.start, checksums);
        let expected = if entry.zero {
            0
        } else {
            entry.blocks.count().get()
        };
        assert_eq!(own.len() as u64, expected);
        checksums = own.end;
    }
    assert_eq!(checksums as u64, record.data_blocks.get());
    let sealed = wire::seal(CHECKSUMS_MAGIC, 1, &vec![7; checksums * 16]);
    assert_eq!(
        decode_checksums(&sealed, &record).map(|all| all.len()),
        Ok(checksums)
    );
    images(&index, geometry, newest);
}

/// The image that an index describes has of each block the newest version that is not too new.
fn images(index: &SegmentIndex, geometry: Geometry, newest: Sequence) {
    let mut model = vec![None; usize::try_from(geometry.block_count().get()).expect("small")];
    let at = |block: BlockIndex| usize::try_from(block.get()).expect("a block of a small volume");
    let entries = index.entries().iter();
    for entry in entries.filter(|entry| entry.sequence <= newest) {
        for block in entry.blocks.iter() {
            let place: &mut Option<Sequence> = &mut model[at(block)];
            *place = (*place).max(Some(entry.sequence));
        }
    }
    for window in windows(geometry, geometry.all()) {
        let mut with_data = 0;
        let mut next = window.start();
        for piece in overlay([index], window, newest) {
            let entry = &index.entries()[piece.source.entry as usize];
            let gap = Extent::between(next, piece.blocks.start());
            assert!(piece.blocks.start() >= next && gap.iter().all(|b| model[at(b)].is_none()));
            assert!(
                piece
                    .blocks
                    .iter()
                    .all(|b| model[at(b)] == Some(entry.sequence))
            );
            next = piece.blocks.end();
            if !entry.zero {
                with_data += piece.blocks.count().get();
            }
        }
        let rest = Extent::between(next, window.end());
        assert!(rest.iter().all(|block| model[at(block)].is_none()));
        let map = ExtentMap::new(&[(ID, index)], window, newest);
        let mapped: u64 = map
            .pieces(window)
            .map(|piece| piece.blocks.count().get())
            .sum();
        assert_eq!(mapped, with_data, "the map has every block with data");
        let live = live_pieces([index], window, &[newest]);
        assert!(live.iter().all(|live| !live.piece.blocks.is_empty()));
    }
    assert_eq!(
        index.touching(geometry.all()).count(),
        index.entries().len()
    );
}

/// Segments.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 2 {
        0 => footer(input),
        _ => index(input),
    }
}
