//! What the vault service tells of itself in numbers: `docs/TELEMETRY.md` lists it.
//!
//! Everything is read from what the volumes keep anyway, and from memory alone. A volume is named by its source, its name
//! and its UUID: a source may have had two of the same name, one after the other.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use tidemark_listen::ConnectionCounts;
use tidemark_telemetry::metrics::{
    CERTIFICATE_NOT_AFTER, COMMON, CONNECTIONS, CONNECTIONS_REFUSED, CallCounts, Family, Process,
    Reading, seconds_of_ms,
};
use tidemark_tls::Gate;
use tokio::sync::Semaphore;

use crate::{
    figures::{Received, Restored},
    vault::Vault,
    volume::{Volume, now_ms},
};

tidemark_telemetry::families! {
    /// Families of this service alone.
    pub(crate) VAULT:
    /// How old the newest image is: seconds since it was last known to be the source's. Nothing where there is no generation.
    RECOVERY_POINT_AGE = "tidemark_vault_recovery_point_age_seconds", Gauge, Seconds, [source, volume, volume_id];
    /// When the newest image was last known to be the source's, since the Unix epoch; 0: there is no generation.
    RECOVERY_POINT = "tidemark_vault_recovery_point_timestamp_seconds", Gauge, Seconds, [source, volume, volume_id];
    /// Volumes that the vault has.
    VOLUMES = "tidemark_vault_volumes", Gauge, None, [];
    /// Volumes that can't be opened: what leads to their segments is damaged, or can't be read.
    BROKEN_VOLUMES = "tidemark_vault_broken_volumes", Gauge, None, [];
    /// Length of the volume.
    SIZE = "tidemark_vault_volume_size_bytes", Gauge, Bytes, [source, volume, volume_id];
    /// Generations that are retained.
    GENERATIONS = "tidemark_vault_generations", Gauge, None, [source, volume, volume_id];
    /// The number of the newest generation.
    HEAD_GENERATION = "tidemark_vault_head_generation", Gauge, None, [source, volume, volume_id];
    /// Bytes of all segments that the manifest names, condemned ones included.
    STORED_BYTES = "tidemark_vault_stored_bytes", Gauge, Bytes, [source, volume, volume_id];
    /// Bytes of those segments that are condemned, and deleted after the readers' grace.
    CONDEMNED_BYTES = "tidemark_vault_condemned_bytes", Gauge, Bytes, [source, volume, volume_id];
    /// Bytes that some generation needs, estimated; nothing before the first sweep.
    LIVE_BYTES = "tidemark_vault_live_bytes", Gauge, Bytes, [source, volume, volume_id];
    /// Intervals that were received, by how that ended.
    INTERVALS = "tidemark_vault_intervals_total", Counter, None, [source, volume, volume_id, result];
    /// Encoded bytes of committed intervals.
    RECEIVED_BYTES = "tidemark_vault_received_bytes_total", Counter, Bytes, [source, volume, volume_id];
    /// Changed blocks of committed intervals.
    CHANGED_BLOCKS = "tidemark_vault_changed_blocks_total", Counter, None, [source, volume, volume_id];
    /// How long a commit took, from the seal to the receipt.
    COMMIT_DURATION = "tidemark_vault_commit_duration_seconds", Histogram, Seconds, [source, volume, volume_id];
    /// Intervals that were refused because source and vault computed different image digests.
    DIGEST_MISMATCHES = "tidemark_vault_digest_mismatches_total", Counter, None, [source, volume, volume_id];
    /// Streams of intervals that are open.
    STREAMS = "tidemark_vault_streams", Gauge, None, [];
    /// Restores that are under way.
    RESTORES_OPEN = "tidemark_vault_restores_open", Gauge, None, [];
    /// Restores, by how they ended.
    RESTORES = "tidemark_vault_restores_total", Counter, None, [source, volume, volume_id, result];
    /// Encoded bytes that were sent to restores.
    RESTORED_BYTES = "tidemark_vault_restored_bytes_total", Counter, Bytes, [source, volume, volume_id];
    /// Generations that were retired.
    RETIRED_GENERATIONS = "tidemark_vault_retired_generations_total", Counter, None, [source, volume, volume_id];
    /// Segments that reclaim has condemned.
    CONDEMNED_SEGMENTS = "tidemark_vault_condemned_segments_total", Counter, None, [source, volume, volume_id];
    /// Segments that were deleted.
    DELETED_SEGMENTS = "tidemark_vault_deleted_segments_total", Counter, None, [source, volume, volume_id];
    /// Bytes that reclaim has written anew.
    REWRITTEN_BYTES = "tidemark_vault_rewritten_bytes_total", Counter, Bytes, [source, volume, volume_id];
    /// Bytes of segments that were deleted.
    FREED_BYTES = "tidemark_vault_freed_bytes_total", Counter, Bytes, [source, volume, volume_id];
    /// Passes of retention and reclaim that failed, by reason code.
    UPKEEP_FAILURES = "tidemark_vault_upkeep_failures_total", Counter, None, [source, volume, volume_id, reason];
    /// Size of the file system that the store is on.
    STORE_SIZE = "tidemark_vault_store_size_bytes", Gauge, Bytes, [];
    /// Room that is left on it.
    STORE_AVAILABLE = "tidemark_vault_store_available_bytes", Gauge, Bytes, [];
    /// Whole passes of the scrub.
    SCRUB_PASSES = "tidemark_vault_scrub_passes_total", Counter, None, [source, volume, volume_id];
    /// Stored bytes that scrubs have read and verified.
    SCRUB_BYTES = "tidemark_vault_scrub_bytes_total", Counter, Bytes, [source, volume, volume_id];
    /// Passes of the scrub that ended early, for the store could not be read.
    SCRUB_FAILURES = "tidemark_vault_scrub_failures_total", Counter, None, [source, volume, volume_id];
    /// When the last whole pass of the scrub ended, since the Unix epoch; 0: none has since the service started.
    SCRUB_LAST_PASS = "tidemark_vault_scrub_last_pass_timestamp_seconds", Gauge, Seconds, [source, volume, volume_id];
    /// Stored objects that are damaged, as far as scrubs know.
    DAMAGED_OBJECTS = "tidemark_vault_damaged_objects", Gauge, None, [source, volume, volume_id];
    /// Generations that can't be read whole, as far as scrubs know.
    DAMAGED_GENERATIONS = "tidemark_vault_damaged_generations", Gauge, None, [source, volume, volume_id];
    /// Damaged objects that scrubs have written again.
    REPAIRED_OBJECTS = "tidemark_vault_repaired_objects_total", Counter, None, [source, volume, volume_id];
}

