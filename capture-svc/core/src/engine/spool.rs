//! Spool: the before-images of blocks, and the index that finds them.
//!
//! A before-image (b, k) is block b as it was before its first write of epoch k. A snapshot at cut c reads the one
//! with the least k > c. Its entry lies in mapped memory, its bytes in a slot of the spool file; a block of zeroes
//! has an entry only.
//!
//! | word | of an entry (64 bytes) |
//! |---|---|
//! | 0 | 0 = free, else `TMSLOT` and version; stored last |
//! | 1 | block |
//! | 2 | epoch |
//! | 3 | slot, or 2⁶⁴−1 for zeroes |
//! | 4, 5 | block checksum of the bytes |
//! | 6, 7 | XXH3-128 of words 1 to 5 |

use std::{collections::BTreeMap, sync::Arc};

use tidemark_block::{BlockIndex, Checksum128, block_checksum, xxh3_128};

use super::{
    capture::{ENTRIES_WORD, checked, checked_word},
    damage::{Cost, Damage, Fault, StateFile},
    media::{Map, Media, MediaError},
    words::{halves, joined},
};
use crate::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::SeqCst},
    many,
};

/// Words of an entry.
pub const ENTRY_WORDS: usize = 8;
/// Memory that an indexed before-image takes, in bytes: what the bound on memory is divided by.
pub const INDEX_BYTES_PER_ENTRY: u64 = 40;
/// First word of a used entry: "TMSLOT" and version 1.
pub const ENTRY_TAG: u64 = u64::from_le_bytes(*b"TMSLOT\x01\0");
const ZEROES: u64 = u64::MAX;
const SHARDS: usize = many(64, 2);
/// Blocks that stay together in a shard: a request rarely meets more than one.
const SHARD_BLOCKS: u64 = 256;

type Key = (u64, u64);

/// Why a before-image was not stored or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpoolError {
    /// There is no room.
    Full,
    /// The bytes are not those that were stored.
    Damaged,
    /// The medium failed.
    Media(MediaError),
}

impl From<MediaError> for SpoolError {
    fn from(error: MediaError) -> Self {
        Self::Media(error)
    }
}

/// Bounds of a spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolLimits {
    /// The most before-images.
    pub entries_max: u64,
    /// The most that have bytes.
    pub slots_max: u64,
}

/// Numbers that are in use, of a range that grows up to a bound.
#[derive(Debug, Default)]
struct Numbers {
    words: Vec<u64>,
    used: u64,
    allocated: u64,
    max: u64,
    hint: usize,
}

impl Numbers {
    fn has_room(&self) -> bool {
        self.used < self.max
    }

    /// The lowest free number from the last one given on, if there is one below `allocated`.
    fn take(&mut self) -> Option<u64> {
        let words = usize::try_from(self.allocated.div_ceil(64)).ok()?;
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        for n in (self.hint..words).chain(0..self.hint.min(words)) {
            if self.words[n] != u64::MAX {
                let bit = self.words[n].trailing_ones();
                let number = n as u64 * 64 + u64::from(bit);
                if number < self.allocated {
                    self.words[n] |= 1 << bit;
                    self.used += 1;
                    self.hint = n;
                    return Some(number);
                }
            }
        }
        None
    }

    fn mark(&mut self, number: u64) -> bool {
        let Ok(n) = u32::try_from(number).map(|number| number as usize / 64) else {
            return false;
        };
        if self.words.len() <= n {
            self.words.resize(n + 1, 0);
        }
        let fresh = self.words[n] & 1 << (number % 64) == 0;
        self.words[n] |= 1 << (number % 64);
        self.used += u64::from(fresh);
        fresh
    }

    fn free(&mut self, number: u64) {
        if let Some(word) = usize::try_from(number / 64)
            .ok()
            .and_then(|n| self.words.get_mut(n))
        {
            self.used -= u64::from(*word & 1 << (number % 64) != 0);
            *word &= !(1 << (number % 64));
        }
    }
}

#[derive(Debug, Default)]
struct Allocation {
    entries: Numbers,
    slots: Numbers,
    /// The last attempt to take more disk space failed, and nothing was freed since.
    disk_full: bool,
}

/// The before-images of a volume.
#[derive(Debug)]
pub struct Spool {
    shards: Vec<Mutex<BTreeMap<Key, u32>>>,
    allocation: Mutex<Allocation>,
}

