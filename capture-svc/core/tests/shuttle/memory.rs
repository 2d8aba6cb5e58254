//! A medium in memory whose every access is a point at which another thread may come first.
//!
//! Bytes of the volume and of the spool move a chunk at a time, so that a block that is written while it is copied is
//! seen torn. A chunk holds one number over and over: which request wrote it, or zeroes. What is left after the end of
//! the process, or of the power, can be taken at any point of a schedule without disturbing it.

use std::collections::BTreeMap;

use capture_core::engine::{
    capture::TRACKING_WORDS,
    dirty::DirtyLayout,
    intent::{decode_page, encode_page, place_of},
    media::{Map, Media, MediaError, MediaResult, Record},
    records::{SnapshotTable, encode_carry, encode_interval},
    spool::ENTRY_WORDS,
};
use shuttle::{
    rand::{Rng, thread_rng},
    sync::{
        Condvar,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
};
use tidemark_block::BlockSet;

use crate::{
    BLOCK, BLOCKS,
    chunks::{CHUNKS, Chunks, Image, Tag, image, index, peek},
    volume,
};

const EIO: MediaError = MediaError(5);
const ENOSPC: MediaError = MediaError(28);

/// The lock of a stripe.
#[derive(Debug, Default)]
struct Stripe {
    holder: shuttle::sync::Mutex<Option<thread::ThreadId>>,
    free: Condvar,
}

/// What a power loss leaves of the files that are synced, besides what they hold now.
#[derive(Debug, Clone)]
struct Synced {
    volume: Vec<Tag>,
    intent: Vec<Place>,
}

/// A place of the intent file. There is one page, in two of them.
#[derive(Debug, Clone)]
struct Place {
    bytes: Vec<u8>,
    /// Its sequence and the regions that are set.
    regions: Option<(u64, u64)>,
}

impl Place {
    fn new(bytes: &[u8]) -> Self {
        let page = decode_page(volume(), 0, bytes);
        Self {
            bytes: bytes.to_vec(),
            regions: page.map(|(sequence, bits)| (sequence, bits[0])),
        }
    }
}

/// The medium.
#[derive(Debug)]
pub(crate) struct Memory {
    volume: Chunks,
    spool: Chunks,
    words: [Vec<AtomicU64>; 4],
    stripes: Vec<Stripe>,
    /// Files whose accesses are one step each. Nobody holds the lock at a scheduling point.
    files: parking_lot::Mutex<Files>,
    /// What every access of those files touches first.
    step: AtomicU64,
    pub(crate) puts: parking_lot::Mutex<Puts>,
}

/// What becomes of records that are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Puts {
    Succeed,
    /// Once in so many times there is no room.
    FindNoRoom(u64),
    /// Once in so many times they fail, and nobody can tell which record is there now.
    EndUnknown(u64),
    /// The same, each time, but for intervals only.
    EndUnknownOfInterval,
}

#[derive(Debug, Clone)]
struct Files {
    records: BTreeMap<Record, Vec<u8>>,
    /// Records can't be read.
    unreadable: bool,
    intent: Vec<Place>,
    synced: Synced,
}

impl Files {
    fn replace(&mut self, record: Record, content: Option<&[u8]>) {
        match content {
            Some(content) => self.records.insert(record, content.to_vec()),
            None => self.records.remove(&record),
        };
    }
}

/// What is left of a medium after the end of whatever ran on it.
#[derive(Debug)]
pub(crate) struct Remains {
    volume: Vec<Tag>,
    spool: Vec<Tag>,
    words: [Vec<u64>; 4],
    files: Files,
}

const fn map_index(map: Map) -> usize {
    match map {
        Map::Tracking => 0,
        Map::Dirty(parity) => 1 + parity as usize,
        Map::Slots => 3,
    }
}

impl Memory {
    /// A medium for a new volume, all zeroes.
    pub(crate) fn new(entries: u64, slots: u64) -> Self {
        let dirty = DirtyLayout::new(BLOCKS).total();
        let page = |sequence| Place::new(&encode_page(volume(), 0, sequence, &[0; _])[..]);
        let mut intent = vec![page(0); 2];
        intent[index(place_of(0, 1))] = page(1);
        let records = [
            (Record::Carry, encode_carry(volume(), &BlockSet::new())),
            (Record::Interval, encode_interval(volume(), None)),
            (Record::Snapshots, SnapshotTable::default().encode(volume())),
        ];
        let zeroes = vec![0; index(BLOCKS) * CHUNKS];
        Self::from(Remains {
            files: Files {
                records: records.into(),
                unreadable: false,
                intent: intent.clone(),
                synced: Synced {
                    volume: zeroes.clone(),
                    intent,
                },
            },
            volume: zeroes,
            spool: vec![0; index(slots) * CHUNKS],
            words: [TRACKING_WORDS, dirty, dirty, index(entries) * ENTRY_WORDS]
                .map(|words| vec![0; words]),
        })
    }

