//! Files of the state that are mapped into memory and updated in place: what is stored survives the process.
//!
//! The first 4 KiB hold a sealed header with the volume's id and geometry; words follow. Space is allocated before
//! it is mapped, so that no store finds the disk full.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
};

use capture_core::engine::damage::Fault;
use memmap2::{MmapOptions, MmapRaw};
use parking_lot::Mutex;
use tidemark_disk::durable;

use super::{files::found, volume_file::data_from};

/// Bytes before the words.
pub(super) const HEADER_LEN: u64 = 4096;
const WORD_LEN: u64 = 8;
/// Bytes that are read at a time.
const PART_LEN: u64 = 1 << 20;

/// How many words a file has.
#[derive(Debug, Clone, Copy)]
pub(super) enum Size {
    /// So many.
    Fixed(u64),
    /// At first none, then any number of whole entries.
    Growing {
        /// Words of an entry.
        entry: u64,
        /// The most words.
        max: u64,
    },
}

impl Size {
    const fn least(self) -> u64 {
        match self {
            Self::Fixed(words) => words,
            Self::Growing { .. } => 0,
        }
    }

    const fn most(self) -> u64 {
        match self {
            Self::Fixed(words) => words,
            Self::Growing { max, .. } => max,
        }
    }

    const fn allows(self, words: u64) -> bool {
        match self {
            Self::Fixed(fixed) => words == fixed,
            Self::Growing { entry, .. } => words.is_multiple_of(entry),
        }
    }
}

/// A mapped file of words.
#[derive(Debug)]
pub(super) struct MappedWords {
    file: File,
    map: MmapRaw,
    /// Words that have disk space; the map may reach further.
    words: AtomicUsize,
    words_max: usize,
    growing: Mutex<()>,
}

fn is_header(bytes: &[u8], expected: &[u8]) -> bool {
    bytes
        .strip_prefix(expected)
        .is_some_and(|rest| rest.iter().all(|&byte| byte == 0))
}

/// Reads all that the disk holds of a file; gives what comes before its words.
fn read_through(file: &File, length: u64) -> io::Result<Vec<u8>> {
    let mut part = vec![0; usize::try_from(length.min(PART_LEN)).unwrap_or(0)];
    let mut at = HEADER_LEN;
    loop {
        // Words that were never set take no reading.
        at = data_from(file, at, length)?;
        if at >= length {
            break;
        }
        let left = usize::try_from(length - at).map_or(part.len(), |left| left.min(part.len()));
        file.read_exact_at(&mut part[..left], at)?;
        at += left as u64;
    }
    let mut header = vec![0; usize::try_from(HEADER_LEN).unwrap_or(0)];
    file.read_exact_at(&mut header, 0)?;
    Ok(header)
}

impl MappedWords {
    /// Makes the file anew, all words zero.
    pub(super) fn create(path: &Path, header: &[u8], size: Size) -> io::Result<Self> {
        durable::remove_file(path)?;
        let file = durable::open_allocated(path, HEADER_LEN + size.least() * WORD_LEN)?;
        file.write_all_at(header, 0)?;
        file.sync_all()?;
        Self::map(file, size.most())
    }

    /// Opens the file; gives what is wrong with one that isn't whole: missing, of another volume, of a length that it
    /// never has, or not to be read by the disk, which would end the process that meets such a page of its map.
    pub(super) fn open(path: &Path, header: &[u8], size: Size) -> io::Result<Result<Self, Fault>> {
        let file = match found(File::options().read(true).write(true).open(path))? {
            Ok(file) => file,
            Err(fault) => return Ok(Err(fault)),
        };
        let length = file.metadata()?.len();
        let words = length.checked_sub(HEADER_LEN);
        if !words.is_some_and(|bytes| bytes % WORD_LEN == 0 && size.allows(bytes / WORD_LEN)) {
            return Ok(Err(Fault::Length));
        }
        match found(read_through(&file, length))? {
            Err(fault) => Ok(Err(fault)),
            Ok(found) if is_header(&found, header) => Self::map(file, size.most()).map(Ok),
            Ok(_) => Ok(Err(Fault::Header)),
        }
    }

    /// Gives the file another header, of the same length, durably: a disk writes it whole or not at all.
    pub(super) fn set_header(&self, header: &[u8]) -> io::Result<()> {
        self.file.write_all_at(header, 0)?;
        self.file.sync_all()
    }

    fn map(file: File, words_max: u64) -> io::Result<Self> {
        let too_large = |_| io::Error::from(io::ErrorKind::OutOfMemory);
        let words = (file.metadata()?.len() - HEADER_LEN) / WORD_LEN;
        let words_max = usize::try_from(words_max.max(words)).map_err(too_large)?;
        let length = words_max * 8 + usize::try_from(HEADER_LEN).map_err(too_large)?;
        let map = MmapOptions::new().len(length).map_raw(&file)?;
        let words = AtomicUsize::new(usize::try_from(words).map_err(too_large)?);
        Ok(Self {
            file,
            map,
            words,
            words_max,
            growing: Mutex::new(()),
        })
    }

