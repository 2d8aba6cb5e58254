//! Binds `docs/FORMAT-VAULT.md` to the code, and holds the golden files.

use std::{collections::HashSet, path::PathBuf};

use tidemark_block::{
    BlockCount, Checksum128, GenerationId, SegmentId, Sequence, WriterTerm,
    wire::{self, ENVELOPE_LEN},
    xxh3_128,
};
use vault_core::{
    manifest::{
        self, Condemned, CondemnedObject, Current, Manifest, PageRef, StoreMarker, TermError,
        check_invariants, decode_page, encode_page, grant_term,
    },
    segment::{
        self, FOOTER_LEN, FOOTER_MAGIC, Footer, FormatError, SealedSegment, SegmentIndex,
        SegmentRecord, decode_checksums,
    },
};

use crate::page::{self, Row, field};
use crate::samples::{
    INTERVAL, VOLUME, extent, generation, geometry, manifest, manifest_with_reasons, received,
    rewritten, term_request,
};

const FORMAT: &str = include_str!("../../../../docs/FORMAT-VAULT.md");

fn table(name: &str) -> Vec<Row> {
    page::table(FORMAT, name)
}

/// The number in the field whose description begins so.
fn number(bytes: &[u8], rows: &[Row], begin: &str) -> u64 {
    let field = field(bytes, rows, begin);
    let mut wide = [0; 8];
    wide[..field.len()].copy_from_slice(field);
    u64::from_le_bytes(wide)
}

fn total(rows: &[Row]) -> usize {
    rows.last().map_or(0, |(offset, length, _)| offset + length)
}

/// Length of a table as bytes of a list's items.
fn is_long(name: &str, length: usize) -> Vec<Row> {
    let rows = table(name);
    assert_eq!(total(&rows), length, "{name}");
    rows
}

#[test]
fn a_segment_is_as_documented() {
    let SealedSegment { bytes, footer } = received();
    let record = footer.record;
    let rows = is_long("segment header", segment::HEADER_PAYLOAD_LEN);
    let header = &bytes[ENVELOPE_LEN..];
    assert_eq!(&bytes[..8], b"TMVSEGMT");
    assert_eq!(field(header, &rows, "volume"), VOLUME.as_bytes());
    assert_eq!(field(header, &rows, "origin"), INTERVAL.as_bytes());
    assert_eq!(number(header, &rows, "part"), 3);
    assert_eq!(number(header, &rows, "block size"), 4096);
    assert_eq!(number(header, &rows, "length"), geometry(10_000).length());
    assert_eq!(segment::FRAMES_AT as usize, ENVELOPE_LEN + total(&rows));
    assert_eq!(&bytes[segment::FRAMES_AT as usize..][..4], b"TMFR");

    let rows = is_long("index entry", segment::ENTRY_LEN);
    let index = &bytes[record.index_at as usize..record.checksums_at() as usize];
    assert_eq!(&index[..8], b"TMVINDEX");
    let entries: Vec<_> = index[ENVELOPE_LEN..].chunks(segment::ENTRY_LEN).collect();
    assert_eq!(entries.len(), 4);
    assert_eq!(number(entries[0], &rows, "first block"), 100);
    assert_eq!(number(entries[0], &rows, "number of blocks"), 3);
    assert_eq!(number(entries[1], &rows, "place of"), 3);
    assert_eq!(number(entries[1], &rows, "blocks of"), 4);
    assert_eq!(
        number(entries[1], &rows, "frame offset"),
        segment::FRAMES_AT
    );
    assert_eq!(number(entries[1], &rows, "sequence"), 7);
    assert_eq!(
        number(entries[2], &rows, "flags"),
        u64::from(segment::FLAG_ZERO)
    );
    assert_eq!(number(entries[2], &rows, "number of blocks"), 4700);
    assert_eq!(
        number(entries[3], &rows, "frame length"),
        record.index_at - number(entries[3], &rows, "frame offset")
    );

    let checksums = &bytes[record.checksums_at() as usize..][..record.checksums_len as usize];
    assert_eq!(&checksums[..8], b"TMVCHECK");
    assert_eq!(checksums.len(), ENVELOPE_LEN + 5 * Checksum128::LEN);

    let rows = is_long("segment footer", segment::FOOTER_PAYLOAD_LEN);
    let end = &bytes[bytes.len() - FOOTER_LEN as usize..];
    assert_eq!(&end[..8], b"TMVFOOTR");
    let end = &end[ENVELOPE_LEN..];
    assert_eq!(number(end, &rows, "watermark"), 50);
    assert_eq!(number(end, &rows, "to here"), 6100);
    assert_eq!(number(end, &rows, "base generation"), 6);
    assert_eq!(number(end, &rows, "epoch"), 40);
    assert_eq!(number(end, &rows, "cut time"), 1_700_000_000_000);
    assert_eq!(number(end, &rows, "frames"), 2);
    assert_eq!(number(end, &rows, "zero blocks"), 4700);
    let rows = is_long("segment record", segment::RECORD_LEN);
    let inner = field(end, &table("segment footer"), "the segment's record");
    assert_eq!(number(inner, &rows, "first block"), 100);
    assert_eq!(number(inner, &rows, "block behind"), 6001);
    assert_eq!(number(inner, &rows, "object length"), bytes.len() as u64);
    assert_eq!(number(inner, &rows, "index offset"), record.index_at);
    assert_eq!(number(inner, &rows, "index length"), index.len() as u64);
    assert_eq!(
        number(inner, &rows, "checksum section"),
        checksums.len() as u64
    );
    assert_eq!(number(inner, &rows, "blocks with data"), 5);
}

