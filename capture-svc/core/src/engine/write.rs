//! A request that changes the volume, as a machine of small steps.
//!
//! The order of the steps is the order of `docs/CRASH-RULES.md`: intent durable, lock, before-images, dirty bits,
//! volume. A large request goes region by region, so that no lock is held for long.

use tidemark_block::{BlockIndex, Extent};

use super::{
    capture::{Capture, CaptureError, parity},
    intent::Batch,
    media::Media,
    spool::SpoolError,
};
use crate::sync::atomic::Ordering::SeqCst;

/// What is to be written.
#[derive(Debug, Clone, Copy)]
pub enum Change<'d> {
    /// These bytes.
    Data(&'d [u8]),
    /// Zeroes, as many bytes.
    Zeroes {
        /// Bytes.
        length: u64,
        /// The range must stay allocated.
        allocated: bool,
    },
    /// Nothing that matters any more: whole blocks may become zeroes.
    Trim {
        /// Bytes.
        length: u64,
    },
}

impl Change<'_> {
    const fn length(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeroes { length, .. } | Self::Trim { length } => *length,
        }
    }
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Step again.
    Again,
    /// A group commit of the intent map has ended: those who wait for one may look again. Step again.
    IntentCommitted,
    /// Wait until the region with this number is durable or the leader has ended, then step again.
    AwaitIntent(u64),
    /// The locks were not to be had; step again later.
    AwaitLock,
    /// The spool is full: make room or wait for it, then step again.
    AwaitSpool,
    /// All is written.
    Done,
}

enum State {
    Region,
    Intent,
    LeadWrite(Batch),
    LeadSync(Batch),
    Lock,
    Copy,
    Mark,
    Write,
}

/// A request under way. Its epoch is exited by its owner.
pub struct WriteOp<'d> {
    epoch: u64,
    change: Change<'d>,
    /// First byte of the request.
    offset: u64,
    /// First byte of this step, and the first after it.
    at: u64,
    until: u64,
    end: u64,
    state: State,
    /// Blocks of this step that a TRIM leaves alone, by position in the step.
    kept: [u64; KEPT_WORDS],
}

/// A step has at most 1 MiB of blocks of at least 4 KiB.
const KEPT_WORDS: usize = 4;

