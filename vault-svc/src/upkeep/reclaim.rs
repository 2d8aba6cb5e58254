//! Sweeps and rounds of reclaim.

use std::{
    collections::{HashMap, HashSet},
    pin::pin,
    sync::Arc,
};

use futures::StreamExt;
use tidemark_block::SegmentId;
use tidemark_proto::{Reason as ErrorReason, RpcError, vault::v1::MaintainedVolume};
use vault_core::{
    image::{ByWindow, live_pieces},
    manifest::{CONDEMNED_MAX, Manifest},
    reclaim::{
        Liveness, Plan, Policy, Reason, SpaceEstimate, Tally, plan_merge, plan_space, totals,
    },
    segment::SegmentRecord,
};

use super::Upkeep;
use crate::{
    error::of_store,
    volume::{Volume, now_ms},
};

/// Manifest versions that may come between a plan and its execution before it is given up.
const TRIES: usize = 4;

/// Among which segments liveness is computed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Known<'a> {
    /// All that the manifest names.
    All(&'a [SegmentRecord]),
    /// Those that are rewritten.
    Victims,
}

/// What is written to replace the victims of a round.
#[derive(Debug)]
pub(super) struct Rewritten {
    pub(super) segments: Vec<SegmentRecord>,
    pub(super) bytes: u64,
}

impl Volume {
    /// Every segment that images are read from.
    pub(crate) async fn all_segments(
        &self,
        manifest: &Manifest,
    ) -> Result<Vec<SegmentRecord>, RpcError> {
        let mut records = Vec::new();
        let mut lists = pin!(self.segment_lists(manifest));
        while let Some(list) = lists.next().await {
            records.extend_from_slice(&list.map_err(|e| of_store(&e))?);
        }
        Ok(records)
    }

    /// Finds how much of each segment is alive. Memory: one window, whatever the size of the volume.
    pub(super) async fn sweep(
        &self,
        manifest: &Manifest,
        records: &[SegmentRecord],
    ) -> Result<Vec<Liveness>, RpcError> {
        let retained: Arc<[_]> = manifest.retained().into();
        let mut tally = Tally::default();
        for (window, here) in ByWindow::new(manifest.geometry, records) {
            let indexes = self
                .indexes(manifest, &here)
                .await
                .map_err(|e| of_store(&e))?;
            let retained = Arc::clone(&retained);
            let work = tokio::task::spawn_blocking(move || {
                let pieces = live_pieces(indexes.iter().map(AsRef::as_ref), window, &retained);
                tally.add(&here, &indexes, &pieces);
                tally
            });
            tally = work
                .await
                .map_err(|_| RpcError::internal("a sweep failed"))?;
        }
        Ok(tally.finish(records))
    }

    /// Plans a round and executes it; false where nothing was to be done.
    pub(super) async fn reclaim_round(
        self: &Arc<Self>,
        upkeep: &mut Upkeep,
        sweep: bool,
        policy: &Policy,
        done: &mut MaintainedVolume,
    ) -> Result<bool, RpcError> {
        let manifest = self.manifest();
        let room = CONDEMNED_MAX.saturating_sub(manifest.condemned.len());
        // So little room isn't worth a sweep: it is waited for until condemned objects have been deleted.
        if room < policy.round_segments * 2 {
            return Ok(false);
        }
        let stored = manifest.named_bytes();
        let wanted = match &upkeep.estimate {
            _ if sweep => true,
            Some(estimate) => estimate.may_need_space(stored, policy),
            None => upkeep.unswept,
        };
        // Reading the pages of a large volume for nothing at each commit would cost more than the commit.
        let few = manifest.segment_count() <= policy.small_max.min(policy.depth_max) as u64;
        if !wanted && few {
            return Ok(false);
        }
        let records = self.all_segments(&manifest).await?;
        let mut plan = None;
        if wanted {
            let swept = self.sweep(&manifest, &records).await?;
            let (stored, live) = totals(&swept);
            upkeep.estimate = Some(SpaceEstimate::exact(stored, live));
            upkeep.unswept = false;
            plan = plan_space(&swept, policy, room);
        }
        let Some(plan) = plan.or_else(|| plan_merge(&records, policy, room)) else {
            return Ok(false);
        };
        self.execute(&manifest, &records, plan, policy.segment_bytes, done)
            .await?;
        Ok(true)
    }

