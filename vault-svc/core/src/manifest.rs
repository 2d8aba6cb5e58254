//! Manifests: the durable root of a volume. What no manifest names does not exist.
//!
//! Each version is an object of its own, put only if absent. A version is a head (this structure) and immutable
//! pages of segment records, named by their checksum; a commit writes the head and, once in 512 segments, a page.
//! The history of one volume is linear: version k + 1 is made from version k and from nothing else.

mod codec;
mod invariants;
mod pages;

use std::collections::VecDeque;

use thiserror::Error;
use tidemark_block::{
    BlockCount, Checksum128, Coherence, CutReason, Epoch, Extent, GenerationId, Geometry,
    ImageDigest, IntervalId, Receipt, Sequence, Trigger, VolumeId, WriterTerm, xxh3_128,
};

pub use codec::{Current, StoreMarker};
pub use invariants::{Violation, check as check_invariants};
pub use pages::{NewPage, decode_page, encode_page};

use crate::segment::SegmentRecord;

/// First bytes of a manifest.
pub const MANIFEST_MAGIC: [u8; 8] = *b"TMVMANIF";
/// First bytes of a page of segment records.
pub const PAGE_MAGIC: [u8; 8] = *b"TMVPAGE\0";
/// First bytes of the advisory object.
pub const CURRENT_MAGIC: [u8; 8] = *b"TMVCURNT";
/// First bytes of the store's marker.
pub const MARKER_MAGIC: [u8; 8] = *b"TMVSTORE";
/// The version of a manifest that this release writes, and the newest it reads.
pub const MANIFEST_VERSION: u16 = 2;
/// The same of the others.
pub const VERSION: u16 = 1;
/// Segment records in the head before they move to a page, and in a page.
pub const PAGE_RECORDS: usize = 512;
/// The most pages of a volume; with the records of a page the most segments.
pub const PAGES_MAX: usize = 16_384;
/// Committed intervals whose receipts are kept beyond their generation.
pub const RECENT_MAX: usize = 256;
/// The most generations kept.
pub const GENERATIONS_MAX: usize = 1_024;
/// The most condemned objects; reclaim waits when there are so many.
pub const CONDEMNED_MAX: usize = 4_096;
/// The most bytes of a volume's or a source's name.
pub const NAME_LEN_MAX: usize = 255;
/// Bytes of a generation's record.
pub const GENERATION_LEN: usize = 120;
/// Bytes of a recent interval's record.
pub const RECENT_LEN: usize = 88;
/// Bytes of a page's reference.
pub const PAGE_REF_LEN: usize = 72;
/// Bytes of a condemned object's record.
pub const CONDEMNED_LEN: usize = 48;

/// How and why a cut was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutKind {
    /// How trustworthy it is for the workload.
    pub coherence: Coherence,
    /// Why it was made.
    pub trigger: Trigger,
}

/// A retained generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Its number.
    pub id: GenerationId,
    /// The generation its interval changed; zero for the first.
    pub parent: GenerationId,
    /// The term of the source that shipped it.
    pub term: WriterTerm,
    /// The interval that became it.
    pub interval: IntervalId,
    /// Digest of the whole image.
    pub digest: ImageDigest,
    /// When the source cut it. Never before the cut of an older generation.
    pub cut_time_ms: u64,
    /// When the vault committed it.
    pub committed_time_ms: u64,
    /// Kind of cut.
    pub cut: CutKind,
    /// Why it was not more trustworthy.
    pub reason: CutReason,
    /// Blocks that the interval changed.
    pub changed_blocks: u64,
    /// Encoded bytes of its frames.
    pub frame_bytes: u64,
    /// The source's epoch that the cut closed.
    pub epoch: Epoch,
    /// Length of the image in bytes.
    pub length: u64,
}

impl Generation {
    /// The sequence up to which entries belong to its image.
    #[must_use]
    pub const fn sequence(&self) -> Sequence {
        Sequence::new(self.id.get())
    }

    /// What is remembered of it beyond its retirement.
    #[must_use]
    pub fn recent(&self) -> Recent {
        Recent {
            interval: self.interval,
            generation: self.id,
            digest: self.digest,
            cut_time_ms: self.cut_time_ms,
            committed_time_ms: self.committed_time_ms,
            cut: self.cut,
            reason: self.reason.clone(),
            changed_blocks: self.changed_blocks,
            frame_bytes: self.frame_bytes,
            epoch: self.epoch,
        }
    }
}

