//! Receiving an interval: from its header to its receipt.
//!
//! One task owns a session. Frames are verified, decoded and gathered on blocking threads; while one part is being
//! put the next is gathered, so at most two parts of a stream are in memory, and a budget shared by all streams
//! bounds their sum. What is on its way to the store when a stream breaks is put nevertheless: the source resumes
//! behind it.

mod buffers;
mod gate;
mod verified;

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tidemark_block::{
    FrameDecoder, Geometry, IntervalHeader, IntervalSeal, Receipt, SegmentId, UnverifiedFrame,
    WriterTerm,
};
use tidemark_disk::checksum_table::ChecksumTable;
use tidemark_proto::{
    Reason, RpcError,
    convert::{FrameBatch, ShipAnswer},
};
use tidemark_telemetry::{SpanExt, step};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::Instant,
};
use tracing::{Instrument, Span};
use vault_core::{
    ingest::{
        Admission, BATCH_BYTES_MAX, BatchError, DurablePrefix, IngestError, Interval, admit,
        believed_cut_time,
    },
    segment::SealedSegment,
};

use buffers::{BufferPermit, Buffers};
pub(crate) use gate::{Gate, Receiving, Turn};
use verified::Verified;

use crate::{
    error::{of_ingest, of_io, of_store},
    figures::Received,
    store::StoreError,
    volume::{Volume, now_ms},
};

/// A part that is never left alone by its source is put at this many times `part_age_max`.
const BUSY_AGE: u32 = 16;

/// What all streams of a vault share.
#[derive(Debug)]
pub(crate) struct IngestLimits {
    /// Parts in memory.
    parts: Arc<Buffers>,
    /// Streams.
    streams: Arc<Semaphore>,
    part_bytes_max: u64,
    part_age_max: Duration,
}

impl IngestLimits {
    pub(crate) fn new(config: &crate::Config) -> Self {
        let parts = config.ingest_bytes_max.get() / config.part_bytes_max.get();
        let parts = usize::try_from(parts).unwrap_or(usize::MAX).max(2);
        Self {
            parts: Arc::new(Buffers::new(parts)),
            streams: Arc::new(Semaphore::new(config.streams_max as usize)),
            part_bytes_max: config.part_bytes_max.get(),
            part_age_max: config.part_age_max.get(),
        }
    }

    /// Streams that may still be opened.
    pub(crate) fn free_streams(&self) -> usize {
        self.streams.available_permits()
    }
}

/// What a header led to.
#[derive(Debug)]
pub(crate) enum Begun {
    /// The interval is committed already.
    Committed(Receipt),
    /// Frames are expected behind the durable prefix.
    Open(Box<Session>),
}

/// An interval being received.
#[derive(Debug)]
pub(crate) struct Session {
    volume: Arc<Volume>,
    table: Arc<ChecksumTable>,
    limits: Arc<IngestLimits>,
    /// Absent while a blocking thread works on it, and after that thread failed.
    interval: Option<Box<Interval>>,
    decoder: Option<FrameDecoder>,
    /// Of the open part.
    permit: Option<BufferPermit>,
    ready: Option<(SealedSegment, Option<BufferPermit>)>,
    putting: Option<JoinHandle<Result<(), StoreError>>>,
    last_batch: Instant,
    verified: Verified,
    turn: Option<Turn>,
    _stream: OwnedSemaphorePermit,
}

