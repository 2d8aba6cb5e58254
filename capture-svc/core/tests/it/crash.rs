//! A crash at every step: each write, sync, replaced record and store between them of the engine fails in turn, as an
//! error, as the end of the process and as a loss of power; and each step of the opening that follows fails again.
//!
//! A history is a list of acts. For each step of each act it is run from its beginning, and crashes there; the volume
//! is opened again, and what is found has to be the state before or after the act, with every invariant. Then the
//! act is repeated where it has to be, and the next interval has to be exact. What must hold is in functions named as
//! the invariants are.

use std::collections::{BTreeMap, BTreeSet};

use capture_core::engine::{
    capture::{Capture, CaptureError},
    cut::Purpose,
    recover::Outcome,
    trust::Judgement,
    write::Change,
};
use tidemark_block::{MemoryTable, image_digest};

use crate::{
    bench::{BLOCK, BLOCKS, Bench, REGION_BLOCKS, SEED, bytes, extent, geometry, snapshot, volume},
    sim::Sim,
};

/// Before-images that the spool has room for.
const SLOTS: u64 = 6;

/// One act of a history. Each can be repeated after it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    /// Writes to so many blocks.
    Write {
        first: u64,
        count: u64,
    },
    /// Writes a part of a block.
    WritePart(u64),
    Trim {
        first: u64,
        count: u64,
    },
    Zero {
        first: u64,
        count: u64,
    },
    /// Somebody else has written to a block, and the scrub has found it.
    Doubt(u64),
    Snapshot,
    /// Deletes the oldest snapshot.
    Delete,
    /// Cuts an interval.
    Cut,
    /// The vault commits it, and the engine hears of that.
    Commit,
    GiveUp,
    Sync,
}

use Act::{Commit, Cut, Delete, Doubt, GiveUp, Trim, Write, WritePart, Zero};

const HISTORY: [Act; 31] = [
    Write { first: 0, count: 3 },
    Write { first: 9, count: 1 },
    Act::Snapshot,
    // A before-image, and a region's first write.
    Write { first: 2, count: 3 },
    Cut,
    Write { first: 0, count: 1 },
    Commit,
    Act::Sync,
    // Overlaps the first.
    Act::Snapshot,
    Write { first: 2, count: 1 },
    WritePart(13),
    Zero { first: 8, count: 2 },
    Trim { first: 4, count: 1 },
    Delete,
    Cut,
    Write { first: 5, count: 1 },
    GiveUp,
    Doubt(7),
    Cut,
    Act::Snapshot,
    Trim {
        first: 12,
        count: 2,
    },
    // More than the spool has room for: interval and snapshots are given up one by one.
    Write { first: 0, count: 7 },
    Write { first: 7, count: 7 },
    Act::Snapshot,
    Cut,
    Write { first: 1, count: 2 },
    Commit,
    Cut,
    Commit,
    Delete,
    Write { first: 3, count: 9 },
];

type Image = Vec<u8>;

/// What should be there, kept in the simplest way.
#[derive(Debug, Clone, Default)]
struct Model {
    /// What the vault holds.
    base: Image,
    /// Snapshots by their numbers.
    snapshots: BTreeMap<u64, Image>,
    interval: Option<(u64, Image)>,
    /// Blocks that may differ from the base, or that a power loss may take back behind it.
    touched: BTreeSet<u64>,
    /// Those of them at the open interval's cut.
    touched_at_cut: BTreeSet<u64>,
    /// The volume at the last sync, and what has been written since.
    synced: Image,
    unsynced: BTreeSet<u64>,
    /// The contents are told apart by it.
    written: u8,
}

struct World {
    bench: Bench,
    model: Model,
}

fn block_of(image: &[u8], block: u64) -> &[u8] {
    let at = usize::try_from(block).unwrap() * BLOCK;
    &image[at..at + BLOCK]
}

fn differing(one: &[u8], other: &[u8]) -> Vec<u64> {
    (0..BLOCKS)
        .filter(|block| block_of(one, *block) != block_of(other, *block))
        .collect()
}

impl World {
    fn new() -> Self {
        let bench = Bench::with(|tuning| tuning.spool.slots_max = SLOTS);
        let empty = bench.sim.volume();
        let model = Model {
            base: empty.clone(),
            synced: empty,
            ..Model::default()
        };
        Self { bench, model }
    }

    fn capture(&self) -> &Capture<Sim> {
        &self.bench.capture
    }

