//! What an uplink has done since it was started, for its metrics.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use capture_core::coherence::{Failure, Graded, Why};
use parking_lot::Mutex;
use tidemark_block::Coherence;
use tidemark_proto::Reason;
use tidemark_telemetry::metrics::{Histogram, STAGE_SECONDS};

use super::now_ms;

/// How an attempt at an interval ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ending {
    /// It became a generation.
    Committed,
    /// Nothing had changed: the newest generation is still current.
    Unchanged,
    /// The engine, or the vault's head, made it moot: its blocks are in the next one.
    GivenUp,
    /// By policy nothing was cut.
    Skipped,
    /// The cut failed.
    CutFailed,
}

impl Ending {
    pub(crate) const ALL: [(Self, &'static str); 5] = [
        (Self::Committed, "committed"),
        (Self::Unchanged, "unchanged"),
        (Self::GivenUp, "given_up"),
        (Self::Skipped, "skipped"),
        (Self::CutFailed, "cut_failed"),
    ];
}

/// How an attempt to quiesce the workload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Quiesced {
    /// It held still at the cut.
    Held,
    /// Somebody said no.
    Refused,
    /// Somebody went away.
    Gone,
    /// Somebody did not answer in time.
    Late,
    /// Somebody failed.
    Failed,
    /// All held still, and yet there were writes.
    Writes,
}

impl Quiesced {
    pub(crate) const ALL: [(Self, &'static str); 6] = [
        (Self::Held, "held"),
        (Self::Refused, "refused"),
        (Self::Gone, "gone"),
        (Self::Late, "late"),
        (Self::Failed, "failed"),
        (Self::Writes, "writes"),
    ];

    /// None where nobody was asked.
    fn of(why: &Why) -> Option<Self> {
        match why {
            Why::Party { failure, .. } => Some(match failure {
                Failure::Refused(_) => Self::Refused,
                Failure::Gone => Self::Gone,
                Failure::Late(_) => Self::Late,
                Failure::Failed(_) => Self::Failed,
            }),
            Why::WritesWhileFrozen => Some(Self::Writes),
            Why::NothingQuiesces
            | Why::NotFlushed
            | Why::NoPause { .. }
            | Why::WriteAtCut
            | Why::WritesUnseen
            | Why::AtOnce
            | Why::ForRollback => None,
        }
    }
}

/// Counts since the uplink was started.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    pub(crate) intervals: BTreeMap<Ending, u64>,
    /// Cuts that became intervals, by their coherence.
    pub(crate) cuts: BTreeMap<Coherence, u64>,
    pub(crate) quiesces: BTreeMap<Quiesced, u64>,
    /// Failures, by their reason.
    pub(crate) errors: BTreeMap<&'static str, u64>,
    /// Bytes of changed blocks of committed intervals, before encoding.
    pub(crate) raw_bytes: u64,
    /// Encoded bytes that were sent, those of intervals that came to nothing among them.
    pub(crate) sent_bytes: u64,
    /// When the last interval, changed or not, was over; 0: none has been.
    pub(crate) completed_ms: u64,
    /// How fast the last interval went over the link, bytes per second; none before the first one.
    pub(crate) link_rate: Option<f64>,
}

/// The stages of an interval, in their order.
#[derive(Debug)]
pub(crate) struct Stages {
    /// From "a cut is due" to the cut.
    pub(crate) moment: Histogram,
    /// From the cut to the last frame sent, waits for the vault included.
    pub(crate) ship: Histogram,
    /// From the last frame to the receipt.
    pub(crate) commit: Histogram,
    /// From the receipt until it is recorded here.
    pub(crate) settle: Histogram,
    /// All of it.
    pub(crate) whole: Histogram,
}

/// What an uplink has done.
#[derive(Debug)]
pub(crate) struct Figures {
    counts: Mutex<Counts>,
    pub(crate) stages: Stages,
}

/// Moments of the interval under way, as far as this process has seen them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moments {
    pub(super) due: Option<Instant>,
    pub(super) cut: Option<Instant>,
    pub(super) sealed: Option<Instant>,
    pub(super) receipt: Option<Instant>,
}

impl Default for Figures {
    fn default() -> Self {
        let histogram = || Histogram::new(STAGE_SECONDS);
        Self {
            counts: Mutex::default(),
            stages: Stages {
                moment: histogram(),
                ship: histogram(),
                commit: histogram(),
                settle: histogram(),
                whole: histogram(),
            },
        }
    }
}

impl Figures {
    pub(crate) fn counts(&self) -> Counts {
        self.counts.lock().clone()
    }

