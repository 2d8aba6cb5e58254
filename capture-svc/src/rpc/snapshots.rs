//! Snapshots: taking, listing, deleting, and streaming what they show.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use tidemark_block::{BlockCount, BlockIndex, BlockSet, frame::CodecChoice};
use tidemark_proto::{
    Reason, RpcError,
    capture::v1::{self as pb, read_snapshot_response::Message},
    convert::image_digest_field,
};
use tokio::{
    runtime::Handle,
    sync::{
        mpsc::{self, error::SendTimeoutError},
        watch,
    },
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{AHEAD, CaptureService, Streamed, shown::scratches};
use crate::{
    engine::{Engine, EngineError, SnapshotId, SnapshotInfo, SnapshotReader},
    registry::engine_error,
    uplink::{
        snapshot,
        walk::{Assembler, Batch, Emit, Total, WalkError, ZeroBase, walk, walk_whole},
    },
};

/// Encoded bytes of a message.
const BATCH_LEN: usize = 768 << 10;
/// Streams of snapshots at the same time: each has a thread.
pub(super) const READS_MAX: usize = 16;
/// How long the reader of a stream may take nothing.
const UNREAD_MAX: Duration = Duration::from_secs(300);
/// The most bytes of a label.
const LABEL_BYTES_MAX: usize = 255;

impl CaptureService {
    async fn with_engine<T: Send + 'static>(
        &self,
        volume: &str,
        work: impl FnOnce(&Arc<Engine>) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, RpcError> {
        let engine = Arc::clone(&self.registry.find(volume)?.need()?.engine);
        tokio::task::spawn_blocking(move || work(&engine))
            .await
            .map_err(|error| RpcError::internal(format!("join the engine's work: {error}")))?
            .map_err(|error| engine_error(&error))
    }

    /// Of all of them at one instant; in their order.
    pub(super) async fn take_snapshots(
        &self,
        volumes: &[String],
        label: String,
        now: bool,
    ) -> Result<Vec<pb::Snapshot>, RpcError> {
        check_label(&label)?;
        let mut serving = Vec::with_capacity(volumes.len());
        let mut ids = HashSet::new();
        for volume in volumes {
            let volume = self.registry.find(volume)?;
            if !ids.insert(volume.record.id) {
                let message = format!("volume {} is named twice", volume.record.name);
                return Err(RpcError::invalid(message));
            }
            serving.push(volume.need()?);
        }
        let seats = serving.iter().map(|serving| serving.uplink.seat());
        let taken = snapshot::take(seats.collect(), label, now).await?;
        let each = serving.iter().zip(&taken);
        Ok(each
            .map(|(serving, info)| shown(&serving.engine, info))
            .collect())
    }

    pub(super) async fn snapshots(&self, volume: &str) -> Result<Vec<pb::Snapshot>, RpcError> {
        let scratches = scratches(&*self.registry.find(volume)?.need()?);
        self.with_engine(volume, move |engine| {
            let list = engine.list_snapshots();
            let each = list.iter().map(|info| pb::Snapshot {
                scratches: scratches
                    .iter()
                    .filter(|scratch| scratch.snapshot == info.id.0)
                    .cloned()
                    .collect(),
                ..shown(engine, info)
            });
            Ok(each.collect())
        })
        .await
    }

    pub(super) async fn drop_snapshot(&self, volume: &str, id: u64) -> Result<(), RpcError> {
        self.with_engine(volume, move |engine| engine.delete_snapshot(SnapshotId(id)))
            .await
    }

    pub(super) async fn stream_snapshot(
        &self,
        request: pb::ReadSnapshotRequest,
    ) -> Result<Streamed<pb::ReadSnapshotResponse>, RpcError> {
        let seat = Arc::clone(&self.reads).try_acquire_owned().map_err(|_| {
            RpcError::new(
                Reason::LimitReached,
                format!("{READS_MAX} snapshots are being read"),
                "try again when one of them has ended",
            )
        })?;
        let id = SnapshotId(request.snapshot);
        let since = (request.since_snapshot > 0).then_some(SnapshotId(request.since_snapshot));
        let (header, reader, changed) = self
            .with_engine(&request.volume, move |engine| {
                let reader = engine.open_snapshot(id)?;
                let listed = engine.list_snapshots();
                let info = listed
                    .iter()
                    .find(|info| info.id == id)
                    .ok_or(EngineError::NoSuchSnapshot(id))?;
                let changed = since
                    .map(|since| engine.changed_between(since, id))
                    .transpose()?;
                Ok((shown(engine, info), reader, changed))
            })
            .await?;
        let geometry = self.registry.find(&request.volume)?.record.geometry;
        let (sender, receiver) = mpsc::channel(AHEAD);
        let stop = self.stop.clone();
        let runtime = Handle::current();
        tokio::task::spawn_blocking(move || {
            let first = message(Message::Header(header));
            if sender.blocking_send(Ok(first)).is_err() {
                return;
            }
            let sending = Sending {
                to: &sender,
                stop: &stop,
                runtime: &runtime,
            };
            let whole = changed.is_none();
            let last = match stream(&reader, ZeroBase(geometry), changed, sending) {
                Ok(total) => Ok(message(Message::End(pb::ReadSnapshotEnd {
                    blocks_sent: total.changed_blocks,
                    image_digest: if whole {
                        image_digest_field(total.image_digest)
                    } else {
                        Bytes::new()
                    },
                }))),
                Err(error) => Err(Status::from(failed(error))),
            };
            // Whoever takes nothing more may take long to hear why, and whoever hung up doesn't want it.
            drop((reader, seat));
            runtime.spawn(async move { sender.send(last).await });
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

fn stream(
    reader: &SnapshotReader,
    zero: ZeroBase,
    changed: Option<BlockSet>,
    sending: Sending<'_>,
) -> Result<Total, WalkError> {
    let mut books = Assembler::new(Arc::new(zero), BATCH_LEN, sending);
    match changed {
        Some(changed) => walk_whole(reader, zero.0, &changed, &mut books)?,
        None => {
            let mut all = BlockSet::new();
            all.insert(zero.0.all());
            walk(reader, &zero, &all, BlockIndex::ZERO, &mut books)?;
        }
    }
    books.finish()
}

fn failed(error: WalkError) -> RpcError {
    match error {
        WalkError::Engine(error) => engine_error(&error),
        WalkError::Table(error) => RpcError::internal(error.to_string()),
        WalkError::Stopped => crate::uplink::shutting_down(),
        WalkError::Unread => RpcError::new(
            Reason::TooSlow,
            format!("nothing was taken for {UNREAD_MAX:?}"),
            "read the snapshot again where there is room to write to",
        ),
    }
}

const fn message(message: Message) -> pb::ReadSnapshotResponse {
    pb::ReadSnapshotResponse {
        message: Some(message),
    }
}

fn check_label(label: &str) -> Result<(), RpcError> {
    if label.len() <= LABEL_BYTES_MAX {
        return Ok(());
    }
    Err(RpcError::invalid(format!(
        "the label has {} bytes, more than {LABEL_BYTES_MAX}",
        label.len()
    )))
}

fn shown(engine: &Engine, info: &SnapshotInfo) -> pb::Snapshot {
    pb::Snapshot {
        snapshot: info.id.0,
        label: info.label.clone(),
        epoch: info.cut.get(),
        cut_time_ms: info.time_ms,
        coherence: i32::from(info.coherence.code()),
        coherence_reason: info.reason.to_string(),
        geometry: Some(engine.geometry().into()),
        scratches: Vec::new(),
    }
}

struct Sending<'a> {
    to: &'a mpsc::Sender<Result<pb::ReadSnapshotResponse, Status>>,
    stop: &'a watch::Receiver<bool>,
    runtime: &'a Handle,
}

impl Emit for Sending<'_> {
    fn codec(&self) -> CodecChoice {
        // Control is mostly local: the processor is the bottleneck.
        CodecChoice::Raw
    }

    fn batch(&mut self, batch: Batch, _: &[u8]) -> Result<(), WalkError> {
        let frames = Ok(message(Message::Frames(batch.frames)));
        let sent = self.to.send_timeout(frames, UNREAD_MAX);
        self.runtime.block_on(sent).map_err(|error| match error {
            SendTimeoutError::Closed(_) => WalkError::Stopped,
            SendTimeoutError::Timeout(_) => WalkError::Unread,
        })
    }

    fn passed(&mut self, _: BlockCount) -> Result<(), WalkError> {
        if self.to.is_closed() || *self.stop.borrow() {
            return Err(WalkError::Stopped);
        }
        Ok(())
    }

    fn finish(&mut self, _: &[u8]) -> Result<(), WalkError> {
        Ok(())
    }
}
