//! How long a cut holds writers up.

use std::{
    fs::File,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use capture_svc::engine::{EngineOptions, EngineSetup, intercept::Intercept as Engine};
use tidemark_block::{BlockSize, Geometry, VolumeId};
use tidemark_export::{BlockDevice as _, Durability};

use crate::{
    Args,
    report::{Bound, Report, millis},
};

const GIB: u64 = 1 << 30;
const WRITERS: u64 = 2;
const CUTS: usize = 50;
/// Snapshots that are open at each cut, where writers are watched.
const OPEN: usize = 32;
/// Between the cuts that writers are watched around.
const BETWEEN: Duration = Duration::from_millis(100);
/// What writers are watched on.
const WATCHED: u64 = GIB;

pub(crate) fn run(dir: &Path, _: &Args, report: &mut Report) -> Result<()> {
    report.section("A cut under full write load");
    for gib in [8, 1024] {
        let dir = dir.join(format!("cut-{gib}"));
        std::fs::create_dir_all(&dir)?;
        measure(&dir, gib, report).with_context(|| format!("cuts at {gib} GiB"))?;
        std::fs::remove_dir_all(&dir)?;
    }
    let dir = dir.join("cut-open");
    std::fs::create_dir_all(&dir)?;
    watch(&dir, report).context("cuts with snapshots open")?;
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

/// How long each write of some threads takes, in microseconds, while `work` runs.
fn writes_during(engine: &Engine, work: impl FnOnce() -> Result<()>) -> Result<Vec<u32>> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let stop = &stop;
                scope.spawn(move || -> Result<Vec<u32>> {
                    let (mut random, mut took) = (n + 1, Vec::new());
                    let data = [0x5A; 4096];
                    while !stop.load(Ordering::Relaxed) {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        let at = (random >> 33) % (WATCHED / 4096) * 4096;
                        let begun = Instant::now();
                        engine.write(at, &data, Durability::Volatile)?;
                        let micros = begun.elapsed().as_micros();
                        took.push(u32::try_from(micros).unwrap_or(u32::MAX));
                    }
                    Ok(took)
                })
            })
            .collect();
        let done = work();
        stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for writer in writers {
            all.extend(writer.join().expect("a writer doesn't panic")?);
        }
        done?;
        all.sort_unstable();
        Ok(all)
    })
}

/// What writers feel of cuts while many snapshots are open.
fn watch(dir: &Path, report: &mut Report) -> Result<()> {
    let path = dir.join("volume.img");
    let file = File::create(&path)?;
    let chunk = vec![0x11; 1 << 20];
    for n in 0..WATCHED >> 20 {
        std::os::unix::fs::FileExt::write_all_at(&file, &chunk, n << 20)?;
    }
    file.sync_all()?;
    let geometry = Geometry::new(WATCHED, BlockSize::MIN)?;
    let options = EngineOptions {
        spool_bytes_max: 8 * GIB,
        ..EngineOptions::default()
    };
    let id = VolumeId::from_bytes([1; 16]);
    let engine = Engine::create(EngineSetup {
        dir: &dir.join("state"),
        volume: id,
        file: &path,
        geometry,
        options,
    })?;
    // The first touch of each region waits for the disk whether there are cuts or not.
    for region in 0..WATCHED >> 20 {
        engine.write(region << 20, &[0x22; 4096], Durability::Volatile)?;
    }

    let calm = writes_during(&engine, || {
        std::thread::sleep(BETWEEN * u32::try_from(CUTS)?);
        Ok(())
    })?;
    let (mut open, mut flips) = (std::collections::VecDeque::new(), Vec::new());
    let cut = |open: &mut std::collections::VecDeque<_>| -> Result<()> {
        open.push_back(engine.create_snapshot("", 0)?.id);
        Ok(())
    };
    let stalled = writes_during(&engine, || {
        while open.len() < OPEN {
            cut(&mut open)?;
            std::thread::sleep(BETWEEN);
        }
        Ok(())
    })
    .and_then(|_| {
        writes_during(&engine, || {
            for _ in 0..CUTS {
                cut(&mut open)?;
                flips.push(millis(engine.stats().last_flip) * 1e3);
                if let Some(oldest) = open.pop_front() {
                    engine.delete_snapshot(oldest)?;
                }
                std::thread::sleep(BETWEEN);
            }
            Ok(())
        })
    })?;
    let held = engine.list_snapshots().len();
    anyhow::ensure!(
        held == OPEN,
        "{held} snapshots are open: the spool was full"
    );
    engine.close()?;
    let at =
        |sorted: &[u32], share: usize| f64::from(sorted[(sorted.len() - 1) * share / 1000]) / 1e3;
    let what = format!("{CUTS} cuts, {OPEN} snapshots open");
    report.alone(
        &format!("{what}: p99.9 of writes"),
        "ms",
        at(&stalled, 999),
        Bound::AtMost(5.0),
    );
    report.alone(
        &format!("{what}: longest write"),
        "ms",
        at(&stalled, 1000),
        Bound::None,
    );
    let worst = flips.iter().copied().fold(0.0, f64::max);
    report.alone(
        &format!("{what}: worst flip"),
        "us",
        worst,
        Bound::AtMost(1000.0),
    );
    report.alone(
        "the same writes without cuts: p99.9",
        "ms",
        at(&calm, 999),
        Bound::None,
    );
    report.alone("  longest", "ms", at(&calm, 1000), Bound::None);
    Ok(())
}

/// Cuts again and again while threads write as fast as they can.
fn measure(dir: &Path, gib: u64, report: &mut Report) -> Result<()> {
    let path = dir.join("volume.img");
    File::create(&path)?.set_len(gib * GIB)?;
    let geometry = Geometry::new(gib * GIB, BlockSize::MIN)?;
    let options = EngineOptions::default();
    let id = VolumeId::from_bytes([1; 16]);
    let engine = Engine::create(EngineSetup {
        dir: &dir.join("state"),
        volume: id,
        file: &path,
        geometry,
        options,
    })?;

    let stop = AtomicBool::new(false);
    let (mut whole, mut flips) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| -> Result<()> {
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let (engine, stop) = (&engine, &stop);
                scope.spawn(move || -> Result<()> {
                    let mut random = n + 1;
                    let data = [0x5A; 4096];
                    // Within 1 GiB, so that the file stays small.
                    while !stop.load(Ordering::Relaxed) {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        let at = (random >> 33) % (GIB / 4096) * 4096;
                        engine.write(at, &data, Durability::Volatile)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let cut_all = (0..CUTS).try_for_each(|_| -> Result<()> {
            let begun = Instant::now();
            let snapshot = engine.create_snapshot("", 0)?;
            whole.push(millis(begun.elapsed()));
            flips.push(millis(engine.stats().last_flip) * 1e3);
            engine.delete_snapshot(snapshot.id)?;
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().expect("a writer doesn't panic")?;
        }
        cut_all
    })?;
    engine.close()?;
    let worst = |times: &[f64]| times.iter().copied().fold(0.0, f64::max);
    report.alone(
        &format!("flip, {gib} GiB, worst of {CUTS}"),
        "us",
        worst(&flips),
        Bound::AtMost(1000.0),
    );
    report.alone(
        &format!("snapshot with its durable record, {gib} GiB, worst of {CUTS}"),
        "ms",
        worst(&whole),
        Bound::None,
    );
    Ok(())
}
