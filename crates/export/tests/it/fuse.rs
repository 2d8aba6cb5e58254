//! Exports as files, through the kernel. Needs root and `/dev/fuse`; elsewhere each test says so and passes, and under
//! CI it fails.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tempfile::TempDir;
use tidemark_export::{
    AllocationExtent, BlockDevice, Durability, ExportRegistry, FuseServer, ZeroFlags,
};

use crate::devices::MemoryDevice;

#[path = "fuse/ends.rs"]
mod ends;
#[path = "fuse/files.rs"]
mod files;
#[path = "fuse/requests.rs"]
mod requests;

const SIZE: u64 = 16 << 20;

const GRACE: Duration = Duration::from_secs(5);

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
