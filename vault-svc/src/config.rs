//! What the vault service can be told: defaults → standard variables → TOML file → `VAULT_…` environment → flags.

use std::{net::SocketAddr, path::PathBuf};

use tidemark_config::{Rules, settings};
use tidemark_telemetry::{CollectorSettings, LogFormat, SampleRatio};
use tidemark_tls::GateSettings;

pub use tidemark_config::{ByteSize, ConfigError, OptionalAddr, Settings, Span};

/// Environment variables of Kubernetes and of the HashiCorp client, which share the prefix.
const FOREIGN_EXACT: [&str; 9] = [
    "addr",
    "token",
    "namespace",
    "cacert",
    "capath",
    "skip_verify",
    "tls_server_name",
    "port",
    "format",
];
const FOREIGN_PREFIXES: [&str; 3] = ["port_", "service_", "client_"];

/// 10 years: what is added to the present moment has to be a moment.
const PERIOD_MAX: Span = Span::from_secs(10 * 31_557_600);

settings! {
    /// Address to listen on; port 0 takes any free one.
    listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 7402));
    /// Certificate with its chain (PEM) that the service shows. Empty: plain text.
    tls_cert: PathBuf = PathBuf::new();
    /// Its private key (PEM).
    tls_key: PathBuf = PathBuf::new();
    /// CAs (PEM) of the certificates that clients show. Empty: they show tokens.
    tls_ca: PathBuf = PathBuf::new();
    /// File of identities: who may do what. Empty, without TLS: whoever can connect may do everything.
    identities: PathBuf = PathBuf::new();
    /// How often certificates and identities are looked at, and read again where they have changed. 10 ms to 1 day.
    tls_reload_period: Span = Span::from_secs(10);
    /// Serve other machines in plain text, too: everything can be read and changed on its way.
    allow_plain_text: bool = false;
    /// Directory of the object store.
    store_dir: PathBuf = PathBuf::from("/var/lib/tidemark/vault/store");
    /// Directory of local state: checksum tables, the lock. It can be rebuilt from the store.
    state_dir: PathBuf = PathBuf::from("/var/lib/tidemark/vault/state");
    /// Generations kept per volume, the newest ones. 1 to 1024.
    retain: u32 = 4;
    /// How long condemned objects stay readable before they are deleted.
    reader_grace: Span = Span::from_secs(600);
    /// How long old manifest versions are kept where other writers could hold a stale view (remote stores).
    manifest_keep: Span = Span::from_secs(24 * 3600);
    /// How long the parts of an unfinished interval that nobody ships are kept.
    interval_lease: Span = Span::from_secs(24 * 3600);
    /// A stream that sends nothing, or of which nothing is taken, is closed after this long.
    stream_idle_max: Span = Span::from_secs(300);
    /// A part is written at this age even if it isn't full. 10 ms to 1 minute.
    part_age_max: Span = Span::from_secs(1);
    /// Frames gathered in one segment. 64 KiB to 64 MiB.
    part_bytes_max: ByteSize = ByteSize::mib(16);
    /// Encoded bytes that a source may have sent and not seen acknowledged, per stream.
    bytes_in_flight_max: ByteSize = ByteSize::mib(64);
    /// Parts held in memory, all streams together; a stream uses at most two.
    ingest_bytes_max: ByteSize = ByteSize::mib(256);
    /// Connections at the same time; a source has one per volume.
    connections_max: u32 = 2048;
    /// Streams of intervals at the same time.
    streams_max: u32 = 64;
    /// Restores at the same time.
    restores_max: u32 = 16;
    /// Volumes.
    volumes_max: u32 = 1024;
    /// Length of a volume: bounds the time and memory that a digest takes. At most 1024 TiB.
    volume_bytes_max: ByteSize = ByteSize::tib(64);
    /// Memory for parsed segment indexes; a quarter as much again for pages of segment records.
    cache_bytes_max: ByteSize = ByteSize::mib(64);
    /// Preallocated file that is released when the store is full, so that retire and reclaim still work. 0 = none.
    reserve_bytes: ByteSize = ByteSize::mib(32);
    /// How often volumes are looked after even if nothing was committed. 100 ms to 10 years.
    maintenance_period: Span = Span::from_secs(60);
    /// Time for one pass of the scrub, which reads and verifies all that is stored. 0s: no scrub. At most 10 years.
    scrub_period: Span = Span::from_secs(7 * 24 * 3600);
    /// The most bytes per second that the scrub reads.
    scrub_bytes_per_second_max: ByteSize = ByteSize::mib(64);
    /// Address of the Prometheus endpoint, /metrics over HTTP, such as 127.0.0.1:9464. Empty: none.
    metrics_listen: OptionalAddr = OptionalAddr(None);
    /// Let other machines read the metrics, in plain text: names of volumes and sources, sizes and times.
    metrics_plain_text: bool = false;
    /// Filter of log lines, as `RUST_LOG` has it.
    log: String = "info".to_owned();
    /// `text` or `json`.
    log_format: LogFormat = LogFormat::Text;
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
    const PREFIX: &'static str = "VAULT_";
    const STANDARD: &'static [(&'static str, &'static str)] = CollectorSettings::STANDARD;

    fn is_foreign(key: &str) -> bool {
        FOREIGN_EXACT.contains(&key)
            || FOREIGN_PREFIXES
                .iter()
                .any(|prefix| key.starts_with(prefix))
    }

    fn check(&self, rules: &mut Rules) {
        self.gate().check(rules);
        self.collector().check(rules);
        self.check_directories(rules);
        self.check_counts_and_sizes(rules);
        self.check_times(rules);
    }
}

