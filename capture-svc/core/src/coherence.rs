//! The best moment for a cut that is wanted: the coherence controller of one volume.
//!
//! The interval controller says that a cut is due; a [`Search`] then looks for a moment at which the image is worth
//! most to the workload, and says afterwards what it was worth. In this order:
//!
//! 1. **quiesced**: everyone who can freeze the workload (agents in the order in which they attached, then the
//!    command) is asked, one after the other, each within a time of its own; the cut is made as soon as no write is
//!    under way. No write may have begun since then and before the flip.
//! 2. **flushed**: every write was followed by a completed flush and none has begun since, for at least `lull_min`.
//! 3. **lull**: no write for `lull_min`. A flush mostly comes soon after the last write or not at all, so it is
//!    waited for until the pause is [`FLUSH_PATIENCE`] times as long.
//! 4. **crash**: at the end of `lull_wait_max` the cut is made anyway.
//!
//! What is kept to, whatever happens: one search makes at most one cut; whoever was asked to freeze is told to thaw,
//! once, in reverse order; a search takes at most the times of the freezes and `lull_wait_max`; a grade is never
//! better than what was observed, and what counts is what had happened at the flip, not at the look before it.
//!
//! Where writes don't pass through the engine nothing is looked for: a cut is quiesced, on the word of those who hold
//! still, or it is a crash.
//!
//! Times are durations since any fixed moment of a monotonic clock.

use std::{fmt, time::Duration};

use tidemark_block::{Coherence, CutReason};

/// How many times `lull_min` a pause lasts before its last write is taken not to be flushed soon.
pub const FLUSH_PATIENCE: u32 = 4;
/// The shortest time between two looks.
const LOOK_PERIOD_MIN: Duration = Duration::from_millis(1);

/// What a search keeps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest search for a flush or a lull; also the longest wait for writes under way once all have frozen.
    pub lull_wait_max: Duration,
    /// So long without a write is a lull.
    pub lull_min: Duration,
    /// What is done where the workload can't be quiesced.
    pub on_failure: OnFailure,
}

impl Limits {
    /// What a search for several volumes keeps to: no cut is made that one of them doesn't want.
    #[must_use]
    pub fn together(all: impl IntoIterator<Item = Self>) -> Option<Self> {
        all.into_iter().reduce(|one, other| Self {
            on_failure: match (one.on_failure, other.on_failure) {
                (OnFailure::Cut, OnFailure::Cut) => OnFailure::Cut,
                _ => OnFailure::Skip,
            },
            ..one
        })
    }
}

/// What is done where the workload can't be quiesced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    /// The next best moment is looked for.
    Cut,
    /// No cut: the next want tries again.
    Skip,
}

/// Somebody who can freeze the workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// As reasons name it: `agent db`, `quiesce_pre`.
    pub name: String,
    /// How long it may take to freeze.
    pub time: Duration,
    /// It holds still already, of its own accord: it is not asked to freeze, but told to thaw.
    pub holds: bool,
}

/// What the data path has done, at one look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// Writes, trims and zeroings that have begun.
    pub begun: u64,
    /// One of them has not ended.
    pub in_flight: bool,
    /// All of them were followed by a completed flush.
    pub flushed: bool,
    /// When the last one ended; none where there was none.
    pub last_write: Option<Duration>,
    /// Writes don't pass through the engine: the other fields say nothing.
    pub unseen: bool,
}

impl Seen {
    /// By an engine through which no write passes.
    pub const NOTHING: Self = Self {
        begun: 0,
        in_flight: false,
        flushed: false,
        last_write: None,
        unseen: true,
    };

    /// What was seen of two volumes that are cut together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            begun: self.begun + other.begun,
            in_flight: self.in_flight || other.in_flight,
            flushed: self.flushed && other.flushed,
            last_write: self.last_write.max(other.last_write),
            unseen: self.unseen || other.unseen,
        }
    }

    /// For how long there has been no write.
    fn quiet(&self, now: Duration) -> Duration {
        match self.last_write {
            _ if self.in_flight => Duration::ZERO,
            Some(last) => now.saturating_sub(last),
            None => Duration::MAX,
        }
    }
}

