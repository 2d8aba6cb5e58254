//! The transmission phase of one connection.
//!
//! The thread that received a request performs it and replies ([`crate::turns`] says who receives next). A request that
//! is known to block (a flush, anything with FUA) passes the lead on first; so does every request while this
//! connection's device calls have lately been slow. A quick request is performed with the lead in hand.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};

use super::limits::{REQUEST_PAYLOAD_MAX, THREAD_BUFFER_BYTES};
use super::negotiate::Agreement;
use super::pool::LargeBuffer;
use super::read::HoleHunt;
use super::receive::{ReceiveError, Receiver};
use super::reply;
use super::request::{self, Command, RequestHeader, Terms};
use super::send::Sender;
use super::service::{Registration, Service};
use super::socket::Stream;
use crate::device::{BlockDevice, Durability};
use crate::errno::{NbdError, nbd_error};
use crate::exports::ConnectedClient;
use crate::pace::Pace;
use crate::turns::{Summoned, Turn, Turns};

/// The whole payload of a request may take this many receive timeouts.
const PAYLOAD_TIMEOUTS: u32 = 10;

/// One client in transmission. Dropped when its last thread has ended.
pub(super) struct Session {
    turns: Turns,
    receiver: Mutex<Receiver>,
    sender: Sender,
    terms: Terms,
    pace: Pace,
    pub(super) hole_hunt: HoleHunt,
    /// What the watch saw of `turns` when it last looked.
    watched: AtomicU64,
    service: Arc<Service>,
    device: Arc<dyn BlockDevice>,
    client: ConnectedClient,
    /// Last, since whoever waits for the end of this connection may then rely on the device having been let go.
    registration: Registration,
}

/// What one thread owns.
pub(super) struct Worker {
    small: Box<[u8]>,
    large: Option<LargeBuffer>,
}

impl Worker {
    fn new() -> Self {
        Self {
            small: vec![0; THREAD_BUFFER_BYTES].into_boxed_slice(),
            large: None,
        }
    }

    /// The buffer for `length` bytes: large where that is needed and there is one, else the small one.
    pub(super) fn buffer(&mut self, service: &Service, length: usize) -> &mut [u8] {
        if length > self.small.len() && self.large.is_none() {
            self.large = service.pool.take();
        }
        match &mut self.large {
            Some(large) => large.bytes(),
            None => &mut self.small,
        }
    }
}

/// A request that has been received.
struct Received {
    header: RequestHeader,
    command: Result<Command, NbdError>,
    /// The payload lies in the worker's buffer; otherwise it has been dealt with already, as it came.
    payload: bool,
}

impl Session {
    pub(super) fn new(
        service: Arc<Service>,
        agreement: Agreement,
        registration: Registration,
    ) -> Arc<Self> {
        let device = Arc::clone(agreement.client.device());
        let terms = Terms {
            length: device.length(),
            read_only: device.read_only(),
            structured_replies: agreement.structured_replies,
            base_allocation: agreement.base_allocation,
        };
        Arc::new(Self {
            turns: Turns::new(service.limits.requests_in_flight_max.clamp(1, 64)),
            receiver: Mutex::new(Receiver::new(service.limits.spin_max)),
            sender: Sender::default(),
            terms,
            pace: Pace::default(),
            hole_hunt: HoleHunt::default(),
            watched: AtomicU64::new(0),
            service,
            device,
            client: agreement.client,
            registration,
        })
    }

    pub(super) fn stream(&self) -> &Stream {
        self.registration.stream()
    }

    pub(super) fn sender(&self) -> &Sender {
        &self.sender
    }

    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    pub(super) fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// The life of one thread of the connection; the first begins with the lead.
    pub(super) fn work(self: &Arc<Self>, mut leading: bool) {
        let mut worker = Worker::new();
        loop {
            if leading {
                leading = self.lead(&mut worker);
                worker.large = None;
                continue;
            }
            match self.turns.wait(self.service.limits.thread_idle_timeout) {
                Turn::Lead => leading = true,
                Turn::Leave => return,
            }
            // The former leader may be stuck in the device, with replies that were held back.
            self.flush();
        }
    }

