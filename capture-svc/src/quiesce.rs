//! Those who freeze and thaw a volume's workload, as the search for a moment asks them to.
//!
//! A freeze is asked for and answered later; thaws are told in the order given, one after the other, behind the
//! uplink's back. Nobody is asked to freeze again before the last thaw has ended. While the command may have frozen the
//! workload a mark lies in the volume's state directory: after a crash of this process the workload is thawed first.

pub(crate) mod agents;
mod command;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use capture_core::coherence::{Failure, Graded, Party};
use tidemark_block::{Epoch, VolumeId};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::config::CommandLine;
use agents::{Agent, Agents, AnswerTo, Hint, Order};

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

/// The members of a volume.
#[derive(Debug)]
pub(crate) struct Quiesce {
    settings: QuiesceSettings,
    volume: VolumeId,
    name: String,
    mark: PathBuf,
    /// Agents that hold still until a cut has been made, or will not be.
    hints: Vec<Hint>,
    members: Vec<Member>,
    answer: mpsc::UnboundedSender<(usize, Answer)>,
    answers: Answers,
    freezing: Option<JoinHandle<()>>,
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
            hints: Vec::new(),
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

    /// Who takes part in the search that begins, in the order in which they freeze.
    pub(crate) async fn gather(&mut self) -> Vec<Party> {
        self.settled().await;
        (self.answer, self.answers) = mpsc::unbounded_channel();
        self.members.clear();
        let mut parties = Vec::new();
        let now = Instant::now();
        let (live, late): (Vec<_>, Vec<_>) = self.hints.drain(..).partition(|h| h.until > now);
        for agent in self.settings.agents.of(self.volume) {
            let held = live.iter().rfind(|hint| Arc::ptr_eq(&hint.agent, &agent));
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
        for hint in late {
            hint.decline("it came too late");
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
                if let Err(error) = std::fs::write(&self.mark, []) {
                    let how = format!("the mark {} can't be written: {error}", self.mark.display());
                    let _ = self.answer.send((index, Err(Failure::Failed(how))));
                    return;
                }
                let (answer, call) = (self.answer.clone(), self.call(epoch, "freeze"));
                let pre = self.settings.pre.clone();
                self.freezing = Some(tokio::spawn(async move {
                    // The search knows when it is late.
                    let ended = command::run(&pre, &call, Duration::MAX).await;
                    let _ = answer.send((index, ended));
                }));
            }
        }
    }

    fn answer_to(&self, index: usize) -> AnswerTo {
        AnswerTo {
            index,
            answers: self.answer.clone(),
        }
    }

    /// An agent holds still for the next cut.
    pub(crate) fn hinted(&mut self, hint: Hint) {
        self.hints.push(hint);
    }

    /// No cut comes for those who hold still.
    pub(crate) fn decline_hints(&mut self, why: &'static str) {
        for hint in self.hints.drain(..) {
            hint.decline(why);
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
                            freezing.abort();
                            let _ = freezing.await;
                        }
                        let ended = command::run(&settings.post, &call, settings.time).await;
                        if let Err(failure) = ended {
                            tracing::error!(
                                ?failure,
                                "quiesce_post: the workload may still be frozen"
                            );
                        }
                        if let Err(error) = std::fs::remove_file(&mark) {
                            tracing::warn!(%error, mark = %mark.display(), "remove the mark of a freeze");
                        }
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
