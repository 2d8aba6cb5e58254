//! One volume at the vault: the owner of its manifest, its checksum table and its readers' leases.
//!
//! The manifest has one owner, [`Volume::edit`], which every change goes through: it puts pages, then the manifest
//! if its version is absent, then reads the newest back, whatever the put said. Only that decides what has happened.

mod leases;
mod table;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures::{FutureExt, Stream, StreamExt, stream};
use parking_lot::{Mutex as SyncMutex, RwLock};
use tidemark_block::{Checksum128, Extent, GenerationId, VolumeId};
use tidemark_proto::{Reason, RpcError};
use tidemark_telemetry::step;
use tokio::sync::Mutex;
use tracing::Instrument;
use vault_core::{
    manifest::{CondemnedObject, Current, Manifest, NewPage, StoreMarker, check_invariants},
    segment::{SegmentIndex, SegmentRecord},
};

pub(crate) use leases::Lease;
pub(crate) use table::{TableAt, TableFiles};

use crate::{
    cache::Cache,
    error::of_store,
    image::{FrameCache, MapCache},
    store::{StoreError, VolumeStore},
};

/// Indexes read from the store at the same time.
const READS_AT_ONCE: usize = 8;

/// What all volumes of a vault share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) indexes: Cache<(VolumeId, tidemark_block::SegmentId), SegmentIndex>,
    pub(crate) pages: Cache<(VolumeId, Checksum128), Vec<SegmentRecord>>,
    pub(crate) maps: MapCache,
    pub(crate) frames: FrameCache,
    pub(crate) manifest_keep: Duration,
    pub(crate) marker: StoreMarker,
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}

/// A volume that has a manifest.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) id: VolumeId,
    pub(crate) store: VolumeStore,
    pub(crate) shared: Arc<Shared>,
    /// What readers see: always a manifest that has been read back.
    visible: RwLock<Arc<Manifest>>,
    /// Held while the manifest is changed.
    owner: Mutex<Owner>,
    pub(crate) leases: leases::Leases,
    pub(crate) table: table::Table,
    current: SyncMutex<CurrentThrough>,
    /// One stream at a time ships into a volume.
    pub(crate) shipping: crate::ship::Gate,
    pub(crate) receiving: crate::ship::Receiving,
    pub(crate) upkeep: Mutex<crate::upkeep::Upkeep>,
    pub(crate) scrub: crate::scrub::Account,
    pub(crate) figures: crate::figures::Figures,
}

#[derive(Debug)]
struct Owner {
    /// The outcome of the last put is unknown: what is visible may not be durable.
    unsettled: bool,
    /// The view may be stale: read the newest before anything else.
    stale: bool,
    loaded: Instant,
}

#[derive(Debug, Clone, Copy)]
struct CurrentThrough {
    generation: GenerationId,
    through_ms: u64,
    written: bool,
}

/// What a change of the manifest is.
pub(crate) type Edit = (Manifest, Vec<NewPage>);

impl Volume {
    pub(crate) async fn new(
        store: VolumeStore,
        shared: Arc<Shared>,
        manifest: Manifest,
        files: TableFiles,
    ) -> Self {
        let advisory = store.current().await;
        let head = manifest.head_id();
        let current = advisory.filter(|current| current.generation == head);
        Self {
            id: manifest.volume,
            store,
            shared,
            current: SyncMutex::new(CurrentThrough {
                generation: head,
                through_ms: current.map_or(0, |current| current.current_through_ms),
                written: true,
            }),
            visible: RwLock::new(Arc::new(manifest)),
            owner: Mutex::new(Owner {
                unsettled: false,
                stale: false,
                loaded: Instant::now(),
            }),
            leases: leases::Leases::default(),
            table: table::Table::new(files),
            shipping: crate::ship::Gate::default(),
            receiving: crate::ship::Receiving::default(),
            upkeep: Mutex::default(),
            scrub: crate::scrub::Account::default(),
            figures: crate::figures::Figures::default(),
        }
    }

    /// The newest manifest known.
    pub(crate) fn manifest(&self) -> Arc<Manifest> {
        Arc::clone(&self.visible.read())
    }

