//! The looking that comes before an opening changes anything: what the records hold, and whether the mapped files and
//! the volume are as the last process left them.

use tidemark_block::{BlockSet, Geometry, VolumeId, block_checksum};

use super::{
    capture::{
        CHANGES_WORD, CaptureError, ENTRIES_WORD, EPOCH_SEAL_WORD, EPOCH_WORD, MARK_SYNC_FAILED,
        MARKS_WORD, RING_WORD, checked, epoch_seal,
    },
    damage::{Damage, Fault, content},
    dirty::DirtyLayout,
    media::{Map, Media, Record},
    records::{RecordError, SnapshotTable, decode_carry, decode_interval},
    recover::EPOCHS_RESERVED,
    ring::Ring,
    trust::{Judgement, Reason},
};
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// What the state's records hold.
#[derive(Default)]
pub(super) struct Found {
    pub(super) carry: BlockSet,
    pub(super) interval: Option<(u64, BlockSet)>,
    pub(super) snapshots: SnapshotTable,
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

/// Reads the records; gives those that are damaged or gone as well.
pub(super) fn read_records<M: Media>(
    media: &M,
    volume: VolumeId,
    geometry: Geometry,
) -> Result<(Found, Vec<Damage>), CaptureError> {
    let mut damage = Vec::new();
    let mut read = |record, take: &mut dyn FnMut(&[u8]) -> Result<(), RecordError>| {
        let taken = content(media, record)?.and_then(|bytes| Ok(take(&bytes)?));
        damage.extend(taken.err().map(|fault| Damage::everything(record, fault)));
        Ok::<_, CaptureError>(())
    };
    let mut found = Found::default();
    let all = geometry.all();
    read(Record::Carry, &mut |bytes| {
        found.carry = decode_carry(bytes, volume, all)?;
        Ok(())
    })?;
    read(Record::Interval, &mut |bytes| {
        found.interval = decode_interval(bytes, volume, all)?;
        Ok(())
    })?;
    read(Record::Snapshots, &mut |bytes| {
        found.snapshots = SnapshotTable::decode(bytes, volume)?;
        Ok(())
    })?;
    Ok((found, damage))
}

/// What the mapped files and the volume itself add to the judgement.
pub(super) fn examine<M: Media>(
    media: &M,
    geometry: Geometry,
    judgement: Judgement,
    epoch_limit: u64,
    found: &Found,
) -> Result<Judgement, CaptureError> {
    let words = media.words(Map::Tracking);
    let marks = words[MARKS_WORD].load(SeqCst);
    // The first sync may report a failure that nobody has heard of; the second one must succeed.
    let failed = marks != 0 || media.sync_volume().is_err();
    if failed {
        words[MARKS_WORD].store(MARK_SYNC_FAILED, SeqCst);
        media.sync_volume()?;
    }
    if failed || matches!(judgement, Judgement::Everything(_)) {
        // Pages that could not be written stay in memory, marked clean, and no later sync writes them: what they show
        // must not be compared, let alone shipped, since the disk has something else. Where everything is in doubt the
        // mark may be lost with its file.
        media.drop_volume_cache()?;
    }
    if !matches!(judgement, Judgement::Exact { .. }) {
        return Ok(judgement);
    }
    if !matches!(marks, 0 | MARK_SYNC_FAILED) {
        return Ok(damaged(Map::Tracking, Fault::Marks));
    }
    if failed {
        return Ok(Judgement::PowerLoss);
    }
    if let Err((map, fault)) = check_maps(media, geometry, epoch_limit, found) {
        return Ok(damaged(map, fault));
    }
    Ok(match overwritten(media, geometry, words)? {
        Some(reason) => Judgement::Everything(reason),
        None => judgement,
    })
}

fn damaged(map: Map, fault: Fault) -> Judgement {
    Judgement::Everything(Reason::Damaged(Damage::everything(map, fault)))
}

/// Whether the mapped files hold what processes that end anywhere leave in them.
fn check_maps<M: Media>(
    media: &M,
    geometry: Geometry,
    epoch_limit: u64,
    found: &Found,
) -> Result<(), (Map, Fault)> {
    let layout = DirtyLayout::new(geometry.block_count().get());
    for parity in [0, 1] {
        let map = Map::Dirty(parity);
        let checked = layout.map(media.words(map)).check();
        checked.map_err(|fault| (map, fault.into()))?;
    }
    let in_tracking = |fault| (Map::Tracking, fault);
    let open = open_epoch(media, epoch_limit).map_err(in_tracking)?;
    // Openings that end before the identity is durable go a little past the limit.
    if open > epoch_limit.saturating_add(EPOCHS_RESERVED)
        || found.newest_cut().is_some_and(|cut| cut >= open)
    {
        return Err(in_tracking(Fault::Epoch));
    }
    let words = media.words(Map::Tracking);
    let is_checked = |word: usize| checked(words[word].load(SeqCst)).is_some();
    let zeroes = &words[CHANGES_WORD + 1..RING_WORD];
    if !is_checked(ENTRIES_WORD)
        || !is_checked(CHANGES_WORD)
        || zeroes.iter().any(|word| word.load(SeqCst) != 0)
    {
        return Err(in_tracking(Fault::Word));
    }
    Ok(())
}

/// Whether a recorded block is not what was written to it last, as far as that can be told.
fn overwritten<M: Media>(
    media: &M,
    geometry: Geometry,
    words: &[AtomicU64],
) -> Result<Option<Reason>, CaptureError> {
    let mut bytes = vec![0; geometry.block_size().as_usize()];
    for (record, place) in Ring::records(&words[RING_WORD..]).zip(0..) {
        let wrong = |place| Reason::Damaged(Damage::everything(Map::Tracking, Fault::Ring(place)));
        let (block, checksum) = match record {
            Ok(record) => record,
            Err(place) => return Ok(Some(wrong(place))),
        };
        if !geometry.all().contains(block) {
            return Ok(Some(wrong(place)));
        }
        media.read_volume(geometry.offset_of(block).get(), &mut bytes)?;
        if block_checksum(&bytes) != checksum {
            return Ok(Some(Reason::Overwritten(block)));
        }
    }
    Ok(None)
}

/// The cut of the newest record of changes; of all that have its lower half the last one that was closed.
pub(super) fn newest_changes<M: Media>(media: &M, epoch: u64) -> Option<u64> {
    let word = media.words(Map::Tracking)[CHANGES_WORD].load(SeqCst);
    let low = checked(word).filter(|_| word != 0)?;
    let cut = epoch & !u64::from(u32::MAX) | low;
    if cut <= epoch {
        Some(cut)
    } else {
        cut.checked_sub(1 << 32)
    }
}

/// The epoch that was open when the last process ended.
pub(super) fn open_epoch<M: Media>(media: &M, epoch_limit: u64) -> Result<u64, Fault> {
    let words = media.words(Map::Tracking);
    if words.iter().all(|word| word.load(SeqCst) == 0) {
        // Made anew, by an opening that came no further.
        return Ok(epoch_limit);
    }
    epoch_of(words).ok_or(Fault::Epoch)
}

/// The open epoch that the words of `tracking` tell; none where they don't.
#[must_use]
pub fn epoch_of(words: &[AtomicU64]) -> Option<u64> {
    let epoch = words[EPOCH_WORD].load(SeqCst);
    let seal = words[EPOCH_SEAL_WORD].load(SeqCst);
    let candidates = [Some(epoch), epoch.checked_add(1)];
    candidates
        .into_iter()
        .flatten()
        .find(|epoch| epoch_seal(*epoch) == seal)
}
