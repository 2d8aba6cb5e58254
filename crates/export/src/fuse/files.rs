//! What programs have open.
//!
//! An open file is a client of its export, so that a volume in use isn't taken away unasked. Where it is taken away by
//! force, the file stays open with nothing behind it.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::tree::{Entry, FileNode};
use crate::device::BlockDevice;
use crate::exports::{ConnectedClient, Export};

/// The most files and directories open at a time.
const OPEN_MAX: usize = 1 << 16;

/// One open file. It is used by the requests that run, and by the table.
#[derive(Debug)]
pub(super) struct OpenFile {
    client: ConnectedClient,
    node: Arc<FileNode>,
    inode: u64,
    writable: bool,
}

impl OpenFile {
    pub(super) fn device(&self) -> &dyn BlockDevice {
        &**self.client.device()
    }

    pub(super) fn node(&self) -> &FileNode {
        &self.node
    }

    /// The device, for a change.
    pub(super) fn changing(&self) -> io::Result<&dyn BlockDevice> {
        if self.writable {
            Ok(self.device())
        } else {
            Err(io::Error::from_raw_os_error(libc::EBADF))
        }
    }
}

#[derive(Debug)]
enum Open {
    File(Arc<OpenFile>),
    /// A file whose device was taken away.
    Gone,
    Directory(Arc<Vec<Entry>>),
}

#[derive(Debug, Default)]
struct Table {
    open: HashMap<u64, Open>,
    last: u64,
}

/// The open files and directories of a mount, by handle.
#[derive(Debug, Default)]
pub(super) struct Files {
    table: RwLock<Table>,
    /// One opening at a time: whether somebody else has the file open must stay true until it is open.
    opening: Mutex<()>,
}

fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

impl Files {
    fn insert(&self, open: Open) -> io::Result<u64> {
        let table = &mut *self.table.write();
        if table.open.len() >= OPEN_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        table.last += 1;
        table.open.insert(table.last, open);
        Ok(table.last)
    }

    /// Opens a file. Tells its handle, and whether it was open before.
    pub(super) fn open(
        &self,
        inode: u64,
        node: &Arc<FileNode>,
        writable: bool,
    ) -> io::Result<(u64, bool)> {
        let export = node.export().ok_or_else(stale)?;
        if writable && export.read_only() {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let _opening = self.opening.lock();
        let shared = self.any(|file| file.inode == inode);
        let file = OpenFile {
            client: export.connect().map_err(|_| stale())?,
            node: Arc::clone(node),
            inode,
            writable,
        };
        Ok((self.insert(Open::File(Arc::new(file)))?, shared))
    }

    /// Whether somebody may be writing to the file, perhaps through a mapping.
    pub(super) fn is_writable(&self, of: &OpenFile) -> bool {
        self.any(|file| file.inode == of.inode && file.writable)
    }

    fn any(&self, wanted: impl Fn(&OpenFile) -> bool) -> bool {
        let table = self.table.read();
        table.open.values().any(|open| match open {
            Open::File(file) => wanted(file),
            Open::Gone | Open::Directory(_) => false,
        })
    }

    /// The file that a handle means.
    pub(super) fn get(&self, handle: u64) -> io::Result<Arc<OpenFile>> {
        match self.table.read().open.get(&handle) {
            Some(Open::File(file)) => Ok(Arc::clone(file)),
            Some(Open::Gone) => Err(stale()),
            Some(Open::Directory(_)) | None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    pub(super) fn open_directory(&self, entries: Vec<Entry>) -> io::Result<u64> {
        self.insert(Open::Directory(Arc::new(entries)))
    }

    /// The entries of a directory as they were when it was opened.
    pub(super) fn directory(&self, handle: u64) -> io::Result<Arc<Vec<Entry>>> {
        match self.table.read().open.get(&handle) {
            Some(Open::Directory(entries)) => Ok(Arc::clone(entries)),
            _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    pub(super) fn close(&self, handle: u64) {
        let closed = self.table.write().open.remove(&handle);
        // Outside of the lock: a device may go with it.
        drop(closed);
    }

    /// Takes the device away from the open files of one export, or of all. Requests that run end; their client
    /// counts until then. Returns how many files there were.
    pub(super) fn disconnect(&self, chosen: impl Fn(&Export) -> bool) -> usize {
        let mut gone = Vec::new();
        for open in self.table.write().open.values_mut() {
            if matches!(open, Open::File(file) if chosen(file.client.export())) {
                gone.push(std::mem::replace(open, Open::Gone));
            }
        }
        gone.len()
    }
}
