//! Opening a volume: from what the files hold to a capture that may serve.
//!
//! Each step leaves files from which another opening finds the same blocks or more.

use std::{collections::BTreeSet, sync::Arc};

use tidemark_block::{BlockCount, BlockIndex, BlockSet, Extent, Geometry, VolumeId};

use super::{
    capture::{
        CHANGES_WORD, Capture, CaptureError, ENTRIES_WORD, EPOCH_SEAL_WORD, EPOCH_WORD, Interval,
        MARKS_WORD, OpenCut, RING_WORD, Table, Tuning, checked_word, epoch_seal,
    },
    damage::{Cost, Damage, Fault, StateFile, content},
    dirty::DirtyLayout,
    examine::{Found, examine, newest_changes, open_epoch, read_records},
    intent::{IntentFault, IntentMap, PAGE_LEN, page_count},
    media::{Map, Media, Record},
    records::{Changes, SnapshotTable, encode_carry, encode_interval},
    ring::Ring,
    spool::{Spool, record_entries},
    trust::{Judgement, Reason},
};
use crate::sync::atomic::Ordering::SeqCst;

/// How far the tracking could be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All is as it was left, cleanly.
    Clean,
    /// All is as it was left by a process that ended in the middle.
    ProcessCrash,
    /// The intent map's regions are in doubt: this many blocks. Snapshots are gone.
    PowerLoss(BlockCount),
    /// All blocks are in doubt. Snapshots are gone.
    Everything(Reason),
}

/// Epochs that an identity reserves beyond the open one.
pub const EPOCHS_RESERVED: u64 = 1 << 32;

impl<M: Media> Capture<M> {
    /// Opens a volume. Afterwards, before any request, the caller writes the identity with a limit of
    /// [`EPOCHS_RESERVED`] past the open epoch, and calls [`Self::confirm`].
    ///
    /// # Errors
    /// Where a file can't be read, written or synced; the call may be repeated.
    pub fn recover(
        media: M,
        volume: VolumeId,
        geometry: Geometry,
        tuning: Tuning,
        judgement: Judgement,
        epoch_limit: u64,
    ) -> Result<(Self, Outcome), CaptureError> {
        let (mut found, mut damage) = read_records(&media, volume, geometry)?;
        let examined = examine(&media, geometry, judgement, epoch_limit, &found)?;
        if damage
            .iter()
            .any(|damage| damage.file == Record::Snapshots.into())
        {
            // Each number was given in an epoch of its own.
            let given = match examined {
                Judgement::Exact { .. } => open_epoch(&media, epoch_limit).ok(),
                _ => None,
            };
            found.snapshots.last_id = given.unwrap_or(epoch_limit);
        }
        let judgement = match damage.first() {
            Some(first) => Judgement::Everything(Reason::Damaged(first.clone())),
            None => examined,
        };
        if let (true, Judgement::Everything(Reason::Damaged(found))) =
            (damage.is_empty(), &judgement)
        {
            damage.push(found.clone());
        }
        // What is found must be durable before it counts as such: it may come out of the page cache.
        media.sync_intent()?;
        let pages = read_intent(&media, &tuning, geometry)?;
        let opening = Opening {
            media,
            volume,
            geometry,
            tuning,
            pages,
            epoch_limit,
        };
        let (capture, outcome) = match judgement {
            Judgement::Exact { clean } => opening.take_up(found, clean)?,
            Judgement::PowerLoss => opening.doubt_regions(found)?,
            Judgement::Everything(reason) => opening.doubt_all(&found, reason)?,
        };
        capture.note(damage);
        Ok((capture, outcome))
    }
}

/// An opening, once it is known how far the tracking can be trusted.
struct Opening<M> {
    media: M,
    volume: VolumeId,
    geometry: Geometry,
    tuning: Tuning,
    /// Of the intent map.
    pages: Vec<[Vec<u8>; 2]>,
    epoch_limit: u64,
}

impl<M: Media> Opening<M> {
    /// Everything is as it was left: goes on from there.
    fn take_up(self, found: Found, clean: bool) -> Result<(Capture<M>, Outcome), CaptureError> {
        let (table, epoch, gone) = resume(
            &self.media,
            self.volume,
            self.geometry,
            found,
            self.epoch_limit,
        )?;
        let intent = self.intent(epoch);
        let spool = Spool::new(self.tuning.spool);
        let Some(damage) = spool.rebuild(&self.media)? else {
            let capture = self.assemble(intent, spool, table, epoch)?;
            capture.note(gone);
            capture.sweep();
            let outcome = if clean {
                Outcome::Clean
            } else {
                Outcome::ProcessCrash
            };
            return Ok((capture, outcome));
        };
        // Before-images are lost: so are the snapshots, and an interval is no longer readable.
        let table = forget(&self.media, self.volume, self.geometry, table)?;
        let spool = self.empty_spool()?;
        let capture = self.assemble(intent, spool, table, epoch)?;
        capture.note([damage]);
        Ok((capture, Outcome::ProcessCrash))
    }

