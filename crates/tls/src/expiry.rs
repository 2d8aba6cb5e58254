//! When certificates end.

use rustls::pki_types::CertificateDer;

/// When what a service uses ends, in seconds since the Unix epoch; none where there is no such file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ends {
    /// The first certificate of the chain that the service shows: from then on nobody believes it.
    pub certificate: Option<i64>,
    /// The last of the CAs that it trusts: from then on it believes nobody.
    pub ca: Option<i64>,
}

/// The end of the first of them to end.
pub(crate) fn first(chain: &[CertificateDer<'_>]) -> Option<i64> {
    chain.iter().filter_map(end).min()
}

/// The end of the last of them to end.
pub(crate) fn last(all: &[CertificateDer<'_>]) -> Option<i64> {
    all.iter().filter_map(end).max()
}

fn end(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(parsed.validity().not_after.timestamp())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    fn until(year: i32) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_chain_ends_with_its_first_and_cas_with_their_last() {
        let both = [until(2031), until(2030)];
        let of = |year: i32| Some(date_time_ymd(year, 1, 1).unix_timestamp());
        assert_eq!((first(&both), last(&both)), (of(2030), of(2031)));
        let other = CertificateDer::from(vec![1, 2, 3]);
        assert_eq!((first(&[]), last(&[other])), (None, None));
    }
}