    /// Changes the manifest. `change` makes the next version from the newest one, or `None` where nothing is to be
    /// done; it is called again where another version came first.
    ///
    /// Returns the manifest that is the newest afterwards, and durable.
    pub(crate) async fn edit(
        &self,
        mut change: impl FnMut(&Manifest) -> Result<Option<Edit>, RpcError> + Send,
    ) -> Result<Arc<Manifest>, RpcError> {
        let mut owner = self.owner.lock().await;
        for _ in 0..4 {
            self.settle(&mut owner).await?;
            let last = self.manifest();
            let Some((next, pages)) = change(&last)? else {
                return Ok(last);
            };
            check_invariants(&next, Some(&last)).map_err(|broken| {
                tracing::error!(volume = %self.id, %broken, "refused to write a manifest that breaks a rule");
                RpcError::internal(format!("volume {}: {broken}", self.id))
            })?;
            for page in &pages {
                self.store.put_page(page).await.map_err(|e| of_store(&e))?;
            }
            // Should this future be dropped, the next one finds out what became of the put.
            owner.unsettled = true;
            let putting = step!("put manifest");
            let put = self.store.put_manifest(&next).instrument(putting).await;
            if put.is_ok() {
                owner.unsettled = false;
                owner.stale = true;
            }
            let settled = self.settle(&mut owner).instrument(step!("read back")).await;
            settled.map_err(|error| match &put {
                Err(first) => of_store(first),
                Ok(()) => error,
            })?;
            let newest = self.manifest();
            if *newest == next {
                return Ok(newest);
            }
            match put {
                // Another version came first: decide again.
                Ok(()) | Err(StoreError::Exists(_)) => {}
                Err(error) => return Err(of_store(&error)),
            }
        }
        Err(RpcError::new(
            Reason::Busy,
            format!("volume {}: others keep changing its manifest", self.id),
            "check that only one vault uses this store",
        ))
    }

    /// Deletes a page that the newest manifest neither names nor has condemned. A page is named by its content, so a
    /// change of the manifest may put it again: none is made meanwhile.
    pub(crate) async fn delete_stray_page(&self, name: Checksum128) -> Result<(), RpcError> {
        let mut owner = self.owner.lock().await;
        self.settle(&mut owner).await?;
        let manifest = self.manifest();
        let condemned = CondemnedObject::Page(name);
        if manifest.pages.iter().any(|page| page.name == name)
            || manifest.condemned.iter().any(|c| c.object == condemned)
        {
            return Ok(());
        }
        self.store.delete_page(name).await.map_err(|e| of_store(&e))
    }

    /// Makes sure that the visible manifest is the newest one, and durable: no answer may rest on one that a crash
    /// could take back.
    async fn settle(&self, owner: &mut Owner) -> Result<(), RpcError> {
        let stale = owner.stale
            || !self.store.is_exclusive() && owner.loaded.elapsed() > self.shared.manifest_keep / 2;
        if !stale && !owner.unsettled {
            return Ok(());
        }
        if owner.unsettled {
            self.store
                .settle_manifests()
                .await
                .map_err(|e| of_store(&e))?;
        }
        let last = self.manifest();
        if let Some(newest) = self
            .store
            .newest_above(last.version)
            .await
            .map_err(|e| of_store(&e))?
        {
            *self.visible.write() = Arc::new(newest);
        }
        owner.loaded = Instant::now();
        owner.unsettled = false;
        owner.stale = false;
        Ok(())
    }

    /// When the newest image was last known to be current.
    pub(crate) fn current_through(&self, manifest: &Manifest) -> u64 {
        let Some(head) = manifest.head() else {
            return 0;
        };
        let current = *self.current.lock();
        let through = if current.generation == head.id {
            current.through_ms
        } else {
            0
        };
        through.max(head.cut_time_ms)
    }

    /// The image of `generation` was still current at `through_ms`.
    pub(crate) fn mark_current(&self, generation: GenerationId, through_ms: u64) {
        let mut current = self.current.lock();
        if current.generation != generation {
            current.through_ms = 0;
        }
        current.generation = generation;
        current.written &= through_ms <= current.through_ms;
        current.through_ms = current.through_ms.max(through_ms);
    }

