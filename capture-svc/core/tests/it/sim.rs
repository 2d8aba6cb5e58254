//! A simulated disk, page cache and memory of mapped files.
//!
//! The fault model:
//! - **Process crash**: files and mapped words keep everything stored before. A write to the volume that was under
//!   way may have reached any number of its 512-byte sectors, from its start.
//! - **Power loss**: each 512-byte sector of the volume and of the intent file is what was last synced or any later
//!   version of it, each sector by itself. Mapped words and the spool hold anything. Records are replaced
//!   atomically and durably.
//! - **Failed sync**: reported once; sectors that were not synced are any of their versions on the disk. Readers see
//!   that at once, or still the last version, which counts as synced and is never written, until the cache is dropped
//!   or the power is lost.
//! - **Bad sectors**: records and places of the intent file, of a test's choice, can't be read until they are written
//!   again.
//! - **No room**: replacing a record, and growing the spool, may fail with nothing changed.
//!
//! A crash, or a failure, may be set for any future operation that changes something; from a crash on each operation
//! fails, and the words are those of that instant.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use capture_core::engine::{
    capture::{EPOCH_WORD, TRACKING_WORDS},
    damage::StateFile,
    dirty::DirtyLayout,
    intent::{PAGE_LEN, encode_page, page_count, place_of},
    media::{Map, Media, MediaError, MediaResult, Record},
    records::{SnapshotTable, encode_carry, encode_interval},
    spool::ENTRY_WORDS,
};
use tidemark_block::{BlockSet, Geometry, VolumeId};

const SECTOR: usize = 512;
const BLOCK: usize = 4096;
const CRASHED: MediaError = MediaError(-1);
const EIO: MediaError = MediaError(5);
const ENOSPC: MediaError = MediaError(28);

/// SplitMix64: small, and the same everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A file whose sectors remember every version since the last sync.
#[derive(Debug, Clone, Default)]
struct Sectors {
    now: Vec<u8>,
    /// By sector: the synced version, then the later ones but the last.
    before: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    /// By sector: what the disk has, where the cache shows something else and takes it for synced.
    on_disk: BTreeMap<usize, [u8; SECTOR]>,
}

impl Sectors {
    fn new(length: usize) -> Self {
        Self {
            now: vec![0; length],
            before: BTreeMap::new(),
            on_disk: BTreeMap::new(),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap();
        for sector in offset / SECTOR..=(offset + data.len() - 1) / SECTOR {
            let now = self.now[sector * SECTOR..][..SECTOR].try_into().unwrap();
            let old = self.on_disk.remove(&sector).unwrap_or(now);
            self.before.entry(sector).or_default().push(old);
        }
        self.now[offset..offset + data.len()].copy_from_slice(data);
    }

    fn sync(&mut self) {
        self.before.clear();
    }

    /// What was not synced becomes any version of it on the disk, and the cache may go on showing the last one.
    fn fail(&mut self, random: &mut Random) {
        let shown = self.now.clone();
        let sectors: Vec<_> = self.before.keys().copied().collect();
        self.scatter(random);
        for sector in sectors {
            let bytes = sector * SECTOR..(sector + 1) * SECTOR;
            if random.one_in(2) {
                let disk = self.now[bytes.clone()].try_into().unwrap();
                self.on_disk.insert(sector, disk);
                self.now[bytes.clone()].copy_from_slice(&shown[bytes]);
            }
        }
    }

    /// The cache forgets what it takes for synced.
    fn drop_cache(&mut self) {
        for (sector, disk) in std::mem::take(&mut self.on_disk) {
            self.now[sector * SECTOR..][..SECTOR].copy_from_slice(&disk);
        }
    }

    /// The power is gone: the cache too, and what was not synced becomes any version of it.
    fn lose(&mut self, random: &mut Random) {
        self.drop_cache();
        self.scatter(random);
    }

    /// What was not synced becomes any version of it.
    fn scatter(&mut self, random: &mut Random) {
        for (sector, versions) in std::mem::take(&mut self.before) {
            let choice = random.index(versions.len() + 1);
            if let Some(version) = versions.get(choice) {
                self.now[sector * SECTOR..][..SECTOR].copy_from_slice(version);
            }
        }
    }
}

#[derive(Debug, Clone)]
struct Inner {
    random: Random,
    volume: Sectors,
    intent: Sectors,
    spool: BTreeMap<u64, Vec<u8>>,
    records: BTreeMap<Record, Vec<u8>>,
    /// Records, and places of the intent file, that the disk can't read until they are written again.
    unreadable: (BTreeSet<Record>, BTreeSet<u64>),
    locked: BTreeSet<u64>,
    /// Operations until the crash.
    crash_in: Option<u64>,
    /// Operations until one fails, and whether that was a sync.
    fail_in: Option<u64>,
    failed_sync: Option<bool>,
    crashed: bool,
    /// The words at the crash.
    frozen: Option<[Vec<u64>; 4]>,
    trace: u64,
}

/// How often things fail without a crash: once in this many times, or never.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    pub(crate) sync: Option<u64>,
    pub(crate) put: Option<u64>,
    pub(crate) reserve: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    inner: RefCell<Inner>,
    words: [Vec<AtomicU64>; 4],
    faults: RefCell<Faults>,
    /// Volume syncs that succeeded.
    pub(crate) syncs: AtomicU64,
}

