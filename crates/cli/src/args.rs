//! The command line: every subcommand, flag and help text. `docs/CLI.md` describes the same; a test compares them.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use tidemark_identity::{Pattern, Role};

use crate::parse;

/// Where the capture service listens unless told otherwise.
pub const CAPTURE_DEFAULT: &str = "http://127.0.0.1:7401";
/// Where the vault service listens unless told otherwise.
pub const VAULT_DEFAULT: &str = "http://127.0.0.1:7402";

const EXIT_CODES: &str = r#"Exit codes:
  0    done
  1    failed for a reason not listed here; the message says why
  2    the request cannot be right: a flag, a value, or a combination of them
  3    what was named is not there: volume, snapshot or generation
  4    it does not fit the present state, or another writer owns the volume
  5    a service cannot be reached, or cannot do it now: try again later
  6    bytes do not match their checksums
  7    not allowed: nobody knows who you are, or your roles do not cover it
  130  interrupted

Start here:
  tidemark up                                                   both services, in the foreground
  tidemark volume add data --file /srv/data.img --size 8GiB     protect a file
  nbdinfo --list "nbd+unix:///?socket=$HOME/.local/share/tidemark/nbd.sock""#;

/// Vaults the changes of live block volumes and brings any retained generation back.
#[derive(Debug, Parser)]
#[command(name = "tidemark", version, after_help = EXIT_CODES, max_term_width = 110)]
#[command(propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// What all subcommands share.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every subcommand takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The capture service
    #[arg(long, global = true, value_name = "URL", env = "TIDEMARK_CAPTURE", default_value = CAPTURE_DEFAULT)]
    #[arg(value_parser = parse::url, help_heading = "Global options")]
    pub capture: String,
    /// The vault service
    #[arg(long, global = true, value_name = "URL", env = "TIDEMARK_VAULT", default_value = VAULT_DEFAULT)]
    #[arg(value_parser = parse::url, help_heading = "Global options")]
    pub vault: String,
    /// CAs (PEM) that the certificates of services must be of; an https URL needs it
    #[arg(long, global = true, value_name = "FILE", env = "TIDEMARK_TLS_CA")]
    #[arg(help_heading = "Global options")]
    pub tls_ca: Option<PathBuf>,
    /// Certificate with its chain (PEM) that says who you are
    #[arg(long, global = true, value_name = "FILE", env = "TIDEMARK_TLS_CERT")]
    #[arg(requires = "tls_key", help_heading = "Global options")]
    pub tls_cert: Option<PathBuf>,
    /// Private key (PEM) of the certificate
    #[arg(long, global = true, value_name = "FILE", env = "TIDEMARK_TLS_KEY")]
    #[arg(requires = "tls_cert", help_heading = "Global options")]
    pub tls_key: Option<PathBuf>,
    /// File with the token that says who you are, in place of a certificate
    #[arg(long, global = true, value_name = "FILE", env = "TIDEMARK_TOKEN_FILE")]
    #[arg(help_heading = "Global options")]
    pub token_file: Option<PathBuf>,
    /// Speak plain text (http) with other machines, too: everything can be read and changed on its way
    #[arg(
        long,
        global = true,
        env = "TIDEMARK_ALLOW_PLAIN_TEXT",
        help_heading = "Global options"
    )]
    pub allow_plain_text: bool,
    /// Print JSON, for programs; errors too, on standard error
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run both services in the foreground, with defaults that need no configuration
    Up(UpArgs),
    /// Protect volumes, and look at them
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Take, list, read and delete snapshots of a live volume
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Cut now, ship the interval, wait for the vault's receipt and print it
    Ship(ShipArgs),
    /// Read a volume again now and compare it with what the vault has: proves that no change was missed
    Scrub(ScrubArgs),
    /// Look at the generations that the vault retains
    #[command(subcommand)]
    Generation(GenerationCommand),
    /// Write a generation's image to a file, verified
    Restore(RestoreArgs),
    /// Go back through snapshots and generations until a check of yours passes
    FindCoherent(FindCoherentArgs),
    /// Mount the filesystem of a volume or a snapshot, or list what is mounted
    Mount(MountArgs),
    /// Unmount what `mount` has mounted, also after a crash
    Umount(UmountArgs),
    /// Show both services and all volumes
    Status(StatusArgs),
    /// Ask the services whether they serve, for probes and scripts
    Health(HealthArgs),
    /// Retire and reclaim at the vault now, or show what would be done
    Maintain(MaintainArgs),
    /// A CA for a small site: certificates, tokens, and who may do what
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Write the pages of the manual, for man(1)
    Man(ManArgs),
}

