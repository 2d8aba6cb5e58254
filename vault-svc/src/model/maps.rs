//! What readers keep between reads, and reclaim under it.

use std::sync::Arc;

use object_store::memory::InMemory;
use tidemark_block::{BlockCount, BlockIndex, Extent};

use super::{
    BLOCKS, POLICY, config, deliver,
    faults::{FaultyStore, Fuse, Reads},
    read, scratch,
};
use crate::{
    Vault,
    image::ImageReader,
    interval::{BLOCK, Source},
    store::Store,
    volume::Volume,
};

/// A vault whose reads are counted, and a source that ships into it.
struct Bench {
    fuse: Arc<Fuse>,
    vault: Arc<Vault>,
    volume: Arc<Volume>,
    source: Source,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn new(seed: u64, retain: u32) -> Self {
        let dir = scratch();
        let fuse = Arc::<Fuse>::default();
        let objects = FaultyStore::new(Arc::new(InMemory::new()), Arc::clone(&fuse));
        let config = config(dir.path(), retain);
        let vault = Vault::open_with(config, Store::new(Arc::new(objects)), POLICY)
            .await
            .unwrap();
        let mut source = Source::new(seed, BLOCKS);
        source.term = vault
            .start_term(source.term_request(), &tidemark_identity::Caller::Local)
            .await
            .unwrap()
            .term;
        Self {
            fuse,
            volume: vault.volume(source.volume).unwrap(),
            vault,
            source,
            _dir: dir,
        }
    }

    async fn commit(&mut self) {
        let prepared = self.source.prepare();
        let receipt = deliver(&self.vault, &prepared).await.unwrap();
        self.source.committed(&receipt);
    }

    fn reader(&self, generation: u64) -> ImageReader {
        ImageReader::open(Arc::clone(&self.volume), generation).unwrap()
    }
}

fn one(block: u64) -> Extent {
    Extent::new(BlockIndex::new(block), BlockCount::new(1))
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

#[test]
fn a_read_near_an_earlier_one_reads_one_frame_and_no_index() {
    run(async {
        let mut bench = Bench::new(11, 4).await;
        (0..192).for_each(|block| bench.source.write(block));
        bench.commit().await;
        let image = bench.source.image.clone();
        let reader = bench.reader(1);
        bench.fuse.take_reads();
        let block = |n: usize| &image[n * BLOCK..(n + 1) * BLOCK];
        assert!(reader.read(one(5)).await.unwrap() == block(5));
        let first = bench.fuse.take_reads();
        assert!(first.sections > 0 && first.frames == 1, "{first:?}");
        // Whatever else was kept: the map alone leads to the frame, also for another reader, and after a commit.
        bench.volume.shared.indexes.clear();
        bench.source.write(3);
        bench.commit().await;
        bench.volume.shared.indexes.clear();
        bench.fuse.take_reads();
        let other = bench.reader(1);
        assert!(other.read(one(70)).await.unwrap() == block(70));
        let frames = |frames| Reads {
            sections: 0,
            frames,
        };
        assert_eq!(bench.fuse.take_reads(), frames(1));
        for n in 64..128 {
            assert!(other.read(one(n as u64)).await.unwrap() == block(n));
        }
        assert_eq!(bench.fuse.take_reads(), frames(0), "the frame is kept");
        assert!(other.read(one(250)).await.unwrap() == [0; BLOCK]);
        assert_eq!(bench.fuse.take_reads(), frames(0), "zeroes have no frame");
        let shared = &bench.volume.shared;
        assert!(shared.maps.size().1 <= shared.maps.bytes_max());
        assert_eq!(shared.maps.size().0, 1);
    });
}

#[test]
fn maps_made_before_a_reclaim_lead_no_later_reader_to_what_is_gone() {
    run(async {
        let mut bench = Bench::new(12, 3).await;
        let mut images = vec![Vec::new()];
        let mut gone = 0;
        for _ in 0..12 {
            bench.source.write_some(120);
            bench.commit().await;
            images.push(bench.source.image.clone());
            let retained: Vec<u64> = bench
                .volume
                .manifest()
                .generations
                .iter()
                .map(|generation| generation.id.get())
                .collect();
            // Each map is made now, and is still kept when the segments that it names have been deleted.
            let all = bench.source.geometry.all();
            let mut readers = Vec::new();
            for &generation in &retained {
                let reader = bench.reader(generation);
                let image = &images[usize::try_from(generation).unwrap()];
                assert!(reader.read(all).await.unwrap() == *image);
                readers.push((reader, image));
            }
            bench.vault.pass(&bench.volume, true).await.unwrap();
            bench.volume.shared.frames.clear();
            for (reader, image) in &readers {
                assert!(reader.read(all).await.unwrap() == **image, "leased");
            }
            drop(readers);
            let done = bench.vault.pass(&bench.volume, true).await.unwrap();
            gone += done.deleted_segments;
            bench.volume.shared.frames.clear();
            for generation in &bench.volume.manifest().generations {
                let number = generation.id.get();
                let image = &images[usize::try_from(number).unwrap()];
                assert!(read(&bench.volume, number).await.unwrap() == *image);
            }
        }
        assert!(
            gone > 10,
            "only {gone} segments deleted: the test tests little"
        );
    });
}
