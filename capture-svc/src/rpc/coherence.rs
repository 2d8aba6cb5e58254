//! Sessions of agents: `tidemark.capture.v1.Coherence`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use capture_core::coherence::Failure;
use tidemark_identity::Caller;
use tidemark_proto::{
    Reason, RpcError,
    capture::v1::{
        self as pb, attach_request::Message as FromAgent, attach_response::Message as ToAgent,
        coherence_server::Coherence,
    },
};
use tidemark_tls::caller;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{CaptureService, Reply, Streamed};
use crate::{
    quiesce::agents::{AGENTS_PER_VOLUME_MAX, Agent, AnswerTo, Hint, Order},
    uplink::{UplinkState, stopped},
};

/// How long an agent may take for its first message.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// Messages that wait for an agent to read them; one that doesn't is taken for dead.
const AHEAD: usize = 64;
const NAME_LEN_MAX: usize = 63;
const VOLUMES_MAX: usize = 256;

#[tonic::async_trait]
impl Coherence for CaptureService {
    type AttachStream = Streamed<pb::AttachResponse>;

    async fn attach(
        &self,
        request: Request<Streaming<pb::AttachRequest>>,
    ) -> Reply<Self::AttachStream> {
        self.stopping()?;
        let caller = caller(request.extensions());
        let mut from = request.into_inner();
        let first = timeout(HELLO_MAX, from.message()).await;
        let first = first.map_err(|_| RpcError::invalid("no hello came within 10 s"))??;
        let Some(Some(FromAgent::Hello(hello))) = first.map(|first| first.message) else {
            return Err(RpcError::invalid("the first message is no hello").into());
        };
        let (agent, orders) = self.take_in(hello, &caller)?;
        let (to, answers) = mpsc::channel(AHEAD);
        let session = Session {
            service: self.clone(),
            agent,
            to,
            frozen: HashMap::new(),
        };
        tokio::spawn(session.run(from, orders));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

impl CaptureService {
    fn take_in(
        &self,
        hello: pb::Hello,
        caller: &Caller,
    ) -> Result<(Arc<Agent>, mpsc::UnboundedReceiver<Order>), RpcError> {
        let is_name = (1..=NAME_LEN_MAX).contains(&hello.name.len());
        if !is_name || hello.name.chars().any(char::is_control) {
            return Err(RpcError::invalid(
                "an agent's name has 1 to 63 bytes, all printable",
            ));
        }
        if !(1..=VOLUMES_MAX).contains(&hello.volumes.len()) {
            return Err(RpcError::invalid("an agent has 1 to 256 volumes"));
        }
        let mut volumes = BTreeMap::new();
        for name in hello.volumes {
            let volume = self.registry.find(&name)?;
            let source = &self.registry.config().source_name;
            caller.need_workload(source, &volume.record.name)?;
            volumes.insert(volume.record.id, name);
        }
        let taken = self.registry.agents().attach(hello.name, volumes);
        taken.ok_or_else(|| {
            RpcError::new(
                Reason::LimitReached,
                format!("one of the volumes has {AGENTS_PER_VOLUME_MAX} agents"),
                "end one of them first",
            )
        })
    }
}

/// What is between the service and one agent; the task that runs it is its one owner.
struct Session {
    service: CaptureService,
    agent: Arc<Agent>,
    to: mpsc::Sender<Result<pb::AttachResponse, Status>>,
    /// Asked, or holding, and not told to thaw.
    frozen: HashMap<u64, AnswerTo>,
}

/// The stream has ended, or is of no use any more.
struct Ended;

impl Session {
    async fn run(
        mut self,
        mut from: Streaming<pb::AttachRequest>,
        mut orders: mpsc::UnboundedReceiver<Order>,
    ) {
        tracing::info!(agent = %self.agent.title(), "attached");
        let mut stop = self.service.stop.clone();
        let mut ended = self.say(ToAgent::Welcome(pb::Welcome {}));
        while ended.is_ok() {
            ended = tokio::select! {
                () = stopped(&mut stop) => Err(Ended),
                message = from.message() => match message {
                    Ok(Some(pb::AttachRequest { message: Some(message) })) => self.hear(message),
                    _ => Err(Ended),
                },
                Some(order) = orders.recv() => self.obey(order),
                () = self.to.closed() => Err(Ended),
            };
        }
        tracing::info!(agent = %self.agent.title(), frozen = self.frozen.len(), "gone");
        self.service.registry.agents().detach(&self.agent);
        orders.close();
        while let Ok(order) = orders.try_recv() {
            if let Order::Freeze { answer, .. } | Order::Hold { answer, .. } = order {
                answer.send(Err(Failure::Gone));
            }
        }
        for answer in self.frozen.values() {
            answer.send(Err(Failure::Gone));
        }
    }

    fn say(&self, message: ToAgent) -> Result<(), Ended> {
        let message = pb::AttachResponse {
            message: Some(message),
        };
        self.to.try_send(Ok(message)).map_err(|_| Ended)
    }

    fn obey(&mut self, order: Order) -> Result<(), Ended> {
        match order {
            Order::Freeze {
                freeze,
                volume,
                limit,
                epoch,
                answer,
            } => {
                self.frozen.insert(freeze, answer);
                let volume = self.agent.name_of(volume).unwrap_or_default();
                self.say(ToAgent::Freeze(pb::Freeze {
                    freeze_id: freeze,
                    volume: volume.to_owned(),
                    deadline_ms: u32::try_from(limit.as_millis()).unwrap_or(u32::MAX),
                    epoch: epoch.get(),
                }))
            }
            Order::Hold { freeze, answer } => {
                self.frozen.insert(freeze, answer);
                Ok(())
            }
            Order::Thaw { freeze } => {
                self.frozen.remove(&freeze);
                self.say(ToAgent::Thaw(pb::Thaw { freeze_id: freeze }))
            }
            Order::Done {
                freeze,
                hint,
                graded,
            } => {
                self.frozen.remove(&freeze);
                let done = match graded {
                    Ok(graded) => pb::Done {
                        hint_id: hint,
                        cut: true,
                        coherence: graded.coherence.code().into(),
                        reason: graded.reason().to_string(),
                    },
                    Err(why) => pb::Done {
                        hint_id: hint,
                        reason: why.to_owned(),
                        ..pb::Done::default()
                    },
                };
                self.say(ToAgent::Done(done))
            }
        }
    }

    fn hear(&mut self, message: FromAgent) -> Result<(), Ended> {
        match message {
            FromAgent::Hello(_) => return Err(Ended),
            FromAgent::Frozen(frozen) => {
                if let Some(answer) = self.frozen.get(&frozen.freeze_id) {
                    answer.send(Ok(()));
                }
            }
            FromAgent::Refused(refused) => {
                if let Some(answer) = self.frozen.get(&refused.freeze_id) {
                    answer.send(Err(Failure::Refused(refused.reason)));
                }
            }
            FromAgent::Hint(hint) => {
                let held = Hint {
                    agent: Arc::clone(&self.agent),
                    hint: hint.hint_id,
                    until: Instant::now() + Duration::from_millis(hint.hold_ms.into()),
                };
                if let Err((held, why)) = self.pass_on(&hint.volume, held) {
                    held.decline(why);
                }
            }
        }
        Ok(())
    }

    /// To the uplink, where a cut can be made at once.
    fn pass_on(&self, volume: &str, hint: Hint) -> Result<(), (Hint, &'static str)> {
        let serving = self.agent.volume_of(volume).and_then(|id| {
            self.service
                .registry
                .find(&id.to_string())
                .ok()?
                .need()
                .ok()
        });
        let Some(serving) = serving else {
            return Err((
                hint,
                "the volume is not served, or was not named in the hello",
            ));
        };
        if serving.uplink.status().borrow().state != UplinkState::Idle {
            return Err((hint, "the last interval is still on its way"));
        }
        serving
            .uplink
            .hint(hint)
            .map_err(|hint| (hint, "too many requests wait"))
    }
}
