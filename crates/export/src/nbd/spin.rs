//! Waiting for a client that sends its next request as soon as it has the last reply.
//!
//! On an idle machine, to sleep and be woken takes several times as long as a small request (reads at depth 1: 28,000
//! per second asleep, 62,000 awake, on two cores). So, where [`super::Limits::spin_max`] allows it, while requests come
//! one by one and quickly, the receiver looks again and again for a moment before it sleeps. On a busy machine that costs
//! others their processor, which is why it is off unless configured. A client that takes longer ends it, and so does
//! having been descheduled meanwhile, the sign that others want to run.

use std::io::{self, IoSliceMut};
use std::time::{Duration, Instant};

use super::socket::{Stream, is_timeout};

/// Two looks further apart than this: somebody else ran in between.
const DESCHEDULED: Duration = Duration::from_micros(40);
/// Waits to go without, then.
const PAUSE: u32 = 1024;
/// Successes remembered, and what a failure costs.
const CREDIT_MAX: u32 = 64;
const CREDIT_LOST: u32 = 8;

#[derive(Debug)]
pub(super) struct Spin {
    /// How long to look before sleeping.
    max: Duration,
    credit: u32,
    pause: u32,
}

impl Spin {
    pub(super) fn new(max: Duration) -> Self {
        Self {
            max,
            credit: 0,
            pause: 0,
        }
    }

    /// Waits for the next request, or the beginning of it. `one_by_one`: the client has one request in flight.
    pub(super) fn receive(
        &mut self,
        stream: &Stream,
        buf: &mut [u8],
        one_by_one: bool,
    ) -> io::Result<usize> {
        if self.max.is_zero() || !one_by_one {
            self.credit = 0;
            return stream.receive(buf);
        }
        if self.pause > 0 {
            self.pause -= 1;
            return stream.receive(buf);
        }
        let began = Instant::now();
        if self.credit > 0 {
            if let Some(received) = self.arriving(stream, &mut [IoSliceMut::new(buf)], began) {
                self.credit = (self.credit + 1).min(CREDIT_MAX);
                return received;
            }
            self.credit = self.credit.saturating_sub(CREDIT_LOST);
            return stream.receive(buf);
        }
        let received = stream.receive(buf);
        // Awake it would have been shorter, by the time that waking takes.
        if began.elapsed() <= self.max * 2 {
            self.credit = 1;
        }
        received
    }

    /// What arrives soon after `began`, if anything does and it is worth looking.
    pub(super) fn arriving(
        &mut self,
        stream: &Stream,
        bufs: &mut [IoSliceMut<'_>],
        began: Instant,
    ) -> Option<io::Result<usize>> {
        if self.credit == 0 {
            return None;
        }
        let mut last = Duration::ZERO;
        loop {
            match stream.receive_now(bufs) {
                Err(error) if is_timeout(&error) => {}
                received => return Some(received),
            }
            let now = began.elapsed();
            if now > last + DESCHEDULED {
                self.credit = 0;
                self.pause = PAUSE;
                return None;
            }
            if now > self.max {
                return None;
            }
            last = now;
            std::hint::spin_loop();
        }
    }
}
