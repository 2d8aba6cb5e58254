//! `tidemark.vault.v1.Ingest`.

use std::{sync::Arc, time::Duration};

use tidemark_block::{Checksum128, IntervalHeader, TableView, digest};
use tidemark_identity::Caller;
use tidemark_proto::{
    Reason, RpcError,
    common::v1::Receipt,
    convert::{
        CurrentMark, DigestLevel, DigestRun, DigestsRequest, ShipAnswer, ShipMessage, TermRequest,
    },
    vault::v1::{
        GetBlockDigestsRequest, GetBlockDigestsResponse, MarkCurrentRequest, ShipRequest,
        ShipResponse, StartTermRequest, StartTermResponse, ingest_server::Ingest,
    },
};
use tidemark_telemetry::{SpanExt, step};
use tidemark_tls::caller;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

use super::{Service, stopping, to_the_end};
use crate::{
    error::{of_ingest, of_io},
    figures::Received,
    ship::{self, Begun, Session, check_term, mark_current, superseded},
    volume::TableAt,
};

/// Answers on their way to a source; it reads them as fast as it sends.
const ANSWERS_MAX: usize = 64;
/// Nodes of one answer of GetBlockDigests.
const NODES_PER_ANSWER: u64 = 1 << 16;

type Answers = mpsc::Sender<Result<ShipResponse, Status>>;

#[tonic::async_trait]
impl Ingest for Service {
    async fn start_term(
        &self,
        request: Request<StartTermRequest>,
    ) -> Result<Response<StartTermResponse>, Status> {
        let caller = caller(request.extensions());
        let request = TermRequest::try_from(request.into_inner())?;
        let vault = Arc::clone(&self.vault);
        let grant = to_the_end(async move { vault.start_term(request, &caller).await }).await?;
        Ok(Response::new(grant.into()))
    }

    type ShipStream = ReceiverStream<Result<ShipResponse, Status>>;

