//! Why one side doesn't take the other, in words; and how the side that is refused gets to hear it.

use std::{error::Error, io, time::Duration};

use rustls::{AlertDescription, CertificateError, Error as TlsError};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long a refused peer may take to read why.
const LINGER_MAX: Duration = Duration::from_secs(1);
/// What is read of it meanwhile, and thrown away.
const LINGER_BYTES_MAX: usize = 64 << 10;

/// What is wrong with a handshake; none where it is no fault of TLS.
#[must_use]
pub fn told(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<TlsError>() {
            return Some(of_tls(tls));
        }
        next = match error.downcast_ref::<io::Error>() {
            // Its source is that of the error inside.
            Some(io) => io.get_ref().map(|inner| inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

fn of_tls(error: &TlsError) -> String {
    match error {
        TlsError::InvalidCertificate(what) => of_certificate(what),
        TlsError::AlertReceived(alert) => of_alert(*alert),
        TlsError::NoCertificatesPresented => "the peer has shown no certificate".to_owned(),
        TlsError::InvalidMessage(_) => "the peer doesn't speak TLS".to_owned(),
        TlsError::PeerIncompatible(why) => {
            format!("the peer's TLS doesn't fit: TLS 1.3 is needed ({why:?})")
        }
        other => other.to_string(),
    }
}

fn of_certificate(error: &CertificateError) -> String {
    use CertificateError as E;
    match error {
        E::Expired | E::ExpiredContext { .. } => "the peer's certificate has expired".to_owned(),
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "the peer's certificate is not valid yet: check the clocks".to_owned()
        }
        E::UnknownIssuer => "the peer's certificate is of a CA that is not trusted here".to_owned(),
        E::NotValidForName => "the peer's certificate is for another name".to_owned(),
        E::NotValidForNameContext {
            expected,
            presented,
        } => format!(
            "the peer's certificate is for another name: it is for {}, not for {}",
            presented.join(", "),
            expected.to_str()
        ),
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            "the peer's certificate is not for this use: servers and clients need different ones"
                .to_owned()
        }
        other => format!("the peer's certificate is refused: {other}"),
    }
}

fn of_alert(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let what = match alert {
        // One word for both.
        A::CertificateExpired => "our certificate has expired, or is not valid yet",
        A::UnknownCA => "the CA of our certificate is not trusted there",
        A::CertificateRequired => "a certificate is needed, and we have none",
        A::UnsupportedCertificate => {
            "our certificate is not for this use: servers and clients need different ones"
        }
        A::BadCertificate | A::CertificateUnknown => {
            "our certificate is not accepted: see the peer's log"
        }
        A::AccessDenied => "our certificate gives no access",
        A::ProtocolVersion => "its version of TLS is another one",
        other => return format!("the peer ends TLS: {other:?}"),
    };
    format!("the peer says: {what}")
}

/// Ends a connection so that its peer gets to read the reason: were it closed with unread bytes, the system would tell
/// the peer that it was reset, and throw the reason away.
pub async fn linger(mut stream: TcpStream) {
    let drained = async {
        stream.shutdown().await?;
        let mut left = LINGER_BYTES_MAX;
        let mut bytes = [0; 4096];
        while left > 0 {
            match stream.read(&mut bytes).await? {
                0 => break,
                read => left = left.saturating_sub(read),
            }
        }
        Ok::<_, io::Error>(())
    };
    // Whoever doesn't read is not waited for.
    let _ = timeout(LINGER_MAX, drained).await;
}
