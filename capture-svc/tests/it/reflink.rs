//! The engine `reflink` on real filesystems: writers of every kind against a model.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
};

use capture_svc::engine::{
    EngineError, EngineOptions, Trust,
    reflink::{CloneReader, IntervalCut, Reflink},
};
use rustix::fs::{FallocateFlags, fallocate};
use tidemark_block::{BlockCount, BlockIndex, BlockSet, BlockSize, Extent, Geometry, VolumeId};

use crate::disk::{CLONING, Disk};

#[path = "reflink/service.rs"]
mod service;

const BLOCK: usize = 4096;
const BLOCKS: usize = 2048;

/// Numbers that look random and come again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }
}

struct Scene {
    // Before the disk, so that it is closed first.
    engine: Option<Arc<Reflink>>,
    options: EngineOptions,
    state: tempfile::TempDir,
    disk: Disk,
}

const VOLUME: VolumeId = VolumeId::from_bytes([9; 16]);

fn geometry() -> Geometry {
    Geometry::new((BLOCKS * BLOCK) as u64, BlockSize::MIN).unwrap()
}

fn new_file(path: &PathBuf) {
    let file = File::create(path).unwrap();
    file.set_len(geometry().length()).unwrap();
}

impl Scene {
    fn new(kind: &str) -> Option<Self> {
        let disk = Disk::new(kind, 512)?;
        let mut scene = Self {
            engine: None,
            options: EngineOptions::default(),
            state: tempfile::tempdir().unwrap(),
            disk,
        };
        new_file(&scene.file());
        scene.engine = Some(scene.create().unwrap());
        Some(scene)
    }

    fn create(&self) -> Result<Arc<Reflink>, EngineError> {
        let options = self.options.clone();
        Reflink::create(self.state.path(), VOLUME, &self.file(), geometry(), options)
    }

    fn file(&self) -> PathBuf {
        self.disk.path("data.img")
    }

    fn engine(&self) -> &Arc<Reflink> {
        self.engine.as_ref().unwrap()
    }

    /// As after a kill: nothing was closed.
    fn open_again(&mut self) -> Trust {
        self.engine = None;
        let (engine, trust) = self.try_open().unwrap();
        self.engine = Some(engine);
        trust
    }

    fn try_open(&self) -> Result<(Arc<Reflink>, Trust), EngineError> {
        let options = self.options.clone();
        Reflink::open(self.state.path(), VOLUME, &self.file(), geometry(), options)
    }

    fn clone_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.disk.clones().unwrap()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    /// Ships the next interval: what it was, on `image`, that of the base.
    fn ship(&self, image: &mut [u8]) -> IntervalCut {
        let cut = self.engine().begin_interval().unwrap();
        apply(image, &cut);
        self.engine().commit_interval(cut.epoch).unwrap();
        cut
    }
}

fn read(reader: &CloneReader, extent: Extent) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(geometry().bytes(extent.count())).unwrap()];
    reader.read_blocks(extent, &mut bytes).unwrap();
    bytes
}

fn whole(reader: &CloneReader) -> Vec<u8> {
    read(reader, geometry().all())
}

/// Makes the image of the base that of the cut, by what the interval holds.
fn apply(image: &mut [u8], cut: &IntervalCut) {
    apply_blocks(image, &cut.changed, &cut.reader);
}

fn apply_blocks(image: &mut [u8], changed: &BlockSet, reader: &CloneReader) {
    for extent in changed.extents() {
        let at = usize::try_from(extent.start().get()).unwrap() * BLOCK;
        let bytes = read(reader, extent);
        image[at..at + bytes.len()].copy_from_slice(&bytes);
        // What is said to be zero is.
        let data = reader.data_extents(extent).unwrap();
        for block in extent.iter().filter(|block| !data.contains(*block)) {
            let at = usize::try_from(block.get()).unwrap() * BLOCK;
            assert!(image[at..at + BLOCK].iter().all(|byte| *byte == 0));
        }
    }
}

/// Memory that O_DIRECT takes.
fn aligned(bytes: &[u8]) -> memmap2::MmapMut {
    let mut map = memmap2::MmapMut::map_anon(bytes.len()).unwrap();
    map.copy_from_slice(bytes);
    map
}

