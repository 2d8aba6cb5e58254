//! One segment, from its first byte to its last.

use std::{collections::HashSet, sync::Arc};

use tidemark_block::{Checksum128, FrameDecoder, GenerationId, SegmentId, UnverifiedFrame};
use tidemark_proto::RpcError;
use vault_core::{
    image::windows,
    manifest::Manifest,
    scrub::{IndexedFrame, SegmentError, SegmentFrames},
    segment::{SegmentIndex, SegmentRecord, encode_header},
};

use super::{Damage, Pass, damage_of, since};
use crate::{error::of_store, image::ImageReader, store::StoreError};

/// Bytes of frames read at a time.
const READ_BYTES: u64 = 4 << 20;

/// What is wrong with a segment.
enum Fault {
    /// A part that no image is read through.
    Beside(String),
    /// Its index, or the object: nothing in it can be found.
    Whole(String),
    /// These frames, by where they begin; the first one's fault.
    Frames(HashSet<u64>, String),
}

/// What was read, or what is wrong with the object; an error where the store is at fault.
fn sound<T>(read: Result<T, StoreError>) -> Result<Result<T, String>, StoreError> {
    match read {
        Ok(value) => Ok(Ok(value)),
        Err(error) => Ok(Err(damage_of(Err(error))?.unwrap_or_default())),
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
            Some(fault) => Some(self.damage(&manifest, record, object.clone(), fault).await),
        };
        self.note(object, damage);
        Ok(())
    }

    async fn is_named(&self, manifest: &Manifest, id: SegmentId) -> Result<bool, RpcError> {
        let records = self.known_segments(manifest).await?;
        Ok(records.iter().any(|record| record.id == id))
    }

    async fn fault(
        &mut self,
        manifest: &Manifest,
        record: &SegmentRecord,
    ) -> Result<Option<Fault>, StoreError> {
        let store = &self.volume.store;
        let geometry = manifest.geometry;
        if let Some(problem) = damage_of(store.check_length(record).await)? {
            return Ok(Some(Fault::Whole(problem)));
        }
        let index = match sound(store.index(geometry, record).await)? {
            Ok(index) => index,
            Err(problem) => return Ok(Some(Fault::Whole(problem))),
        };
        let mut beside = self.ends(manifest, record).await?;
        let checksums = match sound(store.checksums(record).await)? {
            Ok(checksums) => Some(checksums),
            Err(problem) => {
                beside = Some(problem);
                None
            }
        };
        self.read(record.file_len - record.frame_bytes()).await;
        let frames = self.frames(manifest, record, Arc::new((index, checksums)));
        Ok(frames.await?.or(beside.map(Fault::Beside)))
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
        damage_of(store.check_header(record.id, &header).await)
    }

    async fn read(&mut self, bytes: u64) {
        self.found.progress.bytes += bytes;
        (self.told)(self.found.progress);
        self.pace.spent(bytes).await;
    }

    async fn frames(
        &mut self,
        manifest: &Manifest,
        record: &SegmentRecord,
        sections: Arc<Sections>,
    ) -> Result<Option<Fault>, StoreError> {
        let frames: Vec<IndexedFrame> = match frames_of(record, &sections) {
            Ok(frames) => frames.frames().to_vec(),
            Err(error) => return Ok(Some(Fault::Whole(error.to_string()))),
        };
        let geometry = manifest.geometry;
        let mut wrong = HashSet::new();
        let mut first = None;
        let mut rest = &frames[..];
        while let Some(from) = rest.first().map(|frame| frame.at) {
            let fit = rest.partition_point(|frame| frame.end() - from <= READ_BYTES);
            let (now, later) = rest.split_at(fit.max(1));
            rest = later;
            let ranges: Vec<_> = now.iter().map(|frame| frame.at..frame.end()).collect();
            let bytes = match sound(self.volume.store.frames(record.id, &ranges).await)? {
                Ok(bytes) => bytes,
                Err(problem) => return Ok(Some(Fault::Whole(problem))),
            };
            let (record, sections, now) = (*record, Arc::clone(&sections), now.to_vec());
            let length = ranges.iter().map(|range| range.end - range.start).sum();
            let checked = tokio::task::spawn_blocking(move || {
                let frames = frames_of(&record, &sections)?;
                let mut decoder = FrameDecoder::new();
                let checked = now.iter().zip(bytes).filter_map(|(frame, bytes)| {
                    let found = UnverifiedFrame::split(bytes)
                        .and_then(|(found, _)| found.verify(geometry, &mut decoder))
                        .map_err(|error| SegmentError::Frame {
                            at: frame.at,
                            error,
                        });
                    found.and_then(|found| frames.check(frame, &found)).err()
                });
                Ok(checked.collect::<Vec<_>>())
            });
            let errors = match checked.await {
                Ok(Ok(errors)) => errors,
                Ok(Err(error)) => vec![error],
                Err(_) => return Ok(Some(Fault::Whole("it could not be checked".to_owned()))),
            };
            for error in errors {
                wrong.extend(error.frame());
                first.get_or_insert_with(|| error.to_string());
            }
            self.read(length).await;
        }
        Ok(first.map(|problem| Fault::Frames(wrong, problem)))
    }

    async fn damage(
        &self,
        manifest: &Arc<Manifest>,
        record: &SegmentRecord,
        object: String,
        fault: Fault,
    ) -> Damage {
        let (problem, generations) = match fault {
            Fault::Beside(problem) => (problem, Vec::new()),
            Fault::Whole(problem) => (problem, since(manifest, record.sequences.0)),
            Fault::Frames(frames, problem) => {
                let others = frames.len().saturating_sub(1);
                let problem = match others {
                    0 => problem,
                    _ => format!("{problem}; and {others} other frames"),
                };
                let mut needing = Vec::new();
                for generation in since(manifest, record.sequences.0) {
                    if self.needs(generation, record, &frames).await {
                        needing.push(generation);
                    }
                }
                (problem, needing)
            }
        };
        Damage {
            object,
            problem,
            generations,
            repaired: false,
        }
    }

    /// Whether a generation's image is read from one of these frames. Where that can't be told it is.
    async fn needs(
        &self,
        generation: GenerationId,
        record: &SegmentRecord,
        frames: &HashSet<u64>,
    ) -> bool {
        let Ok(reader) = ImageReader::open(Arc::clone(self.volume), generation.get()) else {
            // It has been retired meanwhile.
            return false;
        };
        for window in windows(reader.geometry(), record.blocks) {
            let Ok(map) = reader.map(window).await else {
                return true;
            };
            let mut pieces = map.pieces(record.blocks);
            if pieces.any(|p| p.frame.segment == record.id && frames.contains(&p.frame.at)) {
                return true;
            }
        }
        false
    }
}
