//! What an interval costs of a file that its workload writes itself, on filesystems that clone files.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};
use tidemark_integration::{args, programs::run as program};

use crate::{
    Args,
    report::{Bound, Report, median, timed},
    services::Services,
};

const BLOCK_LEN: usize = 4096;
const BLOCK: u64 = 4096;
const CHANGED: usize = 10_000;
const GIB: u64 = 1 << 30;
const SIZE: u64 = 8 * GIB;
const MIB: f64 = 1_048_576.0;

/// A filesystem in a file, mounted until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(dir: &Path, kind: &str) -> Result<Self> {
        let (image, at) = (dir.join("disk"), dir.join("mounted"));
        File::create(&image)?.set_len(2 * SIZE + 4 * GIB)?;
        fs::create_dir_all(&at)?;
        program(&format!("mkfs.{kind}"), args!["-q", image]);
        program("mount", args!["-o", "loop", image, at]);
        Ok(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

pub(crate) fn run(dir: &Path, args: &Args, report: &mut Report) -> Result<()> {
    report.section("An interval of 10,000 scattered changed 4 KiB blocks of an 8 GiB file, written by its workload");
    if !rustix::process::geteuid().is_root() {
        println!("not measured: mounting needs root");
        return Ok(());
    }
    for kind in ["xfs", "btrfs"] {
        let dir = dir.join(format!("reflink-{kind}"));
        fs::create_dir_all(&dir)?;
        measure(&dir, kind, args, report).with_context(|| format!("intervals on {kind}"))?;
        fs::remove_dir_all(&dir)?;
    }
    Ok(())
}

fn measure(dir: &Path, kind: &str, args: &Args, report: &mut Report) -> Result<()> {
    let disk = Mounted::new(dir, kind)?;
    let at = dir.join("services");
    let mut rng = StdRng::seed_from_u64(1);
    let (mut times, mut stalls, mut read) = (Vec::new(), Vec::new(), Vec::new());
    let (mut idle, mut peer) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        // A new file each time, which a round leaves in 20,000 pieces, and a new store, for there is no room for all.
        let mut services = Services::start(&at, &["--codec", "raw"])?;
        let path = disk.0.join("data.img");
        fill(&path)?;
        services.split.cli.json(args![
            "volume", "add", "data", "--file", path, "--engine", "reflink"
        ]);
        services.ship("data")?;
        scatter(&File::options().write(true).open(&path)?, &mut rng)?;
        let before = bytes_read(services.split.capture_pid())?;
        let (time, receipt) = timed(|| services.ship("data"))?;
        ensure!(receipt.changed_blocks == CHANGED as u64, "{receipt:?}");
        times.push(time);
        read.push(bytes_read(services.split.capture_pid())? - before);
        let shown = services.split.cli.json(args!["volume", "show", "data"]);
        stalls.push(shown["cut_stall_us"].as_f64().unwrap_or(0.0) / 1000.0);
        idle.push(timed(|| services.ship("data"))?.0);
        services.split.cli.json(args!["volume", "remove", "data"]);
        fs::remove_file(&path)?;
        if round + 1 == args.rounds {
            services.stop(&format!("interval of a file on {kind}"), report);
        } else {
            services.end();
        }
        fs::remove_dir_all(&at)?;
        if kind == "btrfs" {
            peer.push(send(dir, &disk.0.join("peer"), &mut rng)?);
        }
    }
    let what = format!("{kind}: trigger to receipt, dirty pages included");
    report.alone(&what, "ms", median(&times), Bound::AtMost(1000.0));
    if !peer.is_empty() {
        report.ratio(
            "the same; peer: sync, snapshot, btrfs send to a file",
            "ms",
            median(&times),
            median(&peer),
            Bound::None,
        );
    }
    let what = format!("{kind}: of it, writers wait");
    report.alone(&what, "ms", median(&stalls), Bound::None);
    let changed = (CHANGED as u64 * BLOCK) as f64;
    report.ratio(
        &format!("{kind}: bytes read; peer: those of the changed blocks"),
        "MiB",
        median(&read) / MIB,
        changed / MIB,
        Bound::AtMost(1.2),
    );
    let what = format!("{kind}: no change, the file in 20,000 pieces");
    report.alone(&what, "ms", median(&idle), Bound::None);
    Ok(())
}

/// The peer's interval of as many blocks of such a file, in a subvolume of its own: how long it takes, in milliseconds.
fn send(dir: &Path, subvolume: &Path, rng: &mut StdRng) -> Result<f64> {
    let sent = dir.join("sent");
    let [base, now] = ["base", "now"].map(|of| subvolume.with_extension(of));
    program("btrfs", args!["subvolume", "create", subvolume]);
    let path = subvolume.join("data.img");
    fill(&path)?;
    program(
        "btrfs",
        args!["subvolume", "snapshot", "-r", subvolume, base],
    );
    scatter(&File::options().write(true).open(&path)?, rng)?;
    let (time, ()) = timed(|| {
        program("sync", args!["--file-system", path]);
        program(
            "btrfs",
            args!["subvolume", "snapshot", "-r", subvolume, now],
        );
        program("btrfs", args!["send", "-q", "-p", base, "-f", sent, now]);
        Ok(File::open(&sent)?.sync_all()?)
    })?;
    program("btrfs", args!["subvolume", "delete", subvolume, base, now]);
    // Their space is free only then.
    program("btrfs", args!["subvolume", "sync", dir.join("mounted")]);
    Ok(time)
}

/// One piece, each block other than the next.
fn fill(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, SIZE)?;
    let piece = 1 << 20;
    let mut bytes = vec![0; piece];
    for at in (0..SIZE).step_by(piece) {
        for (n, block) in bytes.chunks_exact_mut(BLOCK_LEN).enumerate() {
            block[..8].copy_from_slice(&(at / BLOCK + n as u64 + 1).to_le_bytes());
        }
        file.write_all_at(&bytes, at)?;
    }
    file.sync_all()?;
    Ok(())
}

fn scatter(file: &File, rng: &mut StdRng) -> Result<()> {
    let mut places = BTreeSet::new();
    while places.len() < CHANGED {
        places.insert(rng.random_range(0..SIZE / BLOCK));
    }
    let mut block = [0; BLOCK_LEN];
    for place in places {
        rng.fill_bytes(&mut block);
        file.write_all_at(&block, place * BLOCK)?;
    }
    Ok(())
}

/// What a process has had read from disks so far.
fn bytes_read(pid: u32) -> Result<f64> {
    let told = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = told
        .lines()
        .find_map(|line| line.strip_prefix("read_bytes: "));
    Ok(line.context("no read_bytes in /proc/PID/io")?.parse()?)
}