    /// Receives and performs one request. Returns whether this thread still leads.
    fn lead(self: &Arc<Self>, worker: &mut Worker) -> bool {
        let mut receiver = self.receiver.lock();
        let received = match self.receive(&mut receiver, worker) {
            Ok(Some(received)) => received,
            Ok(None) => return self.end(None),
            Err(error) => return self.end(Some(&error)),
        };
        let more = receiver.has_request();
        drop(receiver);

        if blocks(&received) || self.pace.is_slow() {
            self.summoned(self.turns.hand_over());
            self.perform(&received, worker, false, more);
            return self.turns.try_lead();
        }
        let performing = self.turns.begin();
        self.service.watch.nudge();
        self.perform(&received, worker, more, more);
        if self.turns.end(performing) {
            return true;
        }
        self.flush();
        false
    }

    /// The next request, with its payload. `None`: the client said goodbye, or can't be served any more.
    fn receive(
        &self,
        receiver: &mut MutexGuard<'_, Receiver>,
        worker: &mut Worker,
    ) -> Result<Option<Received>, ReceiveError> {
        let stopping = || self.registration.stopping();
        let header = receiver.header(self.stream(), &stopping, &mut || {
            self.sender.flush(self.stream())
        })?;
        let command = request::check(&header, &self.terms);
        if command == Ok(Command::Disconnect) {
            return Ok(None);
        }
        let length = header.payload_len();
        if length > REQUEST_PAYLOAD_MAX {
            // Skipping so much would cost more than the client is worth.
            self.reply_error(&header, NbdError::Inval, false);
            tracing::info!(
                client = self.registration.name(),
                length,
                "closing: a write is too long"
            );
            return Ok(None);
        }
        if length == 0 {
            return Ok(Some(Received {
                header,
                command,
                payload: false,
            }));
        }
        let fua = match command {
            Ok(Command::Write { fua }) => fua,
            _ => {
                self.skip_payload(receiver, worker, length as usize)?;
                return Ok(Some(Received {
                    header,
                    command,
                    payload: false,
                }));
            }
        };
        let buffer = worker.buffer(&self.service, length as usize);
        if let Some(dest) = buffer.get_mut(..length as usize) {
            self.payload(receiver, dest)?;
            return Ok(Some(Received {
                header,
                command,
                payload: true,
            }));
        }
        let written = self.write_in_pieces(receiver, buffer, &header, fua)?;
        Ok(Some(Received {
            header,
            command: written.map(|()| Command::Write { fua }),
            payload: false,
        }))
    }

    fn payload(&self, receiver: &mut Receiver, dest: &mut [u8]) -> Result<(), ReceiveError> {
        let time_max = self.service.limits.receive_timeout * PAYLOAD_TIMEOUTS;
        receiver.payload(self.stream(), dest, time_max, &mut || {
            self.sender.flush(self.stream())
        })
    }

    fn skip_payload(
        &self,
        receiver: &mut Receiver,
        worker: &mut Worker,
        length: usize,
    ) -> Result<(), ReceiveError> {
        let mut left = length;
        while left > 0 {
            let n = left.min(worker.small.len());
            self.payload(receiver, &mut worker.small[..n])?;
            left -= n;
        }
        Ok(())
    }

    /// Writes a payload that is larger than any buffer, piece by piece as it comes. One flush at the end stands for
    /// FUA.
    fn write_in_pieces(
        &self,
        receiver: &mut Receiver,
        buffer: &mut [u8],
        header: &RequestHeader,
        fua: bool,
    ) -> Result<Result<(), NbdError>, ReceiveError> {
        let mut result = Ok(());
        let mut done = 0;
        while done < header.length as usize {
            let n = buffer.len().min(header.length as usize - done);
            self.payload(receiver, &mut buffer[..n])?;
            if result.is_ok() {
                let offset = header.offset + done as u64;
                result =
                    self.call(|device| device.write(offset, &buffer[..n], Durability::Volatile));
            }
            done += n;
        }
        if fua && result.is_ok() {
            result = self.call(|device| device.flush());
        }
        Ok(result)
    }

    /// Performs a request and replies. `more`: the next one has arrived already.
    fn perform(&self, received: &Received, worker: &mut Worker, hold: bool, more: bool) {
        self.pace.begin(more);
        self.answer(received, worker, hold);
        self.pace.end();
    }

