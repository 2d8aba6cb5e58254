//! Connections to the two services.

use std::time::Duration;

use tidemark_proto::{
    capture::v1::capture_client::CaptureClient, vault::v1::vault_client::VaultClient,
};
use tonic::transport::{Channel, Endpoint};

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

/// The capture service's control interface.
pub type Capture = CaptureClient<Channel>;
/// The vault service's interface for readers.
pub type Vault = VaultClient<Channel>;

impl Global {
    /// Connects to the capture service.
    ///
    /// # Errors
    /// It cannot be reached.
    pub async fn capture(&self) -> Result<Capture, Failure> {
        let channel = connect(&self.capture)
            .await
            .map_err(|error| unreachable("capture", &self.capture, &error))?;
        Ok(CaptureClient::new(channel))
    }

    /// Connects to the vault service.
    ///
    /// # Errors
    /// It cannot be reached.
    pub async fn vault(&self) -> Result<Vault, Failure> {
        let channel = connect(&self.vault)
            .await
            .map_err(|error| unreachable("vault", &self.vault, &error))?;
        Ok(VaultClient::new(channel))
    }
}

async fn connect(url: &str) -> Result<Channel, tonic::transport::Error> {
    endpoint(url)?.connect().await
}

/// How a service is connected to.
pub(crate) fn endpoint(url: &str) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(url.to_owned())?
        .connect_timeout(CONNECT_MAX)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME_BYTES);
    Ok(endpoint)
}

fn unreachable(service: &str, url: &str, error: &tonic::transport::Error) -> Failure {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    Failure::new(
        Kind::Unavailable,
        tidemark_proto::Reason::Unreachable.as_str(),
        format!("the {service} service cannot be reached at {url}: {cause}"),
        format!(
            "start it (`tidemark up` runs both), or say where it is with --{service} or TIDEMARK_{}",
            service.to_uppercase()
        ),
    )
}