/// A file with each way to write to it, and what it must hold.
struct Writer {
    buffered: File,
    direct: File,
    map: memmap2::MmapMut,
    model: Vec<u8>,
    random: Random,
}

impl Writer {
    #[allow(unsafe_code)]
    fn new(path: &PathBuf, seed: u64) -> Self {
        let open = || OpenOptions::new().read(true).write(true).clone();
        let buffered = open().open(path).unwrap();
        let direct = open().custom_flags(libc::O_DIRECT).open(path).unwrap();
        // SAFETY: the file is not cut short while it is mapped, and nobody holds references into the map.
        let map = unsafe { memmap2::MmapMut::map_mut(&buffered).unwrap() };
        Self {
            buffered,
            direct,
            map,
            model: vec![0; BLOCKS * BLOCK],
            random: Random(seed),
        }
    }

    fn one(&mut self) {
        let count = 1 + self.random.below(8);
        let block = self.random.below(BLOCKS - count);
        let (at, length) = (block * BLOCK, count * BLOCK);
        let byte = u8::try_from(1 + self.random.below(255)).unwrap();
        let what = self.random.below(10);
        let (offset, range) = (at as u64, at..at + length);
        let zero = |flags: FallocateFlags| {
            fallocate(&self.buffered, flags, offset, length as u64).unwrap();
        };
        match what {
            // Any bytes, across blocks.
            0..3 => {
                let (at, length) = (at + 100, length - 50);
                self.model[at..at + length].fill(byte);
                self.buffered
                    .write_all_at(&self.model[at..at + length], at as u64)
                    .unwrap();
            }
            3..5 => {
                self.model[range.clone()].fill(byte);
                let bytes = aligned(&self.model[range]);
                self.direct.write_all_at(&bytes, offset).unwrap();
            }
            5..8 => {
                let at = at + self.random.below(BLOCK);
                self.model[at] = byte;
                self.map[at] = byte;
            }
            8 => {
                self.model[range].fill(0);
                zero(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE);
            }
            _ => {
                // Space that is allocated and not written.
                self.model[range].fill(0);
                zero(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE);
            }
        }
    }
}

#[test]
fn each_interval_makes_the_image_of_its_cut_whoever_writes_how() {
    for kind in CLONING {
        let Some(mut scene) = Scene::new(kind) else {
            return;
        };
        let seed = 0x7a31 + kind.len() as u64;
        let mut writer = Writer::new(&scene.file(), seed);
        let mut base = vec![0; BLOCKS * BLOCK];
        let mut kept: Vec<(u64, Vec<u8>)> = Vec::new();
        for round in 0..60 {
            for _ in 0..writer.random.below(40) {
                writer.one();
            }
            let cut = scene.engine().begin_interval().unwrap();
            let expected = writer.model.clone();
            for _ in 0..5 {
                writer.one();
            }
            let cut = match writer.random.below(4) {
                // It outlives a kill.
                0 => {
                    drop(cut);
                    assert_eq!(scene.open_again(), Trust::Clones { stores_kept: true });
                    scene.engine().open_interval().unwrap()
                }
                _ => cut,
            };
            let mut image = base.clone();
            apply(&mut image, &cut);
            assert!(image == expected, "{kind}, seed {seed:#x}, round {round}");
            assert!(whole(&cut.reader) == expected);
            match writer.random.below(4) {
                0 => scene.engine().give_up_interval().unwrap(),
                _ => {
                    scene.engine().commit_interval(cut.epoch).unwrap();
                    base = expected;
                }
            }
            if writer.random.below(5) == 0 {
                let taken = scene.engine().create_snapshot("x", round).unwrap();
                kept.push((taken.id.0, writer.model.clone()));
            }
            if writer.random.below(9) == 0 {
                scene.open_again();
            }
        }
        snapshots_are_as_they_were(&mut scene, &kept);
    }
}

