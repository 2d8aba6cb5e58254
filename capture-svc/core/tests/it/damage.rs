//! One bit flipped at every byte of the state, without files: what each structure and the opening make of it. The files
//! around it, and damage of other kinds, are in `capture-svc/tests/it/engine/damage.rs`.

use std::collections::BTreeMap;

use capture_core::engine::{
    capture::Capture,
    cut::Purpose,
    damage::{Cost, Damage, Fault, StateFile},
    dirty::DirtyLayout,
    intent::IntentFault,
    media::{Media, Record},
    read::SnapshotRead,
    recover::Outcome,
    trust::{Judgement, Reason},
};
use tidemark_block::BlockIndex;

use crate::{
    bench::{BLOCK, BLOCKS, Bench, bytes, extent, geometry, snapshot},
    sim::Sim,
};

/// How the state was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Killed,
    PowerLost,
}

/// A state that has everything, and what it is held to.
struct Scene {
    left: Left,
    bench: Bench,
    base: Vec<u8>,
    /// By cut: the snapshots and the interval.
    images: BTreeMap<u64, Vec<u8>>,
    sound: Option<Found>,
    /// The files, after the undamaged state was opened.
    opened: BTreeMap<StateFile, Option<Vec<u8>>>,
}

/// What an opening came to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    outcome: Outcome,
    damage: Vec<Damage>,
    epoch: u64,
    tracked: Vec<u64>,
    cuts: Vec<u64>,
    /// Blocks that were refused.
    refused: u64,
}

/// What became of a damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Everything,
    Named,
    Nothing,
}

fn files(sim: &Sim) -> Vec<StateFile> {
    let mut files = vec![
        StateFile::Tracking,
        StateFile::Dirty(0),
        StateFile::Dirty(1),
        StateFile::Slots,
        StateFile::Intent,
        Record::Carry.into(),
        Record::Interval.into(),
        Record::Snapshots.into(),
    ];
    files.extend(
        sim.changes()
            .unwrap()
            .into_iter()
            .map(|cut| StateFile::from(Record::Changes(cut))),
    );
    files
}

fn contents(sim: &Sim) -> BTreeMap<StateFile, Option<Vec<u8>>> {
    files(sim)
        .into_iter()
        .map(|file| (file, sim.file(file)))
        .collect()
}

impl Scene {
    fn new(left: Left) -> Self {
        let bench = Bench::with(|tuning| tuning.hot_regions_max = 1);
        let mut images = BTreeMap::new();
        bench.write(1, 1);
        let base = bench.cut(Purpose::Interval);
        bench.capture.commit_interval(base).unwrap();
        let base = bench.sim.volume();
        bench.write(3, 2);
        images.insert(bench.cut(snapshot()), bench.sim.volume());
        bench.write(1, 3);
        bench.write(4, 3);
        images.insert(bench.cut(snapshot()), bench.sim.volume());
        bench.write(1, 4);
        images.insert(bench.cut(Purpose::Interval), bench.sim.volume());
        bench.write(3, 5);
        bench
            .capture
            .doubt(&[extent(6, 1)].into_iter().collect())
            .unwrap();
        // The newest page of the intent map says more than the one before.
        bench.write(9, 6);
        match left {
            Left::Killed => bench.sim.restart_process(),
            Left::PowerLost => bench.sim.restart_machine(),
        }
        let mut scene = Self {
            left,
            bench,
            base,
            images,
            sound: None,
            opened: BTreeMap::new(),
        };
        let sim = scene.bench.sim.fork();
        scene.sound = Some(scene.open(&sim));
        scene.opened = contents(&sim);
        let cuts = scene.images.len() * usize::from(left == Left::Killed);
        assert_eq!(
            scene.sound.as_ref().map(|sound| sound.cuts.len()),
            Some(cuts)
        );
        scene
    }

