//! One segment, from its first byte to its last.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::Range,
    slice,
    sync::Arc,
};

use bytes::Bytes;
use tidemark_block::{
    BlockIndex, Checksum128, Extent, FrameDecoder, GenerationId, Geometry, SegmentId, Sequence,
    UnverifiedFrame,
};
use tidemark_proto::RpcError;
use vault_core::{
    image::{images_that_need, window_of},
    manifest::Manifest,
    scrub::{IndexedFrame, SegmentError, SegmentFrames},
    segment::{SegmentIndex, SegmentRecord, encode_header},
};

use super::{Damage, NeededFor, Pass, since, sound};
use crate::{error::of_store, store::StoreError};

/// Bytes of frames read at a time.
const READ_BYTES: u64 = 4 << 20;

/// What is wrong with a segment.
struct Fault {
    problem: String,
    hits: Hits,
    needed_for: NeededFor,
}

/// Which images a fault hits.
enum Hits {
    None,
    /// All that a block of the segment may belong to: its index, or the object, can't be read.
    All,
    /// Those that need a version of these blocks out of these frames.
    Frames(BTreeMap<BlockIndex, Extent>, HashSet<u64>),
}

impl Fault {
    /// Nothing in the object can be found.
    const fn whole(problem: String) -> Self {
        Self {
            problem,
            hits: Hits::All,
            needed_for: NeededFor::ChecksumTable,
        }
    }

    /// A part that no image is read through.
    const fn beside(problem: String, needed_for: NeededFor) -> Self {
        Self {
            problem,
            hits: Hits::None,
            needed_for,
        }
    }
}

/// The decoded sections behind the frames; no checksums where theirs is damaged.
type Sections = (SegmentIndex, Option<Vec<Checksum128>>);

fn frames_of<'a>(
    record: &SegmentRecord,
    sections: &'a Sections,
) -> Result<SegmentFrames<'a>, SegmentError> {
    SegmentFrames::new(record, &sections.0, sections.1.as_deref())
}

/// Frames that are wrong, by where they begin, and the first one's fault.
#[derive(Default)]
struct Wrong {
    frames: HashSet<u64>,
    first: Option<String>,
}

impl Wrong {
    fn add(&mut self, error: &SegmentError) {
        self.frames.extend(error.frame());
        self.first.get_or_insert_with(|| error.to_string());
    }

    fn unread(&mut self, at: u64, problem: &str) {
        self.frames.insert(at);
        let told = || format!("its frame at byte {at}: {problem}");
        self.first.get_or_insert_with(told);
    }

    fn problem(&self) -> Option<String> {
        let first = self.first.as_ref()?;
        Some(match self.frames.len().saturating_sub(1) {
            0 => first.clone(),
            1 => format!("{first}; and another frame"),
            others => format!("{first}; and {others} other frames"),
        })
    }
}

