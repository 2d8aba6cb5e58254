//! What the capture service tells of itself in numbers: `docs/TELEMETRY.md` lists it.
//!
//! Everything is read from what the volumes keep anyway. A reading waits for no disk: figures that are behind a lock which
//! somebody may hold while he waits for one are as they were at the last look.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tidemark_block::Coherence;
use tidemark_listen::ConnectionCounts;
use tidemark_telemetry::metrics::{
    CERTIFICATE_NOT_AFTER, COMMON, CONNECTIONS, CONNECTIONS_REFUSED, CallCounts, Family, Process,
    Reading, seconds_of_ms,
};
use tidemark_tls::{Ends, Gate};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use crate::{
    config::Config,
    registry::Registry,
    uplink::{
        UplinkState,
        figures::{Ending, Quiesced},
        now_ms, stopped,
    },
    volume::{Serving, Volume},
};

tidemark_telemetry::families! {
    /// Families of this service alone.
    pub(crate) CAPTURE:
    /// How old the image is that the vault holds: seconds since the cut of the recovery point. Where there is none yet, since the volume is served.
    RECOVERY_POINT_AGE = "tidemark_capture_recovery_point_age_seconds", Gauge, Seconds, [volume];
    /// The recovery point, since the Unix epoch; 0: the vault holds nothing yet.
    RECOVERY_POINT = "tidemark_capture_recovery_point_timestamp_seconds", Gauge, Seconds, [volume];
    /// The longest time between two cuts, as interval_max has it: what the recovery point's age is held against.
    RECOVERY_POINT_TARGET = "tidemark_capture_recovery_point_target_seconds", Gauge, Seconds, [volume];
    /// When the last interval was over, with or without changes, since the Unix epoch; 0: none since the volume is served.
    LAST_INTERVAL = "tidemark_capture_last_interval_timestamp_seconds", Gauge, Seconds, [volume];
    /// Whether the volume is served.
    SERVING = "tidemark_capture_volume_serving", Gauge, None, [volume];
    /// Length of the volume.
    SIZE = "tidemark_capture_volume_size_bytes", Gauge, Bytes, [volume];
    /// Attempts at an interval, by how they ended.
    INTERVALS = "tidemark_capture_intervals_total", Counter, None, [volume, result];
    /// How long an interval took that was committed, from "a cut is due" until its receipt is recorded.
    INTERVAL_DURATION = "tidemark_capture_interval_duration_seconds", Histogram, Seconds, [volume];
    /// How long the stages of an interval took that was committed.
    STAGE_DURATION = "tidemark_capture_interval_stage_duration_seconds", Histogram, Seconds, [volume, stage];
    /// Blocks that the next interval will hold, at most. With the engines reflink and scan only a cut tells which have changed.
    CHANGED_BLOCKS = "tidemark_capture_changed_blocks", Gauge, None, [volume];
    /// Cuts that became intervals, by their coherence.
    CUTS = "tidemark_capture_cuts_total", Counter, None, [volume, coherence];
    /// For how long the last cut held writers up.
    CUT_STALL = "tidemark_capture_last_cut_stall_seconds", Gauge, Seconds, [volume];
    /// Attempts to quiesce the workload, by what became of them.
    QUIESCES = "tidemark_capture_quiesces_total", Counter, None, [volume, result];
    /// What the uplink is doing: 1 for that state, 0 for the others.
    UPLINK_STATE = "tidemark_capture_uplink_state", Gauge, None, [volume, state];
    /// Failures of the uplink, by reason code.
    UPLINK_FAILURES = "tidemark_capture_uplink_failures_total", Counter, None, [volume, reason];
    /// Bytes of the changed blocks of committed intervals, before encoding.
    RAW_BYTES = "tidemark_capture_raw_bytes_total", Counter, Bytes, [volume];
    /// Encoded bytes that were sent to the vault, those of intervals that came to nothing among them.
    SENT_BYTES = "tidemark_capture_sent_bytes_total", Counter, Bytes, [volume];
    /// How fast the last committed interval went over the link, from its first byte to the receipt.
    LINK_RATE = "tidemark_capture_link_rate_bytes_per_second", Gauge, None, [volume];
    /// Intervals that source and vault computed different image digests of.
    DIGEST_MISMATCHES = "tidemark_capture_digest_mismatches_total", Counter, None, [volume];
    /// Room in the spool that before-images take.
    SPOOL_USED = "tidemark_capture_spool_used_bytes", Gauge, Bytes, [volume];
    /// Room that the spool may take; 0 with the engine reflink, which has none.
    SPOOL_CAPACITY = "tidemark_capture_spool_capacity_bytes", Gauge, Bytes, [volume];
    /// Snapshots and intervals that were given up because the spool was full.
    SPOOL_GIVE_UPS = "tidemark_capture_spool_give_ups_total", Counter, None, [volume];
    /// Before-images that were copied into the spool.
    COPIED_BLOCKS = "tidemark_capture_copied_blocks_total", Counter, None, [volume];
    /// Snapshots that are open.
    SNAPSHOTS = "tidemark_capture_snapshots", Gauge, None, [volume];
    /// NBD connections, and open files of the mounted directory.
    CLIENTS = "tidemark_capture_clients", Gauge, None, [volume];
    /// Files of the volume's state that were found damaged.
    STATE_DAMAGE = "tidemark_capture_state_damage_total", Counter, None, [volume];
    /// Whole passes of the source scrub.
    SCRUB_PASSES = "tidemark_capture_scrub_passes_total", Counter, None, [volume];
    /// Clean blocks that the source scrub has compared.
    SCRUB_BLOCKS = "tidemark_capture_scrub_blocks_total", Counter, None, [volume];
    /// Clean blocks that did not match the checksum table: a change was missed, or made by somebody else.
    SCRUB_MISMATCHES = "tidemark_capture_scrub_mismatches_total", Counter, None, [volume];
    /// Steps of the source scrub that failed.
    SCRUB_FAILURES = "tidemark_capture_scrub_failures_total", Counter, None, [volume];
    /// When the last whole pass of the source scrub ended, since the Unix epoch; 0: none has since the volume is served.
    SCRUB_LAST_PASS = "tidemark_capture_scrub_last_pass_timestamp_seconds", Gauge, Seconds, [volume];
}

