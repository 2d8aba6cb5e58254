//! Exports as files, through the kernel. Needs root and `/dev/fuse`; elsewhere each test says so and passes, and under
//! CI it fails.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rand_like::Numbers;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use tempfile::TempDir;
use tidemark_export::{
    AllocationExtent, BlockDevice, Durability, ExportRegistry, FuseServer, MountError,
    RegistryError, ZeroFlags,
};

use crate::client::eventually;
use crate::devices::MemoryDevice;
use crate::real_clients::require_tool;

const SIZE: u64 = 16 << 20;
const GRACE: Duration = Duration::from_secs(5);

/// Numbers that look random and are the same each time.
mod rand_like {
    pub(super) struct Numbers(pub(super) u64);

    impl Numbers {
        pub(super) fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        pub(super) fn below(&mut self, end: u64) -> u64 {
            self.next() % end
        }
    }
}

fn can_mount() -> bool {
    let lacking = if !rustix::process::geteuid().is_root() {
        "root"
    } else if !Path::new("/dev/fuse").exists() {
        "/dev/fuse"
    } else {
        return true;
    };
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "mounting needs {lacking}"
    );
    println!("skipped: mounting needs {lacking}");
    false
}

/// Memory that counts its flushes, and fails, panics or waits where the test wants it.
struct Watched {
    memory: MemoryDevice,
    flushes: AtomicU64,
    gate: Mutex<bool>,
    opened: Condvar,
    /// Reads that have come to the gate.
    waiting: AtomicU64,
    /// Who performed each write.
    writers: Mutex<Vec<std::thread::ThreadId>>,
}

/// Reads and writes here wait while the gate is closed.
const GATED: u64 = 1 << 20;
const NO_ROOM: u64 = 2 << 20;
const PANIC: u64 = 3 << 20;

impl Watched {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            memory: MemoryDevice::new(SIZE),
            flushes: AtomicU64::new(0),
            gate: Mutex::new(false),
            opened: Condvar::new(),
            waiting: AtomicU64::new(0),
            writers: Mutex::default(),
        })
    }

    fn pass_gate(&self) {
        let mut closed = self.gate.lock();
        while *closed {
            self.opened.wait(&mut closed);
        }
    }

    fn close_gate(&self, closed: bool) {
        *self.gate.lock() = closed;
        self.opened.notify_all();
    }
}

