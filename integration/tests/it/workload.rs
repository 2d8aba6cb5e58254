//! A writer that keeps a log, and the question that every image must answer: after which write is it the volume?
//!
//! The writer has one request under way at a time, so a cut falls between two writes of the log, or before or after the
//! one under way. A request that failed, because the service was killed, is sent again until it succeeds: it has the
//! same content, so whether the first one got through does not matter. Between the kill and that some of its blocks may
//! be old and some new, as after any crash, and a cut may show that.

use std::{
    ops::{Range, RangeInclusive},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{nbd::Client, programs::wait_for};

const BLOCK: usize = 4096;
/// Between two writes: a log of some thousand writes a second is long enough, and quick to go through.
const PACE: Duration = Duration::from_micros(300);

/// One write, of bytes that only this write has, or of zeroes.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    number: u64,
    offset: usize,
    length: usize,
    zeroes: bool,
    /// It failed at least once.
    sent_again: bool,
}

impl Entry {
    fn random(number: u64, size: usize, rng: &mut StdRng) -> Self {
        // Mostly whole blocks in a hot part, some long runs, some that begin and end amid blocks.
        let (offset, length) = match rng.random_range(0..10) {
            0 => (
                rng.random_range(0..size - 70_000),
                rng.random_range(1..70_000),
            ),
            1 => (
                rng.random_range(0..size / BLOCK - 64) * BLOCK,
                rng.random_range(1..64) * BLOCK,
            ),
            2..7 => (rng.random_range(0..size / BLOCK / 8) * BLOCK, BLOCK),
            _ => (rng.random_range(0..size / BLOCK) * BLOCK, BLOCK),
        };
        Self {
            number,
            offset,
            length,
            zeroes: rng.random_range(0..12) == 0,
            sent_again: false,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        if self.zeroes {
            return vec![0; self.length];
        }
        // Never zero, different in each write, different in each place.
        let seed = self
            .number
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .to_le_bytes();
        (0..self.length)
            .map(|i| seed[i % 8].wrapping_add((i / 8).to_le_bytes()[0]) | 1)
            .collect()
    }

    fn perform(&self, client: &mut Client, base: usize) -> std::io::Result<()> {
        let offset = (base + self.offset) as u64;
        if self.zeroes {
            client.write_zeroes(offset, self.length as u64)
        } else {
            client.write(offset, &self.bytes())
        }
    }
}

/// Everything that was begun, in order; how much of it was answered.
#[derive(Debug, Default)]
struct Log {
    begun: Vec<Entry>,
    done: usize,
    /// Requests that failed and were sent again.
    retries: usize,
}

/// How far a writer is.
#[derive(Debug, Clone)]
pub(crate) struct Progress(Arc<Mutex<Log>>);

impl Progress {
    /// How many writes are certainly in the volume.
    pub(crate) fn done(&self) -> usize {
        self.0.lock().unwrap().done
    }

    /// How many writes may be in the volume.
    pub(crate) fn begun(&self) -> usize {
        self.0.lock().unwrap().begun.len()
    }
}

/// The seed of a test: `TIDEMARK_SEED`, else this one. The same seed gives the same writes, not the same timing.
pub(crate) fn seed(otherwise: u64) -> u64 {
    let seed = std::env::var("TIDEMARK_SEED").map_or(otherwise, |text| text.parse().unwrap());
    println!("seed {seed}: TIDEMARK_SEED={seed} gives the same writes");
    seed
}

/// Writes into its part of a volume, in its own thread, until it is stopped.
#[derive(Debug)]
pub(crate) struct Writer {
    part: Range<usize>,
    log: Arc<Mutex<Log>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Writes anywhere in a volume of this size.
    pub(crate) fn start(socket: PathBuf, export: &str, size: usize, seed: u64) -> Self {
        Self::start_in(socket, export, 0..size, seed)
    }

    /// Writes only within these bytes of the volume.
    pub(crate) fn start_in(socket: PathBuf, export: &str, part: Range<usize>, seed: u64) -> Self {
        let log = Arc::new(Mutex::new(Log::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (log, stop, export) = (Arc::clone(&log), Arc::clone(&stop), export.to_owned());
            let part = part.clone();
            move || write_until(&stop, &log, &socket, &export, part, seed)
        });
        Self {
            part,
            log,
            stop,
            thread: Some(thread),
        }
    }

    /// For another thread to ask how far it is.
    pub(crate) fn progress(&self) -> Progress {
        Progress(Arc::clone(&self.log))
    }

    /// How many writes are certainly in the volume.
    pub(crate) fn done(&self) -> usize {
        self.progress().done()
    }

    /// How many writes may be in the volume.
    pub(crate) fn begun(&self) -> usize {
        self.progress().begun()
    }

    /// Waits until this many more writes are done.
    pub(crate) fn wait_for(&self, more: usize) {
        let wanted = self.done() + more;
        wait_for("the writer", || (self.done() >= wanted).then_some(()));
    }

    /// Ends the writing with a flush; every write of the log is then done.
    pub(crate) fn stop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        assert_eq!(self.done(), self.begun());
    }

    /// How often a request had to be sent again.
    pub(crate) fn retries(&self) -> usize {
        self.log.lock().unwrap().retries
    }

