//! From "a cut is due" to the cut: looks for the moment, cuts, lets the workload go on.
//!
//! [`Search`] decides. Whoever was frozen is let go on as soon as the cut has settled: before the interval is recorded,
//! and long before it is shipped.

use std::{sync::Arc, time::Duration};

use capture_core::{
    coherence::{Effect, Event as MomentEvent, Graded, Search, Seen, Why},
    interval::Event as IntervalEvent,
};
use tidemark_block::Trigger;
use tidemark_proto::{Reason, RpcError};
use tokio::task::JoinHandle;

use super::{
    blocking,
    driver::{Driver, Outcome, jitter},
    now_ms,
    ship::stopped,
};
use crate::engine::{EngineError, IntervalCut, intercept::Sample};

/// How long the wall clock is trusted to run as the other one does.
const SCHEDULE_LOOK_MAX: Duration = Duration::from_secs(60);

/// What a search came to.
pub(super) enum Moment {
    /// A cut, not recorded yet.
    Cut {
        cut: IntervalCut,
        cut_time_ms: u64,
        graded: Graded,
    },
    /// Nothing has changed: no cut was needed.
    Unchanged { cut_time_ms: u64 },
    /// Nothing was cut; this is next.
    Next(Outcome),
}

impl Driver {
    /// Finds the moment for a cut that is due, and makes it.
    pub(super) async fn cut_at_best_moment(&mut self) -> Moment {
        let parties = self.quiesce.gather().await;
        if parties.is_empty()
            && let Some(unchanged) = self.unchanged_at(self.next_cut_ms())
        {
            return unchanged;
        }
        let limits = self.settings.moment;
        let (mut search, mut effects) = Search::begin(self.now(), self.seen(), limits, parties);
        loop {
            match self.perform(&effects) {
                Next::Look => {}
                Next::Cut => return self.cut_now(search).await,
                Next::Skip(why) => return Moment::Next(self.skipped(&why)),
            }
            let wake = search.wake().unwrap_or_default();
            let mut stop = self.stop.clone();
            let event = tokio::select! {
                () = stopped(&mut stop) => None,
                () = tokio::time::sleep_until(self.started + wake) => Some(MomentEvent::Look),
                (index, answer) = self.quiesce.answered() => Some(match answer {
                    Ok(()) => MomentEvent::Frozen(index),
                    Err(failure) => MomentEvent::Failed(index, failure),
                }),
                request = self.inbox.recv() => request.map(|request| {
                    // The cut comes after it.
                    self.take(request);
                    MomentEvent::Look
                }),
            };
            let Some(event) = event else {
                self.end(&mut search, MomentEvent::Abandoned);
                return Moment::Next(Outcome::Stop);
            };
            effects = search.on(self.now(), self.seen(), event);
        }
    }

    async fn cut_now(&mut self, mut search: Search) -> Moment {
        // Before the hint: what is counted as unchanged was so at this time.
        let cut_time_ms = self.next_cut_ms();
        if let Some(unchanged) = self.unchanged_at(cut_time_ms) {
            self.end(&mut search, MomentEvent::CutFailed);
            return unchanged;
        }
        let engine = Arc::clone(&self.engine);
        let mut cutting = tokio::task::spawn_blocking(move || engine.begin_interval());
        let limit = self.settings.quiesce.time;
        let begun = if search.parties().is_empty() {
            cutting.await
        } else {
            match tokio::time::timeout(limit, &mut cutting).await {
                Ok(begun) => begun,
                Err(_) => return self.cut_too_late(search, cutting, limit).await,
            }
        };
        let error = match begun {
            Ok(Ok((cut, at_flip))) => {
                // Whoever went away before the cut was made may not have held still.
                while let Some((index, answer)) = self.quiesce.answered_now() {
                    if let Err(failure) = answer {
                        self.end(&mut search, MomentEvent::Failed(index, failure));
                    }
                }
                let seen = self.seen_at(at_flip);
                let effects = search.on(self.now(), seen, MomentEvent::CutMade);
                self.perform(&effects);
                let graded = effects.into_iter().find_map(|effect| match effect {
                    Effect::Graded(graded) => Some(graded),
                    _ => None,
                });
                match graded {
                    Some(graded) => {
                        return Moment::Cut {
                            cut,
                            cut_time_ms,
                            graded,
                        };
                    }
                    None => anyhow::anyhow!("a cut without a grade"),
                }
            }
            Ok(Err(EngineError::Closed)) => {
                self.end(&mut search, MomentEvent::Abandoned);
                return Moment::Next(Outcome::Stop);
            }
            Ok(Err(error)) => error.into(),
            Err(error) => error.into(),
        };
        self.end(&mut search, MomentEvent::CutFailed);
        Moment::Next(self.cut_failed(&error))
    }

