//! Reading a file through memory maps, without dying of it.
//!
//! A file is mapped in windows, once they are read often enough to be worth a map, and bytes are copied out before anybody looks at them: others write to
//! the file meanwhile. Where the kernel can't supply a page (the file was cut short, the disk has a bad sector) it
//! raises SIGBUS. The handler here puts a page of zeroes in the place of the missing one and marks the window; the
//! copy then sees the mark, drops the window and reads the range again with `pread`, which gives the bytes or the
//! real error. So a damaged file costs an error for the range concerned, never the process, and zeroes from the
//! handler are never taken for content.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    ptr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
};

use memmap2::{Advice, Mmap, MmapOptions};
use parking_lot::RwLock;

/// Bytes per window.
pub const WINDOW_LEN: u64 = 256 << 20;
/// The most windows that one file has mapped at a time.
pub const WINDOWS_MAX: usize = 32;
/// Reads of a window, by `pread`, before it is mapped: a few reads in each of thousands of windows, as scattered changes
/// of a huge volume are, would cost a map and its removal each.
const READS_BEFORE_MAP: u8 = 16;
/// A read of this many bytes has its window mapped at once.
const MAP_AT_ONCE_LEN: usize = 256 << 10;
/// The most windows of the whole process: what the signal handler looks through. Past it, files are read by `pread`.
const SLOTS: usize = 1024;

/// Whether the disk can't read what was asked for, or the file no longer has it: nothing will be read there until it is
/// written anew.
#[must_use]
pub fn is_unreadable(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// A file of fixed length, mapped for reading.
#[derive(Debug)]
pub struct VolumeMap {
    file: Arc<File>,
    length: u64,
    windows: RwLock<HashMap<u64, Arc<Window>>>,
    /// Reads of each window since it was last mapped.
    reads: Box<[AtomicU8]>,
}

impl VolumeMap {
    /// Maps `length` bytes of a file, window by window as they are read.
    #[must_use]
    pub fn new(file: Arc<File>, length: u64) -> Self {
        let windows = length.div_ceil(WINDOW_LEN);
        Self {
            file,
            length,
            windows: RwLock::default(),
            reads: (0..windows).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    /// The length that can be read, in bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Copies bytes out of the file. Bytes that are being written meanwhile may come torn.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside the file's length; otherwise what `pread` says, or `EIO` where the file
    /// has become shorter.
    pub fn read_into(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        match offset.checked_add(buffer.len() as u64) {
            Some(end) if end <= self.length => {}
            _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
        while !buffer.is_empty() {
            let number = offset / WINDOW_LEN;
            let within = offset % WINDOW_LEN;
            let here =
                usize::try_from(WINDOW_LEN - within).map_or(buffer.len(), |n| n.min(buffer.len()));
            let (part, rest) = buffer.split_at_mut(here);
            self.read_window(number, within, part)?;
            offset += here as u64;
            buffer = rest;
        }
        Ok(())
    }

    fn read_window(&self, number: u64, within: u64, part: &mut [u8]) -> io::Result<()> {
        if let (Some(window), Ok(at)) = (self.window(number, part.len()), usize::try_from(within)) {
            if window.copy(at, part) {
                return Ok(());
            }
            self.windows.write().remove(&number);
        }
        match self.file.read_exact_at(part, number * WINDOW_LEN + within) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            other => other,
        }
    }

    /// The map of a window, where it has one or is worth one.
    fn window(&self, number: u64, read_len: usize) -> Option<Arc<Window>> {
        if let Some(window) = self.windows.read().get(&number) {
            return Some(Arc::clone(window));
        }
        let reads = self.reads.get(usize::try_from(number).ok()?)?;
        if read_len < MAP_AT_ONCE_LEN && reads.fetch_add(1, Ordering::Relaxed) < READS_BEFORE_MAP {
            return None;
        }
        reads.store(0, Ordering::Relaxed);
        let start = number * WINDOW_LEN;
        let length = usize::try_from(WINDOW_LEN.min(self.length - start)).ok()?;
        let window = Arc::new(Window::map(&self.file, start, length)?);
        let mut windows = self.windows.write();
        if windows.len() >= WINDOWS_MAX {
            // Any window will do: with this many, what is dropped is mapped again at the cost of some page faults.
            let victim = windows.keys().copied().find(|&n| n != number);
            victim.and_then(|n| windows.remove(&n));
        }
        Some(Arc::clone(windows.entry(number).or_insert(window)))
    }
}

#[derive(Debug)]
struct Window {
    map: Mmap,
    slot: &'static Slot,
}

impl Window {
    /// Nothing where no map, or no slot for it, is to be had.
    #[allow(unsafe_code)]
    fn map(file: &File, start: u64, length: usize) -> Option<Self> {
        install_handler().then_some(())?;
        // SAFETY: the mapped bytes are only ever copied out, through a raw pointer and with no assumption on their
        // content, so that others may write to the file; accesses past its end are caught by the handler.
        let map = unsafe { MmapOptions::new().offset(start).len(length).map(file) }.ok()?;
        // Read-ahead would fill memory with what random readers don't want.
        let _ = map.advise(Advice::Random);
        let slot = Slot::claim(map.as_ptr() as usize, length)?;
        Some(Self { map, slot })
    }

    /// Copies bytes out; false where a page was missing, now or before.
    #[allow(unsafe_code)]
    fn copy(&self, at: usize, part: &mut [u8]) -> bool {
        assert!(
            at + part.len() <= self.map.len(),
            "a copy stays within its window"
        );
        if self.slot.faults.load(Ordering::Acquire) != 0 {
            return false;
        }
        // SAFETY: the source lies within the map, which lives as long as `self`; the target is exclusively ours and
        // can't overlap it. The kernel may change the source meanwhile: the bytes are data without invariants.
        unsafe {
            ptr::copy_nonoverlapping(self.map.as_ptr().add(at), part.as_mut_ptr(), part.len())
        };
        self.slot.faults.load(Ordering::Acquire) == 0
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.slot.release();
    }
}

/// A mapped range, as the signal handler finds it: atomics only.
#[derive(Debug)]
struct Slot {
    /// 0 = free, 1 = being filled or emptied, else the address.
    start: AtomicUsize,
    length: AtomicUsize,
    faults: AtomicUsize,
}

const FREE: usize = 0;
const CLAIMED: usize = 1;

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(FREE),
        length: AtomicUsize::new(0),
        faults: AtomicUsize::new(0),
    }
}; SLOTS];

