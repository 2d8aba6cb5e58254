//! A volume's segments: put once, listed, and read section by section.

use std::{collections::BTreeMap, ops::Range};

use bytes::Bytes;
use object_store::{PutMode, path::Path};
use tidemark_block::{Checksum128, Geometry, IntervalId, SegmentId};
use vault_core::segment::{
    FOOTER_LEN, Footer, FormatError, SegmentIndex, SegmentRecord, decode_checksums,
};

use super::{
    StoreError, VolumeStore,
    error::short_or,
    found::{Found, found_as, parse_hex},
};

impl VolumeStore {
    fn origin_path(&self, origin: IntervalId) -> Path {
        let hex: String = origin
            .as_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.root.clone().join("segments").join(hex)
    }

    /// Where a segment is.
    #[must_use]
    pub fn segment_path(&self, id: SegmentId) -> Path {
        self.origin_path(id.origin).join(format!("{:08}", id.part))
    }

    /// Puts a segment, durably, if it is absent: a put of an earlier process that arrives late must not replace it.
    ///
    /// # Errors
    /// It may be there nevertheless: [`Self::parts`] tells what can be relied on.
    pub async fn put_segment(&self, id: SegmentId, bytes: Bytes) -> Result<(), StoreError> {
        self.store
            .put(&self.segment_path(id), bytes, PutMode::Create)
            .await
    }

    /// Deletes a segment.
    ///
    /// # Errors
    /// The store can't.
    pub async fn delete_segment(&self, id: SegmentId) -> Result<(), StoreError> {
        self.store.delete(&self.segment_path(id)).await
    }

    /// All segments that there are, named or not.
    ///
    /// # Errors
    /// The store can't be listed.
    pub async fn segments(&self) -> Result<Vec<Found<SegmentId>>, StoreError> {
        let found = self.store.list(&self.root.clone().join("segments")).await?;
        Ok(found
            .iter()
            .filter_map(|meta| {
                let mut parts = meta.location.parts();
                let part = parts.next_back()?.as_ref().parse().ok()?;
                let origin = IntervalId::from_bytes(parse_hex(parts.next_back()?.as_ref())?);
                Some(found_as(SegmentId { origin, part }, meta))
            })
            .collect())
    }

    /// The parts of an interval that are there, by number with their lengths, each durable from now on.
    ///
    /// # Errors
    /// The store can't be listed or synced.
    pub async fn parts(&self, interval: IntervalId) -> Result<BTreeMap<u32, u64>, StoreError> {
        let prefix = self.origin_path(interval);
        let found = self.store.list(&prefix).await?;
        self.store.settle(&prefix).await?;
        Ok(found
            .iter()
            .filter_map(|meta| Some((meta.location.filename()?.parse().ok()?, meta.size)))
            .collect())
    }

    /// Reads a segment's footer.
    ///
    /// # Errors
    /// The object is missing, cut short or corrupt.
    pub async fn footer(
        &self,
        geometry: Geometry,
        id: SegmentId,
        file_len: u64,
    ) -> Result<Footer, StoreError> {
        let path = self.segment_path(id);
        let Some(at) = file_len.checked_sub(FOOTER_LEN) else {
            return Err(StoreError::corrupt(&path, "it is cut short"));
        };
        let bytes = self.store.get_range(&path, at..file_len).await?;
        Footer::decode(&bytes, self.volume, geometry, id, file_len)
            .map_err(|e| StoreError::corrupt(&path, e))
    }

    /// Reads a segment's index.
    ///
    /// # Errors
    /// The object is missing, cut short or corrupt.
    pub async fn index(
        &self,
        geometry: Geometry,
        record: &SegmentRecord,
    ) -> Result<SegmentIndex, StoreError> {
        let path = self.segment_path(record.id);
        let range = record.index_at..record.checksums_at();
        let bytes = self.store.get_range(&path, range).await?;
        let record = *record;
        tokio::task::spawn_blocking(move || SegmentIndex::decode(&bytes, &record, geometry))
            .await
            .map_err(|e| StoreError::corrupt(&path, e))?
            .map_err(|e| StoreError::corrupt(&path, FormatError::from(e)))
    }

    /// Reads a segment's checksums.
    ///
    /// # Errors
    /// The object is missing, cut short or corrupt.
    pub async fn checksums(&self, record: &SegmentRecord) -> Result<Vec<Checksum128>, StoreError> {
        let path = self.segment_path(record.id);
        let at = record.checksums_at();
        let range = at..at + u64::from(record.checksums_len);
        let bytes = self.store.get_range(&path, range).await?;
        decode_checksums(&bytes, record).map_err(|e| StoreError::corrupt(&path, e))
    }

    /// Reads several frames of a segment, unverified.
    ///
    /// # Errors
    /// The object is missing or cut short.
    pub async fn frames(
        &self,
        id: SegmentId,
        ranges: &[Range<u64>],
    ) -> Result<Vec<Bytes>, StoreError> {
        let path = self.segment_path(id);
        let read = self
            .store
            .objects
            .get_ranges(&path, ranges)
            .await
            .map_err(|e| short_or(&path, e))?;
        for (bytes, range) in read.iter().zip(ranges) {
            if bytes.len() as u64 != range.end - range.start {
                return Err(StoreError::corrupt(&path, "it is cut short"));
            }
        }
        Ok(read)
    }
}
