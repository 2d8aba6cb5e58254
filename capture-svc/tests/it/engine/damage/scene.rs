//! A volume whose state has everything, left in one of three ways; what it is held to when it was damaged.

use std::collections::{BTreeMap, BTreeSet};

use capture_core::engine::damage::Damage;

use super::super::*;

/// Two regions of the intent map.
pub(super) const BLOCKS: u64 = 300;
/// The blocks that are written, and some that are not.
const LOOKED_AT: [u64; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 258, 259, 260, 299];

/// How the state was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Closed,
    Killed,
    PowerLost,
}

/// First bytes of the blocks that are looked at.
type Image = BTreeMap<u64, u8>;

/// Another volume has other bytes.
fn image(id: VolumeId, written: &[(u64, u8)]) -> Image {
    let mut image: Image = LOOKED_AT.into_iter().map(|block| (block, 0)).collect();
    let bytes = written.iter().copied();
    image.extend(bytes.map(|(block, byte)| (block, byte_of(id, byte))));
    image
}

fn byte_of(id: VolumeId, byte: u8) -> u8 {
    id.as_bytes()[0] + byte
}

fn differing(one: &Image, other: &Image) -> BTreeSet<u64> {
    let blocks = LOOKED_AT.into_iter();
    blocks.filter(|block| one[block] != other[block]).collect()
}

/// A volume and its state, which can be put back as it was left.
pub(super) struct Scene {
    pub(super) setup: Setup,
    pub(super) left: Left,
    /// By name, within the state's directory.
    pub(super) files: BTreeMap<String, Vec<u8>>,
    pub(super) base: Image,
    pub(super) now: Image,
    /// By number.
    pub(super) snapshots: BTreeMap<u64, (String, Image)>,
    pub(super) interval: (u64, Image),
    /// What an opening of the undamaged state comes to.
    pub(super) sound: Option<Found>,
    /// What it leaves of the files.
    pub(super) opened: BTreeMap<String, Vec<u8>>,
}

/// What an opening came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) trust: Trust,
    pub(super) damage: Vec<Damage>,
    pub(super) epoch: u64,
    pub(super) tracked: BlockSet,
    pub(super) snapshots: Vec<u64>,
    pub(super) interval: Option<u64>,
    /// Before-images that could not be read.
    pub(super) refused: u64,
    /// Files that were found damaged afterwards.
    pub(super) later: u64,
}

/// In memory where there is such a place: a hundred thousand openings write as many files ten times.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// What is done to a volume before its state is left; gives the cut of its open interval.
fn live(setup: &Setup, close: bool) -> u64 {
    let engine = setup.create();
    let writes = |blocks: &[(u64, u8)]| {
        for (block, byte) in blocks {
            write(&engine, *block, byte_of(setup.id, *byte));
        }
    };
    writes(&[(1, 1), (2, 1), (258, 1)]);
    let interval = engine.begin_interval().unwrap();
    engine.commit_interval(interval.epoch).unwrap();
    drop(interval);
    writes(&[(3, 2)]);
    engine.create_snapshot("one", 1).unwrap();
    writes(&[(1, 3), (4, 3)]);
    engine.create_snapshot("two", 2).unwrap();
    writes(&[(1, 4), (3, 4)]);
    let interval = engine.begin_interval().unwrap();
    writes(&[(2, 5), (5, 5)]);
    engine.doubt(&set(&[(7, 1)])).unwrap();
    writes(&[(3, 6), (259, 6)]);
    if close {
        engine.close().unwrap();
    }
    interval.epoch.get()
}

impl Scene {
    pub(super) fn new(left: Left, id: VolumeId) -> Self {
        let setup = Setup {
            dir: scratch(),
            blocks: BLOCKS,
            id,
            options: EngineOptions {
                spool_bytes_max: 8 * BLOCK,
                spool_index_memory_max: 40 * 12,
                ..EngineOptions::default()
            },
        };
        let file = File::create(setup.file()).unwrap();
        file.set_len(BLOCKS * BLOCK).unwrap();
        let cut = live(&setup, left == Left::Closed);
        if left == Left::PowerLost {
            super::super::crash::pretend_reboot(&setup);
        }
        let (tracking, kept) = (
            setup.state().join("tracking"),
            setup.dir.path().join("kept"),
        );
        fs::hard_link(tracking, kept).unwrap();
        let image = |written: &[(u64, u8)]| image(id, written);
        let one = image(&[(1, 1), (2, 1), (258, 1), (3, 2)]);
        let two = image(&[(1, 3), (2, 1), (258, 1), (3, 2), (4, 3)]);
        let snapshots = [(1, ("one".to_owned(), one)), (2, ("two".to_owned(), two))];
        let mut scene = Self {
            left,
            files: files_of(&setup.state()),
            base: image(&[(1, 1), (2, 1), (258, 1)]),
            now: image(&[(1, 4), (2, 5), (3, 6), (4, 3), (5, 5), (258, 1), (259, 6)]),
            snapshots: snapshots.into(),
            interval: (cut, image(&[(1, 4), (2, 1), (3, 4), (4, 3), (258, 1)])),
            sound: None,
            opened: BTreeMap::new(),
            setup,
        };
        scene.sound = Some(scene.open().unwrap());
        scene.opened = files_of(&scene.setup.state());
        scene.is_as_it_was_left();
        scene
    }

