//! Who gets in: the service's certificate, the CAs of its clients, the identities, and their change without a restart.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::SingleCertAndKey,
};
use tidemark_identity::{Caller, Identities};
use tidemark_proto::{Reason, RpcError};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    expiry::{self, Ends, OwnCertificate, Purpose, Validity},
    files::{self, FileError},
    limit::LogLimit,
    peer::Peer,
    reasons,
};

/// HTTP/2, and nothing else, is spoken behind TLS.
pub(crate) const ALPN: &[u8] = b"h2";

/// What a gate is made of. All are read again when they change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GateFiles {
    /// The service's certificate with its chain, and its key. Without them the service speaks plain text.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The CAs of the clients' certificates. Without them clients can only show tokens.
    pub ca: Option<PathBuf>,
    /// The file of identities. Without it nobody is asked who they are.
    pub identities: Option<PathBuf>,
}

impl GateFiles {
    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        let pair = self.certificate.iter().flat_map(|(cert, key)| [cert, key]);
        pair.chain(&self.ca).chain(&self.identities)
    }
}

/// What tells that a file has changed: device, inode, length, times of its content and of its inode.
type Print = Option<(u64, u64, u64, i64, i64, i64, i64)>;

#[derive(Debug)]
struct State {
    acceptor: Option<Arc<ServerConfig>>,
    certificate: Option<OwnCertificate>,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    identities: Option<Identities>,
    /// When the last of the CAs ends.
    ca_end: Option<i64>,
}

/// What became of reading the files again.
#[derive(Debug)]
pub enum Reloaded {
    /// No file has changed.
    Unchanged,
    /// What they say now holds.
    Done,
    /// What they said before still holds.
    Failed(FileError),
}

/// Who gets in.
#[derive(Debug)]
pub struct Gate {
    files: GateFiles,
    state: RwLock<Arc<State>>,
    seen: Mutex<Vec<Print>>,
    pub(crate) refusals: LogLimit,
}

impl Gate {
    /// Reads the files.
    ///
    /// # Errors
    /// One can't be read, or isn't what it must be.
    pub fn open(files: GateFiles) -> Result<Arc<Self>, FileError> {
        let seen = prints(&files);
        let state = load(&files)?;
        Ok(Arc::new(Self {
            files,
            state: RwLock::new(Arc::new(state)),
            seen: Mutex::new(seen),
            refusals: LogLimit::default(),
        }))
    }

    /// Whether nobody is asked who they are.
    #[must_use]
    pub fn asks_nobody(&self) -> bool {
        self.files.identities.is_none()
    }

    /// How connections begin now; none where they are plain text.
    #[must_use]
    pub fn acceptor(&self) -> Option<TlsAcceptor> {
        let config = self.state.read().acceptor.clone();
        config.map(TlsAcceptor::from)
    }

    /// When the certificates end that are in use now.
    #[must_use]
    pub fn ends(&self) -> Ends {
        let state = self.state.read();
        let certificate = state.certificate.as_ref();
        Ends {
            certificate: certificate.and_then(|own| own.validity.end()),
            ca: state.ca_end,
        }
    }

    /// The certificate that is shown now; none where connections are plain text.
    #[must_use]
    pub fn certificate(&self) -> Option<OwnCertificate> {
        self.state.read().certificate.clone()
    }

    /// Reads the files again where one has changed, or with `always` in any case.
    pub fn reload(&self, always: bool) -> Reloaded {
        // Held to the end, so that of two the later one has the last word.
        let mut seen = self.seen.lock();
        let now = prints(&self.files);
        if *seen == now && !always {
            return Reloaded::Unchanged;
        }
        // What doesn't fit is not looked at again until it changes.
        *seen = now;
        match load(&self.files) {
            Ok(state) => {
                *self.state.write() = Arc::new(state);
                tracing::info!("certificates and identities are read again");
                Reloaded::Done
            }
            Err(error) => {
                tracing::error!(%error, "what has changed can't be used: what was read before still holds");
                Reloaded::Failed(error)
            }
        }
    }

