//! When a cut is due, and what is recorded of one.
//!
//! The interval controller says when; [`search`](super::search) finds the moment, for this volume alone or for all of its
//! group, while requests are still taken. Only when the interval is recorded does the cut count.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use capture_core::{
    coherence::{Graded, Why},
    interval::Event as IntervalEvent,
    uplink::Event,
};
use tidemark_block::{IntervalId, Trigger};
use tidemark_proto::{Reason, RpcError};
use tidemark_telemetry::{SpanExt, step};
use tokio::sync::{oneshot, watch};
use tracing::{Instrument, Span};

use super::{
    Request, blocking,
    driver::{Driver, Outcome, jitter},
    figures::{Ending, Moments},
    group::Waiting,
    now_ms, open, random_id,
    record::IntervalRecord,
    search::{Found, Member, Want, find},
    ship::stopped,
};
use crate::engine::IntervalCut;

/// How often the number of changed blocks is looked at while `changed_blocks_max` is set.
const CHANGED_PERIOD: Duration = Duration::from_millis(250);
/// How long the wall clock is trusted to run as the other one does.
const SCHEDULE_LOOK_MAX: Duration = Duration::from_secs(60);
/// How long a volume waits for the others of its group before it says so.
const GROUP_PATIENCE: Duration = Duration::from_secs(10);

impl Driver {
    pub(super) async fn await_cut(&mut self) -> Outcome {
        self.stamp_behind();
        let mut wanted = self.settings.group.as_ref().map(|group| group.wanted());
        loop {
            self.notice_requests();
            let now = self.now();
            if let Some(hint) = self.engine.changed_hint() {
                self.controller.on(now, IntervalEvent::Changed(hint));
            }
            let next_look = self.heed_schedule(now);
            let of_group = wanted.as_mut().and_then(|w| *w.borrow_and_update());
            if let Some(trigger) = self.controller.due(now).or(of_group) {
                return self.cut(trigger).await;
            }
            let mut wake = self.controller.wake(now).unwrap_or(now + CHANGED_PERIOD);
            wake = wake.min(next_look);
            if self.settings.triggers.changed_blocks_max.is_some() {
                wake = wake.min(now + CHANGED_PERIOD);
            }
            let mut stop = self.stop.clone();
            tokio::select! {
                () = stopped(&mut stop) => return Outcome::Stop,
                () = tokio::time::sleep_until(self.started + wake) => {}
                () = changed(wanted.as_mut()) => {}
                request = self.inbox.recv() => match request {
                    Some(request) => self.take(request),
                    None => return Outcome::Stop,
                },
            }
        }
    }

    async fn cut(&mut self, trigger: Trigger) -> Outcome {
        let span = self.trace.begin(trigger);
        self.cut_within(trigger).instrument(span).await
    }

    async fn cut_within(&mut self, trigger: Trigger) -> Outcome {
        // What an earlier failure left open is in neither the record nor the hint.
        let (engine, committed) = (self.engine.clone(), self.record.committed_epoch);
        let released = blocking(move || open::release_unrecorded(&engine, committed));
        if let Err(error) = released.await {
            return self.cut_failed(format!("{error:#}"));
        }
        self.moments = Moments {
            due: Some(Instant::now()),
            ..Moments::default()
        };
        let finding = step!("find moment");
        let (found, late) = self.find_moment(trigger).instrument(finding).await;
        let outcome = self.found(found, trigger).await;
        if let Some(late) = late {
            self.take(late);
        }
        outcome
    }

    async fn found(&mut self, found: Found, trigger: Trigger) -> Outcome {
        match found {
            Found::Cut {
                cut,
                cut_time_ms,
                graded,
            } => {
                self.moments.cut = Some(Instant::now());
                self.record_cut(cut, cut_time_ms, trigger, &graded).await
            }
            Found::Unchanged { cut_time_ms } => {
                self.cut_error = None;
                let now = self.now();
                self.controller.on(now, IntervalEvent::Cut);
                let id = IntervalId::from_bytes(random_id());
                self.trace.cut(id);
                self.mark_current(id, cut_time_ms).await
            }
            Found::Skipped(why) => self.skipped(&why),
            Found::Failed(error) => self.cut_failed(error.message),
            Found::Stopped => self.not_cut(),
        }
    }

    /// Looks for the moment, and takes requests meanwhile as long as the cut comes after them. One that came too late is
    /// given back.
    async fn find_moment(&mut self, trigger: Trigger) -> (Found, Option<Request>) {
        let cutting = Arc::new(AtomicBool::new(false));
        let mut finding = self.set_off(trigger, Arc::clone(&cutting));
        let (mut stop, mut inbox_open, mut stops) = (self.stop.clone(), true, false);
        let mut late = None;
        let mut patience = tokio::time::interval(GROUP_PATIENCE);
        patience.reset();
        loop {
            tokio::select! {
                found = &mut finding => return (found.unwrap_or(Found::Stopped), late),
                () = stopped(&mut stop), if !stops => {
                    stops = true;
                    let group = self.settings.group.as_ref();
                    if group.is_some_and(|group| group.leave(&self.settings.name)) {
                        return (Found::Stopped, late);
                    }
                    // The search sees it, too, and ends.
                }
                request = self.inbox.recv(), if inbox_open && late.is_none() => match request {
                    // Asked after the request is here: if the flip has not begun by now it comes after it.
                    Some(request) if cutting.load(SeqCst) => late = Some(request),
                    Some(request) => self.take(request),
                    None => inbox_open = false,
                },
                _ = patience.tick() => self.tell_awaited(),
            }
        }
    }

