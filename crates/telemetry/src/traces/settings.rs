//! Where traces go, from the configuration of a service.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use tidemark_config::Rules;
use tidemark_tls::{is_loopback_url, is_service_url};

/// The variable that says to many programs where the collector is.
const STANDARD_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Standard variables, with the keys of both services that they set.
pub(crate) const STANDARD: [(&str, &str); 2] = [
    (STANDARD_ENDPOINT, "otlp_endpoint"),
    ("OTEL_EXPORTER_OTLP_CERTIFICATE", "otlp_ca"),
];
/// What is shown to the collector with everything, with traces, and with metrics. The exporter of traces takes it from the
/// environment itself.
const STANDARD_HEADERS: [&str; 3] = [
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    METRICS_HEADERS,
];
const METRICS_HEADERS: &str = "OTEL_EXPORTER_OTLP_METRICS_HEADERS";
const STANDARD_PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";

/// The value of a standard variable; an empty one is as good as none.
fn standard(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// What is shown with metrics, as the standard variables have it.
pub(super) fn metrics_headers() -> Option<String> {
    standard(METRICS_HEADERS).or_else(|| standard(STANDARD_HEADERS[0]))
}

/// How many of the traces that begin here are exported: from none (0) to all (1), in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SampleRatio(u32);

const MILLION: f64 = 1e6;

impl SampleRatio {
    /// All of them.
    pub const ALL: Self = Self(1_000_000);

    /// From 0 to 1.
    #[must_use]
    pub fn get(self) -> f64 {
        f64::from(self.0) / MILLION
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is from 0 to 1, and so from 0 to a million"
    )]
    fn of(ratio: f64) -> Option<Self> {
        (0.0..=1.0)
            .contains(&ratio)
            .then(|| Self((ratio * MILLION).round() as u32))
    }
}

impl fmt::Display for SampleRatio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

fn no_ratio(text: impl fmt::Display) -> String {
    format!("{text} is no part of all traces: write a number from 0 (none) to 1 (all), as 0.1")
}

impl FromStr for SampleRatio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ratio = text.trim().parse().ok().and_then(Self::of);
        ratio.ok_or_else(|| no_ratio(text))
    }
}

impl Serialize for SampleRatio {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.get())
    }
}

impl<'de> Deserialize<'de> for SampleRatio {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "no part of all traces: write a number from 0 (none) to 1 (all), as 0.1"
        )]
        enum Raw {
            Text(String),
            Number(f64),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Text(text) => text.parse().map_err(D::Error::custom),
            Raw::Number(ratio) => Self::of(ratio).ok_or_else(|| D::Error::custom(no_ratio(ratio))),
        }
    }
}

/// The keys of both services that say where traces go.
#[derive(Debug, Clone, Copy)]
pub struct CollectorSettings<'a> {
    /// `otlp_endpoint`.
    pub endpoint: &'a str,
    /// `otlp_ca`.
    pub ca: &'a Path,
    /// `otlp_headers_file`.
    pub headers_file: &'a Path,
    /// `trace_sample_ratio`.
    pub sample_ratio: SampleRatio,
    /// `allow_plain_text`.
    pub allow_plain_text: bool,
}

impl CollectorSettings<'_> {
    /// Standard variables, with the keys that they set.
    pub const STANDARD: &'static [(&'static str, &'static str)] = &STANDARD;

    /// What holds between the keys.
    pub fn check(&self, rules: &mut Rules) {
        let is_https = is_https(self.endpoint);
        let is_url = is_service_url(self.endpoint);
        let has = |path: &Path| !path.as_os_str().is_empty();
        rules.that(
            "otlp_endpoint",
            self.endpoint.is_empty() || is_url,
            "must be a URL like http://127.0.0.1:4317 or https://HOST:PORT, or empty",
        );
        rules.that(
            "otlp_ca",
            !has(self.ca) || is_https || self.endpoint.is_empty(),
            "is of no use unless otlp_endpoint begins with https",
        );
        rules.that(
            "otlp_headers_file",
            !has(self.headers_file)
                || !is_url
                || is_https
                || self.allow_plain_text
                || is_loopback_url(self.endpoint),
            "would be sent to another machine in plain text: let otlp_endpoint begin with https, or set \
             allow_plain_text = true",
        );
    }

    /// Where traces go.
    #[must_use]
    pub fn export(&self) -> Export {
        let given = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
        let collector = (!self.endpoint.is_empty()).then(|| Collector {
            endpoint: self.endpoint.to_owned(),
            ca: given(self.ca),
            headers_file: given(self.headers_file),
        });
        Export {
            collector,
            sample_ratio: self.sample_ratio,
        }
    }
}

