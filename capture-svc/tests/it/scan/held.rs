//! A write that is under way for as long as a test wants: it is the kernel that waits, for the bytes to be written.

use std::{
    fs::{File, OpenOptions},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    mm::{UserfaultfdFlags, userfaultfd},
};

const PAGE: usize = 4096;

/// `struct uffdio_api`, `struct uffdio_register` and `struct uffdio_copy` of linux/userfaultfd.h.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;

/// One write of the same byte over a whole file, that goes on as far as it is let.
pub(super) struct HeldWrite {
    allowed: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
    writing: Option<JoinHandle<()>>,
    feeding: Option<JoinHandle<()>>,
}

impl HeldWrite {
    #[allow(unsafe_code)]
    pub(super) fn begin(path: &Path, length: usize, byte: u8) -> Self {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: whoever touches the map waits for its pages, which are given until it is dropped.
        let fd = unsafe { userfaultfd(flags) }.unwrap();
        let map = memmap2::MmapMut::map_anon(length).unwrap();
        let start = map.as_ptr() as u64;
        let mut api = Api {
            api: 0xaa,
            features: 0,
            ioctls: 0,
        };
        let mut register = Register {
            start,
            length: length as u64,
            mode: 1,
            ioctls: 0,
        };
        // SAFETY: the request fills a structure of exactly this layout, which we own.
        let ready = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        assert_eq!(ready, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: as above; the range is that of the map, which outlives its use.
        let ready = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        assert_eq!(ready, 0, "{}", std::io::Error::last_os_error());
        let (allowed, end) = (
            Arc::new(AtomicUsize::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let feed = Feed {
            fd,
            start,
            length,
            byte,
            allowed: Arc::clone(&allowed),
            end: Arc::clone(&end),
        };
        let feeding = thread::spawn(move || feed.run());
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let writing = thread::spawn(move || write(&file, &map));
        Self {
            allowed,
            end,
            writing: Some(writing),
            feeding: Some(feeding),
        }
    }

    /// Lets it write up to here.
    pub(super) fn allow(&self, length: usize) {
        self.allowed.fetch_max(length, SeqCst);
    }

    pub(super) fn is_over(&self) -> bool {
        self.writing.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for HeldWrite {
    fn drop(&mut self) {
        self.allow(usize::MAX);
        self.writing.take().unwrap().join().unwrap();
        self.end.store(true, SeqCst);
        self.feeding.take().unwrap().join().unwrap();
    }
}

fn write(file: &File, map: &memmap2::MmapMut) {
    file.write_all_at(map, 0).unwrap();
}

struct Feed {
    fd: OwnedFd,
    start: u64,
    length: usize,
    byte: u8,
    allowed: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
}

impl Feed {
    /// Gives pages to whoever faults, in order, as far as it is allowed.
    #[allow(unsafe_code)]
    fn run(self) {
        let page = vec![self.byte; PAGE];
        let mut given = 0;
        while !self.end.load(SeqCst) {
            let mut ready = [PollFd::new(&self.fd, PollFlags::IN)];
            let _ = poll(
                &mut ready,
                Some(&rustix::event::Timespec {
                    tv_sec: 0,
                    tv_nsec: 1_000_000,
                }),
            );
            let most = self.allowed.load(SeqCst).min(self.length);
            while given < most {
                let mut copy = Copy {
                    to: self.start + given as u64,
                    from: page.as_ptr() as u64,
                    length: PAGE as u64,
                    mode: 0,
                    copied: 0,
                };
                // SAFETY: the page is ours, and the range is one of the map that nobody has touched yet, or waits for.
                let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
                assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
                given += PAGE;
            }
            thread::sleep(Duration::from_micros(100));
        }
    }
}
