//! Volumes and uplinks as the interface shows them.

use std::{sync::atomic::Ordering, time::Duration};

use tidemark_identity::Caller;
use tidemark_proto::{
    capture::v1::{self as pb, UplinkState as PbState, VolumeState},
    convert::volume_id_field,
};

use super::CaptureService;
use crate::{
    engine::{EngineKind, EngineStats},
    uplink::{UplinkState, UplinkStatus},
    volume::{Serving, Volume},
};

impl CaptureService {
    pub(super) fn shown_status(&self, caller: &Caller) -> pb::CaptureStatus {
        pb::CaptureStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vault: self.registry.config().vault.clone(),
            volumes: self
                .registry
                .list()
                .iter()
                .filter(|volume| {
                    caller.has(&self.registry.config().source_name, &volume.record.name)
                })
                .map(|volume| self.shown_volume(volume))
                .collect(),
        }
    }

    pub(super) fn shown_volume(&self, volume: &Volume) -> pb::Volume {
        let record = &volume.record;
        let shown = pb::Volume {
            volume_id: volume_id_field(record.id),
            name: record.name.clone(),
            file: record.file.display().to_string(),
            geometry: Some(record.geometry.into()),
            engine: record.engine.to_string(),
            engine_why: record.engine_why.clone(),
            group: self
                .registry
                .config()
                .groups
                .of(&record.name)
                .unwrap_or_default()
                .to_owned(),
            ..pb::Volume::default()
        };
        match volume.serving() {
            Err(problem) => pb::Volume {
                state: VolumeState::Failed.into(),
                problem,
                ..shown
            },
            Ok(serving) => self.shown_serving(&serving, shown),
        }
    }

    fn shown_serving(&self, serving: &Serving, shown: pb::Volume) -> pb::Volume {
        let stats = serving.engine.stats();
        let status = serving.uplink.status().borrow().clone();
        let (state, problem) = if stats.poisoned {
            (
                VolumeState::Failed,
                "a write or sync of the volume or its state failed: check the disk, then restart the service"
                    .to_owned(),
            )
        } else {
            (VolumeState::Serving, String::new())
        };
        let (nbd_uris, fuse_path) = if serving.is_exported() {
            let name = &shown.name;
            (self.fronts.nbd_uris(name), self.fronts.fuse_path(name))
        } else {
            (Vec::new(), String::new())
        };
        let counts = serving.scrub.counts();
        pb::Volume {
            state: state.into(),
            problem,
            epoch: serving.engine.epoch().get(),
            changed_blocks: stats.changed_blocks,
            base_generation: status.base.get(),
            term: status.term.get(),
            snapshots: u32::try_from(stats.snapshots).unwrap_or(u32::MAX),
            spool_bytes_used: stats.spool_used,
            spool_bytes_max: stats.spool_max,
            nbd_uris,
            fuse_path,
            warning: match serving.engine.kind() {
                EngineKind::Intercept | EngineKind::Scan => String::new(),
                EngineKind::Reflink => {
                    stall_warning(self.registry.config().cut_stall_max.get(), &stats)
                }
            },
            cut_stall_us: u64::try_from(stats.last_flip.as_micros()).unwrap_or(u64::MAX),
            extents: stats.extents,
            uplink: Some(uplink(&status)),
            scrub: Some(pb::Scrub {
                passes: counts.passes.load(Ordering::Relaxed),
                blocks_done: counts.blocks_done.load(Ordering::Relaxed),
                blocks_total: serving.engine.geometry().block_count().get(),
                mismatches: counts.mismatches.load(Ordering::Relaxed),
            }),
            clients: serving.clients(),
            scratches: scratches(serving),
            ..shown
        }
    }
}

/// The scratches that clients use now.
pub(super) fn scratches(serving: &Serving) -> Vec<pb::Scratch> {
    let all = serving.scratches().into_iter();
    all.map(|(snapshot, export)| pb::Scratch {
        name: export.name().to_owned(),
        snapshot: snapshot.0,
        clients: export.clients(),
        bytes_used: export.scratch_bytes(),
    })
    .collect()
}

/// What is to be done about cuts that hold writers up for longer than `most`; nothing where it is zero.
fn stall_warning(most: Duration, stats: &EngineStats) -> String {
    if most.is_zero() || stats.last_flip <= most {
        return String::new();
    }
    format!(
        "the last cut held writers up for {}, longer than cut_stall_max ({}), because the file has {} extents: copy it to a \
         new file (cp --reflink=never) with an extent-size hint, or use the engine intercept",
        seconds(stats.last_flip),
        seconds(most),
        stats.extents
    )
}

/// A time as people read it.
fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// An uplink, as it is shown.
pub(super) fn uplink(status: &UplinkStatus) -> pb::Uplink {
    let state = match status.state {
        UplinkState::Idle => PbState::Idle,
        UplinkState::Connecting => PbState::Connecting,
        UplinkState::Resyncing => PbState::Resyncing,
        UplinkState::Shipping => PbState::Shipping,
        UplinkState::Backoff => PbState::Backoff,
        UplinkState::Fenced => PbState::Fenced,
    };
    pb::Uplink {
        state: state.into(),
        error: status.error.clone().unwrap_or_default(),
        recovery_point_ms: status.recovery_point_ms,
        blocks_total: status.blocks_total,
        blocks_done: status.blocks_done,
        bytes_sent: status.bytes_sent,
        last_receipt: status.last_receipt.clone().map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_that_hold_writers_up_for_too_long_are_warned_of() {
        let stats = EngineStats {
            last_flip: Duration::from_millis(4200),
            extents: 100_000,
            ..EngineStats::default()
        };
        insta::assert_snapshot!(stall_warning(Duration::from_secs(1), &stats));
        for most in [Duration::ZERO, stats.last_flip] {
            assert_eq!(stall_warning(most, &stats), "");
        }
    }
}
