//! Stored bytes over thousands of intervals.

use std::{collections::VecDeque, sync::Arc};

use object_store::memory::InMemory;
use vault_core::reclaim::Policy;

use super::{config, deliver, read, scratch};
use crate::{
    Vault,
    interval::{Numbers, Source},
    store::Store,
};

const BLOCKS: u64 = 300;
const INTERVALS: u64 = 2000;

/// Raw bytes of the versions that the retained images are made of.
fn live_bytes(images: &VecDeque<Vec<u8>>) -> u64 {
    let mut versions = 0;
    for block in 0..usize::try_from(BLOCKS).unwrap() {
        let at = |image: &Vec<u8>| image[block * 4096..(block + 1) * 4096].to_vec();
        let mut last: Option<Vec<u8>> = None;
        for image in images {
            let now = at(image);
            if last.as_ref() != Some(&now) && now.iter().any(|byte| *byte != 0) {
                versions += 1;
            }
            last = Some(now);
        }
    }
    versions * 4096
}

#[test]
fn stored_bytes_stay_below_one_and_a_half_of_live_bytes_over_2000_intervals() {
    let seed = std::env::var("TIDEMARK_MODEL_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(7);
    println!("seed {seed}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let dir = scratch();
        let policy = Policy {
            small_bytes: 40 << 10,
            round_bytes: 4 << 20,
            segment_bytes: 256 << 10,
            ..Policy::default()
        };
        let vault = Vault::open_with(
            config(dir.path(), 4),
            Store::new(Arc::new(InMemory::new())),
            policy,
        )
        .await
        .unwrap();
        let mut source = Source::new(seed, BLOCKS);
        source.term = vault.start_term(source.term_request(), &tidemark_identity::Caller::Local).await.unwrap().term;
        let volume = vault.volume(source.volume).unwrap();
        let mut numbers = Numbers(seed);
        let mut images: VecDeque<Vec<u8>> = VecDeque::new();
        let (mut worst, mut received, mut rewritten) = (0, 0, 0);
        for n in 0..INTERVALS {
            // Mostly a few blocks, now and then many; skewed to the front.
            let count = if numbers.below(20) == 0 {
                150
            } else {
                1 + numbers.below(12)
            };
            for _ in 0..count {
                let bound = 1 + numbers.below(BLOCKS);
                let block = numbers.below(bound);
                if numbers.below(12) == 0 {
                    source.zero(block..block + 1);
                } else {
                    source.write(block);
                }
            }
            let prepared = source.prepare();
            let receipt = deliver(&vault, &prepared).await.unwrap();
            source.committed(&receipt);
            received += receipt.frame_bytes;
            images.push_back(source.image.clone());
            if images.len() > 4 {
                images.pop_front();
            }
            rewritten += vault.pass(&volume, false).await.unwrap().rewritten_bytes;
            let manifest = volume.manifest();
            let (stored, live) = (manifest.stored_bytes(), live_bytes(&images));
            let percent = stored * 100 / live.max(1);
            if live > 100 << 10 {
                worst = worst.max(percent);
                assert!(
                    percent <= 150,
                    "after interval {n}: {stored} bytes stored, {live} alive"
                );
            }
            assert!(
                manifest.segment_count() < 200,
                "after interval {n}: {} segments",
                manifest.segment_count()
            );
            if n % 50 == 0 || n + 1 == INTERVALS {
                assert_eq!(manifest.generations.len(), images.len());
                for (generation, image) in manifest.generations.iter().zip(&images) {
                    assert!(
                        read(&volume, generation.id.get()).await.unwrap() == *image,
                        "interval {n}"
                    );
                }
            }
        }
        println!("at worst {worst} bytes stored per 100 live ones; {received} received, {rewritten} rewritten");
        assert!(rewritten < 6 * received, "{rewritten} bytes rewritten for {received} received");
    });
}
