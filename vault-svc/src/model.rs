//! The model test of the vault: any sequence of intervals, duplicates, disconnects, crashes, stale terms,
//! retirements and reclaims; every generation that is visible equals the image that the source cut.
//!
//! The fault model is that of [`faults`]: a put or a delete fails before it has an effect or after it, or the process
//! dies at it, again before or after. What a put that failed has left behind is visible, and until its directory is
//! synced a crash may take it back, as it may bring back what was deleted. What a dead process still tries has no
//! effect. Seeds are printed and replay. [`crash`] does the same without chance, at each step in turn.

#![allow(clippy::unwrap_used, reason = "tests")]

mod bitflips;
mod crash;
mod faults;
mod full;
mod growth;
mod leases;
mod maps;
mod marker;
mod scrubs;
mod strays;
mod tables;
mod writers;

use std::{collections::HashMap, path::Path, sync::Arc};

use object_store::memory::InMemory;
use tidemark_block::{BlockCount, BlockIndex, Extent, GenerationId, IntervalId, Receipt};
use tidemark_proto::{Reason, RpcError};
use vault_core::{manifest::check_invariants, reclaim::Policy};

use self::faults::{FaultyStore, Fuse, Volatile};
use crate::{
    Config, Vault,
    config::ByteSize,
    image::ImageReader,
    interval::{Numbers, Prepared, Source},
    scrub::Pace,
    ship::{Begun, Session},
    store::{Store, VolumeStore},
    volume::Volume,
};

const BLOCKS: u64 = 300;

fn config(dir: &Path, retain: u32) -> Config {
    Config {
        store_dir: dir.join("store"),
        state_dir: dir.join("state"),
        reserve_bytes: ByteSize::new(0),
        reader_grace: std::time::Duration::ZERO.into(),
        part_bytes_max: ByteSize::new(64 << 10),
        retain,
        ..Config::default()
    }
}

/// Small numbers, so that every rule is at work all the time.
const POLICY: Policy = Policy {
    start: 125,
    stop: 115,
    small_bytes: 40 << 10,
    small_max: 6,
    depth_max: 6,
    round_bytes: 400 << 10,
    round_segments: 5,
    segment_bytes: 64 << 10,
};

fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

