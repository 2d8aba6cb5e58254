//! Cuts, and the interval that one may open.
//!
//! A cut is begun (the flip), settles by itself, and is finished: only then is anything written, so that the flip
//! takes no longer on a large volume or a slow disk. Cuts follow each other; the caller sees to that.

use std::sync::Arc;

use tidemark_block::BlockSet;

use super::{
    capture::{Capture, CaptureError, Interval, OpenCut, Table, parity},
    media::{Media, Record},
    records::{Snapshot, encode_interval, no_grade},
};
use crate::sync::atomic::Ordering::SeqCst;

/// What a cut is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// An interval.
    Interval,
    /// A user's snapshot.
    Snapshot {
        /// What the user calls it.
        label: String,
        /// Milliseconds since 1970.
        time_ms: u64,
    },
}

/// A cut that was begun.
#[derive(Debug)]
#[must_use]
pub struct Cut {
    epoch: u64,
    purpose: Purpose,
}

impl Cut {
    /// The epoch that was closed.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }
}

impl<M: Media> Capture<M> {
    /// Flips. The caller waits until [`Self::is_settled`], then calls [`Self::finish_cut`], and begins no other cut
    /// before.
    ///
    /// # Errors
    /// Where the purpose doesn't fit what is open, it was closed, or the dirty map of an earlier cut still can't be folded.
    pub fn begin_cut(&self, purpose: Purpose) -> Result<Cut, CaptureError> {
        let mut table = self.table_to_change()?;
        self.ready_to_cut(&mut table, &purpose)?;
        let cut = self.announce_cut(&mut table, purpose);
        self.flip();
        Ok(cut)
    }

    /// Makes sure that a cut can be begun.
    pub(super) fn ready_to_cut(
        &self,
        table: &mut Table,
        purpose: &Purpose,
    ) -> Result<(), CaptureError> {
        assert!(table.cutting.is_none(), "cuts follow each other");
        match (purpose, &table.interval) {
            (Purpose::Interval, Some(open)) => return Err(CaptureError::IntervalOpen(open.cut)),
            (Purpose::Snapshot { .. }, _)
                if table.snapshots.snapshots.len() >= self.tuning.snapshots_max =>
            {
                return Err(CaptureError::TooManySnapshots(self.tuning.snapshots_max));
            }
            _ => {}
        }
        if let Some(closed) = table.undrained {
            self.fold_dirty(table, closed)?;
            table.undrained = None;
        }
        Ok(())
    }

    /// Writers of the new epoch must find the cut open, so it is published before the flip. Its parity is free: the
    /// last epoch of it has settled.
    pub(super) fn announce_cut(&self, table: &mut Table, purpose: Purpose) -> Cut {
        let epoch = self.epoch();
        table.cuts.insert(epoch, OpenCut::new(epoch));
        table.cutting = Some(epoch);
        self.publish_cuts(table, epoch + 1);
        Cut { epoch, purpose }
    }

    /// Ends a cut that has settled: what it is for is durable on return.
    ///
    /// # Errors
    /// [`CaptureError::GivenUp`] where the spool was full before that; or where a record can't be written. The
    /// closed epoch's blocks go into the next interval then.
    pub fn finish_cut(&self, cut: Cut) -> Result<(), CaptureError> {
        assert!(
            self.is_settled(cut.epoch),
            "a cut is finished after it has settled"
        );
        let mut table = self.table.lock();
        table.cutting = None;
        let may_change = self.check().and_then(|()| table.check_open());
        let result = may_change.and_then(|()| match cut.purpose {
            _ if !table.cuts.contains_key(&cut.epoch) => Err(CaptureError::GivenUp(cut.epoch)),
            Purpose::Interval => self.finish_interval(&mut table, cut.epoch),
            Purpose::Snapshot { label, time_ms } => {
                self.finish_snapshot(&mut table, cut.epoch, label, time_ms)
            }
        });
        if result.is_err() {
            table.undrained = Some(cut.epoch);
            table.cuts.remove(&cut.epoch);
            self.publish_cuts(&table, self.epoch());
            drop(table);
            self.sweep();
        }
        result
    }

    fn finish_interval(&self, table: &mut Table, epoch: u64) -> Result<(), CaptureError> {
        let drained = self.drained(epoch);
        self.note_changes(table, epoch, &drained)?;
        let mut changed = drained;
        changed.union_with(&table.carry);
        let recorded = !changed.is_empty();
        if recorded {
            self.put_interval(Some((epoch, &changed)))?;
        }
        table.interval = Some(Interval {
            cut: epoch,
            changed: Arc::new(changed),
            recorded,
        });
        if !table.carry.is_empty() {
            // From here on the interval stands, whatever becomes of the carry: blocks in both are no harm, and where the
            // disk has no room to say that there is none, it stays as it was.
            if self.put_carry(table, BlockSet::new()).is_err() {
                self.check()?;
            }
        }
        self.clear_dirty(epoch);
        Ok(())
    }