    /// Opens a disk, and holds it to what it was.
    fn open(&self, sim: &Sim) -> Found {
        let judgement = match self.left {
            Left::Killed => Judgement::Exact { clean: false },
            Left::PowerLost => Judgement::PowerLoss,
        };
        let (tuning, limit) = (self.bench.tuning, self.bench.limit);
        let (bench, outcome) = Bench::recovered(sim.clone(), tuning, judgement, limit).unwrap();
        bench.assert_superset_of(&self.base);
        let mut cuts: Vec<u64> = bench.capture.snapshots().iter().map(|s| s.cut).collect();
        cuts.extend(bench.capture.open_interval().map(|interval| interval.cut));
        let refused = cuts
            .iter()
            .map(|cut| self.refused(&bench.capture, *cut))
            .sum();
        assert!(bench.capture.epoch() > self.images.keys().max().unwrap() + 1);
        Found {
            outcome,
            damage: bench.capture.take_damage(),
            epoch: bench.capture.epoch(),
            tracked: bench.tracked(),
            cuts,
            refused,
        }
    }

    /// Every block is that of the cut, or is refused.
    fn refused(&self, capture: &Capture<Sim>, cut: u64) -> u64 {
        let image = &self.images[&cut];
        let view = capture.open_cut(cut).unwrap();
        let mut refused = 0;
        for block in 0..BLOCKS {
            let mut buffer = vec![0xAA; BLOCK];
            let mut read = SnapshotRead::new(std::sync::Arc::clone(&view), extent(block, 1));
            let result = read
                .before_images(capture, &mut buffer)
                .and_then(|()| read.live(capture, &mut buffer))
                .and_then(|()| read.recheck(capture, &mut buffer));
            let at = usize::try_from(block).unwrap() * BLOCK;
            match result {
                Ok(()) => assert!(buffer == image[at..at + BLOCK], "block {block} at {cut}"),
                Err(_) => refused += 1,
            }
        }
        capture.close_view(&view);
        refused
    }

    fn judge(&self, file: StateFile, byte: usize) -> Verdict {
        let sim = self.bench.sim.fork();
        sim.flip(file, byte, u8::try_from(byte % 8).unwrap());
        let found = self.open(&sim);
        let sound = self.sound.as_ref().unwrap();
        let named = found.damage.iter().any(|damage| damage.file == file);
        match &found.outcome {
            Outcome::Everything(reason) => {
                assert!(named && matches!(reason, Reason::Damaged(damage) if damage.file == file));
                assert_eq!(found.tracked, (0..BLOCKS).collect::<Vec<_>>());
                assert_eq!(found.cuts, []);
                Verdict::Everything
            }
            _ if named => {
                assert!(
                    sound
                        .tracked
                        .iter()
                        .all(|block| found.tracked.contains(block))
                );
                Verdict::Named
            }
            _ => {
                assert_eq!(found, *sound, "nobody is told of it");
                for (name, bytes) in contents(&sim) {
                    let mut bytes = bytes.unwrap();
                    if name == file {
                        let expected = self.opened[&name].as_ref().unwrap();
                        bytes[byte] = expected[byte];
                    }
                    assert!(
                        self.opened[&name].as_ref() == Some(&bytes),
                        "{name} is another"
                    );
                }
                Verdict::Nothing
            }
        }
    }
}

fn flip_everywhere(left: Left, unread: &[StateFile]) {
    let scene = Scene::new(left);
    for file in files(&scene.bench.sim) {
        let mut counts = BTreeMap::new();
        let length = scene.bench.sim.file(file).unwrap().len();
        for byte in 0..length {
            let verdict =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| scene.judge(file, byte)));
            let verdict = verdict.unwrap_or_else(|_| panic!("byte {byte} of {file}, {left:?}"));
            *counts.entry(verdict).or_insert(0) += 1;
        }
        println!("{left:?}, {file}: {counts:?}");
        assert!(
            !counts.contains_key(&Verdict::Nothing) || unread.contains(&file),
            "{file}: {counts:?}"
        );
    }
}

#[test]
fn a_flipped_bit_of_what_a_killed_process_leaves_is_found_and_named() {
    let changes = |cut| StateFile::from(Record::Changes(cut));
    // Free entries, unused records of blocks; changes are read by whoever asks for them.
    let unread = [StateFile::Slots, StateFile::Tracking];
    let unread: Vec<StateFile> = unread.into_iter().chain((1..10).map(changes)).collect();
    flip_everywhere(Left::Killed, &unread);
}