impl Pass<'_> {
    pub(super) async fn segment(&mut self, record: &SegmentRecord) -> Result<(), RpcError> {
        let object = self.volume.store.segment_path(record.id).to_string();
        // While it is held, nothing that this manifest names is deleted.
        let (_lease, manifest) = self.lease();
        self.volume.store.forget(&object).await;
        let fault = self
            .fault(&manifest, record)
            .await
            .map_err(|e| of_store(&e))?;
        self.volume.store.forget(&object).await;
        let damage = match fault {
            None => None,
            // It was chosen from an older manifest, and has been replaced since.
            Some(_) if !self.is_named(&manifest, record.id).await? => return Ok(()),
            Some(fault) => {
                self.own_store().await?;
                let generations = self.hit(&manifest, record, fault.hits).await;
                Some(Damage {
                    generations,
                    ..Damage::new(object.clone(), fault.problem, fault.needed_for)
                })
            }
        };
        self.note(&object, damage);
        Ok(())
    }

    async fn is_named(&self, manifest: &Manifest, id: SegmentId) -> Result<bool, RpcError> {
        let mut named = false;
        self.known_segments(manifest, |record| named |= record.id == id)
            .await?;
        Ok(named)
    }

    async fn fault(
        &mut self,
        manifest: &Manifest,
        record: &SegmentRecord,
    ) -> Result<Option<Fault>, StoreError> {
        let store = &self.volume.store;
        let geometry = manifest.geometry;
        if let Err(problem) = sound(store.check_length(record).await)? {
            return Ok(Some(Fault::whole(problem)));
        }
        let index = match sound(store.index(geometry, record).await)? {
            Ok(index) => index,
            Err(problem) => return Ok(Some(Fault::whole(problem))),
        };
        let ends = self.ends(manifest, record).await?;
        let mut beside = ends.map(|problem| Fault::beside(problem, NeededFor::Nothing));
        let checksums = match sound(store.checksums(record).await)? {
            Ok(checksums) => Some(checksums),
            Err(problem) => {
                beside = Some(Fault::beside(problem, NeededFor::ChecksumTable));
                None
            }
        };
        self.read(record.file_len - record.frame_bytes()).await;
        let sections = Arc::new((index, checksums));
        let frames = match frames_of(record, &sections) {
            Ok(frames) => frames.frames().to_vec(),
            Err(error) => return Ok(Some(Fault::whole(error.to_string()))),
        };
        let wrong = match self.frames(geometry, record, &sections, &frames).await? {
            Ok(wrong) => wrong,
            Err(problem) => return Ok(Some(Fault::whole(problem))),
        };
        let Some(problem) = wrong.problem() else {
            return Ok(beside);
        };
        let (problem, needed_for) = match beside {
            None => (problem, NeededFor::Nothing),
            Some(other) => (format!("{problem}; {}", other.problem), other.needed_for),
        };
        let blocks = match frames_of(record, &sections) {
            Ok(frames) => by_window(geometry, frames.blocks_of(&wrong.frames)),
            Err(error) => return Ok(Some(Fault::whole(error.to_string()))),
        };
        Ok(Some(Fault {
            problem,
            hits: Hits::Frames(blocks, wrong.frames),
            needed_for,
        }))
    }

    /// Header and footer, which no reader of images needs.
    async fn ends(
        &self,
        manifest: &Manifest,
        record: &SegmentRecord,
    ) -> Result<Option<String>, StoreError> {
        let store = &self.volume.store;
        let footer = store.footer(manifest.geometry, record.id, record.file_len);
        let footer = match sound(footer.await)? {
            Ok(footer) => footer,
            Err(problem) => return Ok(Some(problem)),
        };
        if footer.record != *record {
            return Ok(Some(
                "its footer is not what the manifest says of it".to_owned(),
            ));
        }
        let header = encode_header(&footer.origin);
        Ok(sound(store.check_header(record.id, &header).await)?.err())
    }

    async fn read(&mut self, bytes: u64) {
        self.has_read(bytes);
        (self.told)(self.found.progress);
        self.pace.spent(bytes).await;
    }

    /// Reads and checks all frames; or says what is wrong with the object as a whole.
    async fn frames(
        &mut self,
        geometry: Geometry,
        record: &SegmentRecord,
        sections: &Arc<Sections>,
        frames: &[IndexedFrame],
    ) -> Result<Result<Wrong, String>, StoreError> {
        let mut wrong = Wrong::default();
        let mut rest = frames;
        while let Some(from) = rest.first().map(|frame| frame.at) {
            let fit = rest.partition_point(|frame| frame.end() - from <= READ_BYTES);
            let (now, later) = rest.split_at(fit.max(1));
            rest = later;
            let read = match sound(self.read_frames(record.id, now, &mut wrong).await)? {
                Ok(read) => read,
                Err(problem) => return Ok(Err(problem)),
            };
            let (record, sections) = (*record, Arc::clone(sections));
            let checked =
                tokio::task::spawn_blocking(move || check(geometry, &record, &sections, read));
            let Ok(errors) = checked.await else {
                return Ok(Err("it could not be checked".to_owned()));
            };
            errors.iter().for_each(|error| wrong.add(error));
            self.read(now.iter().map(|frame| u64::from(frame.len)).sum())
                .await;
        }
        Ok(Ok(wrong))
    }

    /// The bytes of frames, as they are stored. Those that the disk can't read are left out, and are wrong: a bad sector
    /// says nothing of the others.
    async fn read_frames(
        &self,
        id: SegmentId,
        frames: &[IndexedFrame],
        wrong: &mut Wrong,
    ) -> Result<Vec<(IndexedFrame, Bytes)>, StoreError> {
        let range = |frame: &IndexedFrame| frame.at..frame.end();
        let ranges: Vec<Range<u64>> = frames.iter().map(range).collect();
        match self.volume.store.frames(id, &ranges).await {
            Ok(read) => return Ok(frames.iter().copied().zip(read).collect()),
            Err(error) if error.is_unreadable() => {}
            Err(error) => return Err(error),
        }
        let mut found = Vec::new();
        for (frame, range) in frames.iter().zip(&ranges) {
            let read = self.volume.store.frames(id, slice::from_ref(range)).await;
            match sound(read)? {
                Ok(read) => found.extend(read.into_iter().map(|bytes| (*frame, bytes))),
                Err(problem) => wrong.unread(frame.at, &problem),
            }
        }
        Ok(found)
    }

    /// The generations that a fault hits.
    async fn hit(
        &mut self,
        manifest: &Manifest,
        record: &SegmentRecord,
        hits: Hits,
    ) -> Vec<GenerationId> {
        let (blocks, frames) = match hits {
            Hits::None => return Vec::new(),
            Hits::All => return since(manifest, record.sequences.0),
            Hits::Frames(blocks, frames) => (blocks, Arc::new(frames)),
        };
        let mut needing = BTreeSet::new();
        for range in blocks.into_values() {
            match self.needing(manifest, record, range, &frames).await {
                Some(sequences) => needing.extend(sequences),
                None => return since(manifest, record.sequences.0),
            }
        }
        let needs = |generation: &&vault_core::manifest::Generation| {
            needing.contains(&generation.sequence())
        };
        let generations = manifest.generations.iter().filter(needs);
        generations.map(|generation| generation.id).collect()
    }

    /// The images that are read from one of these frames in `range`; none where that can't be told.
    async fn needing(
        &mut self,
        manifest: &Manifest,
        record: &SegmentRecord,
        range: Extent,
        frames: &Arc<HashSet<u64>>,
    ) -> Option<BTreeSet<Sequence>> {
        let volume = self.volume;
        let records = volume
            .segments(manifest, range, Sequence::ZERO)
            .await
            .ok()?;
        let damaged = records.iter().position(|other| other.id == record.id)?;
        let indexes = volume.indexes_beside_the_cache(manifest, &records).await;
        let indexes = indexes.ok()?;
        let read: u64 = records.iter().map(|r| u64::from(r.index_len)).sum();
        self.pace.spent_beside(read).await;
        let (frames, retained) = (Arc::clone(frames), manifest.retained());
        let work = tokio::task::spawn_blocking(move || {
            let entries = indexes[damaged].entries();
            let all = indexes.iter().map(AsRef::as_ref);
            images_that_need(all, range, &retained, |at| {
                let entry = || &entries[at.entry as usize];
                at.index as usize == damaged && !entry().zero && frames.contains(&entry().frame_at)
            })
        });
        work.await.ok()
    }
}

