//! Pages of segment records, and edits of the set of segments.

use std::collections::{HashMap, HashSet};

use tidemark_block::{
    BlockIndex, Checksum128, Extent, SegmentId, Sequence,
    wire::{self, Reader},
    xxh3_128,
};

use super::{
    Condemned, CondemnedObject, Manifest, PAGE_MAGIC, PAGE_RECORDS, PageRef, VERSION,
    codec::{put_list, take_list},
};
use crate::segment::{FormatError, SegmentRecord, misplaced};

/// A page that must be durable before the manifest that names it is put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPage {
    /// Its name.
    pub name: Checksum128,
    /// The object.
    pub bytes: Vec<u8>,
    /// Its content.
    pub records: Vec<SegmentRecord>,
}

/// A page's bytes.
#[must_use]
pub fn encode_page(records: &[SegmentRecord]) -> Vec<u8> {
    let mut out = Vec::new();
    put_list(&mut out, records.iter(), |out, record| record.encode(out));
    wire::seal(PAGE_MAGIC, VERSION, &out)
}

/// Reads the page that is named `name`.
///
/// # Errors
/// The bytes are damaged, or another page's.
pub fn decode_page(bytes: &[u8], name: Checksum128) -> Result<Vec<SegmentRecord>, FormatError> {
    let found = xxh3_128(bytes);
    if found != name {
        return Err(misplaced(&found, &name));
    }
    let (_, payload) = wire::unseal(PAGE_MAGIC, VERSION, bytes)?;
    let mut r = Reader::new(payload);
    let records = take_list(&mut r, PAGE_RECORDS, SegmentRecord::decode)?;
    r.end()?;
    Ok(records)
}

fn new_page(records: Vec<SegmentRecord>) -> (PageRef, NewPage) {
    let bytes = encode_page(&records);
    let name = xxh3_128(&bytes);
    let start = records
        .iter()
        .map(|r| r.blocks.start())
        .min()
        .unwrap_or(BlockIndex::ZERO);
    let end = records
        .iter()
        .map(|r| r.blocks.end())
        .max()
        .unwrap_or(start);
    let reference = PageRef {
        name,
        count: u32::try_from(records.len()).unwrap_or(u32::MAX),
        sequences: (
            records
                .iter()
                .map(|r| r.sequences.0)
                .min()
                .unwrap_or(Sequence::ZERO),
            records
                .iter()
                .map(|r| r.sequences.1)
                .max()
                .unwrap_or(Sequence::ZERO),
        ),
        blocks: Extent::between(start, end),
        stored_bytes: records.iter().map(|r| r.file_len).sum(),
        data_blocks: records.iter().map(|r| r.data_blocks.get()).sum(),
    };
    let page = NewPage {
        name,
        bytes,
        records,
    };
    (reference, page)
}

impl Manifest {
    /// Moves records from the tail to pages until the rest fits.
    pub(super) fn spill(&mut self) -> Vec<NewPage> {
        let mut made = Vec::new();
        while self.tail.len() > PAGE_RECORDS {
            let rest = self.tail.split_off(PAGE_RECORDS);
            let (reference, page) = new_page(std::mem::replace(&mut self.tail, rest));
            self.pages.push(reference);
            made.push(page);
        }
        made
    }

    /// Replaces segments: condemns `victims`, names `added`. `contents` holds the records of every page that names
    /// a victim; these pages are condemned, and what is left of them moves to the tail or to new pages, which must be
    /// put before the manifest.
    pub fn replace_segments(
        &mut self,
        victims: &HashSet<SegmentId>,
        added: Vec<SegmentRecord>,
        contents: &HashMap<Checksum128, Vec<SegmentRecord>>,
    ) -> Vec<NewPage> {
        let (version, time_ms) = (self.version, self.written_ms);
        let mut condemned = Vec::new();
        let mut condemn = |object, length| {
            condemned.push(Condemned {
                object,
                length,
                version,
                time_ms,
            });
        };
        let mut sort = |record: &SegmentRecord| {
            let victim = victims.contains(&record.id);
            if victim {
                condemn(CondemnedObject::Segment(record.id), record.file_len);
            }
            !victim
        };
        self.tail.retain(&mut sort);
        let mut rest = Vec::new();
        let mut dropped = Vec::new();
        self.pages.retain(|page| {
            let Some(records) = contents.get(&page.name) else {
                return true;
            };
            if !records.iter().any(|record| victims.contains(&record.id)) {
                return true;
            }
            rest.extend(records.iter().copied().filter(&mut sort));
            dropped.push(page.name);
            false
        });
        let lengths = dropped.into_iter().map(|name| {
            let records = contents.get(&name).map_or(0, Vec::len);
            (name, encoded_page_len(records))
        });
        for (name, length) in lengths {
            condemn(CondemnedObject::Page(name), length);
        }
        self.tail.extend(rest);
        self.tail.extend(added);
        let made = self.spill();
        // A page with the same content is named again: it is not to be deleted.
        condemned.retain(|c| {
            !made
                .iter()
                .any(|page| c.object == CondemnedObject::Page(page.name))
        });
        self.condemned.retain(|c| {
            !made
                .iter()
                .any(|page| c.object == CondemnedObject::Page(page.name))
        });
        self.condemned.extend(condemned);
        made
    }
}

fn encoded_page_len(records: usize) -> u64 {
    (wire::ENVELOPE_LEN + 4 + records * crate::segment::RECORD_LEN) as u64
}
