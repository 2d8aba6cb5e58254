//! Those who freeze and thaw a volume's workload, as the search for a moment asks them to.
//!
//! A freeze is asked for and answered later; thaws are told in the order given, one after the other, behind the
//! uplink's back. Nobody is asked to freeze again before the last thaw has ended. While the command may have frozen the
//! workload a mark lies in the volume's state directory: after a crash of this process the workload is thawed first.

pub(crate) mod agents;
mod command;
mod hints;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use capture_core::coherence::{Failure, Graded, Party};
use tidemark_block::{Epoch, VolumeId};
use tidemark_disk::durable;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use crate::{config::CommandLine, uplink::blocking};
use agents::{Agent, Agents, AnswerTo, Hint, Order};
pub(crate) use hints::Hints;

/// What is told of quiescing a volume.
#[derive(Debug, Clone)]
pub(crate) struct QuiesceSettings {
    /// Freezes; may be empty.
    pub(crate) pre: CommandLine,
    /// Lets go on.
    pub(crate) post: CommandLine,
    /// What a freeze may take, and each command.
    pub(crate) time: Duration,
    /// All of the service.
    pub(crate) agents: Arc<Agents>,
}

/// What became of a freeze.
pub(crate) type Answer = Result<(), Failure>;

/// The answers of one search; those of an earlier one are not heard any more.
type Answers = mpsc::UnboundedReceiver<(usize, Answer)>;

#[derive(Debug, Clone)]
enum Member {
    Command,
    Agent {
        agent: Arc<Agent>,
        freeze: u64,
        /// It holds still of its own accord.
        hint: Option<u64>,
    },
}

/// A run of the command that freezes.
#[derive(Debug)]
struct Freezing {
    leave_off: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Freezing {
    /// Kills the command if it still runs.
    async fn end(self) {
        // A receiver that is gone has ended by itself.
        let _ = self.leave_off.send(());
        if let Err(error) = self.task.await {
            tracing::error!(%error, "run quiesce_pre");
        }
    }
}

/// The members of a volume.
#[derive(Debug)]
pub(crate) struct Quiesce {
    settings: QuiesceSettings,
    volume: VolumeId,
    name: String,
    mark: PathBuf,
    members: Vec<Member>,
    answer: mpsc::UnboundedSender<(usize, Answer)>,
    answers: Answers,
    freezing: Option<Freezing>,
    thawing: Option<JoinHandle<()>>,
}

impl Quiesce {
    /// Of a volume with its state in `dir`. Where an earlier process may have left it frozen it is thawed.
    pub(crate) fn new(settings: QuiesceSettings, volume: VolumeId, name: &str, dir: &Path) -> Self {
        let (answer, answers) = mpsc::unbounded_channel();
        let mut quiesce = Self {
            settings,
            volume,
            name: name.to_owned(),
            mark: dir.join("frozen"),
            members: Vec::new(),
            answer,
            answers,
            freezing: None,
            thawing: None,
        };
        if quiesce.mark.exists() {
            tracing::warn!("the workload may have been left frozen: it is thawed");
            quiesce.members.push(Member::Command);
            quiesce.thaw(&[0], Epoch::ZERO, None);
        }
        quiesce
    }

    /// Who takes part in the search that begins, in the order in which they freeze. `held`: agents that hold still.
    pub(crate) async fn gather(&mut self, held: &[Hint]) -> Vec<Party> {
        self.settled().await;
        (self.answer, self.answers) = mpsc::unbounded_channel();
        self.members.clear();
        let mut parties = Vec::new();
        for agent in self.settings.agents.of(self.volume) {
            let held = held.iter().find(|hint| Arc::ptr_eq(&hint.agent, &agent));
            let hint = held.map(|held| held.hint);
            let freeze = self.settings.agents.next_freeze();
            if hint.is_some() {
                let answer = self.answer_to(self.members.len());
                agent.tell(Order::Hold { freeze, answer });
            }
            parties.push(Party {
                name: agent.title(),
                time: self.settings.time,
                holds: hint.is_some(),
            });
            self.members.push(Member::Agent {
                agent,
                freeze,
                hint,
            });
        }
        if !self.settings.pre.is_empty() {
            self.members.push(Member::Command);
            parties.push(Party {
                name: "quiesce_pre".to_owned(),
                time: self.settings.time,
                holds: false,
            });
        }
        parties
    }