/// A disk; clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct Sim(pub(crate) Rc<Shared>);

const fn map_index(map: Map) -> usize {
    match map {
        Map::Tracking => 0,
        Map::Dirty(parity) => 1 + parity as usize,
        Map::Slots => 3,
    }
}

impl Sim {
    pub(crate) fn new(
        seed: u64,
        id: VolumeId,
        geometry: Geometry,
        regions: u64,
        entries: usize,
    ) -> Self {
        let dirty = DirtyLayout::new(geometry.block_count().get()).total();
        let words = |n: usize| std::iter::repeat_with(AtomicU64::default).take(n).collect();
        let pages = page_count(regions);
        let mut intent = Sectors::new(pages * 2 * PAGE_LEN);
        for number in 0..pages as u64 {
            for sequence in [0, 1] {
                let page = encode_page(id, number, sequence, &[0; _]);
                intent.write(place_of(number, sequence) * PAGE_LEN as u64, &page[..]);
            }
        }
        intent.sync();
        let records = [
            (Record::Carry, encode_carry(id, &BlockSet::new())),
            (Record::Interval, encode_interval(id, None)),
            (Record::Snapshots, SnapshotTable::default().encode(id)),
        ];
        Self(Rc::new(Shared {
            inner: RefCell::new(Inner {
                random: Random(seed),
                volume: Sectors::new(usize::try_from(geometry.length()).unwrap()),
                intent,
                spool: BTreeMap::new(),
                records: records.into(),
                unreadable: Default::default(),
                locked: BTreeSet::new(),
                crash_in: None,
                fail_in: None,
                failed_sync: None,
                crashed: false,
                frozen: None,
                trace: 0,
            }),
            words: [
                words(TRACKING_WORDS),
                words(dirty),
                words(dirty),
                words(entries * ENTRY_WORDS),
            ],
            faults: RefCell::default(),
            syncs: AtomicU64::new(0),
        }))
    }

    /// Another disk, with the same on it.
    pub(crate) fn fork(&self) -> Self {
        let copy = |words: &Vec<AtomicU64>| {
            let words = words.iter().map(|word| AtomicU64::new(word.load(SeqCst)));
            words.collect()
        };
        Self(Rc::new(Shared {
            inner: RefCell::new(self.0.inner.borrow().clone()),
            words: self.0.words.each_ref().map(copy),
            faults: RefCell::new(*self.0.faults.borrow()),
            syncs: AtomicU64::new(self.0.syncs.load(SeqCst)),
        }))
    }

    /// Nothing of the spool can be read any more.
    pub(crate) fn lose_spool(&self) {
        self.0.inner.borrow_mut().spool.clear();
    }

    /// A record can't be read any more.
    pub(crate) fn lose_record(&self, record: Record) {
        self.0.inner.borrow_mut().unreadable.0.insert(record);
    }

    /// A place of the intent file can't be read any more.
    pub(crate) fn lose_intent(&self, place: u64) {
        self.0.inner.borrow_mut().unreadable.1.insert(place);
    }

