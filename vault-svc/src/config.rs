//! Configuration: defaults → TOML file → `VAULT_…` environment → flags, validated as a whole.
//!
//! An unknown key is an error wherever it stands, because a misspelt limit that is silently ignored is found out
//! when it is needed. The one exception: variables that Kubernetes (`VAULT_PORT…`, `VAULT_SERVICE_…`) and the
//! HashiCorp client (`VAULT_ADDR`, `VAULT_TOKEN` …) put into the environment of whatever runs there.

mod units;

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use figment::{
    Figment,
    providers::{Env, Format, Serialized, Toml},
};
use serde::{Deserialize, Serialize};

use tidemark_telemetry::LogFormat;

pub use units::{ByteSize, Span};

/// Environment variables that others set and that are none of ours.
const FOREIGN_EXACT: [&str; 9] = [
    "config",
    "addr",
    "token",
    "namespace",
    "cacert",
    "capath",
    "skip_verify",
    "port",
    "format",
];
const FOREIGN_PREFIXES: [&str; 4] = ["port_", "service_", "client_", "tls_"];

/// Everything that can be set. [`Config::default`] is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address to listen on; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Directory of the object store.
    pub store_dir: PathBuf,
    /// Directory of local state: checksum tables, the lock. It can be rebuilt from the store.
    pub state_dir: PathBuf,
    /// Generations kept per volume, the newest ones. 1 to 1024.
    pub retain: u32,
    /// How long condemned objects stay readable before they are deleted.
    pub reader_grace: Span,
    /// How long old manifest versions are kept where other writers could hold a stale view (remote stores).
    pub manifest_keep: Span,
    /// How long the parts of an unfinished interval that nobody ships are kept.
    pub interval_lease: Span,
    /// A stream that sends nothing for this long is closed.
    pub stream_idle_max: Span,
    /// A part is written at this age even if it isn't full. 10 ms to 1 minute.
    pub part_age_max: Span,
    /// Frames gathered in one segment. 64 KiB to 64 MiB.
    pub part_bytes_max: ByteSize,
    /// Encoded bytes that a source may have sent and not seen acknowledged, per stream.
    pub bytes_in_flight_max: ByteSize,
    /// Parts held in memory, all streams together; a stream uses at most two.
    pub ingest_bytes_max: ByteSize,
    /// Streams of intervals at the same time.
    pub streams_max: u32,
    /// Restores at the same time.
    pub restores_max: u32,
    /// Volumes.
    pub volumes_max: u32,
    /// Length of a volume: bounds the time and memory that a digest takes. At most 1024 TiB.
    pub volume_bytes_max: ByteSize,
    /// Memory for parsed segment indexes; a quarter as much again for pages of segment records.
    pub cache_bytes_max: ByteSize,
    /// Preallocated file that is released when the store is full, so that retire and reclaim still work. 0 = none.
    pub reserve_bytes: ByteSize,
    /// How often volumes are looked after even if nothing was committed.
    pub maintenance_period: Span,
    /// Filter of log lines, as `RUST_LOG` has it.
    pub log: String,
    /// `text` or `json`.
    pub log_format: LogFormat,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7402)),
            store_dir: PathBuf::from("/var/lib/tidemark/vault/store"),
            state_dir: PathBuf::from("/var/lib/tidemark/vault/state"),
            retain: 4,
            reader_grace: Span::from(Duration::from_secs(600)),
            manifest_keep: Span::from(Duration::from_secs(24 * 3600)),
            interval_lease: Span::from(Duration::from_secs(24 * 3600)),
            stream_idle_max: Span::from(Duration::from_secs(300)),
            part_age_max: Span::from(Duration::from_secs(1)),
            part_bytes_max: ByteSize::mib(16),
            bytes_in_flight_max: ByteSize::mib(64),
            ingest_bytes_max: ByteSize::mib(256),
            streams_max: 64,
            restores_max: 16,
            volumes_max: 1024,
            volume_bytes_max: ByteSize::new(64 << 40),
            cache_bytes_max: ByteSize::mib(64),
            reserve_bytes: ByteSize::mib(32),
            maintenance_period: Span::from(Duration::from_secs(60)),
            log: "info".to_owned(),
            log_format: LogFormat::Text,
        }
    }
}

/// Every value that can't work, each with what would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration can't be used:")?;
        self.0
            .iter()
            .try_for_each(|error| write!(f, "\n  - {error}"))
    }
}

impl std::error::Error for ConfigErrors {}