/// A committed interval: all that its receipt says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recent {
    /// Its id.
    pub interval: IntervalId,
    /// The generation it became.
    pub generation: GenerationId,
    /// Digest of the whole image.
    pub digest: ImageDigest,
    /// When the source cut it.
    pub cut_time_ms: u64,
    /// When the vault committed it.
    pub committed_time_ms: u64,
    /// Kind of cut.
    pub cut: CutKind,
    /// Why it was not more trustworthy.
    pub reason: CutReason,
    /// Blocks that it changed.
    pub changed_blocks: u64,
    /// Encoded bytes of its frames.
    pub frame_bytes: u64,
    /// The source's epoch that the cut closed.
    pub epoch: Epoch,
}

impl Recent {
    /// The receipt, as it was given.
    #[must_use]
    pub fn receipt(&self, volume: VolumeId) -> Receipt {
        Receipt {
            volume,
            interval: self.interval,
            generation: self.generation,
            created: true,
            image_digest: self.digest,
            changed_blocks: BlockCount::new(self.changed_blocks),
            frame_bytes: self.frame_bytes,
            cut_time_ms: self.cut_time_ms,
            committed_time_ms: self.committed_time_ms,
            coherence: self.cut.coherence,
            reason: self.reason.clone(),
            trigger: self.cut.trigger,
        }
    }
}

/// Names an immutable page of segment records, and sums it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRef {
    /// Checksum of the page's bytes, which is its name.
    pub name: Checksum128,
    /// Records in it.
    pub count: u32,
    /// Least and greatest sequence.
    pub sequences: (Sequence, Sequence),
    /// From the first block to behind the last one.
    pub blocks: Extent,
    /// Bytes of the segments' objects.
    pub stored_bytes: u64,
    /// Blocks with data.
    pub data_blocks: u64,
}

/// What a condemned object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CondemnedObject {
    /// A segment.
    Segment(tidemark_block::SegmentId),
    /// A page.
    Page(Checksum128),
}

/// An object that no image needs any more, and that is deleted once no reader can hold an older version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condemned {
    /// Which.
    pub object: CondemnedObject,
    /// Bytes of it.
    pub length: u64,
    /// The manifest version that no longer names it.
    pub version: u64,
    /// When that was.
    pub time_ms: u64,
}

/// One version of a volume's manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The volume.
    pub volume: VolumeId,
    /// Counted from 1.
    pub version: u64,
    /// When it was written.
    pub written_ms: u64,
    /// The shape of the volume.
    pub geometry: Geometry,
    /// Its name at the source.
    pub name: String,
    /// The source's name.
    pub source: String,
    /// The current writer term.
    pub term: WriterTerm,
    /// With which it was asked for.
    pub nonce: [u8; 16],
    /// The number the next generation gets; numbers are never used twice.
    pub next_generation: GenerationId,
    /// The retained ones, oldest first.
    pub generations: Vec<Generation>,
    /// The last committed intervals, oldest first.
    pub recent: VecDeque<Recent>,
    /// Pages of segment records.
    pub pages: Vec<PageRef>,
    /// Segment records that are in no page yet.
    pub tail: Vec<SegmentRecord>,
    /// What may be deleted soon.
    pub condemned: Vec<Condemned>,
}

/// Why a request for a term is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TermError {
    /// Another writer owns the volume.
    #[error("term {asked} is not the current one: {current} is")]
    Fenced {
        /// The term the source last held.
        asked: WriterTerm,
        /// The current one.
        current: WriterTerm,
    },
    /// The volume has another shape.
    #[error("the vault knows the volume as {known}, the source has it as {asked}")]
    Geometry {
        /// At the vault.
        known: Geometry,
        /// At the source.
        asked: Geometry,
    },
    /// The source held a term of this volume, but this vault has never seen it.
    #[error("the volume is not known here, though its source held term {0}")]
    Unknown(WriterTerm),
}

/// What a source says when it asks for a term.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TermRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Its name at the source.
    pub name: String,
    /// The source's name.
    pub source: String,
    /// Its shape.
    pub geometry: Geometry,
    /// The term this source last held; zero where it never had one.
    pub last_term: WriterTerm,
    /// Durable at the source: the same nonce gets the same answer.
    pub nonce: [u8; 16],
}