    fn finish_snapshot(
        &self,
        table: &mut Table,
        epoch: u64,
        label: String,
        time_ms: u64,
    ) -> Result<(), CaptureError> {
        self.fold_dirty(table, epoch)?;
        let mut snapshots = table.snapshots.clone();
        snapshots.last_id += 1;
        let id = snapshots.last_id;
        // How good the moment was is known behind the cut.
        let (coherence, reason) = no_grade();
        snapshots.snapshots.push(Snapshot {
            id,
            cut: epoch,
            time_ms,
            changes: table.changes.last().copied().unwrap_or(0),
            coherence,
            reason,
            label,
        });
        self.put(Record::Snapshots, Some(&snapshots.encode(self.volume)))?;
        table.snapshots = snapshots;
        Ok(())
    }

    fn put_interval(&self, open: Option<(u64, &BlockSet)>) -> Result<(), CaptureError> {
        self.put(Record::Interval, Some(&encode_interval(self.volume, open)))
    }

    /// Moves a closed epoch's dirty blocks into the carry, durably, then clears its map.
    fn fold_dirty(&self, table: &mut Table, epoch: u64) -> Result<(), CaptureError> {
        let drained = self.drained(epoch);
        self.note_changes(table, epoch, &drained)?;
        let mut carry = table.carry.clone();
        carry.union_with(&drained);
        if carry != table.carry {
            self.put_carry(table, carry)?;
        }
        self.clear_dirty(epoch);
        Ok(())
    }

    fn clear_dirty(&self, epoch: u64) {
        self.dirty(epoch).clear();
        self.dirty_count[parity(epoch)].store(0, SeqCst);
    }

    /// The open interval.
    pub fn open_interval(&self) -> Option<Interval> {
        self.table.lock().interval.clone()
    }

    /// Folds the open interval into the carry, durably, and lets go of its cut.
    ///
    /// # Errors
    /// [`CaptureError::Closed`], or where a record can't be written: the interval is still open.
    pub fn give_up_interval(&self) -> Result<(), CaptureError> {
        let mut table = self.table_to_change()?;
        self.fold_interval(&mut table)?;
        self.publish_cuts(&table, self.epoch());
        drop(table);
        self.sweep();
        Ok(())
    }

    pub(super) fn fold_interval(&self, table: &mut Table) -> Result<(), CaptureError> {
        let Some(interval) = table.interval.clone() else {
            return Ok(());
        };
        let mut carry = table.carry.clone();
        carry.union_with(&interval.changed);
        if carry != table.carry {
            self.put_carry(table, carry)?;
        }
        if interval.recorded {
            self.put_interval(None)?;
        }
        table.interval = None;
        self.unwant(table, interval.cut);
        Ok(())
    }

    /// The vault has committed the interval with this cut, and the caller knows so durably. Syncs the volume unless
    /// that has happened since the cut settled, drops the interval, and clears the intents that may be cleared.
    ///
    /// # Errors
    /// [`CaptureError::NoInterval`], [`CaptureError::Closed`]; where the sync fails all work is refused from now on.
    pub fn commit_interval(&self, cut: u64) -> Result<(), CaptureError> {
        self.check()?;
        let is_open = |table: &Table| table.interval.as_ref().is_some_and(|open| open.cut == cut);
        if !is_open(&self.table.lock()) {
            return Err(CaptureError::NoInterval(cut));
        }
        if self.synced_through.load(SeqCst) < cut {
            self.sync()?;
        }
        let mut table = self.table.lock();
        let interval = table.interval.clone().filter(|open| open.cut == cut);
        let Some(interval) = interval else {
            return Err(CaptureError::NoInterval(cut));
        };
        // Another sync may have failed meanwhile, or a close have come.
        self.check()?;
        table.check_open()?;
        if interval.recorded {
            self.put_interval(None)?;
        }
        table.interval = None;
        let committed_before = std::mem::replace(&mut table.committed, cut);
        self.unwant(&mut table, cut);
        self.publish_cuts(&table, self.epoch());
        drop(table);
        self.sweep();
        self.check()?;
        self.intent
            .clear(cut, committed_before, self.tuning.hot_regions_max);
        self.write_intent()
    }

    /// Writes the pages of the intent map that have changed, unless somebody is about to.
    fn write_intent(&self) -> Result<(), CaptureError> {
        let Some(batch) = self.intent.lead() else {
            return Ok(());
        };
        let written = batch
            .pages()
            .try_for_each(|(place, page)| self.media.write_intent(place, &page[..]))
            .and_then(|()| self.media.sync_intent());
        if written.is_err() {
            self.fail();
        }
        self.intent.complete(batch, written.is_ok());
        Ok(written?)
    }

    /// Nothing stands for the cut any more: it closes, now or with its last reader.
    pub(super) fn unwant(&self, table: &mut Table, cut: u64) {
        if let Some(open) = table.cuts.get_mut(&cut) {
            open.wanted = false;
            if open.readers == 0 {
                table.cuts.remove(&cut);
            }
        }
    }
}
