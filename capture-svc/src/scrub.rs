//! The source scrub: reads clean blocks again and compares them with the checksum table.
//!
//! The comparison of image digests proves transport and vault, not tracking: a block whose change was missed leaves
//! the tables of both sides equally stale. Only reading everything again finds it. A pass goes through the whole
//! volume in a configured time, at a bounded rate. A clean block that differs is an ERROR and a count, and joins the
//! next interval.
//!
//! A block is compared only if it was clean before and after it was read, and while table and tracking are held
//! together: so a write, a cut or a commit in between never looks like a mismatch.

mod by_hand;

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tidemark_block::{
    BlockCount, BlockIndex, BlockSet, Checksum128, Extent, Geometry, TableView, block_checksum,
    digest::{leaf_extent, leaf_of},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use crate::{
    engine::Engine,
    uplink::{BaseTable, Request, blocking, now_ms, random_id, stopped},
};

/// Bytes read at a time, while table and tracking are held.
const STEP_LEN: u64 = 1 << 20;
/// The wait before the table is looked at again while it isn't sound, and between steps of a slow pass.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What a scrub is told.
#[derive(Debug, Clone)]
pub(crate) struct ScrubSettings {
    pub(crate) name: String,
    /// Of one pass; zero: none.
    pub(crate) period: Duration,
    pub(crate) bytes_per_second_max: u64,
}

/// Counts since the service started.
#[derive(Debug, Default)]
pub(crate) struct ScrubCounts {
    pub(crate) passes: AtomicU64,
    /// Of the pass under way.
    pub(crate) blocks_done: AtomicU64,
    pub(crate) mismatches: AtomicU64,
    /// Clean blocks that were compared.
    pub(crate) compared: AtomicU64,
    /// When the last pass ended, milliseconds since the Unix epoch; 0: none has.
    pub(crate) completed_ms: AtomicU64,
    /// Steps that could not be made.
    pub(crate) failures: AtomicU64,
}

impl ScrubCounts {
    fn pass_ended(&self) {
        self.passes.fetch_add(1, Ordering::Relaxed);
        self.completed_ms.store(now_ms(), Ordering::Relaxed);
    }
}

/// A volume's scrub.
#[derive(Debug)]
pub(crate) struct Scrub {
    counts: Arc<ScrubCounts>,
    worker: Arc<Worker>,
    task: parking_lot::Mutex<Option<JoinHandle<()>>>,
    /// Held by a pass that was asked for, from its first step to its last.
    by_hand: Arc<tokio::sync::Mutex<()>>,
    stop: watch::Sender<bool>,
}

impl Scrub {
    /// Scrubs from now on, until told to stop.
    pub(crate) fn start(
        settings: ScrubSettings,
        engine: Arc<Engine>,
        table: Arc<BaseTable>,
        uplink: mpsc::Sender<Request>,
        mut service_stop: watch::Receiver<bool>,
    ) -> Self {
        let counts = Arc::new(ScrubCounts::default());
        let worker = Arc::new(Worker {
            settings,
            engine,
            table,
            uplink,
            counts: Arc::clone(&counts),
        });
        let (stop, mut own_stop) = watch::channel(false);
        let running = Arc::clone(&worker);
        let task = (!running.settings.period.is_zero()).then(|| {
            tokio::spawn(running.run(async move {
                tokio::select! {
                    () = stopped(&mut service_stop) => {}
                    () = stopped(&mut own_stop) => {}
                }
            }))
        });
        Self {
            counts,
            worker,
            task: parking_lot::Mutex::new(task),
            by_hand: Arc::default(),
            stop,
        }
    }

    /// What was found so far.
    pub(crate) fn counts(&self) -> &ScrubCounts {
        &self.counts
    }

    /// Stops it and waits for the steps under way.
    pub(crate) async fn end(&self) {
        self.stop.send_replace(true);
        let task = self.task.lock().take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "a scrub failed");
        }
        drop(self.by_hand.lock().await);
    }
}

#[derive(Debug)]
struct Worker {
    settings: ScrubSettings,
    engine: Arc<Engine>,
    table: Arc<BaseTable>,
    uplink: mpsc::Sender<Request>,
    counts: Arc<ScrubCounts>,
}

