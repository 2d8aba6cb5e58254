//! Volumes and snapshots at the capture service, and what is asked of it for one volume.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use crate::parse;

/// How a volume's changes are tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// What fits: intercept where volumes are served by NBD or FUSE, else reflink, else scan
    Auto,
    /// All writes come through NBD or FUSE
    Intercept,
    /// The workload writes the file itself, on XFS or btrfs: cuts are clones of it
    Reflink,
    /// The workload writes the file itself, on any local filesystem: each cut reads all of it
    Scan,
}

impl Engine {
    /// As requests name it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Intercept => "intercept",
            Self::Reflink => "reflink",
            Self::Scan => "scan",
        }
    }
}

/// `tidemark volume …`.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Protect a file: serve it by NBD, track its changes, ship them
    #[command(after_help = "\
A file that does not exist is created, sparse, with the length of --size. One that exists is adopted as it is;
--size may then be left out. With the engine intercept write to it only through the NBD export, which has the volume's
name, or its file of the mounted directory, from then on. With the engine reflink, on XFS or btrfs, go on writing to the
file itself.

Examples:
  tidemark volume add data --file /srv/data.img --size 8GiB
  tidemark volume add disk0 --file disk0.img --block-size 64KiB
  tidemark volume add db --file /xfs/db.img --engine reflink
  tidemark volume add data --file /srv/data.img --size 8GiB --if-missing          may be run at each start")]
    Add {
        /// 1 to 63 of a-z 0-9 . _ - and the first a letter or digit
        name: String,
        /// The volume file, as the capture service sees it
        #[arg(long, value_name = "PATH")]
        file: PathBuf,
        /// Length of the volume: bytes, or with KiB, MiB, GiB, TiB [default: the file's own length]
        #[arg(long, value_parser = parse::size)]
        size: Option<u64>,
        /// Unit of tracking: a power of two from 4KiB to 64KiB
        #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse::size)]
        block_size: u64,
        /// How changes are tracked [default: as the capture service is configured]
        #[arg(long, value_enum)]
        engine: Option<Engine>,
        /// Succeed where the volume is there already just as it is asked for
        #[arg(long)]
        if_missing: bool,
    },
    /// List the volumes of the capture service
    List,
    /// Show everything about one volume
    Show {
        /// Name or UUID
        volume: String,
    },
    /// Stop protecting a volume; its file and its generations stay
    Remove {
        /// Name or UUID
        volume: String,
        /// Also while clients are connected, snapshots are open, or its clones are not there to be removed
        #[arg(long)]
        force: bool,
    },
    /// Take a volume's file as it is now: compare every block with the vault, ship what differs
    #[command(after_help = "\
For a volume whose file is not the recorded one any more: restored, or copied back to another disk. It is not served
until this says that the file is meant. Nothing is sent but blocks that differ from the newest generation. The
snapshots of the file that was there before are gone.

A volume that is served goes on and keeps its snapshots; only every block is compared once more. With --engine it is
closed and opened with that engine: clients must be disconnected, and its snapshots are gone.

Examples:
  tidemark volume readopt data
  tidemark volume readopt data --engine reflink")]
    Readopt {
        /// Name or UUID
        volume: String,
        /// Give the volume another engine: its snapshots are gone then
        #[arg(long, value_enum)]
        engine: Option<Engine>,
    },
}

/// `tidemark snapshot …`.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Take a snapshot: instant, and unchanged by whatever is written afterwards
    #[command(after_help = "\
The service looks for the best moment, as for an interval: it asks whoever can to quiesce the workload, or waits for a
pause, at most lull_wait_max. How good the moment was is listed with the snapshot. With --now it takes what comes.

Several volumes are cut at one instant: of two writes, one after the other, the snapshots never show the second without
the first. All of them are taken, or none.

Examples:
  tidemark snapshot create data --label before-upgrade
  tidemark snapshot create data wal
  tidemark snapshot create data --now")]
    Create {
        /// Names or UUIDs
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
        /// A note for people, at most 255 bytes
        #[arg(long, default_value = "")]
        label: String,
        /// At once, without looking for a good moment
        #[arg(long)]
        now: bool,
    },
    /// List the snapshots of a volume, oldest first
    List {
        /// Name or UUID
        volume: String,
    },
    /// Write a snapshot's content to a file, verified
    #[command(after_help = "\
Without --since the file appears only when it is whole and verified. With --since OLD, FILE must hold what
`snapshot read VOLUME OLD` wrote: only what changed since is read and written into it, in place. If that is
interrupted FILE is neither of the two; run the same command again to finish.

Examples:
  tidemark snapshot read data 3 --output monday.img
  cp --sparse=always monday.img tuesday.img
  tidemark snapshot read data 4 --since 3 --output tuesday.img")]
    Read {
        /// Name or UUID
        volume: String,
        /// The snapshot's number
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        snapshot: u64,
        /// Where to write it
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
        /// Patch FILE, a copy of this older snapshot, with only what changed
        #[arg(long, value_name = "OLD", value_parser = clap::value_parser!(u64).range(1..))]
        since: Option<u64>,
        /// Replace FILE where it exists
        #[arg(long, conflicts_with = "since")]
        force: bool,
    },
    /// Put the volume back, in place, to what it was at a snapshot
    #[command(after_help = "\
What the volume holds now is kept as another snapshot, so that a rollback can be rolled back. It happens as a whole: after
a crash or a loss of power the volume is what it was before, or what it was at the snapshot. Clients must be disconnected,
or are with --force; unmount filesystems first.

Example:
  tidemark snapshot rollback data 3")]
    Rollback {
        /// Name or UUID
        volume: String,
        /// The snapshot's number
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        snapshot: u64,
        /// Disconnect clients
        #[arg(long)]
        force: bool,
    },
    /// Delete a snapshot and free its part of the spool
    Delete {
        /// Name or UUID
        volume: String,
        /// The snapshot's number
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        snapshot: u64,
    },
}

/// `tidemark ship`.
#[derive(Debug, Args)]
#[command(after_help = "\
Where nothing changed since the last cut no generation is made: the receipt names the one that is still current.
Neither interrupting the command nor its giving up ends the shipping: that goes on until the vault has the interval.

Examples:
  tidemark ship data
  tidemark ship data --json | jq .generation")]
pub struct ShipArgs {
    /// Name or UUID
    pub volume: String,
    /// How long to wait for a vault that cannot be reached
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse::duration)]
    pub wait_for_vault: Duration,
}

/// `tidemark scrub`.
#[derive(Debug, Args)]
#[command(after_help = "\
Every block that has not changed since the newest generation is read and compared with the checksum that it was shipped
with. One that differs was written past the NBD export, or its change was missed: it is in the next interval then, and
the command exits with 6. The service does the same by itself all the time, slowly.

With --stored the vault reads and verifies every byte that it stores of the volume, and names what is damaged and which
generations need it; the command exits with 6 where anything stays damaged. The vault does the same by itself, slowly.

Examples:
  tidemark scrub data
  tidemark scrub data --stored")]
pub struct ScrubArgs {
    /// Name or UUID
    pub volume: String,
    /// Read what the vault stores, not the volume
    #[arg(long)]
    pub stored: bool,
}
