//! The invariants of the architecture, as far as they are the vault's, each under its name.
//!
//! 3 (superset) and 5 (the writer never waits) are the capture service's; 7 (unverified bytes are unreachable) is a
//! matter of types, and [`super::super::bitflips`] damages what is stored.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::TryStreamExt;
use object_store::{ObjectStore, path::Path};
use tidemark_block::{
    BlockCount, BlockIndex, Checksum128, Extent, MemoryTable, SegmentId, VolumeId, WriterTerm,
    image_digest,
};
use tidemark_proto::Reason;
use vault_core::manifest::{CondemnedObject, Manifest, check_invariants, decode_page};

use super::{super::faults::Event, World};
use crate::{
    image::ImageReader,
    ship::Begun,
    store::{Store, VolumeStore},
    volume::Volume,
};

/// Versions that reclaim keeps beside the newest.
const VERSIONS_KEPT: u64 = 32;

/// What the store holds at one time, and what the manifests in it say.
struct Replayed {
    paths: VolumeStore,
    volume: VolumeId,
    present: BTreeSet<Path>,
    manifests: BTreeMap<u64, Manifest>,
    pages: BTreeMap<Path, Vec<SegmentId>>,
    /// What each version named, pruned ones too.
    once_named: BTreeMap<u64, BTreeSet<Path>>,
}

impl Replayed {
    fn new(world: &World) -> Self {
        let volume = world.source.volume;
        Self {
            paths: VolumeStore::new(Store::new(Arc::clone(&world.objects) as _), volume),
            volume,
            present: BTreeSet::new(),
            manifests: BTreeMap::new(),
            pages: BTreeMap::new(),
            once_named: BTreeMap::new(),
        }
    }

    fn page_path(&self, name: Checksum128) -> Path {
        Path::from(format!("volumes/{}/pages/{name}", self.volume))
    }

    fn named(&self, manifest: &Manifest) -> BTreeSet<Path> {
        let mut named = BTreeSet::new();
        let segments = manifest.tail.iter().map(|record| record.id);
        named.extend(segments.map(|id| self.paths.segment_path(id)));
        for page in &manifest.pages {
            let path = self.page_path(page.name);
            let records = self.pages.get(&path).into_iter().flatten();
            named.extend(records.map(|id| self.paths.segment_path(*id)));
            named.insert(path);
        }
        named
    }

    fn condemned(&self, manifest: &Manifest) -> BTreeSet<Path> {
        let path = |object| match object {
            CondemnedObject::Segment(id) => self.paths.segment_path(id),
            CondemnedObject::Page(name) => self.page_path(name),
        };
        manifest.condemned.iter().map(|c| path(c.object)).collect()
    }

    fn version_of(&self, path: &Path) -> Option<u64> {
        let dir = format!("volumes/{}/manifest/", self.volume);
        path.as_ref().strip_prefix(&dir)?.parse().ok()
    }

    fn newest(&self) -> Option<&Manifest> {
        self.manifests
            .last_key_value()
            .map(|(_, manifest)| manifest)
    }

    fn put(&mut self, path: &Path, bytes: &[u8]) {
        self.present.insert(path.clone());
        if let Some(version) = self.version_of(path) {
            let manifest = Manifest::decode(bytes, self.volume, version).unwrap();
            self.once_named.insert(version, self.named(&manifest));
            self.manifests.insert(version, manifest);
        } else if path.as_ref().contains("/pages/") {
            let name = tidemark_block::xxh3_128(bytes);
            let records = decode_page(bytes, name).unwrap();
            let ids = records.iter().map(|record| record.id).collect();
            self.pages.insert(path.clone(), ids);
        }
    }

    fn gone(&mut self, path: &Path) {
        self.present.remove(path);
        if let Some(version) = self.version_of(path) {
            self.manifests.remove(&version);
        }
    }
}

/// Goes through everything that took place; `check` sees each event and what the store held before it.
fn replay(world: &World, mut check: impl FnMut(&Replayed, &Event)) -> Replayed {
    let mut replayed = Replayed::new(world);
    for event in world.volatile.events() {
        check(&replayed, &event);
        match &event {
            Event::Put(path, bytes) | Event::Returned(path, bytes) => replayed.put(path, bytes),
            Event::Deleted(path) => replayed.gone(path),
            Event::Lost(path) => {
                if let Some(version) = replayed.version_of(path) {
                    replayed.once_named.remove(&version);
                }
                replayed.gone(path);
            }
        }
    }
    replayed
}

/// 1. A generation is visible if and only if a durable manifest names it, and it was put after what it names.
pub(super) fn all_or_nothing(world: &World, volume: &Arc<Volume>, manifest: &Manifest) {
    let replayed = replay(world, |held, event| {
        if let Event::Put(path, bytes) = event
            && let Some(version) = held.version_of(path)
        {
            let put = Manifest::decode(bytes, held.volume, version).unwrap();
            let missing: Vec<_> = held
                .named(&put)
                .difference(&held.present)
                .cloned()
                .collect();
            assert!(
                missing.is_empty(),
                "version {version} was put before {missing:?}"
            );
        }
    });
    assert_eq!(
        replayed.newest(),
        Some(manifest),
        "what is visible is what the newest manifest says"
    );
    assert_eq!(replayed.newest(), Some(&*volume.manifest()));
    let next = manifest.next_generation.get();
    assert!(
        ImageReader::open(Arc::clone(volume), next).is_err(),
        "a generation that no manifest names is visible"
    );
}

