//! What the capture service can be told: defaults → TOML file → `CAPTURE_…` environment → flags.
//!
//! Each key is listed once, in `settings!`: field, flag, environment variable and `--print-config` follow from it.
//! The whole is validated before anything starts, and every error is named, not only the first.

mod values;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format, Serialized, Toml},
    value::{Dict, Map, Value},
};
use serde::{Deserialize, Serialize};
use tidemark_telemetry::LogFormat;

pub use values::{ByteSize, NbdListen, NbdListens, Span};

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

macro_rules! settings {
    ($($(#[$doc:meta])* $key:ident: $type:ty = $default:expr;)*) => {
        /// The configuration of a capture service; see each key.
        #[derive(Debug, Clone, PartialEq, Serialize)]
        pub struct Config {
            $($(#[$doc])* pub $key: $type,)*
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($key: $default,)* }
            }
        }

        impl Config {
            /// Every key, in the order in which they are shown.
            pub const KEYS: &'static [&'static str] = &[$(stringify!($key),)*];

            fn extract(figment: &Figment, problems: &mut Vec<String>) -> Self {
                Self {
                    $($key: figment.extract_inner(stringify!($key)).unwrap_or_else(|error| {
                        problems.extend(error.into_iter().map(|e| problem(stringify!($key), figment, &e)));
                        $default
                    }),)*
                }
            }
        }

        /// One flag per key of [`Config`]; a flag that isn't given changes nothing.
        #[derive(Debug, Clone, Default, clap::Args)]
        pub struct Flags {
            $($(#[$doc])* #[arg(long, value_name = "VALUE")] $key: Option<String>,)*
        }

        impl Flags {
            fn given(self) -> impl Iterator<Item = (String, String)> {
                [$((stringify!($key).to_owned(), self.$key),)*]
                    .into_iter()
                    .filter_map(|(key, value)| Some((key, value?)))
            }
        }
    };
}

settings! {
    /// Directory of everything the service must remember. One service per directory.
    state: PathBuf = PathBuf::from("/var/lib/tidemark/capture");
    /// Address of the control interface (gRPC).
    listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 7401));
    /// Addresses of the NBD server, separated by commas: unix:PATH or tcp:ADDRESS:PORT. Empty: none.
    nbd: NbdListens = NbdListens::default();
    /// URL of the vault.
    vault: String = "http://127.0.0.1:7402".to_owned();
    /// Name of this source, as the vault shows it. Empty: the host's name.
    source_name: String = String::new();
    /// Longest time between two cuts of a volume.
    interval_max: Span = Span::from_secs(15 * 60);
    /// Cut as soon as so many blocks have changed since the last cut. 0: never.
    changed_blocks_max: u64 = 0;
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
    /// The most calls of the control interface at a time, per connection.
    calls_max: u32 = 256;
    /// Format of the log: text or json.
    log_format: LogFormat = LogFormat::Text;
    /// What is logged, by directives as in RUST_LOG.
    log_filter: String = "info".to_owned();
}

/// Everything that is wrong with a configuration, one problem per line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Each names its key and where the value came from.
    pub problems: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the configuration has {} problem(s):",
            self.problems.len()
        )?;
        self.problems
            .iter()
            .try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for ConfigError {}

fn problem(key: &str, figment: &Figment, error: &figment::Error) -> String {
    let source = match figment.find_metadata(key) {
        Some(m) => match &m.source {
            Some(source) => format!(" (from {} {source})", m.name),
            None => format!(" (from the {})", m.name),
        },
        None => String::new(),
    };
    let mut bare = error.clone();
    bare.metadata = None;
    bare.path.clear();
    bare.profile = None;
    format!("{key}: {bare}{source}")
}

/// Values by key as text, from the environment or from flags.
struct Layer {
    name: &'static str,
    values: Dict,
}

