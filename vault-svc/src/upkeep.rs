//! Looking after volumes: retention, reclaim, and deleting what is left over.
//!
//! Each pass plans, then does, in an order that a crash may cut anywhere: a retired generation is gone from the
//! manifest first; live blocks of victims are durable in new segments before the manifest that names these and
//! condemns the victims; condemned objects are deleted when no reader can need them, as often as it takes.

mod delete;
mod reclaim;
mod rewrite;

use std::{sync::Arc, time::Duration};

use tidemark_proto::{Reason, RpcError, convert::volume_id_field, vault::v1::MaintainedVolume};
use tokio::{sync::watch, time::Instant};
use vault_core::{
    manifest::CONDEMNED_MAX,
    reclaim::{Policy, SpaceEstimate, totals},
    retention::{self, RetentionPolicy},
};

use crate::{
    vault::Vault,
    volume::{Volume, now_ms},
};

/// Rounds of reclaim in one pass; the next pass goes on.
const ROUNDS_MAX: usize = 64;
/// Victims of a round while the store is full: what the reserve makes room for.
const TIGHT_ROUND_BYTES: u64 = 16 << 20;
/// How often stray objects are looked for.
const STRAYS_PERIOD: Duration = Duration::from_secs(600);

/// What is remembered of a volume between two passes. All of it may be lost.
#[derive(Debug, Default)]
pub(crate) struct Upkeep {
    /// Unknown until the first sweep.
    estimate: Option<SpaceEstimate>,
    /// Something was retired since the service began, and no sweep has been made yet.
    unswept: bool,
    /// The oldest manifest version that may still be there.
    pruned_to: u64,
    strays_looked_for: Option<Instant>,
}

impl Vault {
    /// Looks after all volumes until told to stop.
    pub(crate) async fn look_after(self: Arc<Self>, mut stopping: watch::Receiver<bool>) {
        let period = self.config().maintenance_period.get();
        let mut next_tick = Instant::now() + period;
        loop {
            tokio::select! {
                () = self.look_at_space() => {}
                // A disk that hangs keeps nobody.
                _ = stopping.wait_for(|stop| *stop) => return,
            }
            let tick = tokio::select! {
                _ = stopping.wait_for(|stop| *stop) => return,
                () = self.wake.notified() => false,
                () = tokio::time::sleep_until(next_tick) => true,
            };
            if tick {
                next_tick = Instant::now() + period;
            }
            if tick {
                self.open_broken().await;
            }
            for volume in self.volumes() {
                if *stopping.borrow() {
                    return;
                }
                let passed = tokio::select! {
                    passed = self.pass(&volume, false) => passed,
                    // What is cut short here is what a crash would cut short.
                    _ = stopping.wait_for(|stop| *stop) => return,
                };
                if let Err(error) = passed {
                    tracing::warn!(volume = %volume.id, reason = %error.reason, %error, "looking after the volume failed; it is tried again");
                }
                if tick {
                    self.write_back(&volume).await;
                }
            }
        }
    }

    async fn write_back(&self, volume: &Volume) {
        if let Err(error) = volume.stamp_table().await {
            tracing::warn!(volume = %volume.id, %error, "stamping the checksum table failed; it is tried again");
        }
        if let Err(error) = volume.write_current().await {
            tracing::warn!(volume = %volume.id, %error, "writing current_through failed; it is tried again");
        }
    }

    /// Retires and reclaims now, with a full sweep; or shows what that would do.
    pub(crate) async fn maintain(
        &self,
        volume: &Arc<Volume>,
        dry_run: bool,
    ) -> Result<MaintainedVolume, RpcError> {
        if dry_run {
            self.show(volume).await
        } else {
            self.pass(volume, true).await
        }
    }

    const fn retention(&self) -> RetentionPolicy {
        RetentionPolicy {
            newest: self.config().retain as usize,
        }
    }

    async fn show(&self, volume: &Arc<Volume>) -> Result<MaintainedVolume, RpcError> {
        let manifest = volume.manifest();
        let retired = retention::plan(&manifest, self.retention());
        let after = retention::retire(&manifest, &retired, now_ms());
        let records = volume.all_segments(&after).await?;
        let swept = volume.sweep(&after, &records).await?;
        let room = CONDEMNED_MAX.saturating_sub(after.condemned.len());
        let plan = vault_core::reclaim::plan_space(&swept, &self.policy(), room);
        let (_, live_bytes) = totals(&swept);
        let deletable = volume.deletable(&manifest, self.config().reader_grace.get());
        Ok(MaintainedVolume {
            volume_id: volume_id_field(volume.id),
            name: manifest.name.clone(),
            retired_generations: retired.iter().map(|id| id.get()).collect(),
            condemned_segments: plan
                .as_ref()
                .map_or(0, |plan| plan.victims().count() as u64),
            rewritten_bytes: plan.as_ref().map_or(0, |plan| {
                plan.rewrite.iter().map(|record| record.file_len).sum()
            }),
            deleted_segments: deletable.len() as u64,
            freed_bytes: deletable.iter().map(|condemned| condemned.length).sum(),
            stored_bytes: manifest.stored_bytes(),
            live_bytes,
        })
    }