struct World {
    dir: tempfile::TempDir,
    objects: Arc<InMemory>,
    volatile: Volatile,
    fuse: Arc<Fuse>,
    vault: Option<Arc<Vault>>,
    retain: u32,
    source: Source,
    numbers: Numbers,
    /// The interval that the source ships, until it knows its fate.
    flying: Option<Prepared>,
    last: Option<(Prepared, Receipt)>,
    /// What each interval would become.
    images: HashMap<IntervalId, Vec<u8>>,
    acknowledged: GenerationId,
    commits: u64,
    /// Objects that were visible before a crash and not after it.
    lost: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let source = Source::new(numbers.next(), BLOCKS);
        Self {
            dir: scratch(),
            objects: Arc::new(InMemory::new()),
            volatile: Volatile::default(),
            fuse: Arc::default(),
            vault: None,
            retain: u32::try_from(1 + numbers.below(4)).unwrap(),
            source,
            numbers,
            flying: None,
            last: None,
            images: HashMap::new(),
            acknowledged: GenerationId::ZERO,
            commits: 0,
            lost: 0,
        }
    }

    /// A vault process: the running one, or a new one after a crash.
    async fn vault(&mut self) -> Arc<Vault> {
        if self.fuse.blown() {
            self.vault = None;
        }
        if self.vault.is_none() {
            // Let go of whatever the dead process still held.
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            self.lost += self
                .volatile
                .lose_some(&self.objects, &mut self.numbers)
                .await;
            self.fuse = Arc::default();
            let store = Arc::new(FaultyStore::with_volatile(
                Arc::clone(&self.objects),
                Arc::clone(&self.fuse),
                self.volatile.clone(),
            ));
            let store = Store::settled_by(Arc::clone(&store) as _, store);
            let config = config(self.dir.path(), self.retain);
            self.vault = Some(Vault::open_with(config, store, POLICY).await.unwrap());
        }
        Arc::clone(self.vault.as_ref().unwrap())
    }

    async fn start_term(&mut self) -> Result<(), RpcError> {
        let request = self.source.term_request();
        // Asked again with the same nonce the answer is the same, whatever became of the first try.
        let mut grant = self
            .vault()
            .await
            .start_term(request.clone(), &tidemark_identity::Caller::Local)
            .await;
        if grant.is_err() {
            grant = self
                .vault()
                .await
                .start_term(request, &tidemark_identity::Caller::Local)
                .await;
        }
        let grant = match grant {
            Ok(grant) => grant,
            Err(error) => {
                // Both answers were lost; the term was granted or not, and only a human could tell a real source.
                self.fuse.disarm();
                if let Ok(volume) = self.vault().await.volume(self.source.volume) {
                    self.source.term = volume.edit(|_| Ok(None)).await.unwrap().term;
                }
                return Err(error);
            }
        };
        self.source.term = grant.term;
        let head = grant.head;
        let flown = self
            .flying
            .take_if(|flying| head.is_some_and(|head| head.interval == flying.header.interval));
        if let (Some(flown), Some(head)) = (flown, head) {
            // The receipt was lost; the head tells.
            let receipt = Receipt {
                volume: self.source.volume,
                interval: head.interval,
                generation: head.generation,
                created: true,
                image_digest: head.digest,
                changed_blocks: flown.seal.changed_blocks,
                frame_bytes: 0,
                cut_time_ms: 0,
                committed_time_ms: 0,
                coherence: flown.header.coherence,
                reason: flown.header.reason.clone(),
                trigger: flown.header.trigger,
            };
            self.landed(&receipt);
        }
        assert_eq!(
            head.map_or(GenerationId::ZERO, |head| head.generation),
            self.source.base
        );
        Ok(())
    }

    fn landed(&mut self, receipt: &Receipt) {
        self.source.committed(receipt);
        self.acknowledged = receipt.generation;
        self.flying = None;
        self.commits += 1;
    }

    fn cut(&mut self) -> Prepared {
        if let Some(flying) = &mut self.flying {
            flying.header.term = self.source.term;
            return flying.clone();
        }
        let count = 1 + self.numbers.below(60);
        self.source.write_some(count);
        if self.numbers.below(10) == 0 {
            let start = self.numbers.below(BLOCKS);
            self.source.zero(start..(start + 80).min(BLOCKS));
        }
        let prepared = self.source.prepare();
        self.images
            .insert(prepared.header.interval, self.source.image.clone());
        self.flying = Some(prepared.clone());
        prepared
    }

    /// Ships, perhaps only a part of it.
    async fn ship(&mut self) -> Result<(), RpcError> {
        let prepared = self.cut();
        let vault = self.vault().await;
        let mut session = match vault
            .ship(prepared.header.clone(), &tidemark_identity::Caller::Local)
            .await?
        {
            Begun::Committed(receipt) => {
                self.landed(&receipt);
                return Ok(());
            }
            Begun::Open(session) => session,
        };
        let durable = session.durable()?.end;
        let rest: Vec<_> = prepared
            .batches
            .iter()
            .filter(|batch| batch.end > durable)
            .collect();
        let stop = match self.numbers.below(3) {
            0 => usize::try_from(self.numbers.below(rest.len() as u64 + 1)).unwrap(),
            _ => usize::MAX,
        };
        for (n, batch) in rest.into_iter().enumerate() {
            if n == stop {
                return self.hang_up(*session).await;
            }
            while !session.can_take() {
                session.progress().await?;
            }
            session.batch(batch.clone()).await?;
        }
        while session.has_pending() {
            session.close_part()?;
            session.progress().await?;
        }
        if stop == 0 {
            return self.hang_up(*session).await;
        }
        let receipt = session.commit(prepared.seal).await?;
        assert_eq!(receipt.interval, prepared.header.interval);
        self.landed(&receipt);
        self.last = Some((prepared, receipt));
        Ok(())
    }

    async fn hang_up(&mut self, session: Session) -> Result<(), RpcError> {
        match self.numbers.below(3) {
            0 => drop(session),
            1 => session.abandon().await,
            _ => {
                // The source gives it up: the blocks go with the next one.
                drop(session);
                self.flying = None;
            }
        }
        Ok(())
    }

    async fn ask_again(&mut self) -> Result<(), RpcError> {
        let Some((mut prepared, receipt)) = self.last.clone() else {
            return Ok(());
        };
        prepared.header.term = self.source.term;
        match self
            .vault()
            .await
            .ship(prepared.header, &tidemark_identity::Caller::Local)
            .await
        {
            Ok(Begun::Committed(again)) => assert_eq!(again, receipt),
            Ok(Begun::Open(_)) => panic!("a committed interval was let in again"),
            Err(error) => {
                assert_ne!(
                    error.reason,
                    Reason::BaseNotHead,
                    "its receipt is forgotten"
                );
                return Err(error);
            }
        }
        Ok(())
    }

    async fn lie(&mut self) -> Result<(), RpcError> {
        let kept = self.flying.clone();
        let mut prepared = self.cut();
        self.flying = kept;
        let vault = self.vault().await;
        prepared.header.interval = IntervalId::from_bytes(self.numbers.id());
        let expected = if self.numbers.below(2) == 0 {
            prepared.header.term = tidemark_block::WriterTerm::new(self.source.term.get() + 1);
            Reason::Fenced
        } else {
            prepared.header.base = self.source.base.next();
            Reason::BaseNotHead
        };
        match vault
            .ship(prepared.header, &tidemark_identity::Caller::Local)
            .await
        {
            Err(error) => assert_eq!(error.reason, expected),
            Ok(_) => panic!("a lie was believed"),
        }
        Ok(())
    }

    async fn step(&mut self) -> Result<(), RpcError> {
        match self.numbers.below(20) {
            0..10 => self.ship().await,
            10 => self.ask_again().await,
            11 => self.lie().await,
            12..16 => {
                let vault = self.vault().await;
                let volume = vault.volume(self.source.volume)?;
                let thorough = self.numbers.below(2) == 0;
                vault.pass(&volume, thorough).await.map(|_| ())
            }
            16 => {
                let vault = self.vault().await;
                vault.volume(self.source.volume)?.stamp_table().await
            }
            17 => {
                let vault = self.vault().await;
                drop(vault.close().await);
                self.fuse.blow();
                Ok(())
            }
            18 => {
                // Loses everything that is not in the store.
                self.fuse.blow();
                self.vault = None;
                for _ in 0..1000 {
                    tokio::task::yield_now().await;
                }
                std::fs::remove_dir_all(self.dir.path().join("state")).unwrap();
                Ok(())
            }
            _ => self.start_term().await,
        }
    }

    /// Every generation that can be seen is the image that its interval had.
    async fn check(&mut self) {
        self.fuse.disarm();
        let vault = self.vault().await;
        self.fuse.disarm();
        let Ok(volume) = vault.volume(self.source.volume) else {
            return;
        };
        let manifest = volume.edit(|_| Ok(None)).await.unwrap();
        check_invariants(&manifest, None).unwrap();
        assert!(
            manifest.head_id() >= self.acknowledged,
            "a receipt was given for what is not there"
        );
        let stored = VolumeStore::new(Store::new(Arc::clone(&self.objects) as _), volume.id);
        let newest = stored.newest_above(0).await.unwrap().unwrap();
        assert!(
            *manifest == newest,
            "what is visible is what the newest manifest says"
        );
        for generation in &manifest.generations {
            let image = read(&volume, generation.id.get()).await.unwrap();
            let expected = &self.images[&generation.interval];
            assert!(
                image == *expected,
                "generation {} differs from what was cut",
                generation.id
            );
        }
        let flying = self.flying.as_ref().map(|flying| flying.header.interval);
        self.images.retain(|interval, _| {
            Some(*interval) == flying
                || manifest
                    .generations
                    .iter()
                    .any(|generation| generation.interval == *interval)
        });
        let table = volume.table_at_head().await.unwrap();
        let digest = table.table.digest().unwrap();
        assert!(manifest.head().is_none_or(|head| head.digest == digest));
    }
}

