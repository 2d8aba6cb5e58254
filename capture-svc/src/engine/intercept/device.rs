//! The volume as a block device: what a front end reads and writes.
//!
//! The thread that brings a request performs it. A write of one block to a region that is set already costs two
//! counters, a lock, a few loads and one `pwrite`.

use std::{cell::RefCell, io, sync::atomic::Ordering::SeqCst, time::Duration};

use capture_core::engine::{
    capture::CaptureError,
    media::{Media, MediaError},
    write::{Change, Step, WriteOp},
};
use tidemark_export::{AllocationExtent, BlockDevice, Durability, ZeroFlags};

use super::{Intercept, SpoolPolicy, volume_file};

/// How long a waiting request trusts in being told.
const WAIT_MAX: Duration = Duration::from_millis(10);
const STALL_WAIT_MAX: Duration = Duration::from_millis(100);

thread_local! {
    /// A block, for before-images.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A request that has entered; leaving is not forgotten, whatever happens.
struct Entered<'e> {
    engine: &'e Intercept,
    epoch: u64,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.engine.capture.exit(self.epoch) {
            self.engine.settled.notify();
        }
    }
}

fn refused(error: &CaptureError) -> io::Error {
    match error {
        CaptureError::Media(error) => io::Error::from_raw_os_error(error.0),
        other => io::Error::other(other.to_string()),
    }
}

impl Intercept {
    fn in_range(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.geometry().spans(offset, length) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    fn refuse_when_closed(&self) -> io::Result<()> {
        self.check_open()
            .map_err(|_| io::Error::from_raw_os_error(libc::ESHUTDOWN))
    }

    fn change(&self, offset: u64, change: Change<'_>, fua: bool) -> io::Result<()> {
        let writing = self.activity.write_begins();
        let epoch = self.capture.enter().map_err(|error| refused(&error))?;
        {
            let _entered = Entered {
                engine: self,
                epoch,
            };
            // After entering: a close that we don't see waits for us.
            self.refuse_when_closed()?;
            let op = WriteOp::new(&self.capture, epoch, offset, change);
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.resize(self.geometry().block_size().as_usize(), 0);
                self.run(op, scratch)
            })?;
        }
        if fua {
            let flushing = writing.flush_begins();
            self.capture.sync().map_err(|error| refused(&error))?;
            self.activity.flush_succeeded(flushing);
        }
        Ok(())
    }

    fn run(&self, mut op: WriteOp<'_>, scratch: &mut [u8]) -> io::Result<()> {
        loop {
            let step = op.step(&self.capture, scratch).map_err(|error| {
                self.intent.notify();
                refused(&error)
            })?;
            match step {
                Step::Again | Step::AwaitLock => {}
                Step::IntentCommitted => self.intent.notify(),
                Step::AwaitIntent(region) => {
                    let intent = self.capture.intent();
                    self.intent.wait(WAIT_MAX, || {
                        intent.is_durable(region)
                            || !intent.is_leading()
                            || self.capture.is_poisoned()
                    });
                }
                Step::AwaitSpool => self.await_spool()?,
                Step::Done => return Ok(()),
            }
        }
    }

    /// The spool is full: makes room or waits for it, as the policy says.
    fn await_spool(&self) -> io::Result<()> {
        match self.options.spool_policy {
            SpoolPolicy::GiveUp => {
                self.refuse_when_closed()?;
                let relieving = self.relieving.lock();
                if self.capture.spool().has_room() {
                    return Ok(());
                }
                let given_up = match self.capture.relieve() {
                    Err(CaptureError::Media(error)) if is_no_space(error) => {
                        drop(relieving);
                        self.await_disk_space();
                        return Ok(());
                    }
                    other => other.map_err(|error| refused(&error))?,
                };
                self.disk_full_told.store(false, SeqCst);
                for cut in given_up {
                    tracing::error!(
                        volume = %self.capture.volume(),
                        cut,
                        "the spool is full: the oldest cut was given up; make the spool larger"
                    );
                }
                Ok(())
            }
            SpoolPolicy::Stall => {
                self.refuse_when_closed()?;
                self.room
                    .wait(STALL_WAIT_MAX, || self.capture.spool().has_room());
                Ok(())
            }
        }
    }
}

impl Intercept {
    /// No room even for the record that would give up a cut: writers wait, as with a full spool that stalls.
    fn await_disk_space(&self) {
        if !self.disk_full_told.swap(true, SeqCst) {
            tracing::error!(
                volume = %self.capture.volume(),
                dir = %self.dir.display(),
                "the disk of the state is full: writers wait; make room on it"
            );
        }
        self.room
            .wait(STALL_WAIT_MAX, || self.capture.spool().has_room());
    }
}

fn is_no_space(error: MediaError) -> bool {
    matches!(error.0, libc::ENOSPC | libc::EDQUOT)
}

impl BlockDevice for Intercept {
    fn length(&self) -> u64 {
        self.geometry().length()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn block_size_preferred(&self) -> u32 {
        self.geometry().block_size().get()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.in_range(offset, buf.len() as u64)?;
        self.refuse_when_closed()?;
        self.capture.check().map_err(|error| refused(&error))?;
        self.capture
            .media()
            .read_volume(offset, buf)
            .map_err(|error| io::Error::from_raw_os_error(error.0))
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        self.in_range(offset, data.len() as u64)?;
        self.change(offset, Change::Data(data), durability.is_fua())
    }

    fn flush(&self) -> io::Result<()> {
        self.refuse_when_closed()?;
        let flushing = self.activity.flush_begins();
        self.capture.sync().map_err(|error| refused(&error))?;
        self.activity.flush_succeeded(flushing);
        Ok(())
    }

    fn trim(&self, offset: u64, len: u64, fua: bool) -> io::Result<()> {
        self.in_range(offset, len)?;
        self.change(offset, Change::Trim { length: len }, fua)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.in_range(offset, len)?;
        let allocated = !flags.may_punch;
        if flags.fast_only {
            let volume = self.capture.media().volume();
            let fast = self.zeroes_fast[usize::from(allocated)]
                .get_or_init(|| volume_file::zeroes_fast(volume, self.length(), allocated));
            if !fast {
                return Err(io::ErrorKind::Unsupported.into());
            }
        }
        self.change(
            offset,
            Change::Zeroes {
                length: len,
                allocated,
            },
            flags.fua,
        )
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<AllocationExtent>> {
        self.in_range(offset, len)?;
        self.refuse_when_closed()?;
        let (mut at, end) = (offset, offset + len);
        let mut extents = Vec::new();
        let mut push = |from: u64, to: u64, hole: bool| {
            if from < to {
                extents.push(AllocationExtent {
                    length: to - from,
                    hole,
                    zero: hole,
                });
            }
            extents.len() < max
        };
        while at < end {
            let (data, hole) = volume_file::next_data(self.capture.media().volume(), at, end)?;
            if !push(at, data, true) || !push(data, hole, false) {
                break;
            }
            at = hole.max(data);
        }
        Ok(extents)
    }
}
