//! A capture on the medium in memory, driven as the service's threads drive it, with every answer checked against the
//! history.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use capture_core::engine::{
    capture::{Capture, CaptureError, Tuning},
    cut::{Cut, Purpose},
    group::begin_cuts,
    media::Record,
    recover::Outcome,
    spool::SpoolLimits,
    trust::Judgement,
    write::{Change, Step, WriteOp},
};
use parking_lot::{Mutex, MutexGuard};
use shuttle::{
    rand::{Rng, thread_rng},
    thread::yield_now,
};
use tidemark_block::Extent;

use crate::{
    BLOCK, BLOCKS, REGION_BLOCKS,
    chunks::{CHUNK, CHUNKS, Image, fill, index},
    geometry,
    history::{Flip, History, Kind, Number, Time},
    memory::{Memory, Puts},
    volume,
};

/// What happens when the spool is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    GiveUp,
    Stall,
}

/// What one scenario differs in from another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting {
    pub(crate) policy: Policy,
    pub(crate) slots: u64,
    pub(crate) entries: u64,
    pub(crate) stripe_blocks: u64,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            policy: Policy::Stall,
            slots: 4 * BLOCKS,
            entries: 4 * BLOCKS,
            stripe_blocks: 1,
        }
    }
}

/// The vault's newest generation.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    pub(crate) image: Image,
    pub(crate) generation: u64,
}

/// A snapshot that was confirmed, and whose deletion nobody has asked for.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) flip: Flip,
    /// What it was when it was first read.
    pub(crate) image: Option<Image>,
}

/// A volume's capture. What stands in a lock of `parking_lot` is never held at a scheduling point.
pub(crate) struct Rig {
    pub(crate) capture: Capture<Memory>,
    setting: Setting,
    history: Mutex<History>,
    pub(crate) base: Mutex<Base>,
    pub(crate) snapshots: Mutex<BTreeMap<u64, Known>>,
    /// All cuts that were begun.
    pub(crate) flips: Mutex<Vec<Flip>>,
    /// One cut after the other.
    cutting: shuttle::sync::Mutex<()>,
    /// One makes room, the others wait for it.
    relieving: shuttle::sync::Mutex<()>,
    /// Nobody will make room any more: who waits for it is refused.
    closed: AtomicBool,
    /// The capture is closed, or about to be.
    sealed: AtomicBool,
}

impl Setting {
    fn tuning(self) -> Tuning {
        Tuning {
            region_bytes: REGION_BLOCKS * BLOCK as u64,
            stripe_blocks: self.stripe_blocks,
            spool: SpoolLimits {
                entries_max: self.entries,
                slots_max: self.slots,
            },
            hot_regions_max: 0,
            snapshots_max: 8,
            changes_max: 2,
        }
    }

    pub(crate) fn recover(
        self,
        memory: Memory,
        judgement: Judgement,
        limit: u64,
    ) -> (Capture<Memory>, Outcome) {
        let (capture, outcome) = Capture::recover(
            memory,
            volume(),
            geometry(),
            self.tuning(),
            judgement,
            limit,
        )
        .unwrap();
        capture.confirm();
        (capture, outcome)
    }
}

impl Rig {
    pub(crate) fn new(setting: Setting) -> Self {
        let memory = Memory::new(setting.entries, setting.slots);
        let judgement = Judgement::Exact { clean: true };
        let (capture, outcome) = setting.recover(memory, judgement, 1);
        // Nothing is in doubt: what is tracked from here on was found to have changed.
        assert_eq!((outcome, capture.take_damage()), (Outcome::Clean, vec![]));
        assert_eq!(capture.intent().set_regions(), []);
        let history = History::new();
        let base = Base {
            image: history.content(),
            generation: 0,
        };
        Self::over(capture, setting, history, base)
    }

    pub(crate) fn over(
        capture: Capture<Memory>,
        setting: Setting,
        history: History,
        base: Base,
    ) -> Self {
        Self {
            capture,
            setting,
            history: Mutex::new(history),
            base: Mutex::new(base),
            snapshots: Mutex::default(),
            flips: Mutex::default(),
            cutting: shuttle::sync::Mutex::new(()),
            relieving: shuttle::sync::Mutex::new(()),
            closed: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
        }
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock()
    }

    fn tick(&self) -> Time {
        self.history().tick()
    }

    /// Whether an answer may be that a cut was given up.
    pub(crate) fn may_be_given_up(&self) -> bool {
        self.setting.policy == Policy::GiveUp
    }

    /// Whether it was done; else it failed as the scenario lets it fail.
    pub(crate) fn accept<T>(&self, result: Result<T, CaptureError>) -> Option<T> {
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        let puts = *self.capture.media().puts.lock();
        let expected = match error {
            CaptureError::Media(_) => puts != Puts::Succeed,
            CaptureError::Poisoned => {
                matches!(puts, Puts::EndUnknown(_) | Puts::EndUnknownOfInterval)
            }
            // The record that none is open found no room: the last one still is.
            CaptureError::IntervalOpen(_) => matches!(puts, Puts::FindNoRoom(_)),
            CaptureError::GivenUp(_) | CaptureError::NoInterval(_) => self.may_be_given_up(),
            CaptureError::Closed => self.sealed.load(Relaxed),
            _ => false,
        };
        assert!(expected, "{error}");
        None
    }