fn snapshots_are_as_they_were(scene: &mut Scene, kept: &[(u64, Vec<u8>)]) {
    scene.open_again();
    let listed = scene.engine().list_snapshots();
    assert_eq!(
        listed.iter().map(|info| info.id.0).collect::<Vec<_>>(),
        kept.iter().map(|(id, _)| *id).collect::<Vec<_>>()
    );
    assert!(kept.len() > 3);
    let mut image = vec![0; BLOCKS * BLOCK];
    let mut older = None;
    for (info, (_, expected)) in listed.iter().zip(kept) {
        let reader = scene.engine().open_snapshot(info.id).unwrap();
        assert!(whole(&reader) == *expected);
        let changed = match older {
            None => std::iter::once(geometry().all()).collect(),
            Some(older) => scene.engine().changed_between(older, info.id).unwrap(),
        };
        apply_blocks(&mut image, &changed, &reader);
        assert!(image == *expected, "by what changed since the one before");
        older = Some(info.id);
    }
    for info in listed {
        scene.engine().delete_snapshot(info.id).unwrap();
    }
    scene.ship(&mut image);
    assert_eq!(scene.clone_names().len(), 1, "only the base's is left");
}

#[test]
fn nothing_but_what_was_written_is_in_an_interval() {
    for kind in CLONING {
        let Some(scene) = Scene::new(kind) else {
            return;
        };
        let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
        file.write_all_at(&vec![7; BLOCKS * BLOCK], 0).unwrap();
        let mut image = vec![0; BLOCKS * BLOCK];
        assert_eq!(scene.ship(&mut image).changed.len().get(), BLOCKS as u64);
        assert!(scene.ship(&mut image).changed.is_empty(), "{kind}");
        file.write_all_at(&[8; BLOCK], 5 * BLOCK as u64).unwrap();
        let found = scene.ship(&mut image);
        let five = Extent::new(BlockIndex::new(5), BlockCount::new(1));
        assert_eq!(*found.changed, std::iter::once(five).collect());
        assert!(scene.engine().stats().extents >= 1);
        assert!(!scene.engine().stats().last_flip.is_zero());
    }
}

#[test]
fn holes_of_a_clone_are_found_within_any_range_and_nothing_else_is() {
    for kind in CLONING {
        let Some(scene) = Scene::new(kind) else {
            return;
        };
        let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
        // Large pieces, so that no hint of the file's fills the holes between them.
        let pieces = [(0, 256), (512, 256), (1280, 768)];
        for (start, count) in pieces {
            let bytes = vec![7; count * BLOCK];
            file.write_all_at(&bytes, (start * BLOCK) as u64).unwrap();
        }
        // Space that is reserved and was never written to is no data.
        fallocate(
            &file,
            FallocateFlags::empty(),
            768 * BLOCK as u64,
            256 * BLOCK as u64,
        )
        .unwrap();
        let cut = scene.engine().begin_interval().unwrap();
        let is_data = |block: usize| pieces.iter().any(|(s, n)| (*s..s + n).contains(&block));
        for (start, end) in [(0, BLOCKS), (1, 700), (255, 257), (300, 400), (511, 1281)] {
            let extent =
                Extent::between(BlockIndex::new(start as u64), BlockIndex::new(end as u64));
            let found = cut.reader.data_extents(extent).unwrap();
            for block in 0..BLOCKS {
                let expected = (start..end).contains(&block) && is_data(block);
                let data = found.contains(BlockIndex::new(block as u64));
                assert_eq!(data, expected, "{kind}: block {block} of {start}..{end}");
            }
        }
    }
}

#[test]
fn an_empty_file_is_kept_in_few_extents() {
    let Some(scene) = Scene::new("xfs") else {
        return;
    };
    let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
    // Backwards, each block on the disk before the next: without a hint these are as many extents.
    for block in (0..256).rev() {
        file.write_all_at(&[1; BLOCK], (block * BLOCK) as u64)
            .unwrap();
        file.sync_data().unwrap();
    }
    let mut image = vec![0; BLOCKS * BLOCK];
    scene.ship(&mut image);
    assert!(image == fs::read(scene.file()).unwrap());
    let extents = scene.engine().stats().extents;
    assert!(extents <= 8, "{extents}");
}

