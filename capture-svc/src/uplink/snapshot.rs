//! Snapshots that somebody asks for, taken at the best moment that is found, as intervals are.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use capture_core::coherence::{Graded, Limits};
use tidemark_proto::{Reason, RpcError};
use tokio::sync::{Mutex, oneshot, watch};
use tracing::Instrument;

use super::{
    BaseTable, blocking,
    search::{Aim, Begun, CutError, Found, Member, Want, find},
    shutting_down,
};
use crate::{
    engine::{
        CutAt, Engine, EngineError, SnapshotInfo,
        group::{self, GroupError},
    },
    quiesce::{Hints, Quiesce},
    registry::engine_error,
};

/// What the search for a moment needs of a volume.
#[derive(Debug, Clone)]
pub(crate) struct Seat {
    pub(super) name: String,
    pub(super) engine: Arc<Engine>,
    pub(super) table: Arc<BaseTable>,
    pub(super) quiesce: Arc<Mutex<Quiesce>>,
    pub(super) stop: watch::Receiver<bool>,
    pub(super) started: Instant,
    pub(super) quiesce_timeout: Duration,
    pub(super) limits: Limits,
}

impl Seat {
    fn member(&self) -> Member {
        Member {
            name: self.name.clone(),
            engine: Arc::clone(&self.engine),
            table: Arc::clone(&self.table),
            quiesce: Arc::clone(&self.quiesce),
            // Whoever holds still of its own accord waits for an interval.
            hints: Hints::default(),
            cutting: Arc::new(AtomicBool::new(false)),
            stop: self.stop.clone(),
            started: self.started,
            last_cut_ms: 0,
            quiesce_timeout: self.quiesce_timeout,
            has_base: false,
        }
    }
}

/// A snapshot of each.
struct Snapshots {
    label: String,
}

impl Aim for Snapshots {
    type Made = SnapshotInfo;

    fn cut(&self, engines: &[Arc<Engine>], cut_time_ms: u64, _: &CutAt<'_>) -> Begun<SnapshotInfo> {
        group::create_snapshots(engines, &self.label, cut_time_ms)
    }

    fn undo(engine: &Engine, made: SnapshotInfo) -> Result<(), EngineError> {
        engine.delete_snapshot(made.id)
    }
}

/// Takes a snapshot of each at one instant, all or none, in the order of `seats`. `at_once`: without looking for a good
/// moment. Where whoever asked hangs up before one was found, none is taken.
pub(crate) async fn take(
    seats: Vec<Seat>,
    label: String,
    at_once: bool,
) -> Result<Vec<SnapshotInfo>, RpcError> {
    let mut order: Vec<_> = seats.into_iter().enumerate().collect();
    order.sort_by(|(_, a), (_, b)| a.name.cmp(&b.name));
    let (places, seats): (Vec<_>, Vec<_>) = order.into_iter().unzip();
    let engines: Vec<_> = seats.iter().map(|seat| Arc::clone(&seat.engine)).collect();
    let Some(limits) = Limits::together(seats.iter().map(|seat| seat.limits)) else {
        return Err(RpcError::invalid("no volume is named"));
    };
    let refused = |GroupError { index, error }| refused(&seats, index, &error);
    // Nobody is frozen for a cut that can't be made.
    group::check_snapshots(&engines).map_err(refused)?;
    let members = seats.iter().map(Seat::member).collect();
    let want = Want {
        aim: Arc::new(Snapshots { label }),
        limits,
        at_once,
    };
    let (mut answer, answered) = oneshot::channel();
    let search = async move {
        let found = find(members, want, answer.closed()).await;
        let mut taken = Vec::with_capacity(found.len());
        for (engine, found) in engines.into_iter().zip(found) {
            taken.push(match found {
                Found::Cut { cut, graded, .. } => Ok(grade(engine, cut, graded).await),
                other => Err(other),
            });
        }
        // Where nobody waits for it any more it is listed all the same.
        let _ = answer.send(taken);
    };
    tokio::spawn(search.in_current_span());
    let taken = answered.await.map_err(|_| shutting_down())?;
    let taken: Result<Vec<_>, _> = taken.into_iter().collect();
    let taken = taken.map_err(|found| not_taken(&seats, found))?;
    let mut placed: Vec<_> = places.into_iter().zip(taken).collect();
    placed.sort_by_key(|(place, _)| *place);
    Ok(placed.into_iter().map(|(_, info)| info).collect())
}

/// Records the grade of a snapshot that was taken. Where that can't be done it keeps the least one.
async fn grade(engine: Arc<Engine>, taken: SnapshotInfo, graded: Graded) -> SnapshotInfo {
    let (id, coherence, reason) = (taken.id, graded.coherence, graded.reason());
    let recorded = {
        let reason = reason.clone();
        blocking(move || Ok(engine.grade_snapshot(id, coherence, &reason)?)).await
    };
    match recorded {
        Ok(()) => SnapshotInfo {
            coherence,
            reason,
            ..taken
        },
        Err(error) => {
            tracing::warn!(snapshot = %id, error = %format!("{error:#}"), "record the grade of a snapshot");
            taken
        }
    }
}

fn refused(seats: &[Seat], index: usize, error: &EngineError) -> RpcError {
    let mut told = engine_error(error);
    if seats.len() > 1 {
        told.message = format!("volume {}: {}", seats[index].name, told.message);
    }
    told
}

fn not_taken(seats: &[Seat], found: Found<SnapshotInfo>) -> RpcError {
    let not_quiesced = |message: String| {
        let action = "see to what quiesces the workload, or take it at once (`tidemark snapshot create --now`)";
        RpcError::new(Reason::NotQuiesced, message, action)
    };
    match found {
        Found::Failed(CutError {
            refused: Some((index, error)),
            ..
        }) => refused(seats, index, &error),
        Found::Failed(CutError { message, .. }) => not_quiesced(message),
        Found::Skipped(why) => not_quiesced(format!("no snapshot was taken: {why}")),
        Found::Stopped => shutting_down(),
        Found::Cut { .. } | Found::Unchanged { .. } => {
            RpcError::internal("a snapshot is always taken anew")
        }
    }
}
