//! What `--json` prints: one struct per object, made from the services' answers. `docs/CLI.md` lists the fields; a test
//! compares them. Fields are only ever added.

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use tidemark_block::{Checksum128, VolumeId};
use tidemark_proto::{
    capture::v1 as capture,
    common::v1::{self as common, Coherence, Trigger},
    vault::v1 as vault,
};

use crate::failure::Failure;

/// A point in time, UTC; `null` where there is none yet.
pub type Time = Option<Moment>;

/// To the millisecond, always with three digits, so that the texts have the order of the times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub Timestamp);

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:.3}", self.0))
    }
}

/// Milliseconds since the Unix epoch as a time; 0 is none.
#[must_use]
pub fn time(ms: u64) -> Time {
    if ms == 0 {
        return None;
    }
    i64::try_from(ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
        .map(Moment)
}

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

/// What the vault answered to a commit.
#[derive(Debug, Clone, Serialize)]
pub struct Receipt {
    /// The volume, as it was asked for.
    pub volume: String,
    /// The generation that the interval became, or the one that is still current.
    pub generation: u64,
    /// False where nothing had changed and no generation was made.
    pub created: bool,
    /// 32 hexadecimal digits.
    pub image_digest: String,
    /// Blocks in the interval.
    pub changed_blocks: u64,
    /// Encoded bytes of all frames.
    pub bytes_sent: u64,
    /// `crash`, `lull`, `flushed` or `quiesced`.
    pub coherence: &'static str,
    /// Why it is no better; empty where that is not known.
    pub coherence_reason: String,
    /// Why it was cut.
    pub trigger: &'static str,
    /// When it was cut.
    pub cut_time: Time,
    /// When it was committed.
    pub committed_time: Time,
    /// UUID.
    pub interval_id: String,
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
}

/// A generation.
#[derive(Debug, Serialize)]
pub struct Generation {
    /// The number that the other commands take.
    pub generation: u64,
    /// The generation it was made from; 0 for the first.
    pub parent: u64,
    /// The writer term that made it.
    pub term: u64,
    /// 32 hexadecimal digits.
    pub image_digest: String,
    /// When it was cut.
    pub cut_time: Time,
    /// When it was committed.
    pub committed_time: Time,
    /// The image was still this one at this time.
    pub current_through: Time,
    /// `crash`, `lull`, `flushed` or `quiesced`.
    pub coherence: &'static str,
    /// Why it is no better; empty where that is not known.
    pub coherence_reason: String,
    /// Why it was cut.
    pub trigger: &'static str,
    /// Blocks in its interval.
    pub changed_blocks: u64,
    /// Encoded bytes of its interval's frames.
    pub bytes_sent: u64,
    /// The source's epoch that the cut closed.
    pub epoch: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub block_size: u32,
    /// UUID.
    pub interval_id: String,
    /// The vault's scrub has found that it can't be read whole.
    pub damaged: bool,
}

/// A volume at the vault.
#[derive(Debug, Serialize)]
pub struct VaultVolume {
    /// Its name at the source.
    pub volume: String,
    /// UUID.
    pub id: String,
    /// Host or pod that ships it.
    pub source: String,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub block_size: u32,
    /// Writer term.
    pub term: u64,
    /// The newest generation; 0 before the first.
    pub generation: u64,
    /// How many are retained.
    pub generations: u64,
    /// Bytes of all its segments.
    pub stored_bytes: u64,
    /// The newest generation was still current at this time.
    pub current_through: Time,
    /// The vault's scrub.
    pub scrub: StoredScrub,
}

/// The vault's scrub of one volume.
#[derive(Debug, Serialize)]
pub struct StoredScrub {
    /// Full passes since the service started.
    pub passes: u64,
    /// When the last one ended.
    pub completed: Time,
    /// Of the pass under way.
    pub bytes_done: u64,
    /// Of the pass under way.
    pub bytes_total: u64,
    /// Objects that don't match their checksums, as far as known. Anything but 0 wants a look at the store's disk.
    pub damaged_objects: u64,
}

/// An image that was written to a file.
#[derive(Debug, Serialize)]
pub struct Written {
    /// The volume, as it was asked for.
    pub volume: String,
    /// Only of `restore`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Only of `snapshot read`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<u64>,
    /// Only of `snapshot read --since`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// The file.
    pub output: String,
    /// Bytes of the image.
    pub size: u64,
    /// Bytes that are not holes.
    pub data_bytes: u64,
    /// Computed over what was written and equal to what the service promised; `null` with `--since`.
    pub image_digest: Option<String>,
    /// Milliseconds.
    pub took_ms: u64,
}

/// `tidemark maintain`, per volume.
#[derive(Debug, Serialize)]
pub struct Maintained {
    /// Its name at the source.
    pub volume: String,
    /// UUID.
    pub id: String,
    /// Generations dropped from the manifest.
    pub retired_generations: Vec<u64>,
    /// Segments that nothing needs any more, deleted after the readers' grace.
    pub condemned_segments: u64,
    /// Live bytes moved out of mostly dead segments.
    pub rewritten_bytes: u64,
    /// Segments deleted.
    pub deleted_segments: u64,
    /// Bytes.
    pub freed_bytes: u64,
    /// Bytes.
    pub stored_bytes: u64,
    /// Bytes.
    pub live_bytes: u64,
}

/// `tidemark status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The capture service.
    pub capture: Service<Volume>,
    /// The vault service.
    pub vault: Service<VaultVolume>,
}

