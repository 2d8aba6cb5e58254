//! What is known of the other end of a connection.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use rustls::pki_types::CertificateDer;

#[derive(Debug, Default)]
struct Known {
    certificates: OnceLock<Vec<CertificateDer<'static>>>,
    admitted: AtomicBool,
}

/// The other end of a connection; every call that comes over it carries a copy.
#[derive(Debug, Clone)]
pub struct Peer {
    address: Option<SocketAddr>,
    known: Arc<Known>,
}

impl Peer {
    /// Of a connection that has just been accepted.
    #[must_use]
    pub fn new(address: Option<SocketAddr>) -> Self {
        Self {
            address,
            known: Arc::default(),
        }
    }

    /// Where it comes from, for logs.
    #[must_use]
    pub fn address(&self) -> String {
        self.address
            .map_or_else(|| "an unknown address".to_owned(), |a| a.to_string())
    }

    /// Takes note of the chain of certificates that the handshake has ended with; empty where the peer has none.
    pub fn showed(&self, certificates: &[CertificateDer<'_>]) {
        let owned = certificates.iter().map(|c| c.clone().into_owned());
        // A handshake ends once.
        let _ = self.known.certificates.set(owned.collect());
    }

    /// The chain that it has shown; empty without TLS, or without a certificate.
    #[must_use]
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        self.known.certificates.get().map_or(&[], Vec::as_slice)
    }

    /// It has made a call that took an identity, and has one; or nobody asks for any.
    pub fn admit(&self) {
        self.known.admitted.store(true, SeqCst);
    }

    /// Whether it has been admitted.
    #[must_use]
    pub fn is_admitted(&self) -> bool {
        self.known.admitted.load(SeqCst)
    }
}
