//! The command line: every subcommand, flag and help text. `docs/CLI.md` describes the same; a test compares them.

mod pki;
mod source;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use pki::{PkiCommand, PkiGrant, PkiIssueArgs, PkiTokenArgs};
pub use source::{Engine, ScrubArgs, ShipArgs, SnapshotCommand, VolumeCommand};

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
