//! The kernel's requests, each performed by the thread that read it, in its turn (`crew`).

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::crew::Crew;
use super::files::{Files, OpenFile};
use super::tree::{Node, ROOT, Tree};
use crate::device::{Durability, ZeroFlags};
use crate::errno::errno;

/// Threads that read and perform requests.
pub const WORKERS: usize = 8;

/// Bytes of the largest read or write.
const REQUEST_MAX: u32 = 1 << 20;
/// Bytes read ahead, unless the kernel asks for less.
const READAHEAD_MAX: u32 = 1 << 20;
/// Requests that the kernel sends without somebody waiting for each: read-ahead, direct I/O in parallel.
const BACKGROUND_MAX: u16 = 64;
/// Names and attributes are asked for anew each time.
const NO_TIME: Duration = Duration::ZERO;
/// Bytes zeroed by one call of a device.
const ZERO_STEP: u64 = 1 << 30;
/// Extents asked for at a time.
const EXTENTS_AT_ONCE: usize = 64;
/// What a directory says of an entry whose number nobody has asked for.
const INODE_UNKNOWN: u64 = 0xffff_ffff;
const BLOCK: u32 = 4096;

thread_local! {
    /// What was read, until it is sent.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What a mount shares: the tree, the open files, and the turns of its threads.
pub(super) struct Mounted {
    pub(super) tree: Tree,
    pub(super) files: Files,
    pub(super) crew: Crew,
}

impl fmt::Debug for Mounted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mounted")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

/// The requests of one mount.
pub(super) struct Requests(pub(super) Arc<Mounted>);

fn refusal(error: &io::Error) -> Errno {
    Errno::from_i32(errno(error))
}

/// Sends a result.
macro_rules! sent {
    ($reply:ident, $result:expr, $value:pat => $send:expr) => {
        match $result {
            Ok($value) => $send,
            Err(error) => $reply.error(refusal(&error)),
        }
    };
}

/// Performs a request in its thread's turn, and sends the result.
macro_rules! answer {
    ($self:ident, $reply:ident, $result:expr, $value:pat => $send:expr) => {
        $self.0.crew.perform(|| sent!($reply, $self.0.crew.timed(|| $result), $value => $send))
    };
}

/// As `answer`, of a request that is known to take its time.
macro_rules! answer_aside {
    ($self:ident, $reply:ident, $result:expr, $value:pat => $send:expr) => {
        $self.0.crew.perform_aside(|| sent!($reply, $self.0.crew.timed(|| $result), $value => $send))
    };
}

fn number(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// A bug of a device is an error of its request: the thread goes on.
fn guarded<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        tracing::error!("a request panicked");
        Err(number(libc::EIO))
    })
}

impl Requests {
    fn attributes(inode: u64, node: &Node) -> io::Result<FileAttr> {
        let directory = FileAttr {
            ino: INodeNo(inode),
            size: 0,
            blocks: 0,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: FileType::Directory,
            perm: 0o700,
            nlink: 2,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        };
        let Node::File(file) = node else {
            return Ok(directory);
        };
        let export = file.export().ok_or_else(|| number(libc::ESTALE))?;
        let (device, modified) = (export.device(), file.modified());
        Ok(FileAttr {
            size: device.length(),
            blocks: device.length().div_ceil(512),
            atime: modified,
            mtime: modified,
            ctime: modified,
            kind: FileType::RegularFile,
            perm: if export.read_only() { 0o400 } else { 0o600 },
            nlink: 1,
            blksize: device.block_size_preferred(),
            ..directory
        })
    }

    fn attributes_of(&self, inode: u64) -> io::Result<FileAttr> {
        let node = self.0.tree.node(inode);
        Self::attributes(inode, &node.ok_or_else(|| number(libc::ESTALE))?)
    }

    fn found(&self, parent: u64, name: &OsStr) -> io::Result<FileAttr> {
        let name = name.to_str().ok_or_else(|| number(libc::ENOENT))?;
        let (inode, node) = self
            .0
            .tree
            .look_up(parent, name)
            .ok_or_else(|| number(libc::ENOENT))?;
        Self::attributes(inode, &node).inspect_err(|_| self.0.tree.forget(inode, 1))
    }