    fn perform(&mut self, act: Act) -> Result<(), CaptureError> {
        match act {
            Write { first, count } => {
                self.model.written += 1;
                let data = bytes(self.model.written).repeat(usize::try_from(count).unwrap());
                self.change(
                    first * BLOCK as u64,
                    extent(first, count),
                    Change::Data(data.leak()),
                )
            }
            WritePart(block) => {
                self.model.written += 1;
                let data = &bytes(self.model.written)[..700];
                let offset = block * BLOCK as u64 + 900;
                self.change(offset, extent(block, 1), Change::Data(data))
            }
            Trim { first, count } => {
                let length = count * BLOCK as u64;
                self.change(
                    first * BLOCK as u64,
                    extent(first, count),
                    Change::Trim { length },
                )
            }
            Zero { first, count } => {
                let change = Change::Zeroes {
                    length: count * BLOCK as u64,
                    allocated: false,
                };
                self.change(first * BLOCK as u64, extent(first, count), change)
            }
            Doubt(block) => {
                self.model.touched.insert(block);
                self.capture()
                    .doubt(&[extent(block, 1)].into_iter().collect())
            }
            Act::Snapshot => {
                let image = self.bench.sim.volume();
                self.bench.try_cut(snapshot())?;
                let id = self.capture().snapshots().last().unwrap().id;
                self.model.snapshots.insert(id, image);
                Ok(())
            }
            Delete => {
                let oldest = self
                    .capture()
                    .snapshots()
                    .first()
                    .map(|snapshot| snapshot.id);
                if let Some(id) = oldest {
                    self.capture().delete_snapshot(id)?;
                    self.model.snapshots.remove(&id);
                }
                Ok(())
            }
            Cut => self.cut(),
            Commit => self.commit(),
            GiveUp => {
                self.capture().give_up_interval()?;
                self.model.interval = None;
                Ok(())
            }
            Act::Sync => {
                let image = self.bench.sim.volume();
                self.capture().sync()?;
                self.model.synced = image;
                self.model.unsynced.clear();
                Ok(())
            }
        }
    }

    fn change(
        &mut self,
        offset: u64,
        touched: tidemark_block::Extent,
        change: Change<'static>,
    ) -> Result<(), CaptureError> {
        let touched: BTreeSet<u64> = touched.iter().map(|block| block.get()).collect();
        self.model.touched.extend(&touched);
        self.model.unsynced.extend(&touched);
        let epoch = self.capture().enter()?;
        let op = capture_core::engine::write::WriteOp::new(self.capture(), epoch, offset, change);
        let result = self.bench.finish(op);
        if result.is_ok() {
            // What a full spool gave up.
            let kept: BTreeSet<u64> = self.capture().snapshots().iter().map(|s| s.id).collect();
            self.model.snapshots.retain(|id, _| kept.contains(id));
            let open = self.capture().open_interval().map(|interval| interval.cut);
            self.model.interval.take_if(|(cut, _)| Some(*cut) != open);
        }
        result
    }

    fn cut(&mut self) -> Result<(), CaptureError> {
        if self.model.interval.is_none() && self.capture().open_interval().is_some() {
            // Cut before the crash, and nobody has heard of it.
            self.capture().give_up_interval()?;
        }
        let image = self.bench.sim.volume();
        let touched = self.model.touched.clone();
        let cut = self.bench.try_cut(Purpose::Interval)?;
        self.model.interval = Some((cut, image));
        self.model.touched_at_cut = touched;
        Ok(())
    }

    /// The vault gets the blocks of the open interval and commits; then the engine hears of it.
    fn commit(&mut self) -> Result<(), CaptureError> {
        let Some(interval) = self.capture().open_interval() else {
            self.model.interval = None;
            return Ok(());
        };
        let image = match self.model.interval.clone() {
            Some((cut, image)) if cut == interval.cut => image,
            other => panic!("interval {} is open, not {other:?}", interval.cut),
        };
        for block in interval.changed.extents().flat_map(|extent| extent.iter()) {
            let at = usize::try_from(block.get()).unwrap() * BLOCK;
            let bytes = self.bench.read_block(interval.cut, block.get());
            self.model.base[at..at + BLOCK].copy_from_slice(&bytes);
        }
        exact(&self.model.base, &image, "the generation");
        self.capture().commit_interval(interval.cut)?;
        self.model.interval = None;
        let cut = std::mem::take(&mut self.model.touched_at_cut);
        let since = differing(&self.bench.sim.volume(), &image);
        self.model
            .touched
            .retain(|block| !cut.contains(block) || since.contains(block));
        Ok(())
    }

