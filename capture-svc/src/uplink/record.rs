//! The uplink's durable record: what must be known to go on after any restart.
//!
//! One small file per volume, replaced as a whole. What it says, the rest follows: the interval's id is here before
//! the vault hears of it, the term and nonce before they are asked for, and a new base before the checksum table or
//! the engine are told.
//! `docs/FORMAT.md` has its bytes.

use std::path::Path;

use anyhow::{Context, Result};
use tidemark_block::{
    Coherence, CutReason, Epoch, GenerationId, ImageDigest, IntervalId, Trigger, VolumeId,
    WriterTerm,
    wire::{Reader, WireError},
};
use tidemark_disk::record;

pub(super) const MAGIC: [u8; 8] = *b"TMUPLINK";
pub(super) const VERSION: u16 = 2;

/// An interval in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IntervalRecord {
    pub(crate) id: IntervalId,
    pub(crate) epoch: Epoch,
    pub(crate) base: GenerationId,
    pub(crate) cut_time_ms: u64,
    pub(crate) coherence: Coherence,
    pub(crate) reason: CutReason,
    pub(crate) trigger: Trigger,
}

/// The whole record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UplinkRecord {
    pub(crate) volume: VolumeId,
    pub(crate) term: WriterTerm,
    pub(crate) nonce: [u8; 16],
    pub(crate) nonce_granted: bool,
    pub(crate) base: GenerationId,
    pub(crate) base_digest: Option<ImageDigest>,
    pub(crate) base_interval: Option<IntervalId>,
    pub(crate) committed_epoch: Epoch,
    pub(crate) table_doubtful: bool,
    pub(crate) last_cut_ms: u64,
    pub(crate) recovery_point_ms: u64,
    pub(crate) interval: Option<IntervalRecord>,
}

impl UplinkRecord {
    /// Of a volume that the vault has not seen yet.
    pub(crate) const fn new(volume: VolumeId, nonce: [u8; 16]) -> Self {
        Self {
            volume,
            term: WriterTerm::ZERO,
            nonce,
            nonce_granted: false,
            base: GenerationId::ZERO,
            base_digest: None,
            base_interval: None,
            committed_epoch: Epoch::ZERO,
            table_doubtful: false,
            last_cut_ms: 0,
            recovery_point_ms: 0,
            interval: None,
        }
    }

    /// The record in a volume's state directory; none where there isn't one yet.
    pub(crate) fn load(path: &Path, volume: VolumeId) -> Result<Option<Self>> {
        let what = || format!("read the uplink record {}", path.display());
        let Some((version, payload)) = record::read(path, MAGIC, VERSION).with_context(what)?
        else {
            return Ok(None);
        };
        let found = Self::decode(version, &payload).with_context(what)?;
        anyhow::ensure!(
            found.volume == volume,
            "the uplink record {} is that of volume {}, not of {volume}: this is another volume's state directory",
            path.display(),
            found.volume
        );
        Ok(Some(found))
    }

    /// Makes the record durable.
    pub(crate) fn store(&self, path: &Path) -> Result<()> {
        record::write(path, MAGIC, VERSION, &self.encode())
            .with_context(|| format!("write the uplink record {}", path.display()))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(192);
        out.extend_from_slice(self.volume.as_bytes());
        out.extend_from_slice(&self.term.get().to_le_bytes());
        out.extend_from_slice(&self.nonce);
        out.push(u8::from(self.nonce_granted));
        out.extend_from_slice(&self.base.get().to_le_bytes());
        out.push(u8::from(self.base_digest.is_some()));
        out.extend_from_slice(
            self.base_digest
                .map_or([0; 16], |d| *d.as_bytes())
                .as_slice(),
        );
        out.push(u8::from(self.base_interval.is_some()));
        out.extend_from_slice(
            self.base_interval
                .map_or([0; 16], |i| *i.as_bytes())
                .as_slice(),
        );
        out.extend_from_slice(&self.committed_epoch.get().to_le_bytes());
        out.push(u8::from(self.table_doubtful));
        out.extend_from_slice(&self.last_cut_ms.to_le_bytes());
        out.extend_from_slice(&self.recovery_point_ms.to_le_bytes());
        out.push(u8::from(self.interval.is_some()));
        if let Some(interval) = &self.interval {
            out.extend_from_slice(interval.id.as_bytes());
            out.extend_from_slice(&interval.epoch.get().to_le_bytes());
            out.extend_from_slice(&interval.base.get().to_le_bytes());
            out.extend_from_slice(&interval.cut_time_ms.to_le_bytes());
            out.push(interval.coherence.code());
            out.push(interval.trigger.code());
            interval.reason.encode(&mut out);
        }
        out
    }

