//! A pass of the source scrub that somebody asked for: its progress, then what it found.

use std::time::Instant;

use tidemark_proto::capture::v1::{self as pb, scrub_volume_response::Message};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{AHEAD, PROGRESS_PERIOD, Streamed};
use crate::volume::Serving;

/// Begins a pass; it ends early where the caller hangs up. The stream doesn't keep a removed volume alive.
pub(super) fn stream(serving: &Serving) -> Streamed<pb::ScrubVolumeResponse> {
    let blocks_total = serving.engine.geometry().block_count().get();
    let pass = serving.scrub.by_hand();
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let message = |message| pb::ScrubVolumeResponse {
            message: Some(message),
        };
        let mut told = Instant::now();
        let ended = pass.run(|pass| {
            if told.elapsed() >= PROGRESS_PERIOD {
                told = Instant::now();
                let progress = pb::ScrubProgress {
                    blocks_done: pass.done,
                    blocks_total,
                };
                // Whoever is slow sees a later one.
                let _ = sender.try_send(Ok(message(Message::Progress(progress))));
            }
            !sender.is_closed()
        });
        let last = match ended.await {
            Ok(None) => return,
            Ok(Some(pass)) => Ok(message(Message::End(pb::ScrubEnd {
                blocks_compared: pass.done - pass.changed,
                blocks_changed: pass.changed,
                mismatches: pass.mismatches,
            }))),
            Err(error) => Err(Status::from(error)),
        };
        // Whoever hung up doesn't want it.
        let _ = sender.send(last).await;
    });
    Box::pin(ReceiverStream::new(receiver))
}