impl BlockDevice for Watched {
    fn length(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn block_size_preferred(&self) -> u32 {
        4096
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset == GATED {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            self.pass_gate();
        }
        self.memory.read(offset, buf)
    }
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        self.writers.lock().push(std::thread::current().id());
        match offset {
            GATED => self.pass_gate(),
            NO_ROOM => return Err(io::ErrorKind::StorageFull.into()),
            PANIC => panic!("a bug in the device"),
            _ => {}
        }
        self.memory.write(offset, data, durability)
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn trim(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        // As a device may that keeps what a snapshot needs.
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.memory.write_zeroes(offset, len, flags)
    }
    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<AllocationExtent>> {
        self.memory.extents(offset, len, max)
    }
}

/// A mount with one volume, `data`.
struct Mounted {
    server: FuseServer,
    registry: Arc<ExportRegistry>,
    device: Arc<Watched>,
    dir: TempDir,
}

impl Mounted {
    fn new() -> Option<Self> {
        can_mount().then(|| {
            let dir = tempfile::tempdir().unwrap();
            let registry = Arc::new(ExportRegistry::new());
            let device = Watched::new();
            registry.add("data", "", Arc::clone(&device) as _).unwrap();
            let exports = Arc::clone(&registry);
            let server = FuseServer::start(exports, &dir.path().join("mount")).unwrap();
            Self {
                server,
                registry,
                device,
                dir,
            }
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("mount").join(name)
    }

    fn open(&self, flags: i32) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(self.path("data.img"))
            .unwrap()
    }

    fn device_bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.device.read(offset, &mut bytes).unwrap();
        bytes
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().and_then(|e| e.raw_os_error()).unwrap_or(0)
}

/// A buffer at an address that direct I/O takes.
struct Aligned {
    bytes: Vec<u8>,
    from: usize,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + 4096];
        let from = bytes.as_ptr().align_offset(4096);
        Self {
            bytes,
            from,
            length,
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
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
fn volumes_and_snapshots_come_and_go_while_mounted() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (root, snapshots) = (mounted.path(""), mounted.path(".snapshots"));
    assert_eq!(names(&root), [".snapshots", "data.img"]);
    assert_eq!(names(&snapshots), ["data"]);
    assert_eq!(names(&snapshots.join("data")), [""; 0]);
    let image = MemoryDevice::new(1 << 20);
    image.write(5, b"then", Durability::Volatile).unwrap();
    let registry = &mounted.registry;
    registry
        .add("data@3", "", Arc::new(image.read_only()))
        .unwrap();
    assert_eq!(names(&root), [".snapshots", "data.img"]);
    assert_eq!(names(&snapshots.join("data")), ["3.img"]);
    let path = snapshots.join("data/3.img");
    let mut read = [0; 4];
    let file = File::open(&path).unwrap();
    file.read_exact_at(&mut read, 5).unwrap();
    assert_eq!(&read, b"then");
    assert_eq!(
        file.metadata().unwrap().ino(),
        fs::metadata(&path).unwrap().ino()
    );
    for write in [
        OpenOptions::new().write(true),
        OpenOptions::new().append(true),
    ] {
        assert_eq!(errno(write.open(&path)), libc::EROFS);
    }
    assert!(file.set_len(0).is_err());
    // In use: whoever removes it must end its use first.
    let removed = registry.remove("data@3");
    assert!(matches!(
        removed,
        Err(RegistryError::InUse { clients: 1, .. })
    ));
    assert_eq!(mounted.server.disconnect("data@3"), 1);
    registry.remove("data@3").unwrap();
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    assert_eq!(direct.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(errno(file.read_at(&mut [0; 512], 4096 * 7)), libc::ESTALE);
    drop(file);

    registry
        .add("new", "", Arc::new(MemoryDevice::new(8192)))
        .unwrap();
    assert_eq!(fs::metadata(mounted.path("new.img")).unwrap().len(), 8192);
    for missing in [
        "other.img",
        "new",
        ".img",
        "data@3.img",
        ".snapshots/other",
        ".snapshots/data/3.img",
    ] {
        let found = fs::metadata(mounted.path(missing));
        assert_eq!(found.unwrap_err().kind(), ErrorKind::NotFound, "{missing}");
    }
    assert_eq!(names(&root), [".snapshots", "data.img", "new.img"]);
}

#[test]
fn a_volume_taken_away_by_force_is_stale_and_another_of_its_name_shows_its_own_bytes() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let old = mounted.open(0);
    old.write_all_at(&[1; 8192], 0).unwrap();
    assert_eq!(mounted.server.disconnect("data"), 1);
    mounted.registry.remove("data").unwrap();
    let fresh = MemoryDevice::new(SIZE);
    fresh.write(0, &[2; 8192], Durability::Volatile).unwrap();
    mounted.registry.add("data", "", Arc::new(fresh)).unwrap();
    let new = mounted.open(0);
    let mut read = [0; 8192];
    new.read_exact_at(&mut read, 0).unwrap();
    assert!(read == [2; 8192]);
    assert_eq!(errno(old.write_at(&[3; 512], 0)), libc::ESTALE);
    assert_eq!(errno(old.sync_all()), libc::ESTALE);
    assert_eq!(errno(old.read_at(&mut [0; 512], 1 << 20)), libc::ESTALE);
    new.read_exact_at(&mut read, 0).unwrap();
    assert!(read == [2; 8192]);
}

#[test]
fn what_another_front_end_wrote_is_read_by_who_opens_the_file_next() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let mut read = [0; 5];
    for text in [b"first", b"later"] {
        mounted.device.write(0, text, Durability::Volatile).unwrap();
        mounted.open(0).read_exact_at(&mut read, 0).unwrap();
        assert_eq!(&read, text);
    }
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

#[test]
fn a_busy_mount_is_gone_from_its_directory_at_once_and_its_open_files_have_nothing_behind_them() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let file = mounted.open(0);
    file.write_all_at(b"kept", 0).unwrap();
    let export = mounted.registry.remove("data").unwrap_err();
    assert!(matches!(export, RegistryError::InUse { clients: 1, .. }));
    assert_eq!(mounted.server.stop(GRACE).cut_off, 1);
    assert_eq!(names(&mounted.path("")), [""; 0]);
    assert_eq!(errno(file.write_at(b"lost", 0)), libc::ESTALE);
    mounted.registry.remove("data").unwrap();
    assert_eq!(mounted.device_bytes(0, 4), b"kept");
    assert_eq!(mounted.server.stop(GRACE).cut_off, 0);
}

#[test]
fn a_mount_that_nobody_uses_is_unmounted_whole_and_can_be_mounted_again() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    drop(mounted.open(0));
    for _ in 0..3 {
        assert_eq!(mounted.server.stop(GRACE).cut_off, 0);
        assert_eq!(names(&mounted.path("")), [""; 0]);
        let again = FuseServer::start(Arc::clone(&mounted.registry) as _, &mounted.path(""));
        assert_eq!(names(&mounted.path("")), [".snapshots", "data.img"]);
        drop(again.unwrap());
    }
}