impl World {
    /// Whatever has happened, every byte that is stored is sound.
    async fn scrub(&mut self) {
        self.fuse.disarm();
        let volume = self.vault().await.volume(self.source.volume).unwrap();
        let found = volume
            .scrub(&mut Pace::unbounded(), &mut |_| ())
            .await
            .unwrap();
        assert!(found.named.is_empty(), "{:?}", found.named);
    }
}

/// Ships an interval whole, from wherever the vault has it.
async fn deliver(vault: &Vault, prepared: &Prepared) -> Result<Receipt, RpcError> {
    let mut session = match vault
        .ship(prepared.header.clone(), &tidemark_identity::Caller::Local)
        .await?
    {
        Begun::Open(session) => session,
        Begun::Committed(receipt) => return Ok(receipt),
    };
    let durable = session.durable()?.end;
    for batch in prepared.batches.iter().filter(|batch| batch.end > durable) {
        while !session.can_take() {
            session.progress().await?;
        }
        session.batch(batch.clone()).await?;
    }
    while session.has_pending() {
        session.close_part()?;
        session.progress().await?;
    }
    session.commit(prepared.seal).await
}

async fn read(volume: &Arc<Volume>, generation: u64) -> Result<Vec<u8>, RpcError> {
    let reader = ImageReader::open(Arc::clone(volume), generation)?;
    reader
        .read(Extent::new(BlockIndex::ZERO, BlockCount::new(BLOCKS)))
        .await
}

