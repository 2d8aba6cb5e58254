//! The watch: one thread per server that notices requests which block although nobody expected it, and lets another
//! thread of their connection receive on. It sleeps while nothing is performed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::service::Service;

/// A request that is still the same at two ticks is blocked.
const TICK: Duration = Duration::from_millis(4);
/// Ticks without any request before the watch goes to sleep.
const QUIET_TICKS: u32 = 8;

#[derive(Debug, Default)]
pub(super) struct Watch {
    awake: AtomicBool,
    stop: Mutex<bool>,
    wake: Condvar,
}

impl Watch {
    /// Called whenever a request begins with the lead in hand.
    pub(super) fn nudge(&self) {
        // SeqCst: either the watch sees the request that has just begun, or we see that it sleeps.
        if !self.awake.load(Ordering::SeqCst) {
            let stop = self.stop.lock();
            self.awake.store(true, Ordering::SeqCst);
            self.wake.notify_one();
            drop(stop);
        }
    }

    pub(super) fn stop(&self) {
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
}

/// The watch's thread.
pub(super) fn keep_watch(service: &Service) {
    let mut quiet = 0;
    loop {
        let looked = look(service);
        quiet = if looked { 0 } else { quiet + 1 };
        let mut sleep = false;
        if quiet >= QUIET_TICKS {
            service.watch.awake.store(false, Ordering::SeqCst);
            sleep = !look(service);
            if !sleep {
                service.watch.awake.store(true, Ordering::SeqCst);
            }
            quiet = 0;
        }
        if !service.watch.pause(sleep) {
            return;
        }
    }
}

fn look(service: &Service) -> bool {
    // Not under the lock: the last handle of a session, when dropped, takes it.
    let sessions = service.sessions();
    let mut busy = false;
    for session in &sessions {
        busy |= session.look();
    }
    busy
}