/// `tidemark up`.
#[derive(Debug, Args)]
#[command(after_help = "\
Stop it with Ctrl-C or SIGTERM: both services then close cleanly.

Examples:
  tidemark up
  tidemark up --state /var/lib/tidemark --interval-max 5m --retain 24
  tidemark up --json          one JSON object with the endpoints, on one line, once ready")]
pub struct UpArgs {
    /// Folder for all state of both services [default: $XDG_DATA_HOME/tidemark or ~/.local/share/tidemark]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Where the capture service's control interface listens
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7401")]
    pub capture_listen: SocketAddr,
    /// Where the vault service listens
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7402")]
    pub vault_listen: SocketAddr,
    /// Where volumes are served by NBD: unix:PATH or tcp:ADDR [default: unix:DIR/nbd.sock]
    #[arg(long, value_name = "WHERE")]
    pub nbd: Option<String>,
    /// Where volumes and snapshots are files, by FUSE; made where it does not exist [default: nowhere]
    #[arg(long, value_name = "DIR")]
    pub fuse_mount: Option<PathBuf>,
    /// Volumes that are cut at one instant, all or none; may be given several times
    #[arg(long, value_name = "NAME=VOLUME,VOLUME")]
    pub group: Vec<String>,
    /// Cut at the latest this long after the last cut
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = parse::duration)]
    pub interval_max: Duration,
    /// Cut as soon as this many blocks have changed [default: no such limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub changed_blocks_max: Option<u64>,
    /// Generations to retain per volume
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub retain: u32,
    /// What to log on standard error: directives such as warn, info or info,capture_svc=debug
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    pub log: String,
}

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
        /// Also while clients are connected or snapshots are open
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

/// `tidemark generation …`.
#[derive(Debug, Subcommand)]
pub enum GenerationCommand {
    /// List the retained generations of a volume, oldest first
    List {
        /// Name or UUID
        volume: String,
    },
    /// List the moments of which every one of these volumes has an image, newest first
    #[command(after_help = "\
Volumes of one group are cut at one instant, but shipped one by one: restore generations of the same moment.

Example:
  tidemark generation common data wal")]
    Common {
        /// Names or UUIDs
        #[arg(required = true, num_args = 2.., value_name = "VOLUME")]
        volumes: Vec<String>,
    },
    /// Show one generation
    #[command(after_help = "\
Example:
  tidemark generation show data@7")]
    Show {
        /// VOLUME@N, or VOLUME for the newest
        #[arg(value_name = "VOLUME[@N]")]
        generation: parse::GenerationRef,
    },
}

/// `tidemark restore`.
#[derive(Debug, Args)]
#[command(after_help = "\
The image is written sparse to a temporary file beside OUTPUT and takes its name only when every block matched its
checksum and the whole image matched the generation's digest. After a failure nothing is left behind.

Examples:
  tidemark restore data restored.img          the newest generation
  tidemark restore data@7 /srv/data.img --force")]
pub struct RestoreArgs {
    /// VOLUME@N, or VOLUME for the newest
    #[arg(value_name = "VOLUME[@N]")]
    pub generation: parse::GenerationRef,
    /// The file to write
    pub output: PathBuf,
    /// Replace OUTPUT where it exists
    #[arg(long)]
    pub force: bool,
}

/// `tidemark find-coherent`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each image is written to a file of its own, verified, and checked there; the check may write to it. It is run by the shell,
with {image} as the file's path, and TIDEMARK_CANDIDATE in its environment; what it prints goes to standard error. It
passes where it ends with 0.

Examples:
  tidemark find-coherent data --check 'e2fsck -fp {image}'
  tidemark find-coherent db --check './recovers.sh {image}' --bisect --dir /var/tmp --keep good.img")]
