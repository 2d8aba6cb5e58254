//! What is true of every manifest that is written; checked before each put and in each test that crashes something.

use std::collections::HashSet;

use thiserror::Error;
use tidemark_block::{GenerationId, SegmentId};

use super::{CONDEMNED_MAX, CondemnedObject, GENERATIONS_MAX, Manifest, PAGE_RECORDS, PAGES_MAX};

/// A manifest that must not be written.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Violation {
    /// Numbers of generations don't rise, or reach the next one.
    #[error("generation {0} is not above the one before it, or not below the next")]
    Order(GenerationId),
    /// An interval became two generations.
    #[error("interval of generation {0} has become a generation before")]
    Doubled(GenerationId),
    /// A cut time runs backwards.
    #[error("generation {0} was cut before its parent")]
    CutTime(GenerationId),
    /// The newest generation's receipt is gone.
    #[error("the receipt of generation {0} is not kept")]
    Receipt(GenerationId),
    /// A segment is named twice, or named and condemned.
    #[error("segment {0} is named twice")]
    Named(SegmentId),
    /// A segment holds a version above the newest generation.
    #[error("segment {0} holds versions of no generation")]
    Future(SegmentId),
    /// A list is longer than its format allows.
    #[error("{0} has too many items")]
    Length(&'static str),
    /// The next version doesn't follow the last.
    #[error("version {found} does not follow {last}")]
    Version {
        /// The last.
        last: u64,
        /// The next.
        found: u64,
    },
    /// A term or a generation number ran backwards.
    #[error("term or next generation runs backwards")]
    Backwards,
}

/// Checks a manifest by itself and, where there is one, against its predecessor.
///
/// # Errors
/// The first rule it breaks.
pub fn check(next: &Manifest, last: Option<&Manifest>) -> Result<(), Violation> {
    lengths(next)?;
    generations(next)?;
    segments(next)?;
    let Some(last) = last else { return Ok(()) };
    if next.version != last.version + 1 {
        return Err(Violation::Version {
            last: last.version,
            found: next.version,
        });
    }
    if next.term < last.term || next.next_generation < last.next_generation {
        return Err(Violation::Backwards);
    }
    Ok(())
}

fn lengths(manifest: &Manifest) -> Result<(), Violation> {
    let limits = [
        (manifest.generations.len(), GENERATIONS_MAX, "generations"),
        (manifest.pages.len(), PAGES_MAX, "pages"),
        (manifest.tail.len(), PAGE_RECORDS, "tail"),
        (manifest.condemned.len(), CONDEMNED_MAX, "condemned"),
    ];
    match limits.iter().find(|(length, most, _)| length > most) {
        Some((_, _, what)) => Err(Violation::Length(what)),
        None => Ok(()),
    }
}

fn generations(manifest: &Manifest) -> Result<(), Violation> {
    for pair in manifest.generations.windows(2) {
        let (older, newer) = (&pair[0], &pair[1]);
        if newer.id <= older.id {
            return Err(Violation::Order(newer.id));
        }
        if newer.cut_time_ms < older.cut_time_ms {
            return Err(Violation::CutTime(newer.id));
        }
    }
    if let Some(head) = manifest.head() {
        if head.id >= manifest.next_generation || head.parent >= head.id {
            return Err(Violation::Order(head.id));
        }
        if manifest
            .committed(head.interval)
            .is_none_or(|recent| recent.generation != head.id)
        {
            return Err(Violation::Receipt(head.id));
        }
    }
    let mut seen = HashSet::new();
    match manifest
        .recent
        .iter()
        .find(|recent| !seen.insert(recent.interval))
    {
        Some(recent) => Err(Violation::Doubled(recent.generation)),
        None => Ok(()),
    }
}

fn segments(manifest: &Manifest) -> Result<(), Violation> {
    let condemned = manifest
        .condemned
        .iter()
        .filter_map(|condemned| match condemned.object {
            CondemnedObject::Segment(id) => Some(id),
            CondemnedObject::Page(_) => None,
        });
    let mut seen = HashSet::new();
    for id in manifest
        .tail
        .iter()
        .map(|segment| segment.id)
        .chain(condemned)
    {
        if !seen.insert(id) {
            return Err(Violation::Named(id));
        }
    }
    match manifest
        .tail
        .iter()
        .find(|segment| segment.sequences.1.get() >= manifest.next_generation.get())
    {
        Some(segment) => Err(Violation::Future(segment.id)),
        None => Ok(()),
    }
}
