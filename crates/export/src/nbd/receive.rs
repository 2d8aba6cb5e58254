//! The receiving half of a connection: a buffer that one system call fills with many requests.

use std::io::{self, IoSliceMut};
use std::time::{Duration, Instant};

use super::limits::RECEIVE_BUFFER_BYTES;
use super::request::RequestHeader;
use super::socket::{Stream, is_timeout};
use super::spin::Spin;
use super::wire::REQUEST_LEN;

/// Why nothing more is received.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    /// The client closed between two requests, or the server is stopping.
    #[error("the connection has ended")]
    Ended,
    /// The client closed in the middle of a request.
    #[error("the client vanished in the middle of a request")]
    Truncated,
    /// The client began a request and sent no more of it.
    #[error("the client stalled in the middle of a request")]
    Stalled,
    /// Not a request: the stream is out of step.
    #[error("the client sent something that is not a request")]
    BadMagic,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Failed(#[from] io::Error),
}

#[derive(Debug)]
pub(super) struct Receiver {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    spin: Spin,
    /// Requests taken since the last wait.
    taken: u32,
}

impl Receiver {
    pub(super) fn new(spin_max: Duration) -> Self {
        Self {
            buf: vec![0; RECEIVE_BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            spin: Spin::new(spin_max),
            taken: 0,
        }
    }

    fn buffered(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    fn consume(&mut self, n: usize) {
        self.start += n;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Whether a header, and as much of its payload as the buffer could ever hold, is here already.
    pub(super) fn has_request(&self) -> bool {
        let buffered = self.buffered();
        let Some(bytes) = buffered.first_chunk::<REQUEST_LEN>() else {
            return false;
        };
        // What is out of step is dealt with when it is taken.
        let payload =
            RequestHeader::decode(bytes).map_or(0, |header| header.payload_len() as usize);
        buffered.len() - REQUEST_LEN >= payload
    }

    /// The next request's header. `before_wait` runs before each system call that could block; `ended` says whether
    /// the server wants no more requests.
    pub(super) fn header(
        &mut self,
        stream: &Stream,
        ended: &dyn Fn() -> bool,
        before_wait: &mut dyn FnMut() -> io::Result<()>,
    ) -> Result<RequestHeader, ReceiveError> {
        loop {
            if ended() {
                return Err(ReceiveError::Ended);
            }
            if let Some(bytes) = self.buffered().first_chunk::<REQUEST_LEN>() {
                let header = RequestHeader::decode(bytes).ok_or(ReceiveError::BadMagic)?;
                self.consume(REQUEST_LEN);
                self.taken += 1;
                return Ok(header);
            }
            if self.start > 0 {
                self.buf.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            before_wait()?;
            // Several at a time: then the client does not wait for each reply, and sleeping costs it nothing.
            let one_by_one = std::mem::take(&mut self.taken) <= 1;
            match self
                .spin
                .receive(stream, &mut self.buf[self.end..], one_by_one)
            {
                Ok(0) if self.end == 0 => return Err(ReceiveError::Ended),
                Ok(0) => return Err(ReceiveError::Truncated),
                Ok(n) => self.end += n,
                Err(error) if is_timeout(&error) && self.end == 0 => {}
                Err(error) if is_timeout(&error) => return Err(ReceiveError::Stalled),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Fills `dest` with payload. What lies in the buffer is copied; the rest is received in place, together with
    /// whatever follows it.
    pub(super) fn payload(
        &mut self,
        stream: &Stream,
        mut dest: &mut [u8],
        time_max: Duration,
        before_wait: &mut dyn FnMut() -> io::Result<()>,
    ) -> Result<(), ReceiveError> {
        let here = dest.len().min(self.end - self.start);
        dest[..here].copy_from_slice(&self.buffered()[..here]);
        self.consume(here);
        dest = &mut dest[here..];
        let mut began = None;
        while !dest.is_empty() {
            before_wait()?;
            let wanted = dest.len();
            let bufs = &mut [IoSliceMut::new(dest), IoSliceMut::new(&mut self.buf)];
            let now = Instant::now();
            let began = *began.get_or_insert(now);
            let received = match self.spin.arriving(stream, bufs, now) {
                Some(received) => received,
                None => stream.receive_vectored(bufs),
            };
            let n = match received {
                Ok(0) => return Err(ReceiveError::Truncated),
                Ok(n) => n,
                Err(error) if is_timeout(&error) => return Err(ReceiveError::Stalled),
                Err(error) => return Err(error.into()),
            };
            if n >= wanted {
                self.end = n - wanted;
                return Ok(());
            }
            dest = &mut dest[n..];
            // A payload that trickles in is a stalled client too.
            if began.elapsed() > time_max {
                return Err(ReceiveError::Stalled);
            }
        }
        Ok(())
    }
}