impl Spool {
    /// An empty spool.
    #[must_use]
    pub fn new(limits: SpoolLimits) -> Self {
        let numbers = |max: u64| Numbers {
            max: max.min(u64::from(u32::MAX)),
            ..Numbers::default()
        };
        Self {
            shards: std::iter::repeat_with(Mutex::default)
                .take(SHARDS)
                .collect(),
            allocation: Mutex::new(Allocation {
                entries: numbers(limits.entries_max),
                slots: numbers(limits.slots_max),
                disk_full: false,
            }),
        }
    }

    /// Finds the before-images that lie in the mapped entries. Gives what is damaged: then no snapshot can be trusted.
    ///
    /// # Errors
    /// Where the medium doesn't tell how much is allocated.
    pub fn rebuild<M: Media>(&self, media: &M) -> Result<Option<Damage>, MediaError> {
        let words = media.words(Map::Slots);
        let mut damage = None;
        let mut found = |file, fault| {
            damage.get_or_insert(Damage::new(file, fault, Cost::Cuts));
        };
        let mut allocation = self.allocation.lock();
        let (entries_now, slots_now) = media.reserve(0, 0)?;
        let recorded = checked(media.words(Map::Tracking)[ENTRIES_WORD].load(SeqCst));
        if recorded.is_none_or(|recorded| entries_now < recorded) {
            found(StateFile::Slots, Fault::Length);
        }
        allocation.entries.allocated = entries_now.min(allocation.entries.max);
        allocation.slots.allocated = slots_now.min(allocation.slots.max);
        for (id, entry) in words.chunks_exact(ENTRY_WORDS).enumerate() {
            if entry[0].load(SeqCst) == 0 {
                continue;
            }
            let (Some(entry), Ok(number)) = (Entry::load(entry), u32::try_from(id)) else {
                found(StateFile::Slots, Fault::Entry(id as u64));
                continue;
            };
            if entry.slot != ZEROES && entry.slot >= slots_now {
                found(StateFile::Spool, Fault::Length);
            }
            let fresh = (entry.slot == ZEROES || allocation.slots.mark(entry.slot))
                & allocation.entries.mark(id as u64);
            let key = (entry.block, entry.epoch);
            let before = self.shard(entry.block).lock().insert(key, number);
            if before.is_some() || !fresh {
                found(StateFile::Slots, Fault::Twice(id as u64));
            }
        }
        Ok(damage)
    }

    fn shard(&self, block: u64) -> &Mutex<BTreeMap<Key, u32>> {
        #[allow(clippy::cast_possible_truncation, reason = "the low bits are enough")]
        &self.shards[(block / SHARD_BLOCKS) as usize % SHARDS]
    }

    /// Whether there is a before-image of the block from an epoch > `cut`.
    #[must_use]
    pub fn has_after(&self, block: BlockIndex, cut: u64) -> bool {
        self.find(block, cut).is_some()
    }

    /// The entry that a snapshot at `cut` reads the block from.
    #[must_use]
    pub fn find(&self, block: BlockIndex, cut: u64) -> Option<u32> {
        let shard = self.shard(block.get()).lock();
        let from = (block.get(), cut + 1);
        shard
            .range(from..=(block.get(), u64::MAX))
            .next()
            .map(|(_, &id)| id)
    }

    /// Whether any before-image of the blocks in `first..end` is there from an epoch > `cut`; cheap for a range.
    #[must_use]
    pub fn blocks_after(&self, first: u64, end: u64, cut: u64) -> Vec<u64> {
        let mut found = Vec::new();
        let mut at = first;
        while at < end {
            let stop = end.min((at / SHARD_BLOCKS + 1) * SHARD_BLOCKS);
            let shard = self.shard(at).lock();
            let keys = shard.range((at, 0)..(stop, 0)).map(|(&key, _)| key);
            found.extend(
                keys.filter(|&(_, epoch)| epoch > cut)
                    .map(|(block, _)| block),
            );
            at = stop;
        }
        found.dedup();
        found
    }

