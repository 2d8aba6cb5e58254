//! The capture side's state machine: opens a volume on arbitrary files, then writes, cuts, reads and reopens.
//!
//! Where nothing was tampered with, the tracked blocks are a superset of those that differ from the last committed
//! image, and a cut reads as the image of its moment. Where it was, opening must not panic, and whatever it takes up
//! must be within the volume.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use capture_core::engine::{
    capture::{Capture, CaptureError, Tuning},
    cut::Purpose,
    intent::PAGE_LEN,
    media::{Map, Media, Record},
    read::SnapshotRead,
    records::{CARRY_MAGIC, CHANGES_MAGIC, CUT_MAGIC, SNAPSHOTS_MAGIC},
    recover::EPOCHS_RESERVED,
    spool::SpoolLimits,
    trust::Judgement,
    write::{Change, Step, WriteOp},
};
use tidemark_block::{BlockIndex, BlockSize, Extent, Geometry, VolumeId, wire};

use crate::input::Input;

#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "the simulated disk of the model tests"
)]
#[path = "../../../capture-svc/core/tests/it/sim.rs"]
mod sim;

use sim::Sim;

const BLOCKS: u64 = 16;
const REGION_BLOCKS: u64 = 4;
const BLOCK: usize = 4096;
const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const SET_MAGIC: [u8; 8] = *b"TMBLKSET";

const TUNING: Tuning = Tuning {
    region_bytes: REGION_BLOCKS * BLOCK as u64,
    stripe_blocks: 1,
    spool: SpoolLimits {
        entries_max: 16,
        slots_max: 8,
    },
    hot_regions_max: 1,
    snapshots_max: 3,
    changes_max: 2,
};

fn geometry() -> Geometry {
    Geometry::new(BLOCKS * BLOCK as u64, BlockSize::MIN).expect("blocks of 4 KiB")
}

/// The first byte of each block.
type Image = [u8; 16];

struct Bench {
    sim: Sim,
    capture: Capture<Sim>,
    limit: u64,
    /// As written.
    now: Image,
    /// The last committed image.
    base: Image,
    /// The open interval's cut and image.
    cut: Option<(u64, Image)>,
    tampered: bool,
}

fn open(sim: &Sim, judgement: Judgement, limit: u64) -> Result<Capture<Sim>, CaptureError> {
    let (capture, _) = Capture::recover(sim.clone(), VOLUME, geometry(), TUNING, judgement, limit)?;
    capture.confirm();
    Ok(capture)
}

impl Bench {
    fn new(seed: u64) -> Self {
        let sim = Sim::new(seed, VOLUME, geometry(), BLOCKS / REGION_BLOCKS, 16);
        let capture =
            open(&sim, Judgement::Exact { clean: true }, 1).expect("an empty state opens");
        let limit = capture.epoch() + EPOCHS_RESERVED;
        Self {
            sim,
            capture,
            limit,
            now: [0; _],
            base: [0; _],
            cut: None,
            tampered: false,
        }
    }

