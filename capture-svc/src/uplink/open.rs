//! What a restart finds, and what follows from it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use capture_core::uplink::{Facts, OwnInterval};
use tidemark_block::{Epoch, VolumeId, WriterTerm};

use super::{
    BaseTable,
    pending::{PendingKey, path_in},
    random_id,
    record::UplinkRecord,
};
use crate::engine::{Engine, IntervalCut};

/// Everything that an uplink starts from.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(super) record: UplinkRecord,
    pub(super) facts: Facts,
    pub(super) table: Arc<BaseTable>,
    pub(super) cut: Option<IntervalCut>,
}

pub(super) fn record_path(dir: &Path) -> PathBuf {
    dir.join("uplink")
}

pub(super) fn table_path(dir: &Path) -> PathBuf {
    dir.join("table")
}

/// The term to name as the last one held: that before the nonce's.
pub(super) fn last_term(record: &UplinkRecord) -> WriterTerm {
    if record.nonce_granted {
        WriterTerm::new(record.term.get().saturating_sub(1))
    } else {
        record.term
    }
}

impl Opened {
    /// Looks through a volume's state and brings its parts in line. `stores_kept`: everything that was written before
    /// is there, synced or not. Blocks.
    pub(crate) fn open(
        dir: &Path,
        volume: VolumeId,
        engine: &Arc<Engine>,
        stores_kept: bool,
    ) -> Result<Self> {
        let path = record_path(dir);
        let mut record = match UplinkRecord::load(&path, volume)? {
            Some(record) => record,
            None => UplinkRecord::new(volume, random_id()),
        };
        // Each start is a writer of its own: a copy of this state elsewhere must not pass for us.
        if record.nonce_granted {
            record.nonce = random_id();
            record.nonce_granted = false;
        }
        let (own, cut) = own_interval(&mut record, engine)?;
        let table = BaseTable::open(&table_path(dir), volume, engine.geometry())?;
        let sound = sound_table(dir, &record, &table, stores_kept)?;
        record.table_doubtful = !sound;
        record.store(&path)?;
        table.set_sound(sound);
        let facts = Facts {
            base: record.base,
            base_digest: record.base_digest,
            own,
            table_sound: sound,
        };
        Ok(Self {
            record,
            facts,
            table: Arc::new(table),
            cut,
        })
    }
}

/// Matches the engine's open interval with the record's.
fn own_interval(
    record: &mut UplinkRecord,
    engine: &Arc<Engine>,
) -> Result<(OwnInterval, Option<IntervalCut>)> {
    let open = engine.open_interval();
    Ok(match (open, record.interval) {
        (Some(cut), Some(own)) if cut.epoch == own.epoch => (OwnInterval::Open(own.id), Some(cut)),
        (Some(cut), None) => {
            drop(cut);
            release_unrecorded(engine, record.committed_epoch)?;
            (OwnInterval::None, None)
        }
        (Some(cut), Some(own)) => {
            drop(cut);
            engine.give_up_interval().context("give up the interval")?;
            (OwnInterval::Lost(own.id), None)
        }
        (None, Some(own)) => (OwnInterval::Lost(own.id), None),
        (None, None) => (OwnInterval::None, None),
    })
}

/// Lets go of an interval that the engine has open and the record doesn't name. Without one nothing happens.
pub(super) fn release_unrecorded(engine: &Arc<Engine>, committed: Epoch) -> Result<()> {
    let Some(epoch) = engine.open_interval().map(|cut| cut.epoch) else {
        return Ok(());
    };
    if epoch == committed {
        // The receipt was recorded, the release was not.
        engine
            .commit_interval(epoch)
            .context("release the committed interval")
    } else {
        // Its id was never recorded, so the vault has never heard of it.
        engine.give_up_interval().context("give up the interval")
    }
}

