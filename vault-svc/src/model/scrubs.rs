//! What the scrub reads, in what store, and whom it accuses.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use futures::FutureExt;
use object_store::{ObjectStoreExt, memory::InMemory, path::Path};
use tidemark_block::{BlockIndex, GenerationId};
use tidemark_proto::{
    Reason,
    vault::v1::{ScrubRequest, vault_server::Vault as _},
};
use tokio::sync::{Semaphore, watch};
use tokio_stream::StreamExt;
use vault_core::{manifest::StoreMarker, reclaim::Policy, segment::SegmentRecord};

use super::{
    bitflips::{mark_current_now, objects, open, run, scrub, small_store},
    config, deliver,
    faults::{FaultyStore, Fuse},
    scratch,
};
use crate::{
    Config, Vault,
    interval::Source,
    rpc::Service,
    scrub::{NeededFor, Pace},
    store::Store,
    volume::Volume,
};

/// A vault over a store whose sectors go bad and whose page cache is watched.
async fn watched(dir: &std::path::Path, objects: &Arc<InMemory>) -> (Arc<Vault>, Arc<Fuse>) {
    let fuse = Arc::new(Fuse::default());
    let faulty = Arc::new(FaultyStore::new(Arc::clone(objects), Arc::clone(&fuse)));
    let store = Store::settled_by(Arc::clone(&faulty) as _, faulty);
    let vault = Vault::open_with(config(dir, 4), store, Policy::default());
    (vault.await.unwrap(), fuse)
}

async fn commit(vault: &Vault, source: &mut Source) {
    let prepared = source.prepare();
    source.committed(&deliver(vault, &prepared).await.unwrap());
}

/// Puts a bit of an object wrong.
async fn flip(store: &InMemory, path: &Path, at: impl Fn(usize) -> usize) {
    let mut bytes = bytes_of(store, path).await;
    let at = at(bytes.len());
    bytes[at] ^= 1;
    store.put(path, bytes.into()).await.unwrap();
}

async fn bytes_of(store: &InMemory, path: &Path) -> Vec<u8> {
    let found = store.get(path).await.unwrap();
    found.bytes().await.unwrap().to_vec()
}

/// A store with so many segments that their records fill a page.
async fn store_with_pages() -> (Arc<InMemory>, Source) {
    let (dir, store) = (scratch(), Arc::new(InMemory::new()));
    let vault = open(dir.path(), &store).await.unwrap();
    let mut source = Source::new(1, 64);
    source.term = vault
        .start_term(source.term_request(), &tidemark_identity::Caller::Local)
        .await
        .unwrap()
        .term;
    for n in 0..1_000 {
        source.write(n % 64);
        commit(&vault, &mut source).await;
        if !vault
            .volume(source.volume)
            .unwrap()
            .manifest()
            .pages
            .is_empty()
        {
            break;
        }
    }
    assert!(
        !vault
            .volume(source.volume)
            .unwrap()
            .manifest()
            .pages
            .is_empty()
    );
    mark_current_now(&vault, &source);
    vault.close().await.unwrap();
    (store, source)
}

#[test]
fn every_object_is_read_from_the_medium_and_every_byte_is_counted() {
    run(async {
        let (objects_of, source) = store_with_pages().await;
        let dir = scratch();
        let (vault, fuse) = watched(dir.path(), &objects_of).await;
        let volume = vault.volume(source.volume).unwrap();
        fuse.take_forgotten();
        let found = volume
            .scrub(&mut Pace::unbounded(), &mut |_| ())
            .await
            .unwrap();
        let stored = objects(&objects_of).await;
        let names: BTreeSet<_> = stored.iter().map(|(path, _)| path.to_string()).collect();
        assert!(names.iter().any(|name| name.contains("pages")));
        let forgotten = fuse.take_forgotten();
        let cached: Vec<_> = names.difference(&forgotten).collect();
        assert!(cached.is_empty(), "read from the page cache: {cached:?}");
        let marker = Path::from("store");
        let all = stored.iter().filter(|(path, _)| *path != marker);
        let bytes: usize = all.map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(found.progress.bytes, bytes as u64);
        assert_eq!(found.progress.bytes_total, bytes as u64);
        assert_eq!(found.progress.objects, stored.len() as u64);
    });
}

