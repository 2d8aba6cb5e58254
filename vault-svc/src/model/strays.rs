//! Strays go, and nothing that is taken up or made again while they do.

use std::{sync::Arc, time::Duration};

use object_store::{ObjectStoreExt, memory::InMemory, path::Path};
use tidemark_block::IntervalId;
use vault_core::manifest::{NewPage, encode_page};

use super::{
    BLOCKS, POLICY, config, deliver,
    faults::{FaultyStore, Fuse},
    read, scratch,
};
use crate::{
    Config, Vault,
    interval::Source,
    ship::Begun,
    store::{Store, VolumeStore},
    volume::Volume,
};

struct Scene {
    _dir: tempfile::TempDir,
    objects: Arc<InMemory>,
    fuse: Arc<Fuse>,
    vault: Arc<Vault>,
    volume: Arc<Volume>,
    source: Source,
}

/// A vault where every object that isn't named is old enough to go.
async fn scene() -> Scene {
    let dir = scratch();
    let (objects, fuse) = (Arc::new(InMemory::new()), Arc::new(Fuse::default()));
    let store = FaultyStore::new(Arc::clone(&objects), Arc::clone(&fuse));
    let config = Config {
        part_age_max: Duration::from_millis(10).into(),
        stream_idle_max: Duration::from_millis(11).into(),
        interval_lease: Duration::from_millis(11).into(),
        ..config(dir.path(), 4)
    };
    let vault = Vault::open_with(config, Store::new(Arc::new(store)), POLICY)
        .await
        .unwrap();
    let mut source = Source::new(11, BLOCKS);
    source.term = vault
        .start_term(source.term_request(), &tidemark_identity::Caller::Local)
        .await
        .unwrap()
        .term;
    let volume = vault.volume(source.volume).unwrap();
    Scene {
        _dir: dir,
        objects,
        fuse,
        vault,
        volume,
        source,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

async fn grow_old() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

#[test]
fn an_interval_that_is_committed_while_strays_are_deleted_keeps_its_parts() {
    runtime().block_on(async {
        let mut scene = scene().await;
        scene.source.write_some(60);
        let mut prepared = scene.source.prepare();
        // Last among the origins.
        prepared.header.interval = IntervalId::from_bytes([0xFF; 16]);
        let Begun::Open(mut session) = scene
            .vault
            .ship(prepared.header.clone(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
        else {
            panic!("it was never committed")
        };
        for batch in &prepared.batches {
            while !session.can_take() {
                session.progress().await.unwrap();
            }
            session.batch(batch.clone()).await.unwrap();
        }
        while session.has_pending() {
            session.close_part().unwrap();
            session.progress().await.unwrap();
        }
        let stray = Path::from(format!(
            "volumes/{}/segments/{}/00000000",
            scene.volume.id,
            "00".repeat(16)
        ));
        scene.objects.put(&stray, "x".into()).await.unwrap();
        grow_old().await;
        let stop = scene.fuse.stop_next_delete();
        let sweep = scene.vault.pass(&scene.volume, true);
        let source = async {
            stop.reached.notified().await;
            // The sweep has listed everything and deletes the stray; meanwhile the interval is committed, and the
            // next one waits to begin.
            let receipt = session.commit(prepared.seal).await.unwrap();
            scene.source.committed(&receipt);
            scene.source.write_some(10);
            let next = scene.source.prepare();
            let begin = scene
                .vault
                .ship(next.header.clone(), &tidemark_identity::Caller::Local);
            let go = async {
                // Until it waits for the sweep's guard.
                grow_old().await;
                stop.go.notify_one();
            };
            let (begun, ()) = tokio::join!(begin, go);
            drop(begun.unwrap());
            next
        };
        let (swept, next) = tokio::join!(sweep, source);
        swept.unwrap();
        assert!(scene.objects.head(&stray).await.is_err(), "the stray went");
        deliver(&scene.vault, &next).await.unwrap();
        assert!(read(&scene.volume, 2).await.unwrap() == scene.source.image);
    });
}

#[test]
fn a_page_that_is_made_again_while_strays_are_deleted_stays() {
    runtime().block_on(async {
        let scene = scene().await;
        let bytes = encode_page(&[]);
        let page = NewPage {
            name: tidemark_block::xxh3_128(&bytes),
            bytes,
            records: Vec::new(),
        };
        scene.volume.store.put_page(&page).await.unwrap();
        grow_old().await;
        let stop = scene.fuse.stop_next_delete();
        let sweep = scene.vault.pass(&scene.volume, true);
        let again = async {
            stop.reached.notified().await;
            let edit = scene
                .volume
                .edit(|last| Ok(Some((last.successor(1), vec![page.clone()]))));
            let go = async {
                grow_old().await;
                stop.go.notify_one();
            };
            let (edited, ()) = tokio::join!(edit, go);
            edited.unwrap();
        };
        let (swept, ()) = tokio::join!(sweep, again);
        swept.unwrap();
        let there = VolumeStore::new(Store::new(scene.objects), scene.volume.id);
        assert_eq!(there.page(page.name).await.unwrap(), []);
    });
}

#[test]
fn a_failure_to_reclaim_does_not_keep_strays() {
    runtime().block_on(async {
        let mut scene = scene().await;
        for _ in 0..5 {
            scene.source.write_some(200);
            let prepared = scene.source.prepare();
            let receipt = deliver(&scene.vault, &prepared).await.unwrap();
            scene.source.committed(&receipt);
        }
        let stray = Path::from(format!(
            "volumes/{}/segments/{}/00000000",
            scene.volume.id,
            "00".repeat(16)
        ));
        scene.objects.put(&stray, "x".into()).await.unwrap();
        grow_old().await;
        // No manifest can be written: nothing can be retired.
        scene.fuse.limit(Some(0));
        scene.vault.pass(&scene.volume, true).await.unwrap_err();
        assert!(scene.objects.head(&stray).await.is_err());
    });
}

#[test]
fn a_volume_that_could_not_be_opened_is_opened_once_the_store_can_be_read_again() {
    runtime().block_on(async {
        let mut scene = scene().await;
        scene.source.write_some(20);
        let prepared = scene.source.prepare();
        let receipt = deliver(&scene.vault, &prepared).await.unwrap();
        scene.source.committed(&receipt);
        let store = FaultyStore::new(Arc::clone(&scene.objects), Arc::clone(&scene.fuse));
        scene.fuse.make_unreadable(Some("manifest"));
        let dir = scratch();
        let vault = Vault::open_with(config(dir.path(), 4), Store::new(Arc::new(store)), POLICY)
            .await
            .unwrap();
        vault.open_broken().await;
        assert!(vault.volume(scene.source.volume).is_err());
        scene.fuse.make_unreadable(None);
        vault.open_broken().await;
        let volume = vault.volume(scene.source.volume).unwrap();
        assert!(read(&volume, 0).await.unwrap() == scene.source.image);
    });
}