#[test]
fn a_manifest_is_as_documented() {
    let manifest = manifest();
    let bytes = manifest.encode();
    assert_eq!(&bytes[..8], b"TMVMANIF");
    let names = manifest.name.len() + manifest.source.len();
    let lists = 6 * 4 + 3 * 120 + 3 * 88 + 3 * 88 + 48;
    assert_eq!(
        bytes.len(),
        ENVELOPE_LEN + 16 + 3 * 8 + 4 + 4 + names + 8 + 16 + 8 + lists
    );

    let rows = is_long("generation", manifest::GENERATION_LEN);
    let at = ENVELOPE_LEN + 16 + 3 * 8 + 4 + 4 + names + 8 + 16 + 8 + 4;
    let first = &bytes[at..];
    assert_eq!(number(first, &rows, "number"), 1);
    assert_eq!(number(first, &rows, "writer term"), 1);
    assert_eq!(field(first, &rows, "image digest"), [101; 16]);
    assert_eq!(number(first, &rows, "coherence"), 3);
    assert_eq!(number(first, &rows, "trigger"), 2);
    assert_eq!(number(first, &rows, "changed blocks"), 10);
    assert_eq!(number(first, &rows, "length of the image"), 40_960_000);

    let rows = is_long("recent interval", manifest::RECENT_LEN);
    let first = &bytes[at + 3 * 120 + 4..];
    assert_eq!(field(first, &rows, "interval"), [1; 16]);
    assert_eq!(number(first, &rows, "generation"), 1);
    assert_eq!(number(first, &rows, "epoch"), 31);

    let rows = is_long("condemned object", manifest::CONDEMNED_LEN);
    let last = &bytes[bytes.len() - 4 - 48..];
    assert_eq!(number(last, &rows, "kind"), 0);
    assert_eq!(number(last, &rows, "part"), 9);
    assert_eq!(field(last, &rows, "origin"), [0x44; 16]);
    assert_eq!(number(last, &rows, "object length"), 12345);
    assert_eq!(number(last, &rows, "version"), 2);

    let rows = table("reason");
    let bytes = manifest_with_reasons().encode();
    let text = "agent db did not answer within 5s";
    let last = &bytes[bytes.len() - total(&rows) - text.len()..];
    assert_eq!(number(last, &rows, "generation"), 2);
    assert_eq!(number(last, &rows, "n: bytes"), text.len() as u64);
    assert!(last.ends_with(text.as_bytes()));

    is_long("page reference", manifest::PAGE_REF_LEN);
    let current = Current {
        generation: GenerationId::new(3),
        current_through_ms: 9,
    };
    let rows = table("current");
    let bytes = current.encode(VOLUME);
    assert_eq!(number(&bytes[ENVELOPE_LEN..], &rows, "current through"), 9);
    assert_eq!(bytes.len(), ENVELOPE_LEN + total(&rows));
    let marker = StoreMarker {
        store: [5; 16],
        created_ms: 8,
    };
    let rows = table("marker");
    assert_eq!(
        number(&marker.encode()[ENVELOPE_LEN..], &rows, "created"),
        8
    );
    assert_eq!(marker.encode().len(), ENVELOPE_LEN + total(&rows));
}