/// Grants a term: the manifest to write, or `None` where the same nonce was granted already.
///
/// # Errors
/// The source is not the current writer, or its volume has another shape.
pub fn grant_term(
    known: Option<&Manifest>,
    request: &TermRequest,
    now_ms: u64,
) -> Result<Option<Manifest>, TermError> {
    let Some(manifest) = known else {
        return if request.last_term == WriterTerm::ZERO {
            Ok(Some(Manifest::first(request, now_ms)))
        } else {
            Err(TermError::Unknown(request.last_term))
        };
    };
    if manifest.geometry != request.geometry {
        return Err(TermError::Geometry {
            known: manifest.geometry,
            asked: request.geometry,
        });
    }
    if manifest.nonce == request.nonce {
        return Ok(None);
    }
    if manifest.term != request.last_term {
        return Err(TermError::Fenced {
            asked: request.last_term,
            current: manifest.term,
        });
    }
    let mut next = manifest.successor(now_ms);
    next.term = manifest.term.next();
    next.nonce = request.nonce;
    next.name.clone_from(&request.name);
    next.source.clone_from(&request.source);
    Ok(Some(next))
}

impl Manifest {
    fn first(request: &TermRequest, now_ms: u64) -> Self {
        Self {
            volume: request.volume,
            version: 1,
            written_ms: now_ms,
            geometry: request.geometry,
            name: request.name.clone(),
            source: request.source.clone(),
            term: WriterTerm::new(1),
            nonce: request.nonce,
            next_generation: GenerationId::new(1),
            generations: Vec::new(),
            recent: VecDeque::new(),
            pages: Vec::new(),
            tail: Vec::new(),
            condemned: Vec::new(),
        }
    }

    /// The version after this one, still with the same content.
    #[must_use]
    pub fn successor(&self, now_ms: u64) -> Self {
        Self {
            version: self.version + 1,
            written_ms: now_ms.max(self.written_ms),
            ..self.clone()
        }
    }

    /// The newest generation.
    #[must_use]
    pub fn head(&self) -> Option<&Generation> {
        self.generations.last()
    }

    /// Its number; zero stands for the all-zero image.
    #[must_use]
    pub fn head_id(&self) -> GenerationId {
        self.head().map_or(GenerationId::ZERO, |head| head.id)
    }

    /// A retained generation.
    #[must_use]
    pub fn generation(&self, id: GenerationId) -> Option<&Generation> {
        self.generations
            .iter()
            .find(|generation| generation.id == id)
    }

    /// What became of an interval, where it was committed and is still remembered.
    #[must_use]
    pub fn committed(&self, interval: IntervalId) -> Option<&Recent> {
        self.recent
            .iter()
            .rev()
            .find(|recent| recent.interval == interval)
    }

    /// Names a new generation and its segments; returns the pages to put before the manifest.
    pub fn push_generation(
        &mut self,
        generation: Generation,
        segments: Vec<SegmentRecord>,
    ) -> Vec<NewPage> {
        self.recent.push_back(generation.recent());
        while self.recent.len() > RECENT_MAX {
            self.recent.pop_front();
        }
        self.next_generation = generation.id.next();
        self.generations.push(generation);
        self.tail.extend(segments);
        self.spill()
    }

    /// The sequences of the retained images, ascending.
    #[must_use]
    pub fn retained(&self) -> Vec<Sequence> {
        self.generations.iter().map(Generation::sequence).collect()
    }

    /// Which segments the image at `newest` is read from, as one checksum. Commits of later generations leave it as it
    /// is (unless they move records to a page); reclaim, which replaces segments, does not.
    #[must_use]
    pub fn chain(&self, newest: Sequence) -> Checksum128 {
        let mut names = Vec::new();
        for page in self.pages.iter().filter(|page| page.sequences.0 <= newest) {
            names.extend_from_slice(page.name.as_bytes());
        }
        for record in self.tail.iter().filter(|r| r.sequences.0 <= newest) {
            record.encode(&mut names);
        }
        xxh3_128(&names)
    }

    /// Bytes of all segments that it names, condemned ones included.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let condemned = self
            .condemned
            .iter()
            .filter(|condemned| matches!(condemned.object, CondemnedObject::Segment(_)))
            .map(|condemned| condemned.length);
        self.named_bytes() + condemned.sum::<u64>()
    }

    /// Bytes of the segments that images are read from.
    #[must_use]
    pub fn named_bytes(&self) -> u64 {
        let paged: u64 = self.pages.iter().map(|page| page.stored_bytes).sum();
        paged
            + self
                .tail
                .iter()
                .map(|segment| segment.file_len)
                .sum::<u64>()
    }

    /// Number of segments that images are read from.
    #[must_use]
    pub fn segment_count(&self) -> u64 {
        self.pages
            .iter()
            .map(|page| u64::from(page.count))
            .sum::<u64>()
            + self.tail.len() as u64
    }
}