#[test]
fn what_is_no_segment_is_read_at_no_more_than_the_greatest_rate_either() {
    run(async {
        let (store, source, _) = small_store().await;
        let dir = scratch();
        let vault = open(dir.path(), &store).await.unwrap();
        let volume = vault.volume(source.volume).unwrap();
        let first = Path::from(volume.store.manifest_name(1));
        let first = bytes_of(&store, &first).await.len() as u64;
        // A byte in a second: nothing more is read until the first manifest is paid for.
        let mut pace = Pace::over(Duration::ZERO, Arc::new(AtomicU64::new(0)), 1);
        let mut told = Vec::new();
        let mut tell = |progress| told.push(progress);
        let done = volume.scrub(&mut pace, &mut tell).now_or_never();
        assert!(done.is_none());
        let last = told.last().unwrap();
        assert_eq!((last.objects, last.bytes), (1, first), "the marker alone");
    });
}

#[test]
fn a_store_that_is_not_the_vaults_own_is_told_and_never_written_to() {
    run(async {
        let (sound, source, _) = small_store().await;
        let sound = objects(&sound).await;
        let marker = Path::from("store");
        let others = StoreMarker {
            store: [7; 16],
            created_ms: 7,
        };
        for (case, told) in [
            ("another disk", "its marker names another one"),
            ("no disk", "it is missing from the store"),
            (
                "no disk since the pass began",
                "it is missing from the store",
            ),
            (
                "no marker and another manifest",
                "it is missing from the store",
            ),
        ] {
            let store = Arc::new(InMemory::new());
            for (path, bytes) in &sound {
                store.put(path, bytes.clone().into()).await.unwrap();
            }
            let dir = scratch();
            let vault = open(dir.path(), &store).await.unwrap();
            let volume = vault.volume(source.volume).unwrap();
            let newest = Path::from(volume.store.manifest_name(volume.manifest().version));
            let empty = async || {
                for (path, _) in &sound {
                    store.delete(path).await.unwrap();
                }
            };
            match case {
                "another disk" => {
                    empty().await;
                    let bytes = others.encode();
                    store.put(&marker, bytes.into()).await.unwrap();
                }
                "no disk" => empty().await,
                "no marker and another manifest" => {
                    flip(&store, &newest, |length| length / 2).await;
                    store.delete(&marker).await.unwrap();
                }
                _ => {}
            }
            let before = objects(&store).await;
            let goes_away = case == "no disk since the pass began";
            let mut tell = |progress: crate::scrub::Progress| {
                if goes_away && progress.objects == 1 {
                    empty().now_or_never().unwrap();
                }
            };
            let error = volume.scrub(&mut Pace::unbounded(), &mut tell).await;
            let error = error.unwrap_err();
            assert_eq!(error.reason, Reason::StoreCorrupt, "{case}");
            assert!(error.message.contains(told), "{case}: {error}");
            let before = if goes_away { Vec::new() } else { before };
            assert!(
                objects(&store).await == before,
                "{case}: something was written"
            );
            assert_eq!(volume.scrub.counts().damaged, 1, "{case}: the marker");
            // The disk is there again.
            for (path, bytes) in &sound {
                store.put(path, bytes.clone().into()).await.unwrap();
            }
            assert!(scrub(&volume).await.is_empty(), "{case}");
            assert_eq!(volume.scrub.counts().damaged, 0, "{case}");
        }
    });
}