/// Admits an interval, waits for its turn, and finds what is durable of it already.
pub(crate) async fn begin(
    volume: Arc<Volume>,
    limits: Arc<IngestLimits>,
    header: IntervalHeader,
) -> Result<Begun, RpcError> {
    if let Admission::Committed(receipt) =
        admit(&volume.manifest(), &header).map_err(|e| of_ingest(&e))?
    {
        return Ok(Begun::Committed(receipt));
    }
    let stream = Arc::clone(&limits.streams)
        .try_acquire_owned()
        .map_err(|_| {
            RpcError::new(
                Reason::LimitReached,
                "the vault receives as many intervals as it may at the same time",
                "try again later, or raise streams_max at the vault",
            )
        })?;
    let turn = volume.shipping.take_turn().await.ok_or_else(superseded)?;
    // Another interval, or this one, may have been committed while it waited, and the answer be lost. Only the newest
    // manifest tells; no part that it names is taken up again.
    let manifest = volume.edit(|_| Ok(None)).await?;
    let sequence = match admit(&manifest, &header).map_err(|e| of_ingest(&e))? {
        Admission::Committed(receipt) => return Ok(Begun::Committed(receipt)),
        Admission::Open(sequence) => sequence,
    };
    let at = volume.table_at_head().await?;
    if at.generation != header.base {
        return Err(of_ingest(&IngestError::BaseNotHead {
            found: header.base,
            head: at.generation,
        }));
    }
    let mut session = Session {
        volume,
        table: at.table,
        interval: Some(Box::new(Interval::new(
            header,
            sequence,
            limits.part_bytes_max,
        ))),
        limits,
        decoder: Some(FrameDecoder::new()),
        permit: None,
        ready: None,
        putting: None,
        last_batch: Instant::now(),
        verified: Verified::default(),
        turn: Some(turn),
        _stream: stream,
    };
    session.resume().await?;
    Ok(Begun::Open(Box::new(session)))
}

pub(crate) fn superseded() -> RpcError {
    RpcError::new(
        Reason::IntervalGivenUp,
        "a newer stream ships into this volume",
        "ask for a term again; another process may be shipping the same volume",
    )
}

impl Session {
    fn header(&self) -> Result<&IntervalHeader, RpcError> {
        self.interval
            .as_deref()
            .map(Interval::header)
            .ok_or_else(lost)
    }

    fn interval(&mut self) -> Result<&mut Interval, RpcError> {
        self.interval.as_deref_mut().ok_or_else(lost)
    }

    /// A view on which it can be awaited that a newer stream for the same volume has come.
    pub(crate) fn turn(&self) -> Option<Turn> {
        self.turn.as_ref().map(Turn::watch)
    }

    /// Takes up the parts that are in the store, as far as they are whole and follow each other.
    async fn resume(&mut self) -> Result<(), RpcError> {
        let header = self.header()?.clone();
        let volume = Arc::clone(&self.volume);
        let store = &volume.store;
        volume.receiving.begin(header.interval).await;
        let found = store
            .parts(header.interval)
            .await
            .map_err(|e| of_store(&e))?;
        let mut good = 0;
        for (&part, &length) in &found {
            if part != good {
                break;
            }
            let id = SegmentId {
                origin: header.interval,
                part,
            };
            match self.resume_part(header.geometry, id, length).await {
                Ok(true) => good += 1,
                Ok(false) => break,
                Err(error) => return Err(error),
            }
        }
        for (&part, _) in found.range(good..) {
            let id = SegmentId {
                origin: header.interval,
                part,
            };
            store.delete_segment(id).await.map_err(|e| of_store(&e))?;
        }
        if good > 0 {
            tracing::info!(volume = %volume.id, interval = %header.interval, parts = good, "interval resumes");
        }
        Ok(())
    }

    async fn resume_part(
        &mut self,
        geometry: Geometry,
        id: SegmentId,
        length: u64,
    ) -> Result<bool, RpcError> {
        let volume = Arc::clone(&self.volume);
        let store = &volume.store;
        let read = async {
            let footer = store.footer(geometry, id, length).await?;
            let index = store.index(geometry, &footer.record).await?;
            let checksums = store.checksums(&footer.record).await?;
            Ok((footer, index, checksums))
        };
        let (footer, index, checksums) = match read.await {
            Ok(read) => read,
            // What can't be read is received again.
            Err(StoreError::Corrupt { path, reason }) => {
                tracing::warn!(%path, reason, "part of an unfinished interval is damaged; it is received again");
                return Ok(false);
            }
            Err(error) => return Err(of_store(&error)),
        };
        if !self
            .interval()?
            .continues(&footer)
            .map_err(|e| of_ingest(&e))?
        {
            return Ok(false);
        }
        let table = Arc::clone(&self.table);
        self.on_interval(move |interval, _| {
            interval
                .resume(&*table, &footer, &index, &checksums)
                .map_err(of_batch)
        })
        .await?;
        Ok(true)
    }