/// The smallest extent of each window that has all these blocks of it.
fn by_window(
    geometry: Geometry,
    extents: impl Iterator<Item = Extent>,
) -> BTreeMap<BlockIndex, Extent> {
    let mut found: BTreeMap<BlockIndex, Extent> = BTreeMap::new();
    for mut rest in extents {
        while !rest.is_empty() {
            let window = window_of(geometry, rest.start());
            let here = rest.intersect(window);
            let extent = found.entry(window.start()).or_insert(here);
            let start = extent.start().min(here.start());
            *extent = Extent::between(start, extent.end().max(here.end()));
            rest = Extent::between(here.end(), rest.end());
        }
    }
    found
}

/// Verifies frames, and compares them with what the sections say of them.
fn check(
    geometry: Geometry,
    record: &SegmentRecord,
    sections: &Sections,
    read: Vec<(IndexedFrame, Bytes)>,
) -> Vec<SegmentError> {
    let frames = match frames_of(record, sections) {
        Ok(frames) => frames,
        Err(error) => return vec![error],
    };
    let mut decoder = FrameDecoder::new();
    let checked = read.into_iter().filter_map(|(frame, bytes)| {
        let found = UnverifiedFrame::split(bytes)
            .and_then(|(found, _)| found.verify(geometry, &mut decoder))
            .map_err(|error| SegmentError::Frame {
                at: frame.at,
                error,
            });
        found.and_then(|found| frames.check(&frame, &found)).err()
    });
    checked.collect()
}

#[cfg(test)]
mod tests {
    use tidemark_block::{BlockCount, BlockSize};
    use vault_core::image::WINDOW_BLOCKS;

    use super::*;

    #[test]
    fn only_windows_with_damaged_blocks_are_looked_at_and_of_them_the_part_that_has_them() {
        let block_size = BlockSize::new(4096).unwrap();
        let geometry = Geometry::new(10 * WINDOW_BLOCKS * 4096, block_size).unwrap();
        let extent = |(start, count)| Extent::new(BlockIndex::new(start), BlockCount::new(count));
        let last = 9 * WINDOW_BLOCKS;
        let damaged = [(7, 3), (last - 2, 5), (2, 1), (last + 100, 1)].map(extent);
        let found: Vec<_> = by_window(geometry, damaged.into_iter())
            .into_values()
            .collect();
        assert_eq!(found, [(2, 8), (last - 2, 2), (last, 101)].map(extent));
    }
}
