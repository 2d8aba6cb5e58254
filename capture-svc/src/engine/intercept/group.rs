//! Cuts of several volumes at one instant: all of them, or none.

use std::{sync::Arc, time::Instant};

use capture_core::engine::{cut::Purpose, group::begin_cuts, records::LABEL_MAX};
use thiserror::Error;
use tidemark_block::Epoch;
use tidemark_telemetry::step;

use super::{EngineError, Intercept, IntervalCut, Sample, SnapshotInfo};

/// No volume was cut, because one of them could not be.
#[derive(Debug, Error)]
#[error("{error}")]
pub struct GroupError {
    /// Its position among the engines.
    pub index: usize,
    /// Why.
    #[source]
    pub error: EngineError,
}

/// Cuts all of them at one instant, and opens an interval on each, as [`Intercept::begin_observed_interval`] does on one.
///
/// # Errors
/// What one of them refused; none has an interval open then that had none before.
pub(in crate::engine) fn begin_intervals(
    engines: &[Arc<Intercept>],
) -> Result<Vec<(IntervalCut, Sample)>, GroupError> {
    let done = cut_all(
        engines,
        &Purpose::Interval,
        Intercept::interval_of,
        |engine, _| engine.give_up_interval(),
    )?;
    Ok(done)
}

/// Takes a snapshot of each at one instant. `label` has at most 255 bytes.
///
/// # Errors
/// As [`Intercept::create_snapshot`]; there is no new snapshot then.
pub(in crate::engine) fn create_snapshots(
    engines: &[Arc<Intercept>],
    label: &str,
    now_ms: u64,
) -> Result<Vec<(SnapshotInfo, Sample)>, GroupError> {
    if label.len() > LABEL_MAX {
        let error = EngineError::LabelTooLong(label.len());
        return Err(GroupError { index: 0, error });
    }
    let purpose = Purpose::Snapshot {
        label: label.to_owned(),
        time_ms: now_ms,
    };
    let done = cut_all(
        engines,
        &purpose,
        |engine, cut| engine.snapshot_of(cut),
        |engine, snapshot: SnapshotInfo| engine.delete_snapshot(snapshot.id),
    )?;
    Ok(done)
}

/// Flips all, then finishes each. Where one fails, what the others came to is undone.
fn cut_all<T>(
    engines: &[Arc<Intercept>],
    purpose: &Purpose,
    made: impl Fn(&Arc<Intercept>, Epoch) -> Result<T, EngineError>,
    undo: impl Fn(&Intercept, T) -> Result<(), EngineError>,
) -> Result<Vec<(T, Sample)>, GroupError> {
    // In one order whatever the caller's, so that two calls never wait for each other.
    let mut order: Vec<_> = engines.iter().enumerate().collect();
    order.sort_by_key(|(_, engine)| *engine.capture.volume().as_bytes());
    let _cutting: Vec<_> = order
        .iter()
        .map(|(_, engine)| engine.cutting.lock())
        .collect();
    let fail = |index, error| GroupError { index, error };
    for &(index, engine) in &order {
        engine.check_open().map_err(|error| fail(index, error))?;
    }
    let flipping = step!("flip");
    let begun = Instant::now();
    let parts = order
        .iter()
        .map(|(_, engine)| (&engine.capture, purpose.clone()))
        .collect();
    let cuts = begin_cuts(parts).map_err(|(position, error)| {
        let (index, engine) = order[position];
        fail(index, engine.explain(error))
    })?;
    let flip = begun.elapsed();
    let flipped = order.iter().map(|(_, engine)| {
        *engine.last_flip.lock() = flip;
        engine.activity.sample()
    });
    let samples: Vec<_> = flipped.collect();
    drop(flipping);
    let mut done = Vec::with_capacity(engines.len());
    let mut failed = None;
    for ((&(index, engine), cut), sample) in order.iter().zip(cuts).zip(samples) {
        match engine.finish(cut).and_then(|epoch| made(engine, epoch)) {
            Ok(made) => done.push((index, made, sample)),
            Err(error) => failed = failed.or(Some(fail(index, error))),
        }
    }
    if let Some(failed) = failed {
        for (index, made, _) in done {
            if let Err(error) = undo(&engines[index], made) {
                tracing::warn!(volume = %engines[index].capture.volume(), %error, "undo a cut whose group failed");
            }
        }
        return Err(failed);
    }
    done.sort_by_key(|(index, ..)| *index);
    Ok(done
        .into_iter()
        .map(|(_, made, sample)| (made, sample))
        .collect())
}
