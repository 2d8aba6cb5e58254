//! Snapshots: listing, deleting, reading, what changed between two, and giving up when the spool is full.

use std::sync::Arc;

use tidemark_block::{BlockSet, Coherence, CutReason};

use super::{
    capture::{Capture, CaptureError, Table, View},
    damage::{Cost, Damage, content},
    media::{Media, Record},
    records::{Changes, RecordError, Snapshot, SnapshotTable, old},
};
use crate::sync::atomic::Ordering::SeqCst;

impl<M: Media> Capture<M> {
    /// All snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.table.lock().snapshots.snapshots.clone()
    }

    /// How many there are; none where that would have to wait, for the disk perhaps.
    pub fn snapshot_count_now(&self) -> Option<usize> {
        let table = self.table.try_lock()?;
        Some(table.snapshots.snapshots.len())
    }

    /// Records how good the moment of a snapshot's cut was, and why no better.
    ///
    /// # Errors
    /// As [`Self::delete_snapshot`]: the grade is as it was.
    pub fn grade_snapshot(
        &self,
        id: u64,
        coherence: Coherence,
        reason: &CutReason,
    ) -> Result<(), CaptureError> {
        let mut table = self.table_to_change()?;
        let cut = find(&table, id)?.cut;
        let mut graded = table.snapshots.clone();
        let of_cut = graded.snapshots.iter_mut().filter(|s| s.cut == cut);
        of_cut.for_each(|snapshot| {
            snapshot.coherence = coherence;
            snapshot.reason = reason.clone();
        });
        self.put(Record::Snapshots, Some(&graded.encode(self.volume)))?;
        table.snapshots = graded;
        Ok(())
    }

    /// Deletes a snapshot; its before-images go with its last reader.
    ///
    /// # Errors
    /// [`CaptureError::NoSnapshot`], [`CaptureError::Closed`], or where the table can't be written: the snapshot is
    /// still there.
    pub fn delete_snapshot(&self, id: u64) -> Result<(), CaptureError> {
        let mut table = self.table_to_change()?;
        let cut = find(&table, id)?.cut;
        self.drop_snapshot(&mut table, cut)?;
        self.unwant(&mut table, cut);
        self.publish_cuts(&table, self.epoch());
        drop(table);
        self.sweep();
        Ok(())
    }

    fn drop_snapshot(&self, table: &mut Table, cut: u64) -> Result<(), CaptureError> {
        let snapshots = SnapshotTable {
            last_id: table.snapshots.last_id,
            snapshots: table
                .snapshots
                .snapshots
                .iter()
                .filter(|s| s.cut != cut)
                .cloned()
                .collect(),
        };
        self.put(Record::Snapshots, Some(&snapshots.encode(self.volume)))?;
        table.snapshots = snapshots;
        self.drop_changes(table);
        Ok(())
    }

    /// Removes the records of changes that no two snapshots enclose. One that stays is no harm: the next deletion
    /// tries again.
    fn drop_changes(&self, table: &mut Table) {
        let oldest = table
            .snapshots
            .snapshots
            .first()
            .map_or(u64::MAX, |snapshot| snapshot.cut);
        while let Some(&cut) = table.changes.first().filter(|&&cut| cut <= oldest) {
            if self.put(Record::Changes(cut), None).is_err() {
                return;
            }
            table.changes.remove(&cut);
        }
    }

    /// Keeps a closed epoch's blocks for [`Self::changed_between`], where a snapshot is older.
    pub(super) fn note_changes(
        &self,
        table: &mut Table,
        epoch: u64,
        drained: &BlockSet,
    ) -> Result<(), CaptureError> {
        let Some(newest) = table
            .snapshots
            .snapshots
            .last()
            .map(|snapshot| snapshot.cut)
        else {
            return Ok(());
        };
        if drained.is_empty() {
            return Ok(());
        }
        let mut union = drained.clone();
        // An earlier attempt to close the epoch may have come this far, and have merged others into its record.
        let mut noted = None;
        if table.changes.contains(&epoch) {
            noted = self.changes_of(table, epoch)?;
            match &noted {
                Some(changes) => union.union_with(&changes.blocks),
                None => union.insert(self.geometry.all()),
            }
        }
        let newer: Vec<u64> = table.changes.range(newest + 1..epoch).copied().collect();
        let merged = if newer.len() >= self.tuning.changes_max {
            &newer[..]
        } else {
            &[]
        };
        for &cut in merged {
            match self.changes_of(table, cut)? {
                Some(changes) => union.union_with(&changes.blocks),
                None => union.insert(self.geometry.all()),
            }
        }
        let first = merged.first().copied().unwrap_or(epoch);
        let since = before(table, first);
        let changes = Changes {
            cut: epoch,
            // Those that the earlier attempt has merged may be gone.
            since: noted.as_ref().map_or(since, |noted| noted.since.min(since)),
            blocks: union,
        };
        if noted.as_ref() != Some(&changes) {
            self.put(Record::Changes(epoch), Some(&changes.encode(self.volume)))?;
            table.changes.insert(epoch);
            self.newest_changes(epoch);
        }
        for cut in merged {
            self.put(Record::Changes(*cut), None)?;
            table.changes.remove(cut);
        }
        Ok(())
    }

    /// A record of changes; none where it is damaged, unreadable or gone, which is noted.
    fn changes_of(&self, table: &Table, cut: u64) -> Result<Option<Changes>, CaptureError> {
        let record = Record::Changes(cut);
        let found = content(&self.media, record)?
            .and_then(|bytes| Ok(self.decode_changes(table, cut, &bytes)?));
        Ok(found
            .map_err(|fault| self.note([Damage::new(record, fault, Cost::Changes)]))
            .ok())
    }

    fn decode_changes(
        &self,
        table: &Table,
        cut: u64,
        bytes: &[u8],
    ) -> Result<Changes, RecordError> {
        let all = self.geometry.all();
        // 0.1.0 left it to the names of the files which record is the one before.
        if let Ok((found, blocks)) = old::decode_cut(bytes, all) {
            let since = before(table, cut);
            return match found == cut {
                true => Ok(Changes { cut, since, blocks }),
                false => Err(RecordError::Cut(found)),
            };
        }
        Changes::decode(bytes, self.volume, cut, all)
    }

    /// The blocks that may differ between two snapshots. Where a record that tells is damaged or gone: all of them.
    ///
    /// # Errors
    /// Where one doesn't exist, the older isn't older, or a record can't be read.
    pub fn changed_between(&self, older: u64, newer: u64) -> Result<BlockSet, CaptureError> {
        self.check()?;
        let table = self.table.lock();
        let (from, to) = (find(&table, older)?, find(&table, newer)?);
        if from.cut >= to.cut {
            return Err(CaptureError::SnapshotOrder(older, newer));
        }
        let mut changed = BlockSet::new();
        let mut at = to.changes;
        while at > from.cut {
            let Some(changes) = self.changes_of(&table, at)? else {
                return Ok(std::iter::once(self.geometry.all()).collect());
            };
            changed.union_with(&changes.blocks);
            at = changes.since;
        }
        Ok(changed)
    }

    /// Opens a snapshot for reading. The view is given back by [`Self::close_view`].
    ///
    /// # Errors
    /// [`CaptureError::NoSnapshot`].
    pub fn open_snapshot(&self, id: u64) -> Result<Arc<View>, CaptureError> {
        self.check()?;
        let mut table = self.table.lock();
        let cut = find(&table, id)?.cut;
        Self::open_view(&mut table, cut).ok_or(CaptureError::NoSnapshot(id))
    }

    /// Opens an open cut for reading: the interval's. The view is given back by [`Self::close_view`].
    pub fn open_cut(&self, cut: u64) -> Option<Arc<View>> {
        Self::open_view(&mut self.table.lock(), cut)
    }

    fn open_view(table: &mut Table, cut: u64) -> Option<Arc<View>> {
        let open = table.cuts.get_mut(&cut)?;
        open.readers += 1;
        Some(Arc::clone(&open.view))
    }

    /// A reader has ended.
    pub fn close_view(&self, view: &Arc<View>) {
        let mut table = self.table.lock();
        // A cut that was given up has gone from the table already.
        let Some(open) = table
            .cuts
            .get_mut(&view.cut)
            .filter(|open| Arc::ptr_eq(&open.view, view))
        else {
            return;
        };
        open.readers -= 1;
        if open.readers == 0 && !open.wanted {
            table.cuts.remove(&view.cut);
            self.publish_cuts(&table, self.epoch());
            drop(table);
            self.sweep();
        }
    }

    /// Makes room in a full spool: gives up the oldest open cut whose before-images nobody else needs, until there is
    /// room or nothing is open. Returns the cuts given up.
    ///
    /// # Errors
    /// Where a record can't be written and nothing was given up. The caller may come again, unless all work is
    /// refused.
    pub fn relieve(&self) -> Result<Vec<u64>, CaptureError> {
        let mut given_up = Vec::new();
        loop {
            let mut table = self.table_to_change()?;
            let cuts: Vec<u64> = table.cuts.keys().copied().collect();
            if cuts.is_empty() || (self.spool.has_room() && !given_up.is_empty()) {
                return Ok(given_up);
            }
            let exclusive = self.spool.exclusive(&cuts);
            let victim = cuts[exclusive.iter().position(|&count| count > 0).unwrap_or(0)];
            if let Err(error) = self.give_up(&mut table, victim) {
                // What could not be replaced still stands, and so does the cut.
                self.check()?;
                return if given_up.is_empty() {
                    Err(error)
                } else {
                    Ok(given_up)
                };
            }
            self.publish_cuts(&table, self.epoch());
            drop(table);
            self.sweep();
            self.counters.give_ups.fetch_add(1, SeqCst);
            given_up.push(victim);
        }
    }

    fn give_up(&self, table: &mut Table, cut: u64) -> Result<(), CaptureError> {
        if table.interval.as_ref().is_some_and(|open| open.cut == cut) {
            self.fold_interval(table)?;
        } else if table
            .snapshots
            .snapshots
            .iter()
            .any(|snapshot| snapshot.cut == cut)
        {
            self.drop_snapshot(table, cut)?;
        }
        // Readers learn of it before the first before-image is freed.
        if let Some(open) = table.cuts.get(&cut) {
            open.view.broken.store(true, SeqCst);
        }
        table.cuts.remove(&cut);
        Ok(())
    }
}

/// The cut of the record of changes before a cut, 0 for none.
fn before(table: &Table, cut: u64) -> u64 {
    table.changes.range(..cut).next_back().copied().unwrap_or(0)
}

fn find(table: &Table, id: u64) -> Result<&Snapshot, CaptureError> {
    let mut snapshots = table.snapshots.snapshots.iter();
    snapshots
        .find(|snapshot| snapshot.id == id)
        .ok_or(CaptureError::NoSnapshot(id))
}
