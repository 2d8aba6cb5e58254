//! Readers and reclaim at the same time.

use std::{collections::HashSet, sync::Arc, time::Duration};

use object_store::memory::InMemory;
use tidemark_block::{BlockCount, BlockIndex, Extent};

use super::{BLOCKS, POLICY, config, deliver, scratch};
use crate::{
    Config, Vault,
    image::ImageReader,
    interval::Source,
    store::{Store, VolumeStore},
};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn a_reader_keeps_what_it_reads_and_nothing_is_left_when_it_has_gone() {
    runtime().block_on(async {
        let dir = scratch();
        let objects = Arc::new(InMemory::new());
        let store = Store::new(Arc::clone(&objects) as _);
        let vault = Vault::open_with(config(dir.path(), 1), store.clone(), POLICY)
            .await
            .unwrap();
        let mut source = Source::new(3, BLOCKS);
        source.term = vault
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        let volume = vault.volume(source.volume).unwrap();
        let all = Extent::new(BlockIndex::ZERO, BlockCount::new(BLOCKS));
        let mut readers = Vec::new();
        for _ in 0..6 {
            source.write_some(120);
            let prepared = source.prepare();
            source.committed(&deliver(&vault, &prepared).await.unwrap());
            readers.push((
                ImageReader::open(Arc::clone(&volume), 0).unwrap(),
                source.image.clone(),
            ));
            vault.pass(&volume, true).await.unwrap();
            assert_eq!(volume.manifest().generations.len(), 1);
        }
        for (reader, image) in &readers {
            assert!(reader.read(all).await.unwrap() == *image);
        }
        assert!(!volume.manifest().condemned.is_empty());
        // The newest readers alone let the older objects go.
        readers.drain(..5);
        vault.pass(&volume, true).await.unwrap();
        assert!(readers[0].0.read(all).await.unwrap() == readers[0].1);
        readers.clear();
        vault.pass(&volume, true).await.unwrap();
        let manifest = volume.manifest();
        assert_eq!(manifest.condemned, []);
        let named: HashSet<_> = volume
            .all_segments(&manifest)
            .await
            .unwrap()
            .iter()
            .map(|r| r.id)
            .collect();
        let there: HashSet<_> = VolumeStore::new(store, volume.id)
            .segments()
            .await
            .unwrap()
            .iter()
            .map(|found| found.id)
            .collect();
        assert_eq!(there, named, "what is there is what is named");
    });
}

/// Leases are known to this process only; whoever reads the store in another way has the grace.
#[test]
fn nothing_that_is_condemned_goes_before_the_grace_of_readers_is_over() {
    runtime().block_on(async {
        let dir = scratch();
        let store = Store::new(Arc::new(InMemory::new()));
        let patient = Config {
            reader_grace: Duration::from_secs(86_400).into(),
            ..config(dir.path(), 1)
        };
        let vault = Vault::open_with(patient, store.clone(), POLICY)
            .await
            .unwrap();
        let mut source = Source::new(5, BLOCKS);
        source.term = vault
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        let volume = vault.volume(source.volume).unwrap();
        let mut put = 0;
        for _ in 0..3 {
            (0..BLOCKS).for_each(|block| source.write(block));
            let prepared = source.prepare();
            source.committed(&deliver(&vault, &prepared).await.unwrap());
            put += volume.manifest().tail.len();
            let passed = vault.pass(&volume, true).await.unwrap();
            assert_eq!(passed.deleted_segments, 0);
            put -= volume.manifest().tail.len();
        }
        let condemned = volume.manifest().condemned.len();
        assert!(condemned > 0 && condemned == put, "{condemned} of {put}");
        let there = volume.store.segments().await.unwrap().len();
        assert_eq!(there, condemned + volume.manifest().tail.len());
        drop((vault, volume));

        let vault = Vault::open_with(config(dir.path(), 1), store, POLICY)
            .await
            .unwrap();
        let volume = vault.volume(source.volume).unwrap();
        let passed = vault.pass(&volume, true).await.unwrap();
        assert_eq!(passed.deleted_segments, condemned as u64, "it is over");
    });
}