    fn step(&self) {
        self.step.fetch_add(1, SeqCst);
    }

    /// The volume's content at this point.
    pub(crate) fn live(&self) -> Image {
        image(&self.volume.peek())
    }

    /// The volume's content as a loss of power would leave it where nothing written since the last sync survives.
    pub(crate) fn synced(&self) -> Image {
        image(&self.files.lock().synced.volume)
    }

    /// Entries of before-images that are in use.
    pub(crate) fn entries_in_use(&self) -> usize {
        let entries = self.words[map_index(Map::Slots)].chunks_exact(ENTRY_WORDS);
        entries.filter(|entry| peek(&entry[0]) != 0).count()
    }

    /// The records that there are.
    pub(crate) fn records(&self) -> Vec<Record> {
        self.files.lock().records.keys().copied().collect()
    }

    /// A record's content at this point.
    pub(crate) fn record(&self, record: Record) -> Option<Vec<u8>> {
        self.files.lock().records.get(&record).cloned()
    }

    /// The lowest level of a dirty map at this point.
    pub(crate) fn dirty(&self, parity: u8) -> u64 {
        let words: Vec<_> = self.words(Map::Dirty(parity)).iter().map(peek).collect();
        // Of so few blocks each level is one word.
        let [groups, words, blocks] = words[..] else {
            panic!("a dirty map of {} words", words.len())
        };
        if groups & words & 1 == 1 { blocks } else { 0 }
    }

    /// The regions that are set in the intent map at this point, as written and as synced: a bit for each.
    pub(crate) fn intent(&self) -> [u64; 2] {
        let files = self.files.lock();
        [&files.intent, &files.synced.intent].map(|places| {
            let newest = places.iter().filter_map(|place| place.regions).max();
            newest.map_or(u64::MAX, |(_, regions)| regions)
        })
    }

    /// What a clean close takes the digests of.
    pub(crate) fn sealed(&self) -> (BTreeMap<Record, Vec<u8>>, [Vec<u64>; 4]) {
        let Remains { words, files, .. } = self.remains();
        (files.records, words)
    }

    /// What a process that ended at this point would leave.
    pub(crate) fn remains(&self) -> Remains {
        Remains {
            volume: self.volume.peek(),
            spool: self.spool.peek(),
            words: self
                .words
                .each_ref()
                .map(|words| words.iter().map(peek).collect()),
            files: self.files.lock().clone(),
        }
    }

    fn holder(&self, stripe: u64) -> &Stripe {
        &self.stripes[index(stripe)]
    }
}

impl Remains {
    /// Takes the power away, too: what was not synced is there or not, each part of it by itself.
    pub(crate) fn without_power(mut self) -> Self {
        let mut random = thread_rng();
        let synced = self.files.synced.clone();
        for (now, then) in self.volume.iter_mut().zip(synced.volume) {
            if random.r#gen() {
                *now = then;
            }
        }
        for (now, then) in self.files.intent.iter_mut().zip(synced.intent) {
            if random.r#gen() {
                *now = then;
            }
        }
        self.words.iter_mut().for_each(|words| words.fill(0));
        self.spool.fill(Tag::MAX);
        self
    }

    /// The volume's content.
    pub(crate) fn volume(&self) -> Image {
        image(&self.volume)
    }
}

impl From<Remains> for Memory {
    fn from(mut remains: Remains) -> Self {
        remains.files.unreadable = false;
        Self {
            volume: Chunks::holding(remains.volume),
            spool: Chunks::holding(remains.spool),
            words: remains
                .words
                .map(|words| words.into_iter().map(AtomicU64::new).collect()),
            stripes: (0..BLOCKS).map(|_| Stripe::default()).collect(),
            files: parking_lot::Mutex::new(remains.files),
            step: AtomicU64::new(0),
            puts: parking_lot::Mutex::new(Puts::Succeed),
        }
    }
}

