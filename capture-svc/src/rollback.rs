//! A volume put back, in place, to what it was at one of its snapshots.
//!
//! What is to change is first written to a file beside the volume's state. Once that is whole, durable and has its
//! name, the rollback happens: this process, or the next opening of the volume, writes every block of the file through
//! the engine, syncs the volume, and removes the file. A crash before finds the volume as it was, one after as it shall
//! be; a loss of power too, though it takes the snapshots. Nobody meets it half done: the volume is exported only while
//! there is no such file.
//!
//! The blocks are written as a client's are, so they are tracked, and a snapshot that is taken first keeps what was
//! there. Where the spool has no room for that nothing is decided.

mod plan;

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::{Context, Result, anyhow, bail};
use capture_core::coherence::Graded;
use tidemark_block::{BlockCount, Codec, VerifiedFrame, VolumeId, block_checksum};
use tidemark_disk::durable;
use tidemark_export::{BlockDevice, Durability, ZeroFlags};

pub(crate) use plan::Plan;
use plan::{Decided, Draft};

use crate::{
    engine::{
        EngineError, SnapshotId,
        intercept::{Intercept, SnapshotReader},
    },
    uplink::now_ms,
};

/// Bytes compared at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// Why nothing was decided.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RollbackError {
    /// What was there before could not be kept.
    #[error(
        "the spool has room for {free} bytes, and to keep what the volume holds now takes {needed}: delete snapshots, or \
         raise spool_bytes_max"
    )]
    NoRoom {
        /// Bytes.
        free: u64,
        /// Bytes.
        needed: u64,
    },
    /// The service stops.
    #[error("the service is stopping")]
    Stopped,
}

/// How far it is: blocks done and in all. `false` ends it early.
pub(crate) type Told<'a> = &'a mut (dyn FnMut(u64, u64) -> bool + Send);

/// Decides on a rollback; none where the volume is what it was at the snapshot. No client may be connected.
///
/// # Errors
/// The snapshot isn't there or was lost, or something can't be kept or written: the volume is as it was.
pub(crate) fn decide(
    dir: &Path,
    volume: VolumeId,
    engine: &Arc<Intercept>,
    snapshot: SnapshotId,
    told: Told<'_>,
) -> Result<Option<Plan>> {
    let then = engine.open_snapshot(snapshot)?;
    let label = format!("before the rollback to snapshot {snapshot}");
    let (taken, at_flip) = engine.create_observed_snapshot(&label, now_ms())?;
    let kept = taken.id;
    let graded = Graded::for_rollback(at_flip.since(Instant::now()));
    let recorded = engine.grade_snapshot(kept, graded.coherence, &graded.reason());
    let drafted = recorded
        .map_err(anyhow::Error::from)
        .and_then(|()| draft(dir, volume, engine, (snapshot, &then), kept, told));
    let decided = drafted.and_then(|draft| {
        if draft.blocks() == 0 {
            return Ok(None);
        }
        let needed = engine.geometry().bytes(BlockCount::new(draft.blocks()));
        let stats = engine.stats();
        let free = stats.spool_max.saturating_sub(stats.spool_used);
        if needed > free {
            return Err(RollbackError::NoRoom { free, needed }.into());
        }
        draft
            .decide()
            .map(Some)
            .context("write the plan of the rollback")
    });
    if !matches!(decided, Ok(Some(_))) && !is_decided(dir) {
        plan::remove_unfinished(dir).context("remove the plan of the rollback")?;
        engine.delete_snapshot(kept)?;
    }
    decided
}