/// One of the services.
#[derive(Debug, Serialize)]
pub struct Service<V> {
    /// Where it was looked for.
    pub url: String,
    /// Whether it answered.
    pub reachable: bool,
    /// Why it did not; empty where it did.
    pub problem: String,
    /// Its release; empty where it did not answer.
    pub version: String,
    /// Its volumes.
    pub volumes: Vec<V>,
}

/// `tidemark up`, once both services answer.
#[derive(Debug, Serialize)]
pub struct Endpoints {
    /// URL for `--capture`.
    pub capture: String,
    /// URL for `--vault`.
    pub vault: String,
    /// Where volumes are served; the export name is the volume's name.
    pub nbd: String,
    /// Where volumes and snapshots are files; empty where nowhere.
    pub fuse_mount: String,
    /// Folder of all state.
    pub state: String,
}

/// The UUID in 16 bytes off the wire.
pub fn uuid(bytes: &[u8]) -> Result<String, Failure> {
    let bytes = <[u8; 16]>::try_from(bytes)
        .map_err(|_| Failure::protocol(format_args!("an identity of {} bytes", bytes.len())))?;
    Ok(VolumeId::from_bytes(bytes).to_string())
}

/// The digest in 16 bytes off the wire, as 32 hexadecimal digits; empty where there is none.
pub fn digest(bytes: &[u8]) -> Result<String, Failure> {
    if bytes.is_empty() {
        return Ok(String::new());
    }
    let bytes = <[u8; 16]>::try_from(bytes)
        .map_err(|_| Failure::protocol(format_args!("a digest of {} bytes", bytes.len())))?;
    Ok(Checksum128::from_bytes(bytes).to_string())
}

fn shape(geometry: Option<&common::Geometry>) -> (u64, u32) {
    geometry.map_or((0, 0), |g| (g.length, g.block_size))
}

/// As it is printed.
#[must_use]
pub const fn coherence(value: Coherence) -> &'static str {
    match value {
        Coherence::Unspecified => "unknown",
        Coherence::Crash => "crash",
        Coherence::Lull => "lull",
        Coherence::Flushed => "flushed",
        Coherence::Quiesced => "quiesced",
    }
}

/// A grade and why it is no better, for people.
#[must_use]
pub fn graded(coherence: &str, reason: &str) -> String {
    if reason.is_empty() {
        coherence.to_owned()
    } else {
        format!("{coherence} ({reason})")
    }
}

