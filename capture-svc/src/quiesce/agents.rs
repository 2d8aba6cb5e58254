//! Agents that are attached now, and what is between the service and one of them.
//!
//! Each agent has a session (`rpc/coherence.rs`), the one owner of its stream; here is what others say to it.
//! Whatever ends a session, every freeze that it has not been told to thaw fails, so that no search waits for it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use capture_core::coherence::{Failure, Graded};
use parking_lot::Mutex;
use tidemark_block::{Epoch, VolumeId};
use tokio::sync::mpsc;

use super::Answer;

/// The most agents of one volume.
pub(crate) const AGENTS_PER_VOLUME_MAX: usize = 16;

/// Where an answer goes: to the search that asked, with the number of the party.
#[derive(Debug, Clone)]
pub(crate) struct AnswerTo {
    pub(crate) index: usize,
    pub(crate) answers: mpsc::UnboundedSender<(usize, Answer)>,
}

impl AnswerTo {
    pub(crate) fn send(&self, answer: Answer) {
        // A search that is over doesn't hear it.
        let _ = self.answers.send((self.index, answer));
    }
}

/// What a session is told.
#[derive(Debug)]
pub(crate) enum Order {
    /// Ask to freeze.
    Freeze {
        freeze: u64,
        volume: VolumeId,
        limit: Duration,
        epoch: Epoch,
        answer: AnswerTo,
    },
    /// The agent holds still of its own accord; tell where it doesn't.
    Hold { freeze: u64, answer: AnswerTo },
    /// Tell to thaw.
    Thaw { freeze: u64 },
    /// The same, to one that held still of its own accord.
    Done {
        freeze: u64,
        hint: u64,
        graded: Result<Graded, &'static str>,
    },
}

/// An attached agent.
#[derive(Debug)]
pub(crate) struct Agent {
    name: String,
    /// With the names under which it knows them.
    volumes: BTreeMap<VolumeId, String>,
    orders: mpsc::UnboundedSender<Order>,
}

impl Agent {
    /// As reasons name it.
    pub(crate) fn title(&self) -> String {
        format!("agent {}", self.name)
    }

    /// Whether its session goes on.
    pub(crate) fn is_attached(&self) -> bool {
        !self.orders.is_closed()
    }

    /// The name under which it knows a volume.
    pub(crate) fn name_of(&self, volume: VolumeId) -> Option<&str> {
        self.volumes.get(&volume).map(String::as_str)
    }

    /// The volume that it knows under a name.
    pub(crate) fn volume_of(&self, name: &str) -> Option<VolumeId> {
        let mut volumes = self.volumes.iter();
        volumes.find(|(_, known)| *known == name).map(|(id, _)| *id)
    }

    /// Tells its session; one that has ended answers at once.
    pub(crate) fn tell(&self, order: Order) {
        if let Err(mpsc::error::SendError(
            Order::Freeze { answer, .. } | Order::Hold { answer, .. },
        )) = self.orders.send(order)
        {
            answer.send(Err(Failure::Gone));
        }
    }
}

/// An agent says that it holds still.
#[derive(Debug, Clone)]
pub(crate) struct Hint {
    pub(crate) agent: Arc<Agent>,
    pub(crate) hint: u64,
    /// Until when it does.
    pub(crate) until: Instant,
}

impl Hint {
    /// Tells that nothing came of it.
    pub(crate) fn decline(self, why: &'static str) {
        self.agent.tell(Order::Done {
            freeze: 0,
            hint: self.hint,
            graded: Err(why),
        });
    }
}

/// All agents, in the order in which they attached.
#[derive(Debug, Default)]
pub(crate) struct Agents {
    attached: Mutex<Vec<Arc<Agent>>>,
    freezes: AtomicU64,
}

impl Agents {
    /// Takes an agent in; none where one of its volumes has too many.
    pub(crate) fn attach(
        &self,
        name: String,
        volumes: BTreeMap<VolumeId, String>,
    ) -> Option<(Arc<Agent>, mpsc::UnboundedReceiver<Order>)> {
        let (orders, inbox) = mpsc::unbounded_channel();
        let mut attached = self.attached.lock();
        let is_full = |volume: &VolumeId| {
            let of = attached.iter().filter(|a| a.volumes.contains_key(volume));
            of.count() >= AGENTS_PER_VOLUME_MAX
        };
        if volumes.keys().any(is_full) {
            return None;
        }
        let agent = Arc::new(Agent {
            name,
            volumes,
            orders,
        });
        attached.push(Arc::clone(&agent));
        Some((agent, inbox))
    }

    /// Forgets one whose session has ended.
    pub(crate) fn detach(&self, agent: &Arc<Agent>) {
        self.attached.lock().retain(|a| !Arc::ptr_eq(a, agent));
    }

    /// Those of one volume.
    pub(crate) fn of(&self, volume: VolumeId) -> Vec<Arc<Agent>> {
        let attached = self.attached.lock();
        let of = attached.iter().filter(|a| a.volumes.contains_key(&volume));
        of.cloned().collect()
    }

    /// A number for a freeze, from 1.
    pub(crate) fn next_freeze(&self) -> u64 {
        self.freezes.fetch_add(1, Relaxed) + 1
    }
}
