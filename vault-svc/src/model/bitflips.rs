//! One flipped bit anywhere in a store: it is seen, or it makes no difference. Wrong bytes are never served.

use std::sync::Arc;

use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory};
use vault_core::reclaim::Policy;

use super::{config, deliver, read, scratch};
use crate::{Vault, interval::Source, store::Store};

const BLOCKS: u64 = super::BLOCKS;

async fn objects(store: &InMemory) -> Vec<(object_store::path::Path, Vec<u8>)> {
    use futures::TryStreamExt;
    let listed: Vec<_> = store.list(None).try_collect().await.unwrap();
    let mut found = Vec::new();
    for meta in listed {
        let bytes = store
            .get(&meta.location)
            .await
            .unwrap()
            .bytes()
            .await
            .unwrap();
        found.push((meta.location, bytes.to_vec()));
    }
    found
}

/// What a reader of the damaged store meets: whether anything was refused.
async fn look(store: &Arc<InMemory>, source: &Source, images: &[Vec<u8>]) -> bool {
    let dir = scratch();
    let opened = Vault::open_with(
        config(dir.path(), 4),
        Store::new(Arc::clone(store) as _),
        Policy::default(),
    )
    .await;
    let Ok(vault) = opened else { return true };
    let Ok(volume) = vault.volume(source.volume) else {
        return true;
    };
    let mut refused = volume.table_at_head().await.is_err();
    for (image, generation) in images.iter().zip(1..) {
        match read(&volume, generation).await {
            Ok(found) => assert!(found == *image, "wrong bytes of generation {generation}"),
            Err(_) => refused = true,
        }
    }
    refused
}

#[test]
fn a_flipped_bit_anywhere_is_seen_or_harmless() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let dir = scratch();
        let store = Arc::new(InMemory::new());
        let vault = Vault::open_with(
            config(dir.path(), 4),
            Store::new(Arc::clone(&store) as _),
            Policy::default(),
        )
        .await
        .unwrap();
        let mut source = Source::new(1, BLOCKS);
        source.compressed = Some(true);
        source.term = vault.start_term(source.term_request()).await.unwrap().term;
        let mut images = Vec::new();
        for round in 0..3_u8 {
            for block in [3, 4, 5, 100, 250] {
                source.block(block + u64::from(round)).fill(round + 1);
                source.changed.insert(block + u64::from(round));
            }
            source.zero(4..6);
            let prepared = source.prepare();
            source.committed(&deliver(&vault, &prepared).await.unwrap());
            images.push(source.image.clone());
        }
        drop(vault);
        assert!(!look(&store, &source, &images).await, "the store is sound");
        let (mut flips, mut seen) = (0, 0);
        for (path, bytes) in objects(&store).await {
            let is_root = path.as_ref().ends_with("00000004");
            let is_segment = path.as_ref().contains("segments");
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << (at % 8);
                store.put(&path, damaged.into()).await.unwrap();
                flips += 1;
                let refused = look(&store, &source, &images).await;
                seen += u32::from(refused);
                // Headers and footers of segments are read when an interval is taken up, not by readers of images.
                let read = is_root || is_segment && (128..bytes.len() - 240).contains(&at);
                assert!(refused || !read, "byte {at} of {path} was overlooked");
            }
            store.put(&path, bytes.into()).await.unwrap();
        }
        println!("{flips} bits flipped, {seen} seen, the others harmless");
        assert!(
            !look(&store, &source, &images).await,
            "the store is sound again"
        );
    });
}
