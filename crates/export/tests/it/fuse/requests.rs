//! Each request is exact, and its failure is its own.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use tidemark_export::{BlockDevice, Durability};

use super::{GATED, GRACE, Mounted, NO_ROOM, PANIC, SIZE, errno};
use crate::client::eventually;

/// Numbers that look random and are the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A buffer at an address that direct I/O takes.
pub(super) struct Aligned {
    bytes: Vec<u8>,
    from: usize,
    length: usize,
}

impl Aligned {
    pub(super) fn new(length: usize) -> Self {
        let bytes = vec![0; length + 4096];
        let from = bytes.as_ptr().align_offset(4096);
        Self {
            bytes,
            from,
            length,
        }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + self.length]
    }
}

#[test]
fn each_request_size_is_exact_buffered_and_direct_at_the_same_time() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let ways = [
        (mounted.open(0), false),
        (mounted.open(libc::O_DIRECT), true),
    ];
    let mut model = vec![0; SIZE as usize];
    let mut numbers = Numbers(0x7469_6465_6d61_726b);
    let mut length = 512;
    while length <= 4 << 20 {
        for round in 0..6 {
            let (file, direct) = &ways[round % 2];
            // Direct I/O keeps to sectors; buffered requests are of any place and length.
            let length = length - usize::from(!direct && round > 1) * 7;
            let mut at = numbers.below(SIZE - length as u64);
            if *direct {
                at -= at % 512;
            }
            let mut buffer = Aligned::new(length);
            for byte in buffer.bytes().iter_mut() {
                *byte = numbers.next() as u8;
            }
            file.write_all_at(buffer.bytes(), at).unwrap();
            model[at as usize..][..length].copy_from_slice(buffer.bytes());
            assert_eq!(
                mounted.device_bytes(at, length),
                &model[at as usize..][..length],
                "{length} bytes at {at}, direct: {direct}, in the device"
            );
            let from = (at - at % 512).saturating_sub(4096);
            let around = (length + 8192).min((SIZE - from) as usize) / 512 * 512;
            for (file, direct) in &ways {
                let mut buffer = Aligned::new(around);
                file.read_exact_at(buffer.bytes(), from).unwrap();
                assert!(
                    buffer.bytes() == &model[from as usize..][..around],
                    "{around} bytes at {from}, read direct: {direct}"
                );
            }
        }
        length *= 2;
    }
    assert!(mounted.device_bytes(0, SIZE as usize) == model);
    assert!(fs::read(mounted.path("data.img")).unwrap() == model);
}

#[test]
#[allow(unsafe_code, reason = "a shared mapping is what is tested")]
fn what_is_written_through_a_shared_mapping_reaches_the_device_by_fsync_and_readers_at_once() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let file = mounted.open(0);
    // SAFETY: nothing else changes the file while it is mapped.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    map[4095..4097].copy_from_slice(b"ab");
    let last = SIZE as usize - 1;
    map[last] = b'z';
    let mut read = [0; 2];
    file.read_exact_at(&mut read, 4095).unwrap();
    assert_eq!(&read, b"ab");
    let before = mounted.device.flushes.load(Ordering::SeqCst);
    file.sync_data().unwrap();
    assert_eq!(mounted.device_bytes(4095, 2), b"ab");
    assert_eq!(mounted.device_bytes(SIZE - 1, 1), b"z");
    assert!(mounted.device.flushes.load(Ordering::SeqCst) > before);
    file.write_all_at(b"cd", 8191).unwrap();
    assert_eq!(&map[8191..8193], b"cd");
    map[9000] = b'm';
    map.flush().unwrap();
    assert_eq!(mounted.device_bytes(9000, 1), b"m");
    // The last of it goes with the mapping.
    map[10_000] = b'u';
    drop((map, file));
    eventually("the mapping's pages are written", || {
        mounted.device_bytes(10_000, 1) == b"u"
    });
}

#[test]
fn holes_and_zero_ranges_of_any_bytes_read_as_zeroes_in_file_and_device() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let file = mounted.open(0);
    let mut model = vec![7; SIZE as usize];
    mounted
        .device
        .memory
        .write(0, &model, Durability::Volatile)
        .unwrap();
    assert!(fs::read(mounted.path("data.img")).unwrap() == model);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let zero = FallocateFlags::ZERO_RANGE;
    for (mode, at, length) in [
        (punch, 4096, 4096),
        (punch, 100_001, 70_003),
        (zero, 500_000, 1),
        (zero, 1 << 20, 3 << 20),
        (zero | FallocateFlags::KEEP_SIZE, 7 << 20, 12_345),
        // A hole may reach past the end.
        (punch, SIZE - 100, 1 << 20),
    ] {
        fallocate(&file, mode, at, length).unwrap();
        let end = (at + length).min(SIZE);
        model[at as usize..end as usize].fill(0);
        assert!(
            mounted.device_bytes(0, SIZE as usize) == model,
            "{mode:?} at {at}"
        );
        assert!(
            fs::read(mounted.path("data.img")).unwrap() == model,
            "{mode:?} at {at}"
        );
    }
    for (mode, at, length) in [
        (zero, SIZE - 1, 2),
        (FallocateFlags::empty(), 0, 4096),
        (FallocateFlags::COLLAPSE_RANGE, 0, 4096),
    ] {
        assert!(
            fallocate(&file, mode, at, length).is_err(),
            "{mode:?} at {at}"
        );
    }
    assert!(mounted.device_bytes(0, SIZE as usize) == model);
}

