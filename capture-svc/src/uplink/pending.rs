//! The checksums of the interval in flight, in the order in which its frames are sent.
//!
//! They are applied to the checksum table once the receipt is recorded, and they give the digest of a prefix that is
//! resumed after a restart. The file survives a crash of the process, not a power loss (then the interval is gone
//! too): it is never synced, and whatever doesn't match its checksums is as if it were not there. What is missing is
//! computed again from the cut, or fetched from the vault.
//! `docs/FORMAT.md` has its bytes.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use tidemark_block::{
    BlockCount, BlockIndex, Checksum128, Extent, GenerationId, IntervalId, VolumeId,
    wire::{self, ENVELOPE_LEN, Reader, WireError},
    xxh3_128,
};
use tidemark_disk::guarded_map::is_unreadable;

const MAGIC: [u8; 8] = *b"TMPENDIN";
const VERSION: u16 = 1;
const HEADER_LEN: usize = ENVELOPE_LEN + 16 + 16 + 8;
const ENTRY_HEAD: usize = 20;
/// The most bytes of an entry: 64 extents with a block each.
const ENTRY_MAX: usize = 1 + 64 * (16 + 16) + 8;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    /// These extents are zero.
    Zero(Vec<Extent>),
    /// The blocks of these extents, with their checksums.
    Data(Vec<Extent>, Vec<Checksum128>),
    /// Everything below has been sent in batches up to here.
    Batch(BlockIndex),
    /// The interval is complete.
    End(BlockCount),
}

impl Entry {
    /// How many blocks a frame has.
    pub(crate) fn blocks(&self) -> u64 {
        match self {
            Self::Zero(extents) | Self::Data(extents, _) => {
                extents.iter().map(|e| e.count().get()).sum()
            }
            Self::Batch(_) | Self::End(_) => 0,
        }
    }

    /// Appends the entry.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + ENTRY_HEAD, 0);
        let extents = |out: &mut Vec<u8>, extents: &[Extent]| {
            for extent in extents {
                out.extend_from_slice(&extent.start().get().to_le_bytes());
                out.extend_from_slice(&extent.count().get().to_le_bytes());
            }
        };
        match self {
            Self::Zero(list) => {
                out.push(0);
                extents(out, list);
            }
            Self::Data(list, sums) => {
                out.push(1);
                extents(out, list);
                sums.iter()
                    .for_each(|sum| out.extend_from_slice(sum.as_bytes()));
            }
            Self::Batch(end) => {
                out.push(2);
                out.extend_from_slice(&end.get().to_le_bytes());
            }
            Self::End(blocks) => {
                out.push(3);
                out.extend_from_slice(&blocks.get().to_le_bytes());
            }
        }
        let length = u32::try_from(out.len() - start - ENTRY_HEAD).unwrap_or(u32::MAX);
        out[start + 16..start + 20].copy_from_slice(&length.to_le_bytes());
        let checksum = xxh3_128(&out[start + 16..]);
        out[start..start + 16].copy_from_slice(checksum.as_bytes());
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self, WireError> {
        fn extents(r: &mut Reader<'_>, until: u64) -> Result<Vec<Extent>, WireError> {
            let mut list = Vec::new();
            let mut blocks = 0u64;
            while !r.rest().is_empty()
                && (until == 0 || blocks.saturating_mul(16) < r.rest().len() as u64)
            {
                let (start, count) = (r.u64()?, r.u64()?);
                start.checked_add(count).ok_or(WireError::Range("extent"))?;
                blocks = blocks
                    .checked_add(count)
                    .ok_or(WireError::Range("extent"))?;
                list.push(Extent::new(BlockIndex::new(start), BlockCount::new(count)));
            }
            Ok(list)
        }
        let mut r = Reader::new(body);
        match r.u8()? {
            0 => Ok(Self::Zero(extents(&mut r, 0)?)),
            1 => {
                let list = extents(&mut r, 1)?;
                let (sums, rest) = r.rest().as_chunks::<16>();
                let blocks: u64 = list.iter().map(|e| e.count().get()).sum();
                if !rest.is_empty() || sums.len() as u64 != blocks {
                    return Err(WireError::Range("number of checksums"));
                }
                Ok(Self::Data(
                    list,
                    sums.iter().map(|s| Checksum128::from_bytes(*s)).collect(),
                ))
            }
            2 => {
                let end = r.u64()?;
                r.end()?;
                Ok(Self::Batch(BlockIndex::new(end)))
            }
            3 => {
                let blocks = r.u64()?;
                r.end()?;
                Ok(Self::End(BlockCount::new(blocks)))
            }
            _ => Err(WireError::Range("kind of entry")),
        }
    }
}

