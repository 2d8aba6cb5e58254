//! The reading side of shipping: a blocking thread that turns a cut into batches, bounded by a small channel.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use capture_core::codec::{CodecPolicy, CodecRule};
use tidemark_block::{BlockCount, BlockIndex, BlockSet, Extent, frame::CodecChoice};
use tidemark_disk::ChecksumTable;
use tidemark_proto::Reason;
use tidemark_telemetry::{SpanExt, step};
use tokio::{sync::mpsc, task::JoinHandle};
use tracing::Span;

use super::{
    pending::{Entry, PendingKey, PendingWriter},
    walk::{Assembler, Batch, Emit, ImageAtCut, Total, WalkError, walk},
};

/// Encoded bytes after which a batch is sent: frames have 256 KiB, or 1 MiB with large blocks.
const BATCH_LEN: usize = 768 << 10;
/// Batches between the reading thread and the sender.
const BATCHES_AHEAD: usize = 2;

/// What to read, and where the books are kept.
#[derive(Debug, Clone)]
pub(crate) struct Job<I> {
    pub(crate) image: I,
    pub(crate) changed: Arc<BlockSet>,
    pub(crate) table: Arc<ChecksumTable>,
    pub(crate) pending: PathBuf,
    pub(crate) key: PendingKey,
    pub(crate) codec: CodecRule,
    pub(crate) zstd_level: i32,
}

/// What the reading thread gives, in order.
#[derive(Debug)]
pub(crate) enum Produced {
    /// Frames to send.
    Batch(Batch),
    /// Everything was given.
    Done(Total),
    /// It can't go on.
    Failed(WalkError),
}

/// A reading thread. It ends when it is done, or soon after this is dropped; [`Self::end`] waits for it.
#[derive(Debug)]
pub(crate) struct Producer {
    batches: mpsc::Receiver<Produced>,
    stop: Arc<AtomicBool>,
    walked: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Producer {
    /// Starts with the first changed block at or above `from`, a watermark that is durable at the vault.
    pub(crate) fn start<I>(job: Job<I>, from: BlockIndex) -> Self
    where
        I: ImageAtCut + Send + 'static,
    {
        let (sender, batches) = mpsc::channel(BATCHES_AHEAD);
        let stop = Arc::new(AtomicBool::new(false));
        let walked = Arc::new(AtomicU64::new(0));
        let (thread_stop, thread_walked) = (Arc::clone(&stop), Arc::clone(&walked));
        let span = step!("read");
        let task = tokio::task::spawn_blocking(move || {
            let within = span.enter();
            let last = match produce(&job, from, &sender, thread_stop, thread_walked) {
                Ok(total) => Produced::Done(total),
                Err(error) => Produced::Failed(error),
            };
            match &last {
                Produced::Done(total) => {
                    span.count("changed_blocks", total.changed_blocks);
                    span.count("frames", total.frame_count);
                }
                // Nobody wanted more.
                Produced::Failed(WalkError::Stopped) | Produced::Batch(_) => {}
                Produced::Failed(error) => span.fail(Reason::IoFailed.as_str(), &error.to_string()),
            }
            drop(within);
            drop(span);
            // The reader's cut is let go before anyone hears that it ended.
            drop(job);
            let _ = sender.blocking_send(last);
        });
        Self {
            batches,
            stop,
            walked,
            task,
        }
    }

    /// What comes next. After `Done` or `Failed` nothing does.
    pub(crate) async fn next(&mut self) -> Produced {
        match self.batches.recv().await {
            Some(produced) => produced,
            None => Produced::Failed(WalkError::Stopped),
        }
    }

    /// Changed blocks that have been looked at.
    pub(crate) fn walked(&self) -> u64 {
        self.walked.load(Ordering::Relaxed)
    }

    /// Stops the thread and waits until it has let go of the cut.
    pub(crate) async fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.batches.close();
        while self.batches.recv().await.is_some() {}
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the reading thread failed");
        }
    }
}

