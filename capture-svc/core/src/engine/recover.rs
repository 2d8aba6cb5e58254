//! Opening a volume: from what the files hold to a capture that may serve.
//!
//! Each step leaves files from which another opening finds the same blocks or more.

use std::sync::Arc;

use tidemark_block::{
    BlockCount, BlockIndex, BlockSet, Extent, Geometry, VolumeId, block_checksum,
};

use super::{
    capture::{
        Capture, CaptureError, EPOCH_WORD, Interval, MARK_SYNC_FAILED, MARKS_WORD, OpenCut,
        RING_WORD, Table, Tuning, View,
    },
    dirty::DirtyLayout,
    intent::{IntentMap, PAGE_LEN, page_count},
    media::{Map, Media, Record},
    records::{RecordError, SnapshotTable, decode_carry, decode_cut, encode_carry, encode_cut},
    ring::Ring,
    spool::Spool,
    trust::Judgement,
};
use crate::sync::atomic::{AtomicBool, Ordering::SeqCst};

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
    Everything(String),
}

/// Epochs that an identity reserves beyond the open one.
pub const EPOCHS_RESERVED: u64 = 1 << 32;

/// What the state's records hold.
struct Found {
    carry: BlockSet,
    interval: Option<(u64, BlockSet)>,
    snapshots: SnapshotTable,
}

impl Found {
    /// The newest of the recorded cuts, all of which closed an epoch before the open one.
    fn newest_cut(&self) -> Option<u64> {
        let snapshots = self.snapshots.snapshots.iter().map(|snapshot| snapshot.cut);
        snapshots
            .chain(self.interval.as_ref().map(|(cut, _)| *cut))
            .max()
    }
}

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
        let (found, damage) = read_records(&media, geometry)?;
        let examined = examine(&media, geometry, judgement, epoch_limit, &found)?;
        let judgement = match damage {
            Some(record) => Err(format!("the {record} is damaged")),
            None => examined,
        };
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
        match judgement {
            Ok(Judgement::Exact { clean }) => opening.take_up(found, clean),
            Ok(Judgement::PowerLoss) => opening.doubt_regions(found),
            Ok(Judgement::Everything(reason)) => opening.doubt_all(&found, reason.to_owned()),
            Err(reason) => opening.doubt_all(&found, reason),
        }
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
        let (table, epoch) = resume(&self.media, self.geometry, found, self.epoch_limit)?;
        let intent = self.intent(epoch);
        let spool = Spool::new(self.tuning.spool);
        if spool.rebuild(&self.media)? {
            let capture = self.assemble(intent, spool, table, epoch);
            capture.sweep();
            let outcome = if clean {
                Outcome::Clean
            } else {
                Outcome::ProcessCrash
            };
            return Ok((capture, outcome));
        }
        // Before-images are lost: so are the snapshots, and an interval is no longer readable.
        let table = forget(&self.media, self.geometry, table)?;
        let spool = self.empty_spool()?;
        let capture = self.assemble(intent, spool, table, epoch);
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
        reason: String,
    ) -> Result<(Capture<M>, Outcome), CaptureError> {
        let all = std::iter::once(self.geometry.all()).collect();
        Ok((self.begin_with(all, found)?, Outcome::Everything(reason)))
    }

    /// Begins with nothing but these blocks in doubt; of what was found only the last snapshot's number is kept.
    fn begin_with(self, doubt: BlockSet, found: &Found) -> Result<Capture<M>, CaptureError> {
        let intent = self.intent(self.epoch_limit);
        intent.distrust();
        let table = start_over(&self.media, doubt, found.snapshots.last_id)?;
        let spool = self.empty_spool()?;
        let epoch = self.epoch_limit;
        Ok(self.assemble(intent, spool, table, epoch))
    }

    /// The intent map as of the opening that begins this epoch.
    fn intent(&self, epoch: u64) -> IntentMap {
        let regions = self.geometry.length().div_ceil(self.tuning.region_bytes);
        IntentMap::restore(self.volume, regions, epoch - 1, &self.pages)
    }

    fn empty_spool(&self) -> Result<Spool, CaptureError> {
        let spool = Spool::new(self.tuning.spool);
        let whole = spool.rebuild(&self.media)?;
        debug_assert!(whole, "an empty spool is whole");
        Ok(spool)
    }

    /// Begins the epoch.
    fn assemble(self, intent: IntentMap, spool: Spool, table: Table, epoch: u64) -> Capture<M> {
        self.media.words(Map::Tracking)[EPOCH_WORD].store(epoch, SeqCst);
        Capture::assemble(
            self.media,
            self.volume,
            self.geometry,
            self.tuning,
            intent,
            spool,
            table,
            epoch - 1,
        )
    }
}

