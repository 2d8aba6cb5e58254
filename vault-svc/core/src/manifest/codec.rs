//! Bytes of manifests, of the advisory object and of the store's marker.

use std::collections::BTreeMap;

use tidemark_block::{
    BlockSize, Checksum128, Coherence, CutReason, Epoch, GenerationId, Geometry, ImageDigest,
    IntervalId, SegmentId, Sequence, Trigger, VolumeId, WriterTerm,
    wire::{self, Reader, WireError},
};

use super::{
    CONDEMNED_MAX, CURRENT_MAGIC, Condemned, CondemnedObject, CutKind, GENERATIONS_MAX, Generation,
    MANIFEST_MAGIC, MANIFEST_VERSION, MARKER_MAGIC, Manifest, NAME_LEN_MAX, PAGE_RECORDS,
    PAGES_MAX, PageRef, RECENT_MAX, Recent, VERSION,
};
use crate::segment::{FILE_LEN_MAX, FormatError, SegmentRecord, misplaced, read_extent};

impl Manifest {
    /// As bytes of an object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(self.volume.as_bytes());
        put_words(
            &mut out,
            &[self.version, self.written_ms, self.geometry.length()],
        );
        out.extend_from_slice(&self.geometry.block_size().get().to_le_bytes());
        put_name(&mut out, &self.name);
        put_name(&mut out, &self.source);
        put_words(&mut out, &[self.term.get()]);
        out.extend_from_slice(&self.nonce);
        put_words(&mut out, &[self.next_generation.get()]);
        put_list(&mut out, self.generations.iter(), put_generation);
        put_list(&mut out, self.recent.iter(), put_recent);
        put_list(&mut out, self.pages.iter(), put_page_ref);
        put_list(&mut out, self.tail.iter(), |out, segment| {
            segment.encode(out)
        });
        put_list(&mut out, self.condemned.iter(), put_condemned);
        put_list(&mut out, self.reasons().into_iter(), |out, (id, reason)| {
            put_words(out, &[id.get()]);
            reason.encode(out);
        });
        wire::seal(MANIFEST_MAGIC, MANIFEST_VERSION, &out)
    }

    /// Why cuts were not more trustworthy, of each generation of which it is known, retained or recent.
    fn reasons(&self) -> BTreeMap<GenerationId, &CutReason> {
        let recent = self.recent.iter().map(|r| (r.generation, &r.reason));
        let retained = self.generations.iter().map(|g| (g.id, &g.reason));
        recent
            .chain(retained)
            .filter(|(_, reason)| !reason.is_empty())
            .collect()
    }

    fn set_reasons(&mut self, reasons: &[(GenerationId, CutReason)]) -> Result<(), WireError> {
        let of = |id: GenerationId| {
            let found = reasons.binary_search_by_key(&id, |(id, _)| *id);
            found.map_or_else(|_| CutReason::default(), |at| reasons[at].1.clone())
        };
        for generation in &mut self.generations {
            generation.reason = of(generation.id);
        }
        for recent in &mut self.recent {
            recent.reason = of(recent.generation);
        }
        // In order, none empty, none of a generation that isn't known: there is one encoding.
        if self
            .reasons()
            .into_iter()
            .eq(reasons.iter().map(|(id, reason)| (*id, reason)))
        {
            Ok(())
        } else {
            Err(WireError::Range("reasons"))
        }
    }

    /// Reads the object that is named as version `version` of `volume`.
    ///
    /// # Errors
    /// The bytes are damaged, or another volume's or version's.
    pub fn decode(bytes: &[u8], volume: VolumeId, version: u64) -> Result<Self, FormatError> {
        let (written_by, payload) = wire::unseal(MANIFEST_MAGIC, MANIFEST_VERSION, bytes)?;
        let mut r = Reader::new(payload);
        let found = VolumeId::from_bytes(r.array()?);
        if found != volume {
            return Err(misplaced(&found, &volume));
        }
        let found = r.u64()?;
        if found != version {
            return Err(misplaced(
                &format!("version {found}"),
                &format!("version {version}"),
            ));
        }
        let written_ms = r.u64()?;
        let length = r.u64()?;
        let block_size = BlockSize::new(r.u32()?).map_err(|_| WireError::Range("block size"))?;
        let mut manifest = Self {
            volume,
            version,
            written_ms,
            geometry: Geometry::new(length, block_size)
                .map_err(|_| WireError::Range("geometry"))?,
            name: take_name(&mut r)?,
            source: take_name(&mut r)?,
            term: WriterTerm::new(r.u64()?),
            nonce: r.array()?,
            next_generation: GenerationId::new(r.u64()?),
            generations: take_list(&mut r, GENERATIONS_MAX, take_generation)?,
            recent: take_list(&mut r, RECENT_MAX, take_recent)?.into(),
            pages: take_list(&mut r, PAGES_MAX, take_page_ref)?,
            tail: take_list(&mut r, PAGE_RECORDS, SegmentRecord::decode)?,
            condemned: take_list(&mut r, CONDEMNED_MAX, take_condemned)?,
        };
        if written_by >= 2 {
            let reasons = take_list(&mut r, GENERATIONS_MAX + RECENT_MAX, take_reason)?;
            manifest.set_reasons(&reasons)?;
        }
        r.end()?;
        manifest.check_counters()?;
        Ok(manifest)
    }

    /// They only ever rise by one: there must be room to.
    fn check_counters(&self) -> Result<(), WireError> {
        let counters = [
            self.version,
            self.term.get(),
            self.next_generation.get(),
            self.generations.last().map_or(0, |newest| newest.id.get()),
        ];
        match counters.iter().max() {
            Some(most) if *most > COUNTER_MAX => Err(WireError::Range("counter of the manifest")),
            _ => Ok(()),
        }
    }
}

