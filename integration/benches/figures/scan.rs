//! What a cut costs of a file that is read as a whole, on one core.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use tidemark_integration::args;

use crate::{
    Args,
    report::{Bound, Report, median, timed},
    services::Services,
};

const GIB: u64 = 1 << 30;
const SIZE: u64 = 8 * GIB;

pub(crate) fn run(dir: &Path, args: &Args, report: &mut Report) -> Result<()> {
    report.section("Cuts of an unchanged cached file that is scanned, capture service on one core");
    let dir = dir.join("scan");
    fs::create_dir_all(&dir)?;
    let path = dir.join("data.img");
    fill(&path)?;
    live(&dir, &path, args, report)?;
    quiesced(&dir, &path, args, report)?;
    fs::remove_dir_all(&dir)?;
    Ok(())
}

fn services(dir: &Path, path: &Path, flags: &[&str]) -> Result<Services> {
    let mut services = Services::start(dir, flags)?;
    services.split.cli.json(args![
        "volume", "add", "data", "--file", path, "--engine", "scan"
    ]);
    services.ship("data")?;
    let pid = services.split.capture_pid().to_string();
    let bound = Command::new("taskset")
        .args(["--all-tasks", "--pid", "--cpu-list", "0", &pid])
        .stdout(Stdio::null())
        .status()
        .context("run taskset")?;
    ensure!(bound.success(), "taskset: {bound}");
    Ok(services)
}

/// Nobody is quiesced: the file is read twice.
fn live(dir: &Path, path: &Path, args: &Args, report: &mut Report) -> Result<()> {
    let mut services = services(
        &dir.join("live"),
        path,
        &[
            "--codec=raw",
            "--lull-wait-max=60s",
            "--spool-bytes-max=1MiB",
        ],
    )?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let gib = SIZE as f64 / GIB as f64;
        let (time, receipt) = timed(|| services.ship("data"))?;
        ensure!(receipt.changed_blocks == 0, "{receipt:?}");
        ours.push(2.0 * gib / (time / 1000.0));
        let (time, ()) = timed(|| read_by_cat(path))?;
        peer.push(gib / (time / 1000.0));
    }
    report.ratio(
        "bytes read and compared; peer: cat to /dev/null",
        "GiB/s",
        median(&ours),
        median(&peer),
        Bound::None,
    );
    report.alone(
        "the same",
        "GB/s",
        median(&ours) * GIB as f64 / 1e9,
        Bound::AtLeast(5.0),
    );
    services.stop("scans of a file", report);
    Ok(())
}

fn quiesced(dir: &Path, path: &Path, args: &Args, report: &mut Report) -> Result<()> {
    let flags = [
        "--codec=raw",
        "--quiesce-pre=true",
        "--quiesce-post=true",
        "--quiesce-timeout=120s",
        "--spool-bytes-max=1MiB",
    ];
    let mut services = services(&dir.join("quiesced"), path, &flags)?;
    services.ship("data")?;
    let mut times = Vec::new();
    for _ in 0..args.rounds {
        let (time, receipt) = timed(|| services.ship("data"))?;
        ensure!(receipt.changed_blocks == 0, "{receipt:?}");
        times.push(time);
    }
    report.alone(
        "quiesced, not written since the last cut, trigger to receipt",
        "ms",
        median(&times),
        Bound::AtMost(50.0),
    );
    services.stop("quiesced scans of a file", report);
    Ok(())
}

fn fill(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    let mut bytes = vec![0; 1 << 20];
    for at in (0..SIZE).step_by(bytes.len()) {
        for (n, block) in bytes.chunks_exact_mut(4096).enumerate() {
            block[..8].copy_from_slice(&(at / 4096 + n as u64 + 1).to_le_bytes());
        }
        file.write_all_at(&bytes, at)?;
    }
    file.sync_all()?;
    Ok(())
}

fn read_by_cat(path: &Path) -> Result<()> {
    let read = Command::new("taskset")
        .args(["--cpu-list", "0", "cat"])
        .arg(path)
        .stdout(Stdio::null())
        .status()
        .context("run cat")?;
    ensure!(read.success(), "cat: {read}");
    Ok(())
}