/// Whether the table is that of the base, now or after the last interval's checksums are applied again.
pub(super) fn sound_table(
    dir: &Path,
    record: &UplinkRecord,
    table: &BaseTable,
    stores_kept: bool,
) -> Result<bool> {
    if record.table_doubtful || !table.is_sound() {
        // A table made anew is that of the all-zero image.
        return Ok(!record.table_doubtful && record.base.get() == 0);
    }
    let stamp = table.table().stamp();
    if stamp == record.base {
        return Ok(true);
    }
    // What was applied after the stamp may be there in part; what it was made from, too.
    let (true, Some(interval), Some(digest)) =
        (stores_kept, record.base_interval, record.base_digest)
    else {
        return Ok(false);
    };
    let key = PendingKey {
        volume: record.volume,
        interval,
        base: stamp,
    };
    table
        .replay(&path_in(dir), key, digest)
        .context("apply the last interval's checksums again")
}

#[cfg(test)]
mod tests {
    use tidemark_block::{
        BlockCount, BlockIndex, BlockSize, Checksum128, Extent, GenerationId, Geometry, IntervalId,
    };

    use super::{
        super::pending::{Entry, PendingWriter},
        *,
    };

    const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
    const INTERVAL: IntervalId = IntervalId::from_bytes([2; 16]);

    fn geometry() -> Geometry {
        Geometry::new(4096 * 4096, BlockSize::MIN).unwrap()
    }

    /// The state after "base = 1" was recorded, with the stamp still at 0 and the table as `applied` left it.
    fn crashed(dir: &Path, applied: &[(BlockIndex, Checksum128)]) -> (UplinkRecord, BaseTable) {
        let key = PendingKey {
            volume: VOLUME,
            interval: INTERVAL,
            base: GenerationId::ZERO,
        };
        let sums = vec![Checksum128::from_bytes([7; 16]); 2];
        let extent = Extent::new(BlockIndex::new(2000), BlockCount::new(2));
        let mut entries = Vec::new();
        Entry::Data(vec![extent], sums.clone()).encode(&mut entries);
        Entry::End(BlockCount::new(2)).encode(&mut entries);
        let mut writer = PendingWriter::create(&path_in(dir), key).unwrap();
        writer.append(&entries).unwrap();

        let wanted =
            tidemark_disk::ChecksumTable::create(&dir.join("wanted"), VOLUME, geometry()).unwrap();
        wanted.apply(extent.iter().zip(sums)).unwrap();
        let mut record = UplinkRecord::new(VOLUME, [3; 16]);
        record.base = GenerationId::new(1);
        record.base_digest = Some(wanted.digest().unwrap());
        record.base_interval = Some(INTERVAL);

        BaseTable::open(&table_path(dir), VOLUME, geometry()).unwrap();
        let table = BaseTable::open(&table_path(dir), VOLUME, geometry()).unwrap();
        table.table().apply(applied.iter().copied()).unwrap();
        (record, table)
    }

    #[test]
    fn the_last_intervals_checksums_are_applied_again_only_where_every_store_was_kept() {
        for (stores_kept, sound) in [(true, true), (false, false)] {
            let dir = tempfile::tempdir().unwrap();
            let (record, table) = crashed(dir.path(), &[]);
            let found = sound_table(dir.path(), &record, &table, stores_kept).unwrap();
            assert_eq!(found, sound, "{stores_kept}");
            assert_eq!(
                Some(table.table().digest().unwrap()) == record.base_digest,
                sound
            );
        }
    }

    #[test]
    fn a_table_that_does_not_come_to_the_digest_of_the_base_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = (BlockIndex::new(9), Checksum128::from_bytes([5; 16]));
        let (record, table) = crashed(dir.path(), &[foreign]);
        assert!(!sound_table(dir.path(), &record, &table, true).unwrap());
    }

    #[test]
    fn a_stamped_table_is_trusted_after_a_power_loss() {
        let dir = tempfile::tempdir().unwrap();
        let (record, table) = crashed(dir.path(), &[]);
        table.table().sync_and_stamp(record.base).unwrap();
        assert!(sound_table(dir.path(), &record, &table, false).unwrap());
    }
}
