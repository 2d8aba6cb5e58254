use proptest::prelude::*;
use tidemark_block::{
    BlockSize, MemoryTable, UnverifiedFrame, VolumeId, frame::FrameDecoder, image_digest,
};

use super::*;

/// An image in memory, some of whose zero blocks are holes.
#[derive(Debug, Clone)]
pub(crate) struct MemoryImage {
    pub(crate) geometry: Geometry,
    pub(crate) bytes: Arc<Vec<u8>>,
    /// Blocks read so far.
    pub(crate) read: Arc<std::sync::atomic::AtomicU64>,
}

impl MemoryImage {
    pub(crate) fn new(geometry: Geometry, bytes: Vec<u8>) -> Self {
        Self {
            geometry,
            bytes: Arc::new(bytes),
            read: Arc::default(),
        }
    }

    fn range(&self, extent: Extent) -> std::ops::Range<usize> {
        let at = |block| usize::try_from(self.geometry.offset_of(block).get()).unwrap();
        at(extent.start())..at(extent.end())
    }
}

impl ImageAtCut for MemoryImage {
    fn read_blocks(&self, extent: Extent, buffer: &mut [u8]) -> Result<(), EngineError> {
        self.read
            .fetch_add(extent.count().get(), std::sync::atomic::Ordering::Relaxed);
        buffer.copy_from_slice(&self.bytes[self.range(extent)]);
        Ok(())
    }

    fn data_extents(&self, extent: Extent) -> Result<BlockSet, EngineError> {
        let mut data = BlockSet::new();
        for block in extent.iter() {
            let one = Extent::new(block, BlockCount::new(1));
            // Every third zero block is allocated.
            if block.get() % 3 == 0 || !tidemark_block::is_zero(&self.bytes[self.range(one)]) {
                data.insert(one);
            }
        }
        Ok(data)
    }
}

pub(crate) fn geometry(blocks: u64) -> Geometry {
    Geometry::new(blocks * 4096, BlockSize::MIN).unwrap()
}

/// Each number fills one block; 0 is a zero block.
pub(crate) fn image_of(numbers: &[u8]) -> Vec<u8> {
    numbers.iter().flat_map(|n| [*n; 4096]).collect()
}

pub(crate) fn table_of(
    dir: &std::path::Path,
    geometry: Geometry,
    image: &[u8],
) -> Arc<ChecksumTable> {
    let table =
        ChecksumTable::create(&dir.join("table"), VolumeId::from_bytes([1; 16]), geometry).unwrap();
    let sums = geometry.all().iter().zip(image.chunks(4096));
    table
        .apply(sums.map(|(block, bytes)| (block, block_checksum(bytes))))
        .unwrap();
    Arc::new(table)
}

#[derive(Default)]
pub(crate) struct Gathered {
    pub(crate) batches: Vec<Batch>,
    pub(crate) entries: Vec<u8>,
    passed: u64,
}

impl Emit for &mut Gathered {
    fn codec(&self) -> CodecChoice {
        CodecChoice::Zstd(1)
    }
    fn batch(&mut self, batch: Batch, entries: &[u8]) -> Result<(), WalkError> {
        self.batches.push(batch);
        self.entries.extend_from_slice(entries);
        Ok(())
    }
    fn passed(&mut self, count: BlockCount) -> Result<(), WalkError> {
        self.passed += count.get();
        Ok(())
    }
    fn finish(&mut self, entries: &[u8]) -> Result<(), WalkError> {
        self.entries.extend_from_slice(entries);
        Ok(())
    }
}

pub(crate) fn walk_all(
    image: &MemoryImage,
    table: &Arc<ChecksumTable>,
    changed: &BlockSet,
    batch_len: usize,
) -> (Total, Gathered) {
    let mut gathered = Gathered::default();
    let mut books = Assembler::new(Arc::clone(table), batch_len, &mut gathered);
    walk(image, &**table, changed, BlockIndex::ZERO, &mut books).unwrap();
    let total = books.finish().unwrap();
    (total, gathered)
}