const COUNTER_MAX: u64 = 1 << 62;

pub(super) fn put_words(out: &mut Vec<u8>, words: &[u64]) {
    words
        .iter()
        .for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    let mut end = name.len().min(NAME_LEN_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    out.extend_from_slice(&u16::try_from(end).unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&name.as_bytes()[..end]);
}

fn take_name(r: &mut Reader<'_>) -> Result<String, WireError> {
    let length = usize::from(r.u16()?);
    if length > NAME_LEN_MAX {
        return Err(WireError::Range("name"));
    }
    let bytes = r.bytes(length)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| WireError::Range("name"))
}

pub(super) fn put_list<T>(
    out: &mut Vec<u8>,
    items: impl ExactSizeIterator<Item = T>,
    mut put: impl FnMut(&mut Vec<u8>, T),
) {
    out.extend_from_slice(&u32::try_from(items.len()).unwrap_or(u32::MAX).to_le_bytes());
    items.for_each(|item| put(out, item));
}

pub(super) fn take_list<T>(
    r: &mut Reader<'_>,
    most: usize,
    mut take: impl FnMut(&mut Reader<'_>) -> Result<T, WireError>,
) -> Result<Vec<T>, WireError> {
    let count = r.u32()? as usize;
    if count > most {
        return Err(WireError::Range("length of a list"));
    }
    (0..count).map(|_| take(r)).collect()
}

fn put_cut(out: &mut Vec<u8>, cut: CutKind) {
    out.extend_from_slice(&[cut.coherence.code(), cut.trigger.code(), 0, 0, 0, 0, 0, 0]);
}

fn take_cut(r: &mut Reader<'_>) -> Result<CutKind, WireError> {
    let [coherence, trigger, reserved @ ..] = r.array::<8>()?;
    if reserved != [0; 6] {
        return Err(WireError::Range("reserved field"));
    }
    Ok(CutKind {
        coherence: Coherence::from_code(coherence).ok_or(WireError::Range("coherence"))?,
        trigger: Trigger::from_code(trigger).ok_or(WireError::Range("trigger"))?,
    })
}

fn take_reason(r: &mut Reader<'_>) -> Result<(GenerationId, CutReason), WireError> {
    Ok((GenerationId::new(r.u64()?), CutReason::decode(r)?))
}

fn put_generation(out: &mut Vec<u8>, generation: &Generation) {
    put_words(
        out,
        &[
            generation.id.get(),
            generation.parent.get(),
            generation.term.get(),
        ],
    );
    out.extend_from_slice(generation.interval.as_bytes());
    out.extend_from_slice(generation.digest.as_bytes());
    put_words(out, &[generation.cut_time_ms, generation.committed_time_ms]);
    put_cut(out, generation.cut);
    put_words(
        out,
        &[
            generation.changed_blocks,
            generation.frame_bytes,
            generation.epoch.get(),
            generation.length,
        ],
    );
    put_words(out, &[0]);
}

fn take_generation(r: &mut Reader<'_>) -> Result<Generation, WireError> {
    let generation = Generation {
        id: GenerationId::new(r.u64()?),
        parent: GenerationId::new(r.u64()?),
        term: WriterTerm::new(r.u64()?),
        interval: IntervalId::from_bytes(r.array()?),
        digest: ImageDigest::from_bytes(r.array()?),
        cut_time_ms: r.u64()?,
        committed_time_ms: r.u64()?,
        cut: take_cut(r)?,
        reason: CutReason::default(),
        changed_blocks: r.u64()?,
        frame_bytes: r.u64()?,
        epoch: Epoch::new(r.u64()?),
        length: r.u64()?,
    };
    match r.u64()? {
        0 => Ok(generation),
        _ => Err(WireError::Range("reserved field")),
    }
}

fn put_recent(out: &mut Vec<u8>, recent: &Recent) {
    out.extend_from_slice(recent.interval.as_bytes());
    put_words(out, &[recent.generation.get()]);
    out.extend_from_slice(recent.digest.as_bytes());
    put_words(out, &[recent.cut_time_ms, recent.committed_time_ms]);
    put_cut(out, recent.cut);
    put_words(
        out,
        &[
            recent.changed_blocks,
            recent.frame_bytes,
            recent.epoch.get(),
        ],
    );
}

fn take_recent(r: &mut Reader<'_>) -> Result<Recent, WireError> {
    Ok(Recent {
        interval: IntervalId::from_bytes(r.array()?),
        generation: GenerationId::new(r.u64()?),
        digest: ImageDigest::from_bytes(r.array()?),
        cut_time_ms: r.u64()?,
        committed_time_ms: r.u64()?,
        cut: take_cut(r)?,
        reason: CutReason::default(),
        changed_blocks: r.u64()?,
        frame_bytes: r.u64()?,
        epoch: Epoch::new(r.u64()?),
    })
}

fn put_page_ref(out: &mut Vec<u8>, page: &PageRef) {
    out.extend_from_slice(page.name.as_bytes());
    out.extend_from_slice(&page.count.to_le_bytes());
    out.extend_from_slice(&0_u32.to_le_bytes());
    put_words(
        out,
        &[
            page.sequences.0.get(),
            page.sequences.1.get(),
            page.blocks.start().get(),
            page.blocks.end().get(),
            page.stored_bytes,
            page.data_blocks,
        ],
    );
}

fn take_page_ref(r: &mut Reader<'_>) -> Result<PageRef, WireError> {
    let name = Checksum128::from_bytes(r.array()?);
    let count = r.u32()?;
    if count as usize > PAGE_RECORDS || r.u32()? != 0 {
        return Err(WireError::Range("page reference"));
    }
    let page = PageRef {
        name,
        count,
        sequences: (Sequence::new(r.u64()?), Sequence::new(r.u64()?)),
        blocks: read_extent(r, "page's blocks")?,
        stored_bytes: r.u64()?,
        data_blocks: r.u64()?,
    };
    if page.stored_bytes > u64::from(count) * FILE_LEN_MAX {
        return Err(WireError::Range("bytes of a page"));
    }
    Ok(page)
}

fn put_condemned(out: &mut Vec<u8>, condemned: &Condemned) {
    let (kind, part, name) = match condemned.object {
        CondemnedObject::Segment(id) => (0_u32, id.part, *id.origin.as_bytes()),
        CondemnedObject::Page(name) => (1, 0, *name.as_bytes()),
    };
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&part.to_le_bytes());
    out.extend_from_slice(&name);
    put_words(
        out,
        &[condemned.length, condemned.version, condemned.time_ms],
    );
}

