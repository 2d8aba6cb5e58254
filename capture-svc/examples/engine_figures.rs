//! Figures of the engine without a front end: 4 KiB random writes, against the same writes by plain `pwrite`.
//!
//! `cargo run --release -p capture-svc --example engine_figures [DIR]`, on the filesystem that matters.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use capture_svc::engine::{EngineOptions, EngineSetup, intercept::Intercept as Engine};
use tidemark_block::{BlockSize, Geometry, VolumeId};
use tidemark_export::{BlockDevice, Durability};

const BLOCKS: u64 = 1 << 18;
const THREADS: u64 = 4;
const TIME: Duration = Duration::from_secs(3);

/// Runs `write` on threads for a while; returns writes per second.
fn rate(write: impl Fn(u64, &[u8]) -> std::io::Result<()> + Sync) -> Result<f64> {
    let begun = Instant::now();
    let counts = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let write = &write;
                scope.spawn(move || {
                    let mut random = thread + 1;
                    let mut count = 0_u64;
                    let mut data = [0; 4096];
                    while begun.elapsed() < TIME {
                        for _ in 0..64 {
                            random = random
                                .wrapping_mul(6_364_136_223_846_793_005)
                                .wrapping_add(1);
                            data[..8].copy_from_slice(&random.to_le_bytes());
                            write((random >> 33) % BLOCKS * 4096, &data)?;
                        }
                        count += 64;
                    }
                    Ok::<_, std::io::Error>(count)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a writer doesn't panic"))
            .collect::<Vec<_>>()
    });
    let total: u64 = counts
        .into_iter()
        .sum::<std::io::Result<u64>>()
        .context("write")?;
    #[allow(clippy::cast_precision_loss, reason = "figures")]
    Ok(total as f64 / begun.elapsed().as_secs_f64())
}

fn main() -> Result<()> {
    let dir = std::env::args()
        .nth(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = dir.join(format!("engine-figures-{}", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    let path = dir.join("volume.img");
    let file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)?;
    let fill = vec![0x5A; 1 << 20];
    for n in 0..BLOCKS / 256 {
        file.write_all_at(&fill, n << 20)?;
    }
    file.sync_all()?;
    println!(
        "plain pwrite            {:9.0} writes/s",
        rate(|at, data| file.write_all_at(data, at))?
    );
    file.sync_all()?;

    let geometry = Geometry::new(BLOCKS * 4096, BlockSize::MIN)?;
    let id = VolumeId::from_bytes([1; 16]);
    let engine: Arc<Engine> = Engine::create(EngineSetup {
        dir: &dir.join("state"),
        volume: id,
        file: &path,
        geometry,
        options: EngineOptions::default(),
    })?;
    let write = |at: u64, data: &[u8]| engine.write(at, data, Durability::Volatile);
    println!("tracked, first touches  {:9.0} writes/s", rate(write)?);
    println!("tracked, steady         {:9.0} writes/s", rate(write)?);
    let interval = engine.begin_interval()?;
    engine.commit_interval(interval.epoch)?;
    drop(interval);
    engine.flush()?;
    for _ in 0..2 {
        let begun = Instant::now();
        let snapshot = engine.create_snapshot("", 0)?;
        let cut = begun.elapsed();
        let before = engine.stats().blocks_copied;
        let rate = rate(write)?;
        let copied = engine.stats().blocks_copied - before;
        println!(
            "under a new snapshot    {rate:9.0} writes/s, {copied} blocks copied, cut and record {cut:?}"
        );
        engine.delete_snapshot(snapshot.id)?;
    }
    engine.close()?;
    drop(engine);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
