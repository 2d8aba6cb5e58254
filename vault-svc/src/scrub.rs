//! The scrub: reads all that the store holds of a volume again, verifies it, and keeps account of what is damaged.
//!
//! Damage that nobody reads isn't found by reading, and what is found at a restore is found too late. A pass goes
//! through the store's marker, every manifest, page and segment, and each byte of them is covered by a checksum. On a
//! local store an object is dropped from the page cache before it is read: what is verified is the medium.
//!
//! What the running vault knows better than its store it puts back: the newest manifest (as its successor), pages that
//! are still in memory, the marker, the advisory object. A damaged segment is named, with the generations that need the
//! damaged part; nothing is deleted.

mod account;
mod pace;
mod segment;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tidemark_block::{GenerationId, IntervalId, SegmentId, Sequence};
use tidemark_proto::RpcError;
use tokio::sync::watch;
use vault_core::{
    manifest::{Manifest, encode_page},
    scrub::next_segments,
};

pub(crate) use account::{Account, Damage};
pub(crate) use pace::Pace;

use crate::{
    error::of_store,
    store::StoreError,
    vault::Vault,
    volume::{Volume, now_ms},
};

/// Segments chosen at a time; each choice looks at all records of the volume.
const SEGMENTS_AT_ONCE: usize = 4096;
/// The wait after the store could not be read.
const RETRY: Duration = Duration::from_secs(60);
/// How often a volume whose store can't be read is tried in one period.
const TRIES: u32 = 60;

/// How far a pass is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
    /// Of all segments, as they were when the pass began.
    pub(crate) bytes_total: u64,
}

/// What a pass found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found {
    pub(crate) progress: Progress,
    pub(crate) damaged: Vec<Damage>,
}

/// A pass over one volume.
struct Pass<'a> {
    volume: &'a Arc<Volume>,
    pace: &'a mut Pace,
    begun: u64,
    found: Found,
    told: &'a mut (dyn FnMut(Progress) + Send + Sync),
}

impl Volume {
    /// Reads everything once. What is damaged is in the volume's account afterwards, and what no longer is, is not.
    ///
    /// # Errors
    /// The store can't be read: nothing is known of the rest.
    pub(crate) async fn scrub(
        self: &Arc<Self>,
        pace: &mut Pace,
        told: &mut (dyn FnMut(Progress) + Send + Sync),
    ) -> Result<Found, RpcError> {
        let mut pass = Pass {
            volume: self,
            pace,
            begun: self.scrub.begin(),
            found: Found {
                progress: Progress {
                    bytes_total: self.manifest().named_bytes(),
                    ..Progress::default()
                },
                damaged: Vec::new(),
            },
            told,
        };
        pass.roots().await.map_err(|e| of_store(&e))?;
        pass.segments().await?;
        self.scrub.end(pass.begun, now_ms());
        Ok(pass.found)
    }
}

/// Damage where the object is at fault; else the error goes on.
fn damage_of(read: Result<(), StoreError>) -> Result<Option<String>, StoreError> {
    match read {
        Ok(()) => Ok(None),
        Err(StoreError::Corrupt { reason, .. }) => Ok(Some(reason)),
        Err(StoreError::Missing(_)) => Ok(Some("it is missing from the store".to_owned())),
        Err(error) if error.is_unreadable() => Ok(Some("the disk can't read it".to_owned())),
        Err(error) => Err(error),
    }
}

