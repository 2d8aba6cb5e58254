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

use super::files::path_of;

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
        let fault = match digest(&path_of(dir, file)) {
            Ok(found) if found == *seal => continue,
            Ok(_) => Fault::Changed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Fault::Missing,
            Err(error) => return Err(error),
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
