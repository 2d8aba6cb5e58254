//! The registry record of a volume: file `volume` in its state directory.
//!
//! Written last when a volume is added and removed first when it is removed: a state directory without it is half
//! done and may be deleted. `docs/FORMAT.md` has its bytes.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use capture_core::kind::EngineKind;
use tidemark_block::{
    BlockSize, Geometry, VolumeId,
    wire::{Reader, WireError},
};
use tidemark_disk::record;

const MAGIC: [u8; 8] = *b"TMVOLUME";
pub(crate) const VERSION: u16 = 2;
/// The longest text of why the volume has its engine, in bytes.
const WHY_BYTES_MAX: usize = 1024;

/// What is recorded of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeRecord {
    pub(crate) id: VolumeId,
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    pub(crate) geometry: Geometry,
    pub(crate) engine: EngineKind,
    /// Why that one.
    pub(crate) engine_why: String,
}

impl VolumeRecord {
    /// Where it lies in a volume's state directory.
    pub(crate) fn path_in(dir: &Path) -> PathBuf {
        dir.join("volume")
    }

    /// The record of a state directory; none where there is none.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>> {
        let path = Self::path_in(dir);
        let what = || format!("read the volume record {}", path.display());
        let Some((version, payload)) = record::read(&path, MAGIC, VERSION).with_context(what)?
        else {
            return Ok(None);
        };
        Self::decode(version, &payload).with_context(what).map(Some)
    }

    /// Makes it durable.
    pub(crate) fn store(&self, dir: &Path) -> Result<()> {
        let path = Self::path_in(dir);
        record::write(&path, MAGIC, VERSION, &self.encode())
            .with_context(|| format!("write the volume record {}", path.display()))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(&self.geometry.length().to_le_bytes());
        out.extend_from_slice(&self.geometry.block_size().get().to_le_bytes());
        let name = self.name.as_bytes();
        out.extend_from_slice(&u16::try_from(name.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend_from_slice(name);
        let file = self.file.as_os_str().as_bytes();
        out.extend_from_slice(&u32::try_from(file.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(file);
        out.push(match self.engine {
            EngineKind::Intercept => 1,
            EngineKind::Reflink => 2,
            EngineKind::Scan => 3,
        });
        let why = self.engine_why.floor_char_boundary(WHY_BYTES_MAX);
        let why = &self.engine_why.as_bytes()[..why];
        out.extend_from_slice(&u16::try_from(why.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend_from_slice(why);
        out
    }

    pub(crate) fn decode(version: u16, payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(payload);
        let id = VolumeId::from_bytes(r.array()?);
        let length = r.u64()?;
        let block_size = BlockSize::new(r.u32()?).map_err(|_| WireError::Range("block size"))?;
        let geometry = Geometry::new(length, block_size).map_err(|_| WireError::Range("length"))?;
        let name_len = usize::from(r.u16()?);
        let name = std::str::from_utf8(r.bytes(name_len)?)
            .map_err(|_| WireError::Range("name"))?
            .to_owned();
        let file_len = usize::try_from(r.u32()?).map_err(|_| WireError::Range("path"))?;
        let file = OsString::from_vec(r.bytes(file_len)?.to_vec()).into();
        let (engine, engine_why) = if version < 2 {
            (EngineKind::Intercept, String::new())
        } else {
            let engine = match r.u8()? {
                1 => EngineKind::Intercept,
                2 => EngineKind::Reflink,
                3 => EngineKind::Scan,
                _ => return Err(WireError::Range("engine")),
            };
            let why_len = usize::from(r.u16()?);
            if why_len > WHY_BYTES_MAX {
                return Err(WireError::Range("reason of the engine"));
            }
            let why = std::str::from_utf8(r.bytes(why_len)?)
                .map_err(|_| WireError::Range("reason of the engine"))?;
            (engine, why.to_owned())
        };
        r.end()?;
        Ok(Self {
            id,
            name,
            file,
            geometry,
            engine,
            engine_why,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> VolumeRecord {
        VolumeRecord {
            id: VolumeId::from_bytes([7; 16]),
            name: "data".into(),
            file: OsString::from_vec(b"/volumes/d\xffta.img".to_vec()).into(),
            geometry: Geometry::new(8 << 30, BlockSize::MIN).unwrap(),
            engine: EngineKind::Reflink,
            engine_why: "it was asked for".into(),
        }
    }

    #[test]
    fn a_record_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(VolumeRecord::load(dir.path()).unwrap(), None);
        record().store(dir.path()).unwrap();
        assert_eq!(VolumeRecord::load(dir.path()).unwrap(), Some(record()));
    }

    #[test]
    fn a_flipped_bit_is_seen_at_every_byte_and_the_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        record().store(dir.path()).unwrap();
        let path = VolumeRecord::path_in(dir.path());
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            for damaged in [&flipped[..], &bytes[..at]] {
                std::fs::write(&path, damaged).unwrap();
                let told = format!("{:#}", VolumeRecord::load(dir.path()).unwrap_err());
                assert!(
                    told.contains(&path.display().to_string()),
                    "byte {at}: {told}"
                );
            }
        }
    }

    #[test]
    fn the_encoding_stays_what_version_2_wrote() {
        let hex: String = record()
            .encode()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        insta::assert_snapshot!(hex);
    }

    #[test]
    fn a_record_of_version_1_is_that_of_an_intercepted_volume() {
        let bytes = record().encode();
        // The fields that version 1 had.
        let old = &bytes[..bytes.len() - 3 - record().engine_why.len()];
        let read = VolumeRecord::decode(1, old).unwrap();
        let expected = VolumeRecord {
            engine: EngineKind::Intercept,
            engine_why: String::new(),
            ..record()
        };
        assert_eq!(read, expected);
        VolumeRecord::decode(2, old).unwrap_err();
        let mut unknown = bytes.clone();
        unknown[old.len()] = 9;
        VolumeRecord::decode(2, &unknown).unwrap_err();
    }

    #[test]
    fn the_page_of_formats_has_these_lengths() {
        let page = include_str!("../../../docs/FORMAT.md");
        let texts = [
            record().name.len(),
            record().file.as_os_str().len(),
            record().engine_why.len(),
        ];
        let named = texts.iter().sum::<usize>() + 4 + 3;
        let mark = format!(
            "<!-- table: volume record, total {} -->",
            record().encode().len() - named
        );
        assert!(page.contains(&mark) && page.contains("magic `TMVOLUME`, version 2"));
    }

    proptest! {
        #[test]
        fn no_payload_makes_reading_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = VolumeRecord::decode(1, &bytes);
            let _ = VolumeRecord::decode(2, &bytes);
        }
    }
}