/// Where traces go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    pub(crate) collector: Option<Collector>,
    pub(crate) sample_ratio: SampleRatio,
}

impl Export {
    /// Nowhere; ids are given out all the same.
    #[cfg(test)]
    pub(crate) const NOWHERE: Self = Self {
        collector: None,
        sample_ratio: SampleRatio::ALL,
    };

    /// As the standard variables say, of a program without a configuration of its own. What is of no use is passed over.
    pub(crate) fn standard() -> Self {
        let [endpoint, ca] = STANDARD.map(|(name, _)| standard(name));
        Self::of(endpoint, ca)
    }

    fn of(endpoint: Option<String>, ca: Option<String>) -> Self {
        let endpoint = endpoint.filter(|endpoint| is_service_url(endpoint));
        Self {
            collector: endpoint.map(|endpoint| Collector {
                ca: ca.filter(|_| is_https(&endpoint)).map(PathBuf::from),
                endpoint,
                headers_file: None,
            }),
            sample_ratio: SampleRatio::ALL,
        }
    }

    /// Says where traces go, what is odd about that, and which standard variables were passed over.
    pub(crate) fn tell(&self) {
        let [(endpoint, _), (ca, _)] = STANDARD;
        if let Some(value) = standard(endpoint).filter(|value| !is_service_url(value)) {
            tracing::warn!(
                variable = endpoint,
                value,
                "this variable is passed over: it is no URL like http://HOST:4317"
            );
        }
        if let Some(collector) = &self.collector {
            if !is_https(&collector.endpoint) && standard(ca).is_some() {
                tracing::warn!(variable = ca, endpoint = %collector.endpoint, "this variable is passed over: the collector's URL is not https");
            }
            collector.tell();
        }
    }
}

fn is_https(url: &str) -> bool {
    url.starts_with("https://")
}

/// Who takes the traces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Collector {
    pub(crate) endpoint: String,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) headers_file: Option<PathBuf>,
}

impl Collector {
    /// Says where it is, and what is odd about it.
    fn tell(&self) {
        let endpoint = &self.endpoint;
        tracing::info!(%endpoint, "traces are exported");
        if endpoint.starts_with("http://") && !is_loopback_url(endpoint) {
            tracing::warn!(%endpoint, "traces leave this machine in plain text: names of volumes and hosts can be read on their way");
            let mut names = STANDARD_HEADERS.iter();
            if let Some(variable) = names.find(|name| standard(name).is_some()) {
                tracing::warn!(%endpoint, variable, "and so do the headers of this variable");
            }
        }
        if let Some(protocol) = standard(STANDARD_PROTOCOL).filter(|protocol| protocol != "grpc") {
            tracing::warn!(%endpoint, variable = STANDARD_PROTOCOL, %protocol, "only grpc is spoken with the collector, whatever the variable says; its port is mostly 4317");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_variables_that_are_of_no_use_are_passed_over() {
        let of = |endpoint: &str| {
            let export = Export::of(Some(endpoint.to_owned()), Some("ca.pem".to_owned()));
            export.collector.map(|collector| collector.ca)
        };
        for useless in [
            "collector:4317",
            "ftp://collector",
            "https://",
            "http://a b",
        ] {
            assert_eq!(of(useless), None, "{useless}");
        }
        assert_eq!(of("http://collector:4317"), Some(None));
        assert_eq!(of("https://collector"), Some(Some("ca.pem".into())));
    }

    #[test]
    fn a_ratio_is_a_number_from_none_to_all() {
        for (text, ratio) in [("0", 0.0), ("1", 1.0), ("0.25", 0.25), (" 1e-6 ", 1e-6)] {
            let read: SampleRatio = text.parse().unwrap();
            assert!((read.get() - ratio).abs() < 1e-9, "{text}");
            assert_eq!(read.to_string().parse(), Ok(read));
        }
        for text in ["", "all", "-0.1", "1.01", "NaN", "inf", "50%"] {
            assert!(text.parse::<SampleRatio>().is_err(), "{text}");
        }
    }
}