#[test]
fn a_flipped_bit_of_what_a_loss_of_power_leaves_is_found_and_named() {
    let changes = |cut| StateFile::from(Record::Changes(cut));
    // Nothing of the mapped files is read, and no cut is left.
    let unread = [
        StateFile::Tracking,
        StateFile::Dirty(0),
        StateFile::Dirty(1),
        StateFile::Slots,
    ];
    let unread: Vec<StateFile> = unread.into_iter().chain((1..10).map(changes)).collect();
    flip_everywhere(Left::PowerLost, &unread);
}

#[test]
fn a_bit_that_is_flipped_while_the_map_is_in_use_loses_no_block_and_spares_no_copy() {
    // Of 16 blocks each of the three levels has one word. A write that comes by heals the bits that it sets.
    assert_eq!(DirtyLayout::new(BLOCKS).total(), 3);
    for (word, bit, healed) in [
        (2, 3, false),
        (2, 35, false),
        (2, 5, true),
        (0, 0, true),
        (1, 32, true),
    ] {
        for later in [true, false] {
            let bench = Bench::new();
            bench.write(5, 7);
            let cut = bench.cut(snapshot());
            bench.write(3, 1);
            if !later {
                bench.write(5, 8);
            }
            let parity = u8::from(bench.capture.epoch() & 1 == 1);
            bench.sim.flip(
                StateFile::Dirty(parity),
                word * 8 + bit / 8,
                u8::try_from(bit % 8).unwrap(),
            );
            if later {
                bench.write(5, 8);
            }
            assert_eq!(bench.read(cut, 5), 7, "its before-image was stored");
            assert_eq!(bench.capture.take_damage(), []);
            bench.cut(Purpose::Interval);
            let changed = bench.capture.open_interval().unwrap().changed;
            assert!(
                [3, 5]
                    .iter()
                    .all(|block| changed.contains(BlockIndex::new(*block)))
            );
            let told = bench.capture.take_damage();
            assert_eq!(told.is_empty(), healed && later, "{word} {bit} {told:?}");
            for damage in told {
                assert_eq!(damage.file, StateFile::Dirty(parity));
                assert_eq!((damage.fault, damage.cost), (Fault::Healed, Cost::Nothing));
            }
        }
    }
}

#[test]
fn a_record_that_the_disk_cannot_read_costs_what_a_damaged_one_does() {
    let told = |found: &Found| {
        let damage = found.damage.iter().map(|damage| (damage.file, damage.cost));
        damage.collect::<Vec<_>>()
    };
    for left in [Left::Killed, Left::PowerLost] {
        let scene = Scene::new(left);
        for record in [Record::Carry, Record::Interval, Record::Snapshots] {
            let (damaged, unreadable) = (scene.bench.sim.fork(), scene.bench.sim.fork());
            damaged.flip(record.into(), 20, 0);
            unreadable.lose_record(record);
            let [damaged, unreadable] = [damaged, unreadable].map(|sim| scene.open(&sim));
            let reason = Reason::Damaged(Damage::everything(record, Fault::Unreadable));
            assert_eq!(unreadable.outcome, Outcome::Everything(reason));
            assert_eq!(told(&unreadable), told(&damaged));
            assert_eq!(unreadable.tracked, damaged.tracked);
            assert_eq!((unreadable.cuts, unreadable.epoch), (vec![], damaged.epoch));
        }
    }
}

#[test]
fn a_page_of_the_intent_map_that_the_disk_cannot_read_has_all_its_regions_set() {
    for (left, place) in [Left::Killed, Left::PowerLost]
        .into_iter()
        .flat_map(|left| [(left, 0), (left, 1)])
    {
        let scene = Scene::new(left);
        let sim = scene.bench.sim.fork();
        sim.lose_intent(place);
        let found = scene.open(&sim);
        let lost = Damage {
            file: StateFile::Intent,
            fault: Fault::Intent(IntentFault::Lost(0)),
            cost: Cost::Regions,
        };
        assert_eq!(found.damage, [lost], "{left:?} {place}");
        let sound = scene.sound.as_ref().unwrap();
        match left {
            Left::Killed => assert_eq!(found.tracked, sound.tracked),
            Left::PowerLost => assert_eq!(found.tracked.len() as u64, BLOCKS),
        }
        assert_eq!(found.cuts, sound.cuts);
    }
}