    fn opened(&self, inode: u64, flags: OpenFlags) -> io::Result<(u64, FopenFlags)> {
        let Some(Node::File(file)) = self.0.tree.node(inode) else {
            return Err(number(libc::ESTALE));
        };
        let writable = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let (handle, shared) = self.0.files.open(inode, &file, writable)?;
        let unchanging = file
            .export()
            .is_some_and(|export| export.snapshot().is_some() && export.read_only());
        let mut told = FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        if shared || unchanging {
            told |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        Ok((handle, told))
    }

    /// Nothing but times is taken, and these are not kept.
    fn changed(&self, inode: u64, size: Option<u64>, others: bool) -> io::Result<FileAttr> {
        let now = self.attributes_of(inode)?;
        if others || size.is_some_and(|size| size != now.size) {
            return Err(number(libc::EPERM));
        }
        Ok(now)
    }

    fn zeroed(&self, handle: u64, offset: u64, length: u64, mode: i32) -> io::Result<()> {
        let file = self.0.files.get(handle)?;
        let device = file.changing()?;
        let may_punch = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => true,
            libc::FALLOC_FL_ZERO_RANGE => false,
            _ => return Err(number(libc::EOPNOTSUPP)),
        };
        let past_end = offset
            .checked_add(length)
            .is_none_or(|end| end > device.length());
        // A file can't grow; a hole past its end is there already.
        if past_end && !may_punch {
            return Err(number(libc::EFBIG));
        }
        let end = offset.saturating_add(length).min(device.length());
        let flags = ZeroFlags {
            may_punch,
            ..ZeroFlags::default()
        };
        let mut at = offset;
        while at < end {
            let step = (end - at).min(ZERO_STEP);
            device.write_zeroes(at, step, flags)?;
            at += step;
        }
        file.node().touch();
        Ok(())
    }

    fn written(&self, handle: u64, offset: u64, data: &[u8]) -> io::Result<u32> {
        let file = self.0.files.get(handle)?;
        let device = file.changing()?;
        // The last page of a mapping may reach past the end; a program's write must not.
        let room = device.length().saturating_sub(offset);
        let length = usize::try_from(room).unwrap_or(usize::MAX).min(data.len());
        if length == 0 && !data.is_empty() {
            return Err(number(libc::ENOSPC));
        }
        device.write(offset, &data[..length], Durability::Volatile)?;
        file.node().touch();
        u32::try_from(length).map_err(|_| number(libc::EINVAL))
    }

