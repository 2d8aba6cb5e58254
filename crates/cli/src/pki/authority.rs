//! Certificates as they are made: keys are ECDSA on P-256, names are subject alternative names.

use std::{net::IpAddr, time::Duration};

use jiff::{Timestamp, ToSpan, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use tidemark_identity::token::hex;

use crate::failure::{Failure, Kind};

/// How long a certificate is valid, unless told otherwise.
pub const VALID_DEFAULT: Duration = Duration::from_secs(365 * DAY_SECS);
/// How long the CA's own certificate is.
const CA_VALID: Duration = Duration::from_secs(20 * 365 * DAY_SECS);
const DAY_SECS: u64 = 86_400;

/// Whom a certificate is for.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The identity: a DNS name, first of the certificate's names.
    pub name: String,
    /// Where it listens, if it is a service: names and addresses as clients have them in their URLs.
    pub hosts: Vec<String>,
    /// From now on.
    pub valid: Duration,
}

/// A certificate.
#[derive(Debug, Clone)]
pub struct Issued {
    /// In PEM.
    pub certificate: String,
    /// The day on which it ends.
    pub valid_until: Timestamp,
}

/// The CA: its key, from which all else of it follows.
#[derive(Debug)]
pub struct Authority {
    key: KeyPair,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn new() -> Result<Self, Failure> {
        let key = KeyPair::generate().map_err(failed)?;
        Ok(Self { key })
    }

    /// The one of this key, in PEM.
    ///
    /// # Errors
    /// It is none.
    pub fn of_key(pem: &str) -> Result<Self, Failure> {
        let key = KeyPair::from_pem(pem).map_err(failed)?;
        Ok(Self { key })
    }

    /// Its key, in PEM.
    #[must_use]
    pub fn key(&self) -> String {
        self.key.serialize_pem()
    }

    /// A certificate of its own, valid from `now` on.
    ///
    /// # Errors
    /// The time has no date.
    pub fn certificate(&self, now: Timestamp) -> Result<Issued, Failure> {
        let mut params = self.params();
        let valid_until = set_validity(&mut params, now, CA_VALID)?;
        let certificate = params.self_signed(&self.key).map_err(failed)?.pem();
        Ok(Issued {
            certificate,
            valid_until,
        })
    }

    /// A certificate for somebody's key.
    ///
    /// # Errors
    /// The names are none, or the time has no date.
    pub fn issue(
        &self,
        subject: &Subject,
        key: &KeyPair,
        now: Timestamp,
    ) -> Result<Issued, Failure> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, subject.name.clone());
        params.subject_alt_names = vec![dns(&subject.name)?];
        for host in subject.hosts.iter().filter(|host| **host != subject.name) {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => dns(host)?,
            });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        // Somebody who is no service can't pass for one, whatever the name.
        if !subject.hosts.is_empty() {
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        let valid_until = set_validity(&mut params, now, subject.valid)?;
        let own = self.params();
        let certificate = params
            .signed_by(key, &Issuer::from_params(&own, &self.key))
            .map_err(failed)?
            .pem();
        Ok(Issued {
            certificate,
            valid_until,
        })
    }

    fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let print = hex(&params.key_identifier(&self.key));
        let name = format!("Tidemark CA {}", print.get(..16).unwrap_or(&print));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }
}

/// Whole days: from yesterday, so that clocks that are slow take it, to the day on which `valid` from now ends.
fn set_validity(
    params: &mut CertificateParams,
    now: Timestamp,
    valid: Duration,
) -> Result<Timestamp, Failure> {
    let out_of_range = |_| usage("the certificate would be valid for longer than there are dates");
    let valid = jiff::SignedDuration::try_from(valid).map_err(out_of_range)?;
    let begins = now.checked_sub(24.hours()).map_err(out_of_range)?;
    let ends = now.checked_add(valid).map_err(out_of_range)?;
    let date = |at: Timestamp| at.to_zoned(TimeZone::UTC).date();
    let (first, last) = (date(begins), date(ends));
    if last <= date(now) {
        return Err(usage(
            "a certificate is valid for whole days: give it at least one",
        ));
    }
    let day = |of: jiff::civil::Date| {
        let (month, day) = (of.month().unsigned_abs(), of.day().unsigned_abs());
        date_time_ymd(of.year().into(), month, day)
    };
    params.not_before = day(first);
    params.not_after = day(last);
    last.to_zoned(TimeZone::UTC)
        .map(|at| at.timestamp())
        .map_err(out_of_range)
}

fn dns(name: &str) -> Result<SanType, Failure> {
    let wrong = || {
        usage(format!(
            "{name:?} is no DNS name: letters, digits and hyphens, with dots between the parts"
        ))
    };
    let is_good = name.split('.').all(|part| {
        (1..=63).contains(&part.len())
            && part
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    });
    if !is_good || name.len() > 253 {
        return Err(wrong());
    }
    let text = name.to_owned().try_into().map_err(|_| wrong())?;
    Ok(SanType::DnsName(text))
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new(Kind::Usage, "CERTIFICATE_INVALID", message, "")
}

fn failed(error: rcgen::Error) -> Failure {
    Failure::new(
        Kind::Failed,
        "CERTIFICATE_FAILED",
        format!("the certificate can't be made: {error}"),
        "",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_url_can_have_are_refused() {
        for name in ["edge-7", "vault.example.com", "a", "7"] {
            dns(name).unwrap();
        }
        let long = "a".repeat(64);
        for name in ["", "a..b", "-a", "a-", "A", "a b", "a/b", "*", "ä", &long] {
            assert_eq!(dns(name).unwrap_err().kind(), Kind::Usage, "{name}");
        }
    }

    #[test]
    fn a_certificate_begins_the_day_before_and_ends_on_its_last_day() {
        let now: Timestamp = "2026-11-29T10:00:00Z".parse().unwrap();
        let mut params = CertificateParams::default();
        let ends = set_validity(&mut params, now, VALID_DEFAULT).unwrap();
        assert_eq!(ends.to_string(), "2027-11-29T00:00:00Z");
        assert_eq!(params.not_before, date_time_ymd(2026, 11, 28));
        assert_eq!(params.not_after, date_time_ymd(2027, 11, 29));
        let forever = Duration::from_secs(u64::MAX / 2);
        for valid in [forever, Duration::ZERO, Duration::from_secs(3600)] {
            assert!(set_validity(&mut params, now, valid).is_err(), "{valid:?}");
        }
        set_validity(&mut params, now, Duration::from_secs(DAY_SECS)).unwrap();
    }
}
