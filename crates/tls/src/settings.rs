//! The settings that both services share: certificates, identities, plain text.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use tidemark_config::{OptionalAddr, Rules, Span};

use crate::{dialer::DialerFiles, gate::GateFiles};

/// What a service listens with, from its configuration.
#[derive(Debug, Clone, Copy)]
pub struct GateSettings<'a> {
    /// `listen`.
    pub listen: SocketAddr,
    /// `tls_cert`.
    pub cert: &'a Path,
    /// `tls_key`.
    pub key: &'a Path,
    /// `tls_ca`.
    pub ca: &'a Path,
    /// `identities`.
    pub identities: &'a Path,
    /// `allow_plain_text`.
    pub allow_plain_text: bool,
    /// `tls_reload_period`.
    pub reload_period: Span,
    /// `metrics_listen`.
    pub metrics_listen: OptionalAddr,
    /// `metrics_plain_text`.
    pub metrics_plain_text: bool,
}

fn given(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

/// Both, or neither.
fn pair(cert: &Path, key: &Path) -> Option<(PathBuf, PathBuf)> {
    given(cert).zip(given(key))
}

impl GateSettings<'_> {
    /// Whether it speaks TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        !self.cert.as_os_str().is_empty()
    }

    /// What holds between the keys.
    pub fn check(&self, rules: &mut Rules) {
        let has = |path: &Path| !path.as_os_str().is_empty();
        rules.that(
            "tls_key",
            has(self.cert) == has(self.key),
            "must be given together with tls_cert",
        );
        rules.that(
            "tls_ca",
            !has(self.ca) || has(self.cert),
            "is of no use without tls_cert: clients show certificates only to a service that has one",
        );
        rules.that(
            "identities",
            has(self.identities) || !has(self.cert),
            "must name the file of identities: with tls_cert everybody is asked who they are",
        );
        rules.that(
            "listen",
            self.is_safe() || self.allow_plain_text,
            "must be an address of this machine (127.0.0.1), unless tls_cert is given: others would be served in plain \
             text, which only allow_plain_text = true allows",
        );
        rules.that(
            "metrics_listen",
            self.metrics_are_safe() || self.metrics_plain_text || self.allow_plain_text,
            "must be an address of this machine (127.0.0.1): others would read names of volumes and sources in plain text, \
             which only metrics_plain_text = true allows",
        );
        let both = self.metrics_listen.0 == Some(self.listen) && self.listen.port() != 0;
        rules.that(
            "metrics_listen",
            !both,
            "must be another address than listen",
        );
        rules.within(
            "tls_reload_period",
            self.reload_period,
            Span::from_millis(10)..=Span::from_secs(24 * 3600),
        );
    }

    /// Whether nothing leaves the machine in plain text.
    #[must_use]
    pub fn is_safe(&self) -> bool {
        self.listen.ip().is_loopback() || self.is_tls()
    }

    /// Whether no metrics leave the machine in plain text.
    #[must_use]
    pub fn metrics_are_safe(&self) -> bool {
        let addr = self.metrics_listen.0;
        addr.is_none_or(|addr| addr.ip().is_loopback())
    }

    /// The files.
    #[must_use]
    pub fn files(&self) -> GateFiles {
        GateFiles {
            certificate: pair(self.cert, self.key),
            ca: given(self.ca),
            identities: given(self.identities),
        }
    }
}

impl DialerFiles {
    /// From paths of which the empty ones are none.
    #[must_use]
    pub fn named(ca: &Path, cert: &Path, key: &Path, token: &Path) -> Self {
        Self {
            ca: given(ca),
            certificate: pair(cert, key),
            token: given(token),
        }
    }
}
