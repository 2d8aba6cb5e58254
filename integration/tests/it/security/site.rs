//! A site with a CA of its own, and both services behind TLS.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use capture_svc::config::{NbdListen, NbdListens, Span};
use jiff::Timestamp;
use rcgen::KeyPair;
use tempfile::TempDir;
use tidemark_cli::pki::{Authority, Subject, VALID_DEFAULT};
use tidemark_identity::{Identities, Identity, Role, token::TokenHash};
use tidemark_proto::RpcError;
use tidemark_tls::{Dialer, DialerFiles, Line};
use tokio_stream::StreamExt;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// Longer than anything that a test waits for may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A name, its roles and its volumes.
pub(crate) type Who<'a> = (&'a str, &'a [Role], &'a [&'a str]);

pub(crate) struct Site {
    dir: TempDir,
    authority: Authority,
}

/// A certificate and its key.
pub(crate) type Pair = (PathBuf, PathBuf);

impl Site {
    /// A CA, and a certificate of the services.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new().unwrap();
        let site = Self { dir, authority };
        let ca = site.authority.certificate(Timestamp::now()).unwrap();
        std::fs::write(site.path("ca.crt"), ca.certificate).unwrap();
        site.certificate("service", &["localhost", "127.0.0.1"]);
        site.knows(&[]);
        site
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// A certificate of `name`, which is a service's where it has hosts.
    pub(crate) fn certificate(&self, name: &str, hosts: &[&str]) -> Pair {
        self.certificate_of(name, hosts, Timestamp::now())
    }

    /// As [`Self::certificate`], made at another time.
    pub(crate) fn certificate_of(&self, name: &str, hosts: &[&str], made: Timestamp) -> Pair {
        let subject = Subject {
            name: name.to_owned(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            valid: VALID_DEFAULT,
        };
        let key = KeyPair::generate().unwrap();
        let issued = self.authority.issue(&subject, &key, made).unwrap();
        let pair = (
            self.path(&format!("{name}.crt")),
            self.path(&format!("{name}.key")),
        );
        std::fs::write(&pair.0, issued.certificate).unwrap();
        std::fs::write(&pair.1, key.serialize_pem()).unwrap();
        pair
    }

    /// Writes the file of identities anew.
    pub(crate) fn knows(&self, all: &[Who<'_>]) {
        let mut identities = Identities::default();
        for who in all {
            identities.put(identity(who)).unwrap();
        }
        std::fs::write(self.path("identities.toml"), identities.to_toml()).unwrap();
    }

    /// As [`Self::knows`], each with a token too, which is [`token`]'s.
    pub(crate) fn knows_tokens_of(&self, all: &[Who<'_>]) {
        let mut identities = Identities::default();
        for who in all {
            let mut identity = identity(who);
            identity.token_sha256 = Some(TokenHash::of(&token(who.0)));
            identities.put(identity).unwrap();
        }
        std::fs::write(self.path("identities.toml"), identities.to_toml()).unwrap();
    }

    pub(crate) fn vault_config(&self) -> vault_svc::Config {
        vault_svc::Config {
            listen: ([127, 0, 0, 1], 0).into(),
            tls_cert: self.path("service.crt"),
            tls_key: self.path("service.key"),
            tls_ca: self.ca(),
            identities: self.path("identities.toml"),
            store_dir: self.path("store"),
            state_dir: self.path("vault"),
            reserve_bytes: vault_svc::config::ByteSize::mib(0),
            ..vault_svc::Config::default()
        }
    }

    pub(crate) async fn vault(&self) -> vault_svc::Running {
        vault_svc::start(self.vault_config()).await.unwrap()
    }

    /// A capture service that is called `name`, and shows the certificate of that name.
    pub(crate) fn capture_config(&self, vault: &str, name: &str) -> capture_svc::Config {
        let dir = self.path(&format!("capture-{name}"));
        std::fs::create_dir_all(&dir).unwrap();
        capture_svc::Config {
            listen: ([127, 0, 0, 1], 0).into(),
            tls_cert: self.path("service.crt"),
            tls_key: self.path("service.key"),
            tls_ca: self.ca(),
            identities: self.path("identities.toml"),
            nbd: NbdListens(vec![NbdListen::Unix(dir.join("nbd.sock"))]),
            state: dir.join("state"),
            vault: vault.to_owned(),
            vault_cert: self.path(&format!("{name}.crt")),
            vault_key: self.path(&format!("{name}.key")),
            source_name: name.to_owned(),
            lull_wait_max: Span::from_secs(0),
            backoff_min: Span::from_millis(20),
            backoff_max: Span::from_millis(200),
            scrub_period: Span::from_secs(0),
            ..capture_svc::Config::default()
        }
    }

    /// How `name` connects, with its certificate.
    pub(crate) fn dialer(&self, name: &str) -> Dialer {
        self.dialer_with(Some((
            self.path(&format!("{name}.crt")),
            self.path(&format!("{name}.key")),
        )))
    }

    pub(crate) fn dialer_with(&self, certificate: Option<Pair>) -> Dialer {
        Dialer {
            files: DialerFiles {
                ca: Some(self.ca()),
                certificate,
                token: None,
            },
            allow_plain_text: false,
        }
    }

    /// How `name` connects, with its token.
    pub(crate) fn dialer_with_token(&self, name: &str) -> Dialer {
        let path = self.path(&format!("{name}.token"));
        std::fs::write(&path, token(name)).unwrap();
        let mut dialer = self.dialer_with(None);
        dialer.files.token = Some(path);
        dialer
    }
}

fn identity((name, roles, volumes): &Who<'_>) -> Identity {
    let volumes = volumes.iter().map(|v| v.parse().unwrap()).collect();
    Identity::new(*name, roles, volumes)
}

/// A token that is nobody else's.
pub(crate) fn token(name: &str) -> String {
    format!("the-token-of-{name}-{}", "x".repeat(32))
}

pub(crate) fn url_of(vault: &vault_svc::Running) -> String {
    format!("https://{}", vault.listen_addr)
}

pub(crate) async fn dial(dialer: &Dialer, url: &str) -> Result<Line, RpcError> {
    dialer.dial(url, |endpoint| endpoint).await
}

/// A file of a small volume.
pub(crate) fn volume_file(dir: &Path, name: &str) -> String {
    dir.join(format!("{name}.img")).display().to_string()
}

/// Waits until `check` gives something.
pub(crate) async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "waited in vain: {what}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Makes a call of any service with one message, and gives the first answer or the error.
pub(crate) async fn call(
    line: &Line,
    path: &str,
    message: Bytes,
) -> Result<Option<Bytes>, RpcError> {
    let mut grpc = Grpc::new(line.clone());
    grpc.ready().await.map_err(RpcError::from)?;
    let once = tokio_stream::iter([message]);
    let path = path.parse().unwrap();
    let answers = grpc.streaming(Request::new(once), path, Raw).await;
    let mut answers = answers.map_err(RpcError::from)?.into_inner();
    let first = tokio::time::timeout(PATIENCE, answers.next()).await;
    match first.expect("an answer in time") {
        Some(Ok(answer)) => Ok(Some(answer)),
        Some(Err(status)) => Err(status.into()),
        None => Ok(None),
    }
}

/// Messages as they are on the wire.
#[derive(Debug, Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
