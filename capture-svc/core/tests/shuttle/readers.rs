//! Who reads at a cut: readers of snapshots, and the shipper.

use std::sync::Arc;

use capture_core::engine::{
    capture::{CaptureError, Interval, View},
    cut::Purpose,
    read::SnapshotRead,
};
use tidemark_block::{BlockIndex, Extent};

use crate::{
    chunks::{Image, index, tags},
    geometry,
    history::Flip,
    rig::{Known, Rig},
};

fn snapshot() -> Purpose {
    Purpose::Snapshot {
        label: String::new(),
        time_ms: 0,
    }
}

impl Rig {
    /// Takes a snapshot; its number.
    pub(crate) fn snapshot(&self) -> Option<u64> {
        let flip = self.cut(snapshot())?;
        self.know(flip)
    }

    /// Takes snapshots of one instant; their numbers.
    pub(crate) fn snapshots_together(rigs: [&Self; 2]) -> [u64; 2] {
        let [one, other] = Self::cut_together(rigs, &snapshot());
        [rigs[0].know(one).unwrap(), rigs[1].know(other).unwrap()]
    }

    fn know(&self, flip: Flip) -> Option<u64> {
        let snapshots = self.capture.snapshots();
        let Some(found) = snapshots.iter().find(|found| found.cut == flip.epoch) else {
            assert!(self.may_be_given_up());
            return None;
        };
        let known = Known { flip, image: None };
        self.snapshots.lock().insert(found.id, known);
        Some(found.id)
    }

    /// Reads blocks at a cut that is open. None where it was given up.
    pub(crate) fn read(&self, view: &Arc<View>, extent: Extent) -> Option<Image> {
        let mut buffer = vec![0xAA; index(geometry().bytes(extent.count()))];
        let mut read = SnapshotRead::new(Arc::clone(view), extent);
        let result = read
            .before_images(&self.capture, &mut buffer)
            .and_then(|()| read.live(&self.capture, &mut buffer))
            .and_then(|()| read.recheck(&self.capture, &mut buffer));
        if let Err(CaptureError::GivenUp(cut)) = result {
            assert!(view.is_broken() && cut == view.cut());
        }
        self.accept(result)?;
        let tags: Vec<_> = tags(&buffer).collect();
        Some(tags.as_chunks().0.to_vec())
    }

    /// Opens a snapshot. None where it has been deleted, or given up.
    fn open(&self, id: u64) -> Option<Arc<View>> {
        let found = self.capture.open_snapshot(id);
        if let Err(CaptureError::NoSnapshot(_)) = found {
            let deleted = !self.snapshots.lock().contains_key(&id);
            assert!(deleted || self.may_be_given_up());
            return None;
        }
        self.accept(found)
    }

    /// Reads a snapshot, whole, so many times: it must be the image of its cut, and the same each time.
    pub(crate) fn look_at(&self, id: u64, times: u64) {
        let Some(flip) = self.snapshots.lock().get(&id).map(|known| known.flip) else {
            return;
        };
        let Some(view) = self.open(id) else { return };
        let mut first = None;
        for _ in 0..times {
            let Some(image) = self.read(&view, geometry().all()) else {
                break;
            };
            self.history().assert_image(flip, &image);
            let mut snapshots = self.snapshots.lock();
            let before = match snapshots.get_mut(&id) {
                Some(known) => &mut known.image,
                None => &mut first,
            };
            let before = before.get_or_insert_with(|| image.clone());
            assert!(
                *before == image,
                "snapshot {id} has changed: {before:?}, now {image:?}"
            );
        }
        self.capture.close_view(&view);
    }

    pub(crate) fn delete(&self, id: u64) {
        if self.snapshots.lock().remove(&id).is_none() {
            return;
        }
        match self.capture.delete_snapshot(id) {
            Err(CaptureError::NoSnapshot(_)) => assert!(self.may_be_given_up()),
            // Where the table found no room it is still there, and nobody looks at it any more.
            other => {
                self.accept(other);
            }
        }
    }

    /// Cuts an interval, applies its blocks to the vault's newest generation, and commits. Whoever ships does so alone.
    pub(crate) fn ship(&self) {
        let Some(flip) = self.cut_an_interval() else {
            return;
        };
        let Some((interval, view)) = self.open_interval() else {
            assert!(self.may_be_given_up());
            return;
        };
        assert_eq!(interval.cut, flip.epoch);
        self.commit_from(&interval, &view, Some(flip));
    }

    /// Cuts an interval, and leaves it open.
    pub(crate) fn cut_an_interval(&self) -> Option<Flip> {
        self.cut(Purpose::Interval)
    }

    /// Commits the interval that is open, if one is.
    pub(crate) fn commit_what_is_open(&self) {
        if let Some((interval, view)) = self.open_interval() {
            self.commit_from(&interval, &view, None);
        }
    }

    pub(crate) fn open_interval(&self) -> Option<(Interval, Arc<View>)> {
        let interval = self.capture.open_interval()?;
        let view = self.capture.open_cut(interval.cut)?;
        Some((interval, view))
    }

    fn commit_from(&self, interval: &Interval, view: &Arc<View>, flip: Option<Flip>) {
        let shipped = self.drain(interval, view).and_then(|generation| {
            let whole = self.read(view, geometry().all())?;
            Some((generation, whole))
        });
        self.capture.close_view(view);
        let Some((generation, whole)) = shipped else {
            return;
        };
        assert!(
            generation == whole,
            "the cut at {} has {whole:?}, shipped was {generation:?}",
            interval.cut
        );
        if let Some(flip) = flip {
            self.history().assert_image(flip, &generation);
        }
        self.commit(interval.cut, generation);
    }

    /// The generation that the interval makes of the base.
    fn drain(&self, interval: &Interval, view: &Arc<View>) -> Option<Image> {
        let mut generation = self.base.lock().image.clone();
        for run in interval.changed.extents() {
            let found = self.read(view, run)?;
            let at = index(run.start().get());
            generation[at..at + found.len()].copy_from_slice(&found);
        }
        Some(generation)
    }

    fn commit(&self, cut: u64, generation: Image) {
        {
            let mut base = self.base.lock();
            base.image = generation;
            base.generation += 1;
        }
        self.accept(self.capture.commit_interval(cut));
        self.look_for_losses();
        self.look_for_gaps();
    }

    /// Gives up the open interval, however often it takes.
    pub(crate) fn give_up_interval(&self) {
        while let Err(error) = self.capture.give_up_interval() {
            let closed = error == CaptureError::Closed;
            self.accept::<()>(Err(error));
            if closed || self.capture.is_poisoned() {
                return;
            }
        }
    }

    /// Puts a block into the next interval.
    pub(crate) fn doubt(&self, block: u64) {
        let block = Extent::between(BlockIndex::new(block), BlockIndex::new(block + 1));
        self.accept(self.capture.doubt(&std::iter::once(block).collect()));
    }
}
