//! What the capture service can be told: defaults → standard variables → TOML file → `CAPTURE_…` environment → flags.

mod groups;
mod quiesce;
mod values;

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};
use tidemark_config::{Rules, settings};
use tidemark_telemetry::{CollectorSettings, LogFormat, SampleRatio};
use tidemark_tls::{Dialer, DialerFiles, GateSettings, is_loopback_url};

pub use groups::Groups;
pub use quiesce::{Quiesces, VolumeQuiesce};
pub use tidemark_config::{ByteSize, ConfigError, OptionalAddr, Settings, Span};
pub use values::{CommandLine, NbdListen, NbdListens, Schedule};

use values::kebab;

kebab!(
    /// How data is encoded for the link.
    CodecSetting {
        /// Raw while the processor is the bottleneck, zstd while the link is.
        #[default]
        Auto = "auto",
        /// Never compressed.
        Raw = "raw",
        /// Always compressed, where that makes a frame smaller.
        Zstd = "zstd",
    }
);

kebab!(
    /// What happens when the spool has no room for before-images.
    SpoolFull {
        /// The oldest snapshots, and the interval in flight, are given up: the workload goes on.
        #[default]
        GiveUp = "give-up",
        /// Writes wait for room.
        Stall = "stall",
    }
);

kebab!(
    /// What happens where a volume's workload can't be quiesced.
    QuiesceFailure {
        /// The next best moment is looked for, and the cut's grade says so.
        #[default]
        Cut = "cut",
        /// No cut: the next time that one is wanted tries again.
        Skip = "skip",
    }
);

kebab!(
    /// How a volume's changes are known.
    EngineSetting {
        /// What fits: intercept where there is a front end, else what the file's filesystem can do.
        #[default]
        Auto = "auto",
        /// All writes come through the front ends.
        Intercept = "intercept",
        /// The workload writes the file itself; cuts are clones of it.
        Reflink = "reflink",
        /// The workload writes the file itself; cuts read all of it.
        Scan = "scan",
    }
);

