//! Binds `docs/FORMAT.md` to the code.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "it/page.rs"]
mod page;

use page::{Row, field};
use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, CodecChoice, Extent, FrameEncoder, Geometry, MemoryTable,
    block_checksum,
    frame::{self, BLOCKS_MAX, DECODED_LEN_MAX, EXTENT_LEN, EXTENTS_MAX},
    image_digest, wire, xxh3_128,
};

const FORMAT: &str = include_str!("../../../docs/FORMAT.md");

fn table(name: &str) -> Vec<Row> {
    page::table(FORMAT, name)
}

#[test]
fn the_envelope_is_as_documented() {
    let rows = table("envelope");
    let bytes = wire::seal(*b"TMTEST\0\0", 7, b"payload");
    assert_eq!(field(&bytes, &rows, "magic"), b"TMTEST\0\0");
    assert_eq!(field(&bytes, &rows, "version"), [7, 0]);
    assert_eq!(field(&bytes, &rows, "length"), 7u64.to_le_bytes());
    let covered = [&bytes[..24], b"payload"].concat();
    assert_eq!(
        field(&bytes, &rows, "checksum"),
        xxh3_128(&covered).as_bytes()
    );
    assert_eq!(&bytes[wire::ENVELOPE_LEN..], b"payload");
}

#[test]
fn the_frame_is_as_documented() {
    let rows = table("frame header");
    let geometry = Geometry::new(4096 * 100, BlockSize::MIN).unwrap();
    let data = [vec![1; 4096], vec![2; 4096], vec![3; 4096]].concat();
    let blocks: Vec<_> = [5, 6, 9]
        .into_iter()
        .zip(data.chunks(4096))
        .map(|(n, bytes)| (BlockIndex::new(n), block_checksum(bytes)))
        .collect();
    let mut bytes = Vec::new();
    let codec =
        FrameEncoder::new(geometry).encode_data(&blocks, &data, CodecChoice::Raw, &mut bytes);
    assert_eq!(field(&bytes, &rows, "`TMFR`"), b"TMFR");
    assert_eq!(field(&bytes, &rows, "version"), [frame::VERSION]);
    assert_eq!(field(&bytes, &rows, "codec"), [codec as u8]);
    assert_eq!(field(&bytes, &rows, "binary logarithm"), [12]);
    assert_eq!(field(&bytes, &rows, "e: "), [2, 0]);
    assert_eq!(field(&bytes, &rows, "b: "), 3u32.to_le_bytes());
    assert_eq!(field(&bytes, &rows, "p: "), (3 * 4096u32).to_le_bytes());
    let covered = [&bytes[..32], &bytes[48..]].concat();
    assert_eq!(
        field(&bytes, &rows, "checksum"),
        xxh3_128(&covered).as_bytes()
    );

    let (extents, rest) = bytes[frame::HEADER_LEN..].split_at(2 * EXTENT_LEN);
    let extent = |n: u64, count: u32| [&n.to_le_bytes()[..], &count.to_le_bytes()].concat();
    assert_eq!(extents, [extent(5, 2), extent(9, 1)].concat());
    let (checksums, payload) = rest.split_at(3 * 16);
    assert_eq!(&checksums[..16], blocks[0].1.as_bytes());
    assert_eq!(payload, data);
}

#[test]
fn the_limits_of_a_frame_are_as_documented() {
    assert!(FORMAT.contains(&format!("up to {BLOCKS_MAX} blocks")));
    assert!(FORMAT.contains(&format!("at most {} MiB of them", DECODED_LEN_MAX >> 20)));
    assert!(FORMAT.contains(&format!("number of extents, 1 to {EXTENTS_MAX}")));
    assert!(FORMAT.contains(&format!("| {EXTENT_LEN} e |")));
}

#[test]
fn the_root_of_the_digest_is_as_documented() {
    let rows = table("digest root");
    let geometry = Geometry::new(4096 * 2000, BlockSize::MIN).unwrap();
    let mut head = vec![0; 24];
    for (begin, value) in [
        ("`TMDIGEST`", &b"TMDIGEST"[..]),
        ("version", &1u32.to_le_bytes()),
        ("block size", &4096u32.to_le_bytes()),
        ("length", &geometry.length().to_le_bytes()),
    ] {
        let (offset, length, _) = rows
            .iter()
            .find(|(_, _, field)| field.starts_with(begin))
            .unwrap();
        head[*offset..offset + length].copy_from_slice(value);
    }
    // Two leaves, both of zeroes.
    head.extend_from_slice(&[0; 32]);
    let Ok(digest) = image_digest(&MemoryTable::new(geometry));
    assert_eq!(digest.as_bytes(), xxh3_128(&head).as_bytes());
}

#[test]
fn the_table_stamp_is_as_documented() {
    // The page's own arithmetic; the bytes are held by `a_stamp_is_as_documented` beside their writer.
    assert_eq!(table("table stamp").len(), 4);
}

#[test]
fn a_block_set_is_as_documented() {
    let extent = |start, count| Extent::new(BlockIndex::new(start), BlockCount::new(count));
    let set: tidemark_block::BlockSet = [extent(0, 8192), extent(3 * 4096 + 1, 1)]
        .into_iter()
        .collect();
    let mut bits = [0; 512];
    bits[0] = 2;
    let numbers = |values: &[u64]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let payload = [numbers(&[2, 0, 2 | 1 << 63, 3, 1]), bits.to_vec()].concat();
    assert_eq!(set.encode(), wire::seal(*b"TMBLKSET", 1, &payload));
}
