//! When a service's own certificates end. It is told in time: whoever renews them may have forgotten, and what follows is
//! that nobody gets in.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use crate::{dialer::DialerFiles, files, gate::Gate};

/// How long before its end a certificate is told of.
const NOTICE: Duration = Duration::from_secs(14 * DAY_SECS);
/// One that is renewed often is told of in the last fifth of its time only.
const NOTICE_SHARE: u32 = 5;
/// How often it is told of.
const TOLD_PERIOD: Duration = Duration::from_secs(DAY_SECS);
const LOOK_PERIOD: Duration = Duration::from_secs(3600);
const DAY_SECS: u64 = 86_400;

/// What a certificate of a service is shown for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// To its clients: `tls_cert`.
    Listening,
    /// To the service that it connects to: `vault_cert`.
    Connecting,
}

/// How a certificate stands at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing has to be done.
    Good,
    /// It is time to renew it.
    EndsSoon,
    /// Nobody takes it any more.
    Ended,
    /// Nobody takes it yet.
    NotYet,
}

/// The time within which certificates are valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Its first second.
    pub not_before: SystemTime,
    /// Its last second.
    pub not_after: SystemTime,
}

/// A certificate that a service shows, with its chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnCertificate {
    /// Where it lies.
    pub file: PathBuf,
    /// What it is for.
    pub purpose: Purpose,
    /// The time within which it and all of its chain are valid.
    pub validity: Validity,
}

/// The certificates that a service shows.
#[derive(Debug)]
pub struct OwnCertificates {
    gate: Arc<Gate>,
    dialer: DialerFiles,
}

/// When what a service uses ends, in seconds since the Unix epoch; none where there is no such file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ends {
    /// The first certificate of the chain that the service shows: from then on nobody believes it.
    pub certificate: Option<i64>,
    /// The last of the CAs that it trusts: from then on it believes nobody.
    pub ca: Option<i64>,
}

/// The end of the last of them to end.
pub(crate) fn last(all: &[CertificateDer<'_>]) -> Option<i64> {
    let each = all.iter().filter_map(Validity::of_one);
    each.filter_map(|validity| validity.end()).max()
}

impl Validity {
    /// Of a certificate with its chain, in which others than it may be of a form whose dates can't be read.
    pub(crate) fn of(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let each: Vec<_> = chain.iter().filter_map(Self::of_one).collect();
        Some(Self {
            not_before: each.iter().map(|v| v.not_before).max()?,
            not_after: each.iter().map(|v| v.not_after).min()?,
        })
    }

    /// As the verifier sees it: it is asked about a time before all others, and about one after them.
    fn of_one(certificate: &CertificateDer<'_>) -> Option<Self> {
        let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
        let verdict = |secs| {
            let at = UnixTime::since_unix_epoch(Duration::from_secs(secs));
            let usage = webpki::KeyUsage::client_auth();
            parsed
                .verify_for_usage(&[], &[], &[], at, usage, None, None)
                .err()
        };
        let not_before = match verdict(0)? {
            webpki::Error::CertNotValidYet { not_before, .. } => not_before,
            _ => UnixTime::since_unix_epoch(Duration::ZERO),
        };
        let webpki::Error::CertExpired { not_after, .. } = verdict(u64::MAX)? else {
            return None;
        };
        let time = |at: UnixTime| UNIX_EPOCH.checked_add(Duration::from_secs(at.as_secs()));
        Some(Self {
            not_before: time(not_before)?,
            not_after: time(not_after)?,
        })
    }

    /// Its last second, in seconds since the Unix epoch.
    pub(crate) fn end(&self) -> Option<i64> {
        let since = self.not_after.duration_since(UNIX_EPOCH).ok()?;
        i64::try_from(since.as_secs()).ok()
    }

    /// How it stands at a time.
    #[must_use]
    pub fn standing(&self, now: SystemTime) -> Standing {
        let Ok(left) = self.not_after.duration_since(now) else {
            return Standing::Ended;
        };
        if now < self.not_before {
            return Standing::NotYet;
        }
        let whole = self
            .not_after
            .duration_since(self.not_before)
            .unwrap_or_default();
        if left <= NOTICE.min(whole / NOTICE_SHARE) {
            Standing::EndsSoon
        } else {
            Standing::Good
        }
    }
}

impl OwnCertificates {
    /// The one that the gate shows, and the one that is shown to the service that this one connects to.
    #[must_use]
    pub const fn new(gate: Arc<Gate>, dialer: DialerFiles) -> Self {
        Self { gate, dialer }
    }

    /// All of them, as they are now. One that can't be read is left out: whoever uses it says so. Reads files.
    #[must_use]
    pub fn all(&self) -> Vec<OwnCertificate> {
        let connecting = self.dialer.certificate.as_ref().and_then(|(file, _)| {
            let chain = files::certificates(file).ok()?;
            Some(OwnCertificate {
                file: file.clone(),
                purpose: Purpose::Connecting,
                validity: Validity::of(&chain)?,
            })
        });
        self.gate
            .certificate()
            .into_iter()
            .chain(connecting)
            .collect()
    }

    /// Logs what has to be renewed: at once, and once a day as long as nobody has done it.
    pub async fn watch(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut told = Told::default();
        let mut ticks = interval(LOOK_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                _ = ticks.tick() => {}
            }
            let own = Arc::clone(&self);
            let Ok(all) = tokio::task::spawn_blocking(move || own.all()).await else {
                continue;
            };
            let now = SystemTime::now();
            for certificate in all {
                if let Some(standing) = told.next(&certificate, now) {
                    tell(&certificate, standing);
                }
            }
        }
    }
}

