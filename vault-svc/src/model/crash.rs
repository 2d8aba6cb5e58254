//! A crash at every step: each put, delete and sync of ingest, commit, retirement and reclaim fails in turn, before
//! and after it took effect, as an error, as the end of the process and as a loss of power; and each step of what
//! follows it fails again.
//!
//! A history is a list of acts. It is run once without faults, which counts the steps of each act and says what the
//! manifest is before and after it. Then each act is run again from where it begins, once for each step and fault;
//! the vault is opened again, what is visible has to be the state before or after the act, and every invariant has
//! to hold; the act is repeated, which has to end in the state after it; and the next interval has to be committed.
//! The invariants are functions in [`invariants`], named as they are.

mod acts;
mod invariants;
mod pages;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use object_store::memory::InMemory;
use tidemark_block::{GenerationId, ImageDigest, IntervalId, Receipt, WriterTerm};
use tidemark_proto::{RpcError, convert::TermRequest};
use vault_core::{manifest::Manifest, reclaim::Policy};

use self::acts::Act;
use super::{
    config,
    faults::{Fate, FaultyStore, Fuse, Volatile},
    scratch,
};
use crate::{
    Vault,
    interval::{Numbers, Prepared, Source},
    store::Store,
    volume::Volume,
};

const BLOCKS: u64 = 80;
const SECTOR: usize = 512;
/// Steps of a history that are worth a test, two faults at each.
const STEPS_MIN: u64 = 100;

/// How a step fails.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// With an error; the process goes on.
    Error { done: bool },
    /// The process ends. What it has written stays.
    Crash { done: bool },
    /// The power is lost: what is not synced stays or not, by the seed.
    Power { seed: u64 },
}

impl Fault {
    const fn fate(self) -> Fate {
        match self {
            Self::Error { done } => Fate::Failed { done },
            Self::Crash { done } => Fate::Crashed { done },
            Self::Power { seed } => Fate::Crashed {
                done: seed % 2 == 1,
            },
        }
    }
}

/// What sources and readers see of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    term: WriterTerm,
    generations: Vec<(GenerationId, IntervalId, ImageDigest)>,
}

impl Seen {
    fn of(manifest: &Manifest) -> Self {
        let generation = |g: &vault_core::manifest::Generation| (g.id, g.interval, g.digest);
        Self {
            term: manifest.term,
            generations: manifest.generations.iter().map(generation).collect(),
        }
    }
}

/// A vault's disks, its process, and a source that outlives it.
struct World {
    dir: tempfile::TempDir,
    objects: Arc<InMemory>,
    volatile: Volatile,
    fuse: Arc<Fuse>,
    vault: Option<Arc<Vault>>,
    policy: Policy,
    retain: u32,
    source: Source,
    /// The term that it asked for, until it has the answer.
    asked: Option<TermRequest>,
    /// The interval that it ships, until it has the receipt.
    flying: Option<Prepared>,
    /// What the vault has told to be durable of that.
    acknowledged: u64,
    /// What each interval becomes.
    images: BTreeMap<IntervalId, Vec<u8>>,
    last: Option<(Prepared, Receipt)>,
    /// The checksum table when it was stamped.
    stamped: Option<Vec<u8>>,
}

impl World {
    fn new(source: Source, policy: Policy, retain: u32) -> Self {
        Self {
            dir: scratch(),
            objects: Arc::default(),
            volatile: Volatile::default(),
            fuse: Arc::default(),
            vault: None,
            policy,
            retain,
            source,
            asked: None,
            flying: None,
            acknowledged: 0,
            images: BTreeMap::new(),
            last: None,
            stamped: None,
        }
    }

    /// The same world without the process, which ends.
    async fn fork(&mut self) -> Self {
        self.end_process().await;
        let dir = scratch();
        copy_dir(self.dir.path(), dir.path());
        Self {
            dir,
            objects: Arc::new(self.objects.fork()),
            volatile: self.volatile.fork(),
            fuse: Arc::default(),
            vault: None,
            policy: self.policy,
            retain: self.retain,
            source: self.source.clone(),
            asked: self.asked.clone(),
            flying: self.flying.clone(),
            acknowledged: self.acknowledged,
            images: self.images.clone(),
            last: self.last.clone(),
            stamped: self.stamped.clone(),
        }
    }

    /// The running vault, or a new one.
    async fn vault(&mut self) -> Result<Arc<Vault>, RpcError> {
        if let Some(vault) = &self.vault {
            return Ok(Arc::clone(vault));
        }
        let store = Arc::new(FaultyStore::with_volatile(
            Arc::clone(&self.objects),
            Arc::clone(&self.fuse),
            self.volatile.clone(),
        ));
        let store = Store::settled_by(Arc::clone(&store) as _, store);
        let config = config(self.dir.path(), self.retain);
        let vault = Vault::open_with(config, store, self.policy)
            .await
            .map_err(|error| RpcError::internal(format!("{error:#}")))?;
        Ok(Arc::clone(self.vault.insert(vault)))
    }