fn limits_in_the_page(text: &str) -> bool {
    FORMAT.contains(text)
}

#[test]
fn limits_are_as_documented() {
    let with_commas = |n: usize| {
        let digits = n.to_string();
        let split = digits.len().saturating_sub(3);
        if split == 0 {
            digits
        } else {
            format!("{},{}", &digits[..split], &digits[split..])
        }
    };
    for (limit, context) in [
        (
            manifest::GENERATIONS_MAX,
            "generations, oldest first, at most ",
        ),
        (
            manifest::RECENT_MAX,
            "recent intervals, oldest first, at most ",
        ),
        (manifest::PAGES_MAX, "pages, at most "),
        (
            manifest::PAGE_RECORDS,
            "segment records that are in no page, at most ",
        ),
        (manifest::CONDEMNED_MAX, "condemned objects, at most "),
        (segment::ENTRIES_MAX, "greatest first; at most "),
        (
            usize::try_from(segment::DATA_BLOCKS_MAX).unwrap(),
            "in the order of the index; at most ",
        ),
    ] {
        let text = format!("{context}{}", with_commas(limit));
        assert!(limits_in_the_page(&text), "{text}");
    }
}

fn golden_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// The file's bytes; with `TIDEMARK_GOLDEN=write` it is written first.
fn golden(name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = golden_path(name);
    if std::env::var_os("TIDEMARK_GOLDEN").is_some() {
        std::fs::write(&path, bytes).unwrap();
    }
    std::fs::read(&path).unwrap()
}

fn parse(bytes: &[u8]) -> (Footer, SegmentIndex, Vec<Checksum128>) {
    let id = SegmentId {
        origin: INTERVAL,
        part: 3,
    };
    let at = bytes.len() - FOOTER_LEN as usize;
    let footer = Footer::decode(
        &bytes[at..],
        VOLUME,
        geometry(10_000),
        id,
        bytes.len() as u64,
    )
    .unwrap();
    let record = footer.record;
    let index = &bytes[record.index_at as usize..record.checksums_at() as usize];
    let index = SegmentIndex::decode(index, &record, geometry(10_000)).unwrap();
    let checksums = &bytes[record.checksums_at() as usize..][..record.checksums_len as usize];
    (footer, index, decode_checksums(checksums, &record).unwrap())
}

#[test]
fn golden_segments_keep_decoding_and_are_still_written_so() {
    for (name, sealed) in [
        ("segment-received-v1.bin", received()),
        ("segment-rewritten-v1.bin", rewritten()),
    ] {
        let bytes = golden(name, &sealed.bytes);
        assert!(bytes == sealed.bytes, "{name}");
        let (footer, index, checksums) = parse(&bytes);
        assert_eq!(footer, sealed.footer);
        assert_eq!(checksums.len(), 5);
        insta::assert_debug_snapshot!(name.replace(".bin", ""), (footer, index.entries()));
    }
}

#[test]
fn golden_manifests_keep_decoding_and_are_still_written_so() {
    let sample = manifest();
    let first = std::fs::read(golden_path("manifest-v1.bin")).unwrap();
    assert_eq!(Manifest::decode(&first, VOLUME, 4).unwrap(), sample);
    let sample = manifest_with_reasons();
    let bytes = golden("manifest-v2.bin", &sample.encode());
    assert_eq!(bytes, sample.encode());
    assert_eq!(Manifest::decode(&bytes, VOLUME, 4).unwrap(), sample);
    assert!(
        Manifest::decode(&bytes, VOLUME, 5).is_err(),
        "another version's name"
    );

    let page = golden("page-v1.bin", &encode_page(&sample.tail));
    assert_eq!(page, encode_page(&sample.tail));
    assert_eq!(decode_page(&page, xxh3_128(&page)).unwrap(), sample.tail);
    assert!(
        decode_page(&page, Checksum128::ZERO).is_err(),
        "another page's name"
    );

    let current = Current {
        generation: GenerationId::new(3),
        current_through_ms: 1_700_000_000_000,
    };
    let bytes = golden("current-v1.bin", &current.encode(VOLUME));
    assert_eq!(Current::decode(&bytes, VOLUME).unwrap(), current);
    let marker = StoreMarker {
        store: [7; 16],
        created_ms: 1_700_000_000_000,
    };
    let bytes = golden("store-v1.bin", &marker.encode());
    assert_eq!(StoreMarker::decode(&bytes).unwrap(), marker);
}