    fn answer(&self, received: &Received, worker: &mut Worker, hold: bool) {
        let header = &received.header;
        let (offset, length) = (header.offset, u64::from(header.length));
        let command = match received.command {
            Ok(command) => command,
            Err(error) => return self.reply_error(header, error, hold),
        };
        let done = match command {
            Command::Read { unfragmented } => return self.read(header, unfragmented, worker, hold),
            Command::BlockStatus { one } => return self.block_status(header, one, hold),
            Command::Write { fua } if received.payload => {
                let buffer = worker
                    .large
                    .as_mut()
                    .map_or(&mut *worker.small, LargeBuffer::bytes);
                let data = &buffer[..header.length as usize];
                self.call(|device| device.write(offset, data, Durability::from_fua(fua)))
            }
            Command::Flush => self.call(|device| device.flush()),
            // Written in pieces already, or nothing to write.
            Command::Write { .. } | Command::Disconnect => Ok(()),
            _ if length == 0 => Ok(()),
            Command::Trim { fua } => self.call(|device| device.trim(offset, length, fua)),
            Command::Cache => self.call(|device| device.cache(offset, length)),
            Command::WriteZeroes(flags) => {
                self.call(|device| device.write_zeroes(offset, length, flags))
            }
        };
        self.reply(&[&reply::simple(header.cookie, done.err())], hold);
    }

    /// One call of the device, timed; its failure, or its panic, as an error for the client.
    pub(super) fn call<T>(
        &self,
        call: impl FnOnce(&dyn BlockDevice) -> io::Result<T>,
    ) -> Result<T, NbdError> {
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| call(&*self.device)));
        self.pace.note(began.elapsed(), || self.stream().readable());
        match result {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                let told = nbd_error(&error);
                if told == NbdError::Io {
                    let export = self.client.export().name();
                    tracing::error!(export, %error, "the device failed a request");
                }
                Err(told)
            }
            Err(_panic) => {
                let export = self.client.export().name();
                tracing::error!(export, "the device panicked in a request");
                Err(NbdError::Io)
            }
        }
    }

    pub(super) fn reply(&self, parts: &[&[u8]], hold: bool) {
        self.sent(self.sender.reply(self.stream(), parts, hold));
    }

    pub(super) fn reply_error(&self, header: &RequestHeader, error: NbdError, hold: bool) {
        let structured = [super::wire::NBD_CMD_READ, super::wire::NBD_CMD_BLOCK_STATUS]
            .contains(&header.command);
        if self.terms.structured_replies && structured {
            self.reply(&[&reply::error_chunk(header.cookie, error)], hold);
        } else {
            self.reply(&[&reply::simple(header.cookie, Some(error))], hold);
        }
    }

    fn flush(&self) {
        self.sent(self.sender.flush(self.stream()));
    }

    /// After a failure to send, nobody should wait to receive either.
    pub(super) fn sent(&self, sent: io::Result<()>) {
        if sent.is_err() {
            self.stream().shutdown(std::net::Shutdown::Both);
        }
    }

    /// The client is to be received from no more; what runs ends by itself.
    fn end(&self, error: Option<&ReceiveError>) -> bool {
        match error {
            None | Some(ReceiveError::Ended) => {}
            Some(error) => {
                tracing::info!(client = self.registration.name(), %error, "closing the connection")
            }
        }
        self.flush();
        self.turns.close();
        false
    }

    fn summoned(self: &Arc<Self>, summoned: Summoned) {
        if summoned != Summoned::NewThread {
            return;
        }
        let session = Arc::clone(self);
        let thread = std::thread::Builder::new().name("nbd-request".to_owned());
        if let Err(error) = thread.spawn(move || session.work(false)) {
            // The lead stays free until a running request ends.
            self.turns.not_started();
            tracing::warn!(%error, "no thread could be started for a connection's requests");
        }
    }

    /// Called by the watch at each tick. Returns whether a request is being performed with the lead in hand; where it
    /// is the same one as at the last tick, the lead is given to another thread.
    pub(super) fn look(self: &Arc<Self>) -> bool {
        let Some(word) = self.turns.performing() else {
            return false;
        };
        if self.watched.swap(word, Ordering::Relaxed) == word
            && let Some(summoned) = self.turns.take_away(word)
        {
            self.summoned(summoned);
        }
        true
    }
}

fn blocks(received: &Received) -> bool {
    match received.command {
        Ok(Command::Flush) => true,
        Ok(Command::Write { fua } | Command::Trim { fua }) => fua,
        Ok(Command::WriteZeroes(flags)) => flags.fua,
        _ => false,
    }
}
