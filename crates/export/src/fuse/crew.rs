//! The threads of a mount: one receives, performs and replies, the others stand by.
//!
//! A thread that returns to the session's loop asks the kernel for a request, and the kernel gives each to whoever has
//! waited for the longest time: requests that come one by one would wake another thread each, on another processor, with
//! none of the last request's memory at hand. So a thread that has replied goes back only where it leads
//! ([`Turns`]), and stands by here otherwise. Before a request that is known to block, or while requests have lately been
//! slow and kept others waiting ([`Pace`]), the leader lets another one receive; from a request that blocks unexpectedly
//! the lead is taken away ([`Watch`]). So requests are performed together where that helps, as many as there are threads.

use std::cell::Cell;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::session::WORKERS;
use crate::pace::Pace;
use crate::turns::{Turn, Turns};
use crate::watch::Watch;

thread_local! {
    /// Whether this thread, which serves one mount all its life, leads.
    static LEADS: Cell<bool> = const { Cell::new(false) };
}

/// The turns of a mount's threads.
pub(super) struct Crew {
    turns: Turns,
    pace: Pace,
    watch: Watch,
    /// What the watch saw of `turns` when it last looked.
    watched: AtomicU64,
    /// The device that requests come from.
    device: OwnedFd,
}

impl fmt::Debug for Crew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew")
            .field("turns", &self.turns)
            .finish_non_exhaustive()
    }
}

impl Crew {
    pub(super) fn new(device: OwnedFd) -> Self {
        Self {
            turns: Turns::of(WORKERS),
            pace: Pace::default(),
            watch: Watch::default(),
            watched: AtomicU64::new(0),
            device,
        }
    }

    /// Performs a request, its reply included. On return this thread is to receive the next.
    pub(super) fn perform(&self, work: impl FnOnce()) {
        self.perform_with(self.pace.is_slow(), work);
    }

    /// As [`Self::perform`], while another thread receives: the request is known to take its time.
    pub(super) fn perform_aside(&self, work: impl FnOnce()) {
        self.perform_with(true, work);
    }

    fn perform_with(&self, aside: bool, work: impl FnOnce()) {
        // Also whoever was woken beside the leader: that happens to each once, at the beginning.
        let leads = LEADS.take() || self.turns.try_lead();
        let still = if leads && !aside {
            let performing = self.turns.begin();
            self.watch.nudge();
            work();
            self.turns.end(performing)
        } else {
            if leads {
                // As many threads as there may be are there from the beginning.
                let _somebody = self.turns.hand_over();
            }
            work();
            self.turns.try_lead()
        };
        LEADS.set(still || self.turns.wait(Duration::MAX) == Turn::Lead);
    }

    /// What a request asks for, without its reply: whoever waits for that may send the next request at once, and that one
    /// would not have waited.
    pub(super) fn timed<T>(&self, work: impl FnOnce() -> T) -> T {
        self.pace.begin(false);
        let began = Instant::now();
        let result = work();
        self.pace.note(began.elapsed(), || self.has_arrived());
        self.pace.end();
        result
    }

    /// Whether another request waits in the kernel.
    fn has_arrived(&self) -> bool {
        let mut device = [PollFd::new(&self.device, PollFlags::IN)];
        poll(&mut device, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// The life of the watch's thread, until [`Self::close`].
    pub(super) fn keep_watch(&self) {
        self.watch.keep(|| {
            let Some(word) = self.turns.performing() else {
                return false;
            };
            if self.watched.swap(word, Ordering::Relaxed) == word {
                let _summoned = self.turns.take_away(word);
            }
            true
        });
    }

    /// From now on every thread receives, so that each sees when there is nothing more to receive.
    pub(super) fn close(&self) {
        self.turns.close();
        self.watch.stop();
    }
}