    /// Without damage nothing is lost, and everything that can be damaged is there.
    fn is_as_it_was_left(&self) {
        let sound = self.sound.as_ref().unwrap();
        assert_eq!(sound.damage, []);
        let (trust, cuts) = match self.left {
            Left::Closed => (Trust::Clean, true),
            Left::Killed => (Trust::ProcessCrash, true),
            Left::PowerLost => {
                let doubtful = tidemark_block::BlockCount::new(BLOCKS);
                (Trust::PowerLoss { doubtful }, false)
            }
        };
        assert_eq!(sound.trust, trust);
        assert_eq!(sound.snapshots, if cuts { vec![1, 2] } else { vec![] });
        assert_eq!(sound.interval, cuts.then_some(self.interval.0));
        let names: Vec<_> = self.files.keys().map(String::as_str).collect();
        let expected = [
            "carry",
            "changes/4",
            "changes/5",
            "dirty.0",
            "dirty.1",
            "identity",
            "intent",
            "interval",
            "snapshots",
            "spool.data",
            "spool.slots",
            "tracking",
        ];
        assert_eq!(names, expected);
        let dirty = |name: &str| self.files[name][4096..].iter().any(|byte| *byte != 0);
        assert!(dirty("dirty.0") || dirty("dirty.1"));
    }