impl<M: Media> Capture<M> {
    /// The identity is durable: the opening has ended. A failed sync of before is dealt with.
    pub fn confirm(&self) {
        self.media.words(Map::Tracking)[MARKS_WORD].store(0, SeqCst);
    }
}

fn read_records<M: Media>(
    media: &M,
    geometry: Geometry,
) -> Result<(Found, Option<&'static str>), CaptureError> {
    let mut damage = None;
    let mut take = |name, result: Result<(), RecordError>| {
        if result.is_err() {
            damage = Some(name);
        }
    };
    let mut found = Found {
        carry: BlockSet::new(),
        interval: None,
        snapshots: SnapshotTable::default(),
    };
    let all = geometry.all();
    if let Some(bytes) = media.get(Record::Carry)? {
        take(
            "carry",
            decode_carry(&bytes, all).map(|carry| found.carry = carry),
        );
    }
    if let Some(bytes) = media.get(Record::Interval)? {
        take(
            "open interval",
            decode_cut(&bytes, all).map(|cut| found.interval = Some(cut)),
        );
    }
    if let Some(bytes) = media.get(Record::Snapshots)? {
        take(
            "snapshot table",
            SnapshotTable::decode(&bytes).map(|table| found.snapshots = table),
        );
    }
    Ok((found, damage))
}

/// What the volume itself adds to the judgement; an error tells why nothing can be trusted.
fn examine<M: Media>(
    media: &M,
    geometry: Geometry,
    judgement: Judgement,
    epoch_limit: u64,
    found: &Found,
) -> Result<Result<Judgement, String>, CaptureError> {
    let words = media.words(Map::Tracking);
    let failed_before = words[MARKS_WORD].load(SeqCst) & MARK_SYNC_FAILED != 0;
    // The first sync may report a failure that nobody has heard of; the second one must succeed.
    let failed = failed_before || media.sync_volume().is_err();
    if failed {
        words[MARKS_WORD].fetch_or(MARK_SYNC_FAILED, SeqCst);
        media.sync_volume()?;
    }
    if failed || matches!(judgement, Judgement::Everything(_)) {
        // Pages that could not be written stay in memory, marked clean, and no later sync writes them: what they show
        // must not be compared, let alone shipped, since the disk has something else. Where everything is in doubt the
        // mark may be lost with its file.
        media.drop_volume_cache()?;
    }
    let clean = match judgement {
        Judgement::Exact { .. } if failed => return Ok(Ok(Judgement::PowerLoss)),
        Judgement::Exact { clean } => clean,
        other => return Ok(Ok(other)),
    };
    let layout = DirtyLayout::new(geometry.block_count().get());
    if [0, 1]
        .iter()
        .any(|&parity| !layout.map(media.words(Map::Dirty(parity))).is_whole())
    {
        return Ok(Err("a dirty map is damaged".to_owned()));
    }
    let open = open_epoch(media, epoch_limit);
    // Openings that end before the identity is durable go a little past the limit.
    if open > epoch_limit.saturating_add(EPOCHS_RESERVED)
        || found.newest_cut().is_some_and(|cut| cut >= open)
    {
        return Ok(Err("the epoch counter is damaged".to_owned()));
    }
    let mut block_bytes = vec![0; geometry.block_size().as_usize()];
    for (block, checksum) in Ring::records(&words[RING_WORD..]) {
        if !geometry.all().contains(block) {
            return Ok(Err("the recorded blocks are damaged".to_owned()));
        }
        media.read_volume(geometry.offset_of(block).get(), &mut block_bytes)?;
        if block_checksum(&block_bytes) != checksum {
            return Ok(Err(format!(
                "block {block} is not what was written to it last"
            )));
        }
    }
    Ok(Ok(Judgement::Exact { clean }))
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
            media.read_intent(number * 2, &mut pair[0])?;
            media.read_intent(number * 2 + 1, &mut pair[1])?;
            Ok(pair)
        })
        .collect()
}

