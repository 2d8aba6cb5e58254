//! What a restart finds, and what follows from it.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use capture_core::uplink::{Facts, OwnInterval};
use thiserror::Error;
use tidemark_block::{Epoch, VolumeId, WriterTerm};

use super::{
    BaseTable,
    pending::{PendingKey, path_in},
    random_id,
    record::UplinkRecord,
};
use crate::engine::{Engine, IntervalCut};

/// Why the checksum table is not known to be that of the base: it is compared with the vault's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum TableDoubt {
    /// It was in doubt before, or the base is not ours.
    #[error("it was to be compared when the service stopped")]
    Recorded,
    /// There was none to be used.
    #[error("it was missing, damaged or not to be read, and is made anew")]
    Anew,
    /// It, or the checksums of the last interval, were damaged; or somebody put another one there.
    #[error("it does not come to the image digest of the base")]
    Digest,
    /// A loss of power, or what is like one, came between.
    #[error("what was applied to it last may be lost")]
    Unsynced,
}

/// Everything that an uplink starts from.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(super) record: UplinkRecord,
    pub(super) facts: Facts,
    pub(super) table: Arc<BaseTable>,
    pub(super) cut: Option<IntervalCut>,
}

const ADD_AGAIN: &str = "check the disk, then use `tidemark volume remove` and add the volume again; its generations stay";

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

/// Forgets which epoch was committed last, for an engine that may count from the beginning: an epoch that comes again must
/// not be taken for it. What was committed and not released yet is compared once more.
pub(crate) fn forget_epochs(dir: &Path, volume: VolumeId) -> Result<()> {
    let path = record_path(dir);
    let mut record = UplinkRecord::load(&path, volume)
        .and_then(|record| record.with_context(|| format!("{} is missing", path.display())))
        .map_err(|error| anyhow::anyhow!("{error:#}: {ADD_AGAIN}"))?;
    record.committed_epoch = Epoch::ZERO;
    record.store(&path)
}

impl Opened {
    /// Makes what a new volume starts from. Blocks.
    pub(crate) fn create(dir: &Path, volume: VolumeId, engine: &Arc<Engine>) -> Result<Self> {
        UplinkRecord::new(volume, random_id()).store(&record_path(dir))?;
        Self::open(dir, volume, engine, true)
    }