/// Every family that the service has.
pub const FAMILIES: &[&[&Family]] = &[COMMON, VAULT];

/// What metrics are read from.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) process: Process,
    pub(crate) vault: Arc<Vault>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) restores: Arc<Semaphore>,
    pub(crate) connections: ConnectionCounts,
    pub(crate) calls: CallCounts,
}

impl Sources {
    /// Everything, as it is now.
    pub(crate) fn read(&self) -> Reading {
        let mut reading = Reading::of(FAMILIES);
        self.process.read(&mut reading);
        self.calls.read(&mut reading);
        reading.add(&CONNECTIONS, &[], self.connections.open() as u64);
        reading.add(&CONNECTIONS_REFUSED, &[], self.connections.refused());
        let ends = self.gate.ends();
        for (key, end) in [("tls_cert", ends.certificate), ("tls_ca", ends.ca)] {
            if let Some(end) = end {
                #[allow(clippy::cast_precision_loss, reason = "a time to the second")]
                reading.add(&CERTIFICATE_NOT_AFTER, &[key], end as f64);
            }
        }
        let volumes = self.vault.volumes();
        let restores_max = self.vault.config().restores_max as usize;
        let restores = restores_max.saturating_sub(self.restores.available_permits());
        for (family, count) in [
            (&VOLUMES, volumes.len()),
            (&BROKEN_VOLUMES, self.vault.broken_count()),
            (&STREAMS, self.vault.open_streams()),
            (&RESTORES_OPEN, restores),
        ] {
            reading.add(family, &[], count as u64);
        }
        if let Some(space) = self.vault.space() {
            reading.add(&STORE_SIZE, &[], space.size);
            reading.add(&STORE_AVAILABLE, &[], space.available);
        }
        for volume in volumes {
            read_volume(&mut reading, &volume);
        }
        reading
    }
}

