//! What `--json` prints: one struct per object, made from the services' answers. `docs/CLI.md` lists the fields; a test
//! compares them. Fields are only ever added.

mod source;
mod stored;

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use tidemark_block::{Checksum128, VolumeId};
use tidemark_proto::common::v1::{self as common, Coherence, Trigger};

use crate::failure::Failure;

pub use source::{Scratch, Scrub, Snapshot, Uplink, Volume};
pub use stored::{Generation, Maintained, Receipt, StoredScrub, VaultVolume};

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

/// `tidemark health`; a service that was not asked for is left out.
#[derive(Debug, Serialize)]
pub struct Health {
    /// The capture service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capture: Option<ServiceHealth>,
    /// The vault service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vault: Option<ServiceHealth>,
}

/// Whether one of the services serves.
#[derive(Debug, Serialize)]
pub struct ServiceHealth {
    /// Where it was asked.
    pub url: String,
    /// Whether it says that it serves.
    pub serving: bool,
    /// Why it can't be said to serve; empty where it does.
    pub problem: String,
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