    /// Begins a search, or waits for the others of the group with which it begins.
    fn set_off(&mut self, trigger: Trigger, cutting: Arc<AtomicBool>) -> oneshot::Receiver<Found> {
        let (answer, finding) = oneshot::channel();
        let limits = self.settings.moment;
        let member = Member {
            name: self.settings.name.clone(),
            engine: self.engine.clone(),
            table: Arc::clone(&self.table),
            quiesce: self.quiesce.clone(),
            hints: std::mem::take(&mut self.hints),
            cutting,
            stop: self.stop.clone(),
            started: self.started.into_std(),
            last_cut_ms: self.record.last_cut_ms,
            quiesce_timeout: self.settings.quiesce.time,
            has_base: self.record.base.get() > 0 && self.record.base_digest.is_some(),
        };
        if let Some(group) = &self.settings.group {
            let waiting = Waiting {
                member,
                limits,
                answer,
                span: Span::current(),
            };
            group.join(&self.settings.name, trigger, waiting);
        } else {
            let search = async move {
                let found = find(
                    vec![member],
                    Want::intervals(limits),
                    std::future::pending(),
                );
                if let Some(found) = found.await.pop() {
                    let _ = answer.send(found);
                }
            };
            tokio::spawn(search.in_current_span());
        }
        finding
    }

    /// Says for whom the group waits, if it still does.
    fn tell_awaited(&self) {
        let Some(group) = &self.settings.group else {
            return;
        };
        let awaited = group.awaited().join(", ");
        if awaited.is_empty() {
            return;
        }
        let message = format!(
            "group {} is cut only as a whole, and volume(s) {awaited} can't be cut yet: see their state",
            group.name()
        );
        self.show.send_if_modified(|status| {
            let news = status.error.as_ref() != Some(&message);
            if news {
                tracing::warn!("{message}");
                status.error = Some(message);
            }
            news
        });
    }

    async fn record_cut(
        &mut self,
        cut: IntervalCut,
        cut_time_ms: u64,
        trigger: Trigger,
        graded: &Graded,
    ) -> Outcome {
        let id = IntervalId::from_bytes(random_id());
        let mut record = self.record.clone();
        record.last_cut_ms = cut_time_ms;
        record.interval = Some(IntervalRecord {
            id,
            epoch: cut.epoch,
            base: record.base,
            cut_time_ms,
            coherence: graded.coherence,
            trigger,
            reason: graded.reason(),
        });
        let recorded = self.store(record.clone()).instrument(step!("record cut"));
        if let Err(error) = recorded.await {
            let engine = self.engine.clone();
            let given_up = blocking(move || {
                drop(cut);
                Ok(engine.give_up_interval()?)
            });
            if let Err(error) = given_up.await {
                tracing::warn!(error = %format!("{error:#}"), "give up the interval");
            }
            return self.cut_failed(format!("{error:#}"));
        }
        tracing::info!(
            epoch = %cut.epoch, blocks = %cut.changed.len(), %trigger, coherence = %graded.coherence,
            reason = %graded.reason(), "cut"
        );
        let span = Span::current();
        span.count("epoch", cut.epoch.get());
        span.count("blocks", cut.changed.len().get());
        span.note("coherence", graded.coherence);
        if !graded.reason().is_empty() {
            span.note("reason", graded.reason());
        }
        self.trace.cut(id);
        self.record = record;
        self.figures.cut(graded);
        self.cut = Some(cut);
        self.cut_error = None;
        self.announced = false;
        let now = self.now();
        self.controller.on(now, IntervalEvent::Cut);
        self.show.send_modify(|status| status.bytes_sent = 0);
        Outcome::Event(Event::CutMade(id))
    }

    fn cut_failed(&mut self, error: String) -> Outcome {
        tracing::error!(error, "cut the volume");
        self.figures.ended(Ending::CutFailed);
        self.trace.fail(Reason::IoFailed, &error);
        self.show
            .send_modify(|status| status.error = Some(error.clone()));
        self.cut_error = Some(error);
        self.try_again();
        Outcome::Again
    }

    /// The service stops, or another volume of the group does: then there is another cut.
    fn not_cut(&mut self) -> Outcome {
        if *self.stop.borrow() {
            return Outcome::Stop;
        }
        self.trace
            .fail(Reason::Busy, "another volume of the group stops");
        self.try_again();
        Outcome::Again
    }

    fn try_again(&mut self) {
        let now = self.now();
        let event = IntervalEvent::GivenUp {
            jitter_permille: jitter(),
        };
        self.controller.on(now, event);
    }

    /// By policy nothing is cut: whoever asked for an interval is told so.
    fn skipped(&mut self, why: &Why) -> Outcome {
        tracing::warn!(%why, "the workload can't be quiesced: no cut is made");
        self.figures.skipped(why);
        let event = IntervalEvent::Skipped {
            jitter_permille: jitter(),
        };
        let now = self.now();
        let message = format!("no cut was made: {why}");
        self.trace.skip(&message);
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
    fn heed_schedule(&mut self, now: Duration) -> Duration {
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
}

/// Another volume of the group has a reason to cut; never without a group.
async fn changed(wanted: Option<&mut watch::Receiver<Option<Trigger>>>) {
    if let Some(wanted) = wanted
        && wanted.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