/// Why a party did not hold still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It said no, and why.
    Refused(String),
    /// It is gone.
    Gone,
    /// It did not answer in its time.
    Late(Duration),
    /// It failed, and how.
    Failed(String),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Look,
    /// The party of this number holds still.
    Frozen(usize),
    /// The party of this number does not, or no longer.
    Failed(usize, Failure),
    /// The cut has been made. What was seen is as of right after its flip.
    CutMade,
    /// The cut could not be made.
    CutFailed,
    /// There is no time for it any more: the service stops.
    Abandoned,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Ask the party of this number to freeze.
    Freeze(usize),
    /// Tell the party of this number to thaw; if it is still freezing, to leave off.
    Thaw(usize),
    /// Cut now, then tell [`Event::CutMade`] or [`Event::CutFailed`].
    Cut,
    /// What the cut is worth.
    Graded(Graded),
    /// No cut is made for this want.
    Skip(Why),
}

/// One reason why a cut is worth no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// There is no agent and no command.
    NothingQuiesces,
    /// A party did not hold still.
    Party {
        /// Which.
        name: String,
        /// Why.
        failure: Failure,
    },
    /// Everyone had frozen, and yet there were writes.
    WritesWhileFrozen,
    /// The last write was not flushed.
    NotFlushed,
    /// No pause of this length in this time.
    NoPause {
        /// `lull_min`.
        lull_min: Duration,
        /// How long it was looked for.
        waited: Duration,
    },
    /// There was a pause, and a write ended it just before the cut.
    WriteAtCut,
    /// Writes don't pass through the engine.
    WritesUnseen,
    /// Whoever wanted the cut wanted it at once.
    AtOnce,
    /// It is what a rollback keeps: no client is connected, and nobody is asked.
    ForRollback,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NothingQuiesces => f.write_str("no agent or command quiesces the workload"),
            Self::Party { name, failure } => match failure {
                Failure::Refused(why) if why.is_empty() => write!(f, "{name} refused to freeze"),
                Failure::Refused(why) => write!(f, "{name} refused to freeze: {why}"),
                Failure::Gone => write!(f, "{name} went away"),
                Failure::Late(time) => write!(f, "{name} did not answer within {time:?}"),
                Failure::Failed(how) => write!(f, "{name} failed: {how}"),
            },
            Self::WritesWhileFrozen => f.write_str("writes went on while all were frozen"),
            Self::NotFlushed => f.write_str("the last write was not flushed"),
            Self::NoPause { lull_min, waited } if waited.is_zero() => {
                write!(f, "the last write was less than {lull_min:?} ago")
            }
            Self::NoPause { lull_min, waited } => {
                let waited =
                    Duration::from_millis(u64::try_from(waited.as_millis()).unwrap_or(u64::MAX));
                write!(f, "writes without a pause of {lull_min:?} for {waited:?}")
            }
            Self::WritesUnseen => f.write_str("the engine does not see writes"),
            Self::AtOnce => f.write_str("it was to be made at once"),
            Self::ForRollback => f.write_str("it was made for a rollback, without a client"),
            Self::WriteAtCut => f.write_str("a write began just before the cut"),
        }
    }
}

/// What a cut is worth, and why no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graded {
    /// The grade.
    pub coherence: Coherence,
    /// Why it is no better, for each better grade in turn; empty for the best one.
    pub why: Vec<Why>,
}

impl Graded {
    /// Of what a rollback keeps of a volume. No client is connected, so no write ends a pause; how long one has lasted is
    /// not looked at.
    #[must_use]
    pub fn for_rollback(seen: Seen) -> Self {
        let mut why = vec![Why::ForRollback];
        if seen.flushed {
            return Self {
                coherence: Coherence::Flushed,
                why,
            };
        }
        why.push(Why::NotFlushed);
        Self {
            coherence: Coherence::Crash,
            why,
        }
    }