    /// Looks through a volume's state and brings its parts in line. `stores_kept`: everything that was written before
    /// is there, synced or not. Blocks.
    pub(crate) fn open(
        dir: &Path,
        volume: VolumeId,
        engine: &Arc<Engine>,
        stores_kept: bool,
    ) -> Result<Self> {
        let path = record_path(dir);
        // Who owns the volume at the vault can't be told without it.
        let mut record = match UplinkRecord::load(&path, volume) {
            Ok(Some(record)) => record,
            Ok(None) => bail!(
                "the uplink record {} is missing: {ADD_AGAIN}",
                path.display()
            ),
            Err(error) => bail!("{error:#}: {ADD_AGAIN}"),
        };
        // Each start is a writer of its own: a copy of this state elsewhere must not pass for us.
        if record.nonce_granted {
            record.nonce = random_id();
            record.nonce_granted = false;
        }
        let (own, cut) = own_interval(&mut record, engine)?;
        let table = BaseTable::open(&table_path(dir), volume, engine.geometry())?;
        let doubt = table_doubt(dir, &record, &table, stores_kept)?;
        if let (Some(doubt), true) = (doubt, record.base.get() > 0) {
            tracing::warn!(
                %volume, file = %table_path(dir).display(), reason = %doubt,
                "the checksum table is compared with the vault's"
            );
        }
        record.table_doubtful = doubt.is_some();
        record.store(&path)?;
        table.set_sound(doubt.is_none());
        let facts = Facts {
            base: record.base,
            base_digest: record.base_digest,
            own,
            table_sound: doubt.is_none(),
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
    Ok(match (open, record.interval.clone()) {
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

/// Whether the table is that of the base, now or after the last interval's checksums are applied again; if not, why.
pub(super) fn table_doubt(
    dir: &Path,
    record: &UplinkRecord,
    table: &BaseTable,
    stores_kept: bool,
) -> Result<Option<TableDoubt>> {
    if record.table_doubtful {
        return Ok(Some(TableDoubt::Recorded));
    }
    // A table made anew is that of the all-zero image.
    let anew = (record.base.get() > 0).then_some(TableDoubt::Anew);
    if !table.is_sound() {
        return Ok(anew);
    }
    match compared(dir, record, table, stores_kept) {
        Err(error) if table.failed(&error) => {
            table.to_repair()?;
            Ok(anew)
        }
        found => found.context("use the checksum table"),
    }
}

/// The same, of a table that was found whole.
fn compared(
    dir: &Path,
    record: &UplinkRecord,
    table: &BaseTable,
    stores_kept: bool,
) -> io::Result<Option<TableDoubt>> {
    let stamp = table.table().stamp();
    if stamp == record.base {
        let found = table.table().digest()?;
        let differs = record.base_digest.is_some_and(|digest| digest != found);
        return Ok(differs.then_some(TableDoubt::Digest));
    }
    // What was applied after the stamp may be there in part; what it was made from, too.
    let (true, Some(interval), Some(digest)) =
        (stores_kept, record.base_interval, record.base_digest)
    else {
        return Ok(Some(TableDoubt::Unsynced));
    };
    let key = PendingKey {
        volume: record.volume,
        interval,
        base: stamp,
    };
    // The last interval's checksums are applied again.
    let is_that_of_the_base = table.replay(&path_in(dir), key, digest)?;
    Ok((!is_that_of_the_base).then_some(TableDoubt::Digest))
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

    fn file_of(dir: &Path) -> std::fs::File {
        let mut options = std::fs::File::options();
        options.write(true).open(table_path(dir)).unwrap()
    }

    #[test]
    fn the_last_intervals_checksums_are_applied_again_only_where_every_store_was_kept() {
        for (stores_kept, sound) in [(true, true), (false, false)] {
            let dir = tempfile::tempdir().unwrap();
            let (record, table) = crashed(dir.path(), &[]);
            let doubt = table_doubt(dir.path(), &record, &table, stores_kept).unwrap();
            let expected = (!sound).then_some(TableDoubt::Unsynced);
            assert_eq!(doubt, expected, "{stores_kept}");
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
        let doubt = table_doubt(dir.path(), &record, &table, true).unwrap();
        assert_eq!(doubt, Some(TableDoubt::Digest));
    }

    #[test]
    fn a_table_that_the_disk_cannot_read_is_made_anew() {
        for stamped in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let (mut record, table) = crashed(dir.path(), &[]);
            if stamped {
                table.table().sync_and_stamp(record.base).unwrap();
            }
            // What a map of a file has lost is read as a bad sector is.
            file_of(dir.path()).set_len(0).unwrap();
            let told = table.table().digest().unwrap_err();
            assert!(tidemark_disk::guarded_map::is_unreadable(&told));
            let doubt = || table_doubt(dir.path(), &record, &table, true).unwrap();
            assert_eq!(doubt(), Some(TableDoubt::Anew), "{stamped}");
            assert_eq!(table.table().stamp(), GenerationId::ZERO);
            let zero = table.table().digest().unwrap();
            // Of a volume that has shipped nothing, the new one is the right one.
            record.base = GenerationId::ZERO;
            record.base_digest = None;
            table.set_sound(true);
            file_of(dir.path()).set_len(0).unwrap();
            let doubt = table_doubt(dir.path(), &record, &table, true).unwrap();
            assert_eq!((doubt, table.table().digest().unwrap()), (None, zero));
        }
    }

    #[test]
    fn a_stamped_table_is_trusted_after_a_power_loss() {
        let dir = tempfile::tempdir().unwrap();
        let (record, table) = crashed(dir.path(), &[]);
        let key = PendingKey {
            volume: VOLUME,
            interval: INTERVAL,
            base: GenerationId::ZERO,
        };
        let digest = record.base_digest.unwrap();
        assert!(table.replay(&path_in(dir.path()), key, digest).unwrap());
        table.table().sync_and_stamp(record.base).unwrap();
        let doubt = |record: &UplinkRecord| table_doubt(dir.path(), record, &table, false).unwrap();
        assert_eq!(doubt(&record), None);
        let mut another = record.clone();
        another.base_digest = Some(tidemark_block::ImageDigest::from_bytes([9; 16]));
        assert_eq!(doubt(&another), Some(TableDoubt::Digest));
        another.table_doubtful = true;
        assert_eq!(doubt(&another), Some(TableDoubt::Recorded));
    }
}
