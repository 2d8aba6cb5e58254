//! When to cut: the interval controller of one volume.
//!
//! At most one interval is in flight. Whatever asks for a cut meanwhile coalesces into the next one; a request gets a
//! cut that was made after it, so that its receipt covers every write that was answered before the request. After an
//! interval was given up the next cut waits, longer each time, so that a spool that is too small doesn't become a
//! busy loop; a new request doesn't wait.
//!
//! Times are durations since any fixed moment of a monotonic clock.

use std::time::Duration;

use tidemark_block::Trigger;

/// Whoever waits for the receipt of an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What the controller is told to keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Triggers {
    /// Longest time between two cuts.
    pub interval_max: Duration,
    /// Cut when so many blocks have changed since the last cut; none: never for that reason.
    pub changed_blocks_max: Option<u64>,
    /// The wait after an interval was given up.
    pub backoff: Backoff,
}

/// Waits that double.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The first one.
    pub min: Duration,
    /// The longest one.
    pub max: Duration,
}

impl Backoff {
    /// The wait before try number `attempt` (from 1), between half of it and the whole: `jitter` is random, 0 to 1.
    ///
    /// # Panics
    /// Never: a jitter out of range is brought into it.
    #[must_use]
    pub fn wait(&self, attempt: u32, jitter: f64) -> Duration {
        let doublings = attempt.saturating_sub(1).min(20);
        let whole = self.min.saturating_mul(1 << doublings).min(self.max);
        let jitter = if jitter.is_finite() {
            jitter.clamp(0.0, 1.0)
        } else {
            1.0
        };
        whole.mul_f64(0.5 + jitter / 2.0)
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// So many blocks have changed since the last cut.
    Changed(u64),
    /// Somebody wants an interval from now on.
    Requested(Ticket),
    /// Blocks joined the doubt, or the vault must be compared with: an interval should follow soon.
    ResyncWanted,
    /// The schedule says that now is a time to cut.
    Scheduled,
    /// The workload says that now is a good moment.
    Hinted,
    /// No cut is made this time: the workload can't be quiesced. Those who wait are answered. `jitter` is random, 0
    /// to 1.
    Skipped {
        /// In thousandths.
        jitter_permille: u16,
    },
    /// The cut that was asked for has been made.
    Cut,
    /// The interval in flight was committed, or had no changes.
    Settled,
    /// The interval in flight was given up; its blocks are in the next one. `jitter` is random, 0 to 1.
    GivenUp {
        /// In thousandths.
        jitter_permille: u16,
    },
}

/// What becomes of an interval's waiters.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answered {
    /// They get the receipt.
    pub tickets: Vec<Ticket>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Flight {
    tickets: Vec<Ticket>,
}

/// Decides when the next cut is due.
#[derive(Debug, Clone)]
pub struct Controller {
    triggers: Triggers,
    last_cut: Option<Duration>,
    flight: Option<Flight>,
    waiting: Vec<Ticket>,
    resync: bool,
    scheduled: bool,
    hinted: bool,
    initial: bool,
    changed: u64,
    given_up: u32,
    not_before: Duration,
}

impl Controller {
    /// Starts at `now`. `initial`: the volume has no generation yet. `in_flight`: an interval survived the restart.
    #[must_use]
    pub const fn new(triggers: Triggers, now: Duration, initial: bool, in_flight: bool) -> Self {
        Self {
            triggers,
            // The first cut after a start is due at once: when the last one was is not known.
            last_cut: None,
            flight: if in_flight {
                Some(Flight {
                    tickets: Vec::new(),
                })
            } else {
                None
            },
            waiting: Vec::new(),
            resync: false,
            scheduled: false,
            hinted: false,
            initial,
            changed: 0,
            given_up: 0,
            not_before: now,
        }
    }