    async fn ship(
        &self,
        request: Request<Streaming<ShipRequest>>,
    ) -> Result<Response<Self::ShipStream>, Status> {
        let (answers, receiver) = mpsc::channel(ANSWERS_MAX);
        let service = self.clone();
        let caller = caller(request.extensions());
        let incoming = request.into_inner();
        let receiving = async move {
            if let Err(error) = service.receive(incoming, &answers, &caller).await {
                tracing::info!(reason = %error.reason, %error, "interval's stream ended");
                let _ = answers.send(Err(error.into())).await;
            }
        };
        tokio::spawn(receiving.in_current_span());
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn mark_current(
        &self,
        request: Request<MarkCurrentRequest>,
    ) -> Result<Response<Receipt>, Status> {
        let caller = caller(request.extensions());
        let mark = CurrentMark::try_from(request.into_inner())?;
        let volume = self.vault.own(mark.volume, &caller)?;
        let receipt = mark_current(&volume, &mark)?;
        Ok(Response::new(receipt.into()))
    }

    type GetBlockDigestsStream = ReceiverStream<Result<GetBlockDigestsResponse, Status>>;

    async fn get_block_digests(
        &self,
        request: Request<GetBlockDigestsRequest>,
    ) -> Result<Response<Self::GetBlockDigestsStream>, Status> {
        let caller = caller(request.extensions());
        let request = DigestsRequest::try_from(request.into_inner())?;
        let volume = self.vault.own(request.volume, &caller)?;
        check_term(&volume.manifest(), request.term)?;
        let at = volume.table_at_head().await?;
        if at.generation != request.generation {
            return Err(of_ingest(&vault_core::ingest::IngestError::BaseNotHead {
                found: request.generation,
                head: at.generation,
            })
            .into());
        }
        check_ranges(&at, &request)?;
        let (answers, receiver) = mpsc::channel(4);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send_digests(&at, &request, &answers) {
                let _ = answers.blocking_send(Err(error.into()));
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

fn check_ranges(at: &TableAt, request: &DigestsRequest) -> Result<(), RpcError> {
    let geometry = at.table.geometry();
    let nodes = match request.level {
        DigestLevel::Leaf => digest::leaf_count(geometry),
        DigestLevel::Group => digest::group_count(geometry),
        DigestLevel::Block => geometry.block_count().get(),
    };
    let mut behind = 0;
    for range in &request.ranges {
        if range.start < behind || range.start + range.count > nodes {
            return Err(RpcError::invalid(format!(
                "ranges ascend within the {nodes} nodes of their level; {} from {} is not in order",
                range.count, range.start
            )));
        }
        behind = range.start + range.count;
    }
    Ok(())
}

/// Reads nodes, leaving out runs of zeroes; stops when the caller has gone.
fn send_digests(
    at: &TableAt,
    request: &DigestsRequest,
    answers: &mpsc::Sender<Result<GetBlockDigestsResponse, Status>>,
) -> Result<(), RpcError> {
    for range in &request.ranges {
        let end = range.start + range.count;
        let mut start = range.start;
        while start < end {
            let count = (end - start).min(NODES_PER_ANSWER);
            let nodes = read_nodes(at, request.level, start, count)
                .map_err(|error| of_io("read the checksum table", &error))?;
            for run in nonzero_runs(start, &nodes) {
                if answers.blocking_send(Ok(run.into())).is_err() {
                    return Ok(());
                }
            }
            start += count;
        }
    }
    Ok(())
}

fn read_nodes(
    at: &TableAt,
    level: DigestLevel,
    start: u64,
    count: u64,
) -> std::io::Result<Vec<Checksum128>> {
    let mut nodes = vec![Checksum128::ZERO; usize::try_from(count).unwrap_or(0)];
    match level {
        DigestLevel::Leaf => at.table.leaves(start, &mut nodes)?,
        DigestLevel::Block => at
            .table
            .read_blocks(tidemark_block::BlockIndex::new(start), &mut nodes)?,
        DigestLevel::Group => {
            let fanout = digest::FANOUT as u64;
            let mut leaf = None;
            for (group, node) in (start..start + count).zip(&mut nodes) {
                if leaf.is_none_or(|(n, _)| n != group / fanout) {
                    leaf = Some((group / fanout, at.table.groups(group / fanout)?));
                }
                if let Some((_, groups)) = &leaf {
                    *node = groups[usize::try_from(group % fanout).unwrap_or(0)];
                }
            }
        }
    }
    Ok(nodes)
}

/// Runs between zeroes; a single zero node inside a run is sent with it rather than splitting it.
fn nonzero_runs(start: u64, nodes: &[Checksum128]) -> Vec<DigestRun> {
    let mut runs: Vec<(u64, Vec<Checksum128>)> = Vec::new();
    let mut last = None;
    for (n, node) in (start..).zip(nodes) {
        if node.is_zero() {
            continue;
        }
        match (last, runs.last_mut()) {
            (Some(before), Some((_, run))) if n - before <= 2 => {
                if n - before == 2 {
                    run.push(Checksum128::ZERO);
                }
                run.push(*node);
            }
            _ => runs.push((n, vec![*node])),
        }
        last = Some(n);
    }
    runs.into_iter()
        .map(|(start, digests)| DigestRun { start, digests })
        .collect()
}

/// What the next thing to do on a stream is.
enum Event<'a> {
    Room(mpsc::Permit<'a, Result<ShipResponse, Status>>),
    Durable(ShipAnswer),
    Message(Option<ShipMessage>),
    Superseded,
    Idle,
}

impl Service {
    async fn receive(
        &self,
        mut incoming: Streaming<ShipRequest>,
        answers: &Answers,
        caller: &Caller,
    ) -> Result<(), RpcError> {
        let idle_max = self.vault.config().stream_idle_max.get();
        let header = match tokio::time::timeout(idle_max, next(&mut incoming)).await {
            Err(_) => return Err(idle(idle_max)),
            Ok(message) => match message? {
                Some(ShipMessage::Header(header)) => header,
                Some(_) => return Err(out_of_order("a stream begins with the interval's header")),
                None => return Ok(()),
            },
        };
        let id = header.volume;
        let ended = self
            .receive_interval(header, &mut incoming, answers, caller)
            .await;
        // Of a volume that isn't the caller's nothing is counted.
        if let Ok(volume) = self.vault.own(id, caller) {
            match &ended {
                Ok(Some(ended)) => volume.figures.received(*ended),
                Ok(None) => {}
                Err(error) if is_interruption(error.reason) => {
                    volume.figures.received(Received::Interrupted);
                }
                Err(_) => volume.figures.received(Received::Refused),
            }
        }
        ended.map(|_| ())
    }

    /// From the header to the receipt; how that ended, unless the receipt was only asked for again.
    async fn receive_interval(
        &self,
        header: IntervalHeader,
        incoming: &mut Streaming<ShipRequest>,
        answers: &Answers,
        caller: &Caller,
    ) -> Result<Option<Received>, RpcError> {
        let idle_max = self.vault.config().stream_idle_max.get();
        let vault = Arc::clone(&self.vault);
        let id = header.volume;
        let span = Span::current();
        span.note("interval", header.interval);
        let mut session = match vault.ship(header, caller).await? {
            Begun::Committed(receipt) => {
                let _ = answers.send(Ok(ShipAnswer::Receipt(receipt).into())).await;
                return Ok(None);
            }
            Begun::Open(session) => session,
        };
        let durable_end = session.durable()?.end;
        let _ = answers
            .send(Ok(ShipAnswer::Ready { durable_end }.into()))
            .await;
        let verify = step!("verify");
        let sealed = self.receive_frames(&mut session, incoming, answers, idle_max);
        let sealed = sealed.instrument(verify.clone()).await;
        session.tell_verified(&verify);
        if let Err(error) = &sealed {
            verify.fail(error.reason.as_str(), &error.message);
        }
        drop(verify);
        match sealed {
            Ok(Some(seal)) => {
                let receipt = tokio::spawn(session.commit(seal).in_current_span())
                    .await
                    .map_err(|_| RpcError::internal("a commit failed"))??;
                self.vault.wake.notify_one();
                span.count("generation", receipt.generation.get());
                let answer = answers.send(Ok(ShipAnswer::Receipt(receipt).into()));
                let _ = answer.instrument(step!("receipt")).await;
                // The table follows now, so that the next interval needn't wait for it.
                let volume = self.vault.volume(id)?;
                tokio::spawn(async move {
                    if let Err(error) = volume.table_at_head().await {
                        tracing::warn!(volume = %id, %error, "the checksum table stays behind until it is needed");
                    }
                });
                Ok(Some(Received::Committed))
            }
            // The connection broke, or the vault stops: what was received is kept for the next try.
            Ok(None) => {
                span.fail(Reason::Unreachable.as_str(), "the source has gone");
                session.abandon().await;
                Ok(Some(Received::Interrupted))
            }
            Err(error) => {
                if error.reason == Reason::StoreFull {
                    self.vault.wake.notify_one();
                }
                if is_interruption(error.reason) {
                    session.abandon().await;
                }
                Err(error)
            }
        }
    }

    /// Until the seal, with everything before it durable; `None` where the source has gone.
    async fn receive_frames(
        &self,
        session: &mut Session,
        incoming: &mut Streaming<ShipRequest>,
        answers: &Answers,
        idle_max: Duration,
    ) -> Result<Option<tidemark_block::IntervalSeal>, RpcError> {
        let mut stop = self.stopping.clone();
        let Some(mut turn) = session.turn() else {
            return Err(superseded());
        };
        // Acknowledgements are cumulative: while the source doesn't read them only the last is kept.
        let mut unsent = None;
        loop {
            let can_take = session.can_take();
            let event = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return Err(stopping()),
                () = turn.superseded() => Event::Superseded,
                room = answers.reserve(), if unsent.is_some() => match room {
                    Ok(room) => Event::Room(room),
                    Err(_) => return Ok(None),
                },
                prefix = session.progress() => Event::Durable(ship::ack(prefix?)),
                message = next(incoming), if can_take => Event::Message(message?),
                () = tokio::time::sleep(idle_max), if can_take => Event::Idle,
            };
            match event {
                Event::Superseded => return Err(superseded()),
                Event::Idle => return Err(idle(idle_max)),
                Event::Room(room) => {
                    if let Some(ack) = unsent.take() {
                        room.send(Ok(ShipResponse::from(ack)));
                    }
                }
                Event::Durable(ack) => unsent = Some(ack),
                Event::Message(None) => return Ok(None),
                Event::Message(Some(ShipMessage::Header(_))) => {
                    return Err(out_of_order("a stream has one header"));
                }
                Event::Message(Some(ShipMessage::Frames(batch))) => session.batch(batch).await?,
                Event::Message(Some(ShipMessage::Seal(seal))) => {
                    while session.has_pending() {
                        session.close_part()?;
                        let ack = ship::ack(session.progress().await?);
                        // The receipt says it all should there be no room.
                        let _ = answers.try_send(Ok(ack.into()));
                    }
                    return Ok(Some(seal));
                }
            }
        }
    }
}

/// What was received is kept for the next try.
const fn is_interruption(reason: Reason) -> bool {
    matches!(reason, Reason::ShuttingDown | Reason::Unreachable)
}

async fn next(incoming: &mut Streaming<ShipRequest>) -> Result<Option<ShipMessage>, RpcError> {
    match incoming.message().await {
        Ok(Some(message)) => Ok(Some(ShipMessage::try_from(message)?)),
        Ok(None) => Ok(None),
        Err(status) => Err(RpcError::from_status(&status)),
    }
}

fn out_of_order(message: &str) -> RpcError {
    RpcError::new(
        Reason::OutOfOrder,
        message,
        "send the header, batches in ascending order, then the seal",
    )
}

fn idle(after: Duration) -> RpcError {
    RpcError::new(
        Reason::IntervalGivenUp,
        format!("nothing was received for {after:?}"),
        "connect again; the vault has kept what it acknowledged",
    )
}