pub struct FindCoherentArgs {
    /// Name or UUID
    pub volume: String,
    /// The command that looks at an image
    #[arg(long, value_name = "COMMAND")]
    pub check: String,
    /// How long a check may take; then it is killed and counts as failed
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse::duration)]
    pub check_timeout: Duration,
    /// Look by halves: right where everything older than a good image is good
    #[arg(long)]
    pub bisect: bool,
    /// Where images are written to be checked [default: the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Write the image that was found to this file, as it was before the check
    #[arg(long, value_name = "FILE")]
    pub keep: Option<PathBuf>,
    /// Replace FILE where it exists
    #[arg(long, requires = "keep")]
    pub force: bool,
}

/// `tidemark mount`.
#[derive(Debug, Args)]
#[command(after_help = "\
Needs root, and a capture service of this machine with a directory for its files (fuse_mount, --fuse-mount).

A volume that somebody else uses is refused. A snapshot is mounted through a scratch: its journal is replayed there, and
what is written with --writable is thrown away when it is unmounted; the snapshot never changes.

Examples:
  tidemark mount data /srv/data
  tidemark mount data@3 /mnt/before
  tidemark mount data@before-upgrade /mnt/try --writable
  tidemark mount                                          list what is mounted")]
pub struct MountArgs {
    /// VOLUME, VOLUME@NUMBER or VOLUME@LABEL: a volume, or a snapshot of it
    #[arg(value_name = "VOLUME[@SNAPSHOT]", requires = "dir")]
    pub what: Option<parse::SnapshotRef>,
    /// Where: an empty directory
    pub dir: Option<PathBuf>,
    /// Let a snapshot be written to; volumes are anyway
    #[arg(long, requires = "what")]
    pub writable: bool,
    /// Options as after mount -o, separated by commas
    #[arg(short = 'o', long, value_name = "OPTIONS", requires = "what")]
    pub options: Vec<String>,
    /// The kernel's name of the filesystem [default: what is found there]
    #[arg(long, value_name = "TYPE", requires = "what")]
    pub fs_type: Option<String>,
    /// Mount this partition of a disk that has several
    #[arg(long, value_name = "N", requires = "what", value_parser = clap::value_parser!(u32).range(1..))]
    pub partition: Option<u32>,
}

/// `tidemark umount`.
#[derive(Debug, Args)]
#[command(after_help = "\
Takes the filesystem off its directory and ends its loop device; the scratch of a snapshot is thrown away. Where the
service was stopped or killed under it, it is taken off even while programs use it.

Example:
  tidemark umount /srv/data")]
pub struct UmountArgs {
    /// Where it is mounted
    pub dir: PathBuf,
}

/// `tidemark status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exits with 5 where one of the services cannot be reached; what the other says is printed all the same.
With --watch and --json each change is one JSON object on one line.")]
pub struct StatusArgs {
    /// Show it again at each change, until interrupted
    #[arg(long)]
    pub watch: bool,
}

/// `tidemark health`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exits with 0 where they serve, else with 5. A service that is starting or stopping does not.

Examples:
  tidemark health
  tidemark health vault --timeout 10s")]
pub struct HealthArgs {
    /// Which [default: both]
    #[arg(value_enum, value_name = "SERVICE")]
    pub services: Vec<ServiceName>,
    /// How long to wait for the answer of each
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = parse::duration)]
    pub timeout: Duration,
}

/// One of the two services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ServiceName {
    /// The capture service
    Capture,
    /// The vault service
    Vault,
}

/// `tidemark maintain`.
#[derive(Debug, Args)]
#[command(after_help = "\
The vault does this by itself after each commit. Nothing that a retained generation needs is ever deleted.

Example:
  tidemark maintain --dry-run")]
pub struct MaintainArgs {
    /// Name or UUID [default: all volumes]
    pub volume: Option<String>,
    /// Only show what would be done
    #[arg(long)]
    pub dry_run: bool,
}

/// `tidemark pki …`.
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make a CA: a folder with its certificate and its key
    #[command(after_help = "\
Nothing is overwritten: a folder that has a CA is refused.

Example:
  tidemark pki init /root/tidemark-pki")]
    Init {
        /// The folder; made where it does not exist
        dir: PathBuf,
        /// Change nothing where the folder has a CA already
        #[arg(long)]
        if_missing: bool,
    },
    /// Give somebody a certificate, and say what they may do
    #[command(after_help = "\