    /// The reasons as one line.
    #[must_use]
    pub fn reason(&self) -> CutReason {
        let texts: Vec<_> = self.why.iter().map(ToString::to_string).collect();
        CutReason::new(&texts.join("; "))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Party `index` is to answer by then.
    Freezing {
        index: usize,
        until: Duration,
    },
    /// All hold still; a write is still under way.
    Holding {
        until: Duration,
    },
    /// For a flush or a lull.
    Searching {
        since: Duration,
        until: Duration,
    },
    /// The cut is being made. `quiet`: there was a lull at the look before it.
    Cutting {
        begun: u64,
        quiet: bool,
        waited: Duration,
    },
    Over,
}

/// One want's search.
#[derive(Debug, Clone)]
pub struct Search {
    limits: Limits,
    parties: Vec<Party>,
    /// So many of them, from the first, were asked, or hold.
    asked: usize,
    /// They, and all who hold, were told to thaw.
    thawed: bool,
    /// Writes begun when all held still and none was under way.
    frozen_at: Option<u64>,
    /// Why it can't be quiesced.
    shortfall: Option<Why>,
    state: State,
    wake: Option<Duration>,
}

impl Search {
    /// Begins at `now`. Parties freeze in their order.
    #[must_use]
    pub fn begin(
        now: Duration,
        seen: Seen,
        limits: Limits,
        parties: Vec<Party>,
    ) -> (Self, Vec<Effect>) {
        let shortfall = parties.is_empty().then_some(Why::NothingQuiesces);
        let mut search = Self::new(limits, parties, shortfall);
        let mut effects = Vec::new();
        if search.parties.is_empty() {
            search.seek(now, seen, &mut effects);
        } else {
            search.freeze_next(now, seen, &mut effects);
        }
        (search, effects)
    }

    /// Looks for nothing: the cut is made at once, whoever could quiesce the workload, and graded all the same.
    #[must_use]
    pub fn at_once(now: Duration, seen: Seen, limits: Limits) -> (Self, Vec<Effect>) {
        let limits = Limits {
            lull_wait_max: Duration::ZERO,
            ..limits
        };
        let mut search = Self::new(limits, Vec::new(), Some(Why::AtOnce));
        let mut effects = Vec::new();
        search.seek(now, seen, &mut effects);
        (search, effects)
    }

    const fn new(limits: Limits, parties: Vec<Party>, shortfall: Option<Why>) -> Self {
        Self {
            limits,
            parties,
            asked: 0,
            thawed: false,
            frozen_at: None,
            shortfall,
            state: State::Over,
            wake: None,
        }
    }

    /// Who takes part.
    #[must_use]
    pub fn parties(&self) -> &[Party] {
        &self.parties
    }

    /// Whether there is somebody to hold the workload still, and everyone does as far as is known.
    #[must_use]
    pub const fn is_held(&self) -> bool {
        self.frozen_at.is_some()
    }

    /// When it wants to look though nothing happens; none while it waits for a cut, and when it is over.
    #[must_use]
    pub const fn wake(&self) -> Option<Duration> {
        self.wake
    }

    /// Whether nothing more is to be done.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Takes note of what happened, and says what to do. `seen` is as of `now`.
    #[must_use]
    pub fn on(&mut self, now: Duration, seen: Seen, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match (event, self.state) {
            (_, State::Over) => {}
            (Event::Look, _) => self.look(now, seen, &mut effects),
            (
                Event::Frozen(index),
                State::Freezing {
                    index: asked,
                    until,
                },
            ) if index == asked => {
                if now >= until {
                    self.look(now, seen, &mut effects);
                } else {
                    self.freeze_next(now, seen, &mut effects);
                }
            }
            (Event::Frozen(_), _) => {}
            (Event::Failed(index, failure), _) => {
                self.failed(index, failure, now, seen, &mut effects);
            }
            (
                Event::CutMade,
                State::Cutting {
                    begun,
                    quiet,
                    waited,
                },
            ) => {
                let graded = self.grade(seen, begun, quiet, waited);
                self.end(&mut effects);
                effects.push(Effect::Graded(graded));
            }
            (Event::CutMade, _) => {}
            (Event::CutFailed | Event::Abandoned, _) => self.end(&mut effects),
        }
        effects
    }

    fn freeze_next(&mut self, now: Duration, seen: Seen, effects: &mut Vec<Effect>) {
        while let Some(party) = self.parties.get(self.asked) {
            let index = self.asked;
            self.asked += 1;
            if !party.holds {
                let until = now.saturating_add(party.time);
                self.state = State::Freezing { index, until };
                self.wake = Some(until);
                effects.push(Effect::Freeze(index));
                return;
            }
        }
        let until = now.saturating_add(self.limits.lull_wait_max);
        self.state = State::Holding { until };
        self.look(now, seen, effects);
    }