    /// Opens the volume after a crash, with another crash at a step of that where one is wanted. Tells whether that
    /// came.
    fn reopen(&mut self, power: bool, again: Option<(u64, bool)>) -> (Outcome, bool, bool) {
        let sim = self.bench.sim.clone();
        let restart = |power: bool| match power {
            true => sim.restart_machine(),
            false => sim.restart_process(),
        };
        restart(power);
        let (mut lost, mut crashed) = (power, false);
        if let Some((step, again)) = again {
            sim.crash_in(step);
            let _ = self.recovered(lost);
            crashed = sim.has_crashed();
            restart(crashed && again);
            // The identity still has the boot of before the first crash.
            lost |= crashed && again;
        }
        let (bench, outcome) = self.recovered(lost).unwrap();
        self.bench = bench;
        (outcome, lost, crashed)
    }

    fn recovered(&self, power: bool) -> Result<(Bench, Outcome), CaptureError> {
        let judgement = if power {
            Judgement::PowerLoss
        } else {
            Judgement::Exact { clean: false }
        };
        let bench = &self.bench;
        Bench::recovered(bench.sim.clone(), bench.tuning, judgement, bench.limit)
    }

    /// Everything that has to hold after a crash on the way from `before` to `after`.
    fn check(&mut self, act: Act, before: &Model, after: &Model, outcome: &Outcome, power: bool) {
        self.old_or_new(act, before, after, power);
        self.superset();
        self.doubt_is_local(outcome, power);
        self.bounded();
        let expected = if power {
            &BTreeMap::new()
        } else {
            &before.snapshots
        };
        planned_deletion(
            &self.bench,
            expected,
            &self.model.snapshots,
            &after.snapshots,
        );
    }

    /// Snapshots and interval are those of before the act or of after it, and all are exact. Nothing of them is left
    /// after a loss of power; of the volume there is what was synced.
    fn old_or_new(&mut self, act: Act, before: &Model, after: &Model, power: bool) {
        let found: BTreeSet<u64> = self.capture().snapshots().iter().map(|s| s.id).collect();
        let interval = self.capture().open_interval().map(|interval| interval.cut);
        let volume = self.bench.sim.volume();
        for block in differing(&volume, &self.model.synced) {
            assert!(
                self.model.unsynced.contains(&block),
                "block {block} was synced"
            );
        }
        if power {
            assert!(
                found.is_empty() && interval.is_none(),
                "nothing of before can be read"
            );
            self.model.snapshots.clear();
            self.model.interval = None;
            return;
        }
        for id in before
            .snapshots
            .keys()
            .filter(|id| after.snapshots.contains_key(id))
        {
            assert!(found.contains(id), "snapshot {id} is gone");
        }
        let mut known = before.snapshots.clone();
        known.extend(after.snapshots.clone());
        for id in &found {
            let image = known
                .get(id)
                .unwrap_or_else(|| panic!("snapshot {id} is of nowhere"));
            let cut = self
                .capture()
                .snapshots()
                .iter()
                .find(|s| s.id == *id)
                .unwrap()
                .cut;
            exact(&self.bench.image(cut), image, "a snapshot");
        }
        known.retain(|id, _| found.contains(id));
        self.model.snapshots = known;
        let cuts = |model: &Model| model.interval.as_ref().map(|(cut, _)| *cut);
        let may_be = [cuts(before), cuts(after)];
        assert!(
            may_be.contains(&interval),
            "interval {interval:?} after {act:?} is none of {may_be:?}"
        );
        let known = [&before.interval, &after.interval].into_iter().flatten();
        if let Some((cut, image)) = known.into_iter().find(|(cut, _)| Some(*cut) == interval) {
            exact(&self.bench.image(*cut), image, "the interval");
        }
        // A cut that nobody was told of is not the source's.
        self.model.interval = before
            .interval
            .clone()
            .filter(|(cut, _)| Some(*cut) == interval);
    }

    /// 3. Every block that differs from the last committed generation is tracked.
    fn superset(&self) {
        self.bench.assert_superset_of(&self.model.base);
    }

    /// 4. What is tracked has been written; after a loss of power, its region has.
    fn doubt_is_local(&self, outcome: &Outcome, power: bool) {
        match outcome {
            Outcome::PowerLoss(_) => assert!(power),
            Outcome::ProcessCrash => assert!(!power),
            other => panic!("{other:?}"),
        }
        let region = |block: u64| block / REGION_BLOCKS;
        let regions: BTreeSet<u64> = self.model.touched.iter().map(|b| region(*b)).collect();
        for block in self.bench.tracked() {
            let known = if power {
                regions.contains(&region(block))
            } else {
                self.model.touched.contains(&block)
            };
            assert!(known, "block {block} is in doubt and was not written");
        }
    }

