//! Two writers: a source that is fenced while it ships, and a second vault over the same store.

use std::sync::Arc;

use object_store::memory::InMemory;
use tidemark_block::GenerationId;
use tidemark_proto::Reason;

use super::{BLOCKS, POLICY, config, deliver, read, scratch};
use crate::{
    Vault,
    interval::Source,
    ship::Begun,
    store::{Store, VolumeStore},
};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

async fn vault(dir: &tempfile::TempDir, store: &Store) -> Arc<Vault> {
    Vault::open_with(config(dir.path(), 4), store.clone(), POLICY)
        .await
        .unwrap()
}

#[test]
fn an_interval_that_was_let_in_before_a_newer_term_is_not_committed() {
    runtime().block_on(async {
        let dir = scratch();
        let vault = vault(&dir, &Store::new(Arc::new(InMemory::new()))).await;
        let mut source = Source::new(21, BLOCKS);
        source.term = vault
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        source.write_some(60);
        let prepared = source.prepare();
        let Begun::Open(mut session) = vault
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
        let volume = vault.volume(source.volume).unwrap();
        // All of it is there; before the seal the volume gets another writer.
        let taken_over = vault
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        let before = volume.manifest();
        let error = session.commit(prepared.seal).await.unwrap_err();
        assert_eq!(error.reason, Reason::Fenced, "{error}");
        assert_eq!(volume.edit(|_| Ok(None)).await.unwrap(), before);
        assert_eq!(before.head_id(), GenerationId::ZERO);

        source.term = taken_over;
        let mut again = prepared;
        again.header.term = taken_over;
        source.committed(&deliver(&vault, &again).await.unwrap());
        assert!(read(&volume, 1).await.unwrap() == source.image);
    });
}

#[test]
fn a_manifest_that_another_vault_has_put_is_not_put_over() {
    runtime().block_on(async {
        let (here, there) = (scratch(), scratch());
        let store = Store::new(Arc::new(InMemory::new()));
        let first = vault(&here, &store).await;
        let mut source = Source::new(22, BLOCKS);
        source.term = first
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        // Knows the volume as it is now, and doesn't look again for a while.
        let second = vault(&there, &store).await;
        source.write_some(60);
        let prepared = source.prepare();
        let receipt = deliver(&first, &prepared).await.unwrap();
        source.committed(&receipt);

        // It makes the next version out of an old one: that number is taken.
        let grant = second
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap();
        assert_eq!(grant.term, source.term.next());
        let head = grant.head.map(|head| head.generation);
        assert_eq!(head, Some(receipt.generation), "the generation is gone");
        let stored = VolumeStore::new(store, source.volume);
        let newest = stored.newest_above(0).await.unwrap().unwrap();
        assert_eq!((newest.version, newest.head_id()), (3, receipt.generation));
        let volume = second.volume(source.volume).unwrap();
        assert!(read(&volume, 0).await.unwrap() == source.image);
    });
}