#[test]
fn a_clone_is_a_prefix_of_what_writers_wrote_while_it_was_made() {
    for kind in CLONING {
        let Some(scene) = Scene::new(kind) else {
            return;
        };
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let (stop, path) = (&stop, scene.file());
            // Each round writes the next number into all blocks of its half, in order, by its own means.
            scope.spawn(move || {
                let file = OpenOptions::new().write(true).open(path).unwrap();
                for number in 1_u64.. {
                    for block in 0..256 {
                        let bytes = number.to_le_bytes();
                        file.write_all_at(&bytes, (block * BLOCK) as u64).unwrap();
                        if stop.load(SeqCst) {
                            return;
                        }
                    }
                }
            });
            let path = scene.file();
            scope.spawn(move || {
                let mut writer = Writer::new(&path, 1);
                for number in 1_u64.. {
                    for block in 256..512 {
                        let at = block * BLOCK;
                        writer.map[at..at + 8].copy_from_slice(&number.to_le_bytes());
                        if stop.load(SeqCst) {
                            return;
                        }
                    }
                }
            });
            let mut image = vec![0; BLOCKS * BLOCK];
            for _ in 0..30 {
                let cut = scene.ship(&mut image);
                assert!(image == whole(&cut.reader), "{kind}");
                for half in [0..256, 256..512] {
                    let number = |block: usize| {
                        let at = block * BLOCK;
                        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
                    };
                    let numbers: Vec<_> = half.map(number).collect();
                    let (first, last) = (numbers[0], numbers[255]);
                    assert!(numbers.is_sorted_by(|a, b| a >= b), "{kind} {numbers:?}");
                    assert!(first - last <= 1, "{kind} {first} {last}");
                }
            }
            stop.store(true, SeqCst);
        });
    }
}

#[test]
fn what_a_crash_leaves_between_clone_and_record_is_removed_and_costs_nothing() {
    let Some(mut scene) = Scene::new("xfs") else {
        return;
    };
    let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
    let mut image = vec![0; BLOCKS * BLOCK];
    file.write_all_at(&[1; BLOCK], 0).unwrap();
    scene.ship(&mut image);
    let record = scene.state.path().join("reflink");
    let before = fs::read(&record).unwrap();

    // The clone was made, its record was not written.
    file.write_all_at(&[2; BLOCK], 0).unwrap();
    drop(scene.engine().begin_interval().unwrap());
    assert_eq!(scene.clone_names(), ["1.clone", "2.clone"]);
    fs::write(&record, &before).unwrap();
    assert_eq!(scene.open_again(), Trust::Clones { stores_kept: true });
    assert_eq!(scene.clone_names(), ["1.clone"]);
    assert!(scene.engine().open_interval().is_none());
    let cut = scene.engine().begin_interval().unwrap();
    assert_eq!(cut.changed.len().get(), 1);

    // It was given up, or committed, and the clone that is not needed any more was not removed.
    let open = fs::read(&record).unwrap();
    let base = scene.disk.clones().unwrap().join("1.clone");
    let held = File::open(&base).unwrap();
    scene.engine().commit_interval(cut.epoch).unwrap();
    drop(cut);
    assert_eq!(scene.clone_names(), ["2.clone"]);
    fs::copy(scene.disk.clones().unwrap().join("2.clone"), &base).unwrap();
    scene.open_again();
    assert_eq!(scene.clone_names(), ["2.clone"]);
    drop(held);

    // A record from before, put back: its base is gone.
    fs::write(&record, open).unwrap();
    let Trust::Everything { reason } = scene.open_again() else {
        panic!("the base is gone");
    };
    assert!(
        reason.starts_with("the clone of the base, 1, is missing"),
        "{reason}"
    );
    scene.engine().give_up_interval().unwrap();
    let cut = scene.engine().begin_interval().unwrap();
    assert_eq!(cut.changed.len().get(), BLOCKS as u64);
}

#[test]
fn a_clone_that_somebody_wrote_to_is_not_trusted() {
    let Some(mut scene) = Scene::new("btrfs") else {
        return;
    };
    let mut image = vec![0; BLOCKS * BLOCK];
    scene.ship(&mut image);
    scene.engine().create_snapshot("kept", 0).unwrap();
    let path = scene.disk.clones().unwrap().join("1.clone");
    let clone = OpenOptions::new().write(true).open(path).unwrap();
    clone.write_all_at(&[1; 10], 0).unwrap();
    assert!(matches!(scene.open_again(), Trust::Everything { .. }));
    assert_eq!(scene.engine().list_snapshots().len(), 1);
    let cut = scene.ship(&mut image);
    assert_eq!(cut.changed.len().get(), BLOCKS as u64);
    let path = scene.disk.clones().unwrap().join("2.clone");
    let clone = OpenOptions::new().write(true).open(path).unwrap();
    clone.write_all_at(&[1; 10], 0).unwrap();
    assert!(matches!(scene.open_again(), Trust::Everything { .. }));
    assert!(scene.engine().list_snapshots().is_empty());
    assert!(
        scene.ship(&mut image).changed.is_empty(),
        "only the snapshot is lost"
    );
}