/// Applies batches to an image as a vault does, checking order and watermarks.
pub(crate) fn apply(geometry: Geometry, image: &mut [u8], batches: &[(BlockIndex, Bytes)]) -> u64 {
    let mut next = BlockIndex::ZERO;
    let mut changed = 0;
    for (end, frames) in batches {
        let mut rest = frames.clone();
        while !rest.is_empty() {
            let (frame, more) = UnverifiedFrame::split(rest).unwrap();
            rest = more;
            let frame = frame.verify(geometry, &mut FrameDecoder::new()).unwrap();
            for extent in frame.extents() {
                assert!(next <= extent.start(), "blocks ascend");
                next = extent.end();
                changed += extent.count().get();
                let at = usize::try_from(geometry.offset_of(extent.start()).get()).unwrap();
                let len = usize::try_from(geometry.bytes(extent.count())).unwrap();
                image[at..at + len].fill(0);
            }
            for block in frame.blocks() {
                let at = usize::try_from(geometry.offset_of(block.block()).get()).unwrap();
                image[at..at + 4096].copy_from_slice(block.bytes());
            }
        }
        assert!(next <= *end, "the watermark covers its frames");
    }
    changed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_shipped_turns_the_base_into_the_image(
        base in prop::collection::vec(0..4u8, 1..400),
        edits in prop::collection::btree_map(0..400usize, 0..4u8, 0..200),
        runs in prop::collection::vec((0..400u64, 0..200u64), 0..3),
        batch_len in 1..40_000usize,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let g = geometry(base.len() as u64);
        let mut after = base.clone();
        let mut changed = BlockSet::new();
        for (&at, &n) in edits.iter().filter(|(at, _)| **at < base.len()) {
            after[at] = n;
            changed.insert(Extent::new(BlockIndex::new(at as u64), BlockCount::new(1)));
        }
        for (start, count) in runs {
            // Doubt without change.
            let run = Extent::new(BlockIndex::new(start), BlockCount::new(count)).intersect(g.all());
            if !run.is_empty() {
                changed.insert(run);
            }
        }
        let table = table_of(dir.path(), g, &image_of(&base));
        let image = MemoryImage::new(g, image_of(&after));
        let (total, gathered) = walk_all(&image, &table, &changed, batch_len);
        let mut restored = image_of(&base);
        let batches: Vec<_> =
            gathered.batches.iter().map(|b| (b.end, b.frames.clone())).collect();
        let applied = apply(g, &mut restored, &batches);
        prop_assert!(restored == image_of(&after));
        let differing = base.iter().zip(&after).filter(|(a, b)| a != b).count() as u64;
        prop_assert_eq!(total.changed_blocks, differing);
        prop_assert_eq!(applied, differing);
        prop_assert_eq!(gathered.passed, changed.len().get());
        let Ok(digest) = image_digest(&MemoryTable::of_image(g, &image_of(&after)));
        prop_assert_eq!(total.image_digest, digest);
    }
}

#[test]
fn changed_blocks_are_given_whole_whatever_they_were() {
    let g = geometry(8);
    let image = MemoryImage::new(g, image_of(&[1, 0, 2, 0, 0, 0, 3, 4]));
    let mut changed = BlockSet::new();
    changed.insert(Extent::between(BlockIndex::new(1), BlockIndex::new(7)));
    let mut gathered = Gathered::default();
    let mut books = Assembler::new(Arc::new(ZeroBase(g)), 1 << 20, &mut gathered);
    walk_whole(&image, g, &changed, &mut books).unwrap();
    assert_eq!(books.finish().unwrap().changed_blocks, 6);
    let mut older = image_of(&[1, 9, 9, 9, 9, 9, 9, 4]);
    let batches: Vec<_> = gathered
        .batches
        .iter()
        .map(|b| (b.end, b.frames.clone()))
        .collect();
    apply(g, &mut older, &batches);
    assert!(older == *image.bytes);
}

#[test]
fn single_blocks_are_read_without_a_search_for_holes() {
    struct NoSearch(MemoryImage);
    impl ImageAtCut for NoSearch {
        fn read_blocks(&self, extent: Extent, buffer: &mut [u8]) -> Result<(), EngineError> {
            self.0.read_blocks(extent, buffer)
        }
        fn data_extents(&self, extent: Extent) -> Result<BlockSet, EngineError> {
            panic!("holes were searched for: {extent}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let g = geometry(64);
    let mut numbers = [1; 64];
    let table = table_of(dir.path(), g, &image_of(&numbers));
    let mut changed = BlockSet::new();
    for at in (0..64).step_by(2) {
        // Every other one of these is zero now, and was not.
        numbers[at] = if at % 4 == 0 { 0 } else { 2 };
        changed.insert(Extent::new(BlockIndex::new(at as u64), BlockCount::new(1)));
    }
    let image = NoSearch(MemoryImage::new(g, image_of(&numbers)));
    let mut gathered = Gathered::default();
    let mut books = Assembler::new(Arc::clone(&table), 1 << 20, &mut gathered);
    walk(&image, &*table, &changed, BlockIndex::ZERO, &mut books).unwrap();
    assert_eq!(books.finish().unwrap().changed_blocks, 32);
    let mut restored = image_of(&[1; 64]);
    let batches: Vec<_> = gathered
        .batches
        .iter()
        .map(|batch| (batch.end, batch.frames.clone()))
        .collect();
    apply(g, &mut restored, &batches);
    assert!(restored == *image.0.bytes);
}

#[test]
fn a_sparse_tebibyte_in_doubt_costs_next_to_nothing() {
    struct Empty;
    impl ImageAtCut for Empty {
        fn read_blocks(&self, extent: Extent, _: &mut [u8]) -> Result<(), EngineError> {
            panic!("a hole was read: {extent}");
        }
        fn data_extents(&self, _: Extent) -> Result<BlockSet, EngineError> {
            Ok(BlockSet::new())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let g = Geometry::new(1 << 40, BlockSize::MIN).unwrap();
    let table = ChecksumTable::create(&dir.path().join("table"), VolumeId::from_bytes([1; 16]), g);
    let table = Arc::new(table.unwrap());
    let far = BlockIndex::new((1 << 28) - 5);
    table.apply([(far, block_checksum(&[1; 4096]))]).unwrap();
    let mut changed = BlockSet::new();
    changed.insert(g.all());
    let mut gathered = Gathered::default();
    let mut books = Assembler::new(Arc::clone(&table), 1 << 20, &mut gathered);
    walk(&Empty, &*table, &changed, BlockIndex::ZERO, &mut books).unwrap();
    let total = books.finish().unwrap();
    assert_eq!(total.changed_blocks, 1);
    assert_eq!(gathered.batches[0].end, far.next());
}