    /// Puts every file back as it was left.
    pub(super) fn put_back(&self) {
        let (state, kept) = (self.setup.state(), self.setup.dir.path().join("kept"));
        for name in fs::read_dir(state.join("changes")).into_iter().flatten() {
            let name = name.unwrap().file_name().into_string().unwrap();
            if !self.files.contains_key(&format!("changes/{name}")) {
                fs::remove_file(state.join("changes").join(name)).unwrap();
            }
        }
        let tracking = state.join("tracking");
        let inode = |path: &Path| fs::metadata(path).ok().map(|found| found.ino());
        if inode(&tracking) != inode(&kept) {
            let _ = fs::remove_file(&tracking);
            fs::hard_link(&kept, &tracking).unwrap();
        }
        for (name, bytes) in &self.files {
            let path = state.join(name);
            let is_written = !name.starts_with("changes") && name != "spool.data";
            let length = || fs::metadata(&path).ok().map(|found| found.len());
            if is_written || length() != Some(bytes.len() as u64) {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                let mut options = File::options();
                let file = options
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path)
                    .unwrap();
                file.write_all_at(bytes, 0).unwrap();
                file.set_len(bytes.len() as u64).unwrap();
            }
        }
    }

    pub(super) fn put(&self, name: &str, bytes: &[u8]) {
        fs::write(self.setup.state().join(name), bytes).unwrap();
    }

    /// Makes a file one that opens, and of which no byte can be read: this process has nothing at its first address.
    pub(super) fn make_unreadable(&self, name: &str) -> PathBuf {
        let path = self.setup.state().join(name);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap();
        let told = fs::read(&path).unwrap_err();
        assert_eq!(told.raw_os_error(), Some(libc::EIO));
        path
    }

    /// Opens the state as it is, and holds it to what it was.
    pub(super) fn open(&self) -> Result<Found, EngineError> {
        let (engine, trust) = self.setup.try_open()?;
        Ok(self.hold(&engine, trust))
    }

    /// Holds an opened volume to what it was.
    pub(super) fn hold(&self, engine: &Arc<Engine>, trust: Trust) -> Found {
        let damage = engine.damage_at_opening().to_vec();
        let tracked = engine.tracked(extent(0, BLOCKS));
        for block in differing(&self.base, &self.now) {
            let block = BlockIndex::new(block);
            assert!(
                tracked.contains(block),
                "block {block} is missed: {damage:?}"
            );
        }
        assert!(
            engine.epoch().get() > self.interval.0 + 1,
            "epochs never come back"
        );
        self.changes_are_right(engine);
        let readers = self.readers(engine);
        let read = readers
            .iter()
            .map(|(reader, image)| right_or_refused(reader, image, &LOOKED_AT));
        let refused = read.sum();
        Found {
            trust,
            epoch: engine.epoch().get(),
            tracked,
            snapshots: engine.list_snapshots().iter().map(|s| s.id.0).collect(),
            interval: engine.open_interval().map(|open| open.epoch.get()),
            refused,
            later: engine.stats().damaged - damage.len() as u64,
            damage,
        }
    }

    /// What is open to be read, and what it has to show.
    pub(super) fn readers(&self, engine: &Arc<Engine>) -> Vec<(SnapshotReader, &Image)> {
        let mut readers = Vec::new();
        for snapshot in engine.list_snapshots() {
            let (label, image) = &self.snapshots[&snapshot.id.0];
            assert_eq!((&snapshot.label, snapshot.time_ms), (label, snapshot.id.0));
            readers.push((engine.open_snapshot(snapshot.id).unwrap(), image));
        }
        if let Some(open) = engine.open_interval() {
            let (cut, image) = &self.interval;
            assert_eq!(open.epoch.get(), *cut);
            for block in differing(&self.base, image) {
                let block = BlockIndex::new(block);
                assert!(open.changed.contains(block), "{block} has changed");
            }
            readers.push((open.reader, image));
        }
        readers
    }

    /// What changed between the snapshots is known.
    fn changes_are_right(&self, engine: &Engine) {
        if let [one, two] = &engine.list_snapshots()[..] {
            let changed = engine.changed_between(one.id, two.id).unwrap();
            let images = [one, two].map(|snapshot| &self.snapshots[&snapshot.id.0].1);
            for block in differing(images[0], images[1]) {
                let block = BlockIndex::new(block);
                assert!(changed.contains(block), "{block} has changed");
            }
        }
    }

    /// Opens a damaged state: the damage is named, or nothing has come of it.
    pub(super) fn judge(&self, name: &str) -> Verdict {
        let found = match self.open() {
            Ok(found) => found,
            Err(error) => {
                let (told, file) = (error.to_string(), self.setup.state().join(name));
                let damaged = told.contains(&format!("{} is damaged", file.display()))
                    && told.contains("use `tidemark volume ");
                let foreign =
                    told.contains("belongs to volume") && told.contains("correct the path");
                assert!(name == "identity" && (damaged || foreign), "{told}");
                return Verdict::Refused;
            }
        };
        let sound = self.sound.as_ref().unwrap();
        let named = found
            .damage
            .iter()
            .any(|damage| damage.file.to_string() == name)
            || found.later > 0 && name.starts_with("changes/")
            || found.refused > 0 && name == "spool.data";
        match &found.trust {
            Trust::Everything { reason } => {
                assert!(
                    named && reason.contains(&format!("file {name} ")),
                    "{found:?}"
                );
                assert_eq!(found.tracked.len().get(), BLOCKS);
                assert_eq!((found.snapshots.len(), found.interval), (0, None));
                Verdict::Everything
            }
            _ if named => {
                assert!(covers(&found.tracked, &sound.tracked), "{found:?}");
                Verdict::Named
            }
            _ => {
                assert_eq!(found, *sound, "damage that nobody is told of");
                let files = files_of(&self.setup.state());
                let same = |(file, bytes): (&String, &Vec<u8>)| {
                    file == name || self.opened.get(file) == Some(bytes)
                };
                assert!(files.iter().all(same), "it has made a difference");
                Verdict::Nothing
            }
        }
    }
}

pub(super) fn covers(one: &BlockSet, other: &BlockSet) -> bool {
    let mut both = one.clone();
    both.union_with(other);
    both == *one
}

/// What became of a damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// The volume is not served.
    Refused,
    /// Every block is compared.
    Everything,
    /// It was named and made good, or costs the snapshots.
    Named,
    /// It is in what nobody reads.
    Nothing,
}

/// Each block is the image's, or its before-image is told to be damaged; how many are.
pub(super) fn right_or_refused<'a>(
    reader: &SnapshotReader,
    image: &Image,
    blocks: impl IntoIterator<Item = &'a u64>,
) -> u64 {
    let mut refused = 0;
    for block in blocks {
        let mut bytes = [0; 4096];
        match reader.read_blocks(extent(*block, 1), &mut bytes) {
            Ok(()) => assert!(
                bytes == [image[block]; 4096],
                "block {block} is {}",
                bytes[0]
            ),
            Err(EngineError::SpoolDamaged { block: told }) => {
                assert_eq!(told, *block);
                refused += 1;
            }
            Err(error) => panic!("block {block}: {error}"),
        }
    }
    refused
}

pub(super) fn files_of(state: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for dir in ["", "changes/"] {
        let Ok(entries) = fs::read_dir(state.join(dir)) else {
            continue;
        };
        for entry in entries {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let path = state.join(dir).join(&name);
            if path.is_file() && name != "lock" {
                files.insert(format!("{dir}{name}"), fs::read(path).unwrap());
            }
        }
    }
    files
}

/// Says which damage it was when a test failed.
pub(super) struct Shown(pub(super) String);

impl Drop for Shown {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed at {}", self.0);
        }
    }
}