/// Where the frame lies that holds a block, one block to a frame.
async fn frame_of(volume: &Volume, record: &SegmentRecord, block: u64) -> std::ops::Range<u64> {
    let index = volume.store.index(volume.manifest().geometry, record).await;
    let index = index.unwrap();
    let holds =
        |entry: &&vault_core::segment::IndexEntry| entry.blocks.contains(BlockIndex::new(block));
    let entry = index.entries().iter().find(holds).unwrap();
    assert_eq!(entry.frame_blocks, 1);
    entry.frame_at..entry.frame_at + u64::from(entry.frame_len)
}

#[test]
fn a_bad_sector_accuses_the_generations_that_need_its_frames_and_no_others() {
    run(async {
        let (dir, store) = (scratch(), Arc::new(InMemory::new()));
        let (vault, fuse) = watched(dir.path(), &store).await;
        let mut source = Source::new(1, 64);
        source.frame_blocks = 1;
        source.term = vault
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        // Block 10 is replaced by generation 2, block 11 by generation 4, block 12 never.
        for blocks in [&[10, 11, 12, 13][..], &[10], &[20], &[11], &[21]] {
            blocks.iter().for_each(|block| source.write(*block));
            commit(&vault, &mut source).await;
        }
        let volume = vault.volume(source.volume).unwrap();
        let record = volume.manifest().tail[0];
        let path = volume.store.segment_path(record.id);
        let readers_have = || (volume.shared.indexes.size(), volume.shared.maps.size());
        let before = readers_have();
        for (bad, flipped, generations) in [
            (&[10][..], None, &[1][..]),
            (&[11], None, &[1, 2, 3]),
            (&[12], None, &[1, 2, 3, 4, 5]),
            (&[10, 11], None, &[1, 2, 3]),
            // What lies behind a bad sector is looked at all the same.
            (&[10], Some(11), &[1, 2, 3]),
            (&[], Some(10), &[1]),
        ] {
            let mut sectors = Vec::new();
            for block in bad {
                let frame = frame_of(&volume, &record, *block).await;
                sectors.push(frame.start + 20..frame.start + 21);
            }
            let whole = bytes_of(&store, &path).await;
            if let Some(block) = flipped {
                let at = frame_of(&volume, &record, block).await.end - 1;
                flip(&store, &path, |_| usize::try_from(at).unwrap()).await;
            }
            fuse.spoil(Some((path.clone(), sectors)));
            let found = volume.scrub(&mut Pace::unbounded(), &mut |_| ()).await;
            let found = found.unwrap();
            fuse.spoil(None);
            store.put(&path, whole.into()).await.unwrap();
            let [damage] = &found.named[..] else {
                panic!("{bad:?}: {:?}", found.named);
            };
            let ids: Vec<_> = generations
                .iter()
                .map(|id| GenerationId::new(*id))
                .collect();
            assert_eq!(damage.generations, ids, "{bad:?}, {flipped:?}: {damage:?}");
            assert_eq!(found.generations.iter().copied().collect::<Vec<_>>(), ids);
            let wrong = bad.len() + flipped.iter().count();
            assert_eq!(
                damage.problem.contains("another frame"),
                wrong == 2,
                "{damage:?}"
            );
            assert_eq!(damage.needed_for, NeededFor::Nothing);
        }
        assert_eq!(readers_have(), before, "what readers have in memory stays");
        assert!(scrub(&volume).await.is_empty());
    });
}

