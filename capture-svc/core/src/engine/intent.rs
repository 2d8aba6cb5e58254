//! Intent map: which 1 MiB regions of the volume may differ from the base, durably, so that a power loss leaves a
//! bounded doubt.
//!
//! Pages of 4 KiB alternate between two places with a rising sequence, so that a torn page leaves its predecessor.
//! Each sector of a page is sealed by itself: where a page was torn every sector is whole, some of this write and some
//! of the one two before; where one isn't whole the page was damaged, and what it may have said is in doubt.
//! Requests that need a region share one sync: the first becomes the leader, writes the pages and syncs; the others
//! wait. `docs/CRASH-RULES.md` says when regions are set and cleared.

mod page;

use tidemark_block::VolumeId;

pub use page::{
    HEADER_LEN, IntentFault, MAGIC, PAGE_LEN, PAGE_REGIONS, PAGE_SECTORS, PAGE_WORDS, SECTOR_LEN,
    decode_page, encode_page, place_of,
};
use page::{Place, Words, page_of};

use crate::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::SeqCst},
};

/// Pages written by one leader.
#[derive(Debug)]
pub struct Batch {
    pages: Vec<(usize, u64, Box<Words>)>,
    volume: VolumeId,
}

impl Batch {
    /// The pages: place in the file, and content.
    pub fn pages(&self) -> impl Iterator<Item = (u64, Box<[u8; PAGE_LEN]>)> + '_ {
        self.pages.iter().map(|(number, sequence, bits)| {
            let number = *number as u64;
            (
                place_of(number, *sequence),
                encode_page(self.volume, number, *sequence, bits),
            )
        })
    }
}

#[derive(Debug)]
struct Page {
    sequence: u64,
    changed: bool,
    wanted: Box<Words>,
}

#[derive(Debug)]
struct State {
    pages: Vec<Page>,
    leading: bool,
}

/// The intent map of a volume.
#[derive(Debug)]
pub struct IntentMap {
    volume: VolumeId,
    regions: u64,
    faults: Vec<IntentFault>,
    /// The last epoch in which a request announced itself, by region.
    last_epoch: Vec<AtomicU64>,
    /// Set where the bit is durable and stays so until the clearer takes it back. A subset of `wanted`.
    durable: Vec<AtomicU64>,
    state: Mutex<State>,
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "regions fit the address space: there is a word for each"
)]
const fn index(value: u64) -> usize {
    value as usize
}

impl IntentMap {
    /// A map with these pages, as found in the file: for each number the two places. A page that was damaged has all its
    /// regions set. `epoch` is the last epoch in which a set region can have been written.
    ///
    /// # Panics
    /// Where the number of pages isn't [`page_count`].
    #[must_use]
    pub fn restore(volume: VolumeId, regions: u64, epoch: u64, places: &[[Vec<u8>; 2]]) -> Self {
        assert_eq!(places.len(), page_count(regions), "a page for each region");
        let mut faults = Vec::new();
        let pages: Vec<_> = places
            .iter()
            .zip(0..)
            .map(|(pair, number)| {
                let pair = [&pair[0], &pair[1]].map(|bytes| Place::of(volume, number, bytes));
                let (sequence, bits, fault) = page_of(number, pair);
                faults.extend(fault);
                Page {
                    sequence,
                    // Written again by whoever writes next.
                    changed: fault.is_some(),
                    wanted: bits.unwrap_or_else(|| all_regions(regions, number)),
                }
            })
            .collect();
        let words = index(regions.div_ceil(64));
        let map = Self {
            volume,
            regions,
            faults,
            last_epoch: zeroes(index(regions)),
            durable: zeroes(words),
            state: Mutex::new(State {
                pages,
                leading: false,
            }),
        };
        map.take_as_found(epoch);
        map
    }

    /// Enters what the pages have: when a region can have been written last, and whether it is durable.
    fn take_as_found(&self, epoch: u64) {
        let state = self.state.lock();
        for (number, page) in state.pages.iter().enumerate() {
            for (n, &bits) in page
                .wanted
                .iter()
                .enumerate()
                .filter(|(_, bits)| **bits != 0)
            {
                let word = number * PAGE_WORDS + n;
                if let (Some(durable), false) = (self.durable.get(word), page.changed) {
                    durable.store(bits, SeqCst);
                }
                each_bit(bits, |bit| {
                    if let Some(last) = self.last_epoch.get(word * 64 + bit) {
                        last.store(epoch, SeqCst);
                    }
                });
            }
        }
    }

    /// The pages that were found damaged.
    #[must_use]
    pub fn faults(&self) -> &[IntentFault] {
        &self.faults
    }

    /// What was read of the file may not be on the disk: a region counts as durable only once its page has been
    /// written again.
    pub fn distrust(&self) {
        let mut state = self.state.lock();
        state.pages.iter_mut().for_each(|page| page.changed = true);
        self.durable.iter().for_each(|word| word.store(0, SeqCst));
    }

    /// Announces a write of an epoch to a region. Must come before [`Self::is_durable`] is asked.
    pub fn announce(&self, region: u64, epoch: u64) {
        let last = &self.last_epoch[index(region)];
        if last.load(SeqCst) < epoch {
            last.fetch_max(epoch, SeqCst);
        }
    }

    /// Whether the region may be written: a power loss would find it set.
    #[must_use]
    pub fn is_durable(&self, region: u64) -> bool {
        self.durable[index(region / 64)].load(SeqCst) & 1 << (region % 64) != 0
    }