impl Pass<'_> {
    /// Notes how an object was found.
    fn note(&mut self, object: String, damage: Option<Damage>) {
        self.found.progress.objects += 1;
        match damage {
            None => self.volume.scrub.sound(&object),
            Some(damage) => {
                if self.volume.scrub.damaged(damage.clone()) {
                    tracing::error!(
                        volume = %self.volume.id, object = damage.object, problem = damage.problem,
                        generations = ?damage.generations, repaired = damage.repaired,
                        "a stored object is damaged"
                    );
                }
                self.found.damaged.push(damage);
            }
        }
        (self.told)(self.found.progress);
    }

    /// The marker, the manifests, the advisory object and the pages.
    async fn roots(&mut self) -> Result<(), StoreError> {
        self.marker().await?;
        self.manifests().await?;
        self.advisory().await?;
        let (_lease, manifest) = self.lease();
        for page in &manifest.pages {
            self.page(&manifest, page.name, page.sequences.0).await?;
        }
        Ok(())
    }

    fn lease(&self) -> (crate::volume::Lease, Arc<Manifest>) {
        self.volume.leases.take(|| {
            let manifest = self.volume.manifest();
            (manifest.version, manifest)
        })
    }

    async fn marker(&mut self) -> Result<(), StoreError> {
        let marker = self.volume.shared.marker;
        let store = self.volume.store.root();
        let read = store.check_marker(marker).await;
        let Some(problem) = damage_of(read)? else {
            self.note("store".to_owned(), None);
            return Ok(());
        };
        // A store without its marker would be taken for an empty one: every byte of it is known here.
        let repaired = store.replace_marker(marker).await.is_ok();
        let damage = Damage {
            object: "store".to_owned(),
            problem,
            generations: Vec::new(),
            repaired,
        };
        self.note("store".to_owned(), Some(damage));
        Ok(())
    }

    async fn manifests(&mut self) -> Result<(), StoreError> {
        let newest = self.volume.manifest();
        let mut versions = self.volume.store.versions().await?;
        // One that is gone is looked for, and missed.
        if !versions.contains(&newest.version) {
            versions.push(newest.version);
        }
        for version in versions {
            let object = self.volume.store.manifest_name(version);
            let read = self.volume.store.check_manifest(&newest, version).await;
            let mut problem = damage_of(read)?;
            if problem.is_some() && self.is_pruned(version).await? {
                problem = None;
            }
            let damage = match problem {
                None => None,
                Some(problem) if version < newest.version => Some(Damage {
                    object: object.clone(),
                    problem,
                    generations: Vec::new(),
                    repaired: false,
                }),
                Some(problem) => Some(self.damaged_root(&newest, object.clone(), problem).await),
            };
            self.note(object, damage);
        }
        Ok(())
    }

    /// Whether an old version has been deleted since they were listed.
    async fn is_pruned(&self, version: u64) -> Result<bool, StoreError> {
        let newest = self.volume.manifest().version;
        Ok(version < newest && !self.volume.store.versions().await?.contains(&version))
    }

    /// The newest manifest is damaged or gone: what the vault has in memory is written as the next version.
    async fn damaged_root(&self, newest: &Manifest, object: String, problem: String) -> Damage {
        let repaired = self
            .volume
            .edit(|manifest| Ok(Some((manifest.successor(now_ms()), Vec::new()))))
            .await;
        if let Err(error) = &repaired {
            tracing::error!(volume = %self.volume.id, %error, "the newest manifest could not be written again");
        }
        let lost = if repaired.is_ok() {
            Vec::new()
        } else {
            newest.generations.iter().map(|g| g.id).collect()
        };
        Damage {
            object,
            problem,
            generations: lost,
            repaired: repaired.is_ok(),
        }
    }

    async fn advisory(&mut self) -> Result<(), StoreError> {
        let object = self.volume.store.current_name();
        let read = self.volume.store.check_current().await;
        let damage = match damage_of(read)? {
            None => None,
            Some(problem) => Some(Damage {
                object: object.clone(),
                problem,
                generations: Vec::new(),
                repaired: self.volume.rewrite_current().await.is_ok(),
            }),
        };
        self.note(object, damage);
        Ok(())
    }

    async fn page(
        &mut self,
        manifest: &Manifest,
        name: tidemark_block::Checksum128,
        oldest: Sequence,
    ) -> Result<(), StoreError> {
        let object = self.volume.store.page_name(name);
        let read = self.volume.store.page(name).await.map(|_| ());
        let damage = match damage_of(read)? {
            None => None,
            Some(problem) => {
                let repaired = self.restore_page(name).await;
                let generations = if repaired {
                    Vec::new()
                } else {
                    since(manifest, oldest)
                };
                Some(Damage {
                    object: object.clone(),
                    problem,
                    generations,
                    repaired,
                })
            }
        };
        self.note(object, damage);
        Ok(())
    }

    /// Puts a page again from memory, where it is still there.
    async fn restore_page(&self, name: tidemark_block::Checksum128) -> bool {
        let pages = &self.volume.shared.pages;
        let Some(records) = pages.get(&(self.volume.id, name)) else {
            return false;
        };
        let page = vault_core::manifest::NewPage {
            name,
            bytes: encode_page(&records),
            records: records.to_vec(),
        };
        tidemark_block::xxh3_128(&page.bytes) == name
            && self.volume.store.put_page(&page).await.is_ok()
    }

    /// Every segment that the manifest names, in an order of their own.
    async fn segments(&mut self) -> Result<(), RpcError> {
        let start = random_segment();
        let mut after = None;
        loop {
            let manifest = self.volume.manifest();
            let records = self.known_segments(&manifest).await?;
            let next = next_segments(records.into_iter(), start, after, SEGMENTS_AT_ONCE);
            let Some(last) = next.last() else {
                return Ok(());
            };
            after = Some(last.id);
            for record in next {
                self.segment(&record).await?;
                self.pace.between().await;
            }
        }
    }

    /// The records of all segments whose page can be read: a page that can't has been told already.
    async fn known_segments(
        &self,
        manifest: &Manifest,
    ) -> Result<Vec<vault_core::segment::SegmentRecord>, RpcError> {
        let mut records = manifest.tail.clone();
        for page in &manifest.pages {
            match self.volume.page(page.name).await {
                Ok(page) => records.extend(page.iter().copied()),
                Err(error) => {
                    damage_of(Err(error)).map_err(|e| of_store(&e))?;
                }
            }
        }
        Ok(records)
    }
}