impl Config {
    /// Puts the layers together. `flags` holds only what was given on the command line.
    ///
    /// # Errors
    /// The file can't be read, a key is unknown, a value has the wrong type, or [`Config::validate`] refuses.
    pub fn load(file: Option<&std::path::Path>, flags: impl Serialize) -> Result<Self> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some(file) = file {
            // `Toml::file` takes a missing file for an empty one.
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("read config file {}", file.display()))?;
            figment = figment.merge(Toml::string(&text));
        }
        let config: Self = figment
            .merge(Env::prefixed("VAULT_").filter(|key| !is_foreign(key.as_str())))
            .merge(Serialized::defaults(flags))
            .extract()
            .map_err(|errors| ConfigErrors(errors.into_iter().map(|e| e.to_string()).collect()))?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every value against its range and against the others.
    ///
    /// # Errors
    /// All that is wrong, together.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        let mut errors = Vec::new();
        let mut check = |good: bool, text: &str| {
            if !good {
                errors.push(text.to_owned());
            }
        };
        let mib = 1 << 20;
        check(
            !self.store_dir.as_os_str().is_empty(),
            "store_dir: name a directory",
        );
        check(
            !self.state_dir.as_os_str().is_empty(),
            "state_dir: name a directory",
        );
        check(
            self.store_dir != self.state_dir,
            "store_dir and state_dir: use two directories",
        );
        check(
            (1..=1024).contains(&self.retain),
            "retain: 1 to 1024 generations",
        );
        check(
            (mib / 16..=64 * mib).contains(&self.part_bytes_max.get()),
            "part_bytes_max: 64 KiB to 64 MiB",
        );
        check(
            (4 * mib..=1024 * mib).contains(&self.bytes_in_flight_max.get()),
            "bytes_in_flight_max: 4 MiB to 1 GiB",
        );
        check(
            self.ingest_bytes_max.get() >= 2 * self.part_bytes_max.get(),
            "ingest_bytes_max: at least two parts (2 × part_bytes_max)",
        );
        check(
            (1..=4096).contains(&self.streams_max),
            "streams_max: 1 to 4096",
        );
        check(
            (1..=256).contains(&self.restores_max),
            "restores_max: 1 to 256",
        );
        check(
            (1..=65536).contains(&self.volumes_max),
            "volumes_max: 1 to 65536",
        );
        check(
            (mib..=1 << 50).contains(&self.volume_bytes_max.get()),
            "volume_bytes_max: 1 MiB to 1024 TiB",
        );
        check(
            self.cache_bytes_max.get() >= 8 * mib,
            "cache_bytes_max: at least 8 MiB",
        );
        let age = self.part_age_max.get();
        check(
            (Duration::from_millis(10)..=Duration::from_secs(60)).contains(&age),
            "part_age_max: 10ms to 1m",
        );
        check(
            self.stream_idle_max.get() > age,
            "stream_idle_max: longer than part_age_max",
        );
        check(
            self.maintenance_period.get() >= Duration::from_millis(100),
            "maintenance_period: at least 100ms",
        );
        check(
            self.interval_lease.get() >= self.stream_idle_max.get(),
            "interval_lease: at least stream_idle_max",
        );
        check(
            self.bytes_in_flight_max.get() >= 2 * self.part_bytes_max.get(),
            "bytes_in_flight_max: at least two parts (2 × part_bytes_max), or streams stall",
        );
        if errors.is_empty() {
            Ok(())
        } else {
            Err(ConfigErrors(errors))
        }
    }

    /// As a TOML file that gives this configuration.
    ///
    /// # Errors
    /// A path isn't UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).context("write the configuration as TOML")
    }
}

fn is_foreign(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    FOREIGN_EXACT.contains(&key.as_str())
        || FOREIGN_PREFIXES
            .iter()
            .any(|prefix| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_survive_toml() {
        let config = Config::default();
        config.validate().unwrap();
        let text = config.to_toml().unwrap();
        let back: Config = Figment::from(Toml::string(&text)).extract().unwrap();
        assert_eq!(back, config);
        insta::assert_snapshot!(text);
    }

    #[test]
    fn every_error_is_named_at_once() {
        let config = Config {
            retain: 0,
            part_bytes_max: ByteSize::mib(100),
            stream_idle_max: Duration::ZERO.into(),
            ..Config::default()
        };
        insta::assert_snapshot!(config.validate().unwrap_err().to_string());
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vault.toml");
        std::fs::write(&file, "retian = 5\n").unwrap();
        let error = Config::load(Some(&file), serde_json::json!({})).unwrap_err();
        assert!(error.to_string().contains("retian"), "{error}");
    }

    #[test]
    fn flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vault.toml");
        std::fs::write(&file, "retain = 5\nreader_grace = \"3s\"\n").unwrap();
        let config = Config::load(Some(&file), serde_json::json!({"retain": 7})).unwrap();
        assert_eq!(config.retain, 7);
        assert_eq!(config.reader_grace.get(), Duration::from_secs(3));
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let missing = std::path::Path::new("/nonexistent/vault.toml");
        let error = Config::load(Some(missing), serde_json::json!({})).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/vault.toml"));
    }

    #[test]
    fn variables_of_kubernetes_and_of_other_vaults_are_left_alone() {
        for key in [
            "PORT",
            "PORT_7402_TCP_ADDR",
            "SERVICE_HOST",
            "ADDR",
            "TOKEN",
        ] {
            assert!(is_foreign(key), "{key}");
        }
        for key in ["RETAIN", "RETIAN", "LISTEN"] {
            assert!(!is_foreign(key), "{key}");
        }
    }
}
