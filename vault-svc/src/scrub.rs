//! The scrub: reads all that the store holds of a volume again, verifies it, and keeps account of what is damaged.
//!
//! Damage that nobody reads isn't found by reading, and what is found at a restore is found too late. A pass goes
//! through the store's marker, every manifest, page and segment, and each byte of them is covered by a checksum. On a
//! local store an object is dropped from the page cache before it is read: what is verified is the medium.
//!
//! What the running vault knows better than its store it puts back: the newest manifest (as its successor, and as it
//! was), pages that are still in memory, the marker, the advisory object. It does so only in the store that it has
//! opened: where another disk, or none, is at its place, the pass ends without a write. A damaged segment is named,
//! with the generations that need the damaged part; nothing is deleted.

mod account;
mod always;
mod pace;
mod roots;
mod segment;

use std::{pin::pin, sync::Arc};

use futures::StreamExt;
use tidemark_block::{GenerationId, IntervalId, SegmentId, Sequence};
use tidemark_proto::RpcError;
use vault_core::{
    manifest::Manifest,
    scrub::NextSegments,
    segment::{RECORD_LEN, SegmentRecord},
};

pub(crate) use account::{Account, Damage, Found, NeededFor};
#[cfg(test)]
pub(crate) use account::{GENERATIONS_NAMED_MAX, NAMED_MAX};
pub(crate) use pace::Pace;

use crate::{
    error::of_store,
    store::StoreError,
    volume::{Lease, Volume, now_ms},
};

/// Segments chosen at a time; each choice looks at all records of the volume.
const SEGMENTS_AT_ONCE: usize = 4096;

/// How far a pass is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
    /// Of all segments, as they were when the pass began, and of what else has been read.
    pub(crate) bytes_total: u64,
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
    /// The store can't be read, or is another one: nothing is known of the rest.
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
                ..Found::default()
            },
            told,
        };
        if let Err(error) = pass.everything().await {
            self.scrub.failed();
            return Err(error);
        }
        self.scrub.end(pass.begun, now_ms());
        Ok(pass.found)
    }
}

/// What was read, or what is wrong with the object; an error where the store is at fault.
fn sound<T>(read: Result<T, StoreError>) -> Result<Result<T, String>, StoreError> {
    match read {
        Ok(value) => Ok(Ok(value)),
        Err(StoreError::Corrupt { reason, .. }) => Ok(Err(reason)),
        Err(StoreError::Missing(_)) => Ok(Err("it is missing from the store".to_owned())),
        Err(error) if error.is_unreadable() => Ok(Err("the disk can't read it".to_owned())),
        Err(error) => Err(error),
    }
}

impl Pass<'_> {
    async fn everything(&mut self) -> Result<(), RpcError> {
        self.roots().await?;
        self.segments().await
    }

    /// So many bytes were read.
    fn has_read(&mut self, bytes: u64) {
        self.found.progress.bytes += bytes;
        self.volume.scrub.read(bytes);
    }

    /// Notes how an object was found.
    fn note(&mut self, object: &str, damage: Option<Damage>) {
        self.found.progress.objects += 1;
        match damage {
            None => self.volume.scrub.sound(object),
            Some(damage) => {
                self.log(&damage);
                self.found.add(damage);
            }
        }
        (self.told)(self.found.progress);
    }

    fn log(&self, damage: &Damage) {
        let Damage {
            object, problem, ..
        } = damage;
        let volume = &self.volume.id;
        if damage.repaired {
            self.volume.scrub.repaired(object);
            tracing::error!(
                %volume, object, problem,
                "a stored object was damaged, and has been written again: look at the disk of the store before more is lost"
            );
        } else if self.volume.scrub.damaged(damage) {
            let first = damage.generations.first();
            tracing::error!(
                %volume, object, problem, generations = damage.generations.len(), ?first, needed_for = ?damage.needed_for,
                "a stored object is damaged: look at the disk of the store; `tidemark scrub --stored` says what needs it \
                 and which generations to restore instead"
            );
        }
    }

    fn lease(&self) -> (Lease, Arc<Manifest>) {
        self.volume.leases.take(|| {
            let manifest = self.volume.manifest();
            (manifest.version, manifest)
        })
    }

    /// Every segment that the manifest names, in an order of their own.
    async fn segments(&mut self) -> Result<(), RpcError> {
        let start = random_segment();
        let mut after = None;
        loop {
            let next = self.next_segments(start, after).await?;
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

    async fn next_segments(
        &mut self,
        start: SegmentId,
        after: Option<SegmentId>,
    ) -> Result<Vec<SegmentRecord>, RpcError> {
        let mut next = NextSegments::new(start, after, SEGMENTS_AT_ONCE);
        let manifest = {
            // Only for as long as it takes to read the pages: at the pace of a scrub that could be hours.
            let (_lease, manifest) = self.lease();
            self.known_segments(&manifest, |record| next.offer(*record))
                .await?;
            manifest
        };
        let paged: u64 = manifest.pages.iter().map(|p| u64::from(p.count)).sum();
        self.pace.spent_beside(paged * RECORD_LEN as u64).await;
        Ok(next.chosen())
    }

    /// Shows the records of all segments whose page can be read: a page that can't has been told already.
    async fn known_segments(
        &self,
        manifest: &Manifest,
        mut show: impl FnMut(&SegmentRecord) + Send,
    ) -> Result<(), RpcError> {
        let mut lists = pin!(self.volume.segment_lists(manifest));
        while let Some(list) = lists.next().await {
            if let Ok(records) = sound(list).map_err(|e| of_store(&e))? {
                records.iter().for_each(&mut show);
            }
        }
        Ok(())
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
