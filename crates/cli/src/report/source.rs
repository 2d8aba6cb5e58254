//! What the capture service tells: volumes with their shipping and their scrub, snapshots.

use serde::Serialize;
use tidemark_proto::capture::v1 as capture;

use super::{Receipt, Time, coherence, shape, time, uuid};
use crate::failure::Failure;

/// A volume at the capture service.
#[derive(Debug, Serialize)]
pub struct Volume {
    /// Its name, which is also the name of its NBD export.
    pub volume: String,
    /// UUID.
    pub id: String,
    /// Absolute path, as the capture service sees it.
    pub file: String,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub block_size: u32,
    /// How changes are tracked: `intercept` or `reflink`.
    pub engine: String,
    /// Why so; empty where that was not recorded.
    pub engine_why: String,
    /// `serving` or `failed`.
    pub state: &'static str,
    /// Why it does not serve, and what to do; empty where it does.
    pub problem: String,
    /// What needs attention though it serves, and what to do; empty where nothing does.
    pub warning: String,
    /// The open epoch.
    pub epoch: u64,
    /// Blocks written since the last cut, and those in doubt.
    pub changed_blocks: u64,
    /// The generation that the next interval builds on; 0 before the first.
    pub generation: u64,
    /// Writer term.
    pub term: u64,
    /// How many there are.
    pub snapshots: u32,
    /// Bytes.
    pub spool_bytes_used: u64,
    /// Bytes.
    pub spool_bytes_max: u64,
    /// Where NBD clients find it.
    pub nbd_uris: Vec<String>,
    /// Its file in the mounted directory; empty where none is mounted.
    pub fuse_path: String,
    /// The group with which it is cut at one instant; empty where it is cut by itself.
    pub group: String,
    /// For how long the last cut held writers up, in microseconds; 0 before the first.
    pub cut_stall_us: u64,
    /// Extents of the volume file at the last cut, where a cut's cost grows with them; else 0.
    pub extents: u64,
    /// NBD clients and open files, now.
    pub clients: u32,
    /// The scratches in use.
    pub scratches: Vec<Scratch>,
    /// The shipping.
    pub uplink: Uplink,
    /// The source scrub.
    pub scrub: Scrub,
}

/// The shipping of one volume.
#[derive(Debug, Serialize)]
pub struct Uplink {
    /// `idle`, `connecting`, `resyncing`, `shipping`, `backoff` or `fenced`.
    pub state: &'static str,
    /// The last failure; empty after a success.
    pub error: String,
    /// The vault holds the image as it was at this time.
    pub recovery_point: Time,
    /// Of the interval under way.
    pub blocks_total: u64,
    /// Of the interval under way.
    pub blocks_done: u64,
    /// Of the interval under way.
    pub bytes_sent: u64,
    /// What the vault answered last.
    pub last_receipt: Option<Receipt>,
}

/// The source scrub of one volume.
#[derive(Debug, Serialize)]
pub struct Scrub {
    /// Full passes since the service started.
    pub passes: u64,
    /// Of the pass under way.
    pub blocks_done: u64,
    /// Of the pass under way.
    pub blocks_total: u64,
    /// Clean blocks that did not match the checksum table. Anything but 0 is a defect.
    pub mismatches: u64,
}

/// A writable view of a snapshot, while somebody uses it.
#[derive(Debug, Serialize)]
pub struct Scratch {
    /// The name of its export.
    pub name: String,
    /// Of which snapshot.
    pub snapshot: u64,
    /// NBD clients and open files, now.
    pub clients: u32,
    /// What they have written, in bytes.
    pub bytes_used: u64,
}

/// A snapshot.
#[derive(Debug, Serialize)]
pub struct Snapshot {
    /// The number that the other commands take.
    pub snapshot: u64,
    /// For people.
    pub label: String,
    /// The epoch that its cut closed.
    pub epoch: u64,
    /// When it was cut.
    pub cut_time: Time,
    /// `crash`, `lull`, `flushed` or `quiesced`.
    pub coherence: &'static str,
    /// Why it is no better; empty for the best one.
    pub coherence_reason: String,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub block_size: u32,
    /// Those of it that are in use.
    pub scratches: Vec<Scratch>,
}

const fn uplink_state(value: capture::UplinkState) -> &'static str {
    match value {
        capture::UplinkState::Unspecified => "unknown",
        capture::UplinkState::Idle => "idle",
        capture::UplinkState::Connecting => "connecting",
        capture::UplinkState::Resyncing => "resyncing",
        capture::UplinkState::Shipping => "shipping",
        capture::UplinkState::Backoff => "backoff",
        capture::UplinkState::Fenced => "fenced",
    }
}

impl Volume {
    /// From the capture service's answer.
    pub fn new(v: capture::Volume) -> Result<Self, Failure> {
        let (size, block_size) = shape(v.geometry.as_ref());
        let state = match v.state() {
            capture::VolumeState::Serving => "serving",
            capture::VolumeState::Failed => "failed",
            capture::VolumeState::Unspecified => "unknown",
        };
        let uplink = Uplink::new(&v.name, v.uplink.unwrap_or_default())?;
        let scrub = v.scrub.unwrap_or_default();
        Ok(Self {
            id: uuid(&v.volume_id)?,
            volume: v.name,
            file: v.file,
            size,
            block_size,
            engine: v.engine,
            engine_why: v.engine_why,
            warning: v.warning,
            cut_stall_us: v.cut_stall_us,
            extents: v.extents,
            state,
            problem: v.problem,
            epoch: v.epoch,
            changed_blocks: v.changed_blocks,
            generation: v.base_generation,
            term: v.term,
            snapshots: v.snapshots,
            spool_bytes_used: v.spool_bytes_used,
            spool_bytes_max: v.spool_bytes_max,
            nbd_uris: v.nbd_uris,
            fuse_path: v.fuse_path,
            group: v.group,
            clients: v.clients,
            scratches: scratches(v.scratches),
            uplink,
            scrub: Scrub {
                passes: scrub.passes,
                blocks_done: scrub.blocks_done,
                blocks_total: scrub.blocks_total,
                mismatches: scrub.mismatches,
            },
        })
    }
}

impl Uplink {
    fn new(volume: &str, u: capture::Uplink) -> Result<Self, Failure> {
        Ok(Self {
            state: uplink_state(u.state()),
            error: u.error,
            recovery_point: time(u.recovery_point_ms),
            blocks_total: u.blocks_total,
            blocks_done: u.blocks_done,
            bytes_sent: u.bytes_sent,
            last_receipt: u
                .last_receipt
                .map(|receipt| Receipt::new(volume, &receipt))
                .transpose()?,
        })
    }
}

fn scratches(all: Vec<capture::Scratch>) -> Vec<Scratch> {
    let each = all.into_iter().map(|s| Scratch {
        name: s.name,
        snapshot: s.snapshot,
        clients: s.clients,
        bytes_used: s.bytes_used,
    });
    each.collect()
}

impl Snapshot {
    /// From the capture service's answer.
    #[must_use]
    pub fn new(s: capture::Snapshot) -> Self {
        let (size, block_size) = shape(s.geometry.as_ref());
        Self {
            snapshot: s.snapshot,
            coherence: coherence(s.coherence()),
            coherence_reason: s.coherence_reason,
            label: s.label,
            epoch: s.epoch,
            cut_time: time(s.cut_time_ms),
            size,
            block_size,
            scratches: scratches(s.scratches),
        }
    }
}