#[test]
fn a_stop_ends_in_time_while_a_request_waits() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    mounted.device.close_gate(true);
    let file = mounted.open(libc::O_DIRECT);
    let waiting = std::thread::spawn(move || file.write_all_at(Aligned::new(4096).bytes(), GATED));
    eventually("the write has come", || {
        mounted
            .registry
            .remove("data")
            .is_err_and(|error| matches!(error, RegistryError::InUse { clients: 1, .. }))
    });
    mounted.server.stop(Duration::from_millis(100));
    assert_eq!(names(&mounted.path("")), [""; 0]);
    mounted.device.close_gate(false);
    let _ended = waiting.join().unwrap();
}

#[test]
fn a_directory_that_must_not_be_mounted_on_is_refused_with_what_to_do() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let start = |at: &Path| FuseServer::start(Arc::clone(&mounted.registry) as _, at);
    let full = mounted.dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("a file"), "").unwrap();
    let error = start(&full).unwrap_err();
    assert!(matches!(error, MountError::NotEmpty { .. }), "{error}");
    let error = start(&mounted.path("")).unwrap_err();
    assert!(
        matches!(&error, MountError::Mounted { kind, .. } if kind == "fuse.tidemark"),
        "{error}"
    );
    let error = start(&full.join("a file")).unwrap_err();
    assert!(matches!(error, MountError::Directory { .. }), "{error}");
    assert_eq!(names(&mounted.path("")), [".snapshots", "data.img"]);
}

const AT: &str = "TIDEMARK_TEST_MOUNT";

#[test]
#[ignore = "the process that other tests start, and kill"]
fn a_server_of_its_own() {
    let at = PathBuf::from(std::env::var_os(AT).unwrap());
    let registry = Arc::new(ExportRegistry::new());
    registry.add("data", "", Watched::new()).unwrap();
    let server = FuseServer::start(registry, &at).unwrap();
    assert_eq!(names(&at), [".snapshots", "data.img"]);
    println!("\nmounted");
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(server.stop(GRACE).cut_off, 0);
    assert_eq!(names(&at), [""; 0]);
}

/// Starts this program with only that test, through another program perhaps, and waits until it has mounted.
fn serve_elsewhere(through: &[&str], at: &Path) -> std::process::Child {
    let exe = std::env::current_exe().unwrap();
    let mut words = through
        .iter()
        .map(|word| (*word).into())
        .collect::<Vec<_>>();
    words.push(exe.into_os_string());
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .args([
            "--exact",
            "fuse::a_server_of_its_own",
            "--ignored",
            "--nocapture",
        ])
        .env(AT, at)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = io::BufReader::new(child.stdout.as_mut().unwrap());
    let told = io::BufRead::lines(output).any(|line| line.unwrap() == "mounted");
    assert!(told, "it did not mount");
    child
}

#[test]
fn what_a_killed_server_left_mounted_and_in_use_is_unmounted_and_mounted_anew() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("mount");
    let mut child = serve_elsewhere(&[], &at);
    let mut file = OpenOptions::new()
        .write(true)
        .open(at.join("data.img"))
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(errno(fs::metadata(&at)), libc::ENOTCONN);
    let registry = Arc::new(ExportRegistry::new());
    registry.add("data", "", Watched::new()).unwrap();
    let server = FuseServer::start(registry, &at).unwrap();
    assert_eq!(names(&at), [".snapshots", "data.img"]);
    assert!(file.write_all(b"x").is_err());
    assert_eq!(server.stop(GRACE).cut_off, 0);
    assert_eq!(names(&at), [""; 0]);
}

/// Makes what Debian has by default, seen by nobody else: a `/dev/fuse` for all, and a helper that is set-user-id.
const AS_NOBODY: &str = r#"
    dir=$1; shift
    mount -t tmpfs -o dev,suid,mode=755 tmpfs /mnt
    mknod -m 666 /mnt/fuse c 10 229
    mount --bind /mnt/fuse /dev/fuse
    mkdir /mnt/bin
    cp "$(command -v fusermount3)" /mnt/bin
    chmod 4755 /mnt/bin/fusermount3
    cp "$1" /mnt/bin/server; shift
    chown -R nobody "$dir"
    PATH=/mnt/bin:$PATH exec setpriv --reuid=nobody --regid=nogroup --clear-groups /mnt/bin/server "$@"
"#;

#[test]
fn whoever_is_not_root_mounts_and_unmounts_through_the_helper() {
    if !can_mount() || !require_tool("fusermount3", "fuse3") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (at, owned) = (dir.path().join("mount"), dir.path().to_str().unwrap());
    let mut through = vec!["unshare", "--mount", "--propagation", "private"];
    through.extend(["sh", "-ec", AS_NOBODY, "sh", owned]);
    let mut child = serve_elsewhere(&through, &at);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}