    /// Reads the files again whenever they have changed.
    pub async fn watch(self: Arc<Self>, period: Duration, mut stop: watch::Receiver<bool>) {
        if self.files.all().next().is_none() {
            return;
        }
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                _ = ticks.tick() => {}
            }
            let gate = Arc::clone(&self);
            // It logs by itself what became of it.
            let _ = tokio::task::spawn_blocking(move || gate.reload(false)).await;
        }
    }

    /// Who somebody is, by the token that a call shows, else by the certificate of its connection. That is verified
    /// again for each call, so that neither a certificate that has expired since, nor one of a CA that is no longer
    /// trusted, lives on in a connection.
    ///
    /// # Errors
    /// Nobody that is known here.
    pub fn identify(&self, peer: &Peer, token: Option<&str>) -> Result<Caller, RpcError> {
        let state = Arc::clone(&self.state.read());
        let Some(identities) = &state.identities else {
            return Ok(Caller::Local);
        };
        if let Some(token) = token {
            let identity = identities.with_token(token).ok_or_else(|| {
                unauthenticated("the token is none that this service knows", TOKEN_ACTION)
            })?;
            return Ok(Caller::Known(Arc::clone(identity)));
        }
        let (Some((own, chain)), Some(verifier)) =
            (peer.certificates().split_first(), &state.verifier)
        else {
            return Err(unauthenticated(
                "the caller shows neither a certificate nor a token",
                "give the client a certificate (`tidemark pki issue`) or a token (`tidemark pki token`)",
            ));
        };
        verify(verifier.as_ref(), own, chain)?;
        let name = name_of(own)?;
        let identity = identities.named(&name).ok_or_else(|| {
            unauthenticated(
                format!("nobody here is called {name:?}, as the certificate has it"),
                "add this name to the service's file of identities",
            )
        })?;
        Ok(Caller::Known(Arc::clone(identity)))
    }

    /// Logs that somebody was refused.
    pub fn log_refusal(&self, peer: &Peer, reason: &str) {
        if let Some(left_out) = self.refusals.take(Instant::now()) {
            tracing::warn!(peer = %peer.address(), reason, left_out, "a client is refused");
        }
    }
}

const TOKEN_ACTION: &str =
    "show the token as it was made; the service's file of identities has the SHA-256 of it";

fn unauthenticated(message: impl Into<String>, action: &str) -> RpcError {
    RpcError::new(Reason::Unauthenticated, message, action)
}