fn read_volume(reading: &mut Reading, volume: &Volume) {
    let manifest = volume.manifest();
    let id = volume.id.to_string();
    let labels = [
        manifest.source.as_str(),
        manifest.name.as_str(),
        id.as_str(),
    ];
    let through_ms = volume.current_through(&manifest);
    reading.add(&RECOVERY_POINT, &labels, seconds_of_ms(through_ms));
    if through_ms > 0 {
        let age = seconds_of_ms(now_ms().saturating_sub(through_ms));
        reading.add(&RECOVERY_POINT_AGE, &labels, age);
    }
    let stored = manifest.stored_bytes();
    for (family, number) in [
        (&SIZE, manifest.geometry.length()),
        (&GENERATIONS, manifest.generations.len() as u64),
        (&HEAD_GENERATION, manifest.head_id().get()),
        (&STORED_BYTES, stored),
        (&CONDEMNED_BYTES, stored - manifest.named_bytes()),
    ] {
        reading.add(family, &labels, number);
    }
    read_figures(reading, volume, labels);
    read_scrub(reading, volume, labels);
}

fn read_figures(reading: &mut Reading, volume: &Volume, labels: [&str; 3]) {
    let [source, name, id] = labels;
    let figures = &volume.figures;
    for (ended, label) in Received::ALL {
        let count = figures.received_count(ended);
        reading.add(&INTERVALS, &[source, name, id, label], count);
    }
    for (ended, label) in Restored::ALL {
        let count = figures.restored_count(ended);
        reading.add(&RESTORES, &[source, name, id, label], count);
    }
    let kept = figures.kept();
    for (family, number) in [
        (&RECEIVED_BYTES, figures.received_bytes.load(Relaxed)),
        (&CHANGED_BLOCKS, figures.changed_blocks.load(Relaxed)),
        (&DIGEST_MISMATCHES, figures.digest_mismatches.load(Relaxed)),
        (&RESTORED_BYTES, figures.restored_bytes.load(Relaxed)),
        (&RETIRED_GENERATIONS, kept.retired_generations),
        (&CONDEMNED_SEGMENTS, kept.condemned_segments),
        (&DELETED_SEGMENTS, kept.deleted_segments),
        (&REWRITTEN_BYTES, kept.rewritten_bytes),
        (&FREED_BYTES, kept.freed_bytes),
    ] {
        reading.add(family, &labels, number);
    }
    if let Some(live_bytes) = kept.live_bytes {
        reading.add(&LIVE_BYTES, &labels, live_bytes);
    }
    for (reason, count) in &kept.failures {
        reading.add(&UPKEEP_FAILURES, &[source, name, id, reason], *count);
    }
    reading.add_histogram(&COMMIT_DURATION, &labels, &figures.commit);
}

fn read_scrub(reading: &mut Reading, volume: &Volume, labels: [&str; 3]) {
    let counts = volume.scrub.counts();
    for (family, number) in [
        (&SCRUB_PASSES, counts.passes),
        (&SCRUB_BYTES, counts.bytes),
        (&SCRUB_FAILURES, counts.failures),
        (&DAMAGED_OBJECTS, counts.damaged),
        (&DAMAGED_GENERATIONS, counts.damaged_generations),
        (&REPAIRED_OBJECTS, counts.repaired),
    ] {
        reading.add(family, &labels, number);
    }
    let completed = seconds_of_ms(counts.completed_ms);
    reading.add(&SCRUB_LAST_PASS, &labels, completed);
}
