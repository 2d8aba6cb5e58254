//! Which file a name is.
//!
//! The tree has three levels and is not stored: its entries are the exports of the moment. Stored is only which inode
//! number the kernel was told for which export, for as long as the kernel remembers it. A number means one export for
//! good: another volume of the same name gets another one, so that nothing cached of the first can show up in it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use crate::exports::{Export, Exports, SNAPSHOT_SIGN};

pub(super) const ROOT: u64 = 1;
const SNAPSHOTS: u64 = 2;
const FIRST: u64 = 16;
const SNAPSHOTS_NAME: &str = ".snapshots";
const SUFFIX: &str = ".img";

/// One file or directory that the kernel knows.
#[derive(Debug, Clone)]
pub(super) enum Node {
    /// The mounted directory.
    Root,
    /// `.snapshots`.
    Snapshots,
    /// `.snapshots/<volume>`.
    SnapshotsOf(String),
    /// An export.
    File(Arc<FileNode>),
}

/// An export's file.
#[derive(Debug)]
pub(super) struct FileNode {
    export: Weak<Export>,
    /// A scratch's export is there for as long as somebody knows its name, and holds nothing meanwhile.
    _scratch: Option<Arc<Export>>,
    /// Nanoseconds since 1970.
    modified: AtomicU64,
}

impl FileNode {
    fn new(export: &Arc<Export>) -> Self {
        let node = Self {
            export: Arc::downgrade(export),
            _scratch: export.is_scratch().then(|| Arc::clone(export)),
            modified: AtomicU64::new(0),
        };
        node.touch();
        node
    }

    /// The export, unless it is gone.
    pub(super) fn export(&self) -> Option<Arc<Export>> {
        self.export.upgrade()
    }

    /// Notes a change.
    pub(super) fn touch(&self) {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.modified.store(now, Ordering::Relaxed);
    }

    pub(super) fn modified(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.modified.load(Ordering::Relaxed))
    }
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) directory: bool,
}

#[derive(Debug)]
struct Known {
    node: Node,
    key: String,
    lookups: u64,
}

#[derive(Debug, Default)]
struct Inodes {
    known: HashMap<u64, Known>,
    by_key: HashMap<String, u64>,
    last: u64,
}

/// The names of the exports, and the numbers that the kernel knows them by.
pub(super) struct Tree {
    /// Taken away when the server stops, so that what is left of a busy mount holds nothing.
    exports: Mutex<Option<Arc<dyn Exports>>>,
    inodes: Mutex<Inodes>,
}

impl Tree {
    pub(super) fn new(exports: Arc<dyn Exports>) -> Self {
        Self {
            exports: Mutex::new(Some(exports)),
            inodes: Mutex::default(),
        }
    }

    /// From now on there are no entries.
    pub(super) fn close(&self) {
        self.exports.lock().take();
    }

    fn exports(&self) -> Option<Arc<dyn Exports>> {
        self.exports.lock().clone()
    }

    fn find(&self, name: &str) -> Option<Arc<Export>> {
        self.exports()?.find(name)
    }

    fn list(&self) -> Vec<Arc<Export>> {
        self.exports()
            .map_or_else(Vec::new, |exports| exports.list())
    }

    /// Bytes of all volumes.
    pub(super) fn volume_bytes(&self) -> u64 {
        let volumes = self.list();
        let volumes = volumes.iter().filter(|export| export.snapshot().is_none());
        volumes.map(|export| export.device().length()).sum()
    }

    /// What the kernel means by the number.
    pub(super) fn node(&self, inode: u64) -> Option<Node> {
        match inode {
            ROOT => Some(Node::Root),
            SNAPSHOTS => Some(Node::Snapshots),
            _ => {
                let inodes = self.inodes.lock();
                inodes.known.get(&inode).map(|known| known.node.clone())
            }
        }
    }

