//! A capture on the simulated disk, and short ways to use it.

use std::{cell::Cell, sync::Arc};

use capture_core::engine::{
    capture::{Capture, CaptureError, Tuning},
    cut::Purpose,
    read::SnapshotRead,
    recover::{EPOCHS_RESERVED, Outcome},
    spool::SpoolLimits,
    trust::Judgement,
    write::{Change, Step, WriteOp},
};
use tidemark_block::{BlockIndex, BlockSet, BlockSize, Extent, Geometry, VolumeId};

use crate::sim::Sim;

pub(crate) const BLOCK: usize = 4096;
pub(crate) const BLOCKS: u64 = 16;
pub(crate) const REGION_BLOCKS: u64 = 4;

thread_local! {
    /// What the simulated disk decides where it may: whether an interrupted operation took effect, say.
    pub(crate) static SEED: Cell<u64> = const { Cell::new(0) };
}

pub(crate) struct Bench {
    pub(crate) sim: Sim,
    pub(crate) tuning: Tuning,
    pub(crate) limit: u64,
    pub(crate) capture: Capture<Sim>,
}

pub(crate) fn geometry() -> Geometry {
    Geometry::new(BLOCKS * BLOCK as u64, BlockSize::MIN).unwrap()
}

pub(crate) fn volume() -> VolumeId {
    VolumeId::from_bytes([1; 16])
}

pub(crate) fn extent(start: u64, count: u64) -> Extent {
    Extent::between(BlockIndex::new(start), BlockIndex::new(start + count))
}

pub(crate) fn blocks(set: &BlockSet) -> Vec<u64> {
    set.extents()
        .flat_map(Extent::iter)
        .map(BlockIndex::get)
        .collect()
}

pub(crate) fn bytes(byte: u8) -> &'static [u8] {
    Box::leak(vec![byte; BLOCK].into_boxed_slice())
}

pub(crate) fn snapshot() -> Purpose {
    Purpose::Snapshot {
        label: String::new(),
        time_ms: 0,
    }
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Tuning)) -> Self {
        let mut tuning = Tuning {
            region_bytes: REGION_BLOCKS * BLOCK as u64,
            stripe_blocks: 1,
            spool: SpoolLimits {
                entries_max: 64,
                slots_max: 64,
            },
            hot_regions_max: 0,
            snapshots_max: 8,
            changes_max: 4,
        };
        change(&mut tuning);
        let sim = Sim::new(SEED.get(), volume(), geometry(), BLOCKS / REGION_BLOCKS, 64);
        Self::recovered(sim, tuning, Judgement::Exact { clean: true }, 1)
            .unwrap()
            .0
    }

    pub(crate) fn recovered(
        sim: Sim,
        tuning: Tuning,
        judgement: Judgement,
        limit: u64,
    ) -> Result<(Self, Outcome), CaptureError> {
        let (capture, outcome) =
            Capture::recover(sim.clone(), volume(), geometry(), tuning, judgement, limit)?;
        capture.confirm();
        let limit = capture.epoch() + EPOCHS_RESERVED;
        Ok((
            Self {
                sim,
                tuning,
                limit,
                capture,
            },
            outcome,
        ))
    }

    pub(crate) fn reopen(self, power: bool) -> (Self, Outcome) {
        let judgement = if power {
            self.sim.restart_machine();
            Judgement::PowerLoss
        } else {
            self.sim.restart_process();
            Judgement::Exact { clean: false }
        };
        Self::recovered(self.sim, self.tuning, judgement, self.limit).unwrap()
    }

    pub(crate) fn op(&self, block: u64, change: Change<'static>) -> WriteOp<'static> {
        let epoch = self.capture.enter().unwrap();
        WriteOp::new(&self.capture, epoch, block * BLOCK as u64, change)
    }

    pub(crate) fn step(&self, op: &mut WriteOp<'_>) -> Result<Step, CaptureError> {
        op.step(&self.capture, &mut [0; BLOCK])
    }

    /// Steps until the next one writes to the volume.
    pub(crate) fn run_up_to_the_write(&self, op: &mut WriteOp<'_>) {
        while op.about_to_write(&self.capture).is_empty() {
            self.step(op).unwrap();
        }
    }

    pub(crate) fn finish(&self, mut op: WriteOp<'_>) -> Result<(), CaptureError> {
        let result = loop {
            match self.step(&mut op) {
                Ok(Step::Done) => break Ok(()),
                Ok(Step::AwaitSpool) => {
                    self.capture.relieve()?;
                }
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        };
        self.capture.exit(op.epoch());
        result
    }

    pub(crate) fn try_write(&self, block: u64, byte: u8) -> Result<(), CaptureError> {
        let epoch = self.capture.enter()?;
        let op = WriteOp::new(
            &self.capture,
            epoch,
            block * BLOCK as u64,
            Change::Data(bytes(byte)),
        );
        self.finish(op)
    }

    pub(crate) fn write(&self, block: u64, byte: u8) {
        self.try_write(block, byte).unwrap();
    }

    pub(crate) fn try_cut(&self, purpose: Purpose) -> Result<u64, CaptureError> {
        let cut = self.capture.begin_cut(purpose)?;
        let epoch = cut.epoch();
        self.capture.finish_cut(cut)?;
        Ok(epoch)
    }

    pub(crate) fn cut(&self, purpose: Purpose) -> u64 {
        self.try_cut(purpose).unwrap()
    }

    pub(crate) fn read_block(&self, cut: u64, block: u64) -> Vec<u8> {
        let view = self.capture.open_cut(cut).unwrap();
        let mut buffer = vec![0xAA; BLOCK];
        let mut read = SnapshotRead::new(Arc::clone(&view), extent(block, 1));
        read.before_images(&self.capture, &mut buffer).unwrap();
        read.live(&self.capture, &mut buffer).unwrap();
        read.recheck(&self.capture, &mut buffer).unwrap();
        self.capture.close_view(&view);
        buffer
    }

    /// The byte that fills a block.
    pub(crate) fn read(&self, cut: u64, block: u64) -> u8 {
        let buffer = self.read_block(cut, block);
        assert!(buffer.iter().all(|byte| *byte == buffer[0]));
        buffer[0]
    }

    /// The whole image at a cut.
    pub(crate) fn image(&self, cut: u64) -> Vec<u8> {
        let blocks = 0..BLOCKS;
        blocks
            .flat_map(|block| self.read_block(cut, block))
            .collect()
    }

    pub(crate) fn tracked(&self) -> Vec<u64> {
        blocks(&self.capture.tracked(geometry().all()))
    }

    pub(crate) fn differing(&self, base: &[u8]) -> Vec<u64> {
        let now = self.sim.volume();
        let differs = |n: &u64| {
            let at = usize::try_from(*n).unwrap() * BLOCK;
            now[at..at + BLOCK] != base[at..at + BLOCK]
        };
        (0..BLOCKS).filter(differs).collect()
    }

    pub(crate) fn assert_superset_of(&self, base: &[u8]) {
        let tracked = self.tracked();
        for block in self.differing(base) {
            assert!(
                tracked.contains(&block),
                "block {block} differs from the base"
            );
        }
    }
}
