//! Snapshots: clones that are kept.

use capture_core::{
    engine::records::LABEL_MAX,
    reflink::state::{CloneFile, SnapshotClone, State},
};
use tidemark_block::{BlockSet, Coherence, CutReason, Epoch};

use super::{CloneReader, Reflink, compare};
use crate::engine::{EngineError, SnapshotId, SnapshotInfo};

impl Reflink {
    /// Cuts, and keeps the clone. `label` has at most 255 bytes.
    ///
    /// # Errors
    /// [`EngineError::TooManySnapshots`], or where the file can't be cloned.
    pub fn create_snapshot(&self, label: &str, now_ms: u64) -> Result<SnapshotInfo, EngineError> {
        if label.len() > LABEL_MAX {
            return Err(EngineError::LabelTooLong(label.len()));
        }
        let _cutting = self.cutting.lock();
        self.check_open()?;
        let most = self.options.snapshots_max;
        if self.now.lock().state.snapshots.len() >= most {
            return Err(EngineError::TooManySnapshots(most));
        }
        let clone = self.clone_now()?.clone;
        let changing = self.changing.lock();
        let mut state = self.state();
        let id = state.keep(clone, now_ms, label);
        let taken = state.snapshots.last().map(shown);
        if let Err(error) = self.store(&changing, state, |_| {}) {
            drop(changing);
            self.clones.remove(clone.cut);
            return Err(error);
        }
        taken.ok_or(EngineError::NoSuchSnapshot(SnapshotId(id)))
    }

    /// Records how good the moment of a snapshot's cut was, and why no better.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], or where the record can't be written: the grade is as it was.
    pub fn grade_snapshot(
        &self,
        id: SnapshotId,
        coherence: Coherence,
        reason: &CutReason,
    ) -> Result<(), EngineError> {
        self.check_open()?;
        let changing = self.changing.lock();
        let mut state = self.state();
        let mut snapshots = state.snapshots.iter_mut();
        let snapshot = snapshots.find(|snapshot| snapshot.id == id.0);
        let snapshot = snapshot.ok_or(EngineError::NoSuchSnapshot(id))?;
        snapshot.coherence = coherence;
        snapshot.reason = reason.clone();
        self.store(&changing, state, |_| {})
    }

    /// All snapshots, oldest first.
    #[must_use]
    pub fn list_snapshots(&self) -> Vec<SnapshotInfo> {
        self.now.lock().state.snapshots.iter().map(shown).collect()
    }

    /// Deletes a snapshot. Readers that have it open may finish.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], or where the record can't be written.
    pub fn delete_snapshot(&self, id: SnapshotId) -> Result<(), EngineError> {
        self.check_open()?;
        let changing = self.changing.lock();
        let mut state = self.state();
        let clone = find(&state, id)?;
        state.snapshots.retain(|snapshot| snapshot.id != id.0);
        self.store(&changing, state, |_| {})?;
        drop(changing);
        self.clones.remove(clone.cut);
        Ok(())
    }

    /// Opens a snapshot for reading.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], or what the clone's file says.
    pub fn open_snapshot(&self, id: SnapshotId) -> Result<CloneReader, EngineError> {
        self.check_open()?;
        let clone = find(&self.now.lock().state, id)?;
        let opened = self.clones.open(clone, self.geometry.length());
        match opened {
            Ok(Some(file)) => Ok(CloneReader::new(file, clone.cut, self.geometry)),
            // Deleted meanwhile, or by somebody else.
            Ok(None) => Err(EngineError::NoSuchSnapshot(id)),
            Err(error) => Err(EngineError::io(
                format!("open the clone of snapshot {id}"),
                error,
            )),
        }
    }

    /// The blocks that may differ between two snapshots.
    ///
    /// # Errors
    /// [`EngineError::NoSuchSnapshot`], [`EngineError::SnapshotOrder`], or what the clones' files say.
    pub fn changed_between(
        &self,
        older: SnapshotId,
        newer: SnapshotId,
    ) -> Result<BlockSet, EngineError> {
        if older > newer {
            return Err(EngineError::SnapshotOrder { older, newer });
        }
        let (older, newer) = (self.open_snapshot(older)?, self.open_snapshot(newer)?);
        Ok(compare::compared(self.volume, &older, &newer)?.changed)
    }
}

fn shown(snapshot: &SnapshotClone) -> SnapshotInfo {
    SnapshotInfo {
        id: SnapshotId(snapshot.id),
        label: snapshot.label.clone(),
        time_ms: snapshot.time_ms,
        cut: Epoch::new(snapshot.clone.cut),
        coherence: snapshot.coherence,
        reason: snapshot.reason.clone(),
    }
}

fn find(state: &State, id: SnapshotId) -> Result<CloneFile, EngineError> {
    let found = state.snapshots.iter().find(|snapshot| snapshot.id == id.0);
    found
        .map(|snapshot| snapshot.clone)
        .ok_or(EngineError::NoSuchSnapshot(id))
}