settings! {
    /// Directory of everything the service must remember. One service per directory.
    state: PathBuf = PathBuf::from("/var/lib/tidemark/capture");
    /// Address of the control interface (gRPC).
    listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 7401));
    /// Certificate with its chain (PEM) that the control interface shows. Empty: plain text.
    tls_cert: PathBuf = PathBuf::new();
    /// Its private key (PEM).
    tls_key: PathBuf = PathBuf::new();
    /// CAs (PEM) of the certificates that clients of the control interface show. Empty: they show tokens.
    tls_ca: PathBuf = PathBuf::new();
    /// File of identities: who may do what. Empty, without TLS: whoever can connect may do everything.
    identities: PathBuf = PathBuf::new();
    /// How often certificates and identities are looked at, and read again where they have changed. 10 ms to 1 day.
    tls_reload_period: Span = Span::from_secs(10);
    /// Speak plain text with other machines, too: everything can be read and changed on its way.
    allow_plain_text: bool = false;
    /// Addresses of the NBD server, separated by commas: unix:PATH or tcp:ADDRESS:PORT. Empty: none.
    nbd: NbdListens = NbdListens::default();
    /// Directory in which volumes and snapshots appear as files (FUSE): an absolute path. Empty: none.
    fuse_mount: PathBuf = PathBuf::new();
    /// Room for what is written to scratches, the writable views of snapshots, all of them together.
    scratch_bytes_max: ByteSize = ByteSize::mib(1024);
    /// URL of the vault.
    vault: String = "http://127.0.0.1:7402".to_owned();
    /// CAs (PEM) that the vault's certificate must be of, where its URL is https. Empty: those of tls_ca.
    vault_ca: PathBuf = PathBuf::new();
    /// Certificate with its chain (PEM) that is shown to the vault. Empty: that of tls_cert.
    vault_cert: PathBuf = PathBuf::new();
    /// Its private key (PEM).
    vault_key: PathBuf = PathBuf::new();
    /// File with the token that is shown to the vault, in place of a certificate. Empty: none.
    vault_token_file: PathBuf = PathBuf::new();
    /// Name of this source, as the vault shows it. Empty: the host's name.
    source_name: String = String::new();
    /// Engine of volumes that are added: auto, intercept (all writes come through NBD or FUSE), reflink (the workload writes
    /// the file itself, on XFS or btrfs) or scan (the workload writes the file itself; each cut reads all of it).
    engine: EngineSetting = EngineSetting::Auto;
    /// Longest that a cut by the engine reflink may hold writers up: a file that takes longer is refused, and one that has
    /// come to take longer is warned of. 0s: however long.
    cut_stall_max: Span = Span::from_secs(1);
    /// Longest time between two cuts of a volume.
    interval_max: Span = Span::from_secs(15 * 60);
    /// Cut as soon as so many blocks have changed since the last cut. 0: never.
    changed_blocks_max: u64 = 0;
    /// Cut at these times too: five fields of cron and a time zone, as in "0 3 * * * Europe/Berlin". Empty: none.
    schedule: Schedule = Schedule::default();
    /// Longest search for a moment without writes once a cut is wanted. 0s: it is made at once.
    lull_wait_max: Span = Span::from_secs(2);
    /// So long without a write is a good moment to cut.
    lull_min: Span = Span::from_millis(50);
    /// Command that freezes the workload before a cut: a shell line, or a list of program and arguments. Empty: none.
    quiesce_pre: CommandLine = CommandLine::default();
    /// Command that lets it go on; it runs whatever became of the first one.
    quiesce_post: CommandLine = CommandLine::default();
    /// Time that a freeze may take, and each command.
    quiesce_timeout: Span = Span::from_secs(5);
    /// Where the workload can't be quiesced: cut at the next best moment, or skip the cut.
    quiesce_failure: QuiesceFailure = QuiesceFailure::Cut;
    /// What holds for single volumes instead, as { VOLUME = { pre = "COMMAND", post = "COMMAND", timeout = "5s",
    /// failure = "cut" } }, each of the four where it is another. Empty: the same for all.
    quiesce: Quiesces = Quiesces::default();
    /// Volumes that are cut at one instant, as NAME=VOLUME,VOLUME; NAME=VOLUME,VOLUME. Empty: each by itself.
    groups: Groups = Groups::default();
    /// Room for before-images, per volume.
    spool_bytes_max: ByteSize = ByteSize::mib(1024);
    /// What happens when the spool is full: give-up or stall.
    spool_full: SpoolFull = SpoolFull::GiveUp;
    /// How frames are encoded: auto, raw or zstd.
    codec: CodecSetting = CodecSetting::Auto;
    /// Level of zstd, 1 to 19.
    zstd_level: i32 = 1;
    /// Encoded bytes sent and not acknowledged, per volume; the vault may lower it.
    bytes_in_flight_max: ByteSize = ByteSize::mib(64);
    /// First wait after a failure of the uplink; doubles with each further one.
    backoff_min: Span = Span::from_millis(250);
    /// Longest wait after a failure of the uplink.
    backoff_max: Span = Span::from_secs(60);
    /// Time for one pass of the source scrub over a volume. 0s: no scrub.
    scrub_period: Span = Span::from_secs(24 * 3600);
    /// The most bytes per second that the source scrub reads, per volume.
    scrub_bytes_per_second_max: ByteSize = ByteSize::mib(64);
    /// How often a volume that can't be served is tried again.
    retry_period: Span = Span::from_secs(5);
    /// The most volumes.
    volumes_max: u32 = 256;
    /// The most snapshots per volume.
    snapshots_max: u32 = 4096;
    /// The most NBD clients at a time.
    nbd_clients_max: u32 = 256;
    /// The most connections of the control interface at a time.
    connections_max: u32 = 1024;
    /// The most calls of the control interface at a time, per connection.
    calls_max: u32 = 256;
    /// Address of the Prometheus endpoint, /metrics over HTTP, such as 127.0.0.1:9465. Empty: none.
    metrics_listen: OptionalAddr = OptionalAddr(None);
    /// Let other machines read the metrics, in plain text: names of volumes, sizes and times.
    metrics_plain_text: bool = false;
    /// Format of the log: text or json.
    log_format: LogFormat = LogFormat::Text;
    /// What is logged, by directives as in RUST_LOG.
    log_filter: String = "info".to_owned();
    /// Collector that traces and metrics are sent to (OTLP over gRPC), as http://127.0.0.1:4317. Empty: none.
    otlp_endpoint: String = String::new();
    /// CAs (PEM) that the collector's certificate must be of, where its URL is https. Empty: those of the system.
    otlp_ca: PathBuf = PathBuf::new();
    /// File with what is shown to the collector: lines of NAME: VALUE. Empty: nothing.
    otlp_headers_file: PathBuf = PathBuf::new();
    /// How many of the traces that begin here are sent: from 0 (none) to 1 (all).
    trace_sample_ratio: SampleRatio = SampleRatio::ALL;
}

impl Settings for Config {
    const PREFIX: &'static str = "CAPTURE_";
    const STANDARD: &'static [(&'static str, &'static str)] = CollectorSettings::STANDARD;

    /// What Kubernetes puts into the environment of everything beside a service named `capture`.
    fn is_foreign(key: &str) -> bool {
        key == "port" || key.starts_with("port_") || key.starts_with("service_")
    }

