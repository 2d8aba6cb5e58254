//! Stands between a capture service and its vault, message by message, and fails on demand.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::Stream;
use parking_lot::Mutex;
use tidemark_proto::{
    Reason, RpcError,
    common::v1::Receipt,
    vault::v1::{
        self as pb,
        ingest_client::IngestClient,
        ingest_server::{Ingest, IngestServer},
        ship_request, ship_response,
    },
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint},
};

/// What goes wrong next, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The stream breaks instead of the nth message to the vault (from 0: the header).
    BreakBeforeRequest(u64),
    /// The stream breaks instead of the nth answer.
    BreakBeforeAnswer(u64),
    /// The vault's receipt is lost.
    LoseReceipt,
    /// The seal names another digest than the source computed.
    BendDigest,
    /// StartTerm is answered so.
    RefuseTerm(Reason),
    /// The header is answered so.
    RefuseShip(Reason),
    /// MarkCurrent is answered so.
    RefuseMark(Reason),
}

#[derive(Debug, Default)]
struct Shared {
    target: Mutex<Option<SocketAddr>>,
    faults: Mutex<Vec<Fault>>,
    delay: Mutex<Duration>,
    /// Bytes of frames that went through to the vault.
    frame_bytes: AtomicU64,
    headers: AtomicU64,
    marks: AtomicU64,
    digest_calls: AtomicU64,
}