impl std::fmt::Debug for WriteOp<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteOp")
            .field("epoch", &self.epoch)
            .field("at", &self.at)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl<'d> WriteOp<'d> {
    /// A request that has entered with `epoch`. The range lies within the volume.
    pub fn new<M: Media>(
        capture: &Capture<M>,
        epoch: u64,
        offset: u64,
        change: Change<'d>,
    ) -> Self {
        let (mut at, mut end) = (offset, offset + change.length());
        if let Change::Trim { length } = change {
            let whole = capture.geometry.contained(offset, length);
            at = capture.geometry.offset_of(whole.start()).get();
            end = at + capture.geometry.bytes(whole.count());
        }
        Self {
            epoch,
            change,
            offset,
            at,
            until: at,
            end,
            state: State::Region,
            kept: [0; KEPT_WORDS],
        }
    }

    /// The epoch the request entered with.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The blocks that the next step writes to the volume; none if it doesn't.
    pub fn about_to_write<M: Media>(&self, capture: &Capture<M>) -> Vec<Extent> {
        match self.state {
            State::Write => self.runs(capture).collect(),
            _ => Vec::new(),
        }
    }

    /// Does one step. `scratch` has the length of a block.
    ///
    /// # Errors
    /// What the medium says, or that work is refused. The request has ended; its blocks stay dirty.
    pub fn step<M: Media>(
        &mut self,
        capture: &Capture<M>,
        scratch: &mut [u8],
    ) -> Result<Step, CaptureError> {
        let locked = matches!(self.state, State::Copy | State::Mark | State::Write);
        let result = self.step_inner(capture, scratch);
        if locked && result.is_err() {
            self.unlock(capture);
        }
        result
    }

    fn step_inner<M: Media>(
        &mut self,
        capture: &Capture<M>,
        scratch: &mut [u8],
    ) -> Result<Step, CaptureError> {
        match std::mem::replace(&mut self.state, State::Region) {
            State::Region => Ok(self.region(capture)),
            State::Intent => self.intent(capture),
            State::LeadWrite(batch) => {
                let written = batch
                    .pages()
                    .try_for_each(|(place, page)| capture.media.write_intent(place, &page[..]));
                if let Err(error) = written {
                    return Err(fail_intent(capture, batch, error.into()));
                }
                self.state = State::LeadSync(batch);
                Ok(Step::Again)
            }
            State::LeadSync(batch) => {
                if let Err(error) = capture.media.sync_intent() {
                    return Err(fail_intent(capture, batch, error.into()));
                }
                capture.intent.complete(batch, true);
                self.state = State::Intent;
                Ok(Step::IntentCommitted)
            }
            State::Lock => {
                let (first, last) = self.stripes(capture);
                if !capture.media.lock(first, last) {
                    self.state = State::Lock;
                    return Ok(Step::AwaitLock);
                }
                self.state = State::Copy;
                Ok(Step::Again)
            }
            State::Copy => self.copy(capture, scratch),
            State::Mark => self.mark(capture),
            State::Write => self.write(capture),
        }
    }

    /// Chooses the next step's bytes, all of one region.
    fn region<M: Media>(&mut self, capture: &Capture<M>) -> Step {
        if self.at >= self.end {
            return Step::Done;
        }
        let size = capture.tuning.region_bytes;
        let region = self.at / size;
        self.until = self.end.min((region + 1) * size);
        // The epoch first, then the bit: the clearer looks at them in the other order.
        capture.intent.announce(region, self.epoch);
        self.state = State::Intent;
        Step::Again
    }

    fn intent<M: Media>(&mut self, capture: &Capture<M>) -> Result<Step, CaptureError> {
        let region = self.at / capture.tuning.region_bytes;
        if capture.intent.is_durable(region) {
            self.state = State::Lock;
            return Ok(Step::Again);
        }
        capture.check()?;
        if let Some(batch) = capture.intent.want(region) {
            self.state = State::LeadWrite(batch);
            return Ok(Step::Again);
        }
        self.state = State::Intent;
        Ok(if capture.intent.is_durable(region) {
            Step::Again
        } else {
            Step::AwaitIntent(region)
        })
    }

    fn blocks<M: Media>(&self, capture: &Capture<M>) -> Extent {
        capture.geometry.covering(self.at, self.until - self.at)
    }

    fn stripes<M: Media>(&self, capture: &Capture<M>) -> (u64, u64) {
        let blocks = self.blocks(capture);
        let size = capture.tuning.stripe_blocks;
        (blocks.start().get() / size, (blocks.end().get() - 1) / size)
    }

    fn unlock<M: Media>(&self, capture: &Capture<M>) {
        let (first, last) = self.stripes(capture);
        capture.media.unlock(first, last);
    }

    /// Stores what open cuts need of the blocks; of a TRIM's blocks it lets those alone.
    fn copy<M: Media>(
        &mut self,
        capture: &Capture<M>,
        scratch: &mut [u8],
    ) -> Result<Step, CaptureError> {
        self.kept = [0; KEPT_WORDS];
        let cut = capture.cut_before[parity(self.epoch)].load(SeqCst);
        // The engine may have been stopped since the request entered: then memory no longer tells what is kept. Asked
        // after the cut, which is taken back only after the stop.
        capture.check()?;
        if cut != 0 {
            let dirty = capture.dirty(self.epoch);
            for (n, block) in self.blocks(capture).iter().enumerate() {
                if dirty.contains(block) || capture.spool.has_after(block, cut) {
                    continue;
                }
                if matches!(self.change, Change::Trim { .. }) {
                    self.kept[n / 64] |= 1 << (n % 64);
                    capture.counters.trims_ignored.fetch_add(1, SeqCst);
                    continue;
                }
                match copy_block(capture, block, self.epoch, scratch) {
                    // Dirty at once, even if this request fails or has to wait now: a request of the closing epoch
                    // may write to the block next, and what it writes is not in the image of the cut any more.
                    Ok(()) => self.set_dirty(capture, Extent::between(block, block.next())),
                    Err(SpoolError::Full) => {
                        self.unlock(capture);
                        self.state = State::Lock;
                        return Ok(Step::AwaitSpool);
                    }
                    Err(SpoolError::Damaged) => {
                        return Err(CaptureError::SpoolDamaged(block.get()));
                    }
                    Err(SpoolError::Media(error)) => return Err(error.into()),
                }
            }
        }
        self.state = State::Mark;
        Ok(Step::Again)
    }

    /// The runs of blocks that are written, as extents.
    fn runs<M: Media>(&self, capture: &Capture<M>) -> impl Iterator<Item = Extent> + use<M> {
        let blocks = self.blocks(capture);
        let kept = self.kept;
        let end = blocks.count().get();
        let is_kept = move |n: u64| {
            usize::try_from(n / 64)
                .is_ok_and(|word| kept[word.min(KEPT_WORDS - 1)] >> (n % 64) & 1 == 1)
        };
        let any = kept != [0; KEPT_WORDS];
        let mut at = 0;
        std::iter::from_fn(move || {
            if !any && at < end {
                at = end;
                return Some(blocks);
            }
            let start = (at..end).find(|&n| !is_kept(n))?;
            at = (start..end).find(|&n| is_kept(n)).unwrap_or(end);
            let block = |n| BlockIndex::new(blocks.start().get() + n);
            Some(Extent::between(block(start), block(at)))
        })
    }

    fn mark<M: Media>(&mut self, capture: &Capture<M>) -> Result<Step, CaptureError> {
        for run in self.runs(capture) {
            self.set_dirty(capture, run);
            capture.ring.invalidate(capture.ring_words(), run);
        }
        capture.media.instant()?;
        self.state = State::Write;
        Ok(Step::Again)
    }

    fn set_dirty<M: Media>(&self, capture: &Capture<M>, run: Extent) {
        let fresh = capture.dirty(self.epoch).insert(run);
        if fresh != 0 {
            capture.dirty_count[parity(self.epoch)].fetch_add(fresh, SeqCst);
        }
    }

    fn write<M: Media>(&mut self, capture: &Capture<M>) -> Result<Step, CaptureError> {
        match self.change {
            Change::Data(data) => {
                #[allow(clippy::cast_possible_truncation, reason = "positions in a slice")]
                let data =
                    &data[(self.at - self.offset) as usize..(self.until - self.offset) as usize];
                capture.media.write_volume(self.at, data)?;
                self.record(capture, data);
            }
            Change::Zeroes { allocated, .. } => {
                capture
                    .media
                    .zero_volume(self.at, self.until - self.at, allocated)?;
            }
            Change::Trim { .. } => {
                for run in self.runs(capture) {
                    let offset = capture.geometry.offset_of(run.start()).get();
                    capture.media.zero_volume(
                        offset,
                        capture.geometry.bytes(run.count()),
                        false,
                    )?;
                }
            }
        }
        self.unlock(capture);
        self.at = self.until;
        Ok(Step::Again)
    }

    /// Records one whole block of what was written.
    fn record<M: Media>(&self, capture: &Capture<M>, data: &[u8]) {
        let whole = capture.geometry.contained(self.at, data.len() as u64);
        if !whole.is_empty() {
            let from = capture.geometry.offset_of(whole.start()).get() - self.at;
            if let Ok(from) = usize::try_from(from) {
                let size = capture.geometry.block_size().as_usize();
                capture.ring.record(
                    capture.ring_words(),
                    whole.start(),
                    &data[from..from + size],
                );
            }
        }
    }
}

fn fail_intent<M: Media>(capture: &Capture<M>, batch: Batch, error: CaptureError) -> CaptureError {
    capture.fail();
    capture.intent.complete(batch, false);
    error
}

fn copy_block<M: Media>(
    capture: &Capture<M>,
    block: BlockIndex,
    epoch: u64,
    scratch: &mut [u8],
) -> Result<(), SpoolError> {
    capture
        .media
        .read_volume(capture.geometry.offset_of(block).get(), scratch)?;
    let (spool, media) = (&capture.spool, &capture.media);
    spool.store(media, block, epoch, scratch, || capture.open_cuts())?;
    capture.counters.copied.fetch_add(1, SeqCst);
    Ok(())
}
