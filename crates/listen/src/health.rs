//! Whether a service serves, as it says itself by the gRPC health protocol: what probes and the order of starts hang on.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use thiserror::Error;
use tidemark_proto::RpcError;
use tidemark_tls::{Dialer, Line, dial_own};
use tokio::time::timeout;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// Why a service can't be said to serve.
#[derive(Debug, Error)]
pub enum Unhealthy {
    /// It was told to take any free port, and which one it took nobody else knows.
    #[error("it listens on any free port ({listen}): give listen a port that can be asked")]
    PortUnknown {
        /// As it is configured.
        listen: SocketAddr,
    },
    /// Nothing answers there.
    #[error("it can't be reached: {cause}")]
    Unreachable {
        /// What the system said.
        cause: String,
    },
    /// It accepts connections and says nothing: it is starting, or stuck.
    #[error("it has not answered within {patience:?}: it is starting, or stuck")]
    Silent {
        /// How long was waited.
        patience: Duration,
    },
    /// It answers, and does not serve: it is stopping.
    #[error("it answers, but does not serve: it is stopping")]
    NotServing,
    /// Something else listens there, or a release that is too old.
    #[error("what listens there does not tell its health: {cause}")]
    Foreign {
        /// What it answered.
        cause: String,
    },
}

/// Asks for the health of the whole service at `http://HOST:PORT` or `https://HOST:PORT`; all of it takes at most
/// `patience`.
///
/// # Errors
/// Whatever keeps it from being said to serve.
pub async fn check(dialer: &Dialer, url: &str, patience: Duration) -> Result<(), Unhealthy> {
    within(patience, dialer.dial(url, |endpoint| endpoint)).await
}

/// Asks the service that listens on `listen` of this machine, and says where it was asked. Its certificate is not looked at
/// ([`dial_own`]): what is wrong with that, clients are told.
///
/// # Errors
/// As [`check`], and where the port is not known.
pub async fn check_local(
    listen: SocketAddr,
    is_tls: bool,
    patience: Duration,
) -> Result<SocketAddr, Unhealthy> {
    let address = reached_at(listen)?;
    within(patience, dial_own(address, is_tls)).await?;
    Ok(address)
}

async fn within(
    patience: Duration,
    dialed: impl Future<Output = Result<Line, RpcError>>,
) -> Result<(), Unhealthy> {
    timeout(patience, async {
        let line = dialed.await.map_err(|error| Unhealthy::Unreachable {
            cause: error.message,
        })?;
        ask(line).await
    })
    .await
    .unwrap_or(Err(Unhealthy::Silent { patience }))
}

/// Where a service that listens on `listen` is reached on its own machine.
fn reached_at(listen: SocketAddr) -> Result<SocketAddr, Unhealthy> {
    if listen.port() == 0 {
        return Err(Unhealthy::PortUnknown { listen });
    }
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    Ok(SocketAddr::new(ip, listen.port()))
}

async fn ask(line: Line) -> Result<(), Unhealthy> {
    // The empty name is the whole service.
    let request = HealthCheckRequest::default();
    let answer = HealthClient::new(line)
        .check(request)
        .await
        .map_err(|status| Unhealthy::Foreign {
            cause: format!("{:?}: {}", status.code(), status.message()),
        })?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        _ => Err(Unhealthy::NotServing),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
    };
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::transport::Server;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const ANY: &str = "127.0.0.1:0";

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind(ANY).await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    #[test]
    fn a_service_on_every_address_is_asked_on_the_loopback_and_any_other_where_it_listens() {
        for (listen, asked) in [
            ("0.0.0.0:7402", "127.0.0.1:7402"),
            ("[::]:7402", "[::1]:7402"),
            ("127.0.0.1:7401", "127.0.0.1:7401"),
            ("192.0.2.7:7401", "192.0.2.7:7401"),
        ] {
            let reached = reached_at(listen.parse().unwrap()).unwrap();
            assert_eq!(reached, asked.parse().unwrap(), "{listen}");
        }
        let error = reached_at(ANY.parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("any free port"), "{error}");
    }

    #[tokio::test]
    async fn a_service_serves_until_it_says_that_it_does_not() {
        let (listener, addr) = listener().await;
        let (reporter, service) = tonic_health::server::health_reporter();
        let server = Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        assert_eq!(check_local(addr, false, LONG).await.unwrap(), addr);
        let status = tonic_health::ServingStatus::NotServing;
        reporter.set_service_status("", status).await;
        let error = check_local(addr, false, LONG).await.unwrap_err();
        assert!(matches!(error, Unhealthy::NotServing), "{error}");
    }

    #[tokio::test]
    async fn a_service_that_has_not_begun_to_serve_is_silent_and_one_that_is_gone_unreachable() {
        let (listener, addr) = listener().await;
        let patience = Duration::from_millis(50);
        let error = check_local(addr, false, patience).await.unwrap_err();
        assert!(matches!(error, Unhealthy::Silent { .. }), "{error}");
        drop(listener);
        let error = check_local(addr, false, LONG).await.unwrap_err();
        assert!(matches!(error, Unhealthy::Unreachable { .. }), "{error}");
    }

    #[tokio::test]
    async fn what_speaks_another_protocol_is_not_taken_for_the_service() {
        let (listener, addr) = listener().await;
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let client: &mut TcpStream = &mut client;
                let _ = client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            }
        });
        let error = check_local(addr, false, LONG).await.unwrap_err();
        let told = matches!(
            error,
            Unhealthy::Foreign { .. } | Unhealthy::Unreachable { .. }
        );
        assert!(told, "{error}");
    }
}
