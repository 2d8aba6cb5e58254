//! Connections to a service: with TLS, or in plain text where that doesn't leave the machine.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::{
    ClientConfig, ConfigBuilder, RootCertStore, client::WantsClientCert, pki_types::ServerName,
    sign::SingleCertAndKey,
};
use tidemark_proto::{Reason, RpcError, error::TLS_REFUSED_MARK};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    expiry::{self, Ends, Validity},
    files::{self, FileError},
    gate::ALPN,
    reasons,
};

/// How long a service may take to speak first, as HTTP/2 has it do, and what is read of that.
const FIRST_MAX: Duration = Duration::from_secs(3);
const FIRST_BYTES: usize = 64;

/// A connection whose calls show who makes them.
pub type Line = InterceptedService<Channel, Bearer>;

/// Shows the token, where there is one, with each call.
#[derive(Debug, Clone, Default)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(shown) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", shown.clone());
        }
        Ok(request)
    }
}

/// What a client shows, and whom it trusts. Certificates and keys are read anew for each connection, also where one that broke
/// is made again; a token is at each [`Dialer::dial`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DialerFiles {
    /// The CAs of services. `https` takes them.
    pub ca: Option<PathBuf>,
    /// The client's certificate with its chain, and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The client's token.
    pub token: Option<PathBuf>,
}

/// Connects to services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dialer {
    /// What it shows, and whom it trusts.
    pub files: DialerFiles,
    /// Whether plain text may leave the machine.
    pub allow_plain_text: bool,
}

#[derive(Debug)]
struct Ready {
    config: Option<Arc<ClientConfig>>,
    bearer: Bearer,
}

impl Dialer {
    /// When the certificates end that it would use now. Reads their files.
    ///
    /// # Errors
    /// One can't be read, or isn't what it must be.
    pub fn ends(&self) -> Result<Ends, FileError> {
        let mut ends = Ends::default();
        if let Some(ca) = &self.files.ca {
            ends.ca = expiry::last(&files::certificates(ca)?);
        }
        if let Some((cert, _)) = &self.files.certificate {
            let validity = Validity::of(&files::certificates(cert)?);
            ends.certificate = validity.and_then(|validity| validity.end());
        }
        Ok(ends)
    }

    /// Connects to `http://HOST:PORT` or `https://HOST:PORT`; `tune` sets how the connection is used.
    ///
    /// # Errors
    /// The service can't be reached, or one side refuses the other; a file can't be used; plain text would leave the
    /// machine.
    pub async fn dial(
        &self,
        url: &str,
        tune: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Line, RpcError> {
        let uri: Uri = url.parse().map_err(|_| bad_url(url))?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad_url(url)),
        };
        if !is_tls && !self.allow_plain_text && !is_loopback(uri.host().unwrap_or_default()) {
            return Err(RpcError::new(
                Reason::PlainTextRefused,
                format!("{url} is another machine, and the connection would be plain text"),
                "use https and certificates (docs/SECURITY.md); allow_plain_text, or --allow-plain-text, sends it all the same",
            ));
        }
        let files = self.files.clone();
        let ready = tokio::task::spawn_blocking(move || ready(&files, is_tls))
            .await
            .map_err(|_| RpcError::internal("reading certificates failed"))?
            .map_err(|error| not_ready(url, &error))?;
        let channel = match ready.config {
            None => tune(Endpoint::from(uri)).connect().await?,
            Some(config) => {
                let files = self.files.clone();
                // Files that can be read once, such as pipes, are enough for one connection.
                let first = Arc::new(Mutex::new(Some(config)));
                let setup = move || match first.lock().take() {
                    Some(config) => Ok(config),
                    None => client_config(&files).map(Arc::new),
                };
                secured(uri, setup, tune).await?
            }
        };
        Ok(InterceptedService::new(channel, ready.bearer))
    }
}

/// Connects with TLS that is set up already.
pub(crate) async fn over_tls(url: &str, config: Arc<ClientConfig>) -> Result<Line, RpcError> {
    let uri: Uri = url.parse().map_err(|_| bad_url(url))?;
    let channel = secured(uri, move || Ok(Arc::clone(&config)), |endpoint| endpoint).await?;
    Ok(InterceptedService::new(channel, Bearer::default()))
}