/// Whose checksums they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PendingKey {
    pub(crate) volume: VolumeId,
    pub(crate) interval: IntervalId,
    pub(crate) base: GenerationId,
}

impl PendingKey {
    fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(40);
        payload.extend_from_slice(self.volume.as_bytes());
        payload.extend_from_slice(self.interval.as_bytes());
        payload.extend_from_slice(&self.base.get().to_le_bytes());
        wire::seal(MAGIC, VERSION, &payload)
    }

    fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (_, payload) = wire::unseal(MAGIC, VERSION, bytes)?;
        let mut r = Reader::new(payload);
        let key = Self {
            volume: VolumeId::from_bytes(r.array()?),
            interval: IntervalId::from_bytes(r.array()?),
            base: GenerationId::new(r.u64()?),
        };
        r.end()?;
        Ok(key)
    }
}

/// Appends entries.
#[derive(Debug)]
pub(crate) struct PendingWriter {
    file: File,
}

impl PendingWriter {
    /// Starts anew, in place of whatever is there.
    pub(crate) fn create(path: &Path, key: PendingKey) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .open(path)?;
        file.write_all(&key.encode())?;
        Ok(Self { file })
    }

    /// Goes on behind the batch that ends at `watermark`, and gives every entry up to it to `visit`. None where the
    /// file is not that of the interval, or has no such batch: what `visit` was given is to be forgotten then.
    pub(crate) fn resume(
        path: &Path,
        key: PendingKey,
        watermark: BlockIndex,
        mut visit: impl FnMut(Entry) -> io::Result<()>,
    ) -> io::Result<Option<Self>> {
        let Some(mut reader) = PendingReader::open(path, key)? else {
            return Ok(None);
        };
        while let Some(entry) = reader.next()? {
            let found = entry == Entry::Batch(watermark);
            visit(entry)?;
            if found {
                let mut file = OpenOptions::new().write(true).open(path)?;
                file.set_len(reader.at)?;
                file.seek(SeekFrom::End(0))?;
                return Ok(Some(Self { file }));
            }
        }
        Ok(None)
    }

    /// Appends encoded entries; they survive the process once this returns.
    pub(crate) fn append(&mut self, entries: &[u8]) -> io::Result<()> {
        self.file.write_all(entries)
    }
}

/// Whether bytes were read; not where the file ends, or where the disk can't read it.
fn is_there(read: io::Result<()>) -> io::Result<bool> {
    match read {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof || is_unreadable(&error) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Reads entries up to the end, or to the first that is damaged.
#[derive(Debug)]
pub(crate) struct PendingReader {
    file: BufReader<File>,
    at: u64,
    body: Vec<u8>,
}

impl PendingReader {
    /// None where there is no such file, or it is another interval's.
    pub(crate) fn open(path: &Path, key: PendingKey) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut file = BufReader::new(file);
        let mut header = [0; HEADER_LEN];
        if !is_there(file.read_exact(&mut header))? {
            return Ok(None);
        }
        Ok((PendingKey::decode(&header) == Ok(key)).then_some(Self {
            file,
            at: HEADER_LEN as u64,
            body: Vec::new(),
        }))
    }

    /// The next entry.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut head = [0; ENTRY_HEAD];
        let mut whole = |buffer: &mut [u8]| is_there(self.file.read_exact(buffer));
        if !whole(&mut head)? {
            return Ok(None);
        }
        let (checksum, length) = head.split_at(16);
        let mut bytes = [0; 4];
        bytes.copy_from_slice(length);
        let body_len = u32::from_le_bytes(bytes) as usize;
        if body_len > ENTRY_MAX {
            return Ok(None);
        }
        self.body.clear();
        self.body.extend_from_slice(length);
        self.body.resize(4 + body_len, 0);
        if !whole(&mut self.body[4..])? || xxh3_128(&self.body).as_bytes() != checksum {
            return Ok(None);
        }
        self.at += (ENTRY_HEAD + body_len) as u64;
        Ok(Entry::decode(&self.body[4..]).ok())
    }
}