/// What becomes of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ruin {
    Gone,
    Flipped,
    Unreadable,
}

impl Ruin {
    const ALL: [Self; 3] = [Self::Gone, Self::Flipped, Self::Unreadable];

    fn of(self, record: Record, sim: &Sim) {
        match self {
            Self::Gone => sim.put(record, None).unwrap(),
            Self::Flipped => sim.flip(record.into(), 70, 1),
            Self::Unreadable => sim.lose_record(record),
        }
    }
}

#[test]
fn a_record_of_changes_that_is_damaged_or_gone_makes_every_block_one_that_may_have_changed() {
    for (ruin, merged) in Ruin::ALL
        .into_iter()
        .flat_map(|ruin| [(ruin, false), (ruin, true)])
    {
        let bench = Bench::with(|tuning| tuning.changes_max = if merged { 1 } else { 8 });
        bench.cut(snapshot());
        bench.write(3, 1);
        let cut = bench.cut(Purpose::Interval);
        bench.capture.commit_interval(cut).unwrap();
        let record = Record::Changes(cut);
        ruin.of(record, &bench.sim);
        bench.write(4, 1);
        bench.cut(snapshot());
        let changed = bench.capture.changed_between(1, 2).unwrap();
        assert_eq!(changed.len().get(), BLOCKS, "{ruin:?} {merged}");
        let told = bench.capture.take_damage();
        assert!(!told.is_empty());
        for damage in told {
            assert_eq!((damage.file, damage.cost), (record.into(), Cost::Changes));
        }
        // What comes later is known.
        bench.write(5, 1);
        bench.cut(snapshot());
        let changed = bench.capture.changed_between(2, 3).unwrap();
        assert_eq!(crate::bench::blocks(&changed), [5]);
    }
}

#[test]
fn what_an_earlier_opening_has_recorded_of_changes_and_is_damaged_makes_every_block_one_that_may_have_changed()
 {
    for ruin in [Ruin::Flipped, Ruin::Unreadable] {
        let bench = Bench::new();
        bench.cut(snapshot());
        bench.write(3, 1);
        let record = Record::Changes(bench.capture.epoch());
        let earlier = vec![0; 100];
        bench.sim.put(record, Some(&earlier)).unwrap();
        ruin.of(record, &bench.sim);
        let (bench, outcome) = bench.reopen(false);
        assert_eq!(outcome, Outcome::ProcessCrash);
        bench.cut(snapshot());
        let changed = bench.capture.changed_between(1, 2).unwrap();
        assert_eq!(changed.len().get(), BLOCKS, "{ruin:?}");
    }
}

#[test]
fn the_newest_record_of_changes_is_missed_also_by_an_opening() {
    let bench = Bench::new();
    bench.cut(snapshot());
    bench.write(3, 1);
    let cut = bench.cut(Purpose::Interval);
    bench.write(4, 1);
    bench.sim.put(Record::Changes(cut), None).unwrap();
    let (bench, outcome) = bench.reopen(false);
    assert_eq!(outcome, Outcome::ProcessCrash);
    let told = bench.capture.take_damage();
    let [Damage { file, fault, cost }] = &told[..] else {
        panic!("{told:?}");
    };
    let gone = (Record::Changes(cut).into(), &Fault::Missing, Cost::Changes);
    assert_eq!((*file, fault, *cost), gone);
    bench.cut(snapshot());
    assert_eq!(
        bench.capture.changed_between(1, 2).unwrap(),
        [geometry().all()].into_iter().collect()
    );
}

#[test]
fn a_before_image_that_the_disk_cannot_read_is_damaged() {
    let bench = Bench::new();
    bench.write(3, 1);
    let cut = bench.cut(snapshot());
    bench.write(3, 2);
    bench.sim.lose_spool();
    let view = bench.capture.open_cut(cut).unwrap();
    let mut read = SnapshotRead::new(view, extent(3, 1));
    let result = read.before_images(&bench.capture, &mut bytes(0).to_vec());
    assert_eq!(
        result,
        Err(capture_core::engine::capture::CaptureError::SpoolDamaged(3))
    );
}
