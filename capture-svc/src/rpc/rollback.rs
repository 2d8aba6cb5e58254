//! A rollback that somebody asked for: its progress, then what was done.

use std::{sync::Arc, time::Instant};

use tidemark_proto::{
    RpcError,
    capture::v1::{self as pb, rollback_volume_response::Message},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{AHEAD, CaptureService, PROGRESS_PERIOD, Streamed};
use crate::engine::SnapshotId;

impl CaptureService {
    /// Begins it, on a task of its own: a caller who hangs up doesn't leave half of it.
    pub(super) fn stream_rollback(
        &self,
        request: pb::RollbackVolumeRequest,
    ) -> Result<Streamed<pb::RollbackVolumeResponse>, RpcError> {
        if request.snapshot == 0 {
            return Err(RpcError::invalid("snapshots are numbered from 1"));
        }
        let geometry = self.registry.find(&request.volume)?.record.geometry;
        let (registry, fronts) = (Arc::clone(&self.registry), self.fronts.clone());
        let (sender, receiver) = mpsc::channel(AHEAD);
        let progress = sender.clone();
        let mut told = Instant::now();
        let tell = move |blocks_done, blocks_total| {
            if told.elapsed() >= PROGRESS_PERIOD {
                told = Instant::now();
                let now = pb::RollbackProgress {
                    blocks_done,
                    blocks_total,
                };
                // Whoever is slow sees a later one.
                let _ = progress.try_send(Ok(message(Message::Progress(now))));
            }
        };
        tokio::spawn(async move {
            let pb::RollbackVolumeRequest {
                volume,
                snapshot,
                force,
            } = request;
            let done = registry
                .rollback(&volume, SnapshotId(snapshot), force, &fronts, tell)
                .await;
            let last = match done {
                Ok(plan) => Ok(message(Message::End(pb::RollbackEnd {
                    kept_snapshot: plan.map_or(0, |plan| plan.kept),
                    changed_blocks: plan.map_or(0, |plan| plan.blocks),
                    geometry: Some(geometry.into()),
                }))),
                Err(error) => Err(Status::from(error)),
            };
            // Whoever hung up doesn't want it.
            let _ = sender.send(last).await;
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

const fn message(message: Message) -> pb::RollbackVolumeResponse {
    pb::RollbackVolumeResponse {
        message: Some(message),
    }
}
