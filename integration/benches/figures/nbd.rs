//! What tracking and copy-before-write cost a client of NBD.

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anyhow::{Context, Result, ensure};
use tidemark_integration::{
    args,
    programs::{have, wait_for},
};

use crate::{
    Args,
    fio::{Job, Seen},
    report::{Bound, Report, median},
    services::Services,
};

const MIB: u64 = 1 << 20;
const VOLUME: u64 = 2048 * MIB;

const STEADY: [Job; 6] = [
    Job {
        what: "4 KiB random write, depth 32",
        rw: "randwrite",
        block: "4k",
        depth: 32,
    },
    Job {
        what: "4 KiB random write, depth 1",
        rw: "randwrite",
        block: "4k",
        depth: 1,
    },
    Job {
        what: "4 KiB random read, depth 32",
        rw: "randread",
        block: "4k",
        depth: 32,
    },
    Job {
        what: "4 KiB random read, depth 1",
        rw: "randread",
        block: "4k",
        depth: 1,
    },
    Job {
        what: "128 KiB sequential write, depth 8",
        rw: "write",
        block: "128k",
        depth: 8,
    },
    Job {
        what: "128 KiB sequential read, depth 8",
        rw: "read",
        block: "128k",
        depth: 8,
    },
];

/// One server with one export.
struct Server {
    uri: String,
}

impl Server {
    fn run(&self, job: &Job, seconds: u32) -> Result<Seen> {
        let on = ["--ioengine=nbd".to_owned(), format!("--uri={}", self.uri)];
        job.run(&on, VOLUME, seconds)
    }
}

pub(crate) fn run(dir: &Path, args: &Args, report: &mut Report) -> Result<()> {
    report.section("NBD over a unix socket, one connection, warm cache; peer: nbdkit file");
    if !have(&["fio", "nbdkit"]) {
        return Ok(());
    }
    let dir = dir.join("nbd");
    std::fs::create_dir(&dir)?;
    let peer = Nbdkit::start(&dir)?;
    let mut services = Services::start(&dir.join("ours"), &["--spool-bytes-max=4GiB"])?;
    let volume = dir.join("data.img");
    fill(&volume)?;
    services.add("data", &volume, VOLUME);
    services.ship("data")?;
    let ours = Server {
        uri: format!("nbd+unix:///data?socket={}", services.socket().display()),
    };

    let [write, ..] = &STEADY;
    // Nothing is in the intent map after an interval: each region is written to for the first time.
    let seen = ours.run(write, 1)?;
    let theirs = peer.server.run(write, 1)?;
    report.ratio(
        "first second: first touch of each region",
        "IOPS",
        seen.iops,
        theirs.iops,
        Bound::None,
    );

    for job in &STEADY {
        let (mut our, mut their) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            their.push(peer.server.run(job, args.fio_seconds)?);
            our.push(ours.run(job, args.fio_seconds)?);
        }
        compare(job.what, &our, &their, Some(0.9), report);
    }

    let (mut our, mut their) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        services.split.cli.json(args!["snapshot", "create", "data"]);
        their.push(peer.server.run(write, args.fio_seconds)?);
        our.push(ours.run(write, args.fio_seconds)?);
        let id = (round + 1).to_string();
        services
            .split
            .cli
            .json(args!["snapshot", "delete", "data", id]);
    }
    let what = "4 KiB random write, depth 32, snapshot open, first overwrites";
    compare(what, &our, &their, Some(0.5), report);
    services.ship("data")?;
    services.stop("NBD", report);
    drop(peer);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn compare(what: &str, ours: &[Seen], theirs: &[Seen], bound: Option<f64>, report: &mut Report) {
    let middle =
        |seen: &[Seen], of: fn(&Seen) -> f64| median(&seen.iter().map(of).collect::<Vec<_>>());
    let (iops, theirs_iops) = (middle(ours, |s| s.iops), middle(theirs, |s| s.iops));
    report.ratio(
        what,
        "IOPS",
        iops,
        theirs_iops,
        bound.map_or(Bound::None, Bound::AtLeast),
    );
    let (p999, theirs_p999) = (middle(ours, |s| s.p999_us), middle(theirs, |s| s.p999_us));
    // Only the steady state is held to the peer's tail.
    let bound = if bound == Some(0.9) {
        Bound::AtMost(1.0)
    } else {
        Bound::None
    };
    report.ratio("  p99.9 of it", "us", p999, theirs_p999, bound);
}

/// A file without holes: both servers overwrite, neither allocates.
fn fill(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    let mut chunk = vec![0x5A; 1 << 20];
    for n in 0..VOLUME / MIB {
        chunk[..8].copy_from_slice(&(n + 1).to_le_bytes());
        file.write_all_at(&chunk, n * MIB)?;
    }
    file.sync_all()?;
    Ok(())
}

/// The peer: the fastest server of files that there is.
struct Nbdkit {
    child: Child,
    server: Server,
}

impl Nbdkit {
    fn start(dir: &Path) -> Result<Self> {
        let (socket, file): (PathBuf, PathBuf) = (dir.join("nbdkit.sock"), dir.join("peer.img"));
        fill(&file)?;
        let file = format!("file={}", file.display());
        let child = Command::new("nbdkit")
            .args([
                OsStr::new("--foreground"),
                OsStr::new("--unix"),
                socket.as_os_str(),
            ])
            .args(["file", &file])
            .spawn()
            .context("nbdkit")?;
        let socket = wait_for("nbdkit", || socket.exists().then_some(&socket));
        ensure!(socket.exists());
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Ok(Self {
            child,
            server: Server { uri },
        })
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        // It has nothing to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
