//! What two clones of a file differ in, by where their extents lie.
//!
//! Bytes at one place of the disk can't change while a clone holds them: every write to a shared extent goes to a new
//! place. So a range that lies at the same place in both clones, or is zero in both, is the same. Zero is what is not
//! allocated, and what is allocated and unwritten: writing into preallocated space changes nothing but that flag.
//! Where a place says nothing (compressed, encrypted or inline data, of which several parts have one address) the
//! range counts as different, and checksums tell.

use tidemark_block::{BlockSet, Checksum128, Geometry, block_checksum};

/// Where a range of a file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere, or where nothing has been written: it reads as zeroes.
    Zero,
    /// From this byte of the disk on.
    At(u64),
    /// That can't be told.
    Unknown,
}

/// A range of a file that lies in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first byte of the file.
    pub start: u64,
    /// How many bytes; not 0.
    pub length: u64,
    /// Where.
    pub place: Place,
}

impl Run {
    const fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }

    /// Where the byte `at` of the file, which is within the run, lies.
    const fn place_at(&self, at: u64) -> Place {
        match self.place {
            Place::At(disk) => Place::At(disk.saturating_add(at.saturating_sub(self.start))),
            other => other,
        }
    }
}

/// Something that gives a file's runs: ascending, not overlapping; what lies between them is zero.
pub trait Runs {
    /// Why the map can't be read.
    type Error;

    /// The next run; none behind the last one.
    ///
    /// # Errors
    /// Where the map can't be read.
    fn next(&mut self) -> Result<Option<Run>, Self::Error>;
}

/// One file's runs, the zeroes between them included, as far as they have been looked at.
struct Walk<'a, R> {
    runs: &'a mut R,
    next: Option<Run>,
    count: u64,
    seal: Checksum128,
}

impl<'a, R: Runs> Walk<'a, R> {
    fn new(runs: &'a mut R) -> Result<Self, R::Error> {
        let mut walk = Self {
            runs,
            next: None,
            count: 0,
            seal: Checksum128::ZERO,
        };
        walk.advance()?;
        Ok(walk)
    }

    fn advance(&mut self) -> Result<(), R::Error> {
        self.next = self.runs.next()?;
        if let Some(run) = self.next {
            self.count += 1;
            self.seal = sealed(self.seal, run);
        }
        Ok(())
    }

    /// Where the byte lies, and up to which byte that goes on.
    fn at(&mut self, at: u64) -> Result<(Place, u64), R::Error> {
        loop {
            match self.next {
                None => return Ok((Place::Zero, u64::MAX)),
                Some(run) if run.end() <= at => self.advance()?,
                Some(run) if run.start > at => return Ok((Place::Zero, run.start)),
                Some(run) => return Ok((run.place_at(at), run.end())),
            }
        }
    }

    fn rest(mut self) -> Result<(u64, Checksum128), R::Error> {
        while self.next.is_some() {
            self.advance()?;
        }
        Ok((self.count, self.seal))
    }
}

/// The checksum of all runs so far.
fn sealed(before: Checksum128, run: Run) -> Checksum128 {
    let (kind, disk) = match run.place {
        Place::Zero => (0_u64, 0),
        Place::At(disk) => (1, disk),
        Place::Unknown => (2, 0),
    };
    let mut bytes = [0; 48];
    bytes[..16].copy_from_slice(before.as_bytes());
    for (field, at) in [run.start, run.length, kind, disk]
        .into_iter()
        .zip([16, 24, 32, 40])
    {
        bytes[at..at + 8].copy_from_slice(&field.to_le_bytes());
    }
    block_checksum(&bytes)
}

/// What a comparison of two maps found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The blocks that may differ.
    pub changed: BlockSet,
    /// Runs of the newer file: what a clone of it costs.
    pub runs: u64,
    /// Of the older file's map: another one means that it was moved on the disk meanwhile.
    pub older: Checksum128,
}

/// Compares two files' maps.
///
/// A filesystem may move a file's bytes to another place. Where it does so between the reading of the two maps the
/// place where the older file's were may be the newer file's by then. So the older one's map must be the same after
/// the comparison as it was in it: [`map_checksum`] of it then is [`Difference::older`].
///
/// # Errors
/// Where a map can't be read.
pub fn difference<R: Runs>(
    older: &mut R,
    newer: &mut R,
    geometry: Geometry,
) -> Result<Difference, R::Error> {
    let (mut older, mut newer) = (Walk::new(older)?, Walk::new(newer)?);
    let mut changed = BlockSet::new();
    let mut at = 0;
    while at < geometry.length() {
        let ((was, was_end), (is, is_end)) = (older.at(at)?, newer.at(at)?);
        let end = was_end.min(is_end).min(geometry.length());
        if was != is || was == Place::Unknown {
            changed.insert(geometry.covering(at, end - at));
        }
        at = end;
    }
    let (runs, _) = newer.rest()?;
    let (_, older) = older.rest()?;
    Ok(Difference {
        changed,
        runs,
        older,
    })
}