/// Every family that the service has.
pub const FAMILIES: &[&[&Family]] = &[COMMON, CAPTURE];

const STATES: [(UplinkState, &str); 6] = [
    (UplinkState::Idle, "idle"),
    (UplinkState::Connecting, "connecting"),
    (UplinkState::Resyncing, "resyncing"),
    (UplinkState::Shipping, "shipping"),
    (UplinkState::Backoff, "backoff"),
    (UplinkState::Fenced, "fenced"),
];

const GRADES: [Coherence; 4] = [
    Coherence::Crash,
    Coherence::Lull,
    Coherence::Flushed,
    Coherence::Quiesced,
];

/// What metrics are read from.
#[derive(Debug, Clone)]
pub(crate) struct Sources {
    pub(crate) process: Process,
    pub(crate) registry: Arc<Registry>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) dialer_ends: DialerEnds,
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
        let (own, dialer) = (self.gate.ends(), *self.dialer_ends.0.lock());
        for (key, end) in [
            ("tls_cert", own.certificate),
            ("tls_ca", own.ca),
            ("vault_cert", dialer.certificate),
            ("vault_ca", dialer.ca),
        ] {
            if let Some(end) = end {
                #[allow(clippy::cast_precision_loss, reason = "a time to the second")]
                reading.add(&CERTIFICATE_NOT_AFTER, &[key], end as f64);
            }
        }
        let config = self.registry.config();
        for volume in self.registry.list() {
            read_volume(&mut reading, config, &volume);
        }
        reading
    }
}

fn read_volume(reading: &mut Reading, config: &Config, volume: &Volume) {
    let name = volume.record.name.as_str();
    let serving = volume.serving().ok();
    let stats = serving.as_ref().map(|serving| serving.engine.stats_now());
    let is_sound = stats.as_ref().is_some_and(|stats| !stats.poisoned);
    reading.add(&SERVING, &[name], is_sound);
    reading.add(&SIZE, &[name], volume.record.geometry.length());
    let target = config.interval_max.get().as_secs_f64();
    reading.add(&RECOVERY_POINT_TARGET, &[name], target);
    let (Some(serving), Some(stats)) = (serving, stats) else {
        return;
    };
    for (family, number) in [
        (&CHANGED_BLOCKS, stats.changed_blocks),
        (&SPOOL_USED, stats.spool_used),
        (&SPOOL_CAPACITY, stats.spool_max),
        (&SPOOL_GIVE_UPS, stats.give_ups),
        (&COPIED_BLOCKS, stats.blocks_copied),
        (&SNAPSHOTS, stats.snapshots),
        (&CLIENTS, serving.clients().into()),
        (&STATE_DAMAGE, stats.damaged),
    ] {
        reading.add(family, &[name], number);
    }
    reading.add(&CUT_STALL, &[name], stats.last_flip.as_secs_f64());
    read_uplink(reading, name, &serving);
    read_scrub(reading, name, &serving);
}

