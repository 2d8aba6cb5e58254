//! Each interval makes the image of its cut, whoever writes how, and holds little else.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
};

use capture_svc::engine::{EngineOptions, EngineSetup, Trust, reflink::Reflink};
use rustix::fs::{FallocateFlags, fallocate};
use tidemark_block::{BlockCount, BlockIndex, BlockSize, Extent, Geometry};

use super::{
    BLOCK, BLOCKS, CLONING, Disk, Scene, VOLUME, apply, apply_blocks, geometry, new_file, whole,
};
use crate::{disk::resident, writer::Writer};

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
        let engine = Reflink::create(EngineSetup {
            dir: state.path(),
            volume: VOLUME,
            file: &path,
            geometry: geometry(),
            options,
        })
        .unwrap();
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
fn passes_over_clones_leave_little_in_the_page_cache() {
    const LEN: usize = 128 << 20;
    const PIECE: u64 = 256;
    for kind in CLONING {
        let Some(disk) = Disk::new(kind, 1024) else {
            return;
        };
        let (state, path) = (tempfile::tempdir().unwrap(), disk.path("data.img"));
        fs::write(&path, vec![7; LEN]).unwrap();
        let geometry = Geometry::new(LEN as u64, BlockSize::MIN).unwrap();
        let engine = Reflink::create(EngineSetup {
            dir: state.path(),
            volume: VOLUME,
            file: &path,
            geometry,
            options: EngineOptions::default(),
        })
        .unwrap();
        let cut = engine.begin_interval().unwrap();
        let name = format!("{}.clone", cut.epoch);
        let clone = File::open(disk.clones().unwrap().join(name)).unwrap();
        let pieces = || geometry.all().pieces(BlockCount::new(PIECE));
        let mut bytes = vec![0; BLOCK * usize::try_from(PIECE).unwrap()];
        let stays = |what: &str| {
            let pages = resident(&clone).into_iter().filter(|page| *page).count();
            assert!(pages * BLOCK < LEN / 2, "{kind}, {what}: {pages} pages");
        };
        for piece in pieces() {
            cut.reader.read_blocks(piece, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 7));
        }
        stays("what is shipped");
        engine.commit_interval(cut.epoch).unwrap();
        // The scrub's pass, later, and another one.
        for pass in 0..2 {
            for piece in pieces() {
                engine.read_base(piece, &mut bytes).unwrap();
            }
            stays(&format!("pass {pass} over the base"));
        }
    }
}