/// What has been told of each certificate, and when.
#[derive(Debug, Default)]
struct Told(HashMap<Purpose, (Standing, SystemTime)>);

impl Told {
    /// What is to be told of a certificate now.
    fn next(&mut self, certificate: &OwnCertificate, now: SystemTime) -> Option<Standing> {
        let standing = certificate.validity.standing(now);
        if standing == Standing::Good {
            self.0.remove(&certificate.purpose);
            return None;
        }
        if let Some((last, at)) = self.0.get(&certificate.purpose)
            && *last == standing
            // A clock that was put back must not silence it.
            && now.duration_since(*at).is_ok_and(|passed| passed < TOLD_PERIOD)
        {
            return None;
        }
        self.0.insert(certificate.purpose, (standing, now));
        Some(standing)
    }
}

fn tell(certificate: &OwnCertificate, standing: Standing) {
    let file = certificate.file.display();
    let date = |at| humantime::format_rfc3339_seconds(at).to_string();
    let (from, until) = (
        date(certificate.validity.not_before),
        date(certificate.validity.not_after),
    );
    let whom = match certificate.purpose {
        Purpose::Listening => "clients",
        Purpose::Connecting => "the vault",
    };
    match standing {
        Standing::Good => {}
        Standing::EndsSoon => tracing::warn!(
            %file, until, "the certificate that is shown to {whom} ends soon: put a new one in its place (`tidemark pki issue NAME --renew`); it is read without a restart"
        ),
        Standing::Ended => tracing::error!(
            %file, until, "the certificate that is shown to {whom} has expired, and is refused: put a new one in its place (`tidemark pki issue NAME --renew`); it is read without a restart"
        ),
        Standing::NotYet => tracing::error!(
            %file, from, "the certificate that is shown to {whom} is not valid yet, and is refused: check this machine's clock"
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;
    use crate::gate::GateFiles;

    const DAY: Duration = Duration::from_secs(DAY_SECS);

    fn certificate(years: std::ops::Range<i32>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.not_before = date_time_ymd(years.start, 1, 1);
        params.not_after = date_time_ymd(years.end, 1, 1);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    fn at(text: &str) -> SystemTime {
        humantime::parse_rfc3339(text).unwrap()
    }

    #[test]
    fn a_chain_is_valid_as_long_as_all_of_it_is() {
        let (own, above) = (certificate(2020..2100), certificate(1971..2060));
        let alone = Validity::of(std::slice::from_ref(&own)).unwrap();
        assert_eq!(alone.not_before, at("2020-01-01T00:00:00Z"));
        assert_eq!(alone.not_after, at("2100-01-01T00:00:00Z"));
        // What can't be read, such as a root of an old form, doesn't count.
        let chain = Validity::of(&[own, above, vec![1, 2, 3].into()]).unwrap();
        assert_eq!(chain.not_before, alone.not_before);
        assert_eq!(chain.not_after, at("2060-01-01T00:00:00Z"));
        assert_eq!(Validity::of(&[vec![1, 2, 3].into()]), None);
    }

    #[test]
    fn a_service_knows_both_that_it_shows_and_of_one_that_is_replaced_the_newer() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let write = |name: &str, years: std::ops::Range<i32>| {
            let mut params = CertificateParams::default();
            params.not_before = date_time_ymd(years.start, 1, 1);
            params.not_after = date_time_ymd(years.end, 1, 1);
            let key = KeyPair::generate().unwrap();
            let made = params.self_signed(&key).unwrap();
            std::fs::write(path(&format!("{name}.crt")), made.pem()).unwrap();
            std::fs::write(path(&format!("{name}.key")), key.serialize_pem()).unwrap();
            (path(&format!("{name}.crt")), path(&format!("{name}.key")))
        };
        let gate = Gate::open(GateFiles {
            certificate: Some(write("listening", 2020..2030)),
            ..GateFiles::default()
        });
        let own = OwnCertificates::new(
            gate.unwrap(),
            DialerFiles {
                certificate: Some(write("connecting", 2020..2040)),
                ..DialerFiles::default()
            },
        );
        let ends = || -> Vec<_> {
            let all = own.all().into_iter();
            all.map(|c| (c.purpose, c.validity.not_after)).collect()
        };
        let (first, second) = (at("2030-01-01T00:00:00Z"), at("2040-01-01T00:00:00Z"));
        assert_eq!(
            ends(),
            [(Purpose::Listening, first), (Purpose::Connecting, second)]
        );
        write("listening", 2020..2050);
        write("connecting", 2020..2060);
        // Connections begin with the newer one from now on; the gate has yet to read its own.
        let newer = at("2060-01-01T00:00:00Z");
        assert_eq!(
            ends(),
            [(Purpose::Listening, first), (Purpose::Connecting, newer)]
        );
        own.gate.reload(false);
        assert_eq!(ends()[0].1, at("2050-01-01T00:00:00Z"));
    }

    fn valid(days: u32) -> OwnCertificate {
        let not_before = at("2026-01-01T00:00:00Z");
        OwnCertificate {
            file: "x.crt".into(),
            purpose: Purpose::Listening,
            validity: Validity {
                not_before,
                not_after: not_before + DAY * days,
            },
        }
    }

    #[test]
    fn it_is_time_in_the_last_fortnight_or_the_last_fifth_whichever_is_less() {
        let hour = Duration::from_secs(3600);
        for (days, notice) in [(365, DAY * 14), (90, DAY * 14), (10, DAY * 2)] {
            let validity = valid(days).validity;
            let soon = validity.not_after - notice;
            for (now, standing) in [
                (validity.not_before - hour, Standing::NotYet),
                (validity.not_before, Standing::Good),
                (soon - hour, Standing::Good),
                (soon, Standing::EndsSoon),
                (validity.not_after, Standing::EndsSoon),
                (validity.not_after + hour, Standing::Ended),
            ] {
                assert_eq!(validity.standing(now), standing, "{days} days, {now:?}");
            }
        }
    }

    #[test]
    fn it_is_told_once_a_day_and_when_something_changes_and_not_after_it_was_renewed() {
        let mut told = Told::default();
        let (old, renewed) = (valid(20), valid(300));
        let end = old.validity.not_after;
        let hour = Duration::from_secs(3600);
        assert_eq!(told.next(&old, end - DAY * 10), None);
        let begins = end - hour * 47;
        assert_eq!(told.next(&old, begins), Some(Standing::EndsSoon));
        assert_eq!(told.next(&old, begins + hour), None);
        assert_eq!(told.next(&old, begins + DAY), Some(Standing::EndsSoon));
        assert_eq!(told.next(&old, end + hour), Some(Standing::Ended));
        assert_eq!(told.next(&old, end + hour * 2), None);
        // The clock is put back.
        assert_eq!(told.next(&old, end - hour), Some(Standing::EndsSoon));
        assert_eq!(told.next(&renewed, end), None);
        assert_eq!(told.next(&old, end), Some(Standing::EndsSoon));
    }
}