#[test]
fn after_a_loss_of_power_clones_are_trusted_and_what_the_file_lost_is_in_the_next_interval() {
    use capture_core::reflink::state::State;
    let Some(mut scene) = Scene::new("xfs") else {
        return;
    };
    let path = scene.file();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut image = vec![0; BLOCKS * BLOCK];
    file.write_all_at(&[1; BLOCK], 0).unwrap();
    scene.ship(&mut image);
    let before = File::create(scene.disk.path("before")).unwrap();
    rustix::fs::ioctl_ficlone(&before, &file).unwrap();
    file.write_all_at(&[2; 2 * BLOCK], 0).unwrap();
    scene.ship(&mut image);
    let taken = scene.engine().create_snapshot("kept", 0).unwrap();
    let cut = scene.engine().begin_interval().unwrap().epoch;
    scene.engine = None;
    // The machine starts again, and the file is what was synced before the last two writes.
    let before = File::open(scene.disk.path("before")).unwrap();
    rustix::fs::ioctl_ficlone(&file, before).unwrap();
    let record = scene.state.path().join("reflink");
    let mut state = State::decode(&fs::read(&record).unwrap()).unwrap();
    state.boot[0] ^= 1;
    fs::write(&record, state.encode()).unwrap();
    assert_eq!(scene.open_again(), Trust::Clones { stores_kept: false });
    assert_eq!(scene.engine().open_interval().unwrap().epoch, cut);
    let kept = scene.engine().open_snapshot(taken.id).unwrap();
    assert!(whole(&kept) == image);
    scene.engine().commit_interval(cut).unwrap();
    let found = scene.ship(&mut image);
    assert_eq!(found.changed.len().get(), 2);
    assert!(image == fs::read(&path).unwrap());
}

#[test]
fn a_damaged_record_of_the_clones_is_refused_until_the_volume_is_readopted() {
    for gone in [false, true] {
        let Some(mut scene) = Scene::new("xfs") else {
            return;
        };
        let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
        let mut image = vec![0; BLOCKS * BLOCK];
        file.write_all_at(&[1; BLOCK], 0).unwrap();
        scene.ship(&mut image);
        scene.engine().create_snapshot("kept", 0).unwrap();
        scene.engine = None;
        let record = scene.state.path().join("reflink");
        if gone {
            fs::remove_file(&record).unwrap();
        } else {
            let mut bytes = fs::read(&record).unwrap();
            bytes[100] ^= 4;
            fs::write(&record, bytes).unwrap();
        }
        let refused = scene.try_open().unwrap_err();
        assert!(
            matches!(refused, EngineError::StateDamaged { .. }),
            "{refused}"
        );
        assert_eq!(scene.clone_names().len(), 2, "nothing was touched");
        file.write_all_at(&[2; BLOCK], 40_960).unwrap();
        let (state, path) = (scene.state.path(), scene.file());
        let options = scene.options.clone();
        let (engine, trust) = Reflink::readopt(state, VOLUME, &path, geometry(), options).unwrap();
        assert!(matches!(trust, Trust::Everything { .. }));
        scene.engine = Some(engine);
        assert!(scene.engine().list_snapshots().is_empty());
        let cut = scene.ship(&mut image);
        assert_eq!(cut.changed.len().get(), BLOCKS as u64);
        assert!(image == fs::read(scene.file()).unwrap());
    }
}

