//! A pass of the scrub that somebody asked for: its progress, then what it found.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tidemark_proto::{
    Reason, RpcError,
    vault::v1::{
        self as pb, DamagedObject, ScrubEnd, ScrubProgress, ScrubResponse, scrub_response::Message,
    },
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::stopping;
use crate::{
    scrub::{Damage, Found, NeededFor, Pace, Progress},
    volume::Volume,
};

/// Messages on their way.
const AHEAD: usize = 4;
const PROGRESS_PERIOD: Duration = Duration::from_millis(200);

/// Begins a pass; it ends early where the caller hangs up.
///
/// # Errors
/// [`Reason::Busy`]: one is under way.
pub(super) fn stream(
    volume: Arc<Volume>,
    mut stop: watch::Receiver<bool>,
) -> Result<ReceiverStream<Result<ScrubResponse, Status>>, RpcError> {
    let Some(only) = volume.scrub.by_hand() else {
        return Err(RpcError::new(
            Reason::Busy,
            format!("somebody else scrubs volume {:?}", volume.manifest().name),
            "wait for the end of that, or interrupt it",
        ));
    };
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let ended = tokio::select! {
            ended = pass(&volume, &sender) => ended,
            () = sender.closed() => return,
            _ = stop.wait_for(|stop| *stop) => Err(stopping()),
        };
        drop(only);
        let last = match ended {
            Ok(found) => Ok(message(Message::End(end(found)))),
            Err(error) => Err(Status::from(error)),
        };
        // Whoever hung up doesn't want it.
        let _ = sender.send(last).await;
    });
    Ok(ReceiverStream::new(receiver))
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
        damaged_objects: found.damaged,
        repaired_objects: found.repaired,
        damaged: found.named.into_iter().map(damaged).collect(),
        damaged_generations: found.generations.iter().map(|id| id.get()).collect(),
    }
}

fn damaged(damage: Damage) -> DamagedObject {
    DamagedObject {
        object: damage.object,
        problem: damage.problem,
        generations: damage.generations.iter().map(|id| id.get()).collect(),
        repaired: damage.repaired,
        more_generations: damage.more_generations,
        needed_for: needed_for(damage.needed_for).into(),
    }
}

const fn needed_for(needed_for: NeededFor) -> pb::NeededFor {
    match needed_for {
        NeededFor::Nothing => pb::NeededFor::Nothing,
        NeededFor::Start => pb::NeededFor::Start,
        NeededFor::Volume => pb::NeededFor::Volume,
        NeededFor::ChecksumTable => pb::NeededFor::ChecksumTable,
        NeededFor::CurrentThrough => pb::NeededFor::CurrentThrough,
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use tidemark_block::GenerationId;

    use super::*;
    use crate::{
        rpc::MESSAGE_BYTES_MAX,
        scrub::{GENERATIONS_NAMED_MAX, NAMED_MAX},
    };

    #[test]
    fn the_longest_answer_is_half_a_message_at_most() {
        let damage = Damage {
            object: "o".repeat(200),
            problem: "p".repeat(1024),
            generations: vec![GenerationId::new(u64::MAX); GENERATIONS_NAMED_MAX],
            more_generations: u64::MAX,
            needed_for: NeededFor::ChecksumTable,
            repaired: true,
        };
        let found = Found {
            named: vec![damage; NAMED_MAX],
            generations: (0..1024).map(|n| GenerationId::new(u64::MAX - n)).collect(),
            ..Found::default()
        };
        let length = message(Message::End(end(found))).encoded_len();
        assert!(length < MESSAGE_BYTES_MAX / 2, "{length} bytes");
    }
}
