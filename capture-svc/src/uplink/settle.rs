//! The ends of an interval: committed, unchanged, given up, or made moot by another head.

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::{Context, Result};
use capture_core::{interval::Event as IntervalEvent, uplink::Event};
use tidemark_block::{GenerationId, Head, Receipt};
use tidemark_proto::Reason;
use tidemark_telemetry::step;
use tracing::Instrument;

use super::{
    BaseTable, blocking,
    driver::{Driver, Outcome, jitter},
    figures::Ending,
    open::record_path,
    pending::{PendingKey, path_in},
    record::{IntervalRecord, UplinkRecord},
};
use crate::engine::EngineError;

/// Records the base; then releases the interval and applies its checksums. An error means that nothing was recorded;
/// the inner one is that of the release.
pub(super) fn record_base(
    dir: &Path,
    record: &UplinkRecord,
    table: &BaseTable,
    pending: Option<PendingKey>,
    release: impl FnOnce() -> Result<()>,
) -> Result<Result<()>> {
    record.store(&record_path(dir))?;
    let path = path_in(dir);
    Ok(table.advance(pending.map(|key| (path.as_path(), key)), release))
}

impl Driver {
    pub(super) fn pending_key(&self, interval: &IntervalRecord) -> PendingKey {
        PendingKey {
            volume: self.settings.volume,
            interval: interval.id,
            base: interval.base,
        }
    }

    /// The vault has committed. In this order: base recorded; interval released and table advanced, as one step;
    /// later, in the background, the table synced and stamped.
    pub(super) async fn settle(&mut self, interval: IntervalRecord, receipt: Receipt) -> Outcome {
        self.moments.receipt = Some(Instant::now());
        self.end_stamping().await;
        let mut record = self.record.clone();
        record.base = receipt.generation;
        record.base_digest = Some(receipt.image_digest);
        record.base_interval = Some(interval.id);
        record.committed_epoch = interval.epoch;
        record.recovery_point_ms = receipt.cut_time_ms;
        record.interval = None;
        let key = self.pending_key(&interval);
        let id = interval.id;
        let recording = step!("record receipt");
        let advanced = self.advance(record, interval, Some(key));
        let advanced = advanced.instrument(recording).await;
        if let Err(error) = advanced {
            return self.failed_here("record the receipt", &error);
        }
        tracing::info!(
            interval = %id, generation = %receipt.generation, blocks = %receipt.changed_blocks,
            bytes = receipt.frame_bytes, "committed"
        );
        let raw_bytes = self.settings.geometry.bytes(receipt.changed_blocks);
        let moments = std::mem::take(&mut self.moments);
        self.figures.committed(raw_bytes, moments);
        self.settled(receipt)
    }

    /// The image is that of the base. `receipt` says until when.
    pub(super) async fn settle_unchanged(&mut self, receipt: Receipt, cut_time_ms: u64) -> Outcome {
        let mut record = self.record.clone();
        record.recovery_point_ms = record.recovery_point_ms.max(cut_time_ms);
        record.last_cut_ms = record.last_cut_ms.max(cut_time_ms);
        if let Some(interval) = record.interval.take() {
            record.committed_epoch = interval.epoch;
            if let Err(error) = self.advance(record, interval, None).await {
                return self.failed_here("record that nothing changed", &error);
            }
        } else {
            // Not worth a write: after a restart the vault is asked anyway.
            self.record = record;
        }
        self.figures.ended(Ending::Unchanged);
        self.settled(receipt)
    }

    async fn advance(
        &mut self,
        record: UplinkRecord,
        interval: IntervalRecord,
        pending: Option<PendingKey>,
    ) -> Result<()> {
        let (engine, table) = (Arc::clone(&self.engine), Arc::clone(&self.table));
        let (dir, stored) = (self.settings.dir.clone(), record.clone());
        let cut = self.cut.take();
        let stored = blocking(move || {
            drop(cut);
            record_base(&dir, &stored, &table, pending, || {
                match engine.commit_interval(interval.epoch) {
                    // It was given up after it had been read whole: its blocks are compared once more.
                    Ok(()) | Err(EngineError::NoInterval(_)) => Ok(()),
                    Err(error) => Err(error).context("release the interval"),
                }
            })
        });
        // From here on the base is recorded, whatever else failed.
        let released = stored.await?;
        self.record = record;
        if let Err(error) = released {
            tracing::error!(error = %format!("{error:#}"), "release the committed interval");
            let shown = format!("{error:#}");
            self.show.send_modify(|status| status.error = Some(shown));
        }
        Ok(())
    }

    fn settled(&mut self, receipt: Receipt) -> Outcome {
        let now = self.now();
        let answered = self.controller.on(now, IntervalEvent::Settled);
        for ticket in answered.tickets {
            if let Some(waiter) = self.waiters.remove(&ticket) {
                let _ = waiter.send(Ok(receipt.clone()));
            }
        }
        self.trace.succeed(&receipt);
        let base = self.record.base;
        let recovery_point_ms = self.record.recovery_point_ms;
        let digest = receipt.image_digest;
        self.show.send_modify(|status| {
            status.base = base;
            status.recovery_point_ms = recovery_point_ms;
            status.blocks_done = status.blocks_total;
            status.last_receipt = Some(receipt);
            status.error = None;
        });
        Outcome::Event(Event::Settled { base, digest })
    }