impl Layer {
    fn new(name: &'static str, pairs: impl Iterator<Item = (String, String)>) -> Self {
        let values = pairs
            .map(|(key, text)| {
                let Ok(value) = text.parse::<Value>();
                (key, value)
            })
            .collect();
        Self { name, values }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name)
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

/// Whether a variable that shares the prefix is none of ours to judge: the path of the file, and what Kubernetes puts
/// into the environment of everything beside a service named `capture`.
fn is_foreign(key: &str) -> bool {
    matches!(key, "config" | "port") || key.starts_with("port_") || key.starts_with("service_")
}

impl Config {
    /// Puts the configuration together; `environment` is that of the process.
    ///
    /// # Errors
    /// Every unknown key, every value that can't be read and every value out of range, together.
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        flags: Flags,
    ) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some(path) = file {
            if path.is_file() {
                figment = figment.merge(Toml::file_exact(path));
            } else {
                problems.push(format!(
                    "the configuration file {} doesn't exist",
                    path.display()
                ));
            }
        }
        let environment = environment.filter_map(|(name, value)| {
            let key = name.strip_prefix("CAPTURE_")?.to_ascii_lowercase();
            (!is_foreign(&key)).then_some((key, value))
        });
        let figment = figment
            .merge(Layer::new("environment, CAPTURE_…", environment))
            .merge(Layer::new("flags", flags.given()));
        match figment.extract::<Dict>() {
            Ok(all) => problems.extend(
                all.keys()
                    .filter(|key| !Self::KEYS.contains(&key.as_str()))
                    .map(|key| {
                        let from = figment.find_metadata(key).map_or("?", |m| m.name.as_ref());
                        format!(
                            "{key}: no such key (from the {from}); --print-config shows those there are"
                        )
                    }),
            ),
            Err(error) => {
                problems.extend(error.into_iter().map(|e| e.to_string()));
                return Err(ConfigError { problems });
            }
        }
        let config = Self::extract(&figment, &mut problems);
        problems.extend(config.problems());
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError { problems })
        }
    }

    /// Checks what the types don't.
    ///
    /// # Errors
    /// Every value that is out of range or contradicts another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let problems = self.problems();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(ConfigError { problems })
        }
    }

    fn problems(&self) -> Vec<String> {
        let checks = [
            (self.state.is_absolute(), "state: must be an absolute path"),
            (
                self.vault.starts_with("http://")
                    && self.vault.parse::<tonic::transport::Uri>().is_ok(),
                "vault: must be a URL like http://HOST:PORT",
            ),
            (
                self.source_name.len() <= 255,
                "source_name: must have at most 255 bytes",
            ),
            (
                !self.interval_max.get().is_zero(),
                "interval_max: must be above 0s",
            ),
            (
                self.spool_bytes_max.get() >= ByteSize::mib(1).get(),
                "spool_bytes_max: must be at least 1MiB",
            ),
            (
                (1..=19).contains(&self.zstd_level),
                "zstd_level: must be from 1 to 19",
            ),
            (
                (ByteSize::mib(2).get()..=ByteSize::mib(1024).get())
                    .contains(&self.bytes_in_flight_max.get()),
                "bytes_in_flight_max: must be from 2MiB to 1GiB",
            ),
            (
                !self.backoff_min.get().is_zero(),
                "backoff_min: must be above 0s",
            ),
            (
                self.backoff_min.get() <= self.backoff_max.get(),
                "backoff_max: must not be below backoff_min",
            ),
            (
                self.scrub_bytes_per_second_max.get() >= 64 << 10,
                "scrub_bytes_per_second_max: must be at least 64KiB",
            ),
            (
                !self.retry_period.get().is_zero(),
                "retry_period: must be above 0s",
            ),
            (self.volumes_max > 0, "volumes_max: must be above 0"),
            (self.snapshots_max > 0, "snapshots_max: must be above 0"),
            (self.nbd_clients_max > 0, "nbd_clients_max: must be above 0"),
            (self.calls_max > 0, "calls_max: must be above 0"),
        ];
        checks
            .iter()
            .filter(|(ok, _)| !ok)
            .map(|(_, problem)| (*problem).to_owned())
            .collect()
    }

    /// As TOML, every key with its value.
    ///
    /// # Panics
    /// Never: every key has a form in TOML.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("numbers, texts and lists of texts have a form in TOML")
    }
}

#[cfg(test)]
mod tests;