    /// After how many writes of the log the volume was this image, or after how many and a part of the next one, which
    /// failed; the last such number.
    ///
    /// # Panics
    /// It never was.
    pub(crate) fn moment_of(&self, image: &[u8]) -> usize {
        let image = &image[self.part.clone()];
        let log = self.log.lock().unwrap();
        let mut model = vec![0; self.part.len()];
        let mut differing: Vec<bool> = image
            .chunks(BLOCK)
            .map(|block| block.iter().any(|&b| b != 0))
            .collect();
        let mut left = differing.iter().filter(|&&d| d).count();
        let mut moment = (left == 0).then_some(0);
        let mut nearest = (left, 0);
        for (n, entry) in log.begun.iter().enumerate() {
            let end = entry.offset + entry.length;
            model[entry.offset..end].copy_from_slice(&entry.bytes());
            let touched = entry.offset / BLOCK..end.div_ceil(BLOCK);
            let left_before = left;
            let mut either = 0;
            for (block, differed) in touched.clone().zip(&mut differing[touched]) {
                let range = block * BLOCK..(block + 1) * BLOCK;
                let differs = model[range.clone()] != image[range];
                either += usize::from(*differed && !differs);
                match (*differed, differs) {
                    (true, false) => left -= 1,
                    (false, true) => left += 1,
                    _ => {}
                }
                *differed = differs;
            }
            // Each block is the old one or the new one, and all others are as before.
            if entry.sent_again && either == left_before {
                moment = Some(n);
            }
            nearest = nearest.min((left, n + 1));
            if left == 0 {
                moment = Some(n + 1);
            }
        }
        moment.unwrap_or_else(|| {
            panic!(
                "the image is the volume after no write at all; nearest is after write {}, where {} blocks differ",
                nearest.1, nearest.0
            )
        })
    }

    /// The image is the volume as it was at some moment within these numbers of writes.
    pub(crate) fn assert_within(&self, image: &Path, moments: RangeInclusive<usize>) -> usize {
        let moment = self.moment_of(&std::fs::read(image).unwrap());
        assert!(
            moments.contains(&moment),
            "{} is the volume after write {moment}, not within {moments:?}",
            image.display()
        );
        moment
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn write_until(
    stop: &AtomicBool,
    log: &Mutex<Log>,
    socket: &Path,
    export: &str,
    part: Range<usize>,
    seed: u64,
) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut client = None;
    let mut number = 0;
    let mut send = |work: &dyn Fn(&mut Client) -> std::io::Result<()>, stop: &AtomicBool| {
        let mut left = None;
        loop {
            if client.is_none() {
                client = Client::connect(socket, export).ok();
            }
            if client.as_mut().is_some_and(|client| work(client).is_ok()) {
                return true;
            }
            client = None;
            {
                let mut log = log.lock().unwrap();
                log.retries += 1;
                let done = log.done;
                if let Some(under_way) = log.begun.get_mut(done) {
                    under_way.sent_again = true;
                }
            }
            std::thread::sleep(Duration::from_millis(10));
            // A test that failed stops the writer though the service is gone for good.
            if stop.load(Ordering::SeqCst) {
                let left: &mut u32 = left.get_or_insert(1000);
                *left -= 1;
                if *left == 0 {
                    return false;
                }
            }
        }
    };
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let entry = Entry::random(number, part.len(), &mut rng);
        log.lock().unwrap().begun.push(entry.clone());
        if !send(&|client| entry.perform(client, part.start), stop) {
            return;
        }
        log.lock().unwrap().done += 1;
        std::thread::sleep(PACE);
        if number % 64 == 0 && !send(&Client::flush, stop) {
            return;
        }
    }
    send(&Client::flush, stop);
}

#[test]
fn an_image_is_found_in_the_log_and_a_wrong_one_is_not() {
    let size = 1 << 20;
    let mut rng = StdRng::seed_from_u64(1);
    let mut begun: Vec<_> = (1..200).map(|n| Entry::random(n, size, &mut rng)).collect();
    // Of this one, which covers several blocks, a part will be there.
    let torn = (100..190).find(|&n| begun[n].length > 3 * BLOCK).unwrap();
    begun[torn].sent_again = true;
    let mut image = vec![0; size];
    for entry in &begun[..120] {
        image[entry.offset..entry.offset + entry.length].copy_from_slice(&entry.bytes());
    }
    let half = {
        let mut half = vec![0; size];
        for entry in &begun[..torn] {
            half[entry.offset..entry.offset + entry.length].copy_from_slice(&entry.bytes());
        }
        let entry = &begun[torn];
        let first = entry.offset.next_multiple_of(BLOCK);
        let bytes = entry.bytes();
        half[first..first + BLOCK].copy_from_slice(&bytes[first - entry.offset..][..BLOCK]);
        half
    };
    let writer = Writer {
        part: 0..size,
        log: Arc::new(Mutex::new(Log {
            done: begun.len(),
            begun,
            retries: 0,
        })),
        stop: Arc::default(),
        thread: None,
    };
    assert_eq!(writer.moment_of(&image), 120);
    assert_eq!(writer.moment_of(&vec![0; size]), 0);
    assert_eq!(writer.moment_of(&half), torn);
    image[512_000] ^= 1;
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| writer.moment_of(&image)));
    assert!(found.is_err(), "a flipped bit is found");
}
