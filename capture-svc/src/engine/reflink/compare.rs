//! What may differ between two clones, by the filesystem's own map of them.

use std::io;

use capture_core::reflink::{
    extents::{self, Difference},
    state::Base,
};
use tidemark_block::VolumeId;

use super::{CloneReader, fiemap::FileRuns};
use crate::engine::EngineError;

/// Comparisons of two maps, before every block is taken for changed.
const COMPARISONS_MAX: usize = 4;

/// What may differ between the base and a clone.
pub(super) fn changed_since(
    volume: VolumeId,
    base: Base,
    file: Option<&CloneReader>,
    newer: &CloneReader,
) -> Result<Difference, EngineError> {
    match (base, file) {
        (Base::Clone(_), Some(older)) => compared(volume, older, newer),
        (Base::Zero, _) => {
            let geometry = newer.geometry();
            let mut runs = FileRuns::new(newer.file(), geometry.length());
            let mut none = FileRuns::new(newer.file(), 0);
            extents::difference(&mut none, &mut runs, geometry).map_err(unmapped)
        }
        (Base::Lost | Base::Clone(_), _) => all_of(newer),
    }
}

/// What may differ between two clones.
pub(super) fn compared(
    volume: VolumeId,
    older: &CloneReader,
    newer: &CloneReader,
) -> Result<Difference, EngineError> {
    let geometry = newer.geometry();
    for _ in 0..COMPARISONS_MAX {
        let (mut was, mut is) = (runs_of(older), runs_of(newer));
        let found = extents::difference(&mut was, &mut is, geometry).map_err(unmapped)?;
        let again = extents::map_checksum(&mut runs_of(older)).map_err(unmapped)?;
        if again == found.older {
            return Ok(found);
        }
    }
    tracing::warn!(
        %volume,
        "the filesystem keeps moving the clone of the base (is it being balanced or defragmented?): every block is compared"
    );
    all_of(newer)
}

fn runs_of(reader: &CloneReader) -> FileRuns<'_> {
    FileRuns::new(reader.file(), reader.geometry().length())
}

fn all_of(newer: &CloneReader) -> Result<Difference, EngineError> {
    let geometry = newer.geometry();
    let mut runs = FileRuns::new(newer.file(), geometry.length());
    let mut none = FileRuns::new(newer.file(), 0);
    let mut found = extents::difference(&mut none, &mut runs, geometry).map_err(unmapped)?;
    found.changed = std::iter::once(geometry.all()).collect();
    Ok(found)
}

fn unmapped(error: io::Error) -> EngineError {
    EngineError::io("ask the filesystem where a clone lies", error)
}
