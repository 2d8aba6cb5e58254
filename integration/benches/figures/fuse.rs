//! What a filesystem gets that lies on a loop device on a FUSE file.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result};
use tidemark_integration::{
    args,
    programs::{have, run as run_program, wait_for},
    small_disk::may_mount,
};

use crate::{
    Args,
    fio::{Job, Seen},
    report::{Bound, Report, median},
    services::Services,
};

const MIB: u64 = 1 << 20;
const VOLUME: u64 = 1536 * MIB;
/// Of the file in the filesystem that is written to.
const WORKED_ON: u64 = 1024 * MIB;
/// The largest request to a loop device, for all servers alike.
const REQUEST_KIB_MAX: &str = "512";
/// What ours must be of the best peer's.
const AHEAD: f64 = 1.5;

const JOBS: [Job; 2] = [
    Job {
        what: "4 KiB random write, depth 1",
        rw: "randwrite",
        block: "4k",
        depth: 1,
    },
    Job {
        what: "4 KiB random write, depth 32",
        rw: "randwrite",
        block: "4k",
        depth: 32,
    },
];

/// Who serves the file that the loop device is on.
struct Server {
    name: &'static str,
    file: PathBuf,
    /// Ends with this.
    _process: Option<Running>,
}

/// A peer, killed when it is dropped; it has nothing to lose.
struct Running {
    child: Child,
    mounted: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(&self.mounted)
            .stderr(Stdio::null())
            .status();
    }
}

impl Running {
    fn start(program: &str, args: &[&OsStr], mounted: &Path) -> Result<Self> {
        let child = Command::new(program)
            .args(args)
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| program.to_owned())?;
        Ok(Self {
            child,
            mounted: mounted.to_owned(),
        })
    }
}

/// Waits until the file is what is served: it has its size only then.
fn served(file: &Path) {
    wait_for("a peer to serve its file", || {
        let length = fs::metadata(file).ok()?.len();
        (length == VOLUME).then_some(())
    });
}

fn image(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    File::create(&path)?.set_len(VOLUME)?;
    Ok(path)
}

impl Server {
    /// Nobody: the bound of what can be.
    fn plain(dir: &Path) -> Result<Self> {
        Ok(Self {
            name: "no FUSE",
            file: image(dir, "plain.img")?,
            _process: None,
        })
    }

    fn qemu(dir: &Path) -> Result<Self> {
        let (image, at) = (image(dir, "qemu.img")?, dir.join("qemu"));
        File::create(&at)?;
        let export = format!(
            "type=fuse,id=export,node-name=raw,mountpoint={},writable=on",
            at.display()
        );
        let file = format!("driver=file,node-name=file,filename={}", image.display());
        let process = Running::start(
            "qemu-storage-daemon",
            args![
                "--blockdev",
                file,
                "--blockdev",
                "driver=raw,node-name=raw,file=file",
                "--export",
                export
            ],
            &at,
        )?;
        served(&at);
        Ok(Self {
            name: "qemu-storage-daemon",
            file: at,
            _process: Some(process),
        })
    }

    fn nbdfuse(dir: &Path) -> Result<Self> {
        let (image, at) = (image(dir, "nbdkit.img")?, dir.join("nbdfuse"));
        fs::create_dir(&at)?;
        let file = at.join("disk");
        let process = Running::start(
            "nbdfuse",
            args![file, "--command", "nbdkit", "-s", "file", image],
            &at,
        )?;
        served(&file);
        Ok(Self {
            name: "nbdfuse and nbdkit",
            file,
            _process: Some(process),
        })
    }
}

/// A filesystem on a server's file, with a file in it that is written over and over.
struct Mounted {
    device: String,
    at: PathBuf,
}

