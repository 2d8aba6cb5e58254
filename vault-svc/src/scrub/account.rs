//! What scrubs have found of one volume, as it is shown. Bounded, however much is damaged.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use parking_lot::Mutex;
use tidemark_block::GenerationId;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use vault_core::manifest::GENERATIONS_MAX;

use super::Progress;

/// Damaged objects that are remembered, of one volume; all of them are logged.
const DAMAGED_MAX: usize = 1024;
/// Damaged objects that a pass names.
pub(crate) const NAMED_MAX: usize = 1000;
/// Generations that are named with each of them.
pub(crate) const GENERATIONS_NAMED_MAX: usize = 64;

/// What needs the damaged part of an object beside the images of generations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NeededFor {
    Nothing,
    /// The vault's next start.
    Start,
    /// Opening the volume at the vault's next start.
    Volume,
    /// Making the checksum table anew, should it be lost.
    ChecksumTable,
    /// Knowing how long the newest image was current.
    CurrentThrough,
}

/// A damaged object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Damage {
    /// Its name in the store.
    pub(crate) object: String,
    /// What is wrong with it.
    pub(crate) problem: String,
    /// Retained generations that can't be read whole, ascending.
    pub(crate) generations: Vec<GenerationId>,
    /// How many there are beside those.
    pub(crate) more_generations: u64,
    pub(crate) needed_for: NeededFor,
    /// What it said has been written again.
    pub(crate) repaired: bool,
}

impl Damage {
    /// Damage that hits no image and is not repaired.
    pub(super) const fn new(object: String, problem: String, needed_for: NeededFor) -> Self {
        Self {
            object,
            problem,
            generations: Vec::new(),
            more_generations: 0,
            needed_for,
            repaired: false,
        }
    }

    /// With only so many generations that many such fit in memory and in a message.
    fn shortened(mut self) -> Self {
        let more = self.generations.len().saturating_sub(GENERATIONS_NAMED_MAX);
        self.generations.truncate(GENERATIONS_NAMED_MAX);
        self.generations.shrink_to_fit();
        self.more_generations += more as u64;
        self
    }
}

/// What a pass found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found {
    pub(crate) progress: Progress,
    /// Damaged objects, those that were repaired among them.
    pub(crate) damaged: u64,
    pub(crate) repaired: u64,
    /// The first of them.
    pub(crate) named: Vec<Damage>,
    /// All retained generations that can't be read whole.
    pub(crate) generations: BTreeSet<GenerationId>,
}

impl Found {
    pub(super) fn add(&mut self, damage: Damage) {
        self.damaged += 1;
        self.repaired += u64::from(damage.repaired);
        self.generations.extend(&damage.generations);
        while self.generations.len() > GENERATIONS_MAX {
            // No more are retained at a time, and the oldest are retired first.
            self.generations.pop_first();
        }
        if self.named.len() < NAMED_MAX {
            self.named.push(damage.shortened());
        }
    }
}

/// Counts since the service started.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ScrubCounts {
    /// Passes that came to their end.
    pub(crate) passes: u64,
    /// When the last one did, milliseconds since the Unix epoch; 0: none has.
    pub(crate) completed_ms: u64,
    /// Of the background's pass.
    pub(crate) progress: Progress,
    /// Objects that are damaged as far as known, and have not been repaired.
    pub(crate) damaged: u64,
    /// Generations that can't be read whole, as far as known.
    pub(crate) damaged_generations: u64,
    /// Objects that were written again.
    pub(crate) repaired: u64,
    /// Bytes that were read by any pass.
    pub(crate) bytes: u64,
    /// Passes that ended early.
    pub(crate) failures: u64,
}

/// The account of one volume.
#[derive(Debug, Default)]
pub(crate) struct Account {
    state: Mutex<State>,
    /// Held by the pass that somebody asked for.
    by_hand: Arc<AsyncMutex<()>>,
}

#[derive(Debug, Default)]
struct State {
    counts: ScrubCounts,
    damaged: BTreeMap<String, Known>,
    /// Generations that can't be read whole, each with the number of the newest pass when that was seen.
    generations: BTreeMap<GenerationId, u64>,
    begun: u64,
}

#[derive(Debug)]
struct Known {
    problem: String,
    /// The number of the newest pass when it was seen.
    seen: u64,
}

impl Account {
    /// Lets a pass by hand begin, unless there is one.
    pub(crate) fn by_hand(&self) -> Option<OwnedMutexGuard<()>> {
        Arc::clone(&self.by_hand).try_lock_owned().ok()
    }

    /// A pass begins; gives its number.
    pub(super) fn begin(&self) -> u64 {
        let mut state = self.state.lock();
        state.begun += 1;
        state.begun
    }

    /// A pass has seen everything: what neither it nor a later one has seen is no longer there.
    pub(super) fn end(&self, begun: u64, now_ms: u64) {
        let mut state = self.state.lock();
        state.damaged.retain(|_, known| known.seen >= begun);
        state.generations.retain(|_, seen| *seen >= begun);
        state.counts.passes += 1;
        state.counts.completed_ms = now_ms;
    }

    pub(super) fn progress(&self, progress: Progress) {
        self.state.lock().counts.progress = progress;
    }

    /// So many bytes were read.
    pub(super) fn read(&self, bytes: u64) {
        self.state.lock().counts.bytes += bytes;
    }

