//! What must hold: at any moment, once all threads have ended, and after the end of the process at any moment.

use std::{collections::BTreeMap, sync::Arc};

use capture_core::engine::{
    capture::{RING_WORD, View},
    media::{Map, Media, Record},
    records::{decode_carry, decode_interval},
    recover::{EPOCHS_RESERVED, Outcome},
    ring::Ring,
    trust::Judgement,
};
use shuttle::{
    rand::{Rng, thread_rng},
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};
use tidemark_block::{BlockIndex, BlockSet, block_checksum};

use crate::{
    BLOCK, BLOCKS, REGION_BLOCKS,
    chunks::{CHUNK, Image, fill, index},
    geometry,
    history::{Flip, History},
    memory::{Puts, Remains},
    rig::{Base, Known, Policy, Rig, Setting},
    volume,
};

fn differing(left: &Image, right: &Image) -> Vec<u64> {
    let pairs = (0..).zip(left.iter().zip(right));
    pairs
        .filter(|(_, (left, right))| left != right)
        .map(|(block, _)| block)
        .collect()
}

impl Rig {
    /// Whatever differs from the base is tracked: at any moment.
    pub(crate) fn look_for_gaps(&self) {
        let base = self.base.lock().clone();
        let differing = differing(&self.capture.media().live(), &base.image);
        let tracked = self.capture.tracked(geometry().all());
        if self.base.lock().generation != base.generation {
            // What was found may have been shipped since.
            return;
        }
        for block in differing {
            assert!(
                tracked.contains(BlockIndex::new(block)),
                "block {block} differs from the base, and is not tracked"
            );
        }
    }

    /// Whatever differs from the base would be found after the end of the process at this point, and after a loss of
    /// power. Lets nobody come between.
    pub(crate) fn look_for_losses(&self) {
        let media = self.capture.media();
        let base = self.base.lock();
        let [live, synced] =
            [media.live(), media.synced()].map(|image| differing(&image, &base.image));
        let recorded = self.recorded();
        let dirty = media.dirty(0) | media.dirty(1);
        for block in &live {
            let tracked = recorded.contains(BlockIndex::new(*block)) || dirty >> block & 1 == 1;
            assert!(
                tracked,
                "the end of the process would lose that block {block} differs"
            );
        }
        let [written, durable] = media.intent();
        for block in live.iter().chain(&synced) {
            let tracked = recorded.contains(BlockIndex::new(*block))
                || (written & durable) >> (block / REGION_BLOCKS) & 1 == 1;
            assert!(
                tracked,
                "a loss of power would lose that block {block} differs"
            );
        }
    }

    /// The blocks of the carry and of the interval, as recorded at this point.
    fn recorded(&self) -> BlockSet {
        let (media, all) = (self.capture.media(), geometry().all());
        let carry = media.record(Record::Carry);
        let mut blocks = carry.map_or_else(BlockSet::new, |bytes| {
            decode_carry(&bytes, volume(), all).unwrap()
        });
        let interval = media.record(Record::Interval);
        let open = interval.and_then(|bytes| decode_interval(&bytes, volume(), all).unwrap());
        if let Some((_, changed)) = open {
            blocks.union_with(&changed);
        }
        blocks
    }

    /// Once nobody else is at work: everything is as it was promised, and nothing is left over.
    pub(crate) fn finish(self) {
        assert!(self.capture.is_idle());
        if self.capture.is_poisoned() {
            // Only the next opening can tell what there is.
            return;
        }
        *self.capture.media().puts.lock() = Puts::Succeed;
        let content = self.history().content();
        let live = self.capture.media().live();
        assert!(live == content, "written was {content:?}, found {live:?}");
        self.look_for_gaps();
        self.look_for_losses();
        self.check_recorded_blocks();
        for snapshot in self.capture.snapshots() {
            self.look_at(snapshot.id, 1);
        }
        self.check_changes();
        self.give_up_interval();
        self.ship_all_and_clear();
    }

    /// The records of blocks that were written lately are of what is there.
    fn check_recorded_blocks(&self) {
        let content = self.history().content();
        let words = &self.capture.media().words(Map::Tracking)[RING_WORD..];
        for (block, checksum) in Ring::records(words).map(Result::unwrap) {
            let mut bytes = vec![0; BLOCK];
            for (bytes, tag) in bytes.chunks_mut(CHUNK).zip(content[index(block.get())]) {
                fill(bytes, tag);
            }
            assert_eq!(block_checksum(&bytes), checksum, "block {block}");
        }
    }

    /// Whatever differs between two snapshots is told.
    fn check_changes(&self) {
        let known = self.snapshots.lock().clone();
        let read: Vec<_> = self
            .capture
            .snapshots()
            .iter()
            .filter_map(|found| Some((found.id, known.get(&found.id)?.image.as_ref()?)))
            .collect();
        for pair in read.windows(2) {
            let [(older, before), (newer, after)] = pair else {
                continue;
            };
            let changed = self.capture.changed_between(*older, *newer).unwrap();
            for block in differing(before, after) {
                assert!(
                    changed.contains(BlockIndex::new(block)),
                    "block {block} differs between snapshots {older} and {newer}"
                );
            }
        }
    }

