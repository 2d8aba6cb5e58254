//! Readers and reclaim at the same time.

use std::{collections::HashSet, sync::Arc};

use object_store::memory::InMemory;
use tidemark_block::{BlockCount, BlockIndex, Extent};

use super::{BLOCKS, POLICY, config, deliver, scratch};
use crate::{
    Vault,
    image::ImageReader,
    interval::Source,
    store::{Store, VolumeStore},
};

#[test]
fn a_reader_keeps_what_it_reads_and_nothing_is_left_when_it_has_gone() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let dir = scratch();
        let objects = Arc::new(InMemory::new());
        let store = Store::new(Arc::clone(&objects) as _);
        let vault = Vault::open_with(config(dir.path(), 1), store.clone(), POLICY)
            .await
            .unwrap();
        let mut source = Source::new(3, BLOCKS);
        source.term = vault.start_term(source.term_request()).await.unwrap().term;
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