/// 2. Every visible generation is the image that the source cut, and both digests are the one of that image.
pub(super) async fn exact(world: &World, volume: &Arc<Volume>, manifest: &Manifest) {
    let blocks = world.source.geometry.block_count().get();
    let all = Extent::new(BlockIndex::ZERO, BlockCount::new(blocks));
    for generation in &manifest.generations {
        let reader = ImageReader::open(Arc::clone(volume), generation.id.get()).unwrap();
        let image = reader.read(all).await.unwrap();
        let cut = &world.images[&generation.interval];
        assert!(
            image == *cut,
            "generation {} is not what was cut",
            generation.id
        );
        let Ok(digest) = image_digest(&MemoryTable::of_image(world.source.geometry, cut));
        assert_eq!(generation.digest, digest);
    }
    let table = volume.table_at_head().await.unwrap().table;
    if let Some(head) = manifest.head() {
        assert_eq!(table.digest().unwrap(), head.digest);
    }
}

/// 4. What the vault has told to be durable is not received again.
pub(super) fn doubt_is_local(acknowledged: u64, durable: u64) {
    assert!(
        durable >= acknowledged,
        "acknowledged up to block {acknowledged}, taken up behind {durable}"
    );
}

/// 6. A stale term is refused and changes nothing.
pub(super) async fn fenced(world: &mut World, manifest: &Manifest) {
    let events = world.volatile.events().len();
    let vault = world.vault().await.unwrap();
    let mut source = world.source.clone();
    let stale = WriterTerm::new(manifest.term.get() - 1);
    let mut prepared = source.prepare();
    prepared.header.term = stale;
    match vault
        .ship(prepared.header, &tidemark_identity::Caller::Local)
        .await
    {
        Err(error) => assert_eq!(error.reason, Reason::Fenced),
        Ok(Begun::Open(_) | Begun::Committed(_)) => panic!("a stale term was let in"),
    }
    source.term = stale;
    let mut request = source.term_request();
    request.nonce = [0xFE; 16];
    let error = vault
        .start_term(request, &tidemark_identity::Caller::Local)
        .await
        .unwrap_err();
    assert_eq!(error.reason, Reason::Fenced);
    let volume = world.volume().await.unwrap();
    assert_eq!(*volume.edit(|_| Ok(None)).await.unwrap(), *manifest);
    assert_eq!(world.volatile.events().len(), events, "nothing was written");
}

/// 8. Nothing is deleted that the newest manifest names, nor what one has ever named and none has condemned.
pub(super) fn planned_deletion(world: &World) {
    replay(world, |held, event| {
        let (Event::Deleted(path), Some(newest)) = (event, held.newest()) else {
            return;
        };
        if let Some(version) = held.version_of(path) {
            assert!(
                version + VERSIONS_KEPT < newest.version + 1,
                "version {version} was deleted at {}",
                newest.version
            );
            return;
        }
        assert!(
            !held.named(newest).contains(path),
            "{path} is named and was deleted"
        );
        // What has come back after a loss of power is not condemned any more: it is a stray.
        let was_planned = held.condemned(newest).contains(path)
            || held
                .manifests
                .values()
                .any(|old| held.condemned(old).contains(path));
        let was_named = held.once_named.values().any(|named| named.contains(path));
        assert!(
            was_planned || !was_named,
            "{path} was deleted without having been condemned"
        );
    });
}

/// 9. Every list of the manifest is within its maximum.
pub(super) fn bounded(manifest: &Manifest) {
    check_invariants(manifest, None).unwrap();
}

/// 9. The store holds what the newest manifest names, the manifests that are kept, and nothing else.
pub(super) async fn nothing_is_left_over(world: &World) {
    let replayed = replay(world, |_, _| {});
    let newest = replayed.newest().unwrap();
    assert!(newest.condemned.is_empty());
    let mut expected = replayed.named(newest);
    let listed: Vec<_> = world.objects.list(None).try_collect().await.unwrap();
    let (mut there, mut versions) = (BTreeSet::new(), 0);
    for meta in listed {
        match replayed.version_of(&meta.location) {
            Some(_) => versions += 1,
            None => _ = there.insert(meta.location),
        }
    }
    there.remove(&Path::from("store"));
    there.remove(&Path::from(format!("volumes/{}/current", replayed.volume)));
    expected.retain(|path| !there.remove(path));
    assert!(expected.is_empty(), "{expected:?} are named and not there");
    assert!(there.is_empty(), "{there:?} are not named");
    assert!(
        versions <= VERSIONS_KEPT + 2,
        "{versions} manifests are kept"
    );
}

/// 10. A process whose store has failed for good changes nothing and confirms nothing any more.
pub(super) async fn poisoned_on_failure(world: &mut World) {
    let Some(vault) = world.vault.clone() else {
        return;
    };
    let events = world.volatile.events().len();
    if let Ok(volume) = vault.volume(world.source.volume) {
        let edited = volume
            .edit(|last| Ok(Some((last.successor(1), Vec::new()))))
            .await;
        assert!(edited.is_err(), "a dead process changed the manifest");
    }
    assert_eq!(world.volatile.events().len(), events);
}

/// 10. After a put that failed no answer rests on a manifest that is visible and not durable.
pub(super) fn answers_are_durable(world: &World) {
    let unsynced = world.volatile.unsynced();
    let manifest = unsynced
        .iter()
        .find(|path| path.as_ref().contains("/manifest/"));
    assert_eq!(
        manifest, None,
        "an answer was given while it was not durable"
    );
}
