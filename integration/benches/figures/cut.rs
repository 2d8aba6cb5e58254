//! How long a cut holds writers up.

use std::{
    fs::File,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use anyhow::{Context, Result};
use capture_svc::engine::{EngineOptions, intercept::Intercept as Engine};
use tidemark_block::{BlockSize, Geometry, VolumeId};
use tidemark_export::{BlockDevice as _, Durability};

use crate::{
    Args,
    report::{Bound, Report, millis},
};

const GIB: u64 = 1 << 30;
const WRITERS: u64 = 2;
const CUTS: usize = 50;

pub(crate) fn run(dir: &Path, _: &Args, report: &mut Report) -> Result<()> {
    report.section("A cut under full write load");
    for gib in [8, 1024] {
        let dir = dir.join(format!("cut-{gib}"));
        std::fs::create_dir_all(&dir)?;
        measure(&dir, gib, report).with_context(|| format!("cuts at {gib} GiB"))?;
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(())
}

/// Cuts again and again while threads write as fast as they can.
fn measure(dir: &Path, gib: u64, report: &mut Report) -> Result<()> {
    let path = dir.join("volume.img");
    File::create(&path)?.set_len(gib * GIB)?;
    let geometry = Geometry::new(gib * GIB, BlockSize::MIN)?;
    let options = EngineOptions::default();
    let id = VolumeId::from_bytes([1; 16]);
    let engine = Engine::create(&dir.join("state"), id, &path, geometry, options)?;

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