    /// The bytes of a file of the state.
    pub(crate) fn file(&self, file: StateFile) -> Option<Vec<u8>> {
        let inner = self.0.inner.borrow();
        let words = |map| {
            let words = self.0.words[map_index(map)].iter();
            words
                .flat_map(|word| word.load(SeqCst).to_le_bytes())
                .collect()
        };
        match file {
            StateFile::Tracking => Some(words(Map::Tracking)),
            StateFile::Dirty(parity) => Some(words(Map::Dirty(parity))),
            StateFile::Slots => Some(words(Map::Slots)),
            StateFile::Spool => Some(inner.spool.values().flatten().copied().collect()),
            StateFile::Intent => Some(inner.intent.now.clone()),
            StateFile::Record(record) => inner.records.get(&record).cloned(),
        }
    }

    /// Flips a bit of it.
    pub(crate) fn flip(&self, file: StateFile, byte: usize, bit: u8) {
        let mut inner = self.0.inner.borrow_mut();
        let flip = |bytes: &mut Vec<u8>| bytes[byte] ^= 1 << bit;
        let flip_word = |map| {
            let word = &self.0.words[map_index(map)][byte / 8];
            word.fetch_xor(1 << (byte % 8 * 8 + usize::from(bit)), SeqCst);
        };
        match file {
            StateFile::Tracking => flip_word(Map::Tracking),
            StateFile::Dirty(parity) => flip_word(Map::Dirty(parity)),
            StateFile::Slots => flip_word(Map::Slots),
            StateFile::Intent => flip(&mut inner.intent.now),
            StateFile::Record(record) => flip(inner.records.get_mut(&record).unwrap()),
            StateFile::Spool => {
                let bytes = inner.spool.values_mut().nth(byte / BLOCK).unwrap();
                bytes[byte % BLOCK] ^= 1 << bit;
            }
        }
    }

    pub(crate) fn set_faults(&self, faults: Faults) {
        *self.0.faults.borrow_mut() = faults;
    }

    /// Sets a crash for the operation after this many more.
    pub(crate) fn crash_in(&self, operations: u64) {
        self.0.inner.borrow_mut().crash_in = Some(operations);
    }

    /// Makes the operation after this many more fail, once.
    pub(crate) fn fail_in(&self, operations: u64) {
        self.0.inner.borrow_mut().fail_in = Some(operations);
    }

    /// Whether the operation that [`Self::fail_in`] chose was a sync; none where it has not come.
    pub(crate) fn failed_sync(&self) -> Option<bool> {
        self.0.inner.borrow().failed_sync
    }

    pub(crate) fn has_crashed(&self) -> bool {
        self.0.inner.borrow().crashed
    }

    /// The volume's bytes as a reader sees them now.
    pub(crate) fn volume(&self) -> Vec<u8> {
        self.0.inner.borrow().volume.now.clone()
    }

    /// A number that depends on everything that was done.
    pub(crate) fn trace(&self) -> u64 {
        self.0.inner.borrow().trace
    }

    fn each_word(&self, mut then: impl FnMut(usize, usize, &AtomicU64)) {
        for (map, words) in self.0.words.iter().enumerate() {
            words
                .iter()
                .enumerate()
                .for_each(|(n, word)| then(map, n, word));
        }
    }

    fn freeze(&self, inner: &mut Inner) {
        inner.crashed = true;
        inner.frozen = Some(std::array::from_fn(|map| {
            self.0.words[map]
                .iter()
                .map(|word| word.load(SeqCst))
                .collect()
        }));
    }

    /// The process is gone and another one begins.
    pub(crate) fn restart_process(&self) {
        let mut inner = self.0.inner.borrow_mut();
        if let Some(frozen) = inner.frozen.take() {
            self.each_word(|map, n, word| word.store(frozen[map][n], SeqCst));
        }
        inner.crashed = false;
        inner.crash_in = None;
        inner.fail_in = None;
        inner.locked.clear();
    }

    /// The power is gone and comes back.
    pub(crate) fn restart_machine(&self) {
        self.restart_process();
        let inner = &mut *self.0.inner.borrow_mut();
        inner.volume.lose(&mut inner.random);
        inner.intent.lose(&mut inner.random);
        let random = &mut inner.random;
        let kind = random.below(3);
        self.each_word(|map, n, word| {
            let now = word.load(SeqCst);
            let lost = match (map, n) {
                // An old value of the counter.
                (0, EPOCH_WORD) => random.below(now + 1),
                (0, 1) => now * (random.next() & 1),
                _ if kind == 0 => 0,
                _ if kind == 1 => now,
                _ => random.next() & random.next(),
            };
            word.store(lost, SeqCst);
        });
        inner.spool.values_mut().for_each(|bytes| bytes.fill(0xEE));
    }

