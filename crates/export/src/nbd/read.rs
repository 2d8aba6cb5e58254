//! Requests that return content: `READ` and `BLOCK_STATUS`.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::limits::{HOLE_READ_MIN, STATUS_EXTENTS_MAX, THREAD_BUFFER_BYTES};
use super::reply;
use super::request::RequestHeader;
use super::session::{Session, Worker};
use crate::device::AllocationExtent;
use crate::errno::NbdError;

/// Bytes of data in one chunk of a large read: it stays within a core's own cache between device and socket.
const READ_CHUNK_BYTES: usize = 256 << 10;

/// Extents asked for at a time while a read looks for holes.
const READ_EXTENTS_MAX: usize = 16;

/// Large reads answered without looking for holes after one that found none; doubled each time, at most this.
const HUNT_PAUSE_MAX: u32 = 64;
/// The same after a look that took longer than [`HUNT_SLOW`].
const HUNT_PAUSE_SLOW: u32 = 4096;
const HUNT_SLOW: Duration = Duration::from_micros(500);

/// Whether large reads should look for holes first. On dense content that is a wasted call (on tmpfs, which looks at
/// every page, one of milliseconds), so it is done less and less often while none are found.
#[derive(Debug, Default)]
pub(super) struct HoleHunt {
    /// Reads to go without.
    skip: AtomicU32,
    /// How many the next pause is.
    pause: AtomicU32,
}

impl HoleHunt {
    /// Not exact among threads, and need not be.
    fn look(&self) -> bool {
        let skip = self.skip.load(Ordering::Relaxed);
        self.skip.store(skip.saturating_sub(1), Ordering::Relaxed);
        skip == 0
    }

    fn looked(&self, found: bool, took: Duration) {
        let pause = match (took > HUNT_SLOW, found) {
            (true, _) => HUNT_PAUSE_SLOW,
            (false, true) => 0,
            (false, false) => (self.pause.load(Ordering::Relaxed) * 2).clamp(1, HUNT_PAUSE_MAX),
        };
        self.pause
            .store(pause.min(HUNT_PAUSE_MAX), Ordering::Relaxed);
        self.skip.store(pause, Ordering::Relaxed);
    }
}

impl Session {
    pub(super) fn read(
        &self,
        header: &RequestHeader,
        unfragmented: bool,
        worker: &mut Worker,
        hold: bool,
    ) {
        let length = header.length as usize;
        if length == 0 {
            let structured = self.terms().structured_replies;
            return if structured {
                self.reply(&[&reply::none_chunk(header.cookie)], hold);
            } else {
                self.reply(&[&reply::simple(header.cookie, None)], hold);
            };
        }
        if self.terms().structured_replies && !unfragmented && header.length >= HOLE_READ_MIN {
            return self.read_in_chunks(header, worker);
        }
        let buffer = worker.buffer(self.service(), length);
        match buffer.get_mut(..length) {
            Some(data) => self.read_at_once(header, data, hold),
            None => self.read_in_pieces(header, buffer),
        }
    }

    fn read_at_once(&self, header: &RequestHeader, data: &mut [u8], hold: bool) {
        if let Err(error) = self.call(|device| device.read(header.offset, data)) {
            return self.reply_error(header, error, hold);
        }
        if self.terms().structured_replies {
            let head = reply::data_chunk(header.cookie, true, header.offset, header.length);
            self.reply(&[&head, data], hold);
        } else {
            self.reply(&[&reply::simple(header.cookie, None), data], hold);
        }
    }