    /// Stores a before-image. On return it is found, also after a process crash, unless no open cut reads it any more:
    /// then nothing is kept, for nobody would free it. `open` is as for [`Self::sweep`], and asked under the same lock.
    ///
    /// # Errors
    /// [`SpoolError::Full`], or what the medium says; nothing is stored then.
    pub fn store<M: Media>(
        &self,
        media: &M,
        block: BlockIndex,
        epoch: u64,
        content: &[u8],
        open: impl Fn() -> Option<Arc<[u64]>>,
    ) -> Result<(), SpoolError> {
        let checksum = block_checksum(content);
        let (id, slot) = self.allocate(media, checksum != Checksum128::ZERO)?;
        if let Some(slot) = slot
            && let Err(error) = media.write_before(slot, content)
        {
            self.release(id, Some(slot));
            return Err(error.into());
        }
        let entry = Entry {
            block: block.get(),
            epoch,
            slot: slot.unwrap_or(ZEROES),
            checksum,
        };
        let words = entry_words(media.words(Map::Slots), id);
        entry.store(words);
        media.instant()?;
        let key = (block.get(), epoch);
        let mut shard = self.shard(block.get()).lock();
        let before = shard.range((block.get(), 0)..key).next_back();
        let from = before.map_or(0, |(&(_, epoch), _)| epoch);
        if open().is_none_or(|cuts| is_read(&cuts, from, epoch)) {
            shard.insert(key, id);
        } else {
            drop(shard);
            words[0].store(0, SeqCst);
            self.release(id, slot);
        }
        Ok(())
    }

    fn allocate<M: Media>(
        &self,
        media: &M,
        with_slot: bool,
    ) -> Result<(u32, Option<u64>), SpoolError> {
        let mut allocation = self.allocation.lock();
        let Allocation {
            entries,
            slots,
            disk_full,
        } = &mut *allocation;
        if !entries.has_room() || (with_slot && !slots.has_room()) {
            return Err(SpoolError::Full);
        }
        let mut id = entries.take();
        let mut slot = if with_slot { slots.take() } else { None };
        if id.is_none() || (with_slot && slot.is_none()) {
            let more = |wanted: bool, given: bool| u64::from(wanted && !given);
            let reserved = media.reserve(
                entries.allocated + more(true, id.is_some()),
                slots.allocated + more(with_slot, slot.is_some()),
            );
            *disk_full = reserved.is_err();
            if let Ok((entries_now, slots_now)) = reserved {
                let known = entries.allocated;
                entries.allocated = entries_now.min(entries.max).max(known);
                if entries.allocated > known {
                    record_entries(media, entries.allocated);
                }
                slots.allocated = slots_now.min(slots.max).max(slots.allocated);
                id = id.or_else(|| entries.take());
                slot = slot.or_else(|| if with_slot { slots.take() } else { None });
            }
        }
        match (id.and_then(|id| u32::try_from(id).ok()), slot) {
            (Some(id), slot) if slot.is_some() == with_slot => Ok((id, slot)),
            (id, slot) => {
                // The disk is full: give back what was taken. Freed numbers remain usable.
                id.into_iter().for_each(|id| entries.free(u64::from(id)));
                slot.into_iter().for_each(|slot| slots.free(slot));
                Err(SpoolError::Full)
            }
        }
    }

    fn release(&self, id: u32, slot: Option<u64>) {
        let mut allocation = self.allocation.lock();
        allocation.entries.free(u64::from(id));
        if let Some(slot) = slot {
            allocation.slots.free(slot);
        }
    }

    /// Reads a before-image that [`Self::find`] gave.
    ///
    /// # Errors
    /// [`SpoolError::Damaged`], also where it was freed meanwhile: the caller knows whether that can be.
    pub fn read<M: Media>(
        &self,
        media: &M,
        id: u32,
        block: BlockIndex,
        buffer: &mut [u8],
    ) -> Result<(), SpoolError> {
        let entry = Entry::load(entry_words(media.words(Map::Slots), id))
            .filter(|entry| entry.block == block.get())
            .ok_or(SpoolError::Damaged)?;
        if entry.slot == ZEROES {
            buffer.fill(0);
            return Ok(());
        }
        match media.read_before(entry.slot, buffer) {
            Err(error) if error.is_unreadable() => return Err(SpoolError::Damaged),
            read => read?,
        }
        if block_checksum(buffer) == entry.checksum {
            Ok(())
        } else {
            Err(SpoolError::Damaged)
        }
    }

