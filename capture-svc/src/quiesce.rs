//! Those who freeze and thaw a volume's workload, as the search for a moment asks them to.
//!
//! A freeze is asked for and answered later; thaws are told in the order given, one after the other, behind the
//! uplink's back. Nobody is asked to freeze again before the last thaw has ended. While the command may have frozen the
//! workload a mark lies in the volume's state directory: after a crash of this process the workload is thawed first.

mod command;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use capture_core::coherence::{Failure, Party};
use tidemark_block::Epoch;
use tokio::{sync::mpsc, task::JoinHandle};

use crate::config::CommandLine;

/// What is told of quiescing a volume.
#[derive(Debug, Clone)]
pub(crate) struct QuiesceSettings {
    /// Freezes; may be empty.
    pub(crate) pre: CommandLine,
    /// Lets go on.
    pub(crate) post: CommandLine,
    /// What a freeze may take, and each command.
    pub(crate) time: Duration,
}

/// What became of a freeze.
pub(crate) type Answer = Result<(), Failure>;

/// The answers of one search; those of an earlier one are not heard any more.
type Answers = mpsc::UnboundedReceiver<(usize, Answer)>;

#[derive(Debug, Clone, Copy)]
enum Member {
    Command,
}

/// The members of a volume.
#[derive(Debug)]
pub(crate) struct Quiesce {
    settings: QuiesceSettings,
    volume: String,
    mark: PathBuf,
    members: Vec<Member>,
    answer: mpsc::UnboundedSender<(usize, Answer)>,
    answers: Answers,
    freezing: Option<JoinHandle<()>>,
    thawing: Option<JoinHandle<()>>,
}

impl Quiesce {
    /// Of a volume with its state in `dir`. Where an earlier process may have left it frozen it is thawed.
    pub(crate) fn new(settings: QuiesceSettings, volume: &str, dir: &Path) -> Self {
        let (answer, answers) = mpsc::unbounded_channel();
        let mut quiesce = Self {
            settings,
            volume: volume.to_owned(),
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
            quiesce.thaw(&[0], Epoch::ZERO);
        }
        quiesce
    }

    /// Who takes part in the search that begins, in the order in which they freeze.
    pub(crate) async fn gather(&mut self) -> Vec<Party> {
        self.settled().await;
        (self.answer, self.answers) = mpsc::unbounded_channel();
        self.members.clear();
        let mut parties = Vec::new();
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
        match self.members[index] {
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

    /// Tells members to thaw, in this order. Does not wait for it.
    pub(crate) fn thaw(&mut self, indices: &[usize], epoch: Epoch) {
        if indices.is_empty() {
            return;
        }
        let members: Vec<_> = indices.iter().map(|&index| self.members[index]).collect();
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
            volume: self.volume.clone(),
            epoch,
            phase,
        }
    }
}