struct Sending<'a> {
    to: &'a mpsc::Sender<Produced>,
    stop: Arc<AtomicBool>,
    walked: Arc<AtomicU64>,
    /// None only while the file is being opened.
    pending: Option<PendingWriter>,
    policy: CodecPolicy,
    zstd_level: i32,
    since: Instant,
    /// Reading and encoding; the rest of the time the link, or the vault, was waited for.
    worked: Duration,
    /// While a prefix that the vault has is only accounted for.
    discard: bool,
}

impl Emit for Sending<'_> {
    fn codec(&self) -> CodecChoice {
        if self.policy.compress() && !self.discard {
            CodecChoice::Zstd(self.zstd_level)
        } else {
            CodecChoice::Raw
        }
    }

    fn batch(&mut self, batch: Batch, entries: &[u8]) -> Result<(), WalkError> {
        self.append(entries)?;
        if self.discard {
            return Ok(());
        }
        let worked = self.since.elapsed();
        self.worked += worked;
        let encoded = batch.frames.len();
        let waiting = Instant::now();
        self.to
            .blocking_send(Produced::Batch(batch))
            .map_err(|_| WalkError::Stopped)?;
        self.policy.batch(encoded, worked, waiting.elapsed());
        self.since = Instant::now();
        Ok(())
    }

    fn passed(&mut self, count: BlockCount) -> Result<(), WalkError> {
        self.walked.fetch_add(count.get(), Ordering::Relaxed);
        if self.stop.load(Ordering::Relaxed) {
            return Err(WalkError::Stopped);
        }
        Ok(())
    }

    fn finish(&mut self, entries: &[u8]) -> Result<(), WalkError> {
        self.append(entries)
    }
}

fn produce<I: ImageAtCut>(
    job: &Job<I>,
    from: BlockIndex,
    to: &mpsc::Sender<Produced>,
    stop: Arc<AtomicBool>,
    walked: Arc<AtomicU64>,
) -> Result<Total, WalkError> {
    let assembler = || {
        let sending = Sending {
            to,
            stop: Arc::clone(&stop),
            walked: Arc::clone(&walked),
            pending: None,
            policy: CodecPolicy::new(job.codec),
            zstd_level: job.zstd_level,
            since: Instant::now(),
            worked: Duration::ZERO,
            discard: false,
        };
        Assembler::new(Arc::clone(&job.table), BATCH_LEN, sending)
    };
    let mut books = assembler();
    let resumed = if from == BlockIndex::ZERO {
        None
    } else {
        PendingWriter::resume(&job.pending, job.key, from, |entry| books.account(&entry))?
    };
    if let Some(pending) = resumed {
        books.emit_mut().pending = Some(pending);
        let prefix = job
            .changed
            .intersect_extent(Extent::between(BlockIndex::ZERO, from));
        walked.fetch_add(prefix.len().get(), Ordering::Relaxed);
    } else {
        books = assembler();
        let pending = PendingWriter::create(&job.pending, job.key)?;
        books.emit_mut().pending = Some(pending);
        if from > BlockIndex::ZERO {
            account_again(job, from, &mut books)?;
        }
    }
    walk(&job.image, &*job.table, &job.changed, from, &mut books)?;
    let sending = books.emit_mut();
    let worked = sending.worked + sending.since.elapsed();
    Span::current().count(
        "worked_ms",
        u64::try_from(worked.as_millis()).unwrap_or(u64::MAX),
    );
    books.finish()
}

/// Reads a prefix that the vault has already, for its checksums: what was known of it is lost.
fn account_again<I: ImageAtCut>(
    job: &Job<I>,
    from: BlockIndex,
    books: &mut Assembler<ChecksumTable, Sending<'_>>,
) -> Result<(), WalkError> {
    books.emit_mut().discard = true;
    let prefix = job
        .changed
        .intersect_extent(Extent::between(BlockIndex::ZERO, from));
    walk(&job.image, &*job.table, &prefix, BlockIndex::ZERO, books)?;
    books.flush()?;
    let emit = books.emit_mut();
    let mut entry = Vec::new();
    Entry::Batch(from).encode(&mut entry);
    emit.append(&entry)?;
    emit.discard = false;
    emit.since = Instant::now();
    Ok(())
}

impl Sending<'_> {
    fn append(&mut self, entries: &[u8]) -> Result<(), WalkError> {
        match &mut self.pending {
            Some(pending) => Ok(pending.append(entries)?),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