/// A connection to a service of somebody else's, such as a collector of traces: it is made when it is first used, and
/// again whenever it has broken. Without `ca` an `https` one is verified by the CAs of the system; either are read anew for
/// each connection. To be called within a runtime, to which the connection then belongs.
///
/// # Errors
/// The URL is none: [`is_service_url`] says so beforehand.
pub fn dial_lazily(
    url: &str,
    ca: Option<&Path>,
    tune: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, RpcError> {
    let uri: Uri = url.parse().map_err(|_| bad_url(url))?;
    match uri.scheme_str() {
        Some("http") => Ok(tune(Endpoint::from(uri)).connect_lazy()),
        Some("https") => {
            let (host, ca) = (Host::of(&uri)?, ca.map(Path::to_owned));
            let connector = tower::service_fn(move |_: Uri| {
                let (host, ca) = (host.clone(), ca.clone());
                async move {
                    let config =
                        tokio::task::spawn_blocking(move || anonymous_config(ca.as_deref()))
                            .await?
                            .map_err(io::Error::other)?;
                    host.connect(Arc::new(config)).await.map(TokioIo::new)
                }
            });
            Ok(tune(Endpoint::from(uri)).connect_with_connector_lazy(connector))
        }
        _ => Err(bad_url(url)),
    }
}

/// `setup` is asked for each connection: a channel makes one again by itself where the last one broke.
async fn secured(
    uri: Uri,
    setup: impl Fn() -> Result<Arc<ClientConfig>, FileError> + Clone + Send + Sync + 'static,
    tune: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, RpcError> {
    let host = Host::of(&uri)?;
    let endpoint = tune(Endpoint::from(uri));
    let connector = tower::service_fn(move |_: Uri| {
        let (setup, host) = (setup.clone(), host.clone());
        async move {
            let config = tokio::task::spawn_blocking(setup)
                .await?
                .map_err(|error| io::Error::other(format!("{TLS_REFUSED_MARK}{error}")))?;
            Wire::open(host.connect(config).await?)
                .await
                .map(TokioIo::new)
        }
    });
    Ok(endpoint.connect_with_connector(connector).await?)
}

/// Whom a connection with TLS leads to.
#[derive(Debug, Clone)]
struct Host {
    address: (String, u16),
    name: ServerName<'static>,
}

impl Host {
    fn of(uri: &Uri) -> Result<Self, RpcError> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| RpcError::invalid(format!("{host:?} is no name of a host")))?;
        Ok(Self {
            address: (host.to_owned(), uri.port_u16().unwrap_or(443)),
            name,
        })
    }

    async fn connect(self, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let connected = TlsConnector::from(config).connect(self.name, stream).await;
        connected.map_err(marked)
    }
}

fn ready(files: &DialerFiles, is_tls: bool) -> Result<Ready, FileError> {
    let token = files.token.as_deref().map(files::token).transpose()?;
    let bearer = match token {
        None => Bearer(None),
        Some(token) => {
            let mut shown: MetadataValue<Ascii> = format!("Bearer {token}")
                .parse()
                .map_err(|_| FileError::Setup("the token is no text of a header".to_owned()))?;
            shown.set_sensitive(true);
            Bearer(Some(shown))
        }
    };
    let config = if is_tls {
        Some(Arc::new(client_config(files)?))
    } else {
        None
    };
    Ok(Ready { config, bearer })
}

fn client_config(files: &DialerFiles) -> Result<ClientConfig, FileError> {
    let Some(ca) = &files.ca else {
        return Err(FileError::Setup(
            "no CA is named whose certificates are trusted".to_owned(),
        ));
    };
    let builder = trusting(files::roots(ca)?)?;
    let mut config = match &files.certificate {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let certified = files::certified(cert, key)?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Of a client that shows nothing, and trusts these CAs, or those of the system.
fn anonymous_config(ca: Option<&Path>) -> Result<ClientConfig, FileError> {
    let roots = match ca {
        Some(path) => files::roots(path)?,
        None => files::system_roots()?,
    };
    let mut config = trusting(roots)?.with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn trusting(
    roots: RootCertStore,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, FileError> {
    let builder = ClientConfig::builder_with_provider(files::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| FileError::Setup(error.to_string()))?;
    Ok(builder.with_root_certificates(roots))
}

/// Whether a URL is the address of a service, whoever's.
#[must_use]
pub fn is_service_url(url: &str) -> bool {
    url.parse::<Uri>().is_ok_and(|uri| match uri.scheme_str() {
        Some("http") => true,
        Some("https") => Host::of(&uri).is_ok(),
        _ => false,
    })
}

/// Whether a URL leads to this machine itself.
#[must_use]
pub fn is_loopback_url(url: &str) -> bool {
    url.parse::<Uri>()
        .is_ok_and(|uri| is_loopback(uri.host().unwrap_or_default()))
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

fn bad_url(url: &str) -> RpcError {
    RpcError::new(
        Reason::RequestInvalid,
        format!("{url:?} is no address of a service"),
        "write https://HOST:PORT, or http://HOST:PORT for plain text",
    )
}

fn not_ready(url: &str, error: &FileError) -> RpcError {
    RpcError::new(
        Reason::TlsRefused,
        format!("no connection to {url} can be made: {error}"),
        "name files that can be read: docs/SECURITY.md says which",
    )
}

/// The error of a connection, with the reason in words where TLS has failed.
fn marked(error: io::Error) -> io::Error {
    match reasons::told(&error) {
        Some(reason) => io::Error::other(format!("{TLS_REFUSED_MARK}{reason}")),
        None => error,
    }
}

/// A connection with TLS whose errors say what the other side has against it.
#[derive(Debug)]
struct Wire {
    stream: TlsStream<TcpStream>,
    /// What the service has said first, as far as it has not been read.
    first: Vec<u8>,
}

impl Wire {
    /// Waits until the service speaks: TLS 1.3 ends for a client before the service has looked at its certificate, and
    /// what fails later is no more than a connection that broke. One that says nothing is taken as it is.
    async fn open(mut stream: TlsStream<TcpStream>) -> io::Result<Self> {
        let mut first = vec![0; FIRST_BYTES];
        let said = match timeout(FIRST_MAX, stream.read(&mut first)).await {
            Ok(said) => said.map_err(marked)?,
            Err(_) => 0,
        };
        first.truncate(said);
        Ok(Self { stream, first })
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.first.is_empty() {
            let fits = buf.remaining().min(self.first.len());
            buf.put_slice(&self.first[..fits]);
            self.first.drain(..fits);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream)
            .poll_read(cx, buf)
            .map_err(marked)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream)
            .poll_write(cx, buf)
            .map_err(marked)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream)
            .poll_write_vectored(cx, bufs)
            .map_err(marked)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx).map_err(marked)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx).map_err(marked)
    }
}
