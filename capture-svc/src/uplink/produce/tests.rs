use capture_core::codec::CodecRule;
use proptest::prelude::*;
use tidemark_block::{GenerationId, ImageDigest, IntervalId, VolumeId};

use super::*;
use crate::uplink::walk::tests::{MemoryImage, apply, geometry, image_of, table_of};

fn job(dir: &std::path::Path, base: &[u8], after: &[u8], zstd: bool) -> Job<MemoryImage> {
    let g = geometry(base.len() as u64);
    let mut changed = BlockSet::new();
    changed.insert(g.all());
    Job {
        image: MemoryImage::new(g, image_of(after)),
        changed: Arc::new(changed),
        table: table_of(dir, g, &image_of(base)),
        pending: dir.join("pending"),
        key: PendingKey {
            volume: VolumeId::from_bytes([1; 16]),
            interval: IntervalId::from_bytes([2; 16]),
            base: GenerationId::new(1),
        },
        codec: if zstd {
            CodecRule::Zstd
        } else {
            CodecRule::Raw
        },
        zstd_level: 1,
    }
}

/// Runs a job to its end; the batches, and the total.
async fn all(job: Job<MemoryImage>, from: BlockIndex) -> (Vec<(BlockIndex, bytes::Bytes)>, Total) {
    let mut producer = Producer::start(job, from);
    let mut batches = Vec::new();
    loop {
        match producer.next().await {
            Produced::Batch(batch) => batches.push((batch.end, batch.frames)),
            Produced::Done(total) => return (batches, total),
            Produced::Failed(error) => panic!("{error}"),
        }
    }
}

/// Content that zstd can't shrink, so that a few hundred blocks make several batches.
fn noisy(seed: u8, blocks: usize) -> Vec<u8> {
    (0..blocks)
        .map(|n| u8::try_from((n * 7 + usize::from(seed)) % 5).unwrap())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn an_interval_resumed_anywhere_comes_to_the_same(
        seed in 0..5u8,
        blocks in 300..900usize,
        cut in 0..8usize,
        keep_pending in any::<bool>(),
        zstd in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (base, after) = (noisy(0, blocks), noisy(seed, blocks));
        let g = geometry(blocks as u64);
        let (whole, total) = runtime.block_on(all(job(dir.path(), &base, &after, false), BlockIndex::ZERO));
        if !whole.is_empty() {
            let from = whole[cut % whole.len()].0;
            if !keep_pending {
                std::fs::remove_file(dir.path().join("pending")).unwrap();
            }
            let (rest, resumed) = runtime.block_on(all(job(dir.path(), &base, &after, zstd), from));
            prop_assert_eq!(resumed, total);
            let mut image = image_of(&base);
            let prefix: Vec<_> = whole.iter().take_while(|(end, _)| *end <= from).cloned().collect();
            apply(g, &mut image, &prefix);
            apply(g, &mut image, &rest);
            prop_assert!(image == image_of(&after));
            let key = job(dir.path(), &base, &after, false).key;
            let base_table = crate::uplink::BaseTable::open(&dir.path().join("table"), key.volume, g).unwrap();
            let pending = dir.path().join("pending");
            prop_assert!(!base_table.replay(&pending, key, ImageDigest::from_bytes([9; 16])).unwrap());
            prop_assert!(!base_table.is_sound());
            prop_assert!(base_table.replay(&pending, key, total.image_digest).unwrap());
            prop_assert!(base_table.is_sound());
            prop_assert_eq!(base_table.table().digest().unwrap(), total.image_digest);
        }
    }
}

#[tokio::test]
async fn a_thread_that_nobody_listens_to_ends() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path(), &noisy(0, 2000), &noisy(1, 2000), false);
    let producer = Producer::start(job, BlockIndex::ZERO);
    producer.end().await;
}

#[tokio::test]
async fn a_prefix_in_the_file_is_not_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let (base, after) = (noisy(0, 1000), noisy(1, 1000));
    let (whole, _) = all(job(dir.path(), &base, &after, false), BlockIndex::ZERO).await;
    let resumed = job(dir.path(), &base, &after, false);
    let read = Arc::clone(&resumed.image.read);
    let from = whole[whole.len() - 1].0;
    all(resumed, from).await;
    let left = 1000 - from.get();
    assert!(read.load(Ordering::Relaxed) <= left, "{left}");
}