    /// Runs a step of the interval on a blocking thread.
    async fn on_interval<T: Send + 'static>(
        &mut self,
        step: impl FnOnce(&mut Interval, &mut FrameDecoder) -> Result<T, RpcError> + Send + 'static,
    ) -> Result<T, RpcError> {
        let mut interval = self.interval.take().ok_or_else(lost)?;
        let mut decoder = self.decoder.take().unwrap_or_default();
        let work = tokio::task::spawn_blocking(move || {
            let result = step(&mut interval, &mut decoder);
            (interval, decoder, result)
        });
        let (interval, decoder, result) = work.await.map_err(|_| lost())?;
        self.interval = Some(interval);
        self.decoder = Some(decoder);
        result
    }

    /// What is durable.
    pub(crate) fn durable(&mut self) -> Result<DurablePrefix, RpcError> {
        Ok(self.interval()?.durable_prefix())
    }

    /// Whether a batch can be taken now; if not, [`Self::progress`] makes room.
    pub(crate) const fn can_take(&self) -> bool {
        self.ready.is_none()
    }

    /// Takes a batch: verifies every frame of it, then gathers them.
    pub(crate) async fn batch(&mut self, batch: FrameBatch) -> Result<(), RpcError> {
        if self.permit.is_none() {
            let (permit, buffer) = self.limits.parts.take().await.ok_or_else(lost)?;
            self.interval()?.provide(buffer);
            self.permit = Some(permit);
        }
        let table = Arc::clone(&self.table);
        let geometry = self.header()?.geometry;
        let now = now_ms();
        let bytes = batch.frames.len();
        if bytes > BATCH_BYTES_MAX {
            return Err(of_ingest(&IngestError::TooLarge(
                BATCH_BYTES_MAX,
                "bytes of frames",
            )));
        }
        let verified = self.on_interval(move |interval, decoder| {
            let began = Instant::now();
            interval.begin_batch(batch.end).map_err(|e| of_ingest(&e))?;
            let mut rest = batch.frames;
            let mut count = 0;
            while !rest.is_empty() {
                let (frame, behind) =
                    UnverifiedFrame::split(rest).map_err(|e| bad_frame(count, &e))?;
                let frame = frame
                    .verify(geometry, decoder)
                    .map_err(|e| bad_frame(count, &e))?;
                interval.frame(now, &*table, &frame).map_err(of_batch)?;
                rest = behind;
                count += 1;
            }
            interval.end_batch(now, bytes as u64);
            Ok((count, began.elapsed()))
        });
        let (frames, time) = verified.await?;
        self.verified.add(frames, bytes, time);
        self.last_batch = Instant::now();
        if let Some(sealed) = self.interval()?.take_full() {
            self.ready = Some((sealed, self.permit.take()));
        }
        self.start_put();
        Ok(())
    }

    fn start_put(&mut self) {
        if self.putting.is_some() {
            return;
        }
        if let Some((sealed, permit)) = self.ready.take() {
            let store = self.volume.store.clone();
            let span = self.verified.put(&sealed);
            let putting = async move {
                let put = store
                    .put_segment(sealed.footer.record.id, sealed.bytes.clone())
                    .await;
                if let Some(permit) = permit {
                    permit.put_back(sealed.bytes);
                }
                if let Err(error) = &put {
                    Span::current().fail(Reason::IoFailed.as_str(), &error.to_string());
                }
                put
            };
            self.putting = Some(tokio::spawn(putting.instrument(span)));
        }
    }

    /// Says how much was verified, and how long that took.
    pub(crate) fn tell_verified(&self, span: &Span) {
        self.verified.tell(span);
    }

    /// Waits for the next part to become durable; puts the open one when it is old enough. Can be dropped at any
    /// time.
    pub(crate) async fn progress(&mut self) -> Result<DurablePrefix, RpcError> {
        loop {
            self.start_put();
            if let Some(put) = &mut self.putting {
                let done = put.await;
                self.putting = None;
                done.map_err(|_| lost())?.map_err(|e| of_store(&e))?;
                let prefix = self.interval()?.part_durable();
                self.start_put();
                return Ok(prefix);
            }
            let idle = self.last_batch + self.limits.part_age_max;
            let busy = self.limits.part_age_max * BUSY_AGE;
            let Some(opened_ms) = self.interval()?.opened_ms() else {
                return std::future::pending().await;
            };
            let age = Duration::from_millis(now_ms().saturating_sub(opened_ms));
            let due = idle.min(Instant::now() + busy.saturating_sub(age));
            tokio::time::sleep_until(due).await;
            self.close_part()?;
        }
    }

    /// Sends the open part on its way.
    pub(crate) fn close_part(&mut self) -> Result<(), RpcError> {
        if self.ready.is_none()
            && let Some(sealed) = self.interval()?.take_open()
        {
            self.ready = Some((sealed, self.permit.take()));
            self.start_put();
        }
        Ok(())
    }

    /// Whether something that was received is not durable yet.
    pub(crate) fn has_pending(&self) -> bool {
        self.putting.is_some()
            || self.ready.is_some()
            || self.interval.as_deref().is_some_and(Interval::has_open)
    }

    /// Makes durable what was received of a stream that broke.
    pub(crate) async fn abandon(mut self) {
        while self.has_pending() {
            if self.close_part().is_err() || self.progress().await.is_err() {
                break;
            }
        }
    }

    /// Commits the interval; everything is durable. Not to be dropped before it ends.
    pub(crate) async fn commit(mut self, seal: IntervalSeal) -> Result<Receipt, RpcError> {
        let began = Instant::now();
        let interval = self.interval.take().ok_or_else(lost)?;
        let volume = Arc::clone(&self.volume);
        let table = Arc::clone(&self.table);
        let comparing = step!("compare digests");
        let finished = tokio::task::spawn_blocking(move || interval.finish(&*table, &seal))
            .await
            .map_err(|_| lost())?;
        if let Err(error) = &finished {
            comparing.fail(Reason::DigestMismatch.as_str(), &error.to_string());
        }
        drop(comparing);
        let finished = match finished {
            Ok(finished) => finished,
            Err(error @ BatchError::Refused(IngestError::DigestMismatch { .. })) => {
                tracing::error!(volume = %volume.id, %error, "nothing was committed");
                volume.figures.digest_mismatches.fetch_add(1, Relaxed);
                return Err(if volume.recheck_table().await? {
                    RpcError::new(
                        Reason::Busy,
                        format!(
                            "volume {}: the vault's checksum table was damaged and has been made anew",
                            volume.id
                        ),
                        "send the interval again",
                    )
                } else {
                    of_batch(error)
                });
            }
            Err(error) => return Err(of_batch(error)),
        };
        let id = finished.header.interval;
        let manifest = volume
            .edit(|manifest| {
                if manifest.committed(id).is_some() {
                    return Ok(None);
                }
                finished
                    .commit(manifest, now_ms())
                    .map(Some)
                    .map_err(|e| of_ingest(&e))
            })
            .instrument(step!("commit"))
            .await?;
        let Some(recent) = manifest.committed(id) else {
            return Err(RpcError::internal(format!(
                "volume {}: interval {id} is gone after its commit",
                volume.id
            )));
        };
        let receipt = recent.receipt(volume.id);
        believed(
            &volume,
            finished.header.cut_time_ms,
            recent.committed_time_ms,
        );
        if let Some(overlay) = finished.overlay {
            volume.note_committed(finished.header.base, recent.generation, overlay);
        }
        tracing::info!(
            volume = %volume.id, generation = %recent.generation, term = %finished.header.term,
            changed_blocks = recent.changed_blocks, frame_bytes = recent.frame_bytes,
            digest = %recent.digest, "generation committed"
        );
        let figures = &volume.figures;
        figures.commit.record(began.elapsed());
        let (bytes, blocks) = (recent.frame_bytes, recent.changed_blocks);
        figures.received_bytes.fetch_add(bytes, Relaxed);
        figures.changed_blocks.fetch_add(blocks, Relaxed);
        Ok(receipt)
    }
}