    /// A cut takes too long while the workload holds still. Everyone is let go on first: that may be what it waits for.
    async fn cut_too_late(
        &mut self,
        mut search: Search,
        cutting: JoinHandle<Result<(IntervalCut, Option<Sample>), EngineError>>,
        limit: Duration,
    ) -> Moment {
        self.end(&mut search, MomentEvent::CutFailed);
        let error = match cutting.await {
            Ok(Ok((cut, _))) => {
                let engine = Arc::clone(&self.engine);
                let given_up = blocking(move || {
                    drop(cut);
                    Ok(engine.give_up_interval()?)
                });
                if let Err(error) = given_up.await {
                    tracing::warn!(error = %format!("{error:#}"), "give up the interval");
                }
                anyhow::anyhow!(
                    "the workload was let go on before the cut was made, which took longer than quiesce_timeout \
                     ({limit:?}): freeze what is in the volume, never the filesystem that the volume file lies on, or \
                     raise quiesce_timeout"
                )
            }
            Ok(Err(EngineError::Closed)) => return Moment::Next(Outcome::Stop),
            Ok(Err(error)) => error.into(),
            Err(error) => error.into(),
        };
        Moment::Next(self.cut_failed(&error))
    }

    fn next_cut_ms(&self) -> u64 {
        now_ms().max(self.record.last_cut_ms + 1)
    }

    fn unchanged_at(&self, cut_time_ms: u64) -> Option<Moment> {
        let unchanged = self.engine.changed_hint() == Some(0) && self.record.base.get() > 0;
        (unchanged && self.record.base_digest.is_some())
            .then_some(Moment::Unchanged { cut_time_ms })
    }

    fn seen(&self) -> Seen {
        self.seen_at(self.engine.activity())
    }

    fn seen_at(&self, sample: Option<Sample>) -> Seen {
        sample.map_or(Seen::NOTHING, |sample| {
            sample.since(self.started.into_std())
        })
    }

    fn end(&mut self, search: &mut Search, event: MomentEvent) {
        let effects = search.on(self.now(), self.seen(), event);
        self.perform(&effects);
    }

    fn perform(&mut self, effects: &[Effect]) -> Next {
        let epoch = self.engine.epoch();
        let thaws: Vec<_> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Thaw(index) => Some(*index),
                _ => None,
            })
            .collect();
        let graded = effects.iter().find_map(|effect| match effect {
            Effect::Graded(graded) => Some(graded),
            _ => None,
        });
        self.quiesce.thaw(&thaws, epoch, graded);
        let mut next = Next::Look;
        for effect in effects {
            match effect {
                Effect::Freeze(index) => self.quiesce.freeze(*index, epoch),
                Effect::Cut => next = Next::Cut,
                Effect::Skip(why) => next = Next::Skip(why.clone()),
                Effect::Thaw(_) | Effect::Graded(_) => {}
            }
        }
        next
    }

    /// By policy nothing is cut: whoever asked for an interval is told so.
    fn skipped(&mut self, why: &Why) -> Outcome {
        tracing::warn!(%why, "the workload can't be quiesced: no cut is made");
        let event = IntervalEvent::Skipped {
            jitter_permille: jitter(),
        };
        let now = self.now();
        let message = format!("no cut was made: {why}");
        let action = "see to what quiesces the workload; it is tried again by itself";
        for ticket in self.controller.on(now, event).tickets {
            if let Some(waiter) = self.waiters.remove(&ticket) {
                let _ = waiter.send(Err(RpcError::new(Reason::NotQuiesced, &message, action)));
            }
        }
        self.cut_error = Some(message.clone());
        self.show.send_modify(|status| status.error = Some(message));
        Outcome::Again
    }

    /// Tells the interval controller of a time of the schedule that has come, and says when to look again.
    pub(super) fn heed_schedule(&mut self, now: Duration) -> Duration {
        let time_ms = now_ms();
        if self.scheduled_ms.is_some_and(|at| at <= time_ms) {
            self.controller.on(now, IntervalEvent::Scheduled);
            self.scheduled_ms = self.settings.schedule.next_after(time_ms);
        }
        let wait = self.scheduled_ms.map_or(SCHEDULE_LOOK_MAX, |at| {
            Duration::from_millis(at.saturating_sub(time_ms))
        });
        now + wait.min(SCHEDULE_LOOK_MAX)
    }

    /// Says what was cut, and how good the moment was.
    pub(super) fn tell_cut(cut: &IntervalCut, trigger: Trigger, graded: &Graded) {
        tracing::info!(
            epoch = %cut.epoch, blocks = %cut.changed.len(), %trigger, coherence = %graded.coherence,
            reason = %graded.reason(), "cut"
        );
    }
}

enum Next {
    Look,
    Cut,
    Skip(Why),
}
