//! What a restart finds, and what follows from it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use capture_core::uplink::{Facts, OwnInterval};
use tidemark_block::{VolumeId, WriterTerm};

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

fn table_path(dir: &Path) -> PathBuf {
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
    /// Looks through a volume's state and brings its parts in line. Blocks.
    pub(crate) fn open(dir: &Path, volume: VolumeId, engine: &Arc<Engine>) -> Result<Self> {
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
        let sound = sound_table(dir, &record, &table)?;
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
        // The receipt was recorded, the release was not.
        (Some(cut), None) if cut.epoch == record.committed_epoch => {
            let epoch = cut.epoch;
            drop(cut);
            engine
                .commit_interval(epoch)
                .context("release the committed interval")?;
            (OwnInterval::None, None)
        }
        // Its id was never recorded, so the vault has never heard of it.
        (Some(cut), own) => {
            drop(cut);
            engine.give_up_interval().context("give up the interval")?;
            (
                own.map_or(OwnInterval::None, |own| OwnInterval::Lost(own.id)),
                None,
            )
        }
        (None, Some(own)) => (OwnInterval::Lost(own.id), None),
        (None, None) => (OwnInterval::None, None),
    })
}

/// Whether the table is that of the base, now or after the last interval's checksums are applied again.
fn sound_table(dir: &Path, record: &UplinkRecord, table: &BaseTable) -> Result<bool> {
    if record.table_doubtful || !table.is_sound() {
        // A table made anew is that of the all-zero image.
        return Ok(!record.table_doubtful && record.base.get() == 0);
    }
    let stamp = table.table().stamp();
    if stamp == record.base {
        return Ok(true);
    }
    let Some(interval) = record.base_interval else {
        return Ok(false);
    };
    let key = PendingKey {
        volume: record.volume,
        interval,
        base: stamp,
    };
    table
        .replay(&path_in(dir), key)
        .context("apply the last interval's checksums again")
}
