//! The watch: one thread per server that notices requests which block although nobody expected it, and lets another
//! thread receive on in their place. It sleeps while nothing is performed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// A request that is still the same at two ticks is blocked.
const TICK: Duration = Duration::from_millis(4);
/// Ticks without any request before the watch goes to sleep.
const QUIET_TICKS: u32 = 8;

#[derive(Debug, Default)]
pub(crate) struct Watch {
    awake: AtomicBool,
    stop: Mutex<bool>,
    wake: Condvar,
}

impl Watch {
    /// Called whenever a request begins with the lead in hand.
    pub(crate) fn nudge(&self) {
        // SeqCst: either the watch sees the request that has just begun, or we see that it sleeps.
        if !self.awake.load(Ordering::SeqCst) {
            let stop = self.stop.lock();
            self.awake.store(true, Ordering::SeqCst);
            self.wake.notify_one();
            drop(stop);
        }
    }

    pub(crate) fn stop(&self) {
        *self.stop.lock() = true;
        self.wake.notify_one();
    }

    /// `false` once stopped.
    fn pause(&self, sleep: bool) -> bool {
        let mut stop = self.stop.lock();
        if *stop {
            return false;
        }
        if sleep {
            while !*stop && !self.awake.load(Ordering::SeqCst) {
                self.wake.wait(&mut stop);
            }
        } else {
            self.wake.wait_for(&mut stop, TICK);
        }
        !*stop
    }

    /// The life of the watch's thread. `look` gives the lead of requests that it finds the same as at its last look to
    /// others, and tells whether any is being performed with the lead in hand.
    pub(crate) fn keep(&self, mut look: impl FnMut() -> bool) {
        let mut quiet = 0;
        loop {
            quiet = if look() { 0 } else { quiet + 1 };
            let mut sleep = false;
            if quiet >= QUIET_TICKS {
                self.awake.store(false, Ordering::SeqCst);
                sleep = !look();
                if !sleep {
                    self.awake.store(true, Ordering::SeqCst);
                }
                quiet = 0;
            }
            if !self.pause(sleep) {
                return;
            }
        }
    }
}
