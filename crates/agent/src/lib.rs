//! What a workload links to be quiesced: it is asked to freeze before a cut and told to thaw behind it, and it can say
//! itself when a moment is good.
//!
//! [`attach`] gives a [`Session`], which [`Session::serve`] runs until the connection ends, and a [`Hinter`]. Whatever
//! ends it, the workload is thawed: a service that dies never leaves it frozen. A freeze that takes longer than the
//! service waits for is left off, and the service told so.
//!
//! ```no_run
//! use tidemark_agent::{Workload, attach};
//!
//! struct Database;
//!
//! impl Workload for Database {
//!     async fn freeze(&mut self, volume: &str) -> Result<(), String> {
//!         // Finish what is under way, flush, and begin nothing new.
//!         Ok(())
//!     }
//!
//!     async fn thaw(&mut self, volume: &str) {}
//! }
//!
//! # async fn run() -> Result<(), tidemark_agent::Error> {
//! let (session, _hinter) = attach("http://127.0.0.1:7401", "db", ["data"]).await?;
//! session.serve(&mut Database).await
//! # }
//! ```

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    pin::pin,
    time::{Duration, Instant},
};

use thiserror::Error;
use tidemark_proto::{
    Reason, RpcError,
    capture::v1::{
        AttachRequest, AttachResponse, Freeze, Frozen, Hello, Hint, Refused,
        attach_request::Message as ToService, attach_response::Message as FromService,
        coherence_client::CoherenceClient,
    },
    common::v1::Coherence,
};
pub use tidemark_tls::{Dialer, DialerFiles};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

/// Messages that wait to be sent.
const AHEAD: usize = 16;
/// A connection that is dead this long is noticed, and the workload thawed.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// How long the workload is held frozen without hearing from the service.
const HOLD_MAX: Duration = Duration::from_secs(30);

/// Why a session could not begin, or ended.
#[derive(Debug, Error)]
pub enum Error {
    /// The address is none.
    #[error("{0} is no address of a capture service: write https://HOST:PORT or http://HOST:PORT")]
    Address(String),
    /// The service said no: an unknown volume, too many agents.
    #[error(transparent)]
    Service(#[from] RpcError),
    /// The connection ended; attach again.
    #[error("the capture service is gone: attach again")]
    Gone,
    /// The service said what no service says.
    #[error("the capture service sent an empty message")]
    Protocol,
}

/// What is frozen and thawed. Volumes are named as they were to [`attach`].
pub trait Workload: Send {
    /// Makes the volume's content complete, flushes it, and holds still until [`Self::thaw`]. Leaving off in the middle
    /// (the future is dropped) must be possible; a thaw follows then, too.
    fn freeze(&mut self, volume: &str) -> impl Future<Output = Result<(), String>> + Send;

    /// Goes on. Comes after each freeze, also one that failed.
    fn thaw(&mut self, volume: &str) -> impl Future<Output = ()> + Send;
}

/// What became of a hint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hinted {
    /// Whether a cut was made.
    pub cut: bool,
    /// What it is worth: `quiesced` if all held still.
    pub coherence: Coherence,
    /// Why there was no cut, or a worse one.
    pub reason: String,
}

#[derive(Debug)]
struct Asked {
    volume: String,
    hold: Duration,
    answer: oneshot::Sender<Hinted>,
}

/// Says that a moment is good.
#[derive(Debug, Clone)]
pub struct Hinter(mpsc::Sender<Asked>);

impl Hinter {
    /// Says that the volume's content is complete and flushed now. The caller holds still until this returns, for at
    /// most `hold`.
    ///
    /// # Errors
    /// [`Error::Gone`] where the session has ended, or nothing was heard within `hold`.
    pub async fn hint(&self, volume: &str, hold: Duration) -> Result<Hinted, Error> {
        let (answer, answered) = oneshot::channel();
        let asked = Asked {
            volume: volume.to_owned(),
            hold,
            answer,
        };
        self.0.send(asked).await.map_err(|_| Error::Gone)?;
        match timeout(hold, answered).await {
            Ok(Ok(hinted)) => Ok(hinted),
            Ok(Err(_)) | Err(_) => Err(Error::Gone),
        }
    }
}