/// The checksum of a file's whole map.
///
/// # Errors
/// Where the map can't be read.
pub fn map_checksum<R: Runs>(runs: &mut R) -> Result<Checksum128, R::Error> {
    Ok(Walk::new(runs)?.rest()?.1)
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, convert::Infallible};

    use proptest::prelude::*;
    use tidemark_block::{BlockIndex, BlockSize};

    use super::*;

    struct List(VecDeque<Run>);

    impl Runs for List {
        type Error = Infallible;

        fn next(&mut self) -> Result<Option<Run>, Infallible> {
            Ok(self.0.pop_front())
        }
    }

    fn list(runs: &[(u64, u64, Place)]) -> List {
        let run = |(start, length, place): &(u64, u64, Place)| Run {
            start: *start,
            length: *length,
            place: *place,
        };
        List(runs.iter().map(run).collect())
    }

    const BLOCK: u64 = 4096;

    fn changed(older: &[(u64, u64, Place)], newer: &[(u64, u64, Place)]) -> Vec<u64> {
        let geometry = Geometry::new(16 * BLOCK, BlockSize::MIN).unwrap();
        let Ok(found) = difference(&mut list(older), &mut list(newer), geometry);
        (0..16)
            .filter(|n| found.changed.contains(BlockIndex::new(*n)))
            .collect()
    }

    #[test]
    fn what_lies_at_another_place_differs_and_nothing_else() {
        use Place::{At, Unknown, Zero};
        let whole = &[(0, 16 * BLOCK, At(1 << 20))];
        assert_eq!(changed(whole, whole), []);
        // The same place in other pieces.
        let split = &[
            (0, 5 * BLOCK, At(1 << 20)),
            (5 * BLOCK, 11 * BLOCK, At((1 << 20) + 5 * BLOCK)),
        ];
        assert_eq!(changed(whole, split), []);
        let moved = &[
            (0, 5 * BLOCK, At(1 << 20)),
            (5 * BLOCK, 2 * BLOCK, At(1 << 30)),
            (7 * BLOCK, 9 * BLOCK, At((1 << 20) + 7 * BLOCK)),
        ];
        assert_eq!(changed(whole, moved), [5, 6]);
        assert_eq!(changed(moved, whole), [5, 6]);
        // A hole and unwritten space are both zeroes.
        let unwritten = &[(2 * BLOCK, 4 * BLOCK, Zero)];
        assert_eq!(changed(&[], unwritten), []);
        // Writing it changes only that.
        let written = &[
            (2 * BLOCK, BLOCK, At(1 << 22)),
            (3 * BLOCK, 3 * BLOCK, Zero),
        ];
        assert_eq!(changed(unwritten, written), [2]);
        assert_eq!(changed(written, &[]), [2]);
        // What can't be told differs, even from itself.
        let unknown = &[(0, 2 * BLOCK, Unknown)];
        assert_eq!(changed(unknown, unknown), [0, 1]);
        // Smaller units of the filesystem: the whole block differs.
        let part = &[(9 * BLOCK + 1024, 512, At(1 << 22))];
        assert_eq!(changed(&[], part), [9]);
        // What lies behind the volume's end is nothing of it.
        assert_eq!(changed(&[], &[(16 * BLOCK, BLOCK, At(0))]), []);
    }

    #[test]
    fn a_map_that_moved_has_another_checksum() {
        use Place::At;
        let geometry = Geometry::new(16 * BLOCK, BlockSize::MIN).unwrap();
        let before = &[(0, 4 * BLOCK, At(0)), (8 * BLOCK, BLOCK, At(1 << 20))];
        let Ok(found) = difference(&mut list(before), &mut list(&[]), geometry);
        assert_eq!(map_checksum(&mut list(before)), Ok(found.older));
        for after in [
            &[(0, 4 * BLOCK, At(0)), (8 * BLOCK, BLOCK, At(2 << 20))][..],
            &before[..1],
            &[],
        ] {
            assert_ne!(map_checksum(&mut list(after)), Ok(found.older), "{after:?}");
        }
        assert_eq!(found.runs, 0);
    }

    proptest! {
        /// Against what one finds by asking for each 512 bytes.
        #[test]
        fn the_difference_is_that_of_every_sector(
            older in prop::collection::vec((0_u64..40, 1_u64..20, 0_u8..4, 0_u64..6), 0..12),
            newer in prop::collection::vec((0_u64..40, 1_u64..20, 0_u8..4, 0_u64..6), 0..12),
        ) {
            const SECTORS: usize = 8 * 16;
            let lay = |parts: &[(u64, u64, u8, u64)]| {
                let mut at = 0;
                let mut runs = VecDeque::new();
                let mut sectors = vec![Place::Zero; SECTORS];
                for (gap, length, kind, disk) in parts {
                    at += gap % 9;
                    let disk = disk * 64 * 512;
                    let place = match kind {
                        0 => Place::Zero,
                        1 => Place::Unknown,
                        _ => Place::At(disk),
                    };
                    runs.push_back(Run { start: at * 512, length: length * 512, place });
                    for n in 0..*length {
                        let here = match place {
                            Place::At(disk) => Place::At(disk + n * 512),
                            other => other,
                        };
                        if let Some(sector) = sectors.get_mut(usize::try_from(at + n).unwrap()) {
                            *sector = here;
                        }
                    }
                    at += length;
                }
                (List(runs), sectors)
            };
            let geometry = Geometry::new(16 * BLOCK, BlockSize::MIN).unwrap();
            let ((mut older, were), (mut newer, are)) = (lay(&older), lay(&newer));
            let Ok(found) = difference(&mut older, &mut newer, geometry);
            for block in 0..16_usize {
                let sectors = block * 8..(block + 1) * 8;
                let differs = sectors.into_iter().any(|n| were[n] != are[n] || were[n] == Place::Unknown);
                prop_assert_eq!(found.changed.contains(BlockIndex::new(block as u64)), differs);
            }
        }
    }
}
