//! One interval over one stream: header, frames, seal, and what the vault says meanwhile.

use std::time::Duration;

use tidemark_block::{BlockIndex, IntervalHeader, IntervalSeal, Receipt};
use tidemark_proto::{
    Reason, RpcError,
    convert::{FrameBatch, ShipAnswer, ShipMessage},
    vault::v1::{ShipRequest, ShipResponse},
};
use tidemark_telemetry::{SpanExt, step};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tracing::{Instrument, Span};

use super::{
    figures::Figures,
    link::{Link, bad_answer, stalled},
    produce::{Job, Produced, Producer},
    status::UplinkStatus,
    walk::{Batch, ImageAtCut, Total, WalkError},
};
use crate::engine::EngineError;

/// The longest the vault may say nothing while it owes an answer: a batch over a very slow link, or a commit.
const STALL_MAX: Duration = Duration::from_secs(300);
/// Messages handed to the transport ahead of time.
const MESSAGES_AHEAD: usize = 2;
/// How often the progress of reading is shown.
const PROGRESS_PERIOD: Duration = Duration::from_millis(200);

/// How an interval ended well.
#[derive(Debug)]
pub(crate) enum Shipped {
    /// Committed.
    Receipt(Receipt),
    /// Every block is as in the base: nothing was sent.
    Unchanged,
}

/// How it didn't.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShipError {
    /// The vault, or the way to it.
    #[error("{0}")]
    Rpc(#[from] RpcError),
    /// The engine gave the cut up.
    #[error("the interval was given up: the spool was full")]
    GivenUp,
    /// Something here.
    #[error(transparent)]
    Local(WalkError),
    /// The service is stopping.
    #[error("the service is stopping")]
    Stopped,
}

impl ShipError {
    /// Marks what it has ended.
    fn mark(&self, span: &Span) {
        let reason = match self {
            Self::Rpc(error) => error.reason,
            Self::GivenUp => Reason::IntervalGivenUp,
            Self::Local(_) => Reason::IoFailed,
            Self::Stopped => Reason::ShuttingDown,
        };
        span.fail(reason.as_str(), &self.to_string());
    }
}

/// Both directions of a call.
struct Stream {
    sender: mpsc::Sender<ShipRequest>,
    answers: Streaming<ShipResponse>,
    /// From the header to the receipt.
    span: Span,
}

/// What shipping needs, besides the cut.
#[derive(Debug)]
pub(crate) struct Shipment<'a> {
    pub(crate) link: &'a Link,
    pub(crate) header: IntervalHeader,
    pub(crate) bytes_in_flight_max: u64,
    pub(crate) status: &'a watch::Sender<UplinkStatus>,
    pub(crate) figures: &'a Figures,
    pub(crate) stop: watch::Receiver<bool>,
    /// Whether the vault may know the interval: then it is asked first how far it has come. Set once it knows it.
    pub(crate) announced: bool,
    /// Set once more of the interval is durable at the vault than before.
    pub(crate) progressed: bool,
    /// When the seal was sent.
    pub(crate) sealed: Option<std::time::Instant>,
}

/// Resolves once the service is to stop.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A dropped sender means the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

