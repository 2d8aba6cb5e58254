//! What to do next for one volume's vault: the uplink's state machine.
//!
//! The driver performs one [`Action`] at a time and tells its end as an [`Event`]; everything that has to be decided
//! (retry, resume, give up, compare, stop) is decided here.
//!
//! ```text
//!            ┌────────────── failure: Wait, then again ──────────────┐
//!            ▼                                                       │
//!        StartTerm ─▶ head is our base? ──no──▶ AdoptHead ─▶ RepairTable
//!                            │ yes                               │
//!                            ▼                                   ▼
//!                         AwaitCut ─▶ Ship (header, resume, batches, seal) ─▶ receipt
//! ```
//!
//! Invariants: nothing ships before the vault's head is our base and the checksum table is that of the base; a table is
//! compared only with that of the vault's head; an interval whose cut was lost is never resumed; once fenced nothing
//! is asked of the vault any more.

use std::time::Duration;

use tidemark_block::{GenerationId, Head, ImageDigest, IntervalId};

use crate::interval::Backoff;

/// The interval that the durable record names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnInterval {
    /// There is none.
    None,
    /// Its cut can be read.
    Open(IntervalId),
    /// Its cut is gone (power loss, doubt): it may have been committed, but can't be resumed.
    Lost(IntervalId),
}

/// What is known at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// The last generation that the record names; 0 for the all-zero image.
    pub base: GenerationId,
    /// Its digest, where it is known.
    pub base_digest: Option<ImageDigest>,
    /// The interval under way.
    pub own: OwnInterval,
    /// Whether the checksum table is known to be that of the base.
    pub table_sound: bool,
}

/// What the driver has to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Connect, and ask for the writer term.
    StartTerm,
    /// Take the vault's head as base: give up an open interval, doubt every block if `doubt`, record the new base,
    /// with the table marked unsound.
    AdoptHead {
        /// None: the vault has no generation.
        head: Option<Head>,
        /// False where the head is our own interval, whose receipt was lost: what changed since its cut is tracked.
        doubt: bool,
    },
    /// Make the checksum table that of the base, by the vault's; differing blocks join the doubt.
    RepairTable,
    /// Give the interval up, if it is open, and forget it.
    DropInterval,
    /// Nothing is under way: wait for the next cut.
    AwaitCut,
    /// Ship or resume the interval until its receipt.
    Ship(IntervalId),
    /// Wait until then, or until somebody asks.
    Wait {
        /// In the clock of `now`.
        until: Duration,
    },
    /// Fenced: nothing more.
    Halt,
}

/// What a failed call means for the uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Another writer owns the volume.
    Fenced,
    /// Try again: connection, overload, a full or damaged store, a failing local disk.
    Transient,
    /// The vault's head isn't what we took it for: ask again.
    HeadMoved,
    /// Source and vault disagree about contents: compare the tables, cut anew.
    Mismatch,
    /// The vault won't have this interval: cut anew.
    Refused,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The term is ours.
    Granted {
        /// The vault's newest generation.
        head: Option<Head>,
    },
    /// The action failed. `jitter_permille` is random, 0 to 1000.
    Failed {
        /// What it means.
        failure: Failure,
        /// In thousandths.
        jitter_permille: u16,
    },
    /// The head is recorded as base.
    Adopted,
    /// The table is that of the base.
    TableRepaired,
    /// The table is not that of the base any more.
    TableLost,
    /// The interval is given up and forgotten.
    Dropped,
    /// A cut was made, and the interval's id is durable.
    CutMade(IntervalId),
    /// More of the interval is durable at the vault.
    Progressed,
    /// The interval is settled: recorded, released, applied. With no changes, the base is as before.
    Settled {
        /// The base from now on.
        base: GenerationId,
        /// Its digest.
        digest: ImageDigest,
    },
    /// The engine had no room for the interval's before-images any more.
    GivenUp,
    /// Somebody asks for an interval: don't wait any longer.
    Poked,
}

/// The state machine.
#[derive(Debug, Clone)]
pub struct Uplink {
    facts: Facts,
    backoff: Backoff,
    granted: bool,
    /// What the vault has, where it isn't our base.
    foreign_head: Option<(Option<Head>, bool)>,
    drop: bool,
    fenced: bool,
    attempt: u32,
    wait_until: Option<Duration>,
}