    /// One pass over a volume. `thorough`: sweep whatever the estimate says.
    pub(crate) async fn pass(
        &self,
        volume: &Arc<Volume>,
        thorough: bool,
    ) -> Result<MaintainedVolume, RpcError> {
        let mut upkeep = volume.upkeep.lock().await;
        let mut done = MaintainedVolume {
            volume_id: volume_id_field(volume.id),
            ..MaintainedVolume::default()
        };
        let passed = self
            .pass_with_reserve(volume, &mut upkeep, thorough, &mut done)
            .await;
        let live_bytes = upkeep.estimate.map(|estimate| estimate.live_bytes());
        let failed = passed.as_ref().err().map(|error| error.reason);
        volume.figures.looked_after(&done, live_bytes, failed);
        passed?;
        let manifest = volume.manifest();
        done.name.clone_from(&manifest.name);
        done.stored_bytes = manifest.stored_bytes();
        done.live_bytes = live_bytes.unwrap_or(0);
        Ok(done)
    }

    /// A pass; where the store is full, another one within the reserve.
    async fn pass_with_reserve(
        &self,
        volume: &Arc<Volume>,
        upkeep: &mut Upkeep,
        thorough: bool,
        done: &mut MaintainedVolume,
    ) -> Result<(), RpcError> {
        let result = self
            .pass_within(volume, upkeep, thorough, self.policy(), done)
            .await;
        let Err(error) = result else {
            return Ok(());
        };
        if error.reason != Reason::StoreFull || !self.reserve.release() {
            return Err(error);
        }
        tracing::warn!(volume = %volume.id, "the store is full: the reserve is used to retire and reclaim");
        let tight = Policy {
            round_bytes: TIGHT_ROUND_BYTES,
            ..self.policy()
        };
        let again = self
            .pass_within(volume, upkeep, thorough, tight, done)
            .await;
        let reserve = self.reserve.clone();
        let _ = tokio::task::spawn_blocking(move || reserve.fill()).await;
        again
    }

    async fn pass_within(
        &self,
        volume: &Arc<Volume>,
        upkeep: &mut Upkeep,
        thorough: bool,
        policy: Policy,
        done: &mut MaintainedVolume,
    ) -> Result<(), RpcError> {
        let reclaimed = self
            .retire_and_reclaim(volume, upkeep, thorough, policy, done)
            .await;
        // Whatever became of that: this frees space too.
        let pruned = self.prune(volume, upkeep, thorough).await;
        reclaimed.and(pruned)
    }

    async fn retire_and_reclaim(
        &self,
        volume: &Arc<Volume>,
        upkeep: &mut Upkeep,
        thorough: bool,
        policy: Policy,
        done: &mut MaintainedVolume,
    ) -> Result<(), RpcError> {
        self.retire(volume, upkeep, done).await?;
        // What can go at once makes room for what has to be rewritten.
        volume
            .delete_condemned(self.config().reader_grace.get(), done)
            .await?;
        let mut sweep = thorough;
        for _ in 0..ROUNDS_MAX {
            if !volume.reclaim_round(upkeep, sweep, &policy, done).await? {
                break;
            }
            sweep = true;
            volume
                .delete_condemned(self.config().reader_grace.get(), done)
                .await?;
        }
        Ok(())
    }

    async fn retire(
        &self,
        volume: &Volume,
        upkeep: &mut Upkeep,
        done: &mut MaintainedVolume,
    ) -> Result<(), RpcError> {
        let policy = self.retention();
        let mut retired = Vec::new();
        let mut replaced = 0;
        volume
            .edit(|manifest| {
                retired = retention::plan(manifest, policy);
                let behind = manifest.generations.iter().skip(1).take(retired.len());
                replaced = behind.map(|generation| generation.changed_blocks).sum();
                Ok((!retired.is_empty())
                    .then(|| (retention::retire(manifest, &retired, now_ms()), Vec::new())))
            })
            .await?;
        if retired.is_empty() {
            return Ok(());
        }
        tracing::info!(volume = %volume.id, generations = ?retired, "generations retired");
        done.retired_generations
            .extend(retired.iter().map(|id| id.get()));
        let block_size = volume.manifest().geometry.block_size().get();
        match &mut upkeep.estimate {
            Some(estimate) => estimate.retired(replaced, block_size),
            None => upkeep.unswept = true,
        }
        Ok(())
    }
}
