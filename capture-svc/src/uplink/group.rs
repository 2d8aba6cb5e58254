//! Where the volumes of a group meet to be cut at one instant.
//!
//! A volume whose cut is due waits here until every other one of its group is ready too, that is, has nothing on its way;
//! the last one to come sets off the search for all. All are cut or none: a generation of the data without that of its
//! log would push a useful one out of those that are retained. So a volume that can't be cut holds up its whole group,
//! and it is said which one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use capture_core::coherence::Limits;
use parking_lot::Mutex;
use tidemark_block::Trigger;
use tidemark_telemetry::{Origin, traced};
use tokio::sync::{oneshot, watch};
use tracing::{Instrument, Span};

use super::search::{Found, Member, Want, find};
use crate::config::Groups;

/// A volume that waits for the others.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) member: Member,
    pub(super) limits: Limits,
    pub(super) answer: oneshot::Sender<Found>,
    /// Of its interval's trace, while it waits.
    pub(super) span: Span,
}

#[derive(Debug, Default)]
struct State {
    /// Volumes of the group that this service has.
    known: BTreeSet<String>,
    waiting: BTreeMap<String, Waiting>,
}

/// Volumes that are cut at one instant.
#[derive(Debug)]
pub(crate) struct Group {
    name: String,
    state: Mutex<State>,
    /// Why the cut that is waited for is due; none where none is.
    wanted: watch::Sender<Option<Trigger>>,
}

impl Group {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            state: Mutex::default(),
            wanted: watch::Sender::new(None),
        }
    }

    /// What the configuration calls it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Why one of its volumes waits for the others, while one does.
    pub(super) fn wanted(&self) -> watch::Receiver<Option<Trigger>> {
        self.wanted.subscribe()
    }

    /// A volume is ready. Once all are, they are cut together, on a task of its own.
    pub(super) fn join(&self, volume: &str, trigger: Trigger, waiting: Waiting) {
        let mut state = self.state.lock();
        state.known.insert(volume.to_owned());
        state.waiting.insert(volume.to_owned(), waiting);
        self.wanted.send_if_modified(|wanted| {
            let first = wanted.is_none();
            wanted.get_or_insert(trigger);
            first
        });
        self.set_off(&mut state);
    }

    /// A volume stops, and doesn't wait any more. False where the search has begun: its answer comes.
    pub(super) fn leave(&self, volume: &str) -> bool {
        self.state.lock().waiting.remove(volume).is_some()
    }

    /// The volumes that the others wait for.
    pub(super) fn awaited(&self) -> Vec<String> {
        let state = self.state.lock();
        let awaited = state.known.iter();
        awaited
            .filter(|volume| !state.waiting.contains_key(*volume))
            .cloned()
            .collect()
    }

    fn know(&self, volume: &str) {
        self.state.lock().known.insert(volume.to_owned());
    }

    fn forget(&self, volume: &str) {
        let mut state = self.state.lock();
        state.known.remove(volume);
        self.set_off(&mut state);
    }

    fn set_off(&self, state: &mut State) {
        if !state
            .known
            .iter()
            .all(|volume| state.waiting.contains_key(volume))
        {
            return;
        }
        let waiting = std::mem::take(&mut state.waiting);
        let Some(limits) = Limits::together(waiting.values().map(|waiting| waiting.limits)) else {
            return;
        };
        self.wanted.send_replace(None);
        let names: Vec<_> = waiting.keys().map(String::as_str).collect();
        // A trace of its own, as it belongs to all of them: each is linked with it.
        let span = traced!(parent: None, "group", group = self.name, volumes = names.join(","));
        let (members, answers): (Vec<_>, Vec<_>) = waiting
            .into_values()
            .map(|waiting| {
                for (from, to) in [(&waiting.span, &span), (&span, &waiting.span)] {
                    if let Some(origin) = Origin::of(to) {
                        origin.link(from);
                    }
                }
                (waiting.member, waiting.answer)
            })
            .unzip();
        tracing::debug!(parent: &span, "all are ready to be cut");
        let search = async move {
            let found = find(members, Want::intervals(limits), std::future::pending()).await;
            for (found, answer) in found.into_iter().zip(answers) {
                // An uplink waits for its answer to the end.
                let _ = answer.send(found);
            }
        };
        tokio::spawn(search.instrument(span));
    }
}

/// All groups of the service.
#[derive(Debug, Default)]
pub(crate) struct AllGroups(BTreeMap<String, Arc<Group>>);

impl AllGroups {
    /// As the configuration has them.
    pub(crate) fn new(groups: &Groups) -> Self {
        let mut by_volume = BTreeMap::new();
        for (name, volumes) in groups.iter() {
            let group = Arc::new(Group::new(name));
            for volume in volumes {
                by_volume.insert(volume.clone(), Arc::clone(&group));
            }
        }
        Self(by_volume)
    }

    /// The group of a volume.
    pub(crate) fn of(&self, volume: &str) -> Option<Arc<Group>> {
        self.0.get(volume).cloned()
    }

    /// The service has this volume: the others of its group wait for it from now on.
    pub(crate) fn know(&self, volume: &str) {
        if let Some(group) = self.0.get(volume) {
            group.know(volume);
        }
    }

    /// It was removed.
    pub(crate) fn forget(&self, volume: &str) {
        if let Some(group) = self.0.get(volume) {
            group.forget(volume);
        }
    }
}