    /// Frees what no open cut reads. `open` gives the open cuts, ascending, or nothing where nobody can tell and nothing
    /// is freed; it is asked under the lock that also guards the entering of before-images, so that a cut opened
    /// meanwhile keeps its own.
    pub fn sweep<M: Media>(&self, media: &M, open: impl Fn() -> Option<Arc<[u64]>>) {
        for shard in &self.shards {
            let mut freed = Vec::new();
            {
                let mut shard = shard.lock();
                let Some(cuts) = open() else { return };
                let mut before = (u64::MAX, 0);
                shard.retain(|&(block, epoch), &mut id| {
                    let from = if before.0 == block { before.1 } else { 0 };
                    before = (block, epoch);
                    let needed = is_read(&cuts, from, epoch);
                    if !needed {
                        let words = entry_words(media.words(Map::Slots), id);
                        freed.push((id, words[3].load(SeqCst)));
                        words[0].store(0, SeqCst);
                    }
                    needed
                });
            }
            let mut allocation = self.allocation.lock();
            allocation.disk_full = false;
            for (id, slot) in freed {
                allocation.entries.free(u64::from(id));
                if slot != ZEROES {
                    allocation.slots.free(slot);
                }
            }
        }
    }

    /// For each of the open cuts (ascending), how many before-images only it reads.
    #[must_use]
    pub fn exclusive(&self, cuts: &[u64]) -> Vec<u64> {
        let mut counts = vec![0; cuts.len()];
        for shard in &self.shards {
            let mut before = (u64::MAX, 0);
            for &(block, epoch) in shard.lock().keys() {
                let from = if before.0 == block { before.1 } else { 0 };
                before = (block, epoch);
                let first = cuts.partition_point(|&cut| cut < from);
                if cuts.partition_point(|&cut| cut < epoch) == first + 1 {
                    counts[first] += 1;
                }
            }
        }
        counts
    }

    /// Whether one more before-image can be stored, as far as the bounds tell.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let allocation = self.allocation.lock();
        let has_room = |numbers: &Numbers| {
            numbers.has_room() && (!allocation.disk_full || numbers.used < numbers.allocated)
        };
        has_room(&allocation.entries) && has_room(&allocation.slots)
    }

    /// Before-images, and how many of them have bytes.
    #[must_use]
    pub fn used(&self) -> (u64, u64) {
        let allocation = self.allocation.lock();
        (allocation.entries.used, allocation.slots.used)
    }

    /// As [`Self::used`]; none where that would have to wait, for the disk perhaps.
    #[must_use]
    pub fn used_now(&self) -> Option<(u64, u64)> {
        let allocation = self.allocation.try_lock()?;
        Some((allocation.entries.used, allocation.slots.used))
    }
}

/// Whether one of the cuts (ascending) reads a before-image of `epoch`; the block's last one before it is of `from`.
fn is_read(cuts: &[u64], from: u64, epoch: u64) -> bool {
    cuts[cuts.partition_point(|&cut| cut < from)..]
        .first()
        .is_some_and(|&cut| cut < epoch)
}

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    block: u64,
    epoch: u64,
    slot: u64,
    checksum: Checksum128,
}

/// Notes for how many entries there is room, so that a file that was cut short is not taken for one with fewer.
pub(super) fn record_entries<M: Media>(media: &M, entries: u64) {
    media.words(Map::Tracking)[ENTRIES_WORD].store(checked_word(entries), SeqCst);
}

fn entry_words(words: &[AtomicU64], id: u32) -> &[AtomicU64] {
    &words[id as usize * ENTRY_WORDS..][..ENTRY_WORDS]
}

impl Entry {
    fn fields(self) -> [u64; 5] {
        let [low, high] = halves(self.checksum);
        [self.block, self.epoch, self.slot, low, high]
    }

    fn seal(fields: &[u64; 5]) -> [u64; 2] {
        let mut bytes = [0; 40];
        for (bytes, field) in bytes.chunks_exact_mut(8).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        halves(xxh3_128(&bytes))
    }

    fn store(self, words: &[AtomicU64]) {
        let fields = self.fields();
        words[0].store(0, SeqCst);
        for (word, field) in words[1..]
            .iter()
            .zip(fields.iter().chain(&Self::seal(&fields)))
        {
            word.store(*field, SeqCst);
        }
        words[0].store(ENTRY_TAG, SeqCst);
    }

    fn load(words: &[AtomicU64]) -> Option<Self> {
        let [tag, fields @ .., seal_low, seal_high] = <[u64; ENTRY_WORDS]>::try_from(
            words
                .iter()
                .map(|word| word.load(SeqCst))
                .collect::<Vec<_>>(),
        )
        .ok()?;
        let valid = tag == ENTRY_TAG && Self::seal(&fields) == [seal_low, seal_high];
        let [block, epoch, slot, low, high] = fields;
        valid.then_some(Self {
            block,
            epoch,
            slot,
            checksum: joined([low, high]),
        })
    }
}