    /// The words that there are.
    #[allow(unsafe_code)]
    pub(super) fn words(&self) -> &[AtomicU64] {
        let count = self.words.load(SeqCst);
        // SAFETY: the map is shared, writable, page-aligned, lives as long as `self`, and is `words_max` words long
        // past its header; the file has space for `count` ≤ `words_max` of them. The memory is only ever accessed as
        // atomics, and any bit pattern is a valid one.
        unsafe {
            let first = self
                .map
                .as_mut_ptr()
                .cast::<u8>()
                .add(4096)
                .cast::<AtomicU64>();
            std::slice::from_raw_parts(first, count)
        }
    }

    /// Makes it at least `words` long, as far as `words_max` allows; returns the length.
    pub(super) fn grow(&self, words: u64) -> io::Result<u64> {
        let _growing = self.growing.lock();
        let now = self.words.load(SeqCst);
        let wanted = usize::try_from(words)
            .unwrap_or(usize::MAX)
            .min(self.words_max);
        if wanted > now {
            let end_of = |words: usize| HEADER_LEN + words as u64 * WORD_LEN;
            durable::extend_allocated(&self.file, end_of(now), end_of(wanted))?;
            self.words.store(wanted, SeqCst);
        }
        Ok(now.max(wanted) as u64)
    }

    /// Zeroes every word.
    pub(super) fn reset(&self) -> io::Result<()> {
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        let mut at = HEADER_LEN;
        let end = HEADER_LEN + self.words.load(SeqCst) as u64 * WORD_LEN;
        while at < end {
            let part =
                usize::try_from(end - at).map_or(ZEROES.len(), |left| left.min(ZEROES.len()));
            self.file.write_all_at(&ZEROES[..part], at)?;
            at += part as u64;
        }
        Ok(())
    }

    /// Makes every store so far durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use capture_core::engine::{media::Map, records::encode_map_header};
    use tidemark_block::{BlockSize, Geometry, VolumeId};

    use super::*;

    #[test]
    fn a_flipped_bit_is_seen_at_every_byte_before_the_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map");
        let geometry = Geometry::new(1 << 20, BlockSize::MIN).unwrap();
        let header = encode_map_header(Map::Tracking, VolumeId::from_bytes([7; 16]), geometry);
        let made = MappedWords::create(&path, &header, Size::Fixed(3)).unwrap();
        made.words()
            .iter()
            .for_each(|word| word.store(u64::MAX, SeqCst));
        let open = || MappedWords::open(&path, &header, Size::Fixed(3)).unwrap();
        for at in 0..HEADER_LEN {
            let mut byte = [0];
            made.file.read_exact_at(&mut byte, at).unwrap();
            made.file
                .write_all_at(&[byte[0] ^ 1 << (at % 8)], at)
                .unwrap();
            assert_eq!(open().err(), Some(Fault::Header), "byte {at}");
            made.file.write_all_at(&byte, at).unwrap();
        }
        assert!(open().is_ok());
    }

    #[test]
    fn a_file_is_read_through_to_its_end_before_it_is_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create_new(dir.path().join("map")).unwrap();
        file.write_all_at(b"header", 0).unwrap();
        let length = HEADER_LEN + 3 * PART_LEN + WORD_LEN;
        file.set_len(length).unwrap();
        file.write_all_at(&[1], length - 1).unwrap();
        let file = File::open(dir.path().join("map")).unwrap();
        let header = read_through(&file, length).unwrap();
        assert_eq!(
            (header.len() as u64, &header[..6]),
            (HEADER_LEN, &b"header"[..])
        );
        read_through(&file, length + 1).unwrap_err();
        // This process has nothing at its first addresses.
        let unreadable = File::open("/proc/self/mem").unwrap();
        let told = found(read_through(&unreadable, length)).unwrap();
        assert_eq!(told, Err(Fault::Unreadable));
    }

    #[test]
    fn a_file_has_as_many_words_as_it_is_to_have() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map");
        let growing = Size::Growing { entry: 8, max: 64 };
        let least = HEADER_LEN;
        let cases = [
            (Size::Fixed(3), least + 24, None),
            (Size::Fixed(3), least + 23, Some(Fault::Length)),
            (Size::Fixed(3), least + 32, Some(Fault::Length)),
            (growing, least, None),
            (growing, least + 64, None),
            (growing, least + 8, Some(Fault::Length)),
            (growing, least - 1, Some(Fault::Length)),
        ];
        for (size, length, fault) in cases {
            drop(MappedWords::create(&path, b"header", size).unwrap());
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(length).unwrap();
            let opened = MappedWords::open(&path, b"header", size).unwrap();
            assert_eq!(opened.err(), fault, "{size:?} {length}");
        }
        std::fs::remove_file(&path).unwrap();
        let missing = MappedWords::open(&path, b"header", growing).unwrap();
        assert_eq!(missing.err(), Some(Fault::Missing));
    }
}
