//! What has been done with one volume since the service started, for its metrics.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;
use tidemark_proto::{Reason, vault::v1::MaintainedVolume};
use tidemark_telemetry::metrics::{Histogram, STAGE_SECONDS};

/// How receiving an interval ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Received {
    /// It became a generation.
    Committed,
    /// Nothing had changed: the newest generation is still current.
    Unchanged,
    /// The stream broke, or the vault stops: what came is kept.
    Interrupted,
    /// It was refused.
    Refused,
}

impl Received {
    pub(crate) const ALL: [(Self, &'static str); 4] = [
        (Self::Committed, "committed"),
        (Self::Unchanged, "unchanged"),
        (Self::Interrupted, "interrupted"),
        (Self::Refused, "refused"),
    ];
}

/// How a restore ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Restored {
    /// All of it was sent.
    Completed,
    /// It failed.
    Failed,
    /// Whoever asked for it went away.
    Abandoned,
}

impl Restored {
    pub(crate) const ALL: [(Self, &'static str); 3] = [
        (Self::Completed, "completed"),
        (Self::Failed, "failed"),
        (Self::Abandoned, "abandoned"),
    ];
}

/// What upkeep has done.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept {
    pub(crate) retired_generations: u64,
    pub(crate) condemned_segments: u64,
    pub(crate) deleted_segments: u64,
    pub(crate) rewritten_bytes: u64,
    pub(crate) freed_bytes: u64,
    /// Passes that failed, by reason.
    pub(crate) failures: BTreeMap<&'static str, u64>,
    /// Bytes that some generation needs; none before the first sweep.
    pub(crate) live_bytes: Option<u64>,
}

/// What has been done with a volume.
#[derive(Debug)]
pub(crate) struct Figures {
    /// From the seal to the receipt.
    pub(crate) commit: Histogram,
    pub(crate) received_bytes: AtomicU64,
    pub(crate) changed_blocks: AtomicU64,
    pub(crate) digest_mismatches: AtomicU64,
    pub(crate) restored_bytes: AtomicU64,
    received: Mutex<BTreeMap<Received, u64>>,
    restored: Mutex<BTreeMap<Restored, u64>>,
    kept: Mutex<Kept>,
}

impl Default for Figures {
    fn default() -> Self {
        Self {
            commit: Histogram::new(STAGE_SECONDS),
            received_bytes: AtomicU64::new(0),
            changed_blocks: AtomicU64::new(0),
            digest_mismatches: AtomicU64::new(0),
            restored_bytes: AtomicU64::new(0),
            received: Mutex::default(),
            restored: Mutex::default(),
            kept: Mutex::default(),
        }
    }
}

impl Figures {
    /// Receiving an interval has ended.
    pub(crate) fn received(&self, ended: Received) {
        *self.received.lock().entry(ended).or_default() += 1;
    }

    /// So many intervals have ended so.
    pub(crate) fn received_count(&self, ended: Received) -> u64 {
        self.received.lock().get(&ended).copied().unwrap_or(0)
    }

    /// A restore has ended, after so many bytes of frames.
    pub(crate) fn restored(&self, ended: Restored, bytes: u64) {
        *self.restored.lock().entry(ended).or_default() += 1;
        self.restored_bytes.fetch_add(bytes, Relaxed);
    }

    /// So many restores have ended so.
    pub(crate) fn restored_count(&self, ended: Restored) -> u64 {
        self.restored.lock().get(&ended).copied().unwrap_or(0)
    }

    /// A pass of upkeep has done this, and then ended or failed.
    pub(crate) fn looked_after(
        &self,
        done: &MaintainedVolume,
        live_bytes: Option<u64>,
        failed: Option<Reason>,
    ) {
        let mut kept = self.kept.lock();
        kept.retired_generations += done.retired_generations.len() as u64;
        kept.condemned_segments += done.condemned_segments;
        kept.deleted_segments += done.deleted_segments;
        kept.rewritten_bytes += done.rewritten_bytes;
        kept.freed_bytes += done.freed_bytes;
        kept.live_bytes = live_bytes;
        if let Some(reason) = failed {
            *kept.failures.entry(reason.as_str()).or_default() += 1;
        }
    }

    /// What upkeep has done.
    pub(crate) fn kept(&self) -> Kept {
        self.kept.lock().clone()
    }
}