impl Shipment<'_> {
    /// Ships the interval of `job` until its receipt.
    pub(crate) async fn run<I>(&mut self, job: Job<I>) -> Result<Shipped, ShipError>
    where
        I: ImageAtCut + Clone + Send + 'static,
    {
        let total = job.changed.len().get();
        self.status.send_modify(|status| {
            status.blocks_total = total;
            status.blocks_done = 0;
        });
        let (mut producer, stream) = if self.announced {
            let mut stream = self.open().await?;
            match self.ready(&mut stream).await? {
                Ok(from) => (Producer::start(job.clone(), from), Some(stream)),
                Err(receipt) => return self.receipt(receipt, None),
            }
        } else {
            (Producer::start(job.clone(), BlockIndex::ZERO), None)
        };
        let result = self.with(&mut producer, stream, job).await;
        producer.end().await;
        result
    }

    async fn with<I>(
        &mut self,
        producer: &mut Producer,
        stream: Option<Stream>,
        job: Job<I>,
    ) -> Result<Shipped, ShipError>
    where
        I: ImageAtCut + Send + 'static,
    {
        let mut first = self.first(producer).await?;
        if let Produced::Done(total) = &first
            && total.frame_count == 0
            && self.header.base.get() > 0
        {
            return Ok(Shipped::Unchanged);
        }
        let mut stream = match stream {
            Some(stream) => stream,
            None => {
                let mut stream = self.open().await?;
                match self.ready(&mut stream).await? {
                    Ok(from) if from == BlockIndex::ZERO => {}
                    Ok(from) => {
                        let resumed = Producer::start(job, from);
                        std::mem::replace(producer, resumed).end().await;
                        first = self.first(producer).await?;
                    }
                    Err(receipt) => return self.receipt(receipt, None),
                }
                stream
            }
        };
        let mut exchange = Exchange {
            sent: 0,
            acked: 0,
            sealed: None,
            held: Some(first),
            open: true,
        };
        let span = stream.span.clone();
        let ended = exchange.run(self, producer, &mut stream);
        let ended = ended.instrument(span.clone()).await;
        span.count("bytes", exchange.sent);
        ended.inspect_err(|error| error.mark(&span))
    }

    /// The first thing that the reading thread finds.
    async fn first(&mut self, producer: &mut Producer) -> Result<Produced, ShipError> {
        loop {
            let next = tokio::select! {
                () = stopped(&mut self.stop) => return Err(ShipError::Stopped),
                next = producer.next() => Some(next),
                () = tokio::time::sleep(PROGRESS_PERIOD) => None,
            };
            match next {
                Some(Produced::Failed(error)) => return Err(failed(error)),
                Some(first) => return Ok(first),
                None => self.show(producer),
            }
        }
    }

    /// What the vault says to the header: from where to go on, or the receipt.
    async fn ready(
        &mut self,
        stream: &mut Stream,
    ) -> Result<Result<BlockIndex, Receipt>, ShipError> {
        let answer = self.answer(&mut stream.answers).await;
        match answer.inspect_err(|error| error.mark(&stream.span))? {
            ShipAnswer::Receipt(receipt) => Ok(Err(receipt)),
            ShipAnswer::Ready { durable_end } => {
                self.announced = true;
                if durable_end > self.header.geometry.all().end() {
                    return Err(out_of_order().into());
                }
                Ok(Ok(durable_end))
            }
            ShipAnswer::Ack { .. } => Err(out_of_order().into()),
        }
    }

    async fn open(&mut self) -> Result<Stream, ShipError> {
        let (sender, receiver) = mpsc::channel(MESSAGES_AHEAD);
        let header = ShipMessage::Header(self.header.clone());
        sender.try_send(header.into()).map_err(|_| out_of_order())?;
        let mut client = self.link.client();
        let span = step!("send", otel.kind = "client");
        span.note("rpc.system", "grpc");
        let call = client.ship(ReceiverStream::new(receiver));
        let call = timeout(STALL_MAX, call.instrument(span.clone()));
        let answers = tokio::select! {
            () = stopped(&mut self.stop) => Err(ShipError::Stopped),
            answers = call => match answers {
                Ok(answers) => answers.map_err(|status| RpcError::from(status).into()),
                Err(_) => Err(stalled().into()),
            },
        };
        Ok(Stream {
            sender,
            answers: answers.inspect_err(|error| error.mark(&span))?.into_inner(),
            span,
        })
    }

    async fn answer(
        &mut self,
        answers: &mut Streaming<ShipResponse>,
    ) -> Result<ShipAnswer, ShipError> {
        tokio::select! {
            () = stopped(&mut self.stop) => Err(ShipError::Stopped),
            answer = timeout(STALL_MAX, answers.message()) => match answer {
                Ok(answer) => parse(answer),
                Err(_) => Err(stalled().into()),
            },
        }
    }

    fn show(&self, producer: &Producer) {
        self.status.send_if_modified(|status| {
            let done = producer.walked().min(status.blocks_total);
            let changed = done != status.blocks_done;
            status.blocks_done = done;
            changed
        });
    }

    fn receipt(&self, receipt: Receipt, total: Option<Total>) -> Result<Shipped, ShipError> {
        let header = &self.header;
        if receipt.interval != header.interval || receipt.volume != header.volume {
            return Err(RpcError::new(
                Reason::Unknown,
                "the vault's receipt is that of another interval",
                "check that the vault's version fits this one",
            )
            .into());
        }
        if total.is_some_and(|total| total.image_digest != receipt.image_digest) {
            return Err(RpcError::new(
                Reason::DigestMismatch,
                "the vault's receipt names another image digest than the one that was sent",
                "the checksum table is compared with the vault's now",
            )
            .into());
        }
        Ok(Shipped::Receipt(receipt))
    }
}