    /// Wants a region set. If nobody leads, the caller does: it writes the batch, syncs, and calls
    /// [`Self::complete`]. Otherwise it waits until the region is durable or the leader has completed.
    #[must_use]
    pub fn want(&self, region: u64) -> Option<Batch> {
        let mut state = self.state.lock();
        if self.is_durable(region) {
            return None;
        }
        let page = &mut state.pages[index(region / PAGE_REGIONS)];
        let at = region % PAGE_REGIONS;
        let bit = 1 << (at % 64);
        if page.wanted[index(at / 64)] & bit == 0 {
            page.wanted[index(at / 64)] |= bit;
            page.changed = true;
        }
        self.lead_locked(&mut state)
    }

    /// Takes the lead for whatever has changed, if anything has and nobody leads.
    #[must_use]
    pub fn lead(&self) -> Option<Batch> {
        self.lead_locked(&mut self.state.lock())
    }

    fn lead_locked(&self, state: &mut State) -> Option<Batch> {
        if state.leading || !state.pages.iter().any(|page| page.changed) {
            return None;
        }
        state.leading = true;
        let changed = state
            .pages
            .iter_mut()
            .enumerate()
            .filter(|(_, page)| page.changed);
        let pages = changed
            .map(|(number, page)| {
                page.changed = false;
                page.sequence += 1;
                (number, page.sequence, page.wanted.clone())
            })
            .collect();
        Some(Batch {
            pages,
            volume: self.volume,
        })
    }

    /// Whether somebody leads.
    #[must_use]
    pub fn is_leading(&self) -> bool {
        self.state.lock().leading
    }

    /// Ends a batch. After a failure nothing of it counts as durable.
    pub fn complete(&self, batch: Batch, synced: bool) {
        let mut state = self.state.lock();
        state.leading = false;
        for (number, _, bits) in batch.pages {
            let page = &mut state.pages[number];
            page.changed |= !synced;
            if !synced {
                continue;
            }
            for (n, (&written, &wanted)) in bits.iter().zip(page.wanted.iter()).enumerate() {
                // What was cleared meanwhile is no longer wanted: the next page written will not have it.
                if written & wanted != 0 {
                    self.durable[number * PAGE_WORDS + n].fetch_or(written & wanted, SeqCst);
                }
            }
        }
    }

    /// Clears the regions last written in an epoch ≤ `cut`, except up to `hot_max` of those written after
    /// `cut_before`, the latest first. The caller has made sure that they may be cleared, and leads afterwards.
    pub fn clear(&self, cut: u64, cut_before: u64, hot_max: usize) {
        let mut state = self.state.lock();
        let mut settled = Vec::new();
        for (number, page) in state.pages.iter().enumerate() {
            for (n, &bits) in page
                .wanted
                .iter()
                .enumerate()
                .filter(|(_, bits)| **bits != 0)
            {
                each_bit(bits, |bit| {
                    let region = (number * PAGE_WORDS + n) * 64 + bit;
                    let last = self
                        .last_epoch
                        .get(region)
                        .map_or(0, |last| last.load(SeqCst));
                    if last <= cut {
                        settled.push((last, region));
                    }
                });
            }
        }
        settled.sort_unstable_by(|a, b| b.cmp(a));
        let hot = settled
            .iter()
            .take(hot_max)
            .take_while(|(last, _)| *last > cut_before)
            .count();
        for &(_, region) in &settled[hot..] {
            self.clear_region(&mut state, region, cut);
        }
    }

    fn clear_region(&self, state: &mut State, region: usize, cut: u64) {
        let bit = 1 << (region % 64);
        let Some(durable) = self.durable.get(region / 64) else {
            return;
        };
        let was = durable.fetch_and(!bit, SeqCst) & bit;
        if self.last_epoch[region].load(SeqCst) > cut {
            // A writer announced itself: it may have seen the bit before it was taken back.
            durable.fetch_or(was, SeqCst);
            return;
        }
        let page = &mut state.pages[region / index(PAGE_REGIONS)];
        page.wanted[region % index(PAGE_REGIONS) / 64] &= !bit;
        page.changed = true;
    }

    /// The regions that are set, ascending.
    #[must_use]
    pub fn set_regions(&self) -> Vec<u64> {
        let state = self.state.lock();
        let mut regions = Vec::new();
        for (number, page) in state.pages.iter().enumerate() {
            for (n, &bits) in page.wanted.iter().enumerate() {
                each_bit(bits, |bit| {
                    regions.push(((number * PAGE_WORDS + n) * 64 + bit) as u64)
                });
            }
        }
        regions.retain(|&region| region < self.regions);
        regions
    }
}

/// Pages for this many regions.
#[must_use]
pub const fn page_count(regions: u64) -> usize {
    index(regions.div_ceil(PAGE_REGIONS))
}

fn all_regions(regions: u64, number: u64) -> Box<Words> {
    let first = number * PAGE_REGIONS;
    let mut bits = Box::new([0; PAGE_WORDS]);
    for at in 0..PAGE_REGIONS.min(regions - first) {
        bits[index(at / 64)] |= 1 << (at % 64);
    }
    bits
}

fn zeroes(count: usize) -> Vec<AtomicU64> {
    std::iter::repeat_with(AtomicU64::default)
        .take(count)
        .collect()
}

fn each_bit(mut bits: u64, mut then: impl FnMut(usize)) {
    while bits != 0 {
        then(bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}