    /// 9. Spool, snapshots and records are within their maxima.
    fn bounded(&self) {
        let limits = self.bench.tuning.spool;
        let (entries, slots) = self.capture().spool().used();
        assert!(entries <= limits.entries_max && slots <= limits.slots_max);
        let snapshots = self.capture().snapshots().len();
        assert!(snapshots <= self.bench.tuning.snapshots_max);
        let changes = capture_core::engine::media::Media::changes(&self.bench.sim).unwrap();
        let most = (snapshots + 1) * (self.bench.tuning.changes_max + 1);
        assert!(
            changes.len() <= most,
            "{} records of changes",
            changes.len()
        );
    }

    /// The intervals that follow make the base what the volume is.
    fn go_on(&mut self) {
        if self.model.interval.is_some() {
            self.perform(Commit).unwrap();
        }
        self.perform(Write { first: 6, count: 1 }).unwrap();
        self.perform(Cut).unwrap();
        self.perform(Commit).unwrap();
        // The scrub reads everything.
        exact(
            &self.model.base,
            &self.bench.sim.volume(),
            "the next generation",
        );
        assert_eq!(self.bench.tracked(), [0; 0]);
        for (id, image) in &self.model.snapshots {
            let snapshots = self.capture().snapshots();
            if let Some(snapshot) = snapshots.iter().find(|snapshot| snapshot.id == *id) {
                exact(&self.bench.image(snapshot.cut), image, "a snapshot");
            }
        }
    }
}

/// 2. An image is the other, and so are their digests.
fn exact(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(
        differing(found, expected),
        [0; 0],
        "{what} is another image"
    );
    let digest = |image: &[u8]| {
        let Ok(digest) = image_digest(&MemoryTable::of_image(geometry(), image));
        digest
    };
    assert_eq!(digest(found), digest(expected));
}

/// 8. A snapshot goes only where the act was to delete it, or gave it up; its number doesn't come back.
fn planned_deletion(
    bench: &Bench,
    before: &BTreeMap<u64, Image>,
    found: &BTreeMap<u64, Image>,
    after: &BTreeMap<u64, Image>,
) {
    for id in before.keys().filter(|id| !found.contains_key(id)) {
        assert!(
            !after.contains_key(id),
            "snapshot {id} was not to be deleted"
        );
    }
    let last = before.keys().chain(after.keys()).max();
    let ids = bench.capture.snapshots();
    assert!(
        ids.iter()
            .all(|snapshot| last.is_some_and(|last| snapshot.id <= *last))
    );
}

/// 10. After a failure that may have lost something, no work is done before the volume is opened again.
fn poisoned_on_failure(world: &World) {
    let capture = world.capture();
    assert!(capture.is_poisoned());
    assert_eq!(world.bench.try_write(1, 9), Err(CaptureError::Poisoned));
    assert_eq!(capture.sync(), Err(CaptureError::Poisoned));
    assert_eq!(world.bench.try_cut(snapshot()), Err(CaptureError::Poisoned));
    assert_eq!(capture.give_up_interval(), Err(CaptureError::Poisoned));
}

/// The models before and after each act.
fn models() -> Vec<Model> {
    let mut world = World::new();
    let mut models = vec![world.model.clone()];
    for act in HISTORY {
        world.perform(act).unwrap();
        models.push(world.model.clone());
    }
    models
}

fn before(act: usize) -> World {
    let mut world = World::new();
    for act in &HISTORY[..act] {
        world.perform(*act).unwrap();
    }
    world
}

/// Says where a test was when it failed.
struct Shown(String);

impl Drop for Shown {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed at {}", self.0);
        }
    }
}