    /// A pass has ended early.
    pub(super) fn failed(&self) {
        self.state.lock().counts.failures += 1;
    }

    /// A damaged object has been written again.
    pub(super) fn repaired(&self, object: &str) {
        let mut state = self.state.lock();
        state.damaged.remove(object);
        state.counts.repaired += 1;
    }

    /// An object is as it was written, or has been written again, or deleted.
    pub(crate) fn sound(&self, object: &str) {
        self.state.lock().damaged.remove(object);
    }

    /// An object is damaged. True where that was not known.
    pub(super) fn damaged(&self, damage: &Damage) -> bool {
        let mut state = self.state.lock();
        let seen = state.begun;
        for generation in &damage.generations {
            state.generations.insert(*generation, seen);
        }
        while state.generations.len() > GENERATIONS_MAX {
            // No more are retained at a time, and the oldest are retired first.
            state.generations.pop_first();
        }
        let known = state.damaged.get(&damage.object);
        let news = known.is_none_or(|known| known.problem != damage.problem);
        if known.is_some() || state.damaged.len() < DAMAGED_MAX {
            let problem = damage.problem.clone();
            let known = Known { problem, seen };
            state.damaged.insert(damage.object.clone(), known);
        }
        news
    }

    /// Counts, as of now.
    pub(crate) fn counts(&self) -> ScrubCounts {
        let state = self.state.lock();
        let damaged = state.damaged.len() as u64;
        ScrubCounts {
            damaged,
            damaged_generations: match damaged {
                0 => 0,
                _ => state.generations.len() as u64,
            },
            ..state.counts
        }
    }

    /// Whether a generation is known not to be readable as a whole: until a pass has come to its end without finding
    /// that, or no damaged object is known any more.
    pub(crate) fn is_damaged(&self, generation: GenerationId) -> bool {
        let state = self.state.lock();
        !state.damaged.is_empty() && state.generations.contains_key(&generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damage(object: &str) -> Damage {
        Damage {
            generations: vec![GenerationId::new(7)],
            ..Damage::new(object.into(), "bytes".into(), NeededFor::Nothing)
        }
    }

    #[test]
    fn damage_is_news_once_and_forgotten_when_a_whole_pass_no_longer_sees_it() {
        let account = Account::default();
        let first = account.begin();
        assert!(account.damaged(&damage("a")));
        assert!(account.damaged(&damage("b")));
        assert!(!account.damaged(&damage("a")), "known");
        account.end(first, 1);
        assert_eq!(account.counts().damaged, 2);
        assert!(account.is_damaged(GenerationId::new(7)));
        let slow = account.begin();
        let quick = account.begin();
        assert!(!account.damaged(&damage("a")));
        account.end(quick, 2);
        assert_eq!(account.counts().damaged, 1, "b has gone");
        account.end(slow, 3);
        assert_eq!(account.counts().damaged, 1, "a was seen since it began");
        assert!(account.is_damaged(GenerationId::new(7)));
        account.sound("a");
        assert!(!account.is_damaged(GenerationId::new(7)));
        assert_eq!(
            (account.counts().passes, account.counts().completed_ms),
            (3, 3)
        );
    }

    #[test]
    fn a_generation_is_damaged_until_a_whole_pass_no_longer_sees_it() {
        let account = Account::default();
        let first = account.begin();
        account.damaged(&damage("a"));
        account.damaged(&Damage::new("b".into(), "bytes".into(), NeededFor::Nothing));
        account.end(first, 1);
        let second = account.begin();
        account.sound("a");
        account.damaged(&Damage::new("b".into(), "bytes".into(), NeededFor::Nothing));
        assert!(account.is_damaged(GenerationId::new(7)), "nobody knows yet");
        account.end(second, 2);
        assert!(!account.is_damaged(GenerationId::new(7)));
    }

    #[test]
    fn what_is_kept_is_bounded_and_what_is_left_out_is_counted() {
        let account = Account::default();
        let mut found = Found::default();
        account.begin();
        for object in 0..3_000_u64 {
            let damage = Damage {
                generations: (object..object + 1_024).map(GenerationId::new).collect(),
                ..damage(&format!("object {object}"))
            };
            account.damaged(&damage);
            found.add(damage);
        }
        assert_eq!((found.damaged, found.named.len()), (3_000, NAMED_MAX));
        for damage in &found.named {
            assert_eq!(damage.generations.len(), GENERATIONS_NAMED_MAX);
            assert_eq!(damage.more_generations, 1_024 - 64);
        }
        let newest = (3_000..4_023).map(GenerationId::new);
        assert_eq!(found.generations.len(), GENERATIONS_MAX);
        assert!(newest.clone().all(|id| found.generations.contains(&id)));
        let state = account.state.lock();
        assert_eq!(state.damaged.len(), DAMAGED_MAX);
        assert_eq!(state.generations.len(), GENERATIONS_MAX);
        assert!(newest.clone().all(|id| state.generations.contains_key(&id)));
    }

    #[test]
    fn one_pass_by_hand_runs_at_a_time() {
        let account = Account::default();
        let first = account.by_hand();
        assert!(first.is_some() && account.by_hand().is_none());
        drop(first);
        assert!(account.by_hand().is_some());
    }
}