impl Drop for Session {
    /// A part that is still being put keeps the turn: the next stream must find it whole or not at all.
    fn drop(&mut self) {
        let turn = self.turn.take();
        if let (Some(put), Ok(runtime)) =
            (self.putting.take(), tokio::runtime::Handle::try_current())
        {
            runtime.spawn(async move {
                let _ = put.await;
                drop(turn);
            });
        }
    }
}

fn bad_frame(at: usize, error: &tidemark_block::FrameError) -> RpcError {
    RpcError::new(
        Reason::FrameCorrupt,
        format!("frame {at} of the batch: {error}"),
        "give the interval up and cut a new one; if it stays, check memory and network of both sides",
    )
}

fn of_batch(error: BatchError<std::io::Error>) -> RpcError {
    match error {
        BatchError::Refused(error) => of_ingest(&error),
        BatchError::Table(error) => of_io("read the checksum table", &error),
    }
}

fn lost() -> RpcError {
    RpcError::internal("a worker of this stream failed")
}

/// Says that the image of the newest generation is still the source's.
pub(crate) fn mark_current(
    volume: &Volume,
    mark: &tidemark_proto::convert::CurrentMark,
) -> Result<Receipt, RpcError> {
    let manifest = volume.manifest();
    check_term(&manifest, mark.term)?;
    let head = manifest.head().filter(|head| head.id == mark.generation);
    let Some(head) = head else {
        return Err(of_ingest(&IngestError::BaseNotHead {
            found: mark.generation,
            head: manifest.head_id(),
        }));
    };
    if head.digest != mark.image_digest {
        return Err(of_ingest(&IngestError::DigestMismatch {
            source_digest: mark.image_digest,
            vault_digest: head.digest,
        }));
    }
    let cut_time_ms = believed(volume, mark.cut_time_ms, now_ms());
    volume.mark_current(head.id, cut_time_ms);
    volume.figures.received(Received::Unchanged);
    Ok(Receipt {
        interval: mark.interval,
        created: false,
        changed_blocks: tidemark_block::BlockCount::ZERO,
        frame_bytes: 0,
        cut_time_ms,
        committed_time_ms: now_ms(),
        ..head.recent().receipt(volume.id)
    })
}

/// The time of a cut, as far as it is believed; says so where it isn't.
fn believed(volume: &Volume, cut_time_ms: u64, now_ms: u64) -> u64 {
    let believed = believed_cut_time(cut_time_ms, now_ms);
    if believed < cut_time_ms {
        tracing::warn!(
            volume = %volume.id, cut_time_ms, ahead_ms = cut_time_ms - now_ms,
            "the source's clock is ahead of the vault's: the cut is taken to be no later than now; set the clocks right"
        );
    }
    believed
}

/// Refuses a stale term.
pub(crate) fn check_term(
    manifest: &vault_core::manifest::Manifest,
    found: WriterTerm,
) -> Result<(), RpcError> {
    if found == manifest.term {
        return Ok(());
    }
    Err(of_ingest(&IngestError::Fenced {
        found,
        current: manifest.term,
    }))
}

/// The answer that names a durable prefix.
pub(crate) const fn ack(prefix: DurablePrefix) -> ShipAnswer {
    ShipAnswer::Ack {
        durable_end: prefix.end,
        durable_bytes: prefix.stream_bytes,
    }
}
