//! Deleting: condemned objects, old manifests, and strays that no manifest names.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tidemark_block::{IntervalId, SegmentId};
use tidemark_proto::{RpcError, vault::v1::MaintainedVolume};
use tokio::time::Instant;
use vault_core::manifest::{Condemned, CondemnedObject, Manifest};

use super::{STRAYS_PERIOD, Upkeep};
use crate::{
    error::of_store,
    vault::Vault,
    volume::{Volume, now_ms},
};

/// Manifest versions kept where no view of them can be stale: enough for a human to look back at.
const VERSIONS_KEPT: u64 = 32;
/// A part that is older than a later commit by this much can't be committed any more: its base is not the head.
const CLOCK_MARGIN_MS: u64 = 600_000;

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Segments that are no strays, as of a manifest.
#[derive(Debug)]
struct Kept {
    version: u64,
    segments: HashSet<SegmentId>,
    /// When its newest generation was.
    committed_ms: u64,
}

impl Volume {
    /// The condemned objects that nobody can need any more.
    pub(super) fn deletable(&self, manifest: &Manifest, grace: Duration) -> Vec<Condemned> {
        let now = now_ms();
        let old_enough =
            |condemned: &&Condemned| condemned.time_ms.saturating_add(millis(grace)) <= now;
        manifest
            .condemned
            .iter()
            .filter(old_enough)
            .filter(|condemned| self.leases.allow_deletion(condemned.version))
            .copied()
            .collect()
    }

    /// Deletes what may be deleted, then takes it off the manifest's list. A crash between the two repeats the first.
    pub(super) async fn delete_condemned(
        &self,
        grace: Duration,
        done: &mut MaintainedVolume,
    ) -> Result<(), RpcError> {
        let manifest = self.manifest();
        let mut deleted = HashSet::new();
        for condemned in self.deletable(&manifest, grace) {
            // A reader may have come since the list was made; it can only be of a newer manifest, yet asking is cheap.
            if !self.leases.allow_deletion(condemned.version) {
                continue;
            }
            match condemned.object {
                CondemnedObject::Segment(id) => {
                    self.store
                        .delete_segment(id)
                        .await
                        .map_err(|e| of_store(&e))?;
                    self.scrub.sound(self.store.segment_path(id).as_ref());
                    done.deleted_segments += 1;
                    done.freed_bytes += condemned.length;
                }
                CondemnedObject::Page(name) => {
                    self.store
                        .delete_page(name)
                        .await
                        .map_err(|e| of_store(&e))?;
                    self.scrub.sound(&self.store.page_name(name));
                }
            }
            deleted.insert(condemned.object);
        }
        if deleted.is_empty() {
            return Ok(());
        }
        self.edit(|manifest| {
            let mut next = manifest.successor(now_ms());
            next.condemned
                .retain(|condemned| !deleted.contains(&condemned.object));
            Ok((next.condemned.len() < manifest.condemned.len()).then(|| (next, Vec::new())))
        })
        .await?;
        Ok(())
    }

    /// What the newest manifest names or has condemned, where `known` is not that already.
    async fn kept(&self, known: Option<Kept>) -> Result<Kept, RpcError> {
        let manifest = self.edit(|_| Ok(None)).await?;
        if let Some(known) = known
            && known.version == manifest.version
        {
            return Ok(known);
        }
        let named = self.all_segments(&manifest).await?;
        let mut segments: HashSet<SegmentId> = named.iter().map(|record| record.id).collect();
        segments.extend(manifest.condemned.iter().filter_map(|c| match c.object {
            CondemnedObject::Segment(id) => Some(id),
            CondemnedObject::Page(_) => None,
        }));
        Ok(Kept {
            version: manifest.version,
            segments,
            committed_ms: manifest.head().map_or(0, |head| head.committed_time_ms),
        })
    }

    /// Deletes segments and pages that no manifest names and that nobody will name any more.
    ///
    /// An interval may be taken up again, and a page be made again, while this goes on: each object is looked up in
    /// the newest manifest once nobody can begin to name it.
    async fn delete_strays(&self, lease: Duration) -> Result<(), RpcError> {
        let segments = self.store.segments().await.map_err(|e| of_store(&e))?;
        let pages = self.store.pages().await.map_err(|e| of_store(&e))?;
        let mut kept = self.kept(None).await?;
        let now = now_ms();
        let mut newest: HashMap<IntervalId, u64> = HashMap::new();
        for found in &segments {
            let at = newest.entry(found.id.origin).or_insert(0);
            *at = found.modified_ms.max(*at);
        }
        let committed = kept.committed_ms;
        let is_over = |modified: u64| {
            modified.saturating_add(millis(lease)) <= now
                || modified.saturating_add(CLOCK_MARGIN_MS) <= committed
        };
        for found in segments {
            let modified = newest.get(&found.id.origin).copied().unwrap_or(now);
            if kept.segments.contains(&found.id) || !is_over(modified) {
                continue;
            }
            if let Some(_allowed) = self.receiving.allow_deletion(found.id.origin).await {
                // Its interval may have been committed since. From here on it can't be: a stream begins only when
                // this is let go.
                kept = self.kept(Some(kept)).await?;
                if kept.segments.contains(&found.id) {
                    continue;
                }
                tracing::info!(volume = %self.id, segment = %found.id, bytes = found.length, "stray segment deleted");
                self.store
                    .delete_segment(found.id)
                    .await
                    .map_err(|e| of_store(&e))?;
            }
        }
        for found in pages {
            if found.modified_ms.saturating_add(millis(lease)) <= now {
                self.delete_stray_page(found.id).await?;
            }
        }
        Ok(())
    }
}

impl Vault {
    /// Deletes old manifests and, now and then, strays.
    pub(super) async fn prune(
        &self,
        volume: &Volume,
        upkeep: &mut Upkeep,
        thorough: bool,
    ) -> Result<(), RpcError> {
        let version = volume.manifest().version;
        if version >= upkeep.pruned_to + 2 * VERSIONS_KEPT || thorough {
            let keep_from = version.saturating_sub(VERSIONS_KEPT);
            let keep = self.config().manifest_keep.get();
            let older_than = if volume.store.is_exclusive() {
                u64::MAX
            } else {
                now_ms().saturating_sub(millis(keep))
            };
            let pruned = volume
                .store
                .prune_manifests(keep_from, older_than)
                .await
                .map_err(|e| of_store(&e))?;
            for version in pruned {
                volume.scrub.sound(&volume.store.manifest_name(version));
            }
            upkeep.pruned_to = keep_from;
        }
        let due = upkeep
            .strays_looked_for
            .is_none_or(|at| at.elapsed() >= STRAYS_PERIOD);
        if due || thorough {
            volume
                .delete_strays(self.config().interval_lease.get())
                .await?;
            upkeep.strays_looked_for = Some(Instant::now());
        }
        Ok(())
    }
}
