//! Certificates, keys and tokens, as they lie in files.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use tidemark_identity::token::TOKEN_CHARS_MIN;

/// The most bytes of a file of certificates, of a key, of a token, of identities.
pub(crate) const FILE_BYTES_MAX: u64 = 4 << 20;

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It can't be read.
    #[error("{}: {error}", path.display())]
    Unreadable {
        /// Of the file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It holds something else.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// Of the file.
        path: PathBuf,
        /// What is wrong, and what it must hold.
        what: String,
    },
    /// TLS can't be set up with what the files hold.
    #[error("TLS can't be set up: {0}")]
    Setup(String),
}

impl FileError {
    pub(crate) fn invalid(path: &Path, what: impl Into<String>) -> Self {
        Self::Invalid {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}

/// The one crypto provider.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Fills `bytes` with what nobody can guess.
///
/// # Errors
/// The system gives no randomness.
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    provider()
        .secure_random
        .fill(bytes)
        .map_err(|_| io::Error::other("the system gives no randomness"))
}

/// Reads a file that is not long.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let unreadable = |error| FileError::Unreadable {
        path: path.to_owned(),
        error,
    };
    let file = fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
    if read.map_err(unreadable)? as u64 > FILE_BYTES_MAX {
        return Err(FileError::invalid(
            path,
            format!("has more than {FILE_BYTES_MAX} bytes"),
        ));
    }
    Ok(bytes)
}

pub(crate) fn read_text(path: &Path) -> Result<String, FileError> {
    String::from_utf8(read(path)?).map_err(|_| FileError::invalid(path, "isn't UTF-8"))
}

/// One or more certificates in PEM.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| FileError::invalid(path, format!("no PEM: {error}")))?;
    if found.is_empty() {
        return Err(FileError::invalid(path, "holds no certificate in PEM"));
    }
    Ok(found)
}

/// A certificate with its chain, and its private key.
pub(crate) fn certified(cert: &Path, key: &Path) -> Result<CertifiedKey, FileError> {
    let chain = certificates(cert)?;
    let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| {
        FileError::invalid(key, format!("holds no private key in PEM: {error}"))
    })?;
    let signer = provider()
        .key_provider
        .load_private_key(private)
        .map_err(|error| FileError::invalid(key, format!("is no key that TLS can use: {error}")))?;
    let certified = CertifiedKey::new(chain, signer);
    certified.keys_match().map_err(|error| {
        FileError::invalid(
            key,
            format!(
                "isn't the key of the certificate {}: {error}",
                cert.display()
            ),
        )
    })?;
    Ok(certified)
}

/// The CAs of a file.
pub(crate) fn roots(path: &Path) -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| {
            FileError::invalid(path, format!("holds what is no CA's certificate: {error}"))
        })?;
    }
    Ok(roots)
}

/// The CAs that this machine's system trusts.
pub(crate) fn system_roots() -> Result<RootCertStore, FileError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // What one of them has wrong is no reason to do without the others.
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let errors = found.errors.iter().map(|error| format!(": {error}"));
        let why = "the system has no CAs whose certificates could be trusted";
        return Err(FileError::Setup(
            errors.fold(why.to_owned(), |told, error| told + &error),
        ));
    }
    Ok(roots)
}

/// A token.
pub(crate) fn token(path: &Path) -> Result<String, FileError> {
    let token = read_text(path)?.trim().to_owned();
    if token.len() < TOKEN_CHARS_MIN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(FileError::invalid(
            path,
            format!(
                "holds no token: {TOKEN_CHARS_MIN} visible characters or more, as `tidemark pki token` makes them"
            ),
        ));
    }
    Ok(token)
}