impl Config {
    /// Whether the service speaks TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.gate().is_tls()
    }

    /// How the service is reached, and by whom.
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
            service: "vault-svc",
            log_format: self.log_format,
            log_filter: &self.log,
            traces: self.collector().export(),
        }
    }

    fn check_directories(&self, rules: &mut Rules) {
        for (key, dir) in [
            ("store_dir", &self.store_dir),
            ("state_dir", &self.state_dir),
        ] {
            rules.that(key, !dir.as_os_str().is_empty(), "must name a directory");
        }
        rules.that(
            "state_dir",
            self.state_dir != self.store_dir,
            "must be another directory than store_dir",
        );
    }

    fn check_counts_and_sizes(&self, rules: &mut Rules) {
        rules.within("retain", self.retain, 1..=1024);
        rules.within("connections_max", self.connections_max, 1..=65536);
        rules.within("streams_max", self.streams_max, 1..=4096);
        rules.within("restores_max", self.restores_max, 1..=256);
        rules.within("volumes_max", self.volumes_max, 1..=65536);
        rules.within(
            "part_bytes_max",
            self.part_bytes_max,
            ByteSize::kib(64)..=ByteSize::mib(64),
        );
        rules.within(
            "bytes_in_flight_max",
            self.bytes_in_flight_max,
            ByteSize::mib(4)..=ByteSize::mib(1024),
        );
        rules.within(
            "volume_bytes_max",
            self.volume_bytes_max,
            ByteSize::mib(1)..=ByteSize::tib(1024),
        );
        rules.at_least("cache_bytes_max", self.cache_bytes_max, ByteSize::mib(8));
        rules.at_least(
            "scrub_bytes_per_second_max",
            self.scrub_bytes_per_second_max,
            ByteSize::kib(64),
        );
        // Streams stall with less: one part is received while the other is put.
        let two_parts = self.part_bytes_max.get().saturating_mul(2);
        for (key, size) in [
            ("bytes_in_flight_max", self.bytes_in_flight_max),
            ("ingest_bytes_max", self.ingest_bytes_max),
        ] {
            rules.that(
                key,
                size.get() >= two_parts,
                "must be at least two parts (2 × part_bytes_max)",
            );
        }
    }

    fn check_times(&self, rules: &mut Rules) {
        rules.within(
            "part_age_max",
            self.part_age_max,
            Span::from_millis(10)..=Span::from_secs(60),
        );
        rules.that(
            "stream_idle_max",
            self.stream_idle_max > self.part_age_max,
            "must be longer than part_age_max",
        );
        rules.within(
            "maintenance_period",
            self.maintenance_period,
            Span::from_millis(100)..=PERIOD_MAX,
        );
        rules.within(
            "scrub_period",
            self.scrub_period,
            Span::from_millis(0)..=PERIOD_MAX,
        );
        rules.that(
            "interval_lease",
            self.interval_lease >= self.stream_idle_max,
            "must be at least stream_idle_max",
        );
    }
}

#[cfg(test)]
mod tests;