    fn failed(
        &mut self,
        index: usize,
        failure: Failure,
        now: Duration,
        seen: Seen,
        effects: &mut Vec<Effect>,
    ) {
        if self.thawed {
            return;
        }
        let takes_part = |party: &&Party| party.holds || index < self.asked;
        let Some(party) = self.parties.get(index).filter(takes_part) else {
            return;
        };
        let why = Why::Party {
            name: party.name.clone(),
            failure,
        };
        self.frozen_at = None;
        self.shortfall.get_or_insert(why.clone());
        if matches!(self.state, State::Cutting { .. }) {
            return;
        }
        self.thaw(effects);
        match self.limits.on_failure {
            OnFailure::Cut => self.seek(now, seen, effects),
            OnFailure::Skip => {
                self.end(effects);
                effects.push(Effect::Skip(why));
            }
        }
    }

    fn seek(&mut self, now: Duration, seen: Seen, effects: &mut Vec<Effect>) {
        let until = now.saturating_add(self.limits.lull_wait_max);
        self.state = State::Searching { since: now, until };
        self.look(now, seen, effects);
    }

    fn look(&mut self, now: Duration, seen: Seen, effects: &mut Vec<Effect>) {
        match self.state {
            State::Freezing { index, until } if now >= until => {
                let time = self.parties[index].time;
                self.failed(index, Failure::Late(time), now, seen, effects);
            }
            State::Holding { until } => {
                if !seen.in_flight {
                    self.frozen_at = Some(seen.begun);
                    self.cut(now, now, seen, effects);
                } else if now >= until {
                    self.cut(now, now, seen, effects);
                } else {
                    self.wake = Some(now.saturating_add(LOOK_PERIOD_MIN).min(until));
                }
            }
            State::Searching { since, until } => {
                let (quiet, lull) = (seen.quiet(now), self.limits.lull_min);
                let is_lull = !seen.in_flight && quiet >= lull;
                let patient = seen.flushed || quiet >= lull.saturating_mul(FLUSH_PATIENCE);
                if (is_lull && patient) || now >= until {
                    self.cut(now, since, seen, effects);
                } else {
                    let next = lull.saturating_sub(if is_lull { Duration::ZERO } else { quiet });
                    self.wake = Some(now.saturating_add(next.max(LOOK_PERIOD_MIN)).min(until));
                }
            }
            State::Freezing { .. } | State::Cutting { .. } | State::Over => {}
        }
    }

    fn cut(&mut self, now: Duration, since: Duration, seen: Seen, effects: &mut Vec<Effect>) {
        self.state = State::Cutting {
            begun: seen.begun,
            quiet: !seen.in_flight && seen.quiet(now) >= self.limits.lull_min,
            waited: now.saturating_sub(since),
        };
        self.wake = None;
        effects.push(Effect::Cut);
    }

    /// What the cut is worth. `after`: as of right after the flip; a write that began after the flip, but before that
    /// look, makes the grade worse than it could be, never better.
    fn grade(&self, after: Seen, begun: u64, quiet: bool, waited: Duration) -> Graded {
        if self.shortfall.is_none() && self.frozen_at == Some(after.begun) {
            return Graded {
                coherence: Coherence::Quiesced,
                why: Vec::new(),
            };
        }
        let mut why = vec![self.shortfall.clone().unwrap_or(Why::WritesWhileFrozen)];
        if after.unseen {
            why.push(Why::WritesUnseen);
            return Graded {
                coherence: Coherence::Crash,
                why,
            };
        }
        let undisturbed = after.begun == begun;
        let coherence = if after.flushed {
            Coherence::Flushed
        } else if quiet && undisturbed {
            why.push(Why::NotFlushed);
            Coherence::Lull
        } else if quiet {
            why.push(Why::WriteAtCut);
            Coherence::Crash
        } else {
            let lull_min = self.limits.lull_min;
            why.push(Why::NoPause { lull_min, waited });
            Coherence::Crash
        };
        Graded { coherence, why }
    }

    fn thaw(&mut self, effects: &mut Vec<Effect>) {
        if !self.thawed {
            self.thawed = true;
            let frozen = |index: &usize| *index < self.asked || self.parties[*index].holds;
            let frozen = (0..self.parties.len()).rev().filter(frozen);
            effects.extend(frozen.map(Effect::Thaw));
        }
    }

    fn end(&mut self, effects: &mut Vec<Effect>) {
        self.thaw(effects);
        self.state = State::Over;
        self.wake = None;
    }
}

#[cfg(test)]
mod tests;