fn parse(answer: Result<Option<ShipResponse>, tonic::Status>) -> Result<ShipAnswer, ShipError> {
    match answer {
        Ok(Some(answer)) => ShipAnswer::try_from(answer).map_err(|e| bad_answer(e).into()),
        Ok(None) => Err(RpcError::new(
            Reason::Unreachable,
            "the vault ended the stream without a receipt",
            "the interval is resumed by itself",
        )
        .into()),
        Err(status) => Err(RpcError::from(status).into()),
    }
}

fn out_of_order() -> RpcError {
    RpcError::new(
        Reason::Unknown,
        "the vault's answers are out of order",
        "check that the vault's version fits this one",
    )
}

fn failed(error: WalkError) -> ShipError {
    match error {
        WalkError::Engine(EngineError::GivenUp(_)) => ShipError::GivenUp,
        WalkError::Engine(EngineError::Closed) => ShipError::Stopped,
        error => ShipError::Local(error),
    }
}

/// The middle of a stream.
struct Exchange {
    sent: u64,
    acked: u64,
    sealed: Option<Total>,
    held: Option<Produced>,
    /// False once the vault takes no more.
    open: bool,
}

impl Exchange {
    async fn run(
        &mut self,
        shipment: &mut Shipment<'_>,
        producer: &mut Producer,
        stream: &mut Stream,
    ) -> Result<Shipped, ShipError> {
        let Stream {
            sender, answers, ..
        } = stream;
        let mut progress = interval(PROGRESS_PERIOD);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let began = Instant::now();
        let mut heard = began;
        let mut stop = shipment.stop.clone();
        loop {
            if let Some(Produced::Failed(_)) = &self.held
                && let Some(Produced::Failed(error)) = self.held.take()
            {
                return Err(failed(error));
            }
            let waits = self.sealed.is_some() || self.sent > self.acked;
            tokio::select! {
                () = stopped(&mut stop) => return Err(ShipError::Stopped),
                answer = answers.message() => {
                    heard = Instant::now();
                    match parse(answer)? {
                        ShipAnswer::Ack { durable_bytes, .. } => {
                            if durable_bytes > self.acked {
                                shipment.progressed = true;
                            }
                            self.acked = durable_bytes.clamp(self.acked, self.sent);
                        }
                        ShipAnswer::Receipt(receipt) => {
                            shipment.figures.link(self.sent, began.elapsed());
                            shipment.show(producer);
                            return shipment.receipt(receipt, self.sealed);
                        }
                        ShipAnswer::Ready { .. } => return Err(out_of_order().into()),
                    }
                }
                permit = sender.reserve(), if self.may_send(shipment.bytes_in_flight_max) => {
                    match permit {
                        Ok(permit) => {
                            if let Some(message) = self.take(shipment) {
                                permit.send(message);
                            }
                        }
                        // Its reason comes as the stream's status.
                        Err(_) => self.open = false,
                    }
                }
                produced = producer.next(), if self.held.is_none() && self.sealed.is_none() => {
                    self.held = Some(produced);
                }
                () = sleep_until(heard + STALL_MAX), if waits => return Err(stalled().into()),
                _ = progress.tick() => shipment.show(producer),
            }
        }
    }

    /// Whether what is held may go out: a single batch always may.
    fn may_send(&self, in_flight_max: u64) -> bool {
        let in_flight = self.sent - self.acked;
        self.open
            && match &self.held {
                Some(Produced::Batch(Batch { frames, .. })) => {
                    in_flight == 0 || in_flight + frames.len() as u64 <= in_flight_max
                }
                Some(Produced::Done(_)) => true,
                Some(Produced::Failed(_)) | None => false,
            }
    }

    fn take(&mut self, shipment: &mut Shipment<'_>) -> Option<ShipRequest> {
        let message = match self.held.take()? {
            Produced::Batch(batch) => {
                let bytes = batch.frames.len() as u64;
                self.sent += bytes;
                shipment.figures.sent(bytes);
                shipment
                    .status
                    .send_modify(|status| status.bytes_sent += bytes);
                ShipMessage::Frames(FrameBatch {
                    end: batch.end,
                    frames: batch.frames,
                })
            }
            Produced::Done(total) => {
                self.sealed = Some(total);
                shipment.sealed = Some(std::time::Instant::now());
                ShipMessage::Seal(IntervalSeal {
                    changed_blocks: tidemark_block::BlockCount::new(total.changed_blocks),
                    frame_count: total.frame_count,
                    image_digest: total.image_digest,
                })
            }
            Produced::Failed(_) => return None,
        };
        Some(message.into())
    }
}
