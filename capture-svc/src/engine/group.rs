//! Cuts of several volumes at one instant, where their engines can: only `intercept` sees the writers that it has to hold
//! for the moment.

use std::sync::Arc;

use super::{
    CutAt, Engine, EngineError, EngineKind, IntervalCut, SnapshotInfo,
    intercept::{Intercept, Sample, group},
};

pub use super::intercept::group::GroupError;

/// Cuts all of them at one instant, and opens an interval on each, as [`Engine::begin_interval`] does on one.
///
/// # Errors
/// What one of them refused; none has an interval open then that had none before.
pub fn begin_intervals(
    engines: &[Arc<Engine>],
    at: &CutAt<'_>,
) -> Result<Vec<(IntervalCut, Option<Sample>)>, GroupError> {
    if let [engine] = engines {
        let begun = engine.begin_interval(at);
        return begun.map(|begun| vec![begun]).map_err(alone);
    }
    let begun = group::begin_intervals(&able(engines)?)?;
    let begun = begun.into_iter();
    Ok(begun
        .map(|(cut, at_flip)| (cut.into(), Some(at_flip)))
        .collect())
}

/// Takes a snapshot of each at one instant, and says what each data path had done right after the flip. `label` has at
/// most 255 bytes.
///
/// # Errors
/// As [`Engine::create_snapshot`]; there is no new snapshot then.
pub fn create_snapshots(
    engines: &[Arc<Engine>],
    label: &str,
    now_ms: u64,
) -> Result<Vec<(SnapshotInfo, Option<Sample>)>, GroupError> {
    if let [engine] = engines {
        let taken = engine.create_snapshot(label, now_ms);
        return taken.map(|taken| vec![taken]).map_err(alone);
    }
    let taken = group::create_snapshots(&able(engines)?, label, now_ms)?;
    let taken = taken.into_iter();
    Ok(taken.map(|(info, at_flip)| (info, Some(at_flip))).collect())
}

/// Whether a snapshot can be taken of all of them at one instant.
///
/// # Errors
/// [`EngineError::NoSnapshots`], [`EngineError::NotTogether`].
pub fn check_snapshots(engines: &[Arc<Engine>]) -> Result<(), GroupError> {
    match engines {
        [engine] if engine.kind() == EngineKind::Scan => Err(alone(EngineError::NoSnapshots)),
        [_] => Ok(()),
        engines => able(engines).map(drop),
    }
}

const fn alone(error: EngineError) -> GroupError {
    GroupError { index: 0, error }
}

fn able(engines: &[Arc<Engine>]) -> Result<Vec<Arc<Intercept>>, GroupError> {
    let engines = engines.iter().enumerate().map(|(index, engine)| {
        let error = EngineError::NotTogether;
        let able = engine.intercept().cloned();
        able.ok_or(GroupError { index, error })
    });
    engines.collect()
}