#[test]
fn a_file_that_is_cut_short_or_replaced_is_noticed_and_taken_again_when_it_is_back() {
    let Some(mut scene) = Scene::new("xfs") else {
        return;
    };
    let path = scene.file();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.write_all_at(&vec![3; BLOCKS * BLOCK], 0).unwrap();
    let mut image = vec![0; BLOCKS * BLOCK];
    scene.ship(&mut image);

    file.set_len(BLOCK as u64).unwrap();
    let short = scene.engine().begin_interval().unwrap_err();
    assert!(matches!(short, EngineError::VolumeLength { .. }), "{short}");
    file.set_len(geometry().length()).unwrap();
    scene.ship(&mut image);
    let mut expected = vec![0; BLOCKS * BLOCK];
    expected[..BLOCK].fill(3);
    assert!(image == expected);

    fs::rename(&path, scene.disk.path("away")).unwrap();
    let missing = scene.engine().begin_interval().unwrap_err();
    assert!(
        matches!(missing, EngineError::VolumeMissing { .. }),
        "{missing}"
    );
    new_file(&path);
    let replaced = scene.engine().begin_interval().unwrap_err();
    assert!(
        matches!(replaced, EngineError::VolumeReplaced { .. }),
        "{replaced}"
    );
    scene.engine = None;
    let replaced = scene.try_open().unwrap_err();
    assert!(
        matches!(replaced, EngineError::VolumeReplaced { .. }),
        "{replaced}"
    );
    let options = scene.options.clone();
    let (engine, trust) =
        Reflink::readopt(scene.state.path(), VOLUME, &path, geometry(), options).unwrap();
    assert!(matches!(trust, Trust::Everything { .. }));
    scene.engine = Some(engine);
    let cut = scene.ship(&mut image);
    assert_eq!(cut.changed.len().get(), BLOCKS as u64);
    assert!(image.iter().all(|byte| *byte == 0));
    assert_eq!(scene.open_again(), Trust::Clones { stores_kept: true });
}

#[test]
fn a_file_that_cannot_be_cloned_is_refused_and_nothing_is_left_behind() {
    let Some(disk) = Disk::new("ext4", 64) else {
        return;
    };
    let state = tempfile::tempdir().unwrap();
    let path = disk.path("data.img");
    new_file(&path);
    let options = EngineOptions::default();
    let refused = Reflink::create(state.path(), VOLUME, &path, geometry(), options).unwrap_err();
    assert!(
        matches!(refused, EngineError::NotClonable { .. }),
        "{refused}"
    );
    assert_eq!(disk.clones(), None);
    assert!(!state.path().join("reflink").exists());
}

#[test]
fn a_folder_of_clones_that_others_may_use_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let Some(disk) = Disk::new("xfs", 512) else {
        return;
    };
    let state = tempfile::tempdir().unwrap();
    let (path, elsewhere) = (disk.path("data.img"), disk.path("elsewhere"));
    new_file(&path);
    fs::create_dir(&elsewhere).unwrap();
    let clones = disk.path(&format!(".tidemark-{VOLUME}"));
    let create = || {
        let options = EngineOptions::default();
        Reflink::create(state.path(), VOLUME, &path, geometry(), options)
    };
    std::os::unix::fs::symlink(&elsewhere, &clones).unwrap();
    let refused = create().unwrap_err();
    assert!(matches!(refused, EngineError::NoClones { .. }), "{refused}");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    fs::remove_file(&clones).unwrap();
    fs::create_dir(&clones).unwrap();
    fs::set_permissions(&clones, fs::Permissions::from_mode(0o755)).unwrap();
    let refused = create().unwrap_err();
    assert!(matches!(refused, EngineError::NoClones { .. }), "{refused}");
    fs::set_permissions(&clones, fs::Permissions::from_mode(0o700)).unwrap();
    create().unwrap();
}

#[test]
fn a_file_whose_clone_takes_too_long_is_refused() {
    let Some(scene) = Scene::new("xfs") else {
        return;
    };
    let path = scene.disk.path("other.img");
    new_file(&path);
    let state = tempfile::tempdir().unwrap();
    let options = EngineOptions {
        cut_stall_max: Some(std::time::Duration::from_nanos(1)),
        ..EngineOptions::default()
    };
    let other = VolumeId::from_bytes([8; 16]);
    let refused = Reflink::create(state.path(), other, &path, geometry(), options).unwrap_err();
    assert!(
        matches!(refused, EngineError::CutStalls { .. }),
        "{refused}"
    );
    assert!(refused.to_string().contains("choose the engine intercept"));
    assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);
}