/// Crashes at each step of each act, and where wanted again at each step of the opening. Returns how often.
fn crash_everywhere(power: bool, seeds: u64, twice: &[bool]) -> u64 {
    let mut crashes = 0;
    for seed in 0..seeds {
        SEED.set(seed);
        let models = models();
        for (n, act) in HISTORY.into_iter().enumerate() {
            for step in 0.. {
                let shown = format!("seed {seed}, act {n} {act:?}, step {step}, power {power}");
                let _shown = Shown(shown.clone());
                let crash = |again: Option<(u64, bool)>| {
                    let _shown = Shown(format!("{shown}, then {again:?}"));
                    let mut world = before(n);
                    world.bench.sim.crash_in(step);
                    let _ = world.perform(act);
                    if !world.bench.sim.has_crashed() {
                        return None;
                    }
                    let (outcome, lost, crashed) = world.reopen(power, again);
                    world.check(act, &models[n], &models[n + 1], &outcome, lost);
                    // Repeated where there is still something to repeat it on.
                    world.perform(act).unwrap();
                    world.superset();
                    world.go_on();
                    Some(crashed)
                };
                if crash(None).is_none() {
                    break;
                }
                crashes += 1;
                for &second in twice {
                    for again in 0.. {
                        crashes += 1;
                        if crash(Some((again, second))) != Some(true) {
                            break;
                        }
                    }
                }
            }
        }
    }
    crashes
}

#[test]
fn the_end_of_the_process_at_any_step_loses_nothing() {
    let crashes = crash_everywhere(false, 4, &[]);
    assert!(crashes > 500, "only {crashes}: the test tests little");
}

#[test]
fn a_loss_of_power_at_any_step_costs_snapshots_and_the_doubt_of_some_regions() {
    let crashes = crash_everywhere(true, 6, &[]);
    assert!(crashes > 800, "only {crashes}: the test tests little");
}

#[test]
fn a_crash_at_any_step_of_an_opening_changes_nothing_of_that() {
    let crashes = crash_everywhere(false, 1, &[false, true]) + crash_everywhere(true, 1, &[true]);
    assert!(crashes > 3000, "only {crashes}: the test tests little");
}

#[test]
fn an_error_at_any_step_stops_the_work_or_changes_nothing() {
    let (mut stopped, mut repeated) = (0, 0);
    for (seed, power) in [(0, false), (1, true)] {
        SEED.set(seed);
        let models = models();
        for (n, act) in HISTORY.into_iter().enumerate() {
            for step in 0.. {
                let _shown = Shown(format!("act {n} {act:?}, step {step}, power {power}"));
                let mut world = before(n);
                world.bench.sim.fail_in(step);
                let result = world.perform(act);
                let Some(sync) = world.bench.sim.failed_sync() else {
                    result.unwrap();
                    break;
                };
                assert!(
                    !sync || world.capture().is_poisoned(),
                    "a failed sync was passed over"
                );
                let (mut before, mut after) = (models[n].clone(), models[n + 1].clone());
                if world.capture().is_poisoned() {
                    poisoned_on_failure(&world);
                    stopped += 1;
                } else {
                    if result.is_err() {
                        world.superset();
                        world.perform(act).unwrap();
                        repeated += 1;
                    }
                    before = world.model.clone();
                    after = world.model.clone();
                }
                let (outcome, _, _) = world.reopen(power, None);
                let lost = matches!(outcome, Outcome::PowerLoss(_));
                world.check(act, &before, &after, &outcome, lost);
                world.go_on();
            }
        }
    }
    assert!(
        stopped > 30 && repeated > 10,
        "{stopped} stopped, {repeated} repeated"
    );
}

/// The opening of a volume that has never been written to.
#[test]
fn a_crash_while_a_volume_is_made_leaves_an_empty_one() {
    for (power, step) in [false, true]
        .into_iter()
        .flat_map(|power| (0..12).map(move |step| (power, step)))
    {
        let bench = Bench::new();
        let sim = Sim::new(step, volume(), geometry(), BLOCKS / REGION_BLOCKS, 64);
        sim.crash_in(step);
        let first = Bench::recovered(
            sim.clone(),
            bench.tuning,
            Judgement::Exact { clean: true },
            1,
        );
        drop(first);
        let mut world = World::new();
        world.bench.sim = sim;
        world.bench.limit = 1;
        let (outcome, lost, _) = world.reopen(power, None);
        let model = world.model.clone();
        world.check(Act::Sync, &model, &model, &outcome, lost);
        assert_eq!(world.bench.tracked(), [0; 0]);
        world.go_on();
    }
}

#[test]
fn the_history_does_everything_once() {
    use std::sync::atomic::Ordering::SeqCst;

    let world = before(HISTORY.len());
    let counters = &world.capture().counters;
    assert!(counters.copied.load(SeqCst) > 10);
    assert!(counters.trims_ignored.load(SeqCst) > 0);
    assert!(
        counters.give_ups.load(SeqCst) >= 2,
        "an interval and a snapshot"
    );
    let most = models().iter().map(|model| model.snapshots.len()).max();
    assert_eq!(most, Some(2), "snapshots overlap");
}
