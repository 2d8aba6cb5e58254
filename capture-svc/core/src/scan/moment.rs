//! When what was read of a file is the file as it was at one moment.
//!
//! A pass is: look at the file's times, sync it (so that the next store through a mapping faults and sets them), read all of
//! it, sync it, look again. It counts
//!
//! - where everyone holds still: if the times at its end are those at its beginning;
//! - else: if the next pass, begun after it ended, reads the same everywhere, and the times are the same at all four looks.
//!   Then nothing began to be written from the first look to the last, and whatever was under way wrote nothing between two
//!   reads of a block: the file is, as a whole, what was read, at the moment at which the one pass ended and the other had
//!   not begun.
//!
//! Otherwise it is tried again when the file has been left alone for `lull_min`, until `lull_wait_max` is over.
//!
//! Times are durations since any fixed moment of a monotonic clock.

use std::time::Duration;

use thiserror::Error;

/// Between two looks at a file that is being written.
const LOOK_PERIOD: Duration = Duration::from_millis(20);
/// The coarsest step of the clock that files are stamped with is 10 ms: within it two writes may leave the same times.
const TIMES_SETTLE_NS: i128 = 100_000_000;

/// The times of a file, as the filesystem tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileTimes {
    /// Modification: seconds since 1970.
    pub modified_s: i64,
    /// And nanoseconds.
    pub modified_ns: u32,
    /// Change of the inode, which nobody can set: seconds since 1970.
    pub changed_s: i64,
    /// And nanoseconds.
    pub changed_ns: u32,
}

impl FileTimes {
    /// How long before `now_ns` (nanoseconds since 1970) the file was written last; zero where that is later.
    #[must_use]
    pub fn age(&self, now_ns: i128) -> Duration {
        let nanos = u64::try_from((now_ns - self.newest_ns()).max(0));
        Duration::from_nanos(nanos.unwrap_or(u64::MAX))
    }

    /// Whether any later write must leave other times, as seen at `now_ns`.
    #[must_use]
    pub fn is_settled(&self, now_ns: i128) -> bool {
        now_ns - self.newest_ns() >= TIMES_SETTLE_NS
    }

    fn newest_ns(&self) -> i128 {
        let ns = |s: i64, ns: u32| i128::from(s) * 1_000_000_000 + i128::from(ns);
        ns(self.modified_s, self.modified_ns).max(ns(self.changed_s, self.changed_ns))
    }
}

/// What is known of the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Everyone who was asked says that it holds still.
    Quiesced,
    /// It may write at any time.
    Live {
        /// The longest wait for a moment at which it doesn't.
        lull_wait_max: Duration,
        /// So long without a write is one.
        lull_min: Duration,
    },
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Look at the file's times after so long.
    Look(Duration),
    /// Read all of it; with `first`, put aside what differs, else compare with what the first one read.
    Pass {
        /// The first one of an attempt.
        first: bool,
    },
    /// What the first pass put aside is the file at one moment.
    Accept,
    /// There was no such moment.
    Refuse(Unsteady),
}

/// Why there was no moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Unsteady {
    /// Somebody wrote though everyone was said to hold still.
    #[error(
        "it was written to while its workload was said to hold still: have quiesce_pre or the agent stop every writer of the \
         file, and sync what is mounted from it"
    )]
    Quiesced,
    /// It was written to all along.
    #[error(
        "it was written to without a pause of lull_min, or while it was read: quiesce the workload (quiesce_pre, or an agent), \
         raise lull_wait_max, or use the engine intercept or reflink"
    )]
    Live,
}

/// How a pass went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// The times before and after it.
    pub before: FileTimes,
    /// Those after it.
    pub after: FileTimes,
    /// It wasn't ended early.
    pub whole: bool,
    /// It read everywhere what the first one did; of a first one, true.
    pub agrees: bool,
}

/// The search for a moment.
#[derive(Debug)]
pub struct Search {
    workload: Workload,
    until: Duration,
    /// The times at both ends of the first pass of this attempt.
    first: Option<FileTimes>,
}

impl Search {
    /// Begins at `now`.
    #[must_use]
    pub fn begin(now: Duration, workload: Workload) -> (Self, Step) {
        let (until, step) = match workload {
            Workload::Quiesced => (now, Step::Pass { first: true }),
            Workload::Live { lull_wait_max, .. } => (
                now.saturating_add(lull_wait_max),
                Step::Look(Duration::ZERO),
            ),
        };
        let search = Self {
            workload,
            until,
            first: None,
        };
        (search, step)
    }

    /// The file was written last `age` ago. At the end of the wait an attempt is made all the same: it may have just begun
    /// to rest.
    #[must_use]
    pub fn looked(&self, now: Duration, age: Duration) -> Step {
        let Workload::Live { lull_min, .. } = self.workload else {
            return Step::Pass { first: true };
        };
        if age >= lull_min || now >= self.until {
            return Step::Pass { first: true };
        }
        let rest = (lull_min - age).min(self.until - now);
        Step::Look(rest.clamp(Duration::from_millis(1), LOOK_PERIOD))
    }