    /// Counts an operation that changes something; an error is the crash, which the operation may still reach.
    fn tick(&self, inner: &mut Inner, what: u64) -> MediaResult<bool> {
        if inner.crashed {
            return Err(CRASHED);
        }
        inner.trace = (inner.trace ^ what).wrapping_mul(0x0100_0000_01B3);
        match &mut inner.crash_in {
            Some(0) => {
                self.freeze(inner);
                Ok(true)
            }
            Some(left) => {
                *left -= 1;
                Ok(false)
            }
            None => Ok(false),
        }
    }

    /// Whether the operation is the one that [`Sim::fail_in`] chose.
    fn fails_now(&self, inner: &mut Inner, is_sync: bool) -> bool {
        if inner.crashed || inner.fail_in.is_none() {
            return false;
        }
        inner.fail_in = inner.fail_in.and_then(|left| left.checked_sub(1));
        if inner.fail_in.is_none() {
            inner.failed_sync = Some(is_sync);
        }
        inner.fail_in.is_none()
    }

    fn alive(&self) -> MediaResult<std::cell::RefMut<'_, Inner>> {
        let inner = self.0.inner.borrow_mut();
        if inner.crashed {
            Err(CRASHED)
        } else {
            Ok(inner)
        }
    }

    /// Writes, or where a crash or a failure comes, some of the sectors.
    fn write(&self, file: fn(&mut Inner) -> &mut Sectors, offset: u64, data: &[u8]) -> MediaResult {
        let inner = &mut *self.0.inner.borrow_mut();
        let crash = self.tick(inner, offset ^ data.len() as u64)?;
        if !crash && !self.fails_now(inner, false) {
            file(inner).write(offset, data);
            return Ok(());
        }
        let reached = (inner.random.index(data.len() / SECTOR + 2) * SECTOR).min(data.len());
        if reached > 0 {
            file(inner).write(offset, &data[..reached]);
        }
        Err(if crash { CRASHED } else { EIO })
    }

    fn fails(&self, random: &mut Random, choose: fn(&Faults) -> Option<u64>) -> bool {
        choose(&self.0.faults.borrow()).is_some_and(|n| random.one_in(n))
    }
}

impl Media for Sim {
    fn read_volume(&self, offset: u64, buffer: &mut [u8]) -> MediaResult {
        let inner = self.alive()?;
        buffer
            .copy_from_slice(&inner.volume.now[usize::try_from(offset).unwrap()..][..buffer.len()]);
        Ok(())
    }

    fn write_volume(&self, offset: u64, data: &[u8]) -> MediaResult {
        self.write(|inner| &mut inner.volume, offset, data)
    }

    fn zero_volume(&self, offset: u64, length: u64, _allocated: bool) -> MediaResult {
        self.write_volume(offset, &vec![0; usize::try_from(length).unwrap()])
    }

    fn sync_volume(&self) -> MediaResult {
        let inner = &mut *self.0.inner.borrow_mut();
        if self.tick(inner, 1)? {
            return Err(CRASHED);
        }
        if self.fails_now(inner, true) || self.fails(&mut inner.random, |faults| faults.sync) {
            inner.volume.fail(&mut inner.random);
            return Err(EIO);
        }
        inner.volume.sync();
        self.0.syncs.fetch_add(1, SeqCst);
        Ok(())
    }

    fn drop_volume_cache(&self) -> MediaResult {
        let inner = &mut *self.0.inner.borrow_mut();
        if self.tick(inner, 6)? {
            return Err(CRASHED);
        }
        inner.volume.drop_cache();
        Ok(())
    }

    fn read_before(&self, slot: u64, buffer: &mut [u8]) -> MediaResult {
        match self.alive()?.spool.get(&slot) {
            Some(bytes) => buffer.copy_from_slice(bytes),
            None => return Err(EIO),
        }
        Ok(())
    }

