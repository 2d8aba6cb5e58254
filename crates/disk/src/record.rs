//! Small durable records: one file, one sealed payload, replaced as a whole.

use std::{fs, io, path::Path};

use thiserror::Error;
use tidemark_block::wire::{self, WireError};

use crate::durable;

/// Records are small: whatever is larger was not written by us.
const RECORD_LEN_MAX: u64 = 64 << 20;

/// Why a record can't be read.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The file can't be read.
    #[error("read the record: {0}")]
    Io(#[from] io::Error),
    /// The file is not the record it should be.
    #[error("the record is damaged or of another kind: {0}")]
    Damaged(#[from] WireError),
}

/// Writes a record durably.
///
/// # Errors
/// As [`durable::write_file`].
pub fn write(path: &Path, magic: [u8; 8], version: u16, payload: &[u8]) -> io::Result<()> {
    durable::write_file(path, &wire::seal(magic, version, payload))
}

/// Reads a record's version and payload; nothing where the file doesn't exist.
///
/// # Errors
/// Where the file can't be read, is damaged, or was written by a release newer than `known`.
pub fn read(
    path: &Path,
    magic: [u8; 8],
    known: u16,
) -> Result<Option<(u16, Vec<u8>)>, RecordError> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
        Ok(metadata) if metadata.len() > RECORD_LEN_MAX => {
            return Err(WireError::Range("length of the record").into());
        }
        Ok(_) => {}
    }
    let bytes = fs::read(path)?;
    let (version, payload) = wire::unseal(magic, known, &bytes)?;
    Ok(Some((version, payload.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: [u8; 8] = *b"TMTEST\0\0";

    #[test]
    fn a_record_comes_back_and_damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        assert!(read(&path, MAGIC, 1).unwrap().is_none());
        write(&path, MAGIC, 1, b"payload").unwrap();
        assert_eq!(
            read(&path, MAGIC, 1).unwrap(),
            Some((1, b"payload".to_vec()))
        );
        let mut bytes = fs::read(&path).unwrap();
        bytes[45] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(
            read(&path, MAGIC, 1),
            Err(RecordError::Damaged(_))
        ));
    }
}