impl Mounted {
    fn new(server: &Server, at: PathBuf) -> Result<Self> {
        let set = args!["--find", "--show", server.file];
        let device = run_program("losetup", set).trim().to_owned();
        fs::create_dir(&at)?;
        let mounted = Self { device, at };
        run_program(
            "mkfs.ext4",
            args![
                "-q",
                "-E",
                "lazy_itable_init=0,lazy_journal_init=0",
                mounted.device
            ],
        );
        // Only now: qemu-storage-daemon corrupts what is written to a loop device with direct I/O, large requests most of
        // all, and a filesystem that was made so doesn't mount.
        run_program("losetup", args!["--direct-io=on", mounted.device]);
        let name = mounted.device.trim_start_matches("/dev/");
        let queue = format!("/sys/block/{name}/queue/max_sectors_kb");
        fs::write(queue, REQUEST_KIB_MAX)?;
        run_program("mount", args!["-o", "noatime", mounted.device, mounted.at]);
        run_program(
            "fio",
            args![
                "--name=lay",
                mounted.file(),
                "--rw=write",
                "--bs=1M",
                format!("--size={WORKED_ON}"),
                "--end_fsync=1",
                "--minimal"
            ],
        );
        Ok(mounted)
    }

    fn file(&self) -> String {
        format!("--filename={}", self.at.join("file").display())
    }

    fn run(&self, job: &Job, seconds: u32) -> Result<Seen> {
        let on = [
            self.file(),
            "--ioengine=libaio".to_owned(),
            "--direct=1".to_owned(),
        ];
        job.run(&on, WORKED_ON, seconds)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for (program, arguments) in [
            ("umount", args![self.at].as_slice()),
            ("losetup", args!["--detach", self.device].as_slice()),
        ] {
            // What is left of a run that failed ends with its server.
            let _ = Command::new(program).args(arguments).status();
        }
    }
}

pub(crate) fn run(dir: &Path, args: &Args, report: &mut Report) -> Result<()> {
    report.section("ext4 on a loop device (direct I/O) on a FUSE file");
    let needed = [
        "fio",
        "losetup",
        "mkfs.ext4",
        "qemu-storage-daemon",
        "nbdfuse",
        "nbdkit",
    ];
    if !may_mount() || !have(&needed) {
        return Ok(());
    }
    let dir = dir.join("fuse");
    fs::create_dir(&dir)?;
    let files = dir.join("files");
    let flag = format!("--fuse-mount={}", files.display());
    let mut services = Services::start(&dir.join("ours"), &[&flag])?;
    services.add("data", &dir.join("data.img"), VOLUME);
    let ours = Server {
        name: "ours",
        file: files.join("data.img"),
        _process: None,
    };
    let servers = [
        ours,
        Server::qemu(&dir)?,
        Server::nbdfuse(&dir)?,
        Server::plain(&dir)?,
    ];
    let mounted: Vec<_> = servers
        .iter()
        .enumerate()
        .map(|(n, server)| Mounted::new(server, dir.join(format!("mounted-{n}"))))
        .collect::<Result<_>>()?;
    // From here on nothing ships, and the first touch of each region is behind us.
    services.ship("data")?;
    for mounted in &mounted {
        mounted.run(&JOBS[1], args.fio_seconds)?;
    }
    for job in &JOBS {
        let mut iops = vec![Vec::new(); servers.len()];
        for _ in 0..args.rounds {
            for (mounted, seen) in mounted.iter().zip(&mut iops) {
                seen.push(mounted.run(job, args.fio_seconds)?.iops);
            }
        }
        let medians: Vec<_> = iops.iter().map(|seen| median(seen)).collect();
        let best = medians[1].max(medians[2]);
        let line = format!("{}, best peer", job.what);
        report.ratio(&line, "IOPS", medians[0], best, Bound::AtLeast(AHEAD));
        for (server, peer) in servers.iter().zip(&medians).skip(1) {
            let line = format!("  beside {}", server.name);
            report.ratio(&line, "IOPS", medians[0], *peer, Bound::None);
        }
    }
    drop(mounted);
    drop(servers);
    services.stop("FUSE", report);
    fs::remove_dir_all(&dir)?;
    Ok(())
}