#[test]
fn each_way_to_sync_reaches_the_device() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let flushes = || mounted.device.flushes.load(Ordering::SeqCst);
    let file = mounted.open(0);
    file.write_all_at(b"x", 0).unwrap();
    assert_eq!(flushes(), 0);
    file.sync_data().unwrap();
    assert_eq!(flushes(), 1);
    file.sync_all().unwrap();
    assert_eq!(flushes(), 2);
    for flag in [libc::O_DSYNC, libc::O_SYNC, libc::O_DSYNC | libc::O_DIRECT] {
        let before = flushes();
        let file = mounted.open(flag);
        let mut buffer = Aligned::new(4096);
        file.write_all_at(buffer.bytes(), 0).unwrap();
        assert!(flushes() > before, "{flag:o}");
    }
}

#[test]
fn the_size_is_fixed_and_a_write_past_the_end_is_refused() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let file = mounted.open(0);
    file.write_all_at(b"kept", 0).unwrap();
    for size in [0, SIZE - 1, SIZE + 1] {
        assert_eq!(errno(file.set_len(size)), libc::EPERM, "{size}");
    }
    file.set_len(SIZE).unwrap();
    let truncating = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(mounted.path("data.img"));
    assert_eq!(errno(truncating), libc::EPERM);
    assert_eq!(errno(file.write_at(b"x", SIZE)), libc::ENOSPC);
    assert_eq!(file.write_at(b"xyz", SIZE - 2).unwrap(), 2);
    assert_eq!(file.read_at(&mut [0; 8], SIZE - 2).unwrap(), 2);
    assert_eq!(file.read_at(&mut [0; 8], SIZE + 5).unwrap(), 0);
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    assert_eq!(mounted.device_bytes(0, 4), b"kept");
    let img = mounted.path("data.img");
    assert_eq!(
        errno(File::create_new(mounted.path("other.img"))),
        libc::EPERM
    );
    assert_eq!(errno(fs::remove_file(&img)), libc::EPERM);
    assert_eq!(errno(fs::rename(&img, mounted.path("x"))), libc::EPERM);
    assert_eq!(errno(fs::create_dir(mounted.path("x"))), libc::EPERM);
}

#[test]
fn holes_are_found_by_readers_and_none_is_certain_while_a_writer_is_there() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    mounted
        .device
        .write(1 << 20, &[1; 70_000], Durability::Volatile)
        .unwrap();
    let file = File::open(mounted.path("data.img")).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), 1 << 20);
    assert_eq!(
        seek(&file, SeekFrom::Hole(1 << 20)).unwrap(),
        (1 << 20) + (128 << 10)
    );
    assert_eq!(seek(&file, SeekFrom::Hole(0)).unwrap(), 0);
    let none = seek(&file, SeekFrom::Data(2 << 20));
    assert_eq!(none.unwrap_err(), rustix::io::Errno::NXIO);
    let writer = mounted.open(0);
    assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), 0);
    assert_eq!(seek(&writer, SeekFrom::Hole(0)).unwrap(), SIZE);
}

#[test]
fn errors_and_bugs_of_a_device_are_errors_of_their_requests_and_one_that_waits_holds_up_no_other() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let file = mounted.open(libc::O_DIRECT);
    let mut buffer = Aligned::new(4096);
    assert_eq!(errno(file.write_at(buffer.bytes(), NO_ROOM)), libc::ENOSPC);
    for _ in 0..2 * tidemark_export::fuse::WORKERS {
        assert_eq!(errno(file.write_at(buffer.bytes(), PANIC)), libc::EIO);
    }
    mounted.device.close_gate(true);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| file.write_all_at(Aligned::new(4096).bytes(), GATED));
        file.read_exact_at(buffer.bytes(), 0).unwrap();
        assert!(!waiting.is_finished());
        mounted.device.close_gate(false);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn requests_that_come_one_by_one_are_performed_by_one_thread() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let file = mounted.open(libc::O_DIRECT);
    let mut buffer = Aligned::new(4096);
    for n in 0..200 {
        file.write_all_at(buffer.bytes(), n % 8 * 4096).unwrap();
    }
    let writers = mounted.device.writers.lock();
    // At first each thread is given a request; and on a machine that lets one wait, another takes over.
    let changes = writers.windows(2).filter(|two| two[0] != two[1]).count();
    assert!(
        changes < writers.len() / 2,
        "{changes} of {}",
        writers.len()
    );
}

#[test]
fn while_all_threads_but_one_wait_the_last_goes_on() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (device, file) = (&mounted.device, mounted.open(libc::O_DIRECT));
    let most = tidemark_export::fuse::WORKERS - 1;
    device.close_gate(true);
    std::thread::scope(|scope| {
        // Reads: the kernel lets one direct write into a file at a time.
        let read = || file.read_exact_at(Aligned::new(4096).bytes(), GATED);
        let waiting: Vec<_> = (0..most).map(|_| scope.spawn(read)).collect();
        let began = Instant::now();
        while device.waiting.load(Ordering::SeqCst) < most as u64 && began.elapsed() < GRACE {
            std::thread::sleep(Duration::from_millis(2));
        }
        let all_waited = device.waiting.load(Ordering::SeqCst) == most as u64;
        let went_on = all_waited && file.read_exact_at(Aligned::new(4096).bytes(), 0).is_ok();
        // First of all, so that a failure is one, and no endless wait.
        device.close_gate(false);
        assert!(all_waited && went_on);
        for one in waiting {
            one.join().unwrap().unwrap();
        }
    });
}