    /// The entry of that name; the kernel forgets it by [`Self::forget`].
    pub(super) fn look_up(&self, parent: u64, name: &str) -> Option<(u64, Node)> {
        match self.node(parent)? {
            Node::Root if name == SNAPSHOTS_NAME => Some((SNAPSHOTS, Node::Snapshots)),
            Node::Root => {
                let export = self.find(volume_of(name)?)?;
                Some(self.remember_file(&export))
            }
            Node::Snapshots => {
                let export = self.find(plain(name)?)?;
                let key = format!("{}{SNAPSHOT_SIGN}", export.name());
                let node = Node::SnapshotsOf(export.name().to_owned());
                let same = |known: &Node| matches!(known, Node::SnapshotsOf(_));
                Some(self.remember(key, same, || node))
            }
            Node::SnapshotsOf(volume) => {
                let snapshot = file_of(name)?;
                let export = self.find(&format!("{volume}{SNAPSHOT_SIGN}{snapshot}"))?;
                Some(self.remember_file(&export))
            }
            Node::File(_) => None,
        }
    }

    fn remember_file(&self, export: &Arc<Export>) -> (u64, Node) {
        let same = |known: &Node| match known {
            Node::File(file) => std::ptr::eq(file.export.as_ptr(), Arc::as_ptr(export)),
            _ => false,
        };
        self.remember(export.name().to_owned(), same, || {
            Node::File(Arc::new(FileNode::new(export)))
        })
    }

    fn remember(
        &self,
        key: String,
        same: impl Fn(&Node) -> bool,
        make: impl FnOnce() -> Node,
    ) -> (u64, Node) {
        let inodes = &mut *self.inodes.lock();
        if let Some(&inode) = inodes.by_key.get(&key)
            && let Some(known) = inodes.known.get_mut(&inode)
            && same(&known.node)
        {
            known.lookups += 1;
            return (inode, known.node.clone());
        }
        inodes.last = inodes.last.max(FIRST) + 1;
        let (inode, node) = (inodes.last, make());
        inodes.by_key.insert(key.clone(), inode);
        inodes.known.insert(
            inode,
            Known {
                node: node.clone(),
                key,
                lookups: 1,
            },
        );
        (inode, node)
    }

    /// The kernel no longer remembers so many lookups of the number.
    pub(super) fn forget(&self, inode: u64, lookups: u64) {
        let inodes = &mut *self.inodes.lock();
        let Some(known) = inodes.known.get_mut(&inode) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0
            && let Some(known) = inodes.known.remove(&inode)
            && inodes.by_key.get(&known.key) == Some(&inode)
        {
            inodes.by_key.remove(&known.key);
        }
    }

    /// What a directory has now; `None` where the number is no directory's.
    pub(super) fn entries(&self, inode: u64) -> Option<Vec<Entry>> {
        let file = |name: &str| Entry {
            name: format!("{name}{SUFFIX}"),
            directory: false,
        };
        let directory = |name: &str| Entry {
            name: name.to_owned(),
            directory: true,
        };
        let node = self.node(inode)?;
        let list = self.list();
        let volumes = list
            .iter()
            .filter(|export| export.snapshot().is_none() && plain(export.name()).is_some());
        let mut entries = vec![directory("."), directory("..")];
        match node {
            Node::Root => {
                entries.push(directory(SNAPSHOTS_NAME));
                entries.extend(volumes.map(|export| file(export.name())));
            }
            Node::Snapshots => entries.extend(volumes.map(|export| directory(export.name()))),
            Node::SnapshotsOf(of) => entries.extend(
                list.iter()
                    .filter_map(|export| export.snapshot())
                    .filter(|(volume, _)| *volume == of)
                    .map(|(_, snapshot)| file(snapshot)),
            ),
            Node::File(_) => return None,
        }
        Some(entries)
    }
}

/// A name that is a volume's: not empty (that asks for a default) and no snapshot's.
fn plain(name: &str) -> Option<&str> {
    (!name.is_empty() && !name.contains([SNAPSHOT_SIGN, '/'])).then_some(name)
}

fn file_of(name: &str) -> Option<&str> {
    name.strip_suffix(SUFFIX).filter(|name| !name.is_empty())
}

fn volume_of(name: &str) -> Option<&str> {
    plain(file_of(name)?)
}