    async fn execute(
        self: &Arc<Self>,
        manifest: &Arc<Manifest>,
        records: &[SegmentRecord],
        plan: Plan,
        segment_bytes: u64,
        done: &mut MaintainedVolume,
    ) -> Result<(), RpcError> {
        let known = match plan.reason {
            // Every index was read anyway: zeroes above nothing can be told and dropped.
            Reason::Space => Known::All(records),
            Reason::Depth | Reason::Count => Known::Victims,
        };
        let rewritten = self
            .rewrite(manifest, &plan.rewrite, known, segment_bytes)
            .await?;
        let victims: HashSet<SegmentId> = plan.victims().map(|record| record.id).collect();
        let replaced = self.replace(&victims, &rewritten.segments).await;
        if let Err(error) = replaced {
            self.delete_unnamed(&rewritten.segments).await;
            return Err(error);
        }
        tracing::info!(
            volume = %self.id, reason = ?plan.reason, condemned = victims.len(), dead = plan.dead.len(),
            written = rewritten.segments.len(), bytes = rewritten.bytes, "segments reclaimed"
        );
        done.condemned_segments += victims.len() as u64;
        done.rewritten_bytes += rewritten.bytes;
        Ok(())
    }

    /// Names the new segments and condemns the victims, in one manifest.
    async fn replace(
        &self,
        victims: &HashSet<SegmentId>,
        added: &[SegmentRecord],
    ) -> Result<(), RpcError> {
        for _ in 0..TRIES {
            let manifest = self.manifest();
            let mut contents = HashMap::new();
            let mut found = manifest
                .tail
                .iter()
                .filter(|record| victims.contains(&record.id))
                .count();
            for page in &manifest.pages {
                let records = self.page(page.name).await.map_err(|e| of_store(&e))?;
                let here = records
                    .iter()
                    .filter(|record| victims.contains(&record.id))
                    .count();
                if here > 0 {
                    found += here;
                    contents.insert(page.name, records.to_vec());
                }
            }
            if found != victims.len() {
                return Err(RpcError::internal(
                    "a segment to be reclaimed is not in the manifest",
                ));
            }
            let pages: Vec<_> = manifest.pages.iter().map(|page| page.name).collect();
            let mut moved = false;
            self.edit(|newest| {
                // A commit may have moved records from the tail to a page meanwhile: look again then.
                moved = !newest
                    .pages
                    .iter()
                    .map(|page| page.name)
                    .eq(pages.iter().copied());
                if moved {
                    return Ok(None);
                }
                let mut next = newest.successor(now_ms());
                let new_pages = next.replace_segments(victims, added.to_vec(), &contents);
                Ok(Some((next, new_pages)))
            })
            .await?;
            if !moved {
                return Ok(());
            }
        }
        Err(RpcError::new(
            ErrorReason::Busy,
            format!("volume {}: commits keep coming between", self.id),
            "nothing to do: it is tried again",
        ))
    }

    /// Deletes segments that were to be named and are not, unless what became of the manifest is unknown.
    pub(super) async fn delete_unnamed(&self, segments: &[SegmentRecord]) {
        // Reading the newest manifest back settles what happened; where that fails too, the sweep for strays decides later.
        let Ok(manifest) = self.edit(|_| Ok(None)).await else {
            return;
        };
        let Ok(named) = self.all_segments(&manifest).await else {
            return;
        };
        let named: HashSet<SegmentId> = named.iter().map(|record| record.id).collect();
        for record in segments.iter().filter(|record| !named.contains(&record.id)) {
            let _ = self.store.delete_segment(record.id).await;
        }
    }
}