    fn ship_all_and_clear(&self) {
        self.ship();
        let content = self.history().content();
        assert!(
            self.base.lock().image == content,
            "the last generation is not the volume"
        );
        assert!(self.capture.tracked(geometry().all()).is_empty());
        assert_eq!(self.capture.changed_bound().get(), 0);
        assert_eq!(self.capture.intent().set_regions(), []);
        // Records of changes that a deletion left are taken by the next one.
        self.snapshot().unwrap();
        for snapshot in self.capture.snapshots() {
            self.capture.delete_snapshot(snapshot.id).unwrap();
        }
        self.check_the_spool_is_empty();
        let records = self.capture.media().records();
        let changes = |record: &Record| matches!(record, Record::Changes(_));
        assert!(!records.iter().any(changes), "{records:?}");
    }

    pub(crate) fn check_the_spool_is_empty(&self) {
        assert_eq!(
            self.capture.spool().used(),
            (0, 0),
            "before-images are left"
        );
        assert_eq!(self.capture.media().entries_in_use(), 0);
        assert!(self.capture.spool().has_room());
    }
}

/// What was known when the process ended.
pub(crate) struct End {
    remains: Remains,
    history: History,
    base: Base,
    snapshots: BTreeMap<u64, Known>,
    flips: Vec<Flip>,
}

impl Rig {
    /// What is known and what is left, should the process end here.
    pub(crate) fn end_here(&self) -> End {
        End {
            remains: self.capture.media().remains(),
            history: self.history().clone(),
            base: self.base.lock().clone(),
            snapshots: self.snapshots.lock().clone(),
            flips: self.flips.lock().clone(),
        }
    }

    /// The same, at some point of a schedule.
    pub(crate) fn end_somewhere(&self) -> End {
        let steps = AtomicU64::new(thread_rng().gen_range(0..400));
        while steps.fetch_sub(1, SeqCst) > 1 {}
        self.end_here()
    }
}

impl End {
    /// A new process opens the volume, after a loss of power if that is so. What was confirmed is there, whatever is
    /// there is exact; what differs from the base is tracked, and becomes the next generation.
    pub(crate) fn reopen(self, setting: Setting, power: bool) {
        let Self { remains, base, .. } = self;
        let (remains, judgement) = if power {
            (remains.without_power(), Judgement::PowerLoss)
        } else {
            (remains, Judgement::Exact { clean: false })
        };
        let now = History::after(remains.volume());
        let (capture, outcome) = setting.recover(remains.into(), judgement, 1 + EPOCHS_RESERVED);
        match outcome {
            Outcome::ProcessCrash => assert!(!power),
            Outcome::PowerLoss(_) => assert!(power),
            other => panic!("{other:?}"),
        }
        let rig = Rig::over(capture, setting, now, base);
        rig.look_for_gaps();
        rig.check_cuts(&self.history, &self.flips);
        for (id, known) in self.snapshots {
            let found = rig.capture.snapshots();
            let found = found.iter().find(|found| found.id == id);
            assert!(
                found.is_some_and(|found| found.cut == known.flip.epoch)
                    || power
                    || setting.policy == Policy::GiveUp,
                "snapshot {id} is gone"
            );
            if let (Some(_), Some(before)) = (found, known.image) {
                assert!(rig.image_of(id) == before, "snapshot {id} has changed");
            }
        }
        rig.commit_what_is_open();
        rig.check_later_cuts();
        rig.ship_all_and_clear();
    }
}

impl Rig {
    /// Nothing of before is taken for what a new epoch has done: of either parity.
    fn check_later_cuts(&self) {
        for _ in 0..2 {
            let id = self.snapshot().unwrap();
            (0..BLOCKS).for_each(|block| self.write(block));
            self.look_at(id, 1);
        }
    }

    fn image_of(&self, id: u64) -> Image {
        self.image_at(self.capture.open_snapshot(id).unwrap())
    }

    fn image_at(&self, view: Arc<View>) -> Image {
        let image = self.read(&view, geometry().all()).unwrap();
        self.capture.close_view(&view);
        image
    }

    /// What can be read of snapshots and of the interval is the image of its cut.
    fn check_cuts(&self, history: &History, flips: &[Flip]) {
        let snapshots = self.capture.snapshots().into_iter();
        let views = snapshots.map(|found| self.capture.open_snapshot(found.id).unwrap());
        for view in views.chain(self.open_interval().map(|(_, view)| view)) {
            let flip = flips.iter().find(|flip| flip.epoch == view.cut());
            history.assert_image(*flip.unwrap(), &self.image_at(view));
        }
    }
}