/// An agent that the service knows.
#[derive(Debug)]
pub struct Session {
    to: mpsc::Sender<AttachRequest>,
    from: Streaming<AttachResponse>,
    /// Came while the workload was freezing.
    before: VecDeque<FromService>,
    hints: mpsc::Receiver<Asked>,
}

/// Makes itself known to the capture service at `address` as the one who quiesces these volumes (names or UUIDs).
///
/// # Errors
/// Where the service can't be reached, or doesn't take the agent.
pub async fn attach(
    address: &str,
    name: &str,
    volumes: impl IntoIterator<Item = impl Into<String>>,
) -> Result<(Session, Hinter), Error> {
    attach_with(&Dialer::default(), address, name, volumes).await
}

/// As [`attach`], with TLS and a certificate or a token, as the capture service has them (`docs/SECURITY.md`): its role is
/// `source`, under the name of the capture service's source, or `operator`.
///
/// # Errors
/// As [`attach`]; [`Error::Service`] where one side refuses the other.
pub async fn attach_with(
    dialer: &Dialer,
    address: &str,
    name: &str,
    volumes: impl IntoIterator<Item = impl Into<String>>,
) -> Result<(Session, Hinter), Error> {
    let tune = |endpoint: Endpoint| {
        endpoint
            .connect_timeout(KEEPALIVE)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true)
    };
    let line = dialer
        .dial(address, tune)
        .await
        .map_err(|error| match error.reason {
            Reason::Unreachable => Error::Gone,
            Reason::RequestInvalid => Error::Address(address.to_owned()),
            _ => Error::Service(error),
        })?;
    let (to, messages) = mpsc::channel(AHEAD);
    let hello = Hello {
        name: name.to_owned(),
        volumes: volumes.into_iter().map(Into::into).collect(),
    };
    send(&to, ToService::Hello(hello)).await?;
    let answers = CoherenceClient::new(line)
        .attach(ReceiverStream::new(messages))
        .await
        .map_err(RpcError::from)?;
    let mut from = answers.into_inner();
    match next(&mut from).await? {
        FromService::Welcome(_) => {}
        _ => return Err(Error::Protocol),
    }
    let (hinter, hints) = mpsc::channel(1);
    let session = Session {
        to,
        from,
        before: VecDeque::new(),
        hints,
    };
    Ok((session, Hinter(hinter)))
}

async fn send(to: &mpsc::Sender<AttachRequest>, message: ToService) -> Result<(), Error> {
    let message = AttachRequest {
        message: Some(message),
    };
    to.send(message).await.map_err(|_| Error::Gone)
}

async fn next(from: &mut Streaming<AttachResponse>) -> Result<FromService, Error> {
    let message = from.message().await.map_err(RpcError::from)?;
    message.ok_or(Error::Gone)?.message.ok_or(Error::Protocol)
}

async fn heard(
    before: &mut VecDeque<FromService>,
    from: &mut Streaming<AttachResponse>,
) -> Result<FromService, Error> {
    match before.pop_front() {
        Some(message) => Ok(message),
        None => next(from).await,
    }
}

#[derive(Debug)]
struct Held {
    volume: String,
    until: Instant,
}

impl Session {
    /// Freezes and thaws the workload as the service asks, until the connection ends; always returns why it did.
    ///
    /// # Errors
    /// Always: [`Error::Gone`] mostly. The workload has been thawed.
    pub async fn serve(mut self, workload: &mut impl Workload) -> Result<(), Error> {
        let mut held = HashMap::new();
        let mut hinted = HashMap::new();
        let ended = self.answer(workload, &mut held, &mut hinted).await;
        for (_, held) in held {
            workload.thaw(&held.volume).await;
        }
        ended
    }

