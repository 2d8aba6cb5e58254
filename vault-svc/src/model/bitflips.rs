//! One flipped bit anywhere in a store, an object cut short, an object gone: it is found and named, by whoever reads it
//! or by the scrub, and wrong bytes are never served.

use std::{collections::BTreeSet, future::Future, path::Path, sync::Arc};

use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory};
use tidemark_block::{BlockCount, BlockIndex, Extent, GenerationId};
use vault_core::reclaim::Policy;

use super::{
    config, deliver,
    faults::{FaultyStore, Fuse},
    read, scratch,
};
use crate::{
    Vault,
    image::ImageReader,
    interval::{Numbers, Source},
    scrub::{Damage, Pace},
    store::Store,
    volume::{Volume, now_ms},
};

const BLOCKS: u64 = super::BLOCKS;

pub(super) async fn objects(store: &InMemory) -> Vec<(object_store::path::Path, Vec<u8>)> {
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

/// Opens a vault over the store; nothing is retired, for nobody looks after it.
pub(super) async fn open(dir: &Path, store: &Arc<InMemory>) -> anyhow::Result<Arc<Vault>> {
    let store = Store::new(Arc::clone(store) as _);
    Vault::open_with(config(dir, 4), store, Policy::default()).await
}

/// What is told of a store that is opened, read and scrubbed: every refusal, and every object that the scrub names.
async fn look(
    store: &Arc<InMemory>,
    source: &Source,
    images: &[Vec<u8>],
) -> (Vec<String>, Vec<Damage>) {
    let dir = scratch();
    let opened = open(dir.path(), store).await;
    let vault = match opened {
        Ok(vault) => vault,
        Err(error) => return (vec![format!("{error:#}")], Vec::new()),
    };
    let volume = match vault.volume(source.volume) {
        Ok(volume) => volume,
        Err(error) => return (vec![error.to_string()], Vec::new()),
    };
    let mut refusals = Vec::new();
    refusals.extend(volume.table_at_head().await.err().map(|e| e.to_string()));
    let mut unreadable = BTreeSet::new();
    for (image, generation) in images.iter().zip(1..) {
        match read(&volume, generation).await {
            Ok(found) => assert!(found == *image, "wrong bytes of generation {generation}"),
            Err(error) => {
                refusals.push(error.to_string());
                unreadable.insert(GenerationId::new(generation));
            }
        }
    }
    let found = scrub(&volume).await;
    let hit: BTreeSet<_> = found
        .iter()
        .flat_map(|damage| &damage.generations)
        .copied()
        .collect();
    assert!(
        unreadable.is_subset(&hit),
        "{unreadable:?} can't be read: {found:?}"
    );
    (refusals, found)
}

pub(super) async fn scrub(volume: &Arc<Volume>) -> Vec<Damage> {
    let found = volume.scrub(&mut Pace::unbounded(), &mut |_| ()).await;
    found.unwrap().named
}

/// A store with three generations of a small volume.
pub(super) async fn small_store() -> (Arc<InMemory>, Source, Vec<Vec<u8>>) {
    let dir = scratch();
    let store = Arc::new(InMemory::new());
    let vault = open(dir.path(), &store).await.unwrap();
    let mut source = Source::new(1, BLOCKS);
    source.compressed = Some(true);
    source.term = vault
        .start_term(source.term_request(), &tidemark_identity::Caller::Local)
        .await
        .unwrap()
        .term;
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
    mark_current_now(&vault, &source);
    vault.close().await.unwrap();
    (store, source, images)
}

/// Makes the vault write its advisory object.
pub(super) fn mark_current_now(vault: &Vault, source: &Source) {
    let volume = vault.volume(source.volume).unwrap();
    volume.mark_current(volume.manifest().head_id(), now_ms());
}

#[test]
fn each_flipped_bit_cut_off_end_and_missing_object_is_found_and_named_and_none_is_served() {
    run(async {
        let (store, source, images) = small_store().await;
        let sound = look(&store, &source, &images).await;
        assert!(sound.0.is_empty() && sound.1.is_empty(), "{sound:?}");
        let mut damages = 0;
        for (path, bytes) in objects(&store).await {
            // What readers of images need: the newest manifest, and all of a segment but its header and footer.
            let is_root = path.as_ref().ends_with("00000004");
            let is_segment = path.as_ref().contains("segments");
            let flips = (0..bytes.len()).map(|at| {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << (at % 8);
                let needed = is_root || is_segment && (128..bytes.len() - 240).contains(&at);
                (damaged, needed, format!("byte {at}"))
            });
            let cuts = (0..bytes.len()).step_by(97).map(|length| {
                let needed = is_root || is_segment && length < bytes.len() - 240;
                (bytes[..length].to_vec(), needed, format!("{length} bytes"))
            });
            let longer = [([&bytes[..], b"x"].concat(), false, "a byte more".to_owned())];
            for (damaged, needed, what) in flips.chain(cuts).chain(longer) {
                store.put(&path, damaged.into()).await.unwrap();
                damages += 1;
                let (refusals, found) = look(&store, &source, &images).await;
                let refused = refusals.iter().any(|text| text.contains(path.as_ref()));
                let named = found.iter().any(|damage| damage.object == path.as_ref());
                assert!(refused || !needed, "{what} of {path}: {refusals:?}");
                assert!(
                    refused || refusals.is_empty(),
                    "{what} of {path}: {refusals:?}"
                );
                assert!(
                    refused || named,
                    "{what} of {path}: neither refused nor found"
                );
                store.put(&path, bytes.clone().into()).await.unwrap();
            }
            if is_segment {
                store.delete(&path).await.unwrap();
                let (refusals, found) = look(&store, &source, &images).await;
                assert!(refusals.iter().any(|text| text.contains(path.as_ref())));
                assert!(found.iter().any(|damage| damage.object == path.as_ref()));
                store.put(&path, bytes.into()).await.unwrap();
            }
        }
        println!("{damages} damages, each found");
        let sound = look(&store, &source, &images).await;
        assert!(
            sound.0.is_empty() && sound.1.is_empty(),
            "sound again: {sound:?}"
        );
    });
}

#[test]
fn what_a_running_vault_knows_of_its_damaged_roots_it_writes_again() {
    run(async {
        let (store, source, images) = small_store().await;
        let dir = scratch();
        let vault = open(dir.path(), &store).await.unwrap();
        let volume = vault.volume(source.volume).unwrap();
        let mut mended = 0;
        for (path, bytes) in objects(&store).await {
            let newest = format!("manifest/{:020}", volume.manifest().version);
            let is_root = path.as_ref().ends_with(&newest);
            if path.as_ref().contains("segments") || path.as_ref().contains("manifest") && !is_root
            {
                continue;
            }
            for missing in [false, true] {
                // The advisory object may be missing.
                if missing && path.as_ref().ends_with("current") {
                    continue;
                }
                if missing {
                    store.delete(&path).await.unwrap();
                } else {
                    let mut damaged = bytes.clone();
                    damaged[bytes.len() / 2] ^= 1;
                    store.put(&path, damaged.into()).await.unwrap();
                }
                let version = volume.manifest().version;
                let found = scrub(&volume).await;
                let [damage] = &found[..] else {
                    panic!("{path}: {found:?}");
                };
                assert!(
                    damage.repaired && damage.generations.is_empty(),
                    "{damage:?}"
                );
                assert_eq!(damage.object, path.as_ref());
                assert_eq!(volume.scrub.counts().damaged, 0, "{path} is sound again");
                mended += 1;
                let put = store.get(&path).await.unwrap().bytes().await.unwrap();
                assert!(put == bytes[..], "{path} is what it was");
                assert!(scrub(&volume).await.is_empty(), "{path} is sound again");
                if is_root {
                    assert_eq!(volume.manifest().version, version + 1, "its successor");
                    break;
                }
            }
        }
        assert_eq!(
            mended, 4,
            "the marker twice, the newest manifest, the advisory object"
        );
        drop((volume, vault));
        let sound = look(&store, &source, &images).await;
        assert!(sound.0.is_empty() && sound.1.is_empty(), "{sound:?}");
    });
}

#[test]
fn flipped_bits_at_ten_thousand_places_of_a_large_store_are_each_found_and_named_and_none_is_served()
 {
    const FLIPS: usize = 10_000;
    const GENERATIONS: u64 = 120;
    run(async {
        let dir = scratch();
        let store = Arc::new(InMemory::new());
        let vault = open(dir.path(), &store).await.unwrap();
        let mut numbers = Numbers(7);
        let mut source = Source::new(1, 1000);
        source.term = vault
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        let mut images = Vec::new();
        for generation in 1..=GENERATIONS {
            for _ in 0..16 {
                let block = numbers.below(1000);
                for word in source.block(block).chunks_exact_mut(8) {
                    word.copy_from_slice(&numbers.next().to_le_bytes());
                }
                source.changed.insert(block);
            }
            let prepared = source.prepare();
            source.committed(&deliver(&vault, &prepared).await.unwrap());
            if generation % 30 == 0 {
                images.push((generation, source.image.clone()));
            }
        }
        let volume = vault.volume(source.volume).unwrap();
        assert!(scrub(&volume).await.is_empty());
        let segments: Vec<_> = objects(&store)
            .await
            .into_iter()
            .filter(|(path, _)| path.as_ref().contains("segments"))
            .collect();
        assert!(segments.len() > 100, "{} segments", segments.len());
        let mut flips = 0;
        for round in 0.. {
            if flips >= FLIPS {
                break;
            }
            // One in each segment at a time.
            for (path, bytes) in &segments {
                let mut damaged = bytes.clone();
                let at = usize::try_from(numbers.below(bytes.len() as u64)).unwrap();
                damaged[at] ^= 1 << numbers.below(8);
                store.put(path, damaged.into()).await.unwrap();
                flips += 1;
            }
            let found = scrub(&volume).await;
            let named: BTreeSet<_> = found.iter().map(|damage| damage.object.as_str()).collect();
            for (path, _) in &segments {
                assert!(named.contains(path.as_ref()), "{path} in round {round}");
            }
            let (generation, image) = &images[round % images.len()];
            none_is_served(&volume, *generation, image).await;
            for (path, bytes) in &segments {
                store.put(path, bytes.clone().into()).await.unwrap();
            }
        }
        assert!(scrub(&volume).await.is_empty(), "sound again");
        println!(
            "{flips} flipped bits in {} segments, each found",
            segments.len()
        );
    });
}

#[test]
fn what_the_disk_cannot_read_is_damage_and_the_rest_is_scrubbed_all_the_same() {
    run(async {
        let (objects, source, _) = small_store().await;
        let (dir, fuse) = (scratch(), Arc::new(Fuse::default()));
        let store = FaultyStore::new(Arc::clone(&objects), Arc::clone(&fuse));
        let store = Store::new(Arc::new(store) as _);
        let vault = Vault::open_with(config(dir.path(), 4), store, Policy::default());
        let volume = vault.await.unwrap().volume(source.volume).unwrap();
        let sound = volume
            .scrub(&mut Pace::unbounded(), &mut |_| ())
            .await
            .unwrap();
        fuse.make_unreadable(Some("segments"));
        let found = volume
            .scrub(&mut Pace::unbounded(), &mut |_| ())
            .await
            .unwrap();
        assert_eq!(found.progress.objects, sound.progress.objects);
        assert_eq!(found.damaged, volume.manifest().segment_count());
        for damage in &found.named {
            assert!(damage.object.contains("segments"), "{damage:?}");
            assert_eq!(damage.problem, "the disk can't read it");
            assert!(!damage.generations.is_empty(), "{damage:?}");
        }
        fuse.make_unreadable(None);
        assert!(scrub(&volume).await.is_empty());
    });
}

/// Reads a generation in small parts: each is right or refused.
async fn none_is_served(volume: &Arc<Volume>, generation: u64, image: &[u8]) {
    let reader = ImageReader::open(Arc::clone(volume), generation).unwrap();
    for (part, at) in image.chunks(16 * 4096).zip((0..).step_by(16)) {
        let blocks = Extent::new(BlockIndex::new(at), BlockCount::new(16));
        if let Ok(found) = reader.read(blocks).await {
            assert!(
                found == part,
                "wrong bytes at block {at} of generation {generation}"
            );
        }
    }
}

pub(super) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(test);
}