    /// Writes the advisory object, where it has something new to say.
    pub(crate) async fn write_current(&self) -> Result<(), StoreError> {
        let current = *self.current.lock();
        if current.written {
            return Ok(());
        }
        self.store
            .put_current(Current {
                generation: current.generation,
                current_through_ms: current.through_ms,
            })
            .await?;
        let mut now = self.current.lock();
        now.written |= (now.generation, now.through_ms) == (current.generation, current.through_ms);
        Ok(())
    }

    /// Writes the advisory object whatever it said: it is damaged.
    pub(crate) async fn rewrite_current(&self) -> Result<(), StoreError> {
        self.current.lock().written = false;
        self.write_current().await
    }

    /// The records of a page.
    pub(crate) async fn page(
        &self,
        name: Checksum128,
    ) -> Result<Arc<Vec<SegmentRecord>>, StoreError> {
        if let Some(page) = self.shared.pages.get(&(self.id, name)) {
            return Ok(page);
        }
        let page = Arc::new(self.store.page(name).await?);
        let bytes = page.len() * size_of::<SegmentRecord>();
        self.shared
            .pages
            .insert((self.id, name), Arc::clone(&page), bytes);
        Ok(page)
    }

    /// The records of every segment that images are read from, list by list: the manifest's own, then page by page. A
    /// page that can't be read is an error, and the next one comes after it.
    pub(crate) fn segment_lists<'a>(
        &'a self,
        manifest: &'a Manifest,
    ) -> impl Stream<Item = Result<Arc<Vec<SegmentRecord>>, StoreError>> + Send + 'a {
        let own = stream::once(async { Ok(Arc::new(manifest.tail.clone())) });
        let pages = stream::iter(&manifest.pages).then(move |page| self.page(page.name));
        own.chain(pages)
    }

    /// The segments that touch `range` and have versions above `above`, in no order.
    pub(crate) async fn segments(
        &self,
        manifest: &Manifest,
        range: Extent,
        above: tidemark_block::Sequence,
    ) -> Result<Vec<SegmentRecord>, StoreError> {
        let wanted = |record: &&SegmentRecord| {
            record.sequences.1 > above && !record.blocks.intersect(range).is_empty()
        };
        let mut found: Vec<_> = manifest.tail.iter().filter(wanted).copied().collect();
        for page in &manifest.pages {
            if page.sequences.1 > above && !page.blocks.intersect(range).is_empty() {
                found.extend(self.page(page.name).await?.iter().filter(wanted).copied());
            }
        }
        Ok(found)
    }

    /// The indexes of several segments, in their order, without a trace in the cache of whoever reads images.
    pub(crate) async fn indexes_beside_the_cache(
        &self,
        manifest: &Manifest,
        records: &[SegmentRecord],
    ) -> Result<Vec<Arc<SegmentIndex>>, StoreError> {
        let mut found = Vec::with_capacity(records.len());
        for record in records {
            found.push(match self.shared.indexes.get(&(self.id, record.id)) {
                Some(index) => index,
                None => Arc::new(self.store.index(manifest.geometry, record).await?),
            });
        }
        Ok(found)
    }

    /// The index of a segment.
    pub(crate) async fn index(
        &self,
        manifest: &Manifest,
        record: &SegmentRecord,
    ) -> Result<Arc<SegmentIndex>, StoreError> {
        let key = (self.id, record.id);
        if let Some(index) = self.shared.indexes.get(&key) {
            return Ok(index);
        }
        let index = Arc::new(self.store.index(manifest.geometry, record).await?);
        self.shared
            .indexes
            .insert(key, Arc::clone(&index), index.memory());
        Ok(index)
    }

    /// The indexes of several segments, in their order; some are read at the same time.
    pub(crate) async fn indexes(
        &self,
        manifest: &Manifest,
        records: &[SegmentRecord],
    ) -> Result<Vec<Arc<SegmentIndex>>, StoreError> {
        let mut found = Vec::with_capacity(records.len());
        for part in records.chunks(READS_AT_ONCE) {
            let reads: Vec<_> = part
                .iter()
                .map(|record| self.index(manifest, record).boxed())
                .collect();
            found.extend(futures::future::try_join_all(reads).await?);
        }
        Ok(found)
    }
}