    /// Takes note of what happened. Gives the waiters of an interval that has settled.
    pub fn on(&mut self, now: Duration, event: Event) -> Answered {
        match event {
            Event::Changed(blocks) => self.changed = blocks,
            Event::Requested(ticket) => {
                self.waiting.push(ticket);
                self.not_before = self.not_before.min(now);
            }
            Event::ResyncWanted => self.resync = true,
            Event::Scheduled => self.scheduled = true,
            Event::Hinted => self.hinted = true,
            Event::Skipped { jitter_permille } => {
                self.last_cut = Some(now);
                self.scheduled = false;
                self.hinted = false;
                self.back_off(now, jitter_permille);
                return Answered {
                    tickets: std::mem::take(&mut self.waiting),
                };
            }
            Event::Cut => {
                self.last_cut = Some(now);
                self.changed = 0;
                self.resync = false;
                self.scheduled = false;
                self.hinted = false;
                self.flight = Some(Flight {
                    tickets: std::mem::take(&mut self.waiting),
                });
            }
            Event::Settled => {
                self.initial = false;
                self.given_up = 0;
                if let Some(flight) = self.flight.take() {
                    return Answered {
                        tickets: flight.tickets,
                    };
                }
            }
            Event::GivenUp { jitter_permille } => {
                if let Some(flight) = self.flight.take() {
                    // They wait on: the next cut is later than their request too.
                    self.waiting.splice(0..0, flight.tickets);
                    self.resync = true;
                }
                self.back_off(now, jitter_permille);
            }
        }
        Answered::default()
    }

    fn back_off(&mut self, now: Duration, jitter_permille: u16) {
        self.given_up += 1;
        let jitter = f64::from(jitter_permille) / 1000.0;
        self.not_before = now + self.triggers.backoff.wait(self.given_up, jitter);
    }

    /// Why a cut is due now; none where it isn't.
    #[must_use]
    pub fn due(&self, now: Duration) -> Option<Trigger> {
        if self.flight.is_some() || now < self.not_before {
            return None;
        }
        let elapsed = |last: Duration| now.saturating_sub(last) >= self.triggers.interval_max;
        let changed = |max: u64| self.changed >= max;
        if self.initial {
            Some(Trigger::Initial)
        } else if !self.waiting.is_empty() {
            Some(Trigger::Request)
        } else if self.resync {
            Some(Trigger::Resync)
        } else if self.hinted {
            Some(Trigger::Hint)
        } else if self.scheduled {
            Some(Trigger::Schedule)
        } else if self.triggers.changed_blocks_max.is_some_and(changed) {
            Some(Trigger::ChangedBlocksMax)
        } else if self.last_cut.is_none_or(elapsed) {
            Some(Trigger::IntervalMax)
        } else {
            None
        }
    }

    /// When a cut becomes due though nothing happens; none while an interval is in flight.
    #[must_use]
    pub fn wake(&self, now: Duration) -> Option<Duration> {
        if self.flight.is_some() {
            return None;
        }
        let by_time = self
            .last_cut
            .map_or(now, |last| last.saturating_add(self.triggers.interval_max));
        let asked = self.scheduled || self.hinted || !self.waiting.is_empty();
        let soon = self.initial || self.resync || asked;
        Some(if soon {
            self.not_before
        } else {
            by_time.max(self.not_before)
        })
    }

    /// Whether an interval is in flight.
    #[must_use]
    pub const fn in_flight(&self) -> bool {
        self.flight.is_some()
    }

