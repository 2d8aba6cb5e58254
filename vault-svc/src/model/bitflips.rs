//! One flipped bit anywhere in a store, an object cut short, an object gone: whatever a reader needs of it is missed,
//! the refusal names the object, and wrong bytes are never served.

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

/// What a reader of the damaged store is told: every refusal that it meets.
async fn look(store: &Arc<InMemory>, source: &Source, images: &[Vec<u8>]) -> Vec<String> {
    let dir = scratch();
    let opened = Vault::open_with(
        config(dir.path(), 4),
        Store::new(Arc::clone(store) as _),
        Policy::default(),
    )
    .await;
    let vault = match opened {
        Ok(vault) => vault,
        Err(error) => return vec![format!("{error:#}")],
    };
    let volume = match vault.volume(source.volume) {
        Ok(volume) => volume,
        Err(error) => return vec![error.to_string()],
    };
    let mut refusals = Vec::new();
    refusals.extend(volume.table_at_head().await.err().map(|e| e.to_string()));
    for (image, generation) in images.iter().zip(1..) {
        match read(&volume, generation).await {
            Ok(found) => assert!(found == *image, "wrong bytes of generation {generation}"),
            Err(error) => refusals.push(error.to_string()),
        }
    }
    refusals
}

#[test]
fn damage_to_what_an_image_needs_is_refused_by_the_name_of_the_object() {
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
        assert!(look(&store, &source, &images).await.is_empty(), "sound");
        let (mut damages, mut seen) = (0, 0);
        for (path, bytes) in objects(&store).await {
            let is_root = path.as_ref().ends_with("00000004");
            let is_segment = path.as_ref().contains("segments");
            let named =
                |refusals: &[String]| refusals.iter().any(|text| text.contains(path.as_ref()));
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << (at % 8);
                store.put(&path, damaged.into()).await.unwrap();
                damages += 1;
                let refusals = look(&store, &source, &images).await;
                seen += u32::from(!refusals.is_empty());
                // Headers and footers of segments are read when an interval is taken up, not by readers of images.
                let read = is_root || is_segment && (128..bytes.len() - 240).contains(&at);
                assert!(
                    !read || named(&refusals),
                    "byte {at} of {path}: {refusals:?}"
                );
                assert!(
                    refusals.is_empty() || named(&refusals),
                    "{path}: {refusals:?}"
                );
            }
            for length in (0..bytes.len()).step_by(97) {
                store
                    .put(&path, bytes[..length].to_vec().into())
                    .await
                    .unwrap();
                damages += 1;
                let refusals = look(&store, &source, &images).await;
                // A segment's footer isn't read; what lies before it is.
                let read = is_root || is_segment && length < bytes.len() - 240;
                assert!(
                    !read || named(&refusals),
                    "{length} bytes of {path}: {refusals:?}"
                );
                assert!(
                    refusals.is_empty() || named(&refusals),
                    "{path}: {refusals:?}"
                );
            }
            if is_segment {
                store.delete(&path).await.unwrap();
                let refusals = look(&store, &source, &images).await;
                assert!(named(&refusals), "{path} is gone: {refusals:?}");
            }
            store.put(&path, bytes.into()).await.unwrap();
        }
        println!("{damages} damages, {seen} flipped bits seen, the others in what no image needs");
        assert!(
            look(&store, &source, &images).await.is_empty(),
            "sound again"
        );
    });
}