/// Writes down every block that differs between the snapshot and now.
fn draft(
    dir: &Path,
    volume: VolumeId,
    engine: &Arc<Intercept>,
    (snapshot, then): (SnapshotId, &SnapshotReader),
    kept: SnapshotId,
    told: Told<'_>,
) -> Result<Draft> {
    let geometry = engine.geometry();
    let now = engine.open_snapshot(kept)?;
    let changed = engine.changed_between(snapshot, kept)?;
    let mut draft = Draft::create(dir, volume, geometry, snapshot, kept)
        .context("write the plan of the rollback")?;
    let size = geometry.block_size().as_usize();
    let at_once = BlockCount::new(PIECE_BYTES / u64::from(geometry.block_size().get()));
    let (mut old, mut new) = (Vec::new(), Vec::new());
    let (mut done, total) = (0, changed.len().get());
    for piece in changed.extents().flat_map(|extent| extent.pieces(at_once)) {
        if !told(done, total) {
            return Err(RollbackError::Stopped.into());
        }
        let len = usize::try_from(geometry.bytes(piece.count()))?;
        old.resize(len, 0);
        new.resize(len, 0);
        then.read_blocks(piece, &mut old)?;
        now.read_blocks(piece, &mut new)?;
        let pairs = old.chunks_exact(size).zip(new.chunks_exact(size));
        for (block, (old, _)) in piece.iter().zip(pairs).filter(|(_, (old, new))| old != new) {
            let checksum = block_checksum(old);
            let noted = if checksum.is_zero() {
                draft.zero(block)
            } else {
                draft.data(block, checksum, old)
            };
            noted.context("write the plan of the rollback")?;
        }
        done += piece.count().get();
    }
    Ok(draft)
}

/// Carries out the rollback that a state directory holds, whoever decided on it; none where there is none.
///
/// # Errors
/// The plan is damaged: nothing of it is done. The volume can't be written, or it is ended early: call it again.
pub(crate) fn carry_out(
    dir: &Path,
    volume: VolumeId,
    engine: &Intercept,
    told: Told<'_>,
) -> Result<Option<Plan>> {
    let unfinished = plan::remove_unfinished(dir);
    if let Some(kept) = unfinished.context("remove the unfinished plan of a rollback")? {
        match engine.delete_snapshot(kept) {
            // A loss of power has taken it, or nothing came of it.
            Ok(()) | Err(EngineError::NoSuchSnapshot(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let path = plan::path_in(dir);
    let damaged = |error: anyhow::Error| {
        anyhow!(
            "the volume is being rolled back, and {} can't be used ({error:#}): blocks of it may have been written; remove \
             the volume and restore a generation over its file, or move that file away to have the volume served as it is",
            path.display()
        )
    };
    let Some(mut decided) = Decided::open(dir).map_err(damaged)? else {
        return Ok(None);
    };
    let plan = decided.plan;
    if plan.volume != volume || plan.geometry != engine.geometry() {
        return Err(damaged(anyhow!("it is another volume's")));
    }
    // Whole, before the first block is written.
    decided.frames(|_| Ok(())).map_err(damaged)?;
    let mut done = 0;
    decided.frames(|frame| {
        if !told(done, plan.blocks) {
            bail!(RollbackError::Stopped);
        }
        write(engine, frame).context("put the volume back")?;
        done += frame.block_count().get();
        Ok(())
    })?;
    engine.flush().context("sync the volume")?;
    durable::remove_file(&path).context("remove the plan of the rollback")?;
    tracing::warn!(
        %volume, snapshot = %plan.snapshot, kept = %plan.kept, blocks = plan.blocks,
        "the volume was rolled back"
    );
    Ok(Some(plan))
}

/// Takes back the decision: the volume's file is another one now.
///
/// # Errors
/// The plan can't be removed.
pub(crate) fn forget(dir: &Path) -> Result<()> {
    plan::remove_unfinished(dir)
        .and_then(|_| durable::remove_file(&plan::path_in(dir)))
        .context("remove the plan of a rollback")
}

fn write(engine: &Intercept, frame: &VerifiedFrame) -> std::io::Result<()> {
    let geometry = engine.geometry();
    let mut data: &[u8] = frame.data();
    for &extent in frame.extents() {
        let (offset, length) = (
            geometry.offset_of(extent.start()).get(),
            geometry.bytes(extent.count()),
        );
        if frame.codec() == Codec::Zero {
            let flags = ZeroFlags {
                may_punch: true,
                fast_only: false,
                fua: false,
            };
            engine.write_zeroes(offset, length, flags)?;
        } else {
            // A frame holds at most 1 MiB of data.
            let (bytes, rest) = data.split_at(usize::try_from(length).unwrap_or(usize::MAX));
            engine.write(offset, bytes, Durability::from_fua(false))?;
            data = rest;
        }
    }
    Ok(())
}

/// Whether one was decided on and isn't carried out yet.
pub(crate) fn is_decided(dir: &Path) -> bool {
    plan::path_in(dir).exists()
}

#[cfg(test)]
mod tests;