/// The retained generations that something of this sequence may belong to.
fn since(manifest: &Manifest, oldest: Sequence) -> Vec<GenerationId> {
    manifest
        .generations
        .iter()
        .filter(|generation| generation.sequence() >= oldest)
        .map(|generation| generation.id)
        .collect()
}

fn random_segment() -> SegmentId {
    SegmentId {
        origin: IntervalId::from_bytes(*uuid::Uuid::new_v4().as_bytes()),
        part: 0,
    }
}

impl Vault {
    /// Scrubs all volumes, once in each `scrub_period`, until told to stop.
    pub(crate) async fn scrub_always(self: Arc<Self>, mut stopping: watch::Receiver<bool>) {
        let period = self.config().scrub_period.get();
        if period.is_zero() {
            return;
        }
        let at_most = self.config().scrub_bytes_per_second_max.get();
        let passes = async {
            loop {
                let mut volumes = self.volumes();
                let stored: u64 = volumes
                    .iter()
                    .map(|volume| volume.manifest().named_bytes())
                    .sum();
                // A service that is restarted often still sees every volume.
                let turn = usize::from(uuid::Uuid::new_v4().as_bytes()[0]);
                let turn = turn % volumes.len().max(1);
                volumes.rotate_left(turn);
                let mut pace = Pace::over(period, stored, at_most);
                let mut left: VecDeque<_> = volumes.into_iter().map(|volume| (volume, 1)).collect();
                while let Some((volume, tries)) = left.pop_front() {
                    let done = volume
                        .scrub(&mut pace, &mut |progress| volume.scrub.progress(progress))
                        .await;
                    let Err(error) = done else { continue };
                    tracing::warn!(volume = %volume.id, reason = %error.reason, %error, tries, "the scrub can't read the store");
                    // The others first: what keeps one from being read need not keep them.
                    if tries < TRIES {
                        left.push_back((volume, tries + 1));
                    }
                    tokio::time::sleep(RETRY).await;
                }
                pace.rest().await;
            }
        };
        tokio::select! {
            () = passes => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
    }
}