impl Slot {
    fn claim(start: usize, length: usize) -> Option<&'static Self> {
        let slot = TABLE.iter().find(|slot| {
            slot.start
                .compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })?;
        slot.length.store(length, Ordering::Relaxed);
        slot.faults.store(0, Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        Some(slot)
    }

    fn release(&self) {
        self.start.store(CLAIMED, Ordering::Release);
        self.length.store(0, Ordering::Relaxed);
        self.start.store(FREE, Ordering::Release);
    }

    fn holds(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        start > CLAIMED && address >= start && address - start < self.length.load(Ordering::Relaxed)
    }
}

struct Previous(libc::sigaction);

static PREVIOUS: OnceLock<Option<Previous>> = OnceLock::new();
static PAGE_LEN: AtomicUsize = AtomicUsize::new(4096);

/// Installs the handler once; false where the system refuses it.
#[allow(unsafe_code)]
fn install_handler() -> bool {
    PREVIOUS
        .get_or_init(|| {
            // SAFETY: asks for a constant of the system.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
            PAGE_LEN.store(usize::try_from(page).unwrap_or(4096), Ordering::Relaxed);
            // SAFETY: an all-zero sigaction is a valid one.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            // SAFETY: as above.
            let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: both point to live structures, and the handler only does what a signal handler may.
            let done =
                unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut previous) };
            (done == 0).then_some(Previous(previous))
        })
        .is_some()
}