/// Returns how much was committed, and how many objects crashes took back.
fn run(seed: u64, steps: u64) -> (u64, u64) {
    println!("seed {seed}: TIDEMARK_MODEL_SEED={seed} TIDEMARK_MODEL_STEPS={steps} replays it");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut world = World::new(seed);
        world.start_term().await.unwrap();
        for step in 0..steps {
            if world.numbers.below(3) == 0 {
                let vault = world.vault().await;
                drop(vault);
                world.fuse.arm(world.numbers.next());
            }
            // A failure is the fault that was asked for; what it left behind is looked at below.
            let fuse = Arc::clone(&world.fuse);
            let result = world.step().await;
            if let Err(error) = result
                && !fuse.burnt()
                && !world.fuse.burnt()
                && !matches!(
                    error.reason,
                    Reason::VolumeNotFound | Reason::BaseNotHead | Reason::IntervalConflict
                )
            {
                panic!("step {step}: {} {error}", error.reason);
            }
            if world.fuse.burnt() || step % 8 == 0 {
                if world.numbers.below(2) == 0 {
                    // Before anything else is put: what the answer rested on has to be durable by itself.
                    world.fuse.blow();
                }
                world.check().await;
                world.start_term().await.unwrap();
            }
        }
        world.check().await;
        world.scrub().await;
        (world.commits, world.lost)
    })
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_happens_every_visible_generation_is_the_image_that_was_cut() {
    let steps = setting("TIDEMARK_MODEL_STEPS").unwrap_or(400);
    let (mut commits, mut lost) = (0, 0);
    let seeds: Vec<u64> = match setting("TIDEMARK_MODEL_SEED") {
        Some(seed) => vec![seed],
        None => (0..setting("TIDEMARK_MODEL_RUNS").unwrap_or(8)).collect(),
    };
    for seed in &seeds {
        let (committed, taken) = run(*seed, steps);
        commits += committed;
        lost += taken;
    }
    assert!(
        commits >= steps * seeds.len() as u64 / 10,
        "only {commits} commits: the test tests little"
    );
    assert!(
        lost >= steps * seeds.len() as u64 / 400,
        "only {lost} objects lost: the test tests little"
    );
}