    /// An attempt at an interval has ended.
    pub(super) fn ended(&self, ending: Ending) {
        let mut counts = self.counts.lock();
        *counts.intervals.entry(ending).or_default() += 1;
        if matches!(ending, Ending::Committed | Ending::Unchanged) {
            counts.completed_ms = now_ms();
        }
    }

    /// A cut was made.
    pub(super) fn cut(&self, graded: &Graded) {
        let mut counts = self.counts.lock();
        *counts.cuts.entry(graded.coherence).or_default() += 1;
        let quiesced = if graded.coherence == Coherence::Quiesced {
            Some(Quiesced::Held)
        } else {
            graded.why.iter().find_map(Quiesced::of)
        };
        if let Some(quiesced) = quiesced {
            *counts.quiesces.entry(quiesced).or_default() += 1;
        }
    }

    /// By policy nothing was cut.
    pub(super) fn skipped(&self, why: &Why) {
        if let Some(quiesced) = Quiesced::of(why) {
            *self.counts.lock().quiesces.entry(quiesced).or_default() += 1;
        }
        self.ended(Ending::Skipped);
    }

    /// Something failed.
    pub(super) fn failed(&self, reason: Reason) {
        *self
            .counts
            .lock()
            .errors
            .entry(reason.as_str())
            .or_default() += 1;
    }

    /// So many encoded bytes were sent.
    pub(super) fn sent(&self, bytes: u64) {
        self.counts.lock().sent_bytes += bytes;
    }

    /// So many bytes went over the link in this time, up to the receipt.
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    pub(super) fn link(&self, bytes: u64, took: Duration) {
        if bytes > 0 && !took.is_zero() {
            self.counts.lock().link_rate = Some(bytes as f64 / took.as_secs_f64());
        }
    }

    /// An interval was committed, and that is recorded.
    pub(super) fn committed(&self, raw_bytes: u64, moments: Moments) {
        self.counts.lock().raw_bytes += raw_bytes;
        self.ended(Ending::Committed);
        let stages = &self.stages;
        let now = Some(Instant::now());
        let Moments {
            due,
            cut,
            sealed,
            receipt,
        } = moments;
        for (stage, from, to) in [
            (&stages.moment, due, cut),
            (&stages.ship, cut, sealed),
            (&stages.commit, sealed, receipt),
            (&stages.settle, receipt, now),
            (&stages.whole, due, now),
        ] {
            // What began before this process did isn't known.
            if let (Some(from), Some(to)) = (from, to) {
                stage.record(to.duration_since(from));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graded(coherence: Coherence, why: Vec<Why>) -> Graded {
        Graded { coherence, why }
    }

    #[test]
    fn a_cut_counts_by_its_grade_and_by_what_became_of_the_quiesce() {
        let figures = Figures::default();
        figures.cut(&graded(Coherence::Quiesced, Vec::new()));
        let party = |failure| Why::Party {
            name: "agent db".to_owned(),
            failure,
        };
        let late = party(Failure::Late(Duration::from_secs(1)));
        figures.cut(&graded(Coherence::Crash, vec![late, Why::NotFlushed]));
        figures.cut(&graded(Coherence::Lull, vec![Why::NothingQuiesces]));
        figures.skipped(&party(Failure::Gone));
        let counts = figures.counts();
        let grades = [Coherence::Crash, Coherence::Lull, Coherence::Quiesced];
        assert_eq!(counts.cuts, grades.map(|grade| (grade, 1)).into());
        let outcomes = [Quiesced::Held, Quiesced::Gone, Quiesced::Late];
        assert_eq!(counts.quiesces, outcomes.map(|outcome| (outcome, 1)).into());
        assert_eq!(counts.intervals, [(Ending::Skipped, 1)].into());
        assert_eq!(counts.completed_ms, 0);
    }

    #[test]
    fn stages_that_began_before_the_process_are_not_guessed() {
        let figures = Figures::default();
        let now = Instant::now();
        figures.committed(
            8192,
            Moments {
                sealed: Some(now),
                receipt: Some(now + Duration::from_secs(2)),
                ..Moments::default()
            },
        );
        let stages = &figures.stages;
        let counted = [
            &stages.moment,
            &stages.ship,
            &stages.commit,
            &stages.settle,
            &stages.whole,
        ]
        .map(|stage| stage.counts().count());
        assert_eq!(counted, [0, 0, 1, 1, 0]);
        assert_eq!(stages.commit.counts().sum, 2.0);
        assert_eq!(figures.counts().raw_bytes, 8192);
    }
}