    /// Asks a member to freeze; [`Self::answered`] gives its answer.
    pub(crate) fn freeze(&mut self, index: usize, epoch: Epoch) {
        match &self.members[index] {
            Member::Agent { agent, freeze, .. } => agent.tell(Order::Freeze {
                freeze: *freeze,
                volume: self.volume,
                limit: self.settings.time,
                epoch,
                answer: self.answer_to(index),
            }),
            Member::Command => {
                let (answer, call) = (self.answer_to(index), self.call(epoch, "freeze"));
                let (pre, mark) = (self.settings.pre.clone(), self.mark.clone());
                let (leave_off, left_off) = oneshot::channel();
                let freeze = async move {
                    if let Err(failure) = put_mark(mark).await {
                        return answer.send(Err(failure));
                    }
                    tokio::select! {
                        _ = left_off => {}
                        // The search knows when it is late.
                        ended = command::run(&pre, &call, Duration::MAX) => answer.send(ended),
                    }
                };
                let task = tokio::spawn(freeze);
                self.freezing = Some(Freezing { leave_off, task });
            }
        }
    }

    fn answer_to(&self, index: usize) -> AnswerTo {
        AnswerTo {
            index,
            answers: self.answer.clone(),
        }
    }

    /// The next answer.
    pub(crate) async fn answered(&mut self) -> (usize, Answer) {
        match self.answers.recv().await {
            Some(answer) => answer,
            // Never: this has a sender of its own.
            None => std::future::pending().await,
        }
    }

    /// An answer that is there already.
    pub(crate) fn answered_now(&mut self) -> Option<(usize, Answer)> {
        self.answers.try_recv().ok()
    }

    /// Tells members to thaw, in this order. Does not wait for it. `graded`: of the cut that was made.
    pub(crate) fn thaw(&mut self, indices: &[usize], epoch: Epoch, graded: Option<&Graded>) {
        if indices.is_empty() {
            return;
        }
        let members: Vec<_> = indices
            .iter()
            .map(|&index| self.members[index].clone())
            .collect();
        let graded = graded.cloned();
        let (settings, mark) = (self.settings.clone(), self.mark.clone());
        let call = self.call(epoch, "thaw");
        let (mut freezing, before) = (self.freezing.take(), self.thawing.take());
        let span = tracing::Span::current();
        let thawing = async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            for member in members {
                match member {
                    Member::Agent {
                        agent,
                        freeze,
                        hint: None,
                    } => agent.tell(Order::Thaw { freeze }),
                    Member::Agent {
                        agent,
                        freeze,
                        hint: Some(hint),
                    } => agent.tell(Order::Done {
                        freeze,
                        hint,
                        graded: graded.clone().ok_or("no cut was made"),
                    }),
                    Member::Command => {
                        if let Some(freezing) = freezing.take() {
                            freezing.end().await;
                        }
                        let ended = command::run(&settings.post, &call, settings.time).await;
                        if let Err(failure) = ended {
                            tracing::error!(
                                ?failure,
                                "quiesce_post: the workload may still be frozen"
                            );
                        }
                        take_mark(mark.clone()).await;
                    }
                }
            }
        };
        self.thawing = Some(tokio::spawn(tracing::Instrument::instrument(thawing, span)));
    }

    /// Waits until everyone has been thawed.
    pub(crate) async fn settled(&mut self) {
        if let Some(thawing) = self.thawing.take()
            && let Err(error) = thawing.await
        {
            tracing::error!(%error, "thaw the workload");
        }
    }

    fn call(&self, epoch: Epoch, phase: &'static str) -> command::Call {
        command::Call {
            volume: self.name.clone(),
            epoch,
            phase,
        }
    }
}

/// Marks that the workload may be frozen, durably, before it is.
async fn put_mark(mark: PathBuf) -> Result<(), Failure> {
    let path = mark.clone();
    let put = blocking(move || Ok(durable::write_file(&mark, &[])?)).await;
    put.map_err(|error| {
        Failure::Failed(format!(
            "the mark {} can't be written: {error:#}",
            path.display()
        ))
    })
}

/// Takes the mark off. One that stays costs a needless thaw at the next start.
async fn take_mark(mark: PathBuf) {
    let path = mark.clone();
    if let Err(error) = blocking(move || Ok(durable::remove_file(&mark)?)).await {
        tracing::warn!(error = %format!("{error:#}"), mark = %path.display(), "remove the mark of a freeze");
    }
}