#[test]
fn reasons_are_of_known_generations_in_order_and_said_once() {
    let bytes = manifest_with_reasons().encode();
    let payload = &bytes[ENVELOPE_LEN..];
    let (rest, text) = payload.split_at(payload.len() - 4 - 10 - 33);
    let of = |ids: &[u64], text: &[u8]| {
        let mut payload = rest.to_vec();
        payload.extend(u32::try_from(ids.len()).unwrap().to_le_bytes());
        for id in ids {
            payload.extend(id.to_le_bytes());
            payload.extend(u16::try_from(text.len()).unwrap().to_le_bytes());
            payload.extend(text);
        }
        let bytes = wire::seal(
            manifest::MANIFEST_MAGIC,
            manifest::MANIFEST_VERSION,
            &payload,
        );
        Manifest::decode(&bytes, VOLUME, 4)
    };
    assert_eq!(of(&[2], &text[14..]), Ok(manifest_with_reasons()));
    assert_eq!(of(&[], b""), Ok(manifest()));
    for (ids, text) in [
        (&[9][..], &b"why"[..]),
        (&[2, 1], b"why"),
        (&[2, 2], b"why"),
        (&[2], b""),
        (&[2], b"two\nlines"),
    ] {
        assert!(
            matches!(of(ids, text), Err(FormatError::Wire(_))),
            "{ids:?}"
        );
    }
}

#[test]
fn no_flipped_bit_of_a_manifest_is_overlooked() {
    let bytes = manifest().encode();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(Manifest::decode(&damaged, VOLUME, 4).is_err(), "byte {at}");
    }
    for length in 0..bytes.len() {
        assert!(
            Manifest::decode(&bytes[..length], VOLUME, 4).is_err(),
            "length {length}"
        );
    }
}

#[test]
fn lengths_and_counters_that_no_writer_makes_are_refused() {
    type Bend = fn(&mut Manifest);
    let bends: [Bend; 7] = [
        |m| m.version = u64::MAX,
        |m| m.term = WriterTerm::new(u64::MAX),
        |m| m.next_generation = GenerationId::new(u64::MAX),
        |m| m.condemned[0].length = u64::MAX,
        |m| m.pages[0].stored_bytes = u64::MAX,
        |m| m.tail[0].data_blocks = BlockCount::new(u64::MAX / 16),
        |m| {
            m.tail[0].file_len += 1 << 62;
            m.tail[0].index_at += 1 << 62;
        },
    ];
    let mut sound = manifest();
    sound.pages.push(PageRef {
        name: xxh3_128(b"a page"),
        count: 2,
        sequences: (Sequence::ZERO, Sequence::new(1)),
        blocks: extent(1, 2),
        stored_bytes: 50_000,
        data_blocks: 3,
    });
    assert!(Manifest::decode(&sound.encode(), VOLUME, sound.version).is_ok());
    for (n, bend) in bends.into_iter().enumerate() {
        let mut bent = sound.clone();
        bend(&mut bent);
        let read = Manifest::decode(&bent.encode(), VOLUME, bent.version);
        assert!(matches!(read, Err(FormatError::Wire(_))), "{n}: {read:?}");
    }
}

#[test]
fn a_footer_has_one_length() {
    let sealed = received();
    let origin = sealed.footer.origin;
    let mut payload = sealed.footer.encode()[ENVELOPE_LEN..].to_vec();
    let read = |payload: &[u8]| {
        let bytes = wire::seal(FOOTER_MAGIC, segment::VERSION, payload);
        let length = sealed.footer.record.file_len;
        Footer::decode(&bytes, VOLUME, origin.geometry, origin.id, length)
    };
    assert_eq!(read(&payload), Ok(sealed.footer));
    payload.extend([0; 4]);
    assert!(read(&payload).is_err());
}