    fn write_before(&self, slot: u64, data: &[u8]) -> MediaResult {
        let inner = &mut *self.0.inner.borrow_mut();
        let crash = self.tick(inner, slot)?;
        if self.fails_now(inner, false) {
            return Err(EIO);
        }
        if !crash || inner.random.one_in(2) {
            inner.spool.insert(slot, data.to_vec());
        }
        if crash { Err(CRASHED) } else { Ok(()) }
    }

    fn reserve(&self, _entries: u64, slots: u64) -> MediaResult<(u64, u64)> {
        let mut inner = self.alive()?;
        // Not when an opening asks what there is.
        if slots > 0 && self.fails(&mut inner.random, |faults| faults.reserve) {
            return Err(ENOSPC);
        }
        Ok((
            (self.0.words[3].len() / ENTRY_WORDS) as u64,
            u64::from(u32::MAX),
        ))
    }

    fn read_intent(&self, place: u64, page: &mut [u8]) -> MediaResult {
        let inner = self.alive()?;
        if inner.unreadable.1.contains(&place) {
            return Err(EIO);
        }
        page.copy_from_slice(
            &inner.intent.now[usize::try_from(place).unwrap() * PAGE_LEN..][..PAGE_LEN],
        );
        Ok(())
    }

    fn write_intent(&self, place: u64, page: &[u8]) -> MediaResult {
        self.write(|inner| &mut inner.intent, place * PAGE_LEN as u64, page)?;
        self.0.inner.borrow_mut().unreadable.1.remove(&place);
        Ok(())
    }

    fn sync_intent(&self) -> MediaResult {
        let inner = &mut *self.0.inner.borrow_mut();
        if self.tick(inner, 2)? {
            return Err(CRASHED);
        }
        if self.fails_now(inner, true) {
            inner.intent.fail(&mut inner.random);
            return Err(EIO);
        }
        inner.intent.sync();
        Ok(())
    }

    fn put(&self, record: Record, content: Option<&[u8]>) -> MediaResult {
        let inner = &mut *self.0.inner.borrow_mut();
        let crash = self.tick(inner, 3 + content.map_or(0, |bytes| bytes.len() as u64))?;
        if crash && inner.random.one_in(2) {
            return Err(CRASHED);
        }
        let failed = self.fails_now(inner, false);
        if !crash && (failed || self.fails(&mut inner.random, |faults| faults.put)) {
            return Err(ENOSPC);
        }
        inner.unreadable.0.remove(&record);
        match content {
            Some(content) => inner.records.insert(record, content.to_vec()),
            None => inner.records.remove(&record),
        };
        if crash { Err(CRASHED) } else { Ok(()) }
    }

    fn get(&self, record: Record) -> MediaResult<Option<Vec<u8>>> {
        let inner = self.alive()?;
        if inner.unreadable.0.contains(&record) {
            return Err(EIO);
        }
        Ok(inner.records.get(&record).cloned())
    }

    fn changes(&self) -> MediaResult<Vec<u64>> {
        let inner = self.alive()?;
        let cut = |record: &Record| match record {
            Record::Changes(cut) => Some(*cut),
            _ => None,
        };
        Ok(inner.records.keys().filter_map(cut).collect())
    }

    fn words(&self, map: Map) -> &[AtomicU64] {
        &self.0.words[map_index(map)]
    }

    fn reset(&self, map: Map) -> MediaResult {
        let inner = &mut *self.0.inner.borrow_mut();
        if self.tick(inner, 4)? {
            return Err(CRASHED);
        }
        if self.fails_now(inner, false) {
            return Err(EIO);
        }
        self.words(map)
            .iter()
            .for_each(|word| word.store(0, SeqCst));
        Ok(())
    }

    fn lock(&self, first: u64, last: u64) -> bool {
        let mut inner = self.0.inner.borrow_mut();
        if (first..=last).any(|stripe| inner.locked.contains(&stripe)) {
            return false;
        }
        inner.locked.extend(first..=last);
        true
    }

    fn unlock(&self, first: u64, last: u64) {
        let mut inner = self.0.inner.borrow_mut();
        (first..=last).for_each(|stripe| assert!(inner.locked.remove(&stripe)));
    }

    fn instant(&self) -> MediaResult {
        let inner = &mut *self.0.inner.borrow_mut();
        if self.tick(inner, 5)? {
            Err(CRASHED)
        } else {
            Ok(())
        }
    }
}
