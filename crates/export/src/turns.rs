//! Who receives: the turns that the threads of one connection, or of one mount, take.
//!
//! One thread leads: it receives a request, performs it itself, replies, and receives the next. As long as requests end
//! quickly this is all there is, whatever the queue depth: no hand-over, and one system call brings many requests.
//! Before a request that is known to block, the leader lets go of the lead and summons another thread. Where a request
//! blocks unexpectedly, the server's watch takes the lead away from it, because the word below still shows the very
//! same request.
//!
//! The word: the state in its low two bits, above them a number that changes with every request that the leader performs
//! without letting go, so that a lead taken away is never taken for one's own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

const STATE: u64 = 0b11;
/// Nobody receives; any thread may.
const FREE: u64 = 0;
/// A thread receives.
const LEADING: u64 = 1;
/// The leader performs a request, and will receive again unless the lead is taken away.
const PERFORMING: u64 = 2;
/// Nobody receives any more.
const CLOSED: u64 = 3;

#[derive(Debug)]
pub(crate) struct Turns {
    word: AtomicU64,
    crowd: Mutex<Crowd>,
    summoned: Condvar,
    threads_max: usize,
}

#[derive(Debug)]
struct Crowd {
    threads: usize,
    idle: usize,
    summons: usize,
}

/// A request that the leader performs while the lead can be taken away.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Performing(u64);

/// What follows from letting go of the lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Summoned {
    /// Somebody who was idle, or whoever ends first, takes it.
    Somebody,
    /// A new thread must be started; it is counted already.
    NewThread,
}

/// How waiting for a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Lead.
    Lead,
    /// End this thread; it is no longer counted.
    Leave,
}

impl Turns {
    /// Begins with one thread, which leads.
    pub(crate) fn new(threads_max: usize) -> Self {
        Self {
            word: AtomicU64::new(LEADING),
            crowd: Mutex::new(Crowd {
                threads: 1,
                idle: 0,
                summons: 0,
            }),
            summoned: Condvar::new(),
            threads_max,
        }
    }

    /// Begins with so many threads, and no more: all of them may receive, until one has taken the lead.
    pub(crate) fn of(threads: usize) -> Self {
        Self {
            word: AtomicU64::new(FREE),
            crowd: Mutex::new(Crowd {
                threads,
                idle: 0,
                summons: 0,
            }),
            summoned: Condvar::new(),
            threads_max: threads,
        }
    }

    /// Leader: performs a request without letting go.
    pub(crate) fn begin(&self) -> Performing {
        // Only the leader writes while the state is LEADING, except for a close.
        let word = self.word.load(Ordering::Relaxed);
        if word & STATE == CLOSED {
            return Performing(word);
        }
        let performing = ((word >> 2) + 1) << 2 | PERFORMING;
        // SeqCst: the watch must see this, or we see that it sleeps.
        match self
            .word
            .compare_exchange(word, performing, Ordering::SeqCst, Ordering::Relaxed)
        {
            Ok(_) => Performing(performing),
            Err(closed) => Performing(closed),
        }
    }