    /// A read larger than any buffer, whose reply may not be divided. A failure after the first piece can be told only
    /// by a client's error chunk (the content being padded), or, in a simple reply, by closing.
    fn read_in_pieces(&self, header: &RequestHeader, buffer: &mut [u8]) {
        let length = header.length as usize;
        let (first, mut done) = (buffer.len(), buffer.len());
        if let Err(error) = self.call(|device| device.read(header.offset, buffer)) {
            return self.reply_error(header, error, false);
        }
        let structured = self.terms().structured_replies;
        let mut failed: Option<NbdError> = None;
        let mut second = vec![0; THREAD_BUFFER_BYTES];
        let mut next = |piece: &mut [u8]| -> io::Result<Option<usize>> {
            let n = piece.len().min(length - done);
            if n == 0 {
                return Ok(None);
            }
            let piece = &mut piece[..n];
            let offset = header.offset + done as u64;
            done += n;
            if failed.is_none() {
                failed = self.call(|device| device.read(offset, piece)).err();
            }
            if failed.is_some() {
                if !structured {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                piece.fill(0);
            }
            Ok(Some(n))
        };
        let stream = self.stream();
        let sent = if structured {
            let head = reply::data_chunk(header.cookie, false, header.offset, header.length);
            self.sender()
                .stream_reply(stream, &head, &buffer[..first], &mut second, &mut next)
        } else {
            let head = reply::simple(header.cookie, None);
            self.sender()
                .stream_reply(stream, &head, &buffer[..first], &mut second, &mut next)
        };
        self.sent(sent);
        match failed {
            _ if !structured => {}
            None => self.reply(&[&reply::none_chunk(header.cookie)], false),
            Some(error) => self.reply(&[&reply::error_chunk(header.cookie, error)], false),
        }
    }

    /// A read whose reply may be divided: holes as holes, data in chunks.
    fn read_in_chunks(&self, header: &RequestHeader, worker: &mut Worker) {
        let end = header.offset + u64::from(header.length);
        let mut at = header.offset;
        while at < end {
            let left = end - at;
            let told = self.extents_of_read(at, left);
            for extent in told {
                // Only what is left of the request, so it fits 32 bits.
                let run = u32::try_from(extent.length.min(end - at)).unwrap_or(u32::MAX);
                if run == 0 {
                    continue;
                }
                if extent.zero {
                    let done = at + u64::from(run) == end;
                    self.reply(&[&reply::hole_chunk(header.cookie, done, at, run)], false);
                } else {
                    let buffer = worker.buffer(self.service(), run as usize);
                    if !self.read_run(header, at, run, end, buffer) {
                        return;
                    }
                }
                at += u64::from(run);
            }
        }
    }

    /// What is known of the next `left` bytes of a read: at least one byte of them.
    fn extents_of_read(&self, at: u64, left: u64) -> Vec<AllocationExtent> {
        let data = || {
            vec![AllocationExtent {
                length: left,
                hole: false,
                zero: false,
            }]
        };
        if !self.hole_hunt.look() {
            return data();
        }
        let began = Instant::now();
        // A device that can't tell is read.
        let told = self
            .call(|device| device.extents(at, left, READ_EXTENTS_MAX))
            .unwrap_or_default();
        self.hole_hunt
            .looked(told.iter().any(|extent| extent.zero), began.elapsed());
        if told.iter().all(|extent| extent.length == 0) {
            data()
        } else {
            told
        }
    }

    /// Sends one run of data, in chunks. `false`: the request has failed, and the client has been told.
    fn read_run(
        &self,
        header: &RequestHeader,
        at: u64,
        run: u32,
        end: u64,
        buffer: &mut [u8],
    ) -> bool {
        let chunk_max = buffer.len().min(READ_CHUNK_BYTES);
        let mut sent = 0;
        while sent < run as usize {
            let n = chunk_max.min(run as usize - sent);
            let offset = at + sent as u64;
            let data = &mut buffer[..n];
            if let Err(error) = self.call(|device| device.read(offset, data)) {
                self.reply_error(header, error, false);
                return false;
            }
            sent += n;
            let done = at + sent as u64 == end;
            // At most a chunk, so it fits 32 bits.
            let length = u32::try_from(n).unwrap_or(u32::MAX);
            self.reply(
                &[
                    &reply::data_chunk(header.cookie, done, offset, length),
                    data,
                ],
                false,
            );
        }
        true
    }

    pub(super) fn block_status(&self, header: &RequestHeader, one: bool, hold: bool) {
        let max = if one { 1 } else { STATUS_EXTENTS_MAX };
        let length = u64::from(header.length);
        match self.call(|device| device.extents(header.offset, length, max)) {
            Ok(extents) => {
                let mut out = Vec::with_capacity(64);
                reply::block_status(&mut out, header.cookie, header.length, &extents, max);
                self.reply(&[&out], hold);
            }
            Err(error) => self.reply_error(header, error, hold),
        }
    }
}