impl Media for Memory {
    fn read_volume(&self, offset: u64, buffer: &mut [u8]) -> MediaResult {
        self.volume.read(offset, buffer);
        Ok(())
    }

    fn write_volume(&self, offset: u64, data: &[u8]) -> MediaResult {
        self.volume.write(offset, data);
        Ok(())
    }

    fn zero_volume(&self, offset: u64, length: u64, _allocated: bool) -> MediaResult {
        self.write_volume(offset, &vec![0; index(length)])
    }

    fn sync_volume(&self) -> MediaResult {
        self.step();
        let now = self.volume.peek();
        self.step();
        // What was written meanwhile may be durable, too, and is not.
        self.files.lock().synced.volume = now;
        Ok(())
    }

    fn drop_volume_cache(&self) -> MediaResult {
        Ok(())
    }

    fn read_before(&self, slot: u64, buffer: &mut [u8]) -> MediaResult {
        self.spool.read(slot * BLOCK as u64, buffer);
        Ok(())
    }

    fn write_before(&self, slot: u64, data: &[u8]) -> MediaResult {
        self.spool.write(slot * BLOCK as u64, data);
        Ok(())
    }

    fn reserve(&self, _entries: u64, _slots: u64) -> MediaResult<(u64, u64)> {
        let entries = self.words[map_index(Map::Slots)].len() / ENTRY_WORDS;
        Ok((entries as u64, self.spool.blocks()))
    }

    fn read_intent(&self, place: u64, page: &mut [u8]) -> MediaResult {
        page.copy_from_slice(&self.files.lock().intent[index(place)].bytes);
        Ok(())
    }

    fn write_intent(&self, place: u64, page: &[u8]) -> MediaResult {
        self.step();
        self.files.lock().intent[index(place)] = Place::new(page);
        Ok(())
    }

    fn sync_intent(&self) -> MediaResult {
        self.step();
        let mut files = self.files.lock();
        files.synced.intent = files.intent.clone();
        Ok(())
    }

    fn put(&self, record: Record, content: Option<&[u8]>) -> MediaResult {
        self.step();
        let mut random = thread_rng();
        let mut once_in = |times| random.gen_range(0..times) == 0;
        let puts = *self.puts.lock();
        let unknown = match puts {
            Puts::EndUnknown(times) => once_in(times),
            Puts::EndUnknownOfInterval => record == Record::Interval,
            Puts::Succeed | Puts::FindNoRoom(_) => false,
        };
        let files = &mut *self.files.lock();
        if unknown {
            files.unreadable = true;
            if once_in(2) {
                files.replace(record, content);
            }
            return Err(EIO);
        }
        match puts {
            // To remove one takes no room.
            Puts::FindNoRoom(times) if content.is_some() && once_in(times) => Err(ENOSPC),
            _ => {
                files.replace(record, content);
                Ok(())
            }
        }
    }

    fn get(&self, record: Record) -> MediaResult<Option<Vec<u8>>> {
        let files = self.files.lock();
        if files.unreadable {
            return Err(EIO);
        }
        Ok(files.records.get(&record).cloned())
    }

    fn changes(&self) -> MediaResult<Vec<u64>> {
        let cut = |record: Record| match record {
            Record::Changes(cut) => Some(cut),
            _ => None,
        };
        Ok(self.records().into_iter().filter_map(cut).collect())
    }

    fn words(&self, map: Map) -> &[AtomicU64] {
        &self.words[map_index(map)]
    }

    fn reset(&self, map: Map) -> MediaResult {
        self.words(map)
            .iter()
            .for_each(|word| word.store(0, SeqCst));
        Ok(())
    }

    fn lock(&self, first: u64, last: u64) -> bool {
        for stripe in first..=last {
            let Stripe { holder, free } = self.holder(stripe);
            let mut holder = holder.lock().unwrap();
            while holder.is_some() {
                holder = free.wait(holder).unwrap();
            }
            *holder = Some(thread::current().id());
        }
        true
    }

    fn unlock(&self, first: u64, last: u64) {
        for stripe in first..=last {
            let Stripe { holder, free } = self.holder(stripe);
            let mut holder = holder.lock().unwrap();
            assert_eq!(*holder, Some(thread::current().id()));
            *holder = None;
            free.notify_one();
        }
    }
}