    async fn volume(&mut self) -> Result<Arc<Volume>, RpcError> {
        self.vault().await?.volume(self.source.volume)
    }

    async fn end_process(&mut self) {
        self.fuse.blow();
        self.vault = None;
        // Let go of whatever it still held.
        while self.is_locked() {
            tokio::task::yield_now().await;
        }
        self.fuse = Arc::default();
    }

    fn is_locked(&self) -> bool {
        let state = self.dir.path().join("state");
        state.is_dir() && tidemark_disk::lock::FileLock::of_dir(&state).is_err()
    }

    /// What a fault does beyond the step that failed.
    async fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Error { .. } => self.fuse.disarm(),
            Fault::Crash { .. } => {
                invariants::poisoned_on_failure(self).await;
                self.end_process().await;
            }
            Fault::Power { seed } => {
                invariants::poisoned_on_failure(self).await;
                self.lose_power(seed).await;
            }
        }
    }

    async fn lose_power(&mut self, seed: u64) {
        self.end_process().await;
        let mut numbers = Numbers(seed);
        self.volatile.lose_some(&self.objects, &mut numbers).await;
        self.tear_table(&mut numbers);
    }

    fn table_path(&self) -> std::path::PathBuf {
        let tables = self.dir.path().join("state/tables");
        tables.join(self.source.volume.to_string())
    }

    /// Each sector of the checksum table is what it is, or what it was when it was stamped.
    fn tear_table(&self, numbers: &mut Numbers) {
        let Ok(mut bytes) = std::fs::read(self.table_path()) else {
            return;
        };
        for (n, sector) in bytes.chunks_mut(SECTOR).enumerate() {
            if numbers.below(2) == 0 {
                let old = self.stamped.as_ref().map(|old| &old[n * SECTOR..]);
                match old {
                    Some(old) => sector.copy_from_slice(&old[..sector.len()]),
                    None => sector.fill(0),
                }
            }
        }
        std::fs::write(self.table_path(), bytes).unwrap();
    }

    /// Everything that has to hold, whatever has happened between `before` and `after`.
    async fn check(&mut self, before: &Seen, after: &Seen) {
        let Ok(volume) = self.volume().await else {
            assert!(
                before.generations.is_empty() && before.term == WriterTerm::ZERO,
                "the volume is gone"
            );
            return;
        };
        let manifest = volume.edit(|_| Ok(None)).await.unwrap();
        let seen = Seen::of(&manifest);
        assert!(
            seen == *before || seen == *after,
            "neither the old nor the new state: {seen:?} is neither {before:?} nor {after:?}"
        );
        invariants::all_or_nothing(self, &volume, &manifest);
        invariants::exact(self, &volume, &manifest).await;
        invariants::fenced(self, &manifest).await;
        invariants::planned_deletion(self);
        invariants::bounded(&manifest);
    }

    /// The next interval is committed, and a pass leaves nothing that is not named.
    async fn go_on(&mut self) {
        self.perform(Act::StartTerm).await.unwrap();
        if self.flying.is_some() {
            self.perform(Act::Ship).await.unwrap();
        }
        self.source.write_some(10);
        self.perform(Act::Ship).await.unwrap();
        let volume = self.volume().await.unwrap();
        let manifest = volume.manifest();
        assert_eq!(manifest.head().unwrap().digest, self.source.digest());
        invariants::exact(self, &volume, &manifest).await;
        self.perform(Act::PassOverStrays).await.unwrap();
        invariants::nothing_is_left_over(self).await;
        invariants::planned_deletion(self);
    }
}

