//! A pass of the scrub that somebody asked for: its progress, then what it found.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tidemark_proto::{
    RpcError,
    vault::v1::{DamagedObject, ScrubEnd, ScrubProgress, ScrubResponse, scrub_response::Message},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::stopping;
use crate::{
    scrub::{Damage, Found, Pace, Progress},
    volume::Volume,
};

/// Messages on their way.
const AHEAD: usize = 4;
const PROGRESS_PERIOD: Duration = Duration::from_millis(200);
/// Damaged objects that an answer names: it stays far below the largest message.
const NAMED_MAX: usize = 1000;

/// Begins a pass; it ends early where the caller hangs up.
pub(super) fn stream(
    volume: Arc<Volume>,
    mut stop: watch::Receiver<bool>,
) -> ReceiverStream<Result<ScrubResponse, Status>> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let ended = tokio::select! {
            ended = pass(&volume, &sender) => ended,
            () = sender.closed() => return,
            _ = stop.wait_for(|stop| *stop) => Err(stopping()),
        };
        let last = match ended {
            Ok(found) => Ok(message(Message::End(end(found)))),
            Err(error) => Err(Status::from(error)),
        };
        // Whoever hung up doesn't want it.
        let _ = sender.send(last).await;
    });
    ReceiverStream::new(receiver)
}

async fn pass(
    volume: &Arc<Volume>,
    sender: &mpsc::Sender<Result<ScrubResponse, Status>>,
) -> Result<Found, RpcError> {
    let mut told = Instant::now();
    let mut tell = |progress: Progress| {
        if told.elapsed() >= PROGRESS_PERIOD {
            told = Instant::now();
            let progress = ScrubProgress {
                objects_done: progress.objects,
                bytes_done: progress.bytes,
                bytes_total: progress.bytes_total,
            };
            // Whoever is slow sees a later one.
            let _ = sender.try_send(Ok(message(Message::Progress(progress))));
        }
    };
    volume.scrub(&mut Pace::unbounded(), &mut tell).await
}

const fn message(message: Message) -> ScrubResponse {
    ScrubResponse {
        message: Some(message),
    }
}

fn end(found: Found) -> ScrubEnd {
    ScrubEnd {
        objects: found.progress.objects,
        bytes: found.progress.bytes,
        damaged_objects: found.damaged.len() as u64,
        damaged: found
            .damaged
            .into_iter()
            .take(NAMED_MAX)
            .map(damaged)
            .collect(),
    }
}

fn damaged(damage: Damage) -> DamagedObject {
    DamagedObject {
        object: damage.object,
        problem: damage.problem,
        generations: damage.generations.iter().map(|id| id.get()).collect(),
        repaired: damage.repaired,
    }
}
