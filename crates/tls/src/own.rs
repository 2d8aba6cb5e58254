//! Connections to a service of this machine itself, to ask for its health.
//!
//! Its certificate is not looked at, as Kubernetes doesn't look at it for its probes: it is for the names that others use,
//! of a CA that the service need not know, and a service isn't made better by a restart where it has expired. Nothing is
//! shown to it, and nothing is believed of it but that it serves.

use std::{net::SocketAddr, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tidemark_proto::RpcError;

use crate::{
    dialer::{Dialer, Line, over_tls},
    files,
    gate::ALPN,
};

/// Connects to the service that listens on `address` of this machine, with TLS or in plain text.
///
/// # Errors
/// It can't be reached, or doesn't speak so.
pub async fn dial_own(address: SocketAddr, is_tls: bool) -> Result<Line, RpcError> {
    if is_tls {
        let url = format!("https://{address}");
        return over_tls(&url, Arc::new(config()?)).await;
    }
    let dialer = Dialer {
        // It doesn't leave the machine, whatever the address.
        allow_plain_text: true,
        ..Dialer::default()
    };
    dialer
        .dial(&format!("http://{address}"), |endpoint| endpoint)
        .await
}

fn config() -> Result<ClientConfig, RpcError> {
    let provider = files::provider();
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|_| RpcError::internal("TLS can't be set up"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Whoever(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Takes every certificate whose key the service has.
#[derive(Debug)]
struct Whoever(Arc<CryptoProvider>);

impl ServerCertVerifier for Whoever {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.0.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