    /// The engine gave the cut up: its blocks are in the next one.
    pub(super) async fn given_up(&mut self) -> Outcome {
        self.trace
            .fail(Reason::IntervalGivenUp, "the spool has lost its cut");
        tracing::warn!(
            "the interval in flight was given up: there was no room in the spool for all of it, or what was there can't be read; its blocks are in the next one"
        );
        match self.forget_interval().await {
            Ok(()) => Outcome::Event(Event::GivenUp),
            Err(error) => self.failed_here("record the interval that was given up", &error),
        }
    }

    pub(super) async fn drop_interval(&mut self) -> Outcome {
        match self.forget_interval().await {
            Ok(()) => Outcome::Event(Event::Dropped),
            Err(error) => self.failed_here("give the interval up", &error),
        }
    }

    async fn forget_interval(&mut self) -> Result<()> {
        let mut record = self.record.clone();
        let was_open = record.interval.take().is_some();
        let (engine, cut) = (Arc::clone(&self.engine), self.cut.take());
        let (path, stored) = (record_path(&self.settings.dir), record.clone());
        blocking(move || {
            drop(cut);
            engine.give_up_interval().context("give the interval up")?;
            stored.store(&path)
        })
        .await?;
        self.record = record;
        if was_open {
            self.figures.ended(Ending::GivenUp);
        }
        self.trace
            .fail(Reason::IntervalGivenUp, "its blocks are in the next one");
        self.recut();
        Ok(())
    }

    fn recut(&mut self) {
        let now = self.now();
        let event = if self.controller.in_flight() {
            IntervalEvent::GivenUp {
                jitter_permille: jitter(),
            }
        } else {
            IntervalEvent::ResyncWanted
        };
        self.controller.on(now, event);
    }

    /// Takes the vault's head as base. What the vault has is the truth; what differs from it will be shipped.
    pub(super) async fn adopt_head(&mut self, head: Option<Head>, doubt: bool) -> Outcome {
        let found = head.map_or(GenerationId::ZERO, |head| head.generation);
        if doubt {
            tracing::warn!(
                base = %self.record.base, head = %found,
                "the vault's newest generation is not our base: every block is compared with it"
            );
        }
        self.end_stamping().await;
        let mut record = self.record.clone();
        let ending = record.interval.take().map(|interval| {
            if doubt {
                return Ending::GivenUp;
            }
            // It was committed, and the receipt was lost.
            record.recovery_point_ms = record.recovery_point_ms.max(interval.cut_time_ms);
            Ending::Committed
        });
        record.base = found;
        record.base_digest = head.map(|head| head.digest);
        record.base_interval = head.map(|head| head.interval);
        record.table_doubtful = true;
        let cut = self.cut.take();
        let (engine, table) = (Arc::clone(&self.engine), Arc::clone(&self.table));
        let (path, stored) = (record_path(&self.settings.dir), record.clone());
        let adopted = blocking(move || {
            drop(cut);
            table.set_sound(false);
            engine.give_up_interval().context("give the interval up")?;
            if doubt {
                engine
                    .doubt_everything("the vault's newest generation is not our base")
                    .context("put every block in doubt")?;
            }
            stored.store(&path)
        });
        if let Err(error) = adopted.await {
            return self.failed_here("take over the vault's newest generation", &error);
        }
        self.record = record;
        if let Some(ending) = ending {
            self.figures.ended(ending);
        }
        if ending == Some(Ending::Committed) {
            self.trace.found(found);
        } else {
            let moot = "the vault's newest generation is another than its base";
            self.trace.fail(Reason::BaseNotHead, moot);
        }
        self.recut();
        let recovery_point_ms = self.record.recovery_point_ms;
        self.show.send_modify(|status| {
            status.base = found;
            status.recovery_point_ms = recovery_point_ms;
        });
        Outcome::Event(Event::Adopted)
    }

    /// Syncs and stamps the table behind the intervals' backs, one at a time.
    pub(super) fn stamp_behind(&mut self) {
        let idle = self.stamping.as_ref().is_none_or(|task| task.is_finished());
        let base = self.record.base;
        if idle && self.table.is_sound() && self.table.table().stamp() != base {
            let table = self.table.table();
            self.stamping = Some(tokio::task::spawn_blocking(move || {
                if let Err(error) = table.sync_and_stamp(base) {
                    tracing::error!(%error, "sync the checksum table");
                }
            }));
        }
    }

    /// Waits for a sync of the table that is under way: what comes next changes the table.
    pub(super) async fn end_stamping(&mut self) {
        if let Some(task) = self.stamping.take()
            && let Err(error) = task.await
        {
            tracing::error!(%error, "sync the checksum table");
        }
    }

    pub(super) async fn stamp_at_end(&mut self) {
        self.end_stamping().await;
        self.stamp_behind();
        self.end_stamping().await;
    }
}