fn read_uplink(reading: &mut Reading, name: &str, serving: &Serving) {
    let status = serving.uplink.status();
    let (state, recovery_point_ms, digest_mismatches) = {
        let status = status.borrow();
        (
            status.state,
            status.recovery_point_ms,
            status.digest_mismatches,
        )
    };
    let age = match recovery_point_ms {
        0 => serving.since.elapsed(),
        ms => Duration::from_millis(now_ms().saturating_sub(ms)),
    };
    let counts = serving.uplink.figures().counts();
    reading.add(&RECOVERY_POINT_AGE, &[name], age.as_secs_f64());
    let recovery_point = seconds_of_ms(recovery_point_ms);
    reading.add(&RECOVERY_POINT, &[name], recovery_point);
    let completed = seconds_of_ms(counts.completed_ms);
    reading.add(&LAST_INTERVAL, &[name], completed);
    reading.add(&DIGEST_MISMATCHES, &[name], digest_mismatches);
    reading.add(&RAW_BYTES, &[name], counts.raw_bytes);
    reading.add(&SENT_BYTES, &[name], counts.sent_bytes);
    if let Some(rate) = counts.link_rate {
        reading.add(&LINK_RATE, &[name], rate);
    }
    for (of, label) in STATES {
        reading.add(&UPLINK_STATE, &[name, label], of == state);
    }
    for (ending, label) in Ending::ALL {
        let count = counts.intervals.get(&ending).copied().unwrap_or(0);
        reading.add(&INTERVALS, &[name, label], count);
    }
    for grade in GRADES {
        let count = counts.cuts.get(&grade).copied().unwrap_or(0);
        reading.add(&CUTS, &[name, &grade.to_string()], count);
    }
    for (quiesced, label) in Quiesced::ALL {
        let count = counts.quiesces.get(&quiesced).copied().unwrap_or(0);
        reading.add(&QUIESCES, &[name, label], count);
    }
    for (reason, count) in &counts.errors {
        reading.add(&UPLINK_FAILURES, &[name, reason], *count);
    }
    let stages = &serving.uplink.figures().stages;
    reading.add_histogram(&INTERVAL_DURATION, &[name], &stages.whole);
    for (stage, histogram) in [
        ("moment", &stages.moment),
        ("ship", &stages.ship),
        ("commit", &stages.commit),
        ("settle", &stages.settle),
    ] {
        reading.add_histogram(&STAGE_DURATION, &[name, stage], histogram);
    }
}

fn read_scrub(reading: &mut Reading, name: &str, serving: &Serving) {
    let counts = serving.scrub.counts();
    for (family, count) in [
        (&SCRUB_PASSES, &counts.passes),
        (&SCRUB_BLOCKS, &counts.compared),
        (&SCRUB_MISMATCHES, &counts.mismatches),
        (&SCRUB_FAILURES, &counts.failures),
    ] {
        reading.add(family, &[name], count.load(Ordering::Relaxed));
    }
    let completed = seconds_of_ms(counts.completed_ms.load(Ordering::Relaxed));
    reading.add(&SCRUB_LAST_PASS, &[name], completed);
}

/// When the certificates end that are shown to, and taken from, the vault. They are read for each connection, so they are
/// looked at as often as the service's own.
#[derive(Debug, Clone, Default)]
pub(crate) struct DialerEnds(Arc<Mutex<Ends>>);

impl DialerEnds {
    /// Looks at them until told to stop.
    pub(crate) async fn watch(self, config: &Config, mut stop: watch::Receiver<bool>) {
        if !config.vault.starts_with("https://") {
            return;
        }
        let dialer = config.dialer();
        let mut ticks = interval(config.tls_reload_period.get());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stopped(&mut stop) => return,
                _ = ticks.tick() => {}
            }
            let dialer = dialer.clone();
            // A file that can't be used is told of by whoever connects.
            if let Ok(Ok(ends)) = tokio::task::spawn_blocking(move || dialer.ends()).await {
                *self.0.lock() = ends;
            }
        }
    }
}
