//! Lines on their way to standard error.
//!
//! Whoever logs hands a line over and goes on: a thread of its own writes. So a full pipe that nobody reads, or a disk that
//! hangs, holds up no request; and a disk that is full, or a pipe that is closed, is no error to anyone. At most
//! [`WAITING_MAX`] bytes wait. What comes on top is lost, and counted; once lines go through again the log says how many.
//! The thread writes a line as soon as it is there, so that a process that is killed has lost what was logged within its
//! last microseconds, and one that ends by itself nothing.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing_subscriber::fmt::MakeWriter;

/// The most bytes of lines that wait; as many again are being written.
const WAITING_MAX: usize = 1 << 20;

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    lines: u64,
    /// Since it was last told.
    lost: u64,
    writing: bool,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// There is something to write.
    filled: Condvar,
    /// All was written.
    emptied: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing panics while it is held.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.lock();
        if waiting.bytes.len() + line.len() > WAITING_MAX {
            waiting.lost += 1;
            return;
        }
        waiting.bytes.extend_from_slice(line);
        waiting.lines += 1;
        drop(waiting);
        self.filled.notify_one();
    }

    /// Writes what comes, for ever.
    fn write_to(&self, mut sink: impl Write, tell_lost: impl Fn(u64)) {
        let mut bytes = Vec::new();
        loop {
            let mut waiting = self.lock();
            waiting.writing = false;
            while waiting.bytes.is_empty() {
                self.emptied.notify_all();
                waiting = self
                    .filled
                    .wait(waiting)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            bytes.clear();
            std::mem::swap(&mut bytes, &mut waiting.bytes);
            let lines = std::mem::take(&mut waiting.lines);
            waiting.writing = true;
            drop(waiting);
            let written = sink.write_all(&bytes);
            let mut waiting = self.lock();
            if written.is_err() {
                waiting.lost += lines;
                continue;
            }
            // Told only once something goes through: else the telling would be lost, and told of.
            let lost = std::mem::take(&mut waiting.lost);
            drop(waiting);
            if lost > 0 {
                tell_lost(lost);
            }
        }
    }
}

/// Takes lines. Never blocks, never fails.
#[derive(Debug, Clone)]
pub(crate) struct Lines(Arc<Shared>);

impl Lines {
    /// To standard error.
    ///
    /// # Errors
    /// Standard error is closed, or no thread can be started.
    pub(crate) fn to_stderr() -> io::Result<Self> {
        // A handle of its own: while a write hangs, whoever else writes there must not wait for the lock of `Stderr`.
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        Self::to(stderr, |lost| {
            tracing::warn!(
                lost,
                "lines of the log were lost: what takes them was full, or too slow"
            );
        })
    }

    fn to(
        sink: impl Write + Send + 'static,
        tell_lost: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let own = Arc::clone(&shared);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || own.write_to(sink, tell_lost))?;
        Ok(Self(shared))
    }

    /// Waits until everything is written, for at most so long.
    pub(crate) fn flush(&self, patience: Duration) {
        let end = Instant::now() + patience;
        let mut waiting = self.0.lock();
        while waiting.writing || !waiting.bytes.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let woken = self.0.emptied.wait_timeout(waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for Lines {
    /// A line at a time, as the format makes them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'w> MakeWriter<'w> for Lines {
    type Writer = Self;

    fn make_writer(&'w self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Takes what it is given only after a word from the test, and then as it says.
    struct Sink {
        words: mpsc::Receiver<io::Result<()>>,
        taken: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.words.recv().unwrap_or(Ok(()))?;
            self.taken.send(bytes.to_vec()).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Scene {
        lines: Lines,
        words: mpsc::Sender<io::Result<()>>,
        taken: mpsc::Receiver<Vec<u8>>,
        lost: mpsc::Receiver<u64>,
    }

    fn scene() -> Scene {
        let (words, heard) = mpsc::channel();
        let (taker, taken) = mpsc::channel();
        let (teller, lost) = mpsc::channel();
        let sink = Sink {
            words: heard,
            taken: taker,
        };
        let lines = Lines::to(sink, move |count| teller.send(count).unwrap()).unwrap();
        Scene {
            lines,
            words,
            taken,
            lost,
        }
    }

    #[test]
    fn whoever_logs_never_waits_and_what_finds_no_room_is_lost_and_told_of() {
        let mut scene = scene();
        let line = vec![b'x'; 1 << 10];
        // One is in the hands of a sink that hangs, or soon will be.
        for _ in 0..3 * WAITING_MAX / line.len() {
            scene.lines.write_all(&line).unwrap();
        }
        let waiting = scene.lines.0.lock().bytes.len();
        assert!(waiting <= WAITING_MAX, "{waiting}");
        scene.words.send(Ok(())).unwrap();
        let told = scene.lost.recv_timeout(PATIENCE).unwrap();
        drop(scene.words);
        scene.lines.flush(PATIENCE);
        let taken: usize = scene.taken.try_iter().map(|bytes| bytes.len()).sum();
        let lost = u64::try_from(3 * WAITING_MAX - taken).unwrap() / 1024;
        assert!(lost >= 1024 && told == lost, "{told} {lost}");
    }

    #[test]
    fn a_sink_that_fails_loses_lines_and_they_are_told_of_once_it_takes_some() {
        let mut scene = scene();
        for _ in 0..3 {
            scene.lines.write_all(b"lost\n").unwrap();
            scene
                .words
                .send(Err(io::ErrorKind::StorageFull.into()))
                .unwrap();
            scene.lines.flush(PATIENCE);
        }
        assert_eq!(scene.lost.try_recv(), Err(mpsc::TryRecvError::Empty));
        scene.words.send(Ok(())).unwrap();
        scene.lines.write_all(b"seen\n").unwrap();
        assert_eq!(scene.taken.recv_timeout(PATIENCE).unwrap(), b"seen\n");
        assert_eq!(scene.lost.recv_timeout(PATIENCE), Ok(3));
    }

    #[test]
    fn a_flush_ends_in_time_where_the_sink_hangs() {
        let mut scene = scene();
        scene.lines.write_all(b"line\n").unwrap();
        let began = Instant::now();
        scene.lines.flush(Duration::from_millis(50));
        let took = began.elapsed();
        assert!(
            took >= Duration::from_millis(50) && took < PATIENCE,
            "{took:?}"
        );
        assert!(scene.taken.try_recv().is_err());
    }
}