    async fn answer(
        &mut self,
        workload: &mut impl Workload,
        held: &mut HashMap<u64, Held>,
        hinted: &mut HashMap<u64, oneshot::Sender<Hinted>>,
    ) -> Result<(), Error> {
        let mut hints = 0;
        loop {
            let first = held
                .iter()
                .map(|(id, held)| (held.until, *id))
                .min()
                .unwrap_or((Instant::now() + HOLD_MAX, 0));
            let message = tokio::select! {
                message = heard(&mut self.before, &mut self.from) => message?,
                Some(asked) = self.hints.recv() => {
                    hints += 1;
                    // Those that nobody waits for any more.
                    hinted.retain(|_, answer: &mut oneshot::Sender<Hinted>| !answer.is_closed());
                    hinted.insert(hints, asked.answer);
                    let hint = Hint {
                        hint_id: hints,
                        volume: asked.volume,
                        hold_ms: u32::try_from(asked.hold.as_millis()).unwrap_or(u32::MAX),
                    };
                    send(&self.to, ToService::Hint(hint)).await?;
                    continue;
                }
                () = sleep_until(first.0.into()) => {
                    if let Some(Held { volume, .. }) = held.remove(&first.1) {
                        workload.thaw(&volume).await;
                        self.refuse(first.1, "it was held frozen for too long").await?;
                    }
                    continue;
                }
            };
            match message {
                FromService::Freeze(freeze) => match self.freeze(workload, &freeze).await? {
                    Ok(()) => {
                        let until = Instant::now() + HOLD_MAX;
                        let volume = freeze.volume;
                        held.insert(freeze.freeze_id, Held { volume, until });
                        let frozen = Frozen {
                            freeze_id: freeze.freeze_id,
                        };
                        send(&self.to, ToService::Frozen(frozen)).await?;
                    }
                    Err(why) => {
                        workload.thaw(&freeze.volume).await;
                        self.refuse(freeze.freeze_id, &why).await?;
                    }
                },
                FromService::Thaw(thaw) => {
                    if let Some(held) = held.remove(&thaw.freeze_id) {
                        workload.thaw(&held.volume).await;
                    }
                }
                FromService::Done(done) => {
                    if let Some(answer) = hinted.remove(&done.hint_id) {
                        let coherence = done.coherence();
                        // Whoever asked may have left off.
                        let _ = answer.send(Hinted {
                            cut: done.cut,
                            coherence,
                            reason: done.reason,
                        });
                    }
                }
                FromService::Welcome(_) => return Err(Error::Protocol),
            }
        }
    }

    /// Freezes, until that has ended, is late, or is no longer wanted.
    async fn freeze(
        &mut self,
        workload: &mut impl Workload,
        asked: &Freeze,
    ) -> Result<Result<(), String>, Error> {
        let limit = Duration::from_millis(asked.deadline_ms.into());
        let ended = {
            let mut frozen = pin!(timeout(limit, workload.freeze(&asked.volume)));
            loop {
                tokio::select! {
                    frozen = &mut frozen => {
                        break Ok(frozen.unwrap_or_else(|_| Err("it took too long".to_owned())));
                    }
                    message = next(&mut self.from) => match message {
                        Ok(FromService::Thaw(thaw)) if thaw.freeze_id == asked.freeze_id => {
                            break Ok(Err("it was left off".to_owned()));
                        }
                        Ok(message) => self.before.push_back(message),
                        Err(error) => break Err(error),
                    },
                }
            }
        };
        if ended.is_err() {
            workload.thaw(&asked.volume).await;
        }
        ended
    }

    async fn refuse(&self, freeze_id: u64, why: &str) -> Result<(), Error> {
        let refused = Refused {
            freeze_id,
            reason: why.to_owned(),
        };
        send(&self.to, ToService::Refused(refused)).await
    }
}
