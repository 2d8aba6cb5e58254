//! What the vault tells: receipts, generations, volumes with their scrub and their upkeep.

use serde::Serialize;
use tidemark_proto::{common::v1 as common, vault::v1 as vault};

use super::{Time, coherence, digest, shape, time, trigger, uuid};
use crate::failure::Failure;

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