    /// A pass has ended.
    #[must_use]
    pub fn passed(&mut self, now: Duration, pass: &Passed) -> Step {
        let steady = pass.whole && pass.before == pass.after;
        if self.workload == Workload::Quiesced {
            return match steady {
                true => Step::Accept,
                false => Step::Refuse(Unsteady::Quiesced),
            };
        }
        match self.first.take() {
            None if steady => {
                self.first = Some(pass.after);
                Step::Pass { first: false }
            }
            Some(first) if steady && pass.agrees && pass.before == first => Step::Accept,
            _ if now >= self.until => Step::Refuse(Unsteady::Live),
            _ => Step::Look(LOOK_PERIOD),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const LIVE: Workload = Workload::Live {
        lull_wait_max: Duration::from_millis(100),
        lull_min: Duration::from_millis(50),
    };

    fn at(modified_s: i64) -> FileTimes {
        FileTimes {
            modified_s,
            changed_s: modified_s,
            ..FileTimes::default()
        }
    }

    fn pass(before: i64, after: i64, agrees: bool) -> Passed {
        Passed {
            before: at(before),
            after: at(after),
            whole: true,
            agrees,
        }
    }

    const FIRST: Step = Step::Pass { first: true };
    const SECOND: Step = Step::Pass { first: false };

    #[test]
    fn under_quiesce_one_pass_counts_unless_the_times_say_that_somebody_wrote() {
        for (after, verdict) in [(1, Step::Accept), (2, Step::Refuse(Unsteady::Quiesced))] {
            let (mut search, step) = Search::begin(MS, Workload::Quiesced);
            assert_eq!(step, FIRST);
            assert_eq!(search.passed(9 * MS, &pass(1, after, true)), verdict);
        }
        let (mut search, _) = Search::begin(MS, Workload::Quiesced);
        let early = Passed {
            whole: false,
            ..pass(1, 1, true)
        };
        let verdict = search.passed(9 * MS, &early);
        assert_eq!(verdict, Step::Refuse(Unsteady::Quiesced));
    }

    #[test]
    fn without_it_two_passes_have_to_agree_and_all_four_looks() {
        for (first, second, accepted) in [
            (pass(1, 1, true), pass(1, 1, true), true),
            // A write that was under way at all looks.
            (pass(1, 1, true), pass(1, 1, false), false),
            // Somebody wrote the same bytes, or others and then these again, between the passes or in the second.
            (pass(1, 1, true), pass(2, 2, true), false),
            (pass(1, 1, true), pass(1, 2, true), false),
        ] {
            for (now, refused) in [
                (50 * MS, Step::Look(LOOK_PERIOD)),
                (100 * MS, Step::Refuse(Unsteady::Live)),
            ] {
                let (mut search, step) = Search::begin(Duration::ZERO, LIVE);
                assert_eq!(step, Step::Look(Duration::ZERO));
                assert_eq!(search.looked(MS, 60 * MS), FIRST);
                assert_eq!(search.passed(2 * MS, &first), SECOND);
                let verdict = search.passed(now, &second);
                assert_eq!(
                    verdict,
                    if accepted { Step::Accept } else { refused },
                    "{second:?}"
                );
            }
        }
        // A first pass in which somebody wrote is followed by no second one.
        let (mut search, _) = Search::begin(Duration::ZERO, LIVE);
        assert_eq!(
            search.passed(MS, &pass(1, 2, true)),
            Step::Look(LOOK_PERIOD)
        );
        // The passes of two attempts are no two passes of one.
        assert_eq!(search.passed(2 * MS, &pass(2, 2, true)), SECOND);
        assert_eq!(
            search.passed(3 * MS, &pass(2, 2, false)),
            Step::Look(LOOK_PERIOD)
        );
        assert_eq!(search.passed(4 * MS, &pass(2, 2, true)), SECOND);
    }

    #[test]
    fn a_file_that_is_written_is_waited_for_and_tried_once_more_at_the_end() {
        let (search, _) = Search::begin(Duration::ZERO, LIVE);
        assert_eq!(search.looked(MS, 49 * MS), Step::Look(MS));
        assert_eq!(search.looked(MS, Duration::ZERO), Step::Look(LOOK_PERIOD));
        assert_eq!(search.looked(95 * MS, Duration::ZERO), Step::Look(5 * MS));
        assert_eq!(search.looked(100 * MS, Duration::ZERO), FIRST);
        assert_eq!(search.looked(MS, 50 * MS), FIRST);
    }

    #[test]
    fn times_are_settled_when_the_clock_has_passed_on() {
        let times = FileTimes {
            modified_s: 10,
            modified_ns: 5,
            changed_s: 10,
            changed_ns: 900_000_000,
        };
        for (now_ns, settled) in [
            (10_999_999_999, false),
            (11_000_000_000, true),
            // The clock was set back, or the file's times were set forward.
            (9_000_000_000, false),
        ] {
            assert_eq!(times.is_settled(now_ns), settled, "{now_ns}");
        }
        assert_eq!(times.age(10_950_000_000), 50 * MS);
        assert_eq!(times.age(9_000_000_000), Duration::ZERO);
    }
}