    /// Writes to so many chunks from the first on. False where it was refused.
    pub(crate) fn request(&self, kind: Kind, first: u64, count: u64) -> bool {
        let number = self.history().begin(kind, first, first + count);
        let Some(epoch) = self.accept(self.capture.enter()) else {
            return false;
        };
        self.history().entered(number, epoch);
        let length = count * CHUNK as u64;
        let mut data = Vec::new();
        let change = match kind {
            Kind::Data => {
                data.resize(index(length), 0);
                fill(&mut data, self.history().tag(number));
                Change::Data(&data)
            }
            Kind::Zeroes => Change::Zeroes {
                length,
                allocated: false,
            },
            Kind::Trim => Change::Trim { length },
        };
        let op = WriteOp::new(&self.capture, epoch, first * CHUNK as u64, change);
        let done = self.run(number, op);
        self.capture.exit(epoch);
        if done {
            self.history().ended(number);
        }
        done
    }

    /// Writes a whole block.
    pub(crate) fn write(&self, block: u64) {
        self.request(Kind::Data, block * CHUNKS as u64, CHUNKS as u64);
    }

    fn run(&self, number: Number, mut op: WriteOp<'_>) -> bool {
        let mut scratch = vec![0; BLOCK];
        loop {
            for block in op
                .about_to_write(&self.capture)
                .into_iter()
                .flat_map(Extent::iter)
            {
                self.history().write(number, block.get());
            }
            let step = op.step(&self.capture, &mut scratch);
            self.look_for_losses();
            let Some(step) = self.accept(step) else {
                return false;
            };
            match step {
                Step::Again | Step::AwaitLock | Step::IntentCommitted => {}
                Step::AwaitIntent(region) => {
                    let intent = self.capture.intent();
                    while !intent.is_durable(region) && intent.is_leading() {
                        yield_now();
                    }
                }
                Step::AwaitSpool => {
                    if !self.await_spool() {
                        return false;
                    }
                }
                Step::Done => return true,
            }
        }
    }

    /// Makes room in the spool or waits for it. False where nobody will make any.
    fn await_spool(&self) -> bool {
        if self.setting.policy == Policy::GiveUp {
            let _relieving = self.relieving.lock().unwrap();
            if !self.capture.spool().has_room() {
                self.accept(self.capture.relieve());
            }
            return true;
        }
        while !self.capture.spool().has_room() {
            if self.closed.load(Relaxed) || self.capture.is_poisoned() {
                return false;
            }
            yield_now();
        }
        true
    }

    /// From now on nobody makes room in the spool.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
    }

    /// Closes the capture, which has no request in flight: what it leaves.
    pub(crate) fn seal(&self) -> (BTreeMap<Record, Vec<u8>>, [Vec<u64>; 4]) {
        self.sealed.store(true, Relaxed);
        let _cutting = self.cutting.lock().unwrap();
        self.capture.close();
        self.capture.media().sealed()
    }

    /// Makes durable what had ended before.
    pub(crate) fn flush(&self) {
        let ended = self.history().ended_writes();
        if self.accept(self.capture.sync()).is_none() {
            return;
        }
        let synced = self.capture.media().synced();
        self.history().assert_at_least(&ended, &synced);
    }

    /// Cuts, if nothing prevents it.
    pub(crate) fn cut(&self, purpose: Purpose) -> Option<Flip> {
        self.cut_and(purpose, || {})
    }

    /// Cuts, and does something between the flip and the settle.
    pub(crate) fn cut_and(&self, purpose: Purpose, meanwhile: impl FnOnce()) -> Option<Flip> {
        let _cutting = self.cutting.lock().unwrap();
        let from = self.tick();
        let cut = self.accept(self.capture.begin_cut(purpose))?;
        let flip = self.flipped(&cut, from);
        meanwhile();
        self.accept(self.end_cut(cut))?;
        Some(flip)
    }

    fn flipped(&self, cut: &Cut, from: Time) -> Flip {
        let (epoch, to) = (cut.epoch(), self.tick());
        let flip = Flip { epoch, from, to };
        self.flips.lock().push(flip);
        flip
    }

    fn end_cut(&self, cut: Cut) -> Result<(), CaptureError> {
        while !self.capture.is_settled(cut.epoch()) {
            yield_now();
        }
        self.capture.finish_cut(cut)
    }

    /// Cuts volumes at one instant.
    pub(crate) fn cut_together(rigs: [&Self; 2], purpose: &Purpose) -> [Flip; 2] {
        let locked = rigs.map(|rig| rig.cutting.lock().unwrap());
        let from = rigs.map(Self::tick);
        let parts = rigs.map(|rig| (&rig.capture, purpose.clone()));
        let cuts = begin_cuts(parts.into()).unwrap();
        let mut flips = rigs.iter().zip(from).zip(&cuts);
        let flips = [(); 2].map(|()| {
            let ((rig, from), cut) = flips.next().unwrap();
            rig.flipped(cut, from)
        });
        for (rig, cut) in rigs.iter().zip(cuts) {
            rig.end_cut(cut).unwrap();
        }
        drop(locked);
        flips
    }
}

/// A request of any kind at random: of whole blocks or parts of them, over one block or two.
pub(crate) fn request_at_random(rig: &Rig) {
    let mut random = thread_rng();
    let kind = [Kind::Data, Kind::Data, Kind::Zeroes, Kind::Trim][random.gen_range(0..4)];
    let chunks = CHUNKS as u64;
    let first = random.gen_range(0..2) * chunks;
    let (first, count) = match random.gen_range(0..3) {
        0 => (first, chunks),
        1 => (first, 2 * chunks),
        _ => (
            first + random.gen_range(0..chunks),
            random.gen_range(1..=chunks),
        ),
    };
    rig.request(kind, first, count);
}