    fn check(&self, rules: &mut Rules) {
        self.gate().check(rules);
        self.collector().check(rules);
        self.check_vault(rules);
        rules.that(
            "state",
            self.state.is_absolute(),
            "must be an absolute path",
        );
        rules.that(
            "fuse_mount",
            self.fuse_mount.as_os_str().is_empty() || self.fuse_mount.is_absolute(),
            "must be an absolute path",
        );
        rules.that(
            "source_name",
            self.source_name.len() <= 255,
            "must have at most 255 bytes",
        );
        rules.that(
            "quiesce_pre",
            self.quiesce_pre.is_empty() == self.quiesce_post.is_empty(),
            "must be given together with quiesce_post: what freezes must be let go on",
        );
        rules.at_least("spool_bytes_max", self.spool_bytes_max, ByteSize::mib(1));
        rules.at_least(
            "scratch_bytes_max",
            self.scratch_bytes_max,
            ByteSize::mib(1),
        );
        rules.within("zstd_level", self.zstd_level, 1..=19);
        rules.within(
            "bytes_in_flight_max",
            self.bytes_in_flight_max,
            ByteSize::mib(2)..=ByteSize::mib(1024),
        );
        rules.at_least("backoff_max", self.backoff_max, self.backoff_min);
        rules.at_least(
            "scrub_bytes_per_second_max",
            self.scrub_bytes_per_second_max,
            ByteSize::kib(64),
        );
        for (key, time) in [
            ("interval_max", self.interval_max),
            ("backoff_min", self.backoff_min),
            ("retry_period", self.retry_period),
            ("lull_min", self.lull_min),
            ("quiesce_timeout", self.quiesce_timeout),
        ] {
            rules.that(key, !time.is_zero(), "must be above 0s");
        }
        for (key, count) in [
            ("volumes_max", self.volumes_max),
            ("snapshots_max", self.snapshots_max),
            ("nbd_clients_max", self.nbd_clients_max),
            ("connections_max", self.connections_max),
            ("calls_max", self.calls_max),
        ] {
            rules.at_least(key, count, 1);
        }
    }
}

impl Config {
    /// Whether the service speaks TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.gate().is_tls()
    }

    /// How the control interface is reached, and by whom.
    pub(crate) fn gate(&self) -> GateSettings<'_> {
        GateSettings {
            listen: self.listen,
            cert: &self.tls_cert,
            key: &self.tls_key,
            ca: &self.tls_ca,
            identities: &self.identities,
            allow_plain_text: self.allow_plain_text,
            reload_period: self.tls_reload_period,
            metrics_listen: self.metrics_listen,
            metrics_plain_text: self.metrics_plain_text,
        }
    }

    /// Where traces go.
    fn collector(&self) -> CollectorSettings<'_> {
        CollectorSettings {
            endpoint: &self.otlp_endpoint,
            ca: &self.otlp_ca,
            headers_file: &self.otlp_headers_file,
            sample_ratio: self.trace_sample_ratio,
            allow_plain_text: self.allow_plain_text,
        }
    }

    /// What the service says of itself, and where.
    #[must_use]
    pub fn telemetry(&self) -> tidemark_telemetry::Settings<'_> {
        tidemark_telemetry::Settings {
            service: "capture-svc",
            log_format: self.log_format,
            log_filter: &self.log_filter,
            traces: self.collector().export(),
        }
    }

    /// How the vault is reached.
    pub(crate) fn dialer(&self) -> Dialer {
        let or = |own: &PathBuf, other: &PathBuf| {
            let own_is_empty = own.as_os_str().is_empty();
            if own_is_empty { other } else { own }.clone()
        };
        // A token says who this is; a certificate beside it is only shown where it was meant for the vault.
        let has_token = !self.vault_token_file.as_os_str().is_empty();
        let (cert, key) = if has_token {
            (self.vault_cert.clone(), self.vault_key.clone())
        } else {
            (
                or(&self.vault_cert, &self.tls_cert),
                or(&self.vault_key, &self.tls_key),
            )
        };
        Dialer {
            files: DialerFiles::named(
                &or(&self.vault_ca, &self.tls_ca),
                &cert,
                &key,
                &self.vault_token_file,
            ),
            allow_plain_text: self.allow_plain_text,
        }
    }

    fn check_vault(&self, rules: &mut Rules) {
        let is_https = self.vault.starts_with("https://");
        let is_url = (is_https || self.vault.starts_with("http://"))
            && self.vault.parse::<tonic::transport::Uri>().is_ok();
        rules.that(
            "vault",
            is_url,
            "must be a URL like https://HOST:PORT, or http://HOST:PORT",
        );
        rules.that(
            "vault",
            !is_url || is_https || self.allow_plain_text || is_loopback_url(&self.vault),
            "must begin with https, as it is another machine: plain text is only sent there where allow_plain_text = true \
             allows it",
        );
        rules.that(
            "vault_ca",
            !is_https || self.dialer().files.ca.is_some(),
            "must name the CAs that the certificate of an https vault must be of",
        );
        rules.that(
            "vault_key",
            self.vault_cert.as_os_str().is_empty() == self.vault_key.as_os_str().is_empty(),
            "must be given together with vault_cert",
        );
        let nbd_is_local = self.nbd.0.iter().all(|listen| match listen {
            NbdListen::Tcp(address) => address.ip().is_loopback(),
            NbdListen::Unix(_) => true,
        });
        rules.that(
            "nbd",
            nbd_is_local || self.allow_plain_text,
            "must be addresses of this machine, as NBD is plain text and asks nobody who they are: only \
             allow_plain_text = true allows others",
        );
    }
}

#[cfg(test)]
mod tests;