    fn read_into<'b>(
        &self,
        buffer: &'b mut Vec<u8>,
        handle: u64,
        offset: u64,
        size: u32,
    ) -> io::Result<&'b [u8]> {
        let file = self.0.files.get(handle)?;
        let room = file.device().length().saturating_sub(offset);
        let length = room.min(u64::from(size.min(REQUEST_MAX)));
        let length = usize::try_from(length).map_err(|_| number(libc::EINVAL))?;
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let part = &mut buffer[..length];
        if length > 0 {
            file.device().read(offset, part)?;
        }
        Ok(part)
    }

    fn listed(&self, inode: u64) -> io::Result<u64> {
        let entries = self.0.tree.entries(inode);
        self.0
            .files
            .open_directory(entries.ok_or_else(|| number(libc::ENOTDIR))?)
    }

    fn entries(&self, inode: INodeNo, handle: u64, offset: u64, mut reply: ReplyDirectory) {
        let entries = match self.0.files.directory(handle) {
            Ok(entries) => entries,
            Err(error) => return reply.error(refusal(&error)),
        };
        for (entry, next) in entries.iter().zip(1u64..) {
            if next <= offset {
                continue;
            }
            let kind = if entry.directory {
                FileType::Directory
            } else {
                FileType::RegularFile
            };
            let number = match entry.name.as_str() {
                "." => inode,
                ".." => INodeNo(ROOT),
                _ => INodeNo(INODE_UNKNOWN),
            };
            if reply.add(number, next, kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn sought(&self, handle: u64, offset: i64, whence: i32) -> io::Result<i64> {
        let file = self.0.files.get(handle)?;
        let length = file.device().length();
        let at = u64::try_from(offset).ok().filter(|at| *at < length);
        let at = at.ok_or_else(|| number(libc::ENXIO))?;
        let found = match whence {
            // What was written through a mapping may not have come yet: no hole is certain.
            libc::SEEK_DATA if self.0.files.is_writable(&file) => at,
            libc::SEEK_HOLE if self.0.files.is_writable(&file) => length,
            libc::SEEK_DATA => next(&file, at, false)?.ok_or_else(|| number(libc::ENXIO))?,
            libc::SEEK_HOLE => next(&file, at, true)?.unwrap_or(length),
            _ => return Err(number(libc::EINVAL)),
        };
        i64::try_from(found).map_err(|_| number(libc::EOVERFLOW))
    }
}

/// The first byte from `at` on that is, or is not, in a hole that reads as zeroes.
fn next(file: &OpenFile, mut at: u64, hole: bool) -> io::Result<Option<u64>> {
    let length = file.device().length();
    while at < length {
        let extents = file.device().extents(at, length - at, EXTENTS_AT_ONCE)?;
        if extents.is_empty() {
            return Err(number(libc::EIO));
        }
        for extent in extents {
            if (extent.hole && extent.zero) == hole {
                return Ok(Some(at));
            }
            at += extent.length;
        }
    }
    Ok(None)
}

impl Filesystem for Requests {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is the nearest that the kernel takes where it doesn't take this.
        if let Err(nearest) = config.set_max_write(REQUEST_MAX) {
            let _set = config.set_max_write(nearest);
        }
        if let Err(nearest) = config.set_max_readahead(READAHEAD_MAX) {
            let _set = config.set_max_readahead(nearest);
        }
        let _set = config.set_max_background(BACKGROUND_MAX);
        for wanted in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS] {
            // Without it requests are merely less parallel.
            let _lacking = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer!(self, reply, self.found(parent.0, name), attr => reply.entry(&NO_TIME, &attr, Generation(0)));
    }

    fn forget(&self, _: &Request, inode: INodeNo, lookups: u64) {
        let mounted = &self.0;
        mounted
            .crew
            .perform(|| mounted.tree.forget(inode.0, lookups));
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(self, reply, self.attributes_of(inode.0), attr => reply.attr(&NO_TIME, &attr));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let others = mode.is_some() || uid.is_some() || gid.is_some();
        answer!(self, reply, self.changed(inode.0, size, others), attr => reply.attr(&NO_TIME, &attr));
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        answer!(self, reply, self.opened(inode.0, flags), (handle, told) => reply.opened(FileHandle(handle), told));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.0.crew.perform(|| {
            BUFFER.with_borrow_mut(|buffer| {
                let crew = &self.0.crew;
                let read =
                    crew.timed(|| guarded(|| self.read_into(buffer, handle.0, offset, size)));
                sent!(reply, read, data => reply.data(data));
            });
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        answer!(self, reply, guarded(|| self.written(handle.0, offset, data)), length => reply.written(length));
    }

    /// Each `close` of a file; nothing waits for it.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.0.crew.perform(|| reply.ok());
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let mounted = &self.0;
        mounted.crew.perform(|| {
            mounted.files.close(handle.0);
            reply.ok();
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let flushed = guarded(|| self.0.files.get(handle.0)?.device().flush());
        answer_aside!(self, reply, flushed, () => reply.ok());
    }

    fn opendir(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        answer!(self, reply, self.listed(inode.0), handle => reply.opened(FileHandle(handle), FopenFlags::empty()));
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.0
            .crew
            .perform(|| self.entries(inode, handle.0, offset, reply));
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let mounted = &self.0;
        mounted.crew.perform(|| {
            mounted.files.close(handle.0);
            reply.ok();
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.0.crew.perform(|| {
            let blocks = self.0.tree.volume_bytes() / u64::from(BLOCK);
            reply.statfs(blocks, 0, 0, 0, 0, BLOCK, 255, BLOCK);
        });
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer_aside!(self, reply, guarded(|| self.zeroed(handle.0, offset, length, mode)), () => reply.ok());
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        answer!(self, reply, guarded(|| self.sought(handle.0, offset, whence)), found => reply.offset(found));
    }

    // Names come and go by the service's commands, not by the file system's.

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        self.0.crew.perform(|| reply.error(Errno::EPERM));
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        self.0.crew.perform(|| reply.error(Errno::EPERM));
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        self.0.crew.perform(|| reply.error(Errno::EPERM));
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        self.0.crew.perform(|| reply.error(Errno::EPERM));
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        self.0.crew.perform(|| reply.error(Errno::EPERM));
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        self.0.crew.perform(|| reply.error(Errno::EPERM));
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        self.0.crew.perform(|| reply.error(Errno::EPERM));
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.0.crew.perform(|| reply.error(Errno::EPERM));
    }
}