/// The epoch that was open when the last process ended.
fn open_epoch<M: Media>(media: &M, epoch_limit: u64) -> u64 {
    match media.words(Map::Tracking)[EPOCH_WORD].load(SeqCst) {
        // Made anew, by an opening that came no further.
        0 => epoch_limit,
        epoch => epoch,
    }
}

/// Takes up the tracking where it was left: the dirty maps' blocks join the carry.
fn resume<M: Media>(
    media: &M,
    geometry: Geometry,
    found: Found,
    epoch_limit: u64,
) -> Result<(Table, u64), CaptureError> {
    let epoch = open_epoch(media, epoch_limit);
    let layout = DirtyLayout::new(geometry.block_count().get());
    let maps = [0, 1].map(|parity| layout.map(media.words(Map::Dirty(parity))));
    let mut drained = maps[0].collect(geometry.all());
    drained.union_with(&maps[1].collect(geometry.all()));

    let mut changes: std::collections::BTreeSet<u64> = media.changes()?.into_iter().collect();
    if !drained.is_empty() {
        if !found.snapshots.snapshots.is_empty() {
            note_drained(media, geometry, epoch, &drained)?;
            changes.insert(epoch);
        }
        let mut carry = found.carry.clone();
        carry.union_with(&drained);
        media.put(Record::Carry, Some(&encode_carry(&carry)))?;
    }
    media.instant()?;
    for map in maps {
        map.clear();
        media.instant()?;
    }

    let mut carry = found.carry;
    carry.union_with(&drained);
    let mut table = Table {
        carry,
        changes,
        snapshots: found.snapshots,
        ..Table::default()
    };
    let mut open = |cut| {
        let view = Arc::new(View {
            cut,
            broken: AtomicBool::new(false),
        });
        table.cuts.insert(
            cut,
            OpenCut {
                view,
                readers: 0,
                wanted: true,
            },
        );
    };
    table
        .snapshots
        .snapshots
        .iter()
        .for_each(|snapshot| open(snapshot.cut));
    if let Some((cut, changed)) = found.interval {
        open(cut);
        table.interval = Some(Interval {
            cut,
            changed: Arc::new(changed),
            recorded: true,
        });
    }
    Ok((table, epoch + 1))
}

/// Keeps the drained blocks for [`Capture::changed_between`], beside those that an opening which ended early had drained.
/// A record that is damaged stays so: whoever asks for it is told.
fn note_drained<M: Media>(
    media: &M,
    geometry: Geometry,
    epoch: u64,
    drained: &BlockSet,
) -> Result<(), CaptureError> {
    let mut noted = drained.clone();
    if let Some(bytes) = media.get(Record::Changes(epoch))? {
        match decode_cut(&bytes, geometry.all()) {
            Ok((_, before)) => noted.union_with(&before),
            Err(_) => return Ok(()),
        }
    }
    Ok(media.put(Record::Changes(epoch), Some(&encode_cut(epoch, &noted)))?)
}

/// Gives up all cuts of a table, because their before-images are damaged.
fn forget<M: Media>(media: &M, geometry: Geometry, table: Table) -> Result<Table, CaptureError> {
    let mut carry = table.carry;
    if let Some(interval) = table.interval {
        carry.union_with(&interval.changed.intersect_extent(geometry.all()));
    }
    start_over(media, carry, table.snapshots.last_id)
}

/// Leaves nothing but a carry, in an order that another opening can take up anywhere.
fn start_over<M: Media>(media: &M, carry: BlockSet, last_id: u64) -> Result<Table, CaptureError> {
    media.put(Record::Carry, Some(&encode_carry(&carry)))?;
    let snapshots = SnapshotTable {
        last_id,
        snapshots: Vec::new(),
    };
    media.put(Record::Snapshots, Some(&snapshots.encode()))?;
    media.put(Record::Interval, None)?;
    for cut in media.changes()? {
        media.put(Record::Changes(cut), None)?;
    }
    for map in [Map::Slots, Map::Dirty(0), Map::Dirty(1)] {
        media.reset(map)?;
        media.instant()?;
    }
    Ring::clear(&media.words(Map::Tracking)[RING_WORD..]);
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