#[test]
fn terms_are_granted_once_per_nonce_and_only_to_the_current_writer() {
    let first = grant_term(None, &term_request(0, 1), 5).unwrap().unwrap();
    assert_eq!((first.version, first.term), (1, WriterTerm::new(1)));
    assert_eq!(
        grant_term(None, &term_request(3, 1), 5),
        Err(TermError::Unknown(WriterTerm::new(3)))
    );
    // The same nonce again, whatever the last term says.
    assert_eq!(grant_term(Some(&first), &term_request(0, 1), 6), Ok(None));
    let second = grant_term(Some(&first), &term_request(1, 2), 6)
        .unwrap()
        .unwrap();
    assert_eq!((second.version, second.term), (2, WriterTerm::new(2)));
    check_invariants(&second, Some(&first)).unwrap();
    for stale in [0, 1, 7] {
        let refused = grant_term(Some(&second), &term_request(stale, 9), 7);
        assert!(
            matches!(refused, Err(TermError::Fenced { .. })),
            "last term {stale}"
        );
    }
    let mut other = term_request(2, 9);
    other.geometry = geometry(1);
    assert!(matches!(
        grant_term(Some(&second), &other, 7),
        Err(TermError::Geometry { .. })
    ));
}

#[test]
fn the_chain_of_an_image_stays_with_commits_and_changes_with_its_segments() {
    let manifest = manifest();
    let second = Sequence::new(2);
    let chain = manifest.chain(second);
    assert_ne!(chain, manifest.chain(Sequence::new(1)));
    let mut next = manifest.successor(0);
    let mut record = manifest.tail[0];
    record.id.part = 77;
    record.sequences = (Sequence::new(4), Sequence::new(4));
    next.push_generation(generation(4), vec![record]);
    assert_eq!(next.chain(second), chain);
    let victims = std::iter::once(manifest.tail[1].id).collect();
    let mut newer = manifest.tail[1];
    newer.id.part = 78;
    let mut replaced = next.successor(0);
    replaced.replace_segments(&victims, vec![newer], &std::collections::HashMap::new());
    assert_ne!(replaced.chain(second), chain);
    // The same in a page.
    let mut paged = next.clone();
    let many = (100..700).map(|part| {
        let mut record = manifest.tail[0];
        record.id.part = part;
        record
    });
    assert!(
        !paged
            .push_generation(generation(5), many.collect())
            .is_empty()
    );
    assert_ne!(paged.chain(second), chain);
    assert_eq!(paged.successor(1).chain(second), paged.chain(second));
}

#[test]
fn segment_records_move_to_pages_and_victims_leave_them() {
    let mut manifest = grant_term(None, &term_request(0, 1), 5).unwrap().unwrap();
    let record = |n: u32| {
        let mut record = received().footer.record;
        record.id.part = n;
        record.sequences = (
            record.sequences.0.min(tidemark_block::Sequence::new(1)),
            tidemark_block::Sequence::new(1),
        );
        record
    };
    manifest = manifest.successor(6);
    let pages = manifest.push_generation(generation(1), (0..1300).map(record).collect());
    assert_eq!(
        (pages.len(), manifest.tail.len(), manifest.segment_count()),
        (2, 276, 1300)
    );
    check_invariants(&manifest, None).unwrap();
    assert_eq!(
        Manifest::decode(&manifest.encode(), VOLUME, 2).unwrap(),
        manifest
    );
    let stored = manifest.stored_bytes();
    let contents = pages
        .iter()
        .map(|page| (page.name, page.records.clone()))
        .collect();
    let victims: HashSet<_> = [5, 6, 1290].map(|n| record(n).id).into();
    let last = manifest.clone();
    manifest = manifest.successor(7);
    let made = manifest.replace_segments(&victims, vec![record(5000)], &contents);
    check_invariants(&manifest, Some(&last)).unwrap();
    // The page without victims stays; what is left of the other is put together with the tail.
    assert_eq!(manifest.pages[0].name, pages[1].name);
    assert_eq!(manifest.segment_count(), 1298);
    assert_eq!(made.len(), 1);
    let objects: Vec<_> = manifest
        .condemned
        .iter()
        .map(|condemned| condemned.object)
        .collect();
    assert!(objects.contains(&CondemnedObject::Page(pages[0].name)));
    assert_eq!(objects.len(), 4);
    assert!(
        manifest
            .condemned
            .iter()
            .all(|Condemned { version, .. }| *version == 3)
    );
    assert_eq!(
        manifest.stored_bytes(),
        stored + record(0).file_len,
        "condemned segments still count"
    );
    let records: HashSet<SegmentId> = made
        .iter()
        .flat_map(|page| &page.records)
        .chain(&pages[1].records)
        .chain(&manifest.tail)
        .map(|record: &SegmentRecord| record.id)
        .collect();
    assert!(records.is_disjoint(&victims) && records.len() == 1298);
}