#[derive(Debug, Clone)]
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Proxy {
    pub(crate) async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        *shared.target.lock() = Some(target);
        let service = IngestServer::new(Service(Arc::clone(&shared)))
            .max_decoding_message_size(8 << 20)
            .max_encoding_message_size(8 << 20);
        tokio::spawn(
            tonic::transport::Server::builder()
                .initial_stream_window_size(8 << 20)
                .initial_connection_window_size(8 << 20)
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Self { shared, address }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// None: nothing answers.
    pub(crate) fn set_target(&self, target: Option<SocketAddr>) {
        *self.shared.target.lock() = target;
    }

    pub(crate) fn fail(&self, fault: Fault) {
        self.shared.faults.lock().push(fault);
    }

    /// What was to go wrong doesn't any more.
    pub(crate) fn forgive(&self) {
        self.shared.faults.lock().clear();
    }

    /// Faults that have not happened yet.
    pub(crate) fn faults_left(&self) -> usize {
        self.shared.faults.lock().len()
    }

    pub(crate) fn set_delay(&self, delay: Duration) {
        *self.shared.delay.lock() = delay;
    }

    pub(crate) fn frame_bytes(&self) -> u64 {
        self.shared.frame_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn headers(&self) -> u64 {
        self.shared.headers.load(Ordering::Relaxed)
    }

    pub(crate) fn marks(&self) -> u64 {
        self.shared.marks.load(Ordering::Relaxed)
    }

    pub(crate) fn digest_calls(&self) -> u64 {
        self.shared.digest_calls.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Clone)]
struct Service(Arc<Shared>);

impl Service {
    async fn vault(&self) -> Result<IngestClient<Channel>, Status> {
        let target = *self.0.target.lock();
        let target = target.ok_or_else(broken)?;
        let endpoint = Endpoint::from_shared(format!("http://{target}")).map_err(|_| broken())?;
        endpoint
            .connect()
            .await
            .map(|channel| {
                IngestClient::new(channel)
                    .max_decoding_message_size(8 << 20)
                    .max_encoding_message_size(8 << 20)
            })
            .map_err(|_| broken())
    }

    /// Takes the first fault that `wanted` accepts.
    fn take<T>(&self, wanted: impl Fn(&Fault) -> Option<T>) -> Option<T> {
        let mut faults = self.0.faults.lock();
        let at = faults.iter().position(|fault| wanted(fault).is_some())?;
        wanted(&faults.remove(at))
    }
}

fn broken() -> Status {
    Status::unavailable("the proxy broke the connection")
}

fn refused(reason: Reason) -> Status {
    RpcError::new(reason, "the proxy refuses", "nothing").into()
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Ingest for Service {
    async fn start_term(
        &self,
        request: Request<pb::StartTermRequest>,
    ) -> Result<Response<pb::StartTermResponse>, Status> {
        if let Some(reason) = self.take(|fault| match fault {
            Fault::RefuseTerm(reason) => Some(*reason),
            _ => None,
        }) {
            return Err(refused(reason));
        }
        self.vault().await?.start_term(request.into_inner()).await
    }

    type ShipStream = Answers<pb::ShipResponse>;

    async fn ship(
        &self,
        request: Request<Streaming<pb::ShipRequest>>,
    ) -> Result<Response<Self::ShipStream>, Status> {
        self.0.headers.fetch_add(1, Ordering::Relaxed);
        if let Some(reason) = self.take(|fault| match fault {
            Fault::RefuseShip(reason) => Some(*reason),
            _ => None,
        }) {
            return Err(refused(reason));
        }
        let (to_vault, vault_requests) = mpsc::channel(1);
        let (to_source, answers) = mpsc::channel(1);
        let mut requests = request.into_inner();
        let service = self.clone();
        let failing = to_source.clone();
        tokio::spawn(async move {
            let mut n = 0;
            while let Ok(Some(mut message)) = requests.message().await {
                let breaks =
                    service.take(|fault| (*fault == Fault::BreakBeforeRequest(n)).then_some(()));
                if breaks.is_some() {
                    let _ = failing.send(Err(broken())).await;
                    return;
                }
                n += 1;
                let delay = *service.0.delay.lock();
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                match &mut message.message {
                    Some(ship_request::Message::Frames(batch)) => {
                        let bytes = batch.frames.len() as u64;
                        service.0.frame_bytes.fetch_add(bytes, Ordering::Relaxed);
                    }
                    Some(ship_request::Message::Seal(seal)) => {
                        let bend = service.take(|f| (*f == Fault::BendDigest).then_some(()));
                        if bend.is_some() {
                            seal.image_digest = bytes::Bytes::from_static(&[7; 16]);
                        }
                    }
                    _ => {}
                }
                if to_vault.send(message).await.is_err() {
                    return;
                }
            }
        });
        let mut from_vault = self
            .vault()
            .await?
            .ship(ReceiverStream::new(vault_requests))
            .await?
            .into_inner();
        let service = self.clone();
        tokio::spawn(async move {
            let mut n = 0;
            loop {
                let answer = tokio::select! {
                    answer = from_vault.message() => answer,
                    () = to_source.closed() => return,
                };
                let answer = match answer {
                    Ok(Some(answer)) => answer,
                    Ok(None) => return,
                    Err(status) => {
                        let _ = to_source.send(Err(status)).await;
                        return;
                    }
                };
                let receipt = matches!(answer.message, Some(ship_response::Message::Receipt(_)));
                let breaks = service.take(|fault| match fault {
                    Fault::BreakBeforeAnswer(at) if *at == n => Some(()),
                    Fault::LoseReceipt if receipt => Some(()),
                    _ => None,
                });
                if breaks.is_some() {
                    let _ = to_source.send(Err(broken())).await;
                    return;
                }
                n += 1;
                if to_source.send(Ok(answer)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn mark_current(
        &self,
        request: Request<pb::MarkCurrentRequest>,
    ) -> Result<Response<Receipt>, Status> {
        self.0.marks.fetch_add(1, Ordering::Relaxed);
        if let Some(reason) = self.take(|fault| match fault {
            Fault::RefuseMark(reason) => Some(*reason),
            _ => None,
        }) {
            return Err(refused(reason));
        }
        self.vault().await?.mark_current(request.into_inner()).await
    }

    type GetBlockDigestsStream = Streaming<pb::GetBlockDigestsResponse>;

    async fn get_block_digests(
        &self,
        request: Request<pb::GetBlockDigestsRequest>,
    ) -> Result<Response<Self::GetBlockDigestsStream>, Status> {
        self.0.digest_calls.fetch_add(1, Ordering::Relaxed);
        self.vault()
            .await?
            .get_block_digests(request.into_inner())
            .await
    }
}
