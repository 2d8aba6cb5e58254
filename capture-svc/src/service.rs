//! One capture service, from its configuration to its shutdown.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use tidemark_listen::{GREETING_MAX, Incoming};
use tidemark_proto::{
    FILE_DESCRIPTOR_SET,
    capture::v1::{capture_server::CaptureServer, coherence_server::CoherenceServer},
};
use tidemark_telemetry::{
    CallLayer, RequestLayer,
    metrics::{CallCounts, Outlets, Process},
};
use tidemark_tls::{Gate, OwnCertificates, Reloaded, ShieldLayer, is_loopback_url};
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};
use tonic::transport::Server;
use tonic_health::ServingStatus;

use crate::{
    config::{Config, NbdListen, Settings},
    front::FrontEnds,
    metrics::{DialerEnds, Sources},
    registry::Registry,
    rpc::CaptureService,
    uplink::stopped,
};

/// A service that is up: everything it listens on answers.
#[derive(Debug)]
pub struct Running {
    control_addr: SocketAddr,
    nbd: Vec<NbdListen>,
    metrics_addr: Option<SocketAddr>,
    gate: Arc<Gate>,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<()>>,
}

/// How long [`Running::shutdown`] waits for work under way.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(10);
/// How long calls and requests under way have of it, each.
const GRACE: Duration = Duration::from_secs(2);
const WINDOW: u32 = 4 << 20;
const FRAME: u32 = 1 << 20;
const MESSAGE_LEN_MAX: usize = 4 << 20;
/// The most bytes of a call's headers.
const HEADER_BYTES_MAX: u32 = 16 << 10;
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_MAX: Duration = Duration::from_secs(20);

/// Starts a service and returns once it listens. A volume that can't be served doesn't stop it: it is listed with
/// its problem, and tried again.
///
/// # Errors
/// Where the configuration is not valid, the state directory is not usable or owned by another service, or an
/// address can't be bound.
pub async fn start(mut config: Config) -> Result<Running> {
    config.validate()?;
    if config.source_name.is_empty() {
        config.source_name = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
    }
    let config = Arc::new(config);
    // Before anything else: a second service on the same address must not disturb the first one's volumes.
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {}", config.listen))?;
    let control_addr = listener.local_addr().context("read the control address")?;
    let metrics = Outlets::open(config.metrics_listen, &config.telemetry()).await?;
    let metrics_addr = metrics.addr();
    let gate = Gate::open(config.gate().files()).context("set up who may call")?;
    warn_of_plain_text(&config);
    let (stop, stopping) = watch::channel(false);
    let registry = Registry::open(Arc::clone(&config), stopping.clone()).await?;
    let fronts = match FrontEnds::start(&config, &registry).await {
        Ok(fronts) => fronts,
        Err(error) => {
            stop.send_replace(true);
            registry.close().await?;
            return Err(error);
        }
    };
    let nbd = fronts.nbd_endpoints();
    let listening = Listening {
        listener,
        metrics,
        gate: Arc::clone(&gate),
    };
    let served = serve(listening, registry, fronts, stopping);
    let task = tokio::spawn(served);
    Ok(Running {
        control_addr,
        nbd,
        metrics_addr,
        gate,
        stop,
        task,
    })
}

/// Says what others can read and change on its way.
fn warn_of_plain_text(config: &Config) {
    if !config.gate().is_safe() {
        tracing::warn!(listen = %config.listen, "other machines control this service in plain text, as allow_plain_text has it");
    }
    if !config.gate().metrics_are_safe() {
        tracing::warn!(metrics_listen = %config.metrics_listen, "other machines may read metrics in plain text, as metrics_plain_text or allow_plain_text has it");
    }
    if config.vault.starts_with("http://") && !is_loopback_url(&config.vault) {
        tracing::warn!(vault = %config.vault, "intervals are shipped in plain text, as allow_plain_text has it");
    }
}

/// Where others come in, and what stands there.
struct Listening {
    listener: TcpListener,
    metrics: Outlets,
    gate: Arc<Gate>,
}