    /// What was not synced may be lost: only the regions that the intent map bounds are in doubt.
    fn doubt_regions(self, found: Found) -> Result<(Capture<M>, Outcome), CaptureError> {
        let regions = self.intent(self.epoch_limit).set_regions();
        let mut doubt: BlockSet = regions
            .into_iter()
            .map(|region| region_blocks(self.geometry, &self.tuning, region))
            .collect();
        doubt.union_with(&found.carry);
        if let Some((_, changed)) = &found.interval {
            doubt.union_with(changed);
        }
        let outcome = Outcome::PowerLoss(doubt.len());
        Ok((self.begin_with(doubt, &found)?, outcome))
    }

    /// Nothing can be trusted, because of `reason`.
    fn doubt_all(
        self,
        found: &Found,
        reason: Reason,
    ) -> Result<(Capture<M>, Outcome), CaptureError> {
        let all = std::iter::once(self.geometry.all()).collect();
        Ok((self.begin_with(all, found)?, Outcome::Everything(reason)))
    }

    /// Begins with nothing but these blocks in doubt; of what was found only the last snapshot's number is kept.
    fn begin_with(self, doubt: BlockSet, found: &Found) -> Result<Capture<M>, CaptureError> {
        let intent = self.intent(self.epoch_limit);
        intent.distrust();
        let table = start_over(&self.media, self.volume, doubt, found.snapshots.last_id)?;
        let spool = self.empty_spool()?;
        let epoch = self.epoch_limit;
        self.assemble(intent, spool, table, epoch)
    }

    /// The intent map as of the opening that begins this epoch.
    fn intent(&self, epoch: u64) -> IntentMap {
        let regions = self.geometry.length().div_ceil(self.tuning.region_bytes);
        IntentMap::restore(self.volume, regions, epoch - 1, &self.pages)
    }

    fn empty_spool(&self) -> Result<Spool, CaptureError> {
        let spool = Spool::new(self.tuning.spool);
        let damage = spool.rebuild(&self.media)?;
        debug_assert_eq!(damage, None, "an empty spool is whole");
        Ok(spool)
    }

    /// Begins the epoch.
    fn assemble(
        self,
        intent: IntentMap,
        spool: Spool,
        table: Table,
        epoch: u64,
    ) -> Result<Capture<M>, CaptureError> {
        record_entries(&self.media, self.media.reserve(0, 0)?.0);
        let words = self.media.words(Map::Tracking);
        words[EPOCH_SEAL_WORD].store(epoch_seal(epoch), SeqCst);
        words[EPOCH_WORD].store(epoch, SeqCst);
        let faults = intent.faults().to_vec();
        let capture = Capture::assemble(
            self.media,
            self.volume,
            self.geometry,
            self.tuning,
            intent,
            spool,
            table,
            epoch - 1,
        );
        capture.note(faults.into_iter().map(|fault| {
            let cost = match fault {
                IntentFault::Lost(_) => Cost::Regions,
                IntentFault::Stale(_) => Cost::Nothing,
            };
            Damage::new(StateFile::Intent, fault, cost)
        }));
        Ok(capture)
    }
}

impl<M: Media> Capture<M> {
    /// The identity is durable: the opening has ended. A failed sync of before is dealt with.
    pub fn confirm(&self) {
        self.media.words(Map::Tracking)[MARKS_WORD].store(0, SeqCst);
    }
}

fn read_intent<M: Media>(
    media: &M,
    tuning: &Tuning,
    geometry: Geometry,
) -> Result<Vec<[Vec<u8>; 2]>, CaptureError> {
    let regions = geometry.length().div_ceil(tuning.region_bytes);
    (0..page_count(regions) as u64)
        .map(|number| {
            let mut pair = [vec![0; PAGE_LEN], vec![0; PAGE_LEN]];
            for (place, page) in (number * 2..).zip(&mut pair) {
                match media.read_intent(place, page) {
                    // Nothing of it is whole.
                    Err(error) if error.is_unreadable() => page.fill(0),
                    read => read?,
                }
            }
            Ok(pair)
        })
        .collect()
}

