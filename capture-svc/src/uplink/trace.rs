//! The trace of an interval: one span from what made a cut due to the receipt, with a child for each step on the way.
//!
//! It goes on over failures and disconnects for as long as this process lives. One that an earlier process began is not
//! known any more; its interval's id, which spans of both services carry, leads from one to the other.

use capture_core::uplink::Action;
use tidemark_block::{GenerationId, IntervalId, Receipt, Trigger};
use tidemark_proto::Reason;
use tidemark_telemetry::{Origin, SpanExt, traced};
use tracing::Span;

/// The most requests whose traces are linked with that of the interval that answers them.
const ASKERS_MAX: usize = 8;

/// The trace of the interval that is open, or whose cut is being made.
#[derive(Debug)]
pub(super) struct Trace {
    volume: String,
    interval: Option<Span>,
    /// Of an interval that has ended within the step that is under way.
    over: Option<Span>,
    /// Those who have asked for an interval and have none yet.
    askers: Vec<Origin>,
    /// Whether the interval is a child of the first of them.
    adopted: bool,
    /// So many of them asked before the cut: its interval answers them.
    answered: usize,
    attempts: u64,
}

impl Trace {
    pub(super) const fn of(volume: String) -> Self {
        Self {
            volume,
            interval: None,
            over: None,
            askers: Vec::new(),
            adopted: false,
            answered: 0,
            attempts: 0,
        }
    }

    /// Somebody asks for an interval, in a trace of their own.
    pub(super) fn asked_by(&mut self, asker: Option<Origin>) {
        if self.askers.len() < ASKERS_MAX {
            self.askers.extend(asker);
        }
    }

    fn start(&mut self, trigger: Trigger) -> Span {
        let span = traced!("interval", %trigger);
        span.note("volume", &self.volume);
        self.attempts = 0;
        self.adopted = false;
        self.interval = Some(span.clone());
        span
    }

    /// A cut is due. The interval is a child of the first request that it answers.
    pub(super) fn begin(&mut self, trigger: Trigger) -> Span {
        let span = self.start(trigger);
        if let Some(first) = self.askers.first() {
            first.adopt(&span);
            self.adopted = true;
        }
        span
    }

    /// The cut was made, or there is nothing to cut: that answers all who have asked before.
    pub(super) fn cut(&mut self, id: IntervalId) {
        self.answered = self.askers.len();
        if let Some(span) = &self.interval {
            span.note("interval", id);
            let others = self.askers.iter().skip(usize::from(self.adopted));
            others.for_each(|asker| asker.link(span));
        }
    }

    /// The span within which an action is performed. `open`: the interval that was open when the service started.
    pub(super) fn step(&mut self, action: Action, open: Option<(IntervalId, Trigger)>) -> Span {
        if let (Action::Ship(_), None, Some((id, trigger))) = (action, &self.interval, open) {
            let span = self.start(trigger);
            span.note("interval", id);
            span.note("resumed", true);
        }
        let Some(interval) = &self.interval else {
            let is_resync = action == Action::RepairTable;
            let span = if is_resync {
                traced!("resync")
            } else {
                Span::none()
            };
            span.note("volume", &self.volume);
            return span;
        };
        match action {
            Action::StartTerm => traced!(parent: interval, "connect"),
            Action::RepairTable => traced!(parent: interval, "resync"),
            Action::Wait { .. } => traced!(parent: interval, "wait"),
            Action::Ship(_) => {
                let span = traced!(parent: interval, "ship");
                self.attempts += 1;
                span.count("attempt", self.attempts);
                span
            }
            _ => interval.clone(),
        }
    }

    fn end(&mut self) -> Option<Span> {
        self.over.clone_from(&self.interval);
        self.interval.take()
    }

    /// A step has ended; where it was the last one of an interval, so has that.
    pub(super) fn step_ended(&mut self) {
        if let Some(span) = self.over.take() {
            // A span is taken to end when it was left last.
            span.in_scope(|| {});
        }
    }

    /// The vault has given the receipt, and it is recorded.
    pub(super) fn succeed(&mut self, receipt: &Receipt) {
        self.askers.drain(..self.answered);
        self.answered = 0;
        if let Some(span) = self.end() {
            span.count("generation", receipt.generation.get());
            span.note("unchanged", !receipt.created);
            span.count("changed_blocks", receipt.changed_blocks.get());
            span.count("bytes", receipt.frame_bytes);
            span.succeed();
        }
    }

    /// It is the vault's newest generation, and the receipt was lost.
    pub(super) fn found(&mut self, generation: GenerationId) {
        self.askers.drain(..self.answered);
        self.answered = 0;
        if let Some(span) = self.end() {
            span.count("generation", generation.get());
            span.succeed();
        }
    }

    /// Nothing is cut, and whoever asked is told so.
    pub(super) fn skip(&mut self, message: &str) {
        self.askers.clear();
        self.fail(Reason::NotQuiesced, message);
    }

    /// No generation comes of it. Who asked for it is answered by the next one.
    pub(super) fn fail(&mut self, reason: Reason, message: &str) {
        self.answered = 0;
        if let Some(span) = self.end() {
            span.fail(reason.as_str(), message);
        }
    }
}