Writes NAME.crt and NAME.key to the CA's folder, and NAME with its roles to identities.toml there; prints what to copy
where. A service that others connect to gets the names and addresses under which they do with --host; without a role it
is a service only, and nobody's client.

Roles: source (ships its own volumes, and nothing else), restorer (reads content), operator (looks after volumes, reads no
content), viewer (sees what there is). Volumes: VOLUME or SOURCE/VOLUME, with * for any number of characters.

Examples:
  tidemark pki issue vault --host vault.example.com --host 10.0.0.5
  tidemark pki issue edge-7 --role source --volume '*'
  tidemark pki issue desk --role restorer --role viewer --volume 'edge-7/*'
  tidemark pki issue edge-7 --renew                       a new certificate for the same key
  tidemark pki issue vault --host vault --if-missing --copy-to /etc/tidemark    may be run at each start")]
    Issue(PkiIssueArgs),
    /// Give somebody a token, and say what they may do
    #[command(after_help = "\
Writes the token to NAME.token in the CA's folder, and NAME with its roles and the token's SHA-256 to identities.toml
there. Whoever has the token is NAME.

Example:
  tidemark pki token dashboard --role viewer --volume '*'")]
    Token(PkiTokenArgs),
}

/// Who somebody is, and what they may do.
#[derive(Debug, Args)]
pub struct PkiGrant {
    /// Who it is for; a certificate has it as its first DNS name
    pub name: String,
    /// The CA's folder
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// What they are: source, restorer, operator or viewer; may be given several times
    #[arg(long, value_name = "ROLE", value_parser = parse::role)]
    pub role: Vec<Role>,
    /// For which volumes: VOLUME or SOURCE/VOLUME, * is any text; may be given several times
    #[arg(long, value_name = "PATTERN")]
    pub volume: Vec<Pattern>,
}

/// `tidemark pki issue`.
#[derive(Debug, Args)]
pub struct PkiIssueArgs {
    /// Who, and what they may do
    #[command(flatten)]
    pub grant: PkiGrant,
    /// A name or address under which others connect to it; may be given several times
    #[arg(long, value_name = "HOST")]
    pub host: Vec<String>,
    /// How long it is valid, from now on; whole days
    #[arg(long, value_name = "TIME", default_value = "365d", value_parser = parse::duration)]
    pub valid: Duration,
    /// Replace the certificate of NAME by a new one for the same key
    #[arg(long, conflicts_with = "if_missing")]
    pub renew: bool,
    /// Keep the certificate of NAME where there is one, whoever and whatever it is for
    #[arg(long)]
    pub if_missing: bool,
    /// Copy what NAME needs to this folder as well: ca.crt, NAME.crt, NAME.key, and to a service (--host) the identities
    #[arg(long, value_name = "DIR")]
    pub copy_to: Option<PathBuf>,
}

/// `tidemark pki token`.
#[derive(Debug, Args)]
pub struct PkiTokenArgs {
    /// Who, and what they may do
    #[command(flatten)]
    pub grant: PkiGrant,
}

/// `tidemark completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tidemark completions bash > ~/.local/share/bash-completion/completions/tidemark
  tidemark completions zsh --program vault-svc > ~/.zfunc/_vault-svc")]
pub struct CompletionsArgs {
    /// For which shell
    pub shell: clap_complete::Shell,
    /// For which program
    #[arg(long, value_enum, default_value_t = Program::Tidemark)]
    pub program: Program,
}

/// The programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Program {
    /// This command
    Tidemark,
    /// The capture service
    CaptureSvc,
    /// The vault service
    VaultSvc,
}

impl Program {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Tidemark, Self::CaptureSvc, Self::VaultSvc];
}

/// `tidemark man`.
#[derive(Debug, Args)]
#[command(after_help = "\
The command and each of its subcommands are in DIR/man1, the services in DIR/man8.

Example:
  tidemark man /usr/local/share/man && man tidemark-volume-add")]
pub struct ManArgs {
    /// The folder of manuals; made where it does not exist
    pub dir: PathBuf,
}
