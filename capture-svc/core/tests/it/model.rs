//! The model test of the engine: any interleaving of writes, trims, zeroes, cuts, snapshot reads, deletions, commits,
//! process crashes, power losses and failed syncs, on the simulated disk, against a naive model.
//!
//! What must hold is in the functions named `check_…`. A failing seed is printed; `TIDEMARK_MODEL_SEED=n` runs that
//! one alone, `TIDEMARK_MODEL_CASES=n` runs as many as wanted.

use std::{
    collections::BTreeMap,
    rc::Rc,
    sync::{Arc, LazyLock},
};

use capture_core::engine::{
    capture::{Capture, CaptureError, RING_WORD, Tuning, View},
    cut::{Cut, Purpose},
    media::{Map, Media},
    read::SnapshotRead,
    recover::{EPOCHS_RESERVED, Outcome},
    ring::Ring,
    spool::SpoolLimits,
    trust::Judgement,
    write::{Change, Step, WriteOp},
};
use tidemark_block::{BlockIndex, BlockSize, Extent, Geometry, VolumeId};

use crate::sim::{Faults, Random, Sim};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 20;
const REGION_BLOCKS: u64 = 4;
const CASES: u64 = 4000;
const STEPS: u64 = 400;
const PATTERN_LEN: usize = 16 * BLOCK;

/// Contents to write: no two alike in any block, static so that requests may borrow them.
static PATTERNS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let pattern = |seed: u64| {
        let mut random = Random(seed << 32);
        (0..PATTERN_LEN / 8)
            .flat_map(|_| random.next().to_le_bytes())
            .collect()
    };
    (0..256).map(pattern).collect()
});

type Bytes = Rc<[u8]>;

struct Reading {
    read: SnapshotRead,
    view: Arc<View>,
    extent: Extent,
    buffer: Vec<u8>,
    phase: u8,
}

/// What the engine should hold, kept in the simplest way.
struct World {
    seed: u64,
    random: Random,
    sim: Sim,
    tuning: Tuning,
    stall: bool,
    capture: Rc<Capture<Sim>>,
    epoch_limit: u64,
    requests: Vec<WriteOp<'static>>,
    readings: Vec<Reading>,
    cut: Option<Cut>,
    /// By block: the contents it has had, with the epoch in which each counts.
    versions: Vec<Vec<(u64, Bytes)>>,
    /// The last committed generation.
    base: Vec<Bytes>,
    /// Snapshots that were confirmed and not deleted: number and cut.
    snapshots: BTreeMap<u64, u64>,
    /// The cut of the interval that was confirmed and has ended neither way.
    interval: Option<u64>,
    pattern: usize,
}

fn geometry() -> Geometry {
    Geometry::new(BLOCKS * BLOCK as u64, BlockSize::MIN).unwrap()
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([1; 16])
}

