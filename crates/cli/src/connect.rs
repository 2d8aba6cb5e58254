//! Connections to the two services.

use std::time::Duration;

use tidemark_proto::{
    Reason, RpcError, capture::v1::capture_client::CaptureClient,
    vault::v1::vault_client::VaultClient,
};
use tidemark_telemetry::{Origin, Propagating};
use tidemark_tls::{Dialer, DialerFiles, Line, is_loopback_url};
use tonic::transport::Endpoint;

use crate::{
    args::Global,
    failure::{Failure, Kind},
};

const CONNECT_MAX: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(10);
/// A restore keeps this much on its way, so that a long link is filled too.
const WINDOW: u32 = 64 << 20;
/// HTTP/2 frames: a batch of an image is one of them, not sixty.
const FRAME_BYTES: u32 = 1 << 20;

/// A connection whose calls belong to the trace that the environment names, where it names one.
type Traced = Propagating<Line>;

/// The capture service's control interface.
pub type Capture = CaptureClient<Traced>;
/// The vault service's interface for readers.
pub type Vault = VaultClient<Traced>;

impl Global {
    /// Connects to the capture service.
    ///
    /// # Errors
    /// It cannot be reached, or one side refuses the other.
    pub async fn capture(&self) -> Result<Capture, Failure> {
        let line = self.dial("capture", &self.capture).await?;
        Ok(CaptureClient::new(line))
    }

    /// Connects to the vault service.
    ///
    /// # Errors
    /// It cannot be reached, or one side refuses the other.
    pub async fn vault(&self) -> Result<Vault, Failure> {
        let line = self.dial("vault", &self.vault).await?;
        Ok(VaultClient::new(line))
    }

    /// What is shown to services, and whom is trusted.
    pub(crate) fn dialer(&self) -> Dialer {
        Dialer {
            files: DialerFiles {
                ca: self.tls_ca.clone(),
                certificate: self.tls_cert.clone().zip(self.tls_key.clone()),
                token: self.token_file.clone(),
            },
            allow_plain_text: self.allow_plain_text,
        }
    }

    async fn dial(&self, service: &str, url: &str) -> Result<Traced, Failure> {
        if self.allow_plain_text
            && url.starts_with("http://")
            && !is_loopback_url(url)
            && !self.json
        {
            eprintln!("warning: {url} is another machine, and is spoken to in plain text");
        }
        let line = self.dialer().dial(url, tuned).await;
        let line = line.map_err(|error| failed(service, url, error))?;
        Ok(Propagating::from(Origin::of_environment(), line))
    }
}

/// How a connection to a service is used.
pub(crate) fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_MAX)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME_BYTES)
}

fn failed(service: &str, url: &str, error: RpcError) -> Failure {
    if error.reason != Reason::Unreachable {
        return RpcError {
            message: format!("the {service} service at {url}: {}", error.message),
            ..error
        }
        .into();
    }
    let cause = error.message.trim_start_matches(UNREACHABLE);
    Failure::new(
        Kind::Unavailable,
        Reason::Unreachable.as_str(),
        format!("the {service} service cannot be reached at {url}: {cause}"),
        format!(
            "start it (`tidemark up` runs both), or say where it is with --{service} or TIDEMARK_{}",
            service.to_uppercase()
        ),
    )
}

/// What the message of an error of a connection begins with, and need not be said twice.
const UNREACHABLE: &str = "the peer can't be reached: ";