impl Uplink {
    /// Starts from what the records say.
    #[must_use]
    pub const fn new(facts: Facts, backoff: Backoff) -> Self {
        Self {
            facts,
            backoff,
            granted: false,
            foreign_head: None,
            drop: false,
            fenced: false,
            attempt: 0,
            wait_until: None,
        }
    }

    /// What it goes by.
    #[must_use]
    pub const fn facts(&self) -> &Facts {
        &self.facts
    }

    /// What to do now.
    #[must_use]
    pub fn next(&self, now: Duration) -> Action {
        if self.fenced {
            return Action::Halt;
        }
        // Local and free: gives the spool its room back before anything waits.
        if self.drop {
            return Action::DropInterval;
        }
        if let Some(until) = self.wait_until.filter(|until| now < *until) {
            return Action::Wait { until };
        }
        if !self.granted {
            return Action::StartTerm;
        }
        if let Some((head, doubt)) = self.foreign_head {
            return Action::AdoptHead { head, doubt };
        }
        if let OwnInterval::Lost(_) = self.facts.own {
            return Action::DropInterval;
        }
        if !self.facts.table_sound {
            return Action::RepairTable;
        }
        match self.facts.own {
            OwnInterval::Open(interval) => Action::Ship(interval),
            OwnInterval::None | OwnInterval::Lost(_) => Action::AwaitCut,
        }
    }

    /// Takes note of what happened.
    pub fn on(&mut self, now: Duration, event: Event) {
        match event {
            Event::Granted { head } => self.granted(head),
            Event::Failed {
                failure,
                jitter_permille,
            } => self.failed(now, failure, jitter_permille),
            Event::Adopted => {
                if let Some((head, _)) = self.foreign_head.take() {
                    self.facts = Facts {
                        base: head.map_or(GenerationId::ZERO, |h| h.generation),
                        base_digest: head.map(|h| h.digest),
                        own: OwnInterval::None,
                        table_sound: false,
                    };
                }
            }
            Event::TableRepaired => self.facts.table_sound = true,
            Event::TableLost => self.facts.table_sound = false,
            Event::Dropped | Event::GivenUp => {
                self.drop = false;
                self.facts.own = OwnInterval::None;
            }
            Event::CutMade(interval) => self.facts.own = OwnInterval::Open(interval),
            Event::Progressed => self.attempt = 0,
            Event::Settled { base, digest } => {
                self.facts.base = base;
                self.facts.base_digest = Some(digest);
                self.facts.own = OwnInterval::None;
                self.attempt = 0;
            }
            Event::Poked => self.wait_until = None,
        }
    }

    fn granted(&mut self, head: Option<Head>) {
        self.granted = true;
        self.wait_until = None;
        let base = match head {
            None => self.facts.base == GenerationId::ZERO,
            Some(head) => {
                head.generation == self.facts.base
                    && self.facts.base_digest.is_none_or(|d| d == head.digest)
            }
        };
        let own = head.map(|head| head.interval);
        self.foreign_head = match self.facts.own {
            _ if base => None,
            // Sending its header again brings the receipt. But the interval goes with the table of the base that it was
            // cut from, and the vault gives away that of its head only.
            OwnInterval::Open(id) if own == Some(id) && self.facts.table_sound => None,
            OwnInterval::Open(id) | OwnInterval::Lost(id) if own == Some(id) => Some((head, false)),
            _ => Some((head, true)),
        };
    }

    fn failed(&mut self, now: Duration, failure: Failure, jitter_permille: u16) {
        self.granted = false;
        self.attempt = self.attempt.saturating_add(1);
        let jitter = f64::from(jitter_permille) / 1000.0;
        self.wait_until = Some(now + self.backoff.wait(self.attempt, jitter));
        let open = matches!(self.facts.own, OwnInterval::Open(_));
        match failure {
            Failure::Fenced => self.fenced = true,
            Failure::Transient | Failure::HeadMoved => {}
            Failure::Mismatch => {
                self.drop = open;
                self.facts.table_sound = false;
            }
            Failure::Refused => self.drop = open,
        }
    }
}

#[cfg(test)]
mod tests;