fn one(block: u64) -> Extent {
    Extent::between(BlockIndex::new(block), BlockIndex::new(block + 1))
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let entries = 4 + random.index(40);
        let tuning = Tuning {
            region_bytes: REGION_BLOCKS * BLOCK as u64,
            stripe_blocks: 2,
            spool: SpoolLimits {
                entries_max: entries as u64,
                slots_max: 3 + random.below(30),
            },
            hot_regions_max: random.index(4),
            snapshots_max: 5,
            changes_max: 2,
        };
        let sim = Sim::new(
            random.next(),
            volume(),
            geometry(),
            BLOCKS.div_ceil(REGION_BLOCKS),
            entries,
        );
        let exact = Judgement::Exact { clean: true };
        let (capture, _) =
            Capture::recover(sim.clone(), volume(), geometry(), tuning, exact, 1).unwrap();
        let epoch_limit = capture.epoch() + EPOCHS_RESERVED;
        let every = |random: &mut Random, n| random.one_in(2).then_some(n);
        let faults = Faults {
            sync: every(&mut random, 12),
            put: every(&mut random, 20),
            reserve: every(&mut random, 4),
        };
        sim.set_faults(faults);
        let zero: Bytes = vec![0; BLOCK].into();
        Self {
            seed,
            stall: random.one_in(4),
            random,
            sim,
            tuning,
            capture: Rc::new(capture),
            epoch_limit,
            requests: Vec::new(),
            readings: Vec::new(),
            cut: None,
            versions: (0..BLOCKS).map(|_| vec![(0, Rc::clone(&zero))]).collect(),
            base: vec![zero; usize::try_from(BLOCKS).unwrap()],
            snapshots: BTreeMap::new(),
            interval: None,
            pattern: 0,
        }
    }

    fn run(&mut self) {
        for _ in 0..STEPS {
            self.turn();
            if self.sim.has_crashed() || self.capture.is_poisoned() {
                let power = self.random.one_in(2);
                self.crash(power);
            }
            self.check_superset();
        }
        while !self.requests.is_empty() && !self.stall {
            self.step_request();
        }
        self.check_snapshots();
    }

    fn turn(&mut self) {
        match self.random.below(100) {
            0..20 => self.begin_request(),
            20..60 => self.step_request(),
            60..65 => self.begin_cut(),
            65..72 => self.finish_cut(),
            72..75 => self.begin_reading(),
            75..85 => self.step_reading(),
            85..87 => self.delete_snapshot(),
            87..90 => self.commit(),
            90 => self.give_up(),
            91 => self.doubt(),
            92..94 => {
                let result = self.capture.sync();
                self.accept(result);
            }
            94 => self.check_snapshots(),
            95 => self.check_changes(),
            96 => {
                let operations = self.random.below(30);
                self.sim.crash_in(operations);
            }
            97 if self.random.one_in(2) => self.crash(false),
            98 if self.random.one_in(3) => self.crash(true),
            _ => {}
        }
    }

    /// Whether it was done; else it failed as the disk may make it fail.
    fn accept<T>(&self, result: Result<T, CaptureError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(CaptureError::Media(_) | CaptureError::Poisoned) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn live(&self, block: u64) -> Bytes {
        let at = usize::try_from(block).unwrap() * BLOCK;
        self.sim.volume()[at..at + BLOCK].into()
    }

    fn image(&self, cut: u64, block: u64) -> &Bytes {
        let versions = &self.versions[usize::try_from(block).unwrap()];
        &versions
            .iter()
            .rev()
            .find(|(epoch, _)| *epoch <= cut)
            .expect("there is one of epoch 0")
            .1
    }

    fn begin_request(&mut self) {
        if self.requests.len() >= 6 {
            return;
        }
        let Some(epoch) = self.accept(self.capture.enter()) else {
            return;
        };
        let end = geometry().length();
        let (offset, length) = if self.random.one_in(3) {
            let offset = self.random.below(end);
            (
                offset,
                1 + self
                    .random
                    .below(end - offset)
                    .min(self.random.below(PATTERN_LEN as u64 - 1)),
            )
        } else {
            let block = self.random.below(BLOCKS);
            (
                block * BLOCK as u64,
                BLOCK as u64 * (1 + self.random.below(3).min(BLOCKS - block - 1)),
            )
        };
        let length_usize = usize::try_from(length).unwrap();
        let change = match self.random.below(10) {
            0 | 1 => Change::Trim { length },
            2 => Change::Zeroes {
                length,
                allocated: self.random.one_in(2),
            },
            _ => {
                self.pattern += 1;
                Change::Data(&PATTERNS[self.pattern % PATTERNS.len()][..length_usize])
            }
        };
        self.requests
            .push(WriteOp::new(&self.capture, epoch, offset, change));
    }

    fn step_request(&mut self) {
        if self.requests.is_empty() {
            return;
        }
        let n = self.random.index(self.requests.len());
        let mut request = self.requests.swap_remove(n);
        let writes = request.about_to_write(&self.capture);
        let capture = Rc::clone(&self.capture);
        let result = request.step(&capture, &mut [0; BLOCK]);
        self.note_write(request.epoch(), &writes);
        match result {
            Ok(Step::Done) => {
                capture.exit(request.epoch());
            }
            Ok(Step::AwaitSpool) if !self.stall => {
                self.requests.push(request);
                self.relieve();
            }
            Ok(_) => self.requests.push(request),
            Err(error) => {
                assert!(self.sim.has_crashed() || capture.is_poisoned(), "{error}");
                capture.exit(request.epoch());
            }
        }
    }

    /// A write of an epoch that comes after a request of a newer epoch has taken the block's before-image, or written
    /// to it, counts as the newer one's.
    fn note_write(&mut self, epoch: u64, written: &[Extent]) {
        for block in written.iter().copied().flat_map(Extent::iter) {
            let content = self.live(block.get());
            let versions = &mut self.versions[usize::try_from(block.get()).unwrap()];
            let mut counts_in = epoch.max(versions.last().map_or(0, |(epoch, _)| *epoch));
            if self.capture.spool().has_after(block, epoch) {
                counts_in = counts_in.max(epoch + 1);
            }
            versions.push((counts_in, content));
        }
    }

    fn relieve(&mut self) {
        let Some(given_up) = self.accept(self.capture.relieve()) else {
            if self.sim.has_crashed() || self.capture.is_poisoned() {
                // The crash came on the way: what has been given up is seen at the opening.
                self.snapshots.clear();
                self.interval = None;
            }
            return;
        };
        for cut in given_up {
            self.snapshots.retain(|_, snapshot| *snapshot != cut);
            self.interval = self.interval.filter(|interval| *interval != cut);
        }
    }

    fn begin_cut(&mut self) {
        if self.cut.is_some() {
            return;
        }
        let purpose = if self.random.one_in(2) {
            Purpose::Interval
        } else {
            Purpose::Snapshot {
                label: "s".to_owned(),
                time_ms: 1,
            }
        };
        match self.capture.begin_cut(purpose) {
            Err(CaptureError::IntervalOpen(_) | CaptureError::TooManySnapshots(_)) => {}
            other => self.cut = self.accept(other),
        }
    }

    fn finish_cut(&mut self) {
        let Some(cut) = self.cut.take_if(|cut| self.capture.is_settled(cut.epoch())) else {
            return;
        };
        let epoch = cut.epoch();
        match self.capture.finish_cut(cut) {
            Err(CaptureError::GivenUp(_)) => {}
            other => {
                if self.accept(other).is_some() {
                    match self
                        .capture
                        .snapshots()
                        .iter()
                        .find(|snapshot| snapshot.cut == epoch)
                    {
                        Some(snapshot) => {
                            self.snapshots.insert(snapshot.id, epoch);
                        }
                        None => self.interval = Some(epoch),
                    }
                }
            }
        }
    }

    fn begin_reading(&mut self) {
        let mut cuts: Vec<_> = self
            .snapshots
            .iter()
            .map(|(id, cut)| (Some(*id), *cut))
            .collect();
        cuts.extend(self.interval.map(|cut| (None, cut)));
        if cuts.is_empty() || self.readings.len() > 3 {
            return;
        }
        let (id, cut) = cuts[self.random.index(cuts.len())];
        let view = match id {
            Some(id) => self.accept(self.capture.open_snapshot(id)),
            None => self.capture.open_cut(cut),
        };
        let Some(view) = view else { return };
        assert_eq!(view.cut(), cut);
        let start = self.random.below(BLOCKS);
        let count = 1 + self.random.below(BLOCKS - start);
        let extent = Extent::between(BlockIndex::new(start), BlockIndex::new(start + count));
        self.readings.push(Reading {
            read: SnapshotRead::new(Arc::clone(&view), extent),
            view,
            extent,
            buffer: vec![0xAA; usize::try_from(count).unwrap() * BLOCK],
            phase: 0,
        });
    }

    fn step_reading(&mut self) {
        if self.readings.is_empty() {
            return;
        }
        let n = self.random.index(self.readings.len());
        let mut reading = self.readings.swap_remove(n);
        let (capture, buffer) = (&self.capture, &mut reading.buffer[..]);
        let result = match reading.phase {
            0 => reading.read.before_images(capture, buffer),
            1 => reading.read.live(capture, buffer),
            _ => reading.read.recheck(capture, buffer),
        };
        reading.phase += 1;
        match result {
            Ok(()) if reading.phase < 3 => self.readings.push(reading),
            Ok(()) => {
                for (n, block) in reading.extent.iter().enumerate() {
                    let image = self.image(reading.view.cut(), block.get());
                    let found = &reading.buffer[n * BLOCK..][..BLOCK];
                    assert!(
                        found == &image[..],
                        "block {block} at cut {}",
                        reading.view.cut()
                    );
                }
                self.capture.close_view(&reading.view);
            }
            Err(CaptureError::GivenUp(_)) => {
                assert!(reading.view.is_broken());
                self.capture.close_view(&reading.view);
            }
            Err(error) => {
                self.accept::<()>(Err(error));
            }
        }
    }

    fn delete_snapshot(&mut self) {
        let ids: Vec<u64> = self.snapshots.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = ids[self.random.index(ids.len())];
        let cut = self.snapshots.remove(&id);
        if self.capture.delete_snapshot(id).is_err() && !self.sim.has_crashed() {
            // Not deleted, or all work is refused.
            if let (Some(cut), true) = (cut, self.capture.snapshots().iter().any(|s| s.id == id)) {
                self.snapshots.insert(id, cut);
            }
        }
    }

    /// The vault gets the interval's blocks and commits; then the engine hears of it.
    fn commit(&mut self) {
        let Some(interval) = self.capture.open_interval() else {
            return;
        };
        let Some(view) = self.capture.open_cut(interval.cut) else {
            return;
        };
        let mut base = self.base.clone();
        for block in interval
            .changed
            .extents()
            .flat_map(Extent::iter)
            .map(BlockIndex::get)
        {
            let mut bytes = vec![0; BLOCK];
            if self.read_block(&view, block, &mut bytes).is_none() {
                return;
            }
            base[usize::try_from(block).unwrap()] = bytes.into();
        }
        self.capture.close_view(&view);
        self.base = base;
        for block in 0..BLOCKS {
            let image = self.image(interval.cut, block);
            assert!(
                self.base[usize::try_from(block).unwrap()] == *image,
                "block {block} of the generation cut at {}",
                interval.cut
            );
        }
        self.interval = None;
        let result = self.capture.commit_interval(interval.cut);
        self.accept(result);
    }

    fn read_block(&self, view: &Arc<View>, block: u64, bytes: &mut [u8]) -> Option<()> {
        let mut read = SnapshotRead::new(Arc::clone(view), one(block));
        let result = read
            .before_images(&self.capture, bytes)
            .and_then(|()| read.live(&self.capture, bytes))
            .and_then(|()| read.recheck(&self.capture, bytes));
        self.accept(result)
    }

    fn give_up(&mut self) {
        if self.random.one_in(3) {
            let result = self.capture.give_up_interval();
            if self.accept(result).is_some() || self.sim.has_crashed() {
                self.interval = None;
            }
        }
    }

    fn doubt(&mut self) {
        let block = self.random.below(BLOCKS);
        let result = self.capture.doubt(&[one(block)].into_iter().collect());
        if self.accept(result).is_some() {
            self.foreign_write(block);
        }
    }

    /// What doubt is about: somebody else writes, past dirty map and intent. Only where no snapshot would show it, and
    /// no record of the block would give it away.
    fn foreign_write(&mut self, block: u64) {
        let recorded = Ring::records(&self.sim.words(Map::Tracking)[RING_WORD..])
            .any(|record| record.unwrap().0.get() == block);
        let nothing_open = self.requests.is_empty()
            && self.readings.is_empty()
            && self.cut.is_none()
            && self.capture.snapshots().is_empty()
            && self.capture.open_interval().is_none();
        if nothing_open && !recorded {
            self.pattern += 1;
            let content = &PATTERNS[self.pattern % PATTERNS.len()][..BLOCK];
            // Where the crash comes, some of it may be there.
            let _ = self.sim.write_volume(block * BLOCK as u64, content);
            let epoch = self.capture.epoch();
            self.note_write(epoch, &[one(block)]);
        }
    }

    /// The process ends in the middle of everything, or the machine does; then the volume is opened again, perhaps
    /// with crashes meanwhile.
    fn crash(&mut self, power: bool) {
        self.requests.clear();
        self.readings.clear();
        self.cut = None;
        // A failed sync is like a power loss, whatever comes after it.
        let mut lost = power;
        let mut judgement = Judgement::Exact { clean: false };
        if power {
            self.sim.restart_machine();
            judgement = Judgement::PowerLoss;
        } else {
            self.sim.restart_process();
        }
        loop {
            if self.random.one_in(3) {
                let operations = self.random.below(12);
                self.sim.crash_in(operations);
            }
            let recovered = Capture::recover(
                self.sim.clone(),
                volume(),
                geometry(),
                self.tuning,
                judgement.clone(),
                self.epoch_limit,
            );
            match recovered {
                Ok((capture, outcome)) if !self.sim.has_crashed() => {
                    self.sim.restart_process();
                    lost |= outcome != Outcome::ProcessCrash;
                    assert!(!matches!(outcome, Outcome::Everything(_)), "{outcome:?}");
                    assert!(judgement != Judgement::PowerLoss || lost);
                    self.capture = Rc::new(capture);
                    break;
                }
                _ if self.random.one_in(3) => {
                    self.sim.restart_machine();
                    judgement = Judgement::PowerLoss;
                    lost = true;
                }
                _ => self.sim.restart_process(),
            }
        }
        assert!(self.capture.epoch() < self.epoch_limit + EPOCHS_RESERVED);
        self.epoch_limit = self.capture.epoch() + EPOCHS_RESERVED;
        self.capture.confirm();
        self.after_crash(lost);
    }

    fn after_crash(&mut self, lost: bool) {
        let found: BTreeMap<u64, u64> = self
            .capture
            .snapshots()
            .iter()
            .map(|snapshot| (snapshot.id, snapshot.cut))
            .collect();
        let interval = self.capture.open_interval();
        if lost {
            assert!(
                found.is_empty() && interval.is_none(),
                "nothing of before can be read"
            );
            for block in 0..BLOCKS {
                let live = self.live(block);
                self.versions[usize::try_from(block).unwrap()] = vec![(0, live)];
            }
        } else {
            for (id, cut) in &self.snapshots {
                assert_eq!(found.get(id), Some(cut), "a confirmed snapshot survives");
            }
            if let Some(cut) = self.interval {
                let empty = interval.is_none();
                assert!(empty || interval.as_ref().is_some_and(|found| found.cut == cut));
                let unchanged = (0..BLOCKS)
                    .zip(&self.base)
                    .all(|(block, base)| self.image(cut, block) == base);
                assert!(!empty || unchanged, "a confirmed interval survives");
            }
        }
        self.snapshots = found;
        self.interval = interval.map(|interval| interval.cut);
        self.check_superset();
        self.check_snapshots();
    }

    fn check_superset(&self) {
        if self.sim.has_crashed() || self.capture.is_poisoned() {
            return;
        }
        let tracked = self.capture.tracked(geometry().all());
        let volume = self.sim.volume();
        for block in 0..BLOCKS {
            let n = usize::try_from(block).unwrap();
            if volume[n * BLOCK..][..BLOCK] != self.base[n][..] {
                assert!(
                    tracked.contains(BlockIndex::new(block)),
                    "block {block} differs from the base"
                );
            }
        }
    }

    fn check_snapshots(&self) {
        if self.sim.has_crashed() || self.capture.is_poisoned() {
            return;
        }
        let mut views: Vec<_> = self
            .snapshots
            .keys()
            .filter_map(|id| self.accept(self.capture.open_snapshot(*id)))
            .collect();
        views.extend(self.interval.and_then(|cut| self.capture.open_cut(cut)));
        for view in views {
            for block in 0..BLOCKS {
                let mut bytes = vec![0; BLOCK];
                if self.read_block(&view, block, &mut bytes).is_some() {
                    assert!(
                        bytes[..] == self.image(view.cut(), block)[..],
                        "{block} at {}",
                        view.cut()
                    );
                }
            }
            self.capture.close_view(&view);
        }
    }

    fn check_changes(&self) {
        let ids: Vec<_> = self.snapshots.iter().collect();
        for pair in ids.windows(2) {
            let ((older, from), (newer, to)) = (pair[0], pair[1]);
            let Some(changed) = self.accept(self.capture.changed_between(*older, *newer)) else {
                return;
            };
            for block in 0..BLOCKS {
                if self.image(*from, block) != self.image(*to, block) {
                    assert!(
                        changed.contains(BlockIndex::new(block)),
                        "{block} between {from} and {to}"
                    );
                }
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failing seed: TIDEMARK_MODEL_SEED={}", self.seed);
        }
    }
}

fn number(name: &str) -> Option<u64> {
    #[allow(
        clippy::disallowed_methods,
        reason = "which cases to run is no decision of the crate"
    )]
    std::env::var(name)
        .ok()
        .map(|text| text.parse().expect("a number"))
}

#[test]
fn any_history_leaves_exact_snapshots_and_a_superset_of_the_changes() {
    if let Some(seed) = number("TIDEMARK_MODEL_SEED") {
        return World::new(seed).run();
    }
    for seed in 0..number("TIDEMARK_MODEL_CASES").unwrap_or(CASES) {
        World::new(seed).run();
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    let trace = |seed| {
        let mut world = World::new(seed);
        world.run();
        world.sim.trace()
    };
    for seed in 0..20 {
        assert_eq!(trace(seed), trace(seed));
    }
    assert_ne!(trace(1), trace(2));
}
