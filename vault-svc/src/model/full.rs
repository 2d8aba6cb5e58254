//! A store without room: a clear refusal, nothing half visible, and it goes on once there is room again.

use std::sync::Arc;

use object_store::memory::InMemory;
use tidemark_proto::Reason;

use super::{
    POLICY, config, deliver,
    faults::{FaultyStore, Fuse},
    read, scratch,
};
use crate::{Vault, interval::Source, store::Store};

#[test]
fn a_full_store_refuses_changes_nothing_and_goes_on_when_there_is_room() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let dir = scratch();
        let fuse = Arc::new(Fuse::default());
        let store = FaultyStore::new(Arc::new(InMemory::new()), Arc::clone(&fuse));
        let vault = Vault::open_with(config(dir.path(), 1), Store::new(Arc::new(store)), POLICY)
            .await
            .unwrap();
        let mut source = Source::new(5, super::BLOCKS);
        source.compressed = Some(false);
        source.term = vault
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        let volume = vault.volume(source.volume).unwrap();
        let mut refusals = 0;
        let mut image = Vec::new();
        for round in 0..30 {
            for block in 0..150 {
                source.write((block + round * 7) % super::BLOCKS);
            }
            let prepared = source.prepare();
            // Room for one and a half intervals more than there are.
            fuse.limit(Some(1_000_000 + round * 20_000));
            let mut result = deliver(&vault, &prepared).await;
            while let Err(error) = &result {
                assert_eq!(
                    (error.reason, error.kind),
                    (Reason::StoreFull, tidemark_proto::ErrorKind::Exhausted)
                );
                refusals += 1;
                assert_eq!(volume.manifest().head_id(), source.base);
                if source.base.get() > 0 {
                    assert!(read(&volume, 0).await.unwrap() == image);
                }
                // What is retired makes room; if that isn't enough, somebody adds some.
                let _ = vault.pass(&volume, true).await;
                fuse.limit(Some(fuse.limit_now() + 300_000));
                result = deliver(&vault, &prepared).await;
            }
            source.committed(&result.unwrap());
            image.clone_from(&source.image);
            assert!(read(&volume, 0).await.unwrap() == image);
        }
        assert!(
            refusals > 10,
            "only {refusals} refusals: the test tests little"
        );
    });
}
