//! What scrubs have found of one volume, as it is shown.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tidemark_block::GenerationId;

use super::Progress;

/// Damaged objects that are remembered, of one volume; all of them are logged.
const DAMAGED_MAX: usize = 1024;

/// A damaged object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Damage {
    /// Its name in the store.
    pub(crate) object: String,
    /// What is wrong with it.
    pub(crate) problem: String,
    /// Retained generations that can't be read whole.
    pub(crate) generations: Vec<GenerationId>,
    /// What it said has been written again.
    pub(crate) repaired: bool,
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
    /// Objects that are damaged as far as known.
    pub(crate) damaged: u64,
}

/// The account of one volume.
#[derive(Debug, Default)]
pub(crate) struct Account {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    counts: ScrubCounts,
    /// With the number of the newest pass when it was seen.
    damaged: BTreeMap<String, (Damage, u64)>,
    begun: u64,
}

impl Account {
    /// A pass begins; gives its number.
    pub(super) fn begin(&self) -> u64 {
        let mut state = self.state.lock();
        state.begun += 1;
        state.begun
    }

    /// A pass has seen everything: what neither it nor a later one has seen is no longer there.
    pub(super) fn end(&self, begun: u64, now_ms: u64) {
        let mut state = self.state.lock();
        state.damaged.retain(|_, (_, seen)| *seen >= begun);
        state.counts.passes += 1;
        state.counts.completed_ms = now_ms;
    }

    pub(super) fn progress(&self, progress: Progress) {
        self.state.lock().counts.progress = progress;
    }

    /// An object is as it was written.
    pub(super) fn sound(&self, object: &str) {
        self.state.lock().damaged.remove(object);
    }

    /// An object is damaged. True where that was not known.
    pub(super) fn damaged(&self, damage: Damage) -> bool {
        let mut state = self.state.lock();
        let seen = state.begun;
        let known = state.damaged.get(&damage.object);
        let news = known.is_none_or(|(known, _)| *known != damage);
        if known.is_some() || state.damaged.len() < DAMAGED_MAX {
            state.damaged.insert(damage.object.clone(), (damage, seen));
        }
        news
    }

    /// Counts, as of now.
    pub(crate) fn counts(&self) -> ScrubCounts {
        let state = self.state.lock();
        ScrubCounts {
            damaged: state.damaged.len() as u64,
            ..state.counts
        }
    }

    /// Whether a generation is known not to be readable as a whole.
    pub(crate) fn is_damaged(&self, generation: GenerationId) -> bool {
        self.state
            .lock()
            .damaged
            .values()
            .any(|(damage, _)| damage.generations.contains(&generation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damage(object: &str) -> Damage {
        Damage {
            object: object.into(),
            problem: "bytes".into(),
            generations: vec![GenerationId::new(7)],
            repaired: false,
        }
    }

    #[test]
    fn damage_is_news_once_and_forgotten_when_a_whole_pass_no_longer_sees_it() {
        let account = Account::default();
        let first = account.begin();
        assert!(account.damaged(damage("a")));
        assert!(account.damaged(damage("b")));
        assert!(!account.damaged(damage("a")), "known");
        account.end(first, 1);
        assert_eq!(account.counts().damaged, 2);
        assert!(account.is_damaged(GenerationId::new(7)));
        let slow = account.begin();
        let quick = account.begin();
        assert!(!account.damaged(damage("a")));
        account.end(quick, 2);
        assert_eq!(account.counts().damaged, 1, "b has gone");
        account.end(slow, 3);
        assert_eq!(account.counts().damaged, 1, "a was seen since it began");
        account.sound("a");
        assert!(!account.is_damaged(GenerationId::new(7)));
        assert_eq!(
            (account.counts().passes, account.counts().completed_ms),
            (3, 3)
        );
    }
}
