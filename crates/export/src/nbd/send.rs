//! The sending half of a connection.
//!
//! Replies may be held back while the thread that made them has the next request in hand already; they then leave by
//! one system call. They lie here, not with the thread, so that whoever takes over a connection whose thread got
//! stuck in the device can send them.

use std::io::{self, IoSlice};

use parking_lot::Mutex;

use super::socket::Stream;

/// Bytes of replies held back at most.
const HELD_BYTES_MAX: usize = 32 << 10;
/// Data up to this size are copied behind held replies; larger ones are sent at once, from where they lie.
const COPIED_BYTES_MAX: usize = 8 << 10;

#[derive(Debug, Default)]
pub(super) struct Sender {
    state: Mutex<Outbox>,
}

#[derive(Debug, Default)]
struct Outbox {
    held: Vec<u8>,
    failed: bool,
}

impl Outbox {
    fn send(&mut self, stream: &Stream, parts: &[&[u8]]) -> io::Result<()> {
        if self.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let sent = match parts {
            [] => stream.send_all(&mut [IoSlice::new(&self.held)]),
            [head] => stream.send_all(&mut [IoSlice::new(&self.held), IoSlice::new(head)]),
            [head, data] => stream.send_all(&mut [
                IoSlice::new(&self.held),
                IoSlice::new(head),
                IoSlice::new(data),
            ]),
            _ => {
                let mut all = vec![IoSlice::new(&self.held)];
                all.extend(parts.iter().map(|part| IoSlice::new(part)));
                stream.send_all(&mut all)
            }
        };
        self.held.clear();
        // After a failure the stream is out of step: nothing may be sent any more.
        self.failed |= sent.is_err();
        sent
    }
}

impl Sender {
    /// Sends `parts` as one piece, after everything held; or holds them where `hold` and they are small.
    pub(super) fn reply(&self, stream: &Stream, parts: &[&[u8]], hold: bool) -> io::Result<()> {
        let mut outbox = self.state.lock();
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if hold
            && !outbox.failed
            && length <= COPIED_BYTES_MAX
            && outbox.held.len() + length <= HELD_BYTES_MAX
        {
            for part in parts {
                outbox.held.extend_from_slice(part);
            }
            return Ok(());
        }
        outbox.send(stream, parts)
    }

    /// Sends what is held.
    pub(super) fn flush(&self, stream: &Stream) -> io::Result<()> {
        let mut outbox = self.state.lock();
        if outbox.held.is_empty() && !outbox.failed {
            Ok(())
        } else {
            outbox.send(stream, &[])
        }
    }

    /// Sends `head` and then pieces of data as `next` brings them, none of another reply between. `next` returns
    /// `None` at the end; its error means that the promise of `head` can't be kept, and ends the connection.
    pub(super) fn stream_reply<'a>(
        &self,
        stream: &Stream,
        head: &[u8],
        first: &[u8],
        buf: &'a mut [u8],
        next: &mut dyn FnMut(&mut [u8]) -> io::Result<Option<usize>>,
    ) -> io::Result<()> {
        let mut outbox = self.state.lock();
        outbox.send(stream, &[head, first])?;
        loop {
            match next(buf) {
                Ok(Some(n)) => outbox.send(stream, &[&buf[..n]])?,
                Ok(None) => return Ok(()),
                Err(error) => {
                    outbox.failed = true;
                    return Err(error);
                }
            }
        }
    }
}