#[test]
fn damage_that_hits_no_image_says_what_the_object_is_needed_for() {
    run(async {
        let (store, source, _) = small_store().await;
        let dir = scratch();
        let vault = open(dir.path(), &store).await.unwrap();
        let volume = vault.volume(source.volume).unwrap();
        let record = volume.manifest().tail[0];
        let segment = volume.store.segment_path(record.id);
        let checksums = usize::try_from(record.checksums_at()).unwrap() + 50;
        let first = Path::from(volume.store.manifest_name(1));
        for (path, at, needed_for) in [
            (&segment, checksums, NeededFor::ChecksumTable),
            // In the header.
            (&segment, 50, NeededFor::Nothing),
            (&first, 50, NeededFor::Nothing),
        ] {
            flip(&store, path, |_| at).await;
            let [damage] = &scrub(&volume).await[..] else {
                panic!("{path}");
            };
            assert_eq!(
                (damage.needed_for, &damage.generations[..]),
                (needed_for, &[][..])
            );
            assert!(!damage.repaired && volume.scrub.counts().damaged == 1);
            flip(&store, path, |_| at).await;
        }
        // Both at once are told both.
        flip(&store, &segment, |_| checksums).await;
        flip(&store, &segment, |_| 200).await;
        let [damage] = &scrub(&volume).await[..] else {
            panic!("one object is damaged");
        };
        assert_eq!(damage.needed_for, NeededFor::ChecksumTable);
        assert!(!damage.generations.is_empty(), "{damage:?}");
    });
}

#[test]
fn what_is_deleted_is_damaged_no_longer() {
    run(async {
        let (store, source) = store_with_pages().await;
        let dir = scratch();
        let (vault, _) = watched(dir.path(), &store).await;
        let volume = vault.volume(source.volume).unwrap();
        flip(&store, &Path::from(volume.store.manifest_name(1)), |_| 50).await;
        assert_eq!(scrub(&volume).await.len(), 1);
        assert_eq!(volume.scrub.counts().damaged, 1);
        vault.pass(&volume, true).await.unwrap();
        assert_eq!(volume.scrub.counts().damaged, 0);
    });
}

#[test]
fn a_second_scrub_by_hand_of_the_same_volume_is_told_to_wait() {
    run(async {
        let (store, source, _) = small_store().await;
        let dir = scratch();
        let vault = open(dir.path(), &store).await.unwrap();
        let volume = vault.volume(source.volume).unwrap();
        let (_stop, stopping) = watch::channel(false);
        let service = Service {
            vault,
            stopping,
            restores: Arc::new(Semaphore::new(1)),
        };
        let ask = || {
            let volume = source.volume.to_string();
            service.scrub(tonic::Request::new(ScrubRequest { volume }))
        };
        let other = volume.scrub.by_hand().unwrap();
        let refused = ask().await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        assert!(
            refused.message().contains("somebody else scrubs"),
            "{refused}"
        );
        drop(other);
        for _ in 0..2 {
            let mut answers = ask().await.unwrap().into_inner();
            while let Some(answer) = answers.next().await {
                answer.unwrap();
            }
        }
        assert_eq!(volume.scrub.counts().passes, 2);
        // Whoever hangs up lets the next one begin.
        let answers = ask().await.unwrap();
        assert!(ask().await.is_err());
        drop(answers);
        while volume.scrub.by_hand().is_none() {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_vault_that_starts_empty_scrubs_the_volumes_that_come() {
    run(async {
        let dir = scratch();
        let store = Store::new(Arc::new(InMemory::new()));
        assert_eq!(Config::default().scrub_period.get().as_secs(), 7 * 86_400);
        let vault = Vault::open_with(config(dir.path(), 4), store, Policy::default());
        let vault = vault.await.unwrap();
        let (stop, stopping) = watch::channel(false);
        let scrubbing = tokio::spawn(Arc::clone(&vault).scrub_always(stopping));
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        for seed in 1..3 {
            let mut source = Source::new(seed, 64);
            source.term = vault
                .start_term(source.term_request(), &tidemark_identity::Caller::Local)
                .await
                .unwrap()
                .term;
            let volume = vault.volume(source.volume).unwrap();
            let scrubbed = async {
                while volume.scrub.counts().passes == 0 {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            let scrubbed = tokio::time::timeout(Duration::from_secs(60), scrubbed);
            scrubbed.await.expect("it isn't scrubbed in this period");
        }
        stop.send_replace(true);
        scrubbing.await.unwrap();
    });
}