/// How a step went.
#[derive(Default)]
struct Step {
    next: BlockIndex,
    bytes_read: u64,
    /// Blocks that are not clean.
    changed: BlockCount,
    mismatches: BlockCount,
}

/// What a comparison found.
struct Compared {
    /// Blocks that are not clean.
    changed: BlockCount,
    /// Clean ones that are not what the table says.
    wrong: BlockSet,
}

/// Why a step could not be made.
#[derive(Debug, thiserror::Error)]
enum LookError {
    /// The checksum table.
    #[error("read the checksum table: {0}")]
    Table(io::Error),
    /// The volume.
    #[error(transparent)]
    Volume(#[from] anyhow::Error),
}

impl Worker {
    #[tracing::instrument(name = "scrub", skip_all, fields(volume = %self.settings.name))]
    async fn run(self: Arc<Self>, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        let geometry = self.engine.geometry();
        // A service that is restarted often still sees every part.
        let mut at = random_block(geometry);
        let period = self.settings.period.as_secs_f64();
        // Bytes are counted as if read also where they are holes: the pace is that of the position.
        let needed = geometry.length() as f64 / period;
        let rate = needed
            .min(self.settings.bytes_per_second_max as f64)
            .max(1.0);
        let mut seen = 0;
        loop {
            let began = Instant::now();
            let worker = Arc::clone(&self);
            let step = blocking(move || worker.step(at)).await;
            let pause = match step {
                Ok(Some(step)) => {
                    let count = step.next.since(at);
                    seen += count.get();
                    self.counts.blocks_done.store(seen, Ordering::Relaxed);
                    at = step.next;
                    if at == geometry.all().end() {
                        at = BlockIndex::ZERO;
                    }
                    if seen >= geometry.block_count().get() {
                        seen = 0;
                        self.counts.pass_ended();
                    }
                    let bytes = step.bytes_read.max(geometry.bytes(count).min(STEP_LEN));
                    let due = Duration::from_secs_f64(bytes as f64 / rate);
                    due.saturating_sub(began.elapsed())
                }
                Ok(None) => PAUSE_MAX,
                Err(error) => {
                    tracing::error!(error = %format!("{error:#}"), block = %at, "read the volume for the scrub");
                    at = Extent::new(at, BlockCount::new(1)).end();
                    if at >= geometry.all().end() {
                        at = BlockIndex::ZERO;
                    }
                    PAUSE_MAX
                }
            };
            // Only between two steps: whoever ends the scrub closes the engine next.
            tokio::select! {
                biased;
                () = &mut stop => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Compares the blocks from `at` on, at most [`STEP_LEN`] bytes of data or any number of holes. None while there
    /// is nothing to compare with.
    fn step(&self, at: BlockIndex) -> Result<Option<Step>> {
        match self.look(at) {
            Err(LookError::Table(error)) if self.table.failed(&error) => {
                self.ask_for_repair();
                Ok(None)
            }
            Err(error) => {
                self.counts.failures.fetch_add(1, Ordering::Relaxed);
                Err(error.into())
            }
            Ok(step) => {
                if let Some(step) = &step {
                    let compared = step.next.since(at).get() - step.changed.get();
                    self.counts.compared.fetch_add(compared, Ordering::Relaxed);
                }
                Ok(step)
            }
        }
    }

    /// As [`Self::step`], where the table can be read.
    fn look(&self, at: BlockIndex) -> Result<Option<Step>, LookError> {
        let geometry = self.engine.geometry();
        let rest = Extent::between(at, geometry.all().end());
        let (extent, table_is_whole, compared) = {
            let Some(_steady) = self.table.steady() else {
                return Ok(None);
            };
            if let Some(next) = self.skip_holes(rest)? {
                return Ok(Some(Step {
                    next,
                    ..Step::default()
                }));
            }
            let blocks =
                (STEP_LEN / u64::from(geometry.block_size().get())).min(rest.count().get());
            let extent = Extent::new(at, BlockCount::new(blocks));
            let whole = self.table.table().is_whole(extent);
            let whole = whole.map_err(LookError::Table)?;
            let compared = self.compare(extent)?;
            // Once more: a mismatch is an accusation.
            let compared = if compared.wrong.is_empty() {
                compared
            } else {
                self.compare(extent)?
            };
            (extent, whole, compared)
        };
        if !table_is_whole {
            self.table_is_damaged(extent);
            return Ok(None);
        }
        let Compared { changed, wrong } = compared;
        if !wrong.is_empty() {
            self.found(&wrong)?;
        }
        Ok(Some(Step {
            next: extent.end(),
            bytes_read: geometry.bytes(extent.count()),
            changed,
            mismatches: wrong.len(),
        }))
    }

    /// What the table says of the extent, it has not always said: nobody is accused by it. The uplink compares it with
    /// the vault's.
    fn table_is_damaged(&self, extent: Extent) {
        tracing::error!(
            volume = %self.settings.name, file = %self.table.path().display(), blocks = %extent,
            "the checksum table is damaged: it is compared with the vault's; check the disk"
        );
        self.table.set_sound(false);
        self.ask_for_repair();
    }

    fn ask_for_repair(&self) {
        // Full means that the uplink will look anyway.
        let _ = self.uplink.try_send(Request::Doubted);
    }

    fn found(&self, wrong: &BlockSet) -> Result<()> {
        self.engine
            .doubt(wrong)
            .context("put mismatching blocks in doubt")?;
        self.counts
            .mismatches
            .fetch_add(wrong.len().get(), Ordering::Relaxed);
        for extent in wrong.extents() {
            tracing::error!(
                volume = %self.settings.name, %extent,
                "clean blocks are not what was shipped: either somebody else wrote to the volume file, or a change \
                 was missed; they are in the next interval now"
            );
        }
        // Full means that an interval will come anyway.
        let _ = self.uplink.try_send(Request::Doubted);
        Ok(())
    }

    /// Where the file has a hole and the table knows nothing but zeroes, up to the next leaf that needs a look.
    fn skip_holes(&self, rest: Extent) -> Result<Option<BlockIndex>, LookError> {
        let geometry = self.engine.geometry();
        let data = self
            .engine
            .next_data(rest.start())
            .context("look for data in the volume file")?;
        let hole_end = BlockIndex::new(data / u64::from(geometry.block_size().get()));
        let mut next = rest.start();
        let mut sum = [Checksum128::ZERO];
        while next < hole_end {
            let leaf = leaf_of(next);
            self.table
                .table()
                .leaves(leaf, &mut sum)
                .map_err(LookError::Table)?;
            if !sum[0].is_zero() {
                break;
            }
            next = leaf_extent(geometry, leaf).end().min(hole_end);
        }
        Ok((next > rest.start()).then_some(next))
    }

    /// Looks for clean blocks whose content isn't what the table says.
    fn compare(&self, extent: Extent) -> Result<Compared, LookError> {
        let size = self.engine.geometry().block_size().as_usize();
        let blocks = usize::try_from(extent.count().get()).context("count blocks")?;
        let mut bytes = vec![0; blocks * size];
        let mut sums = vec![Checksum128::ZERO; blocks];
        let mut busy = self.engine.tracked(extent);
        self.engine
            .read_clean(extent, &mut bytes)
            .context("read the volume")?;
        self.table
            .table()
            .read_blocks(extent.start(), &mut sums)
            .map_err(LookError::Table)?;
        busy.union_with(&self.engine.tracked(extent));
        let mut wrong = BlockSet::new();
        for ((block, bytes), sum) in extent.iter().zip(bytes.chunks_exact(size)).zip(sums) {
            if !busy.contains(block) && block_checksum(bytes) != sum {
                wrong.insert(Extent::new(block, BlockCount::new(1)));
            }
        }
        Ok(Compared {
            changed: busy.len(),
            wrong,
        })
    }
}

fn random_block(geometry: Geometry) -> BlockIndex {
    let [a, b, c, d, e, f, ..] = random_id();
    let random = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
    let leaf = leaf_of(BlockIndex::new(random % geometry.block_count().get()));
    leaf_extent(geometry, leaf).start()
}