/// As it is printed.
#[must_use]
pub const fn trigger(value: Trigger) -> &'static str {
    match value {
        Trigger::Unspecified => "unknown",
        Trigger::Initial => "initial",
        Trigger::IntervalMax => "interval_max",
        Trigger::ChangedBlocksMax => "changed_blocks_max",
        Trigger::Request => "request",
        Trigger::Resync => "resync",
        Trigger::Schedule => "schedule",
        Trigger::Hint => "hint",
    }
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

impl Receipt {
    /// From the vault's receipt.
    pub fn new(volume: &str, r: &common::Receipt) -> Result<Self, Failure> {
        Ok(Self {
            volume: volume.to_owned(),
            generation: r.generation,
            created: r.created,
            image_digest: digest(&r.image_digest)?,
            changed_blocks: r.changed_blocks,
            bytes_sent: r.frame_bytes,
            coherence: coherence(r.coherence()),
            coherence_reason: r.coherence_reason.clone(),
            trigger: trigger(r.trigger()),
            cut_time: time(r.cut_time_ms),
            committed_time: time(r.committed_time_ms),
            interval_id: uuid(&r.interval_id)?,
        })
    }
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
        }
    }
}

impl Generation {
    /// From the vault's answer.
    pub fn new(g: &vault::Generation) -> Result<Self, Failure> {
        let (size, block_size) = shape(g.geometry.as_ref());
        Ok(Self {
            generation: g.generation,
            parent: g.parent,
            term: g.term,
            image_digest: digest(&g.image_digest)?,
            cut_time: time(g.cut_time_ms),
            committed_time: time(g.committed_time_ms),
            current_through: time(g.current_through_ms),
            coherence: coherence(g.coherence()),
            coherence_reason: g.coherence_reason.clone(),
            trigger: trigger(g.trigger()),
            changed_blocks: g.changed_blocks,
            bytes_sent: g.frame_bytes,
            epoch: g.epoch,
            size,
            block_size,
            interval_id: uuid(&g.interval_id)?,
            damaged: g.damaged,
        })
    }
}

impl VaultVolume {
    /// From the vault's answer.
    pub fn new(v: vault::Volume) -> Result<Self, Failure> {
        let (size, block_size) = shape(v.geometry.as_ref());
        Ok(Self {
            id: uuid(&v.volume_id)?,
            volume: v.name,
            source: v.source_name,
            size,
            block_size,
            term: v.term,
            generation: v.head_generation,
            generations: v.generations,
            stored_bytes: v.stored_bytes,
            current_through: time(v.current_through_ms),
            scrub: StoredScrub::new(&v.scrub.unwrap_or_default()),
        })
    }
}

impl StoredScrub {
    fn new(s: &vault::ScrubState) -> Self {
        Self {
            passes: s.passes,
            completed: time(s.completed_ms),
            bytes_done: s.bytes_done,
            bytes_total: s.bytes_total,
            damaged_objects: s.damaged_objects,
        }
    }
}

impl Maintained {
    /// From the vault's answer.
    pub fn new(v: vault::MaintainedVolume) -> Result<Self, Failure> {
        Ok(Self {
            id: uuid(&v.volume_id)?,
            volume: v.name,
            retired_generations: v.retired_generations,
            condemned_segments: v.condemned_segments,
            rewritten_bytes: v.rewritten_bytes,
            deleted_segments: v.deleted_segments,
            freed_bytes: v.freed_bytes,
            stored_bytes: v.stored_bytes,
            live_bytes: v.live_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_of_times_have_their_order() {
        let texts = [1_793_337_404_000, 1_793_337_404_090, 1_793_337_404_900]
            .map(|ms| serde_json::to_string(&time(ms)).unwrap());
        assert_eq!(texts[0], "\"2026-10-30T05:16:44.000Z\"");
        assert!(texts.is_sorted());
        assert_eq!(serde_json::to_string(&time(0)).unwrap(), "null");
    }
}