    /// Everyone who waits, whether an interval is in flight or not: for failing them when nothing will be shipped.
    pub fn drain(&mut self) -> Vec<Ticket> {
        let mut tickets = self
            .flight
            .as_mut()
            .map_or_else(Vec::new, |flight| std::mem::take(&mut flight.tickets));
        tickets.append(&mut self.waiting);
        tickets
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn at(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    const TRIGGERS: Triggers = Triggers {
        interval_max: at(900),
        changed_blocks_max: Some(100),
        backoff: Backoff {
            min: at(1),
            max: at(60),
        },
    };

    const SKIPPED: Event = Event::Skipped {
        jitter_permille: 1000,
    };

    fn settled_at_zero() -> Controller {
        let mut c = Controller::new(TRIGGERS, at(0), false, false);
        c.on(at(0), Event::Cut);
        c.on(at(0), Event::Settled);
        c
    }

    #[test]
    fn each_trigger_makes_a_cut_due_at_its_moment() {
        type Case = (&'static [(u64, Event)], u64, Option<Trigger>);
        let cases: [Case; 12] = [
            (&[], 899, None),
            (&[], 900, Some(Trigger::IntervalMax)),
            (&[(5, Event::Changed(99))], 5, None),
            (
                &[(5, Event::Changed(100))],
                5,
                Some(Trigger::ChangedBlocksMax),
            ),
            (
                &[(5, Event::Requested(Ticket(1)))],
                5,
                Some(Trigger::Request),
            ),
            (&[(5, Event::ResyncWanted)], 5, Some(Trigger::Resync)),
            (
                &[(5, Event::Changed(500)), (6, Event::Requested(Ticket(1)))],
                6,
                Some(Trigger::Request),
            ),
            (&[(5, Event::Changed(500)), (6, Event::Cut)], 5000, None),
            (&[(5, Event::Scheduled)], 5, Some(Trigger::Schedule)),
            (
                &[(5, Event::Scheduled), (5, Event::Hinted)],
                5,
                Some(Trigger::Hint),
            ),
            (
                &[(5, Event::Scheduled), (5, Event::Hinted), (6, Event::Cut)],
                6,
                None,
            ),
            (&[(5, Event::Hinted), (6, SKIPPED)], 905, None),
        ];
        for (events, now, due) in cases {
            let mut c = settled_at_zero();
            for &(when, event) in events {
                c.on(at(when), event);
            }
            assert_eq!(c.due(at(now)), due, "{events:?} at {now}");
        }
    }

    #[test]
    fn a_new_volume_is_cut_at_once_and_a_surviving_interval_is_finished_first() {
        let c = Controller::new(TRIGGERS, at(7), true, false);
        assert_eq!(c.due(at(7)), Some(Trigger::Initial));
        let mut c = Controller::new(TRIGGERS, at(7), false, true);
        assert_eq!(c.due(at(7)), None);
        assert_eq!(c.wake(at(7)), None);
        c.on(at(8), Event::Settled);
        assert_eq!(c.due(at(8)), Some(Trigger::IntervalMax));
    }

    #[test]
    fn a_request_during_a_flight_gets_the_next_cut() {
        let mut c = settled_at_zero();
        c.on(at(1), Event::Requested(Ticket(1)));
        c.on(at(1), Event::Cut);
        c.on(at(2), Event::Requested(Ticket(2)));
        c.on(at(2), Event::Requested(Ticket(3)));
        assert_eq!(c.due(at(2)), None);
        assert_eq!(c.on(at(3), Event::Settled).tickets, [Ticket(1)]);
        assert_eq!(c.due(at(3)), Some(Trigger::Request));
        c.on(at(3), Event::Cut);
        assert_eq!(c.on(at(4), Event::Settled).tickets, [Ticket(2), Ticket(3)]);
        assert_eq!(c.due(at(4)), None);
    }

    #[test]
    fn after_a_give_up_the_next_cut_waits_longer_each_time() {
        let mut c = settled_at_zero();
        c.on(at(1), Event::Requested(Ticket(1)));
        for (n, wait) in [(1, 1), (2, 2), (3, 4), (7, 60)] {
            c.given_up = n - 1;
            c.on(at(100), Event::Cut);
            c.on(
                at(100),
                Event::GivenUp {
                    jitter_permille: 1000,
                },
            );
            assert_eq!(c.wake(at(100)), Some(at(100 + wait)));
            assert_eq!(c.due(at(100 + wait - 1)), None);
            assert_eq!(c.due(at(100 + wait)), Some(Trigger::Request));
        }
        c.on(at(100), Event::Requested(Ticket(2)));
        assert_eq!(
            c.due(at(100)),
            Some(Trigger::Request),
            "a new request doesn't wait"
        );
        c.on(at(100), Event::Cut);
        assert_eq!(
            c.on(at(101), Event::Settled).tickets,
            [Ticket(1), Ticket(2)]
        );
    }

    #[test]
    fn where_no_cut_is_made_those_who_wait_are_answered_and_what_is_wanted_still_comes_later() {
        let mut c = settled_at_zero();
        c.on(at(5), Event::Requested(Ticket(1)));
        c.on(at(5), Event::Changed(100));
        assert_eq!(c.on(at(6), SKIPPED).tickets, [Ticket(1)]);
        assert_eq!(c.due(at(6)), None);
        assert_eq!(c.due(at(7)), Some(Trigger::ChangedBlocksMax));
        c.on(at(7), SKIPPED);
        assert_eq!(c.due(at(8)), None, "longer each time");
        assert_eq!(c.due(at(9)), Some(Trigger::ChangedBlocksMax));
    }

    #[test]
    fn a_wait_lies_between_half_of_it_and_the_whole() {
        let b = TRIGGERS.backoff;
        assert_eq!(b.wait(1, 0.0), Duration::from_millis(500));
        assert_eq!(b.wait(1, 1.0), at(1));
        assert_eq!(b.wait(3, 0.5), at(3));
        assert_eq!(b.wait(u32::MAX, 1.0), at(60));
        assert_eq!(b.wait(0, f64::NAN), at(1));
    }

    fn event() -> impl Strategy<Value = u8> {
        0..6u8
    }

    proptest! {
        #[test]
        fn every_ticket_is_answered_once_by_a_cut_made_after_it(
            steps in prop::collection::vec((event(), 0..400u64), 1..80)
        ) {
            let mut c = Controller::new(TRIGGERS, at(0), true, false);
            let mut now = 0;
            let mut asked: Vec<(Ticket, u64)> = Vec::new();
            let mut cut_at = None;
            let mut answered = std::collections::BTreeSet::new();
            for (n, (kind, pause)) in (0u64..).zip(steps) {
                now += pause;
                match kind {
                    0 => { c.on(at(now), Event::Changed(pause)); }
                    1 => {
                        c.on(at(now), Event::Requested(Ticket(n)));
                        asked.push((Ticket(n), now));
                    }
                    2 if c.in_flight() => {
                        for ticket in c.on(at(now), Event::Settled).tickets {
                            let when = asked.iter().find(|(t, _)| *t == ticket).unwrap().1;
                            prop_assert!(cut_at.unwrap() >= when);
                            prop_assert!(answered.insert(ticket));
                        }
                    }
                    3 if c.in_flight() => {
                        c.on(at(now), Event::GivenUp { jitter_permille: 500 });
                    }
                    4 => { c.on(at(now), Event::ResyncWanted); }
                    _ => {}
                }
                match c.wake(at(now)) {
                    None => prop_assert!(c.in_flight()),
                    Some(wake) => {
                        let then = at(now).max(wake);
                        prop_assert!(c.due(then).is_some(), "awake and nothing due");
                    }
                }
                if kind == 5 && c.due(at(now)).is_some() {
                    c.on(at(now), Event::Cut);
                    cut_at = Some(now);
                    prop_assert!(c.due(at(now + 100_000)).is_none());
                }
            }
            if !c.in_flight() {
                now += 100_000;
                c.on(at(now), Event::Cut);
            }
            let last = c.on(at(now), Event::Settled).tickets;
            let left = c.drain();
            let all = answered.len() + last.len() + left.len();
            prop_assert_eq!(all, asked.len());
        }
    }
}