/// Async-signal-safe: atomics and `mmap` only.
#[allow(unsafe_code)]
extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO.
    let address = unsafe { (*info).si_addr() } as usize;
    if let Some(slot) = TABLE.iter().find(|slot| slot.holds(address)) {
        slot.faults.fetch_add(1, Ordering::AcqRel);
        let page = PAGE_LEN.load(Ordering::Relaxed);
        let start = (address & !(page - 1)) as *mut libc::c_void;
        // SAFETY: replaces one page inside a map that we own and only read; the reader discards what it copied.
        let mapped = unsafe {
            libc::mmap(
                start,
                page,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped != libc::MAP_FAILED {
            return;
        }
    }
    pass_on(signal, info, context);
}

/// Not ours: does what would have been done without us.
#[allow(unsafe_code)]
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS
        .get()
        .and_then(Option::as_ref)
        .map(|previous| previous.0);
    match previous {
        Some(action)
            if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN =>
        {
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                // SAFETY: with SA_SIGINFO the field holds a handler of this type.
                let handler: Handler = unsafe { std::mem::transmute(action.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO the field holds a handler of this type.
                let handler: extern "C" fn(libc::c_int) =
                    unsafe { std::mem::transmute(action.sa_sigaction) };
                handler(signal);
            }
        }
        _ => {
            // SAFETY: restoring the default action is allowed in a handler; the access is then repeated and ends
            // the process, as it should.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file_of(length: u64) -> (tempfile::NamedTempFile, Arc<File>) {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(length).unwrap();
        let file = Arc::new(named.reopen().unwrap());
        (named, file)
    }

    #[test]
    fn bytes_come_out_across_windows() {
        let (_named, file) = file_of(2 * WINDOW_LEN + 8192);
        file.write_all_at(b"across", WINDOW_LEN - 3).unwrap();
        file.write_all_at(b"end", 2 * WINDOW_LEN + 8189).unwrap();
        let map = VolumeMap::new(Arc::clone(&file), 2 * WINDOW_LEN + 8192);
        have_mapped(&map, 0);
        have_mapped(&map, WINDOW_LEN);
        let mut six = [0; 6];
        map.read_into(WINDOW_LEN - 3, &mut six).unwrap();
        assert_eq!(&six, b"across");
        let mut three = [0; 3];
        map.read_into(2 * WINDOW_LEN + 8189, &mut three).unwrap();
        assert_eq!(&three, b"end");
        let outside = map
            .read_into(2 * WINDOW_LEN + 8190, &mut three)
            .unwrap_err();
        assert_eq!(outside.kind(), io::ErrorKind::InvalidInput);
        assert!(map.read_into(u64::MAX, &mut three).is_err());
    }

    #[test]
    fn later_writes_are_seen() {
        let length = MAP_AT_ONCE_LEN as u64;
        let (mut named, file) = file_of(length);
        let map = VolumeMap::new(file, length);
        have_mapped(&map, 0);
        let mut byte = [9];
        map.read_into(0, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        named.write_all(b"x").unwrap();
        map.read_into(0, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    /// Has the window mapped that holds `offset`.
    fn have_mapped(map: &VolumeMap, offset: u64) {
        map.read_into(offset, &mut vec![0; MAP_AT_ONCE_LEN])
            .unwrap();
        assert!(map.windows.read().contains_key(&(offset / WINDOW_LEN)));
    }

    #[test]
    fn a_file_cut_short_gives_an_error_and_recovers_when_it_is_long_again() {
        let length = 128 * 4096;
        let (named, file) = file_of(length);
        file.write_all_at(&[7; 128 * 4096], 0).unwrap();
        let map = VolumeMap::new(file, length);
        let mut page = [0; 4096];
        // The second time it is read by `pread`: the window went with its missing page.
        for mapped in [true, false] {
            named.as_file().set_len(length).unwrap();
            if mapped {
                have_mapped(&map, 0);
            }
            named.as_file().set_len(4 * 4096).unwrap();
            let error = map.read_into(127 * 4096, &mut page).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
            assert!(map.windows.read().is_empty());
            map.read_into(0, &mut page).unwrap();
            assert_eq!(page, [7; 4096]);
        }

        named.as_file().set_len(length).unwrap();
        map.read_into(127 * 4096, &mut page).unwrap();
        assert_eq!(page, [0; 4096]);
    }

    #[test]
    fn a_window_is_mapped_once_it_is_read_often_or_much() {
        let (_named, file) = file_of(2 * WINDOW_LEN);
        let map = VolumeMap::new(file, 2 * WINDOW_LEN);
        let mut byte = [1];
        for _ in 0..READS_BEFORE_MAP {
            map.read_into(5, &mut byte).unwrap();
        }
        assert!(map.windows.read().is_empty());
        map.read_into(5, &mut byte).unwrap();
        assert_eq!(map.windows.read().keys().collect::<Vec<_>>(), [&0]);
        have_mapped(&map, WINDOW_LEN);
    }

    #[test]
    fn many_windows_stay_within_their_bound() {
        let length = WINDOW_LEN * (WINDOWS_MAX as u64 + 5);
        let (_named, file) = file_of(length);
        let map = VolumeMap::new(file, length);
        for number in 0..WINDOWS_MAX as u64 + 5 {
            have_mapped(&map, number * WINDOW_LEN);
        }
        assert_eq!(map.windows.read().len(), WINDOWS_MAX);
    }
}