async fn serve(
    listening: Listening,
    registry: Arc<Registry>,
    fronts: FrontEnds,
    mut stopping: watch::Receiver<bool>,
) -> Result<()> {
    let retry = tokio::spawn(retry(Arc::clone(&registry), stopping.clone()));
    let Listening {
        listener,
        metrics,
        gate,
    } = listening;
    let period = registry.config().tls_reload_period.get();
    let reloading = tokio::spawn(Arc::clone(&gate).watch(period, stopping.clone()));
    let own = OwnCertificates::new(Arc::clone(&gate), registry.config().dialer().files);
    let expiry = tokio::spawn(Arc::new(own).watch(stopping.clone()));
    let (health, health_service) = tonic_health::server::health_reporter();
    let capture = CaptureService::new(Arc::clone(&registry), fronts.clone(), stopping.clone());
    let coherence = CoherenceServer::new(capture.clone())
        .max_decoding_message_size(MESSAGE_LEN_MAX)
        .max_encoding_message_size(MESSAGE_LEN_MAX);
    let capture = CaptureServer::new(capture)
        .max_decoding_message_size(MESSAGE_LEN_MAX)
        .max_encoding_message_size(MESSAGE_LEN_MAX);
    health.set_serving::<CaptureServer<CaptureService>>().await;
    health
        .set_serving::<CoherenceServer<CaptureService>>()
        .await;
    let reflection = |v1alpha: bool| {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        (builder, v1alpha)
    };
    let v1 = reflection(false).0.build_v1().context("build reflection")?;
    let v1alpha = reflection(true)
        .0
        .build_v1alpha()
        .context("build reflection")?;
    let connections_max = registry.config().connections_max as usize;
    let incoming = Incoming::new(listener, connections_max, GREETING_MAX, Arc::clone(&gate));
    let calls = CallCounts::default();
    let sources = Sources {
        process: Process::new("capture-svc", env!("CARGO_PKG_VERSION")),
        registry: Arc::clone(&registry),
        gate: Arc::clone(&gate),
        dialer_ends: DialerEnds::default(),
        connections: incoming.counts(),
        calls: calls.clone(),
    };
    let measuring = tokio::spawn(measure(sources, metrics, stopping.clone()));
    let mut stop = stopping.clone();
    let server = Server::builder()
        .concurrency_limit_per_connection(registry.config().calls_max as usize)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(registry.config().calls_max)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_MAX))
        .layer(calls)
        .layer(RequestLayer)
        .layer(ShieldLayer::new(gate))
        .layer(CallLayer)
        .add_service(capture)
        .add_service(coherence)
        .add_service(health_service)
        .add_service(v1)
        .add_service(v1alpha)
        .serve_with_incoming_shutdown(incoming, async move {
            stopped(&mut stop).await;
            health
                .set_service_status("", ServingStatus::NotServing)
                .await;
            health
                .set_not_serving::<CaptureServer<CaptureService>>()
                .await;
            health
                .set_not_serving::<CoherenceServer<CaptureService>>()
                .await;
        });
    let mut server = std::pin::pin!(server);
    let served = tokio::select! {
        served = &mut server => Some(served),
        () = stopped(&mut stopping) => None,
    };
    let deadline = Instant::now() + GRACE;
    let ended = end(&registry, &fronts, retry).await;
    let served = match served {
        Some(served) => served,
        // Calls under way have had their grace by now, mostly.
        None => timeout_at(deadline.max(Instant::now()), server)
            .await
            .unwrap_or(Ok(())),
    };
    join("watch over the gate's files", reloading).await;
    join("metrics", measuring).await;
    join("watch over certificates", expiry).await;
    served.context("serve the control interface")?;
    ended
}

/// Waits for a task to end; that it failed keeps nothing else from ending well.
async fn join(task: &'static str, handle: JoinHandle<()>) {
    if let Err(error) = handle.await {
        tracing::error!(task, %error, "a task failed");
    }
}

/// Tells of the service in numbers, where that is wanted.
async fn measure(sources: Sources, metrics: Outlets, stop: watch::Receiver<bool>) {
    let registry = Arc::clone(&sources.registry);
    let ends = sources.dialer_ends.clone();
    let looking = ends.watch(registry.config(), stop.clone());
    let telling = metrics.run(Arc::new(move || sources.read()), stop);
    tokio::join!(looking, telling);
}

/// Ends the clients, then the volumes. One that is just being opened is opened to the end, and closed with the others:
/// let go of half-way it would look as after a crash.
async fn end(registry: &Registry, fronts: &FrontEnds, mut retry: JoinHandle<()>) -> Result<()> {
    let retried = async {
        if timeout(GRACE, &mut retry).await.is_err() {
            retry.abort();
            // It is gone then, whatever it says.
            let _ = retry.await;
        }
    };
    tokio::join!(fronts.stop(GRACE), retried);
    registry.close().await
}

/// Tries the volumes that are not served, again and again.
async fn retry(registry: Arc<Registry>, mut stopping: watch::Receiver<bool>) {
    let mut ticks = interval(registry.config().retry_period.get());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stopped(&mut stopping) => return,
            _ = ticks.tick() => registry.try_failed().await,
        }
    }
}

impl Running {
    /// Where the control interface listens; the port that was given by the system where port 0 was asked for.
    #[must_use]
    pub const fn control_addr(&self) -> SocketAddr {
        self.control_addr
    }

    /// Where metrics are read, if they are.
    #[must_use]
    pub const fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics_addr
    }

    /// Where the NBD server listens.
    #[must_use]
    pub fn nbd_endpoints(&self) -> &[NbdListen] {
        &self.nbd
    }

    /// Reads certificates and identities again. What can't be used changes nothing, and is logged.
    pub fn reload(&self) -> Reloaded {
        self.gate.reload(true)
    }

    /// Stops: no new calls or clients, volumes are flushed and closed cleanly. Takes at most [`SHUTDOWN_MAX`].
    ///
    /// # Errors
    /// What could not be ended cleanly; the next start recovers from it as from a crash.
    pub async fn shutdown(self) -> Result<()> {
        self.stop.send_replace(true);
        timeout(SHUTDOWN_MAX, self.task)
            .await
            .context("end the service in time")?
            .context("join the service")?
    }
}