/// Whether the interval's checksums are all there.
pub(crate) fn is_complete(path: &Path, key: PendingKey) -> io::Result<bool> {
    let Some(mut reader) = PendingReader::open(path, key)? else {
        return Ok(false);
    };
    while let Some(entry) = reader.next()? {
        if let Entry::End(_) = entry {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The path of the file in a volume's state directory.
pub(crate) fn path_in(dir: &Path) -> PathBuf {
    dir.join("pending")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> PendingKey {
        PendingKey {
            volume: VolumeId::from_bytes([1; 16]),
            interval: IntervalId::from_bytes([2; 16]),
            base: GenerationId::new(3),
        }
    }

    fn extent(start: u64, count: u64) -> Extent {
        Extent::new(BlockIndex::new(start), BlockCount::new(count))
    }

    fn sums(count: u8) -> Vec<Checksum128> {
        (1..=count)
            .map(|n| Checksum128::from_bytes([n; 16]))
            .collect()
    }

    fn entries() -> Vec<Entry> {
        vec![
            Entry::Data(vec![extent(0, 2), extent(5, 1)], sums(3)),
            Entry::Zero(vec![extent(6, 1000), extent(2000, 1 << 33)]),
            Entry::Batch(BlockIndex::new(1 << 34)),
            Entry::Data(
                (0..64).map(|n| extent((1 << 35) + 2 * n, 1)).collect(),
                sums(64),
            ),
            Entry::Batch(BlockIndex::new(1 << 36)),
            Entry::End(BlockCount::new(70)),
        ]
    }

    fn write(path: &Path, entries: &[Entry]) {
        let mut writer = PendingWriter::create(path, key()).unwrap();
        let mut out = Vec::new();
        entries.iter().for_each(|entry| entry.encode(&mut out));
        writer.append(&out).unwrap();
    }

    fn read(path: &Path) -> Vec<Entry> {
        let mut reader = PendingReader::open(path, key()).unwrap().unwrap();
        std::iter::from_fn(|| reader.next().unwrap()).collect()
    }

    #[test]
    fn entries_come_back_up_to_the_first_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_in(dir.path());
        assert!(!is_complete(&path, key()).unwrap());
        write(&path, &entries());
        assert_eq!(read(&path), entries());
        assert!(is_complete(&path, key()).unwrap());
        let other = PendingKey {
            base: GenerationId::new(4),
            ..key()
        };
        assert!(PendingReader::open(&path, other).unwrap().is_none());
        let whole = std::fs::read(&path).unwrap();
        for len in (0..whole.len()).step_by(41) {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(!is_complete(&path, key()).unwrap(), "{len}");
        }
        for place in (HEADER_LEN..whole.len()).step_by(31) {
            let mut damaged = whole.clone();
            damaged[place] ^= 0x10;
            std::fs::write(&path, damaged).unwrap();
            let found = read(&path);
            assert!(found.len() < entries().len(), "{place}");
            assert_eq!(found, entries()[..found.len()]);
        }
    }

    #[test]
    fn a_resumed_file_goes_on_behind_the_durable_batch() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_in(dir.path());
        write(&path, &entries());
        let mut seen = Vec::new();
        let resumed = PendingWriter::resume(&path, key(), BlockIndex::new(1 << 34), |entry| {
            seen.push(entry);
            Ok(())
        });
        let mut writer = resumed.unwrap().unwrap();
        assert_eq!(seen, entries()[..3]);
        let mut out = Vec::new();
        Entry::End(BlockCount::new(3)).encode(&mut out);
        writer.append(&out).unwrap();
        let mut expected = entries()[..3].to_vec();
        expected.push(Entry::End(BlockCount::new(3)));
        assert_eq!(read(&path), expected);
        let missing = PendingWriter::resume(&path, key(), BlockIndex::new(17), |_| Ok(()));
        assert!(missing.unwrap().is_none());
    }

    #[test]
    fn the_page_of_formats_has_these_lengths() {
        let page = include_str!("../../../docs/FORMAT.md");
        for mark in [
            format!(
                "<!-- table: pending checksums, total {} -->",
                HEADER_LEN - ENVELOPE_LEN
            ),
            format!("<!-- table: pending entry, total {} -->", ENTRY_HEAD + 1),
            "magic `TMPENDIN`, version 1".to_owned(),
        ] {
            assert!(page.contains(&mark), "{mark}");
        }
    }

    proptest! {
        #[test]
        fn no_entry_makes_reading_panic(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Entry::decode(&body);
        }
    }
}