/// Takes up the tracking where it was left: the dirty maps' blocks join the carry.
fn resume<M: Media>(
    media: &M,
    volume: VolumeId,
    geometry: Geometry,
    found: Found,
    epoch_limit: u64,
) -> Result<(Table, u64, Option<Damage>), CaptureError> {
    // It was looked at before.
    let epoch = open_epoch(media, epoch_limit).unwrap_or(epoch_limit);
    let layout = DirtyLayout::new(geometry.block_count().get());
    let maps = [0, 1].map(|parity| layout.map(media.words(Map::Dirty(parity))));
    let mut drained = maps[0].collect(geometry.all());
    drained.union_with(&maps[1].collect(geometry.all()));

    let mut changes: BTreeSet<u64> = media.changes()?.into_iter().collect();
    let gone = gone_changes(media, &found.snapshots, epoch, &changes);
    // Whoever reads the chain that goes through it misses it.
    changes.extend(gone);
    if !drained.is_empty() {
        if !found.snapshots.snapshots.is_empty() {
            let changed = changes_at(media, volume, geometry, epoch, &drained, &changes)?;
            media.put(Record::Changes(epoch), Some(&changed.encode(volume)))?;
            changes.insert(epoch);
            media.words(Map::Tracking)[CHANGES_WORD].store(checked_word(epoch), SeqCst);
        }
        let mut carry = found.carry.clone();
        carry.union_with(&drained);
        media.put(Record::Carry, Some(&encode_carry(volume, &carry)))?;
    }
    media.instant()?;
    for map in maps {
        map.clear();
        media.instant()?;
    }

    let mut table = Table {
        carry: found.carry,
        changes,
        snapshots: found.snapshots,
        ..Table::default()
    };
    table.carry.union_with(&drained);
    open_cuts(&mut table, found.interval);
    let gone = gone.map(|cut| Damage::new(Record::Changes(cut), Fault::Missing, Cost::Changes));
    Ok((table, epoch + 1, gone))
}

/// Opens the cuts that were open: those of the snapshots and of the interval.
fn open_cuts(table: &mut Table, interval: Option<(u64, BlockSet)>) {
    let snapshots = table
        .snapshots
        .snapshots
        .iter()
        .map(|snapshot| snapshot.cut);
    let cuts = snapshots.chain(interval.iter().map(|(cut, _)| *cut));
    table.cuts = cuts.map(|cut| (cut, OpenCut::new(cut))).collect();
    table.interval = interval.map(|(cut, changed)| Interval {
        cut,
        changed: Arc::new(changed),
        recorded: true,
    });
}

/// The newest record of changes, where it should be there and isn't.
fn gone_changes<M: Media>(
    media: &M,
    snapshots: &SnapshotTable,
    epoch: u64,
    changes: &BTreeSet<u64>,
) -> Option<u64> {
    let oldest = snapshots.snapshots.first()?.cut;
    newest_changes(media, epoch).filter(|cut| oldest < *cut && !changes.contains(cut))
}

/// What changed up to the epoch that a process left open. An earlier opening may have recorded some of it, and have ended
/// with its blocks cleared from the maps.
fn changes_at<M: Media>(
    media: &M,
    volume: VolumeId,
    geometry: Geometry,
    epoch: u64,
    drained: &BlockSet,
    changes: &BTreeSet<u64>,
) -> Result<Changes, CaptureError> {
    let mut blocks = drained.clone();
    let recorded = content(media, Record::Changes(epoch))?
        .and_then(|bytes| Ok(Changes::decode(&bytes, volume, epoch, geometry.all())?));
    match recorded {
        Ok(recorded) => blocks.union_with(&recorded.blocks),
        Err(Fault::Missing) => {}
        Err(_) => blocks.insert(geometry.all()),
    }
    let before = changes.range(..epoch).next_back();
    Ok(Changes {
        cut: epoch,
        since: before.copied().unwrap_or(0),
        blocks,
    })
}

/// Gives up all cuts of a table, because their before-images are damaged.
fn forget<M: Media>(
    media: &M,
    volume: VolumeId,
    geometry: Geometry,
    table: Table,
) -> Result<Table, CaptureError> {
    let mut carry = table.carry;
    if let Some(interval) = table.interval {
        carry.union_with(&interval.changed.intersect_extent(geometry.all()));
    }
    start_over(media, volume, carry, table.snapshots.last_id)
}

/// Leaves nothing but a carry, in an order that another opening can take up anywhere.
fn start_over<M: Media>(
    media: &M,
    volume: VolumeId,
    carry: BlockSet,
    last_id: u64,
) -> Result<Table, CaptureError> {
    media.put(Record::Carry, Some(&encode_carry(volume, &carry)))?;
    let snapshots = SnapshotTable {
        last_id,
        snapshots: Vec::new(),
    };
    media.put(Record::Snapshots, Some(&snapshots.encode(volume)))?;
    media.put(Record::Interval, Some(&encode_interval(volume, None)))?;
    for cut in media.changes()? {
        media.put(Record::Changes(cut), None)?;
    }
    for map in [Map::Slots, Map::Dirty(0), Map::Dirty(1)] {
        media.reset(map)?;
        media.instant()?;
    }
    let words = media.words(Map::Tracking);
    Ring::clear(&words[RING_WORD..]);
    words[ENTRIES_WORD..RING_WORD]
        .iter()
        .for_each(|word| word.store(0, SeqCst));
    Ok(Table {
        carry,
        snapshots,
        ..Table::default()
    })
}

fn region_blocks(geometry: Geometry, tuning: &Tuning, region: u64) -> Extent {
    let start = region * tuning.region_bytes;
    let length = tuning.region_bytes.min(geometry.length() - start);
    geometry
        .covering(start, length)
        .intersect(Extent::new(BlockIndex::ZERO, geometry.block_count()))
}
