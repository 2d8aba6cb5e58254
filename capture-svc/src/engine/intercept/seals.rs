//! The digests of the files of a state that was closed cleanly: whatever became of one of them until the next opening,
//! that knows.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use capture_core::engine::{
    damage::{Damage, Fault},
    records::{SEALED, Seals},
};
use tidemark_block::{Checksum128, xxh3_128};

use super::files::{found, path_of};

/// Bytes that are read at a time, and have a checksum of their own.
const PART_LEN: u64 = 1 << 20;

/// The digests of the files as they are.
pub(super) fn of(dir: &Path) -> io::Result<Seals> {
    let mut seals = [Checksum128::ZERO; SEALED.len()];
    for (seal, file) in seals.iter_mut().zip(SEALED) {
        *seal = digest(&path_of(dir, file))?;
    }
    Ok(seals)
}

/// The first file that isn't what it was.
pub(super) fn broken(dir: &Path, seals: &Seals) -> io::Result<Option<Damage>> {
    for (seal, file) in seals.iter().zip(SEALED) {
        let fault = match found(digest(&path_of(dir, file)))? {
            Ok(found) if found == *seal => continue,
            Ok(_) => Fault::Changed,
            Err(fault) => fault,
        };
        return Ok(Some(Damage::everything(file, fault)));
    }
    Ok(None)
}

fn digest(path: &Path) -> io::Result<Checksum128> {
    let mut file = File::open(path)?;
    let mut parts = Vec::new();
    let mut part = Vec::new();
    loop {
        part.clear();
        if (&mut file).take(PART_LEN).read_to_end(&mut part)? == 0 {
            return Ok(xxh3_128(&parts));
        }
        parts.extend_from_slice(xxh3_128(&part).as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt};

    use super::*;

    #[test]
    fn a_flipped_bit_is_seen_at_every_byte_of_every_sealed_file() {
        let dir = tempfile::tempdir().unwrap();
        for (file, n) in SEALED.into_iter().zip(1..) {
            fs::write(path_of(dir.path(), file), vec![n; 900 + usize::from(n)]).unwrap();
        }
        let seals = of(dir.path()).unwrap();
        assert_eq!(broken(dir.path(), &seals).unwrap(), None);
        for (name, n) in SEALED.into_iter().zip(1_u8..) {
            let file = File::options()
                .write(true)
                .open(path_of(dir.path(), name))
                .unwrap();
            let changed = Some(Damage::everything(name, Fault::Changed));
            for at in 0..file.metadata().unwrap().len() {
                file.write_all_at(&[n ^ 1 << (at % 8)], at).unwrap();
                assert_eq!(broken(dir.path(), &seals).unwrap(), changed, "byte {at}");
                file.write_all_at(&[n], at).unwrap();
            }
            assert_eq!(broken(dir.path(), &seals).unwrap(), None);
            file.set_len(899).unwrap();
            assert_eq!(broken(dir.path(), &seals).unwrap(), changed);
            fs::remove_file(path_of(dir.path(), name)).unwrap();
            let missing = Some(Damage::everything(name, Fault::Missing));
            assert_eq!(broken(dir.path(), &seals).unwrap(), missing);
            fs::write(path_of(dir.path(), name), vec![n; 900 + usize::from(n)]).unwrap();
        }
    }

    #[test]
    fn the_digest_of_a_file_is_that_of_its_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes = vec![7; (2 << 20) + 5];
        fs::write(&path, &bytes).unwrap();
        let parts = bytes
            .chunks(1 << 20)
            .flat_map(|part| *xxh3_128(part).as_bytes());
        assert_eq!(digest(&path).unwrap(), xxh3_128(&parts.collect::<Vec<_>>()));
    }
}