#[test]
fn a_full_filesystem_costs_cuts_and_nothing_else() {
    for kind in CLONING {
        let Some(mut scene) = Scene::new(kind) else {
            return;
        };
        let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
        file.write_all_at(&vec![1; BLOCKS * BLOCK], 0).unwrap();
        let mut image = vec![0; BLOCKS * BLOCK];
        scene.ship(&mut image);
        file.write_all_at(&[2; 4 * BLOCK], 0).unwrap();
        file.sync_all().unwrap();
        let ballast: Vec<_> = (0..64)
            .map(|n| scene.disk.path(&format!("ballast-{n}")))
            .collect();
        for path in &ballast {
            let mut length = 256_u64 << 20;
            let Ok(file) = File::create(path) else {
                break;
            };
            while length >= 4096 {
                if fallocate(&file, FallocateFlags::empty(), 0, length).is_err() {
                    length /= 2;
                } else {
                    break;
                }
            }
        }
        // Whether there is room for one more inode is up to the filesystem.
        match scene.engine().begin_interval() {
            Ok(_) => scene.engine().give_up_interval().unwrap(),
            Err(error) => assert!(
                matches!(
                    error,
                    EngineError::CloneNoRoom { .. } | EngineError::Io { .. }
                ),
                "{error}"
            ),
        }
        for path in ballast.iter().filter(|path| path.exists()) {
            fs::remove_file(path).unwrap();
        }
        if scene.engine().stats().poisoned {
            scene.open_again();
        }
        file.write_all_at(&[3; 4 * BLOCK], 8 * BLOCK as u64)
            .unwrap();
        scene.ship(&mut image);
        assert!(image == fs::read(scene.file()).unwrap(), "{kind}");
    }
}

#[test]
fn files_that_are_not_copied_on_write_and_compressed_ones_are_exact_too() {
    for setting in [["chattr", "+C"], ["chattr", "+c"]] {
        let Some(disk) = Disk::new("btrfs", 512) else {
            return;
        };
        let path = disk.path("data.img");
        File::create(&path).unwrap();
        let [program, flag] = setting;
        let set = std::process::Command::new(program)
            .arg(flag)
            .arg(&path)
            .status();
        assert!(set.unwrap().success());
        new_file(&path);
        let state = tempfile::tempdir().unwrap();
        let options = EngineOptions::default();
        let engine = Reflink::create(state.path(), VOLUME, &path, geometry(), options).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let mut image = vec![0; BLOCKS * BLOCK];
        for round in 1..6_u8 {
            file.write_all_at(&vec![round; 64 * BLOCK], u64::from(round) * 40 * 4096)
                .unwrap();
            let cut = engine.begin_interval().unwrap();
            apply(&mut image, &cut);
            engine.commit_interval(cut.epoch).unwrap();
            assert!(image == fs::read(&path).unwrap(), "{flag}, round {round}");
        }
    }
}

#[test]
fn bytes_that_come_back_to_where_they_were_are_in_the_next_interval() {
    for kind in CLONING {
        let Some(scene) = Scene::new(kind) else {
            return;
        };
        let path = scene.file();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        file.write_all_at(&vec![1; BLOCKS * BLOCK], 0).unwrap();
        let mut image = vec![0; BLOCKS * BLOCK];
        scene.ship(&mut image);
        // The workload's own copy of what was there.
        let copy = File::create(scene.disk.path("copy")).unwrap();
        rustix::fs::ioctl_ficlone(&copy, &file).unwrap();
        file.write_all_at(&[2; BLOCK], 3 * BLOCK as u64).unwrap();
        let cut = scene.engine().begin_interval().unwrap();
        assert!(cut.changed.contains(BlockIndex::new(3)));
        // The vault commits this interval, its receipt is lost, and it is given up here.
        apply(&mut image, &cut);
        scene.engine().give_up_interval().unwrap();
        rustix::fs::ioctl_ficlone(&file, File::open(scene.disk.path("copy")).unwrap()).unwrap();
        scene.ship(&mut image);
        assert!(image == fs::read(&path).unwrap(), "{kind}");
    }
}