fn verify(
    verifier: &dyn ClientCertVerifier,
    own: &CertificateDer<'_>,
    chain: &[CertificateDer<'_>],
) -> Result<ClientCertVerified, RpcError> {
    verifier
        .verify_client_cert(own, chain, UnixTime::now())
        .map_err(|error| {
            let why = reasons::told(&error).unwrap_or_else(|| error.to_string());
            unauthenticated(
                why,
                "give the client a new certificate (`tidemark pki issue`)",
            )
        })
}

/// The name that a certificate is for: its first URI, else its first DNS name.
fn name_of(certificate: &CertificateDer<'_>) -> Result<String, RpcError> {
    let parsed = webpki::EndEntityCert::try_from(certificate)
        .map_err(|error| unauthenticated(format!("the certificate can't be read: {error}"), ""))?;
    let name = parsed.valid_uri_names().next();
    name.or_else(|| parsed.valid_dns_names().next())
        .map(ToOwned::to_owned)
        .ok_or_else(|| {
            unauthenticated(
                "the certificate has no name: neither a URI nor a DNS name",
                "give it a subject alternative name; a common name is not looked at",
            )
        })
}

fn prints(files: &GateFiles) -> Vec<Print> {
    let print = |path: &PathBuf| {
        let meta = fs::metadata(path).ok()?;
        Some((
            meta.dev(),
            meta.ino(),
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        ))
    };
    files.all().map(print).collect()
}

fn load(files: &GateFiles) -> Result<State, FileError> {
    let identities = match &files.identities {
        None => None,
        Some(path) => {
            let text = files::read_text(path)?;
            let read = Identities::parse(&text)
                .map_err(|error| FileError::invalid(path, error.to_string()))?;
            Some(read)
        }
    };
    let mut ca_end = None;
    let verifier = match &files.ca {
        None => None,
        Some(path) => {
            ca_end = expiry::last(&files::certificates(path)?);
            Some(client_verifier(path)?)
        }
    };
    let (acceptor, certificate) = match &files.certificate {
        None => (None, None),
        Some((cert, key)) => {
            let certified = files::certified(cert, key)?;
            let own = Validity::of(&certified.cert).map(|validity| OwnCertificate {
                file: cert.clone(),
                purpose: Purpose::Listening,
                validity,
            });
            let builder = ServerConfig::builder_with_provider(files::provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(|error| FileError::Setup(error.to_string()))?;
            let builder = match &verifier {
                Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
                None => builder.with_no_client_auth(),
            };
            let mut config =
                builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
            config.alpn_protocols = vec![ALPN.to_vec()];
            (Some(Arc::new(config)), own)
        }
    };
    Ok(State {
        acceptor,
        certificate,
        verifier,
        identities,
        ca_end,
    })
}

/// Whoever shows a certificate must show a good one; whoever shows none may still show a token.
fn client_verifier(path: &Path) -> Result<Arc<dyn ClientCertVerifier>, FileError> {
    let roots = Arc::new(files::roots(path)?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, files::provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| FileError::invalid(path, error.to_string()))?;
    Ok(verifier)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};
    use tempfile::TempDir;

    use super::*;

    struct Files(TempDir);

    impl Files {
        fn new() -> Self {
            let files = Self(tempfile::tempdir().unwrap());
            files.pair("own");
            files.write("identities", "");
            files
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.path(name), text).unwrap();
        }

        fn pair(&self, name: &str) {
            let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
            self.write(&format!("{name}.crt"), &made.cert.pem());
            self.write(&format!("{name}.key"), &made.signing_key.serialize_pem());
        }

        fn gate(&self) -> GateFiles {
            GateFiles {
                certificate: Some((self.path("own.crt"), self.path("own.key"))),
                ca: Some(self.path("own.crt")),
                identities: Some(self.path("identities")),
            }
        }
    }

    #[test]
    fn a_file_that_is_not_what_it_must_be_is_named_with_what_it_must_be() {
        let files = Files::new();
        files.pair("other");
        files.write("empty", "");
        files.write(
            "nobody",
            "[[identity]]\nname = 'a'\nroles = []\nvolumes = ['*']\n",
        );
        Gate::open(files.gate()).unwrap();
        let own = |name: &str| files.path(name);
        let with = |change: &dyn Fn(&mut GateFiles)| {
            let mut changed = files.gate();
            change(&mut changed);
            Gate::open(changed).unwrap_err().to_string()
        };
        let cases: [(String, &str, &str); 6] = [
            (
                with(&|f| f.certificate = Some((own("missing"), own("own.key")))),
                "missing",
                "No such file",
            ),
            (
                with(&|f| f.certificate = Some((own("empty"), own("own.key")))),
                "empty",
                "no certificate in PEM",
            ),
            (
                with(&|f| f.certificate = Some((own("own.crt"), own("own.crt")))),
                "own.crt",
                "no private key in PEM",
            ),
            (
                with(&|f| f.certificate = Some((own("own.crt"), own("other.key")))),
                "other.key",
                "isn't the key of the certificate",
            ),
            (
                with(&|f| f.ca = Some(own("own.key"))),
                "own.key",
                "no certificate in PEM",
            ),
            (
                with(&|f| f.identities = Some(own("nobody"))),
                "nobody",
                "no roles",
            ),
        ];
        for (error, file, what) in cases {
            assert!(error.contains(file) && error.contains(what), "{error}");
        }
    }

    #[test]
    fn what_kubernetes_swaps_all_at_once_is_read_again() {
        let files = Files::new();
        for version in ["1", "2"] {
            fs::create_dir(files.path(version)).unwrap();
            files.pair(&format!("{version}/own"));
            files.write(&format!("{version}/identities"), "");
        }
        // As it mounts Secrets and ConfigMaps: links to what is in a folder, and a link to that, which is replaced.
        let link = |to: &str, name: &str| {
            std::os::unix::fs::symlink(to, files.path("new")).unwrap();
            fs::rename(files.path("new"), files.path(name)).unwrap();
        };
        link("1", "..data");
        for name in ["own.crt", "own.key", "identities"] {
            link(&format!("..data/{name}"), name);
        }
        let gate = Gate::open(files.gate()).unwrap();
        assert!(matches!(gate.reload(false), Reloaded::Unchanged));
        link("2", "..data");
        assert!(matches!(gate.reload(false), Reloaded::Done));
        assert!(matches!(gate.reload(false), Reloaded::Unchanged));
    }

    #[test]
    fn who_shows_a_certificate_is_somebody_only_where_its_ca_is_trusted() {
        let files = Files::new();
        files.pair("other");
        files.write(
            "identities",
            "[[identity]]\nname = 'own'\nroles = ['viewer']\nvolumes = ['*']\n",
        );
        let gate = Gate::open(files.gate()).unwrap();
        let shows = |name: &str| {
            let peer = Peer::new(None);
            peer.showed(&files::certificates(&files.path(name)).unwrap());
            gate.identify(&peer, None)
        };
        assert_eq!(shows("own.crt").unwrap().name(), "own");
        // It is called the same, and somebody else has made it.
        files.pair("own");
        let error = shows("own.crt").unwrap_err();
        assert_eq!(error.reason, Reason::Unauthenticated);
        assert!(gate.identify(&Peer::new(None), None).is_err());
    }

    #[test]
    fn what_changes_is_read_once_and_what_cannot_be_used_changes_nothing() {
        let files = Files::new();
        let gate = Gate::open(files.gate()).unwrap();
        let now = || Arc::as_ptr(&gate.state.read());
        let first = now();
        assert!(matches!(gate.reload(false), Reloaded::Unchanged));
        files.write("identities", "[[identity]]");
        assert!(matches!(gate.reload(false), Reloaded::Failed(_)));
        // It is said once.
        assert!(matches!(gate.reload(false), Reloaded::Unchanged));
        assert!(matches!(gate.reload(true), Reloaded::Failed(_)));
        assert_eq!(now(), first);
        files.write("identities", "");
        assert!(matches!(gate.reload(false), Reloaded::Done));
        assert_ne!(now(), first);
        assert!(matches!(gate.reload(true), Reloaded::Done));
        fs::remove_file(files.path("own.key")).unwrap();
        assert!(matches!(gate.reload(false), Reloaded::Failed(_)));
    }

    fn named(names: Vec<SanType>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_is_called_by_its_uri_else_by_its_first_dns_name() {
        let uri = SanType::URI("spiffe://site/edge-7".try_into().unwrap());
        let (first, second) = (
            SanType::DnsName("edge-7".try_into().unwrap()),
            SanType::DnsName("edge-7.example.com".try_into().unwrap()),
        );
        let both = named(vec![first.clone(), uri]);
        assert_eq!(name_of(&both).unwrap(), "spiffe://site/edge-7");
        assert_eq!(name_of(&named(vec![first, second])).unwrap(), "edge-7");
        let address = SanType::IpAddress([127, 0, 0, 1].into());
        for nameless in [named(vec![]), named(vec![address]), vec![1, 2, 3].into()] {
            let error = name_of(&nameless).unwrap_err();
            assert_eq!(error.reason, Reason::Unauthenticated);
        }
    }
}