fn take_condemned(r: &mut Reader<'_>) -> Result<Condemned, WireError> {
    let kind = r.u32()?;
    let part = r.u32()?;
    let name = r.array()?;
    let object = match (kind, part) {
        (0, part) => CondemnedObject::Segment(SegmentId {
            origin: IntervalId::from_bytes(name),
            part,
        }),
        (1, 0) => CondemnedObject::Page(Checksum128::from_bytes(name)),
        _ => return Err(WireError::Range("condemned object")),
    };
    let length = r.u64()?;
    if length > FILE_LEN_MAX {
        return Err(WireError::Range("length of a condemned object"));
    }
    Ok(Condemned {
        object,
        length,
        version: r.u64()?,
        time_ms: r.u64()?,
    })
}

/// The advisory object: how long the newest generation has been current. Lost or stale, it costs only that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Current {
    /// The generation it speaks of; of no use for any other.
    pub generation: GenerationId,
    /// The image was still this one at this time.
    pub current_through_ms: u64,
}

impl Current {
    /// As bytes of an object.
    #[must_use]
    pub fn encode(&self, volume: VolumeId) -> Vec<u8> {
        let mut out = volume.as_bytes().to_vec();
        put_words(&mut out, &[self.generation.get(), self.current_through_ms]);
        wire::seal(CURRENT_MAGIC, VERSION, &out)
    }

    /// Reads the object.
    ///
    /// # Errors
    /// The bytes are damaged, or another volume's.
    pub fn decode(bytes: &[u8], volume: VolumeId) -> Result<Self, FormatError> {
        let (_, payload) = wire::unseal(CURRENT_MAGIC, VERSION, bytes)?;
        let mut r = Reader::new(payload);
        let found = VolumeId::from_bytes(r.array()?);
        if found != volume {
            return Err(misplaced(&found, &volume));
        }
        let current = Self {
            generation: GenerationId::new(r.u64()?),
            current_through_ms: r.u64()?,
        };
        r.end()?;
        Ok(current)
    }
}

/// What stands at the root of a store, so that a directory of something else is not taken for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreMarker {
    /// Drawn at random when the store was made; the state directory remembers it.
    pub store: [u8; 16],
    /// When that was.
    pub created_ms: u64,
}

impl StoreMarker {
    /// As bytes of an object.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.store.to_vec();
        put_words(&mut out, &[self.created_ms]);
        wire::seal(MARKER_MAGIC, VERSION, &out)
    }

    /// Reads the object.
    ///
    /// # Errors
    /// The bytes are damaged or something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (_, payload) = wire::unseal(MARKER_MAGIC, VERSION, bytes)?;
        let mut r = Reader::new(payload);
        let marker = Self {
            store: r.array()?,
            created_ms: r.u64()?,
        };
        r.end()?;
        Ok(marker)
    }
}
