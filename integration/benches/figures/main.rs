//! The figures that Tidemark is held to, each as a ratio to a peer that does the same work in the same run on the same
//! disk: `make bench`, or `cargo bench -p tidemark-integration --bench figures -- [OPTIONS] [SECTION…]`.
//!
//! It measures the release programs beside it, so build those first. Figures of a machine that does something else
//! meanwhile mean little; the ratios bear it better than the times.

mod cut;
mod fio;
mod fuse;
mod image;
mod interval;
mod nbd;
mod reflink;
mod report;
mod scan;
mod services;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use report::Report;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// The flip of a cut under full write load, against volume size; what cuts with 32 snapshots open do to writers
    Cut,
    /// An interval of scattered changes, trigger to receipt, against write + fsync of the same bytes
    Interval,
    /// An interval of a file that its workload writes itself, on XFS and btrfs
    Reflink,
    Scan,
    /// NBD with tracking, against nbdkit's file plugin
    Nbd,
    /// A filesystem on a loop device on a FUSE file, against qemu-storage-daemon and nbdfuse; needs root
    Fuse,
    /// The first full interval and the restore of a filesystem image, against cp
    Image,
}

#[derive(Debug, Parser)]
#[command(about = "Figures of Tidemark, as ratios to peers in the same run")]
struct Args {
    /// What to measure [default: everything]
    sections: Vec<Section>,
    /// Where the volumes lie; it must be the disk that matters, never tmpfs
    #[arg(long, default_value_os_t = default_dir())]
    dir: PathBuf,
    /// Rounds of each comparison; the medians are compared
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// GiB of the volumes whose intervals are measured
    #[arg(long, value_delimiter = ',', default_value = "8,1024")]
    interval_gib: Vec<u64>,
    /// Seconds of each fio run
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    fio_seconds: u32,
    /// GiB of real files in the image
    #[arg(long, default_value_t = 4.6)]
    image_gib: f64,
    /// Folders that the files of the image are taken from, in this order
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "/usr,/opt,/var/lib,/root,/home"
    )]
    image_from: Vec<PathBuf>,
    /// Print the figures as JSON too, one object a line
    #[arg(long)]
    json: bool,
    /// `cargo bench` passes this
    #[arg(long, hide = true)]
    bench: bool,
}

fn default_dir() -> PathBuf {
    std::env::temp_dir()
}

fn main() -> Result<()> {
    let args = Args::parse();
    let dir = tempfile::Builder::new()
        .prefix("tidemark-figures.")
        .tempdir_in(&args.dir)
        .with_context(|| format!("a working folder in {}", args.dir.display()))?;
    let wanted = |section| args.sections.is_empty() || args.sections.contains(&section);
    let mut report = Report::new(args.json);
    if wanted(Section::Cut) {
        cut::run(dir.path(), &args, &mut report)?;
    }
    if wanted(Section::Interval) {
        interval::run(dir.path(), &args, &mut report)?;
    }
    if wanted(Section::Reflink) {
        reflink::run(dir.path(), &args, &mut report)?;
    }
    if wanted(Section::Scan) {
        scan::run(dir.path(), &args, &mut report)?;
    }
    if wanted(Section::Nbd) {
        nbd::run(dir.path(), &args, &mut report)?;
    }
    if wanted(Section::Fuse) {
        fuse::run(dir.path(), &args, &mut report)?;
    }
    if wanted(Section::Image) {
        image::run(dir.path(), &args, &mut report)?;
    }
    report.close();
    Ok(())
}