    pub(crate) fn decode(version: u16, payload: &[u8]) -> Result<Self, WireError> {
        fn flag(r: &mut Reader<'_>) -> Result<bool, WireError> {
            match r.u8()? {
                0 => Ok(false),
                1 => Ok(true),
                _ => Err(WireError::Range("flag")),
            }
        }
        let mut r = Reader::new(payload);
        let volume = VolumeId::from_bytes(r.array()?);
        let term = WriterTerm::new(r.u64()?);
        let nonce = r.array()?;
        let nonce_granted = flag(&mut r)?;
        let base = GenerationId::new(r.u64()?);
        let digest_known = flag(&mut r)?;
        let digest = ImageDigest::from_bytes(r.array()?);
        let interval_known = flag(&mut r)?;
        let base_interval = IntervalId::from_bytes(r.array()?);
        let committed_epoch = Epoch::new(r.u64()?);
        let table_doubtful = flag(&mut r)?;
        let last_cut_ms = r.u64()?;
        let recovery_point_ms = r.u64()?;
        let interval = if flag(&mut r)? {
            Some(IntervalRecord {
                id: IntervalId::from_bytes(r.array()?),
                epoch: Epoch::new(r.u64()?),
                base: GenerationId::new(r.u64()?),
                cut_time_ms: r.u64()?,
                coherence: Coherence::from_code(r.u8()?).ok_or(WireError::Range("coherence"))?,
                trigger: Trigger::from_code(r.u8()?).ok_or(WireError::Range("trigger"))?,
                reason: if version >= 2 {
                    CutReason::decode(&mut r)?
                } else {
                    CutReason::default()
                },
            })
        } else {
            None
        };
        r.end()?;
        Ok(Self {
            volume,
            term,
            nonce,
            nonce_granted,
            base,
            base_digest: digest_known.then_some(digest),
            base_interval: interval_known.then_some(base_interval),
            committed_epoch,
            table_doubtful,
            last_cut_ms,
            recovery_point_ms,
            interval,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn full() -> UplinkRecord {
        UplinkRecord {
            volume: VolumeId::from_bytes([1; 16]),
            term: WriterTerm::new(3),
            nonce: [2; 16],
            nonce_granted: true,
            base: GenerationId::new(9),
            base_digest: Some(ImageDigest::from_bytes([3; 16])),
            base_interval: Some(IntervalId::from_bytes([5; 16])),
            committed_epoch: Epoch::new(5),
            table_doubtful: true,
            last_cut_ms: 1_700_000_000_000,
            recovery_point_ms: 1_700_000_000_001,
            interval: Some(IntervalRecord {
                id: IntervalId::from_bytes([4; 16]),
                epoch: Epoch::new(6),
                base: GenerationId::new(9),
                cut_time_ms: 1_700_000_000_002,
                coherence: Coherence::Lull,
                trigger: Trigger::Request,
                reason: CutReason::new("agent db went away"),
            }),
        }
    }

    #[test]
    fn a_record_survives_its_file_and_belongs_to_one_volume() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("uplink");
        assert_eq!(UplinkRecord::load(&path, full().volume).unwrap(), None);
        for record in [full(), UplinkRecord::new(full().volume, [7; 16])] {
            record.store(&path).unwrap();
            assert_eq!(
                UplinkRecord::load(&path, record.volume).unwrap(),
                Some(record)
            );
        }
        let other = UplinkRecord::load(&path, VolumeId::from_bytes([9; 16])).unwrap_err();
        assert!(
            other
                .to_string()
                .contains("another volume's state directory")
        );
    }

    #[test]
    fn the_encoding_stays_what_version_2_wrote() {
        let hex: String = full().encode().iter().map(|b| format!("{b:02x}")).collect();
        insta::assert_snapshot!(hex);
    }

    #[test]
    fn what_version_1_wrote_is_read() {
        let mut first = full();
        let reason = std::mem::take(&mut first.interval.as_mut().unwrap().reason);
        let bytes = full().encode();
        let behind = 2 + reason.as_str().len();
        let read = UplinkRecord::decode(1, &bytes[..bytes.len() - behind]);
        assert_eq!(read, Ok(first));
    }

    #[test]
    fn the_page_of_formats_has_these_lengths() {
        let page = include_str!("../../../docs/FORMAT.md");
        let bare = UplinkRecord::new(full().volume, [7; 16]).encode().len();
        for mark in [
            format!("<!-- table: uplink record, total {bare} -->"),
            format!(
                "<!-- table: interval in flight, total {} -->",
                full().encode().len() - bare - "agent db went away".len()
            ),
            "magic `TMUPLINK`, version 2".to_owned(),
        ] {
            assert!(page.contains(&mark), "{mark}");
        }
    }

    proptest! {
        #[test]
        fn no_payload_makes_reading_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = UplinkRecord::decode(1, &bytes);
            let _ = UplinkRecord::decode(2, &bytes);
        }
    }
}