    /// Whether the lead is still ours after [`Turns::begin`], or free to be taken.
    pub(crate) fn end(&self, performing: Performing) -> bool {
        let leading = performing.0 & !STATE | LEADING;
        performing.0 & STATE == PERFORMING
            && self
                .word
                .compare_exchange(performing.0, leading, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            || self.try_lead()
    }

    /// Takes the lead if nobody has it.
    pub(crate) fn try_lead(&self) -> bool {
        let take = |word| (word & STATE == FREE).then_some(word | LEADING);
        self.word
            .try_update(Ordering::AcqRel, Ordering::Relaxed, take)
            .is_ok()
    }

    /// Leader: lets go of the lead.
    pub(crate) fn hand_over(&self) -> Summoned {
        let release = |word| (word & STATE == LEADING).then_some(word & !STATE);
        let _closed = self
            .word
            .try_update(Ordering::AcqRel, Ordering::Relaxed, release);
        self.summon()
    }

    /// The word of a request that is being performed, for [`Turns::take_away`].
    pub(crate) fn performing(&self) -> Option<u64> {
        let word = self.word.load(Ordering::SeqCst);
        (word & STATE == PERFORMING).then_some(word)
    }

    /// Takes the lead away from the request `word`, if it is still being performed.
    pub(crate) fn take_away(&self, word: u64) -> Option<Summoned> {
        self.word
            .compare_exchange(word, word & !STATE, Ordering::AcqRel, Ordering::Relaxed)
            .ok()?;
        Some(self.summon())
    }

    fn summon(&self) -> Summoned {
        let mut crowd = self.crowd.lock();
        if crowd.idle > crowd.summons {
            crowd.summons += 1;
            self.summoned.notify_one();
        } else if crowd.idle == 0 && crowd.threads < self.threads_max {
            crowd.threads += 1;
            return Summoned::NewThread;
        }
        Summoned::Somebody
    }

    /// Nobody receives from now on; everyone leaves when done.
    pub(crate) fn close(&self) {
        self.word.fetch_or(CLOSED, Ordering::AcqRel);
        let crowd = self.crowd.lock();
        self.summoned.notify_all();
        drop(crowd);
    }

    fn closed(&self) -> bool {
        self.word.load(Ordering::Acquire) & STATE == CLOSED
    }

    /// Waits until the lead is to be taken. A thread without work for `idle_max` leaves: there is another, because the
    /// lead is either held or free for whoever performs a request now.
    pub(crate) fn wait(&self, idle_max: Duration) -> Turn {
        let mut crowd = self.crowd.lock();
        loop {
            if self.closed() {
                crowd.threads -= 1;
                return Turn::Leave;
            }
            if self.try_lead() {
                return Turn::Lead;
            }
            crowd.idle += 1;
            let waited = self.summoned.wait_for(&mut crowd, idle_max);
            crowd.idle -= 1;
            if crowd.summons > 0 {
                crowd.summons -= 1;
            } else if waited.timed_out() && crowd.threads > 1 && !self.closed() {
                if self.try_lead() {
                    return Turn::Lead;
                }
                crowd.threads -= 1;
                return Turn::Leave;
            }
        }
    }

    /// Takes back the count of a thread that could not be started.
    pub(crate) fn not_started(&self) {
        self.crowd.lock().threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lead_stays_with_a_quick_thread_and_is_taken_from_a_stuck_one() {
        let turns = Turns::new(2);
        let quick = turns.begin();
        assert!(turns.end(quick));
        let stuck = turns.begin();
        let word = turns.performing().unwrap();
        assert_eq!(turns.take_away(word), Some(Summoned::NewThread));
        assert!(turns.try_lead(), "the new thread leads");
        let other = turns.begin();
        assert!(
            !turns.end(stuck),
            "the old thread must not take the new one's lead"
        );
        assert!(turns.end(other));
    }

    #[test]
    fn a_stale_word_takes_no_lead_away() {
        let turns = Turns::new(2);
        let first = turns.begin();
        let word = turns.performing().unwrap();
        assert!(turns.end(first));
        let second = turns.begin();
        assert_eq!(turns.take_away(word), None);
        assert!(turns.end(second));
    }

    #[test]
    fn no_more_threads_are_started_than_allowed() {
        let turns = Turns::new(2);
        assert_eq!(turns.hand_over(), Summoned::NewThread);
        assert!(turns.try_lead());
        assert_eq!(turns.hand_over(), Summoned::Somebody);
        assert!(turns.try_lead(), "whoever ends first takes the free lead");
    }

    #[test]
    fn of_threads_that_are_all_there_one_leads_and_none_is_started() {
        let turns = Turns::of(2);
        assert!(turns.try_lead());
        assert!(!turns.try_lead(), "one is enough");
        let stuck = turns.begin();
        let word = turns.performing().unwrap();
        assert_eq!(turns.take_away(word), Some(Summoned::Somebody));
        assert_eq!(turns.wait(Duration::MAX), Turn::Lead, "whoever stands by");
        assert!(!turns.end(stuck));
    }

    #[test]
    fn a_request_that_begins_after_a_close_does_not_undo_it() {
        let turns = Turns::of(2);
        assert!(turns.try_lead());
        turns.close();
        let late = turns.begin();
        assert_eq!(turns.performing(), None);
        assert!(!turns.end(late));
        assert_eq!(turns.wait(Duration::MAX), Turn::Leave);
    }

    #[test]
    fn after_a_close_nobody_leads_and_everybody_leaves() {
        let turns = Turns::new(2);
        assert_eq!(turns.hand_over(), Summoned::NewThread);
        assert!(turns.try_lead());
        let running = turns.begin();
        turns.close();
        assert!(!turns.end(running));
        assert_eq!(turns.wait(Duration::ZERO), Turn::Leave);
        assert_eq!(turns.wait(Duration::ZERO), Turn::Leave);
    }
}