    fn write(&mut self, block: u64, count: u64, byte: u8, kind: u64) {
        let count = count.min(BLOCKS - block);
        let length = count * BLOCK as u64;
        let data = vec![byte; usize::try_from(length).expect("small")];
        let change = match kind {
            0 => Change::Zeroes {
                length,
                allocated: false,
            },
            _ => Change::Data(&data),
        };
        let byte = if kind == 0 { 0 } else { byte };
        let Ok(epoch) = self.capture.enter() else {
            return;
        };
        let mut op = WriteOp::new(&self.capture, epoch, block * BLOCK as u64, change);
        let mut steps = 0;
        let result = loop {
            steps += 1;
            assert!(steps < 10_000, "a write comes to an end");
            match op.step(&self.capture, &mut [0; BLOCK]) {
                Ok(Step::Done) => break Ok(()),
                Ok(Step::AwaitSpool) => match self.capture.relieve() {
                    Ok(given_up) => self.forget(&given_up),
                    Err(error) => break Err(error),
                },
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        };
        self.capture.exit(epoch);
        if result.is_ok() {
            for n in block..block + count {
                self.now[place(n)] = byte;
            }
        } else {
            assert!(
                self.tampered,
                "a write fails only where the state was damaged: {result:?}"
            );
        }
    }

    fn forget(&mut self, given_up: &[u64]) {
        if self.cut.is_some_and(|(cut, _)| given_up.contains(&cut)) {
            self.cut = None;
        }
    }

    fn cut(&mut self, purpose: Purpose) {
        let interval = purpose == Purpose::Interval;
        if let Ok(cut) = self.capture.begin_cut(purpose) {
            let epoch = cut.epoch();
            if self.capture.finish_cut(cut).is_ok() && interval {
                self.cut = Some((epoch, self.now));
            }
        }
    }

    fn commit(&mut self) {
        if let Some((cut, image)) = self.cut.take()
            && self.capture.commit_interval(cut).is_ok()
        {
            self.base = image;
        }
    }

    fn read(&self, cut: u64, block: u64) -> Option<u8> {
        let view = self.capture.open_cut(cut)?;
        let one = Extent::between(BlockIndex::new(block), BlockIndex::new(block + 1));
        let mut buffer = vec![0xAA; BLOCK];
        let mut read = SnapshotRead::new(Arc::clone(&view), one);
        let done = read
            .before_images(&self.capture, &mut buffer)
            .and_then(|()| read.live(&self.capture, &mut buffer))
            .and_then(|()| read.recheck(&self.capture, &mut buffer));
        self.capture.close_view(&view);
        done.ok().map(|_| buffer[0])
    }

    /// Replaces something of the state by the fuzzer's bytes.
    fn tamper(&mut self, input: &mut Input<'_>) {
        self.tampered = true;
        let kind = input.u8() % 8;
        let length = usize::from(input.u8());
        let bytes = input.bytes(length);
        let sealed = |magic, version, fields: &[&[u8]]| {
            let payload = [&[&VOLUME.as_bytes()[..]], fields].concat().concat();
            wire::seal(magic, version, &payload)
        };
        // Fields, and a set behind them.
        let set_of = |magic, version, head: usize| {
            let (head, set) = bytes.split_at(bytes.len().min(head));
            sealed(magic, version, &[head, &wire::seal(SET_MAGIC, 1, set)])
        };
        let content = match kind {
            0 => Some((Record::Carry, set_of(CARRY_MAGIC, 2, 0))),
            1 => Some((Record::Interval, set_of(CUT_MAGIC, 2, 8))),
            2 => Some((Record::Snapshots, sealed(SNAPSHOTS_MAGIC, 2, &[bytes]))),
            3 => Some((
                Record::Changes(u64::from(input.u8())),
                set_of(CHANGES_MAGIC, 1, 16),
            )),
            _ => None,
        };
        if let Some((record, content)) = content {
            let _failed = self.sim.put(record, Some(&content));
            return;
        }
        if kind == 4 {
            let mut page = vec![0; PAGE_LEN];
            page[..bytes.len()].copy_from_slice(bytes);
            let _failed = self.sim.write_intent(u64::from(input.u8() & 1), &page);
            let _failed = self.sim.sync_intent();
            return;
        }
        let map = [Map::Tracking, Map::Dirty(0), Map::Slots][usize::from(kind) - 5];
        let words = self.sim.words(map);
        let from = usize::from(input.u16()) % words.len();
        for (word, bytes) in words[from..].iter().zip(bytes.chunks(8)) {
            let mut wide = [0; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(wide), SeqCst);
        }
    }

    /// Ends the process, or the power, and opens again; false where that isn't possible.
    fn reopen(&mut self, power: bool) -> bool {
        let judgement = if power {
            self.sim.restart_machine();
            Judgement::PowerLoss
        } else {
            self.sim.restart_process();
            Judgement::Exact { clean: false }
        };
        match open(&self.sim, judgement, self.limit) {
            Ok(capture) => self.capture = capture,
            Err(error) => {
                assert!(self.tampered, "an undamaged state opens: {error}");
                return false;
            }
        }
        self.limit = self
            .limit
            .max(self.capture.epoch().saturating_add(EPOCHS_RESERVED));
        let volume = self.sim.volume();
        for (place, block) in self.now.iter_mut().zip(volume.chunks(BLOCK)) {
            *place = block[0];
        }
        let open = self.capture.open_interval().map(|interval| interval.cut);
        if self.cut.is_some_and(|(cut, _)| open != Some(cut)) {
            self.cut = None;
        }
        true
    }

    fn check(&self) {
        let all = geometry().all();
        let tracked = self.capture.tracked(all);
        assert_eq!(tracked.intersect_extent(all), tracked);
        let _shown = (
            self.capture.snapshots(),
            self.capture.changed_bound(),
            self.capture.spool().used(),
        );
        if self.tampered {
            if let Some(interval) = self.capture.open_interval() {
                for block in 0..BLOCKS {
                    let _given_up = self.read(interval.cut, block);
                }
            }
            return;
        }
        for block in 0..BLOCKS {
            let differs = self.now[place(block)] != self.base[place(block)];
            let index = BlockIndex::new(block);
            assert!(
                !differs || tracked.contains(index),
                "block {block} differs from the base"
            );
            if let Some((cut, image)) = self.cut
                && let Some(found) = self.read(cut, block)
            {
                assert_eq!(found, image[place(block)], "block {block} as of the cut");
            }
        }
    }
}

fn place(block: u64) -> usize {
    usize::try_from(block).expect("small")
}

/// A volume's life.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut bench = Bench::new(u64::from(input.u8()));
    for _ in 0..24 {
        if input.is_empty() {
            break;
        }
        match input.u8() % 10 {
            0..=2 => {
                let (block, count) = (input.below(BLOCKS), 1 + input.below(3));
                let (byte, kind) = (input.u8(), input.below(4));
                bench.write(block, count, byte, kind);
            }
            3 => bench.cut(Purpose::Interval),
            4 => bench.cut(Purpose::Snapshot {
                label: "s".to_owned(),
                time_ms: 1,
            }),
            5 => bench.commit(),
            6 => {
                let _failed = bench.capture.sync();
            }
            7 => {
                let id = u64::from(input.u8() % 4);
                let _unknown = bench.capture.delete_snapshot(id);
            }
            8 => {
                let power = input.flag();
                if !bench.reopen(power) {
                    return;
                }
            }
            _ => {
                bench.tamper(&mut input);
                if !bench.reopen(false) {
                    return;
                }
            }
        }
    }
    bench.check();
}