fn copy_dir(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Runs a history without faults, and each of its acts with each of these faults at each step. Returns the number of
/// steps.
async fn run(mut world: World, history: &[Act], faults: &[Fault], twice: bool) -> u64 {
    let mut before = Seen {
        term: WriterTerm::ZERO,
        generations: Vec::new(),
    };
    if world.last.is_some() {
        before = Seen::of(&world.volume().await.unwrap().manifest());
    }
    let mut steps = 0;
    for (n, &act) in history.iter().enumerate() {
        let mut start = world.fork().await;
        world.perform(act).await.unwrap();
        let after = match world.volume().await {
            Ok(volume) => Seen::of(&volume.manifest()),
            Err(_) => before.clone(),
        };
        world.check(&after, &after).await;
        let case = Case {
            act,
            before,
            after: after.clone(),
        };
        for &fault in faults {
            for step in 0.. {
                let at = format!("act {n} {act:?}, step {step}, {fault:?}");
                if !case.fails_at(&mut start, step, fault, twice, &at).await {
                    steps += step;
                    break;
                }
            }
        }
        before = after;
    }
    world.go_on().await;
    steps
}

/// An act, and what can be seen before and after it.
struct Case {
    act: Act,
    before: Seen,
    after: Seen,
}

impl Case {
    /// Fails one step of the act; false where it has fewer.
    async fn fails_at(
        &self,
        start: &mut World,
        step: u64,
        fault: Fault,
        twice: bool,
        at: &str,
    ) -> bool {
        let _shown = Shown(at);
        let mut world = start.fork().await;
        if self.act != Act::Open {
            world.vault().await.unwrap();
        }
        world.fuse.plan(step, fault.fate());
        let result = world.perform(self.act).await;
        if !world.fuse.burnt() {
            result.unwrap();
            return false;
        }
        world.strike(fault).await;
        if twice {
            for second in 0.. {
                let at = format!("{at}, then step {second}");
                let done = result.is_ok();
                if !self.fails_again_at(&mut world, done, second, &at).await {
                    return true;
                }
            }
        }
        world.check(&self.before, &self.after).await;
        self.finish(&mut world, result.is_ok(), fault, step).await;
        true
    }

    /// Fails one step of what follows a crash: of opening the vault again, and of the act when it is repeated.
    async fn fails_again_at(&self, struck: &mut World, done: bool, step: u64, at: &str) -> bool {
        let _shown = Shown(at);
        let mut world = struck.fork().await;
        let act = if done { Act::Open } else { self.act };
        // Of the two, the one that loses more; what it leaves of a step is as the step's number is.
        let fault = Fault::Power { seed: step };
        world.fuse.plan(step, fault.fate());
        let result = world.perform(act).await;
        if !world.fuse.burnt() {
            result.unwrap();
            return false;
        }
        world.strike(fault).await;
        self.finish(&mut world, result.is_ok(), fault, step).await;
        true
    }

    /// Repeats the act where it has failed; then it is done for good, and everything goes on.
    async fn finish(&self, world: &mut World, done: bool, fault: Fault, seed: u64) {
        if !done {
            world.perform(self.act).await.unwrap();
        }
        if matches!(fault, Fault::Error { .. }) {
            invariants::answers_are_durable(world);
            world.lose_power(seed).await;
        }
        world.check(&self.after, &self.after).await;
        world.go_on().await;
    }
}

/// Says where a test was when it failed.
struct Shown<'a>(&'a str);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed at {}", self.0);
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Every kind of act of the vault, with each kind of step.
fn whole_history(faults: &[Fault], twice: bool) -> u64 {
    use Act::{
        GiveUp, Mark, Open, Pass, PassOverStrays, Ship, ShipAgain, ShipHalf, Stamp, StartTerm,
        Write, Zero,
    };
    let history = [
        Open,
        StartTerm,
        Write(60),
        Ship,
        ShipAgain,
        Mark,
        Write(30),
        ShipHalf,
        Ship,
        Stamp,
        Write(60),
        Zero,
        Ship,
        Pass,
        StartTerm,
        ShipAgain,
        Write(40),
        ShipHalf,
        Write(10),
        GiveUp,
        Ship,
        PassOverStrays,
        Write(30),
        Ship,
        Stamp,
        Pass,
    ];
    runtime().block_on(async {
        let mut source = Source::new(1, BLOCKS);
        source.batch_frames = 1;
        source.compressed = Some(false);
        run(
            World::new(source, super::POLICY, 2),
            &history,
            faults,
            twice,
        )
        .await
    })
}

#[test]
fn an_error_at_any_step_leaves_the_old_or_the_new_state() {
    let steps = whole_history(
        &[Fault::Error { done: false }, Fault::Error { done: true }],
        false,
    );
    assert!(steps > STEPS_MIN, "only {steps}: the test tests little");
}

#[test]
fn the_end_of_the_process_at_any_step_leaves_the_old_or_the_new_state() {
    let steps = whole_history(
        &[Fault::Crash { done: false }, Fault::Crash { done: true }],
        false,
    );
    assert!(steps > STEPS_MIN, "only {steps}: the test tests little");
}

#[test]
fn a_loss_of_power_at_any_step_leaves_the_old_or_the_new_state() {
    let steps = whole_history(&[Fault::Power { seed: 0 }, Fault::Power { seed: 1 }], false);
    assert!(steps > STEPS_MIN, "only {steps}: the test tests little");
}

#[test]
fn a_crash_at_any_step_of_what_follows_a_crash_leaves_the_old_or_the_new_state() {
    let steps = whole_history(&[Fault::Crash { done: true }], true);
    assert!(2 * steps > STEPS_MIN, "only {steps}: the test tests little");
}
