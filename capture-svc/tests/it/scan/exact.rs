//! What is in an interval is what differs from the base, as it was at the cut.

use std::{fs::OpenOptions, os::unix::fs::FileExt};

use tidemark_block::{BlockCount, BlockIndex, Checksum128, Extent};

use super::{BLOCK, BLOCKS, EngineError, EngineOptions, KINDS, Scene, Trust, apply, geometry};
use crate::writer::Writer;

#[test]
fn each_interval_makes_the_image_of_its_cut_whatever_is_written_afterwards() {
    for kind in KINDS {
        let Some(mut scene) = Scene::new(kind) else {
            return;
        };
        let seed = 0x5ca4 + kind.len() as u64;
        let mut writer = Writer::new(&scene.file(), seed);
        let mut base = vec![0; BLOCKS * BLOCK];
        for round in 0..40 {
            for _ in 0..writer.random.below(40) {
                writer.one();
            }
            let at = match writer.random.below(2) {
                0 => scene.quiesced(),
                _ => scene.live(),
            };
            let cut = scene.engine().begin_interval(&at).unwrap();
            let expected = writer.model.clone();
            for _ in 0..5 {
                writer.one();
            }
            let cut = match writer.random.below(4) {
                // It outlives a kill.
                0 => {
                    drop(cut);
                    let trust = scene.open_again();
                    assert_eq!(trust, Trust::Untracked { stores_kept: true });
                    scene.engine().open_interval().unwrap()
                }
                _ => cut,
            };
            let mut image = base.clone();
            apply(&mut image, &cut).unwrap();
            assert!(image == expected, "{kind}, seed {seed:#x}, round {round}");
            let differ = |block: &BlockIndex| {
                let at = usize::try_from(block.get()).unwrap() * BLOCK;
                base[at..at + BLOCK] != expected[at..at + BLOCK]
            };
            let all = geometry().all();
            assert_eq!(
                cut.changed.len().get(),
                all.iter().filter(differ).count() as u64,
                "nothing else is in it"
            );
            match writer.random.below(4) {
                0 => scene.engine().give_up_interval().unwrap(),
                _ => {
                    scene.commit(&cut, &expected);
                    base = expected;
                }
            }
            assert_eq!(scene.put_aside(), [] as [&str; 0]);
            if writer.random.below(9) == 0 {
                scene.open_again();
            }
        }
    }
}

#[test]
fn what_there_is_no_room_for_is_read_from_the_file_and_given_up_once_that_has_changed() {
    let options = EngineOptions {
        spool_bytes_max: 2 << 20,
        ..EngineOptions::default()
    };
    let Some(mut scene) = Scene::with("ext4", geometry(), options) else {
        return;
    };
    let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
    let bytes: Vec<u8> = (0..BLOCKS * BLOCK)
        .map(|at| u8::try_from(at / BLOCK % 251 + 1).unwrap())
        .collect();
    file.write_all_at(&bytes, 0).unwrap();
    let cut = scene.engine().begin_interval(&scene.live()).unwrap();
    assert_eq!(cut.changed.len().get(), BLOCKS as u64);
    let used = scene.engine().stats().spool_used;
    assert!((1 << 20..2 << 20).contains(&used), "{used}");
    let mut image = vec![0; BLOCKS * BLOCK];
    apply(&mut image, &cut).unwrap();
    assert!(image == bytes);
    drop(cut);
    scene.open_again();
    let cut = scene.engine().open_interval().unwrap();
    // Each block is another one: some are put aside, the others are noticed.
    file.write_all_at(&vec![0xff; BLOCKS * BLOCK], 0).unwrap();
    let (mut kept, mut gone) = (0, 0);
    for block in geometry().all().iter() {
        let at = usize::try_from(block.get()).unwrap() * BLOCK;
        let mut read = vec![0; BLOCK];
        match cut
            .reader
            .read_blocks(Extent::new(block, BlockCount::new(1)), &mut read)
        {
            Ok(()) => {
                assert!(read == bytes[at..at + BLOCK]);
                kept += 1;
            }
            Err(EngineError::GivenUp(epoch)) if epoch == cut.epoch => gone += 1,
            Err(other) => panic!("{other}"),
        }
    }
    // One chunk of the two has room beside its checksums.
    assert_eq!((kept, gone), (256, BLOCKS - 256));
    scene.engine().give_up_interval().unwrap();
    let again = scene.engine().begin_interval(&scene.live()).unwrap();
    assert!(again.epoch > cut.epoch);
}

#[test]
fn blocks_that_are_not_in_an_interval_are_not_read_from_it() {
    let Some(scene) = Scene::new("ext4") else {
        return;
    };
    let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
    file.write_all_at(&[1; BLOCK], 5 * BLOCK as u64).unwrap();
    let cut = scene.engine().begin_interval(&scene.live()).unwrap();
    for (start, count) in [(4, 1), (5, 2), (300, 1), (BLOCKS as u64 - 1, 2)] {
        let extent = Extent::new(BlockIndex::new(start), BlockCount::new(count));
        let mut bytes = vec![0; usize::try_from(count).unwrap() * BLOCK];
        let read = cut.reader.read_blocks(extent, &mut bytes);
        assert!(matches!(read, Err(EngineError::OutOfRange)), "{extent}");
    }
}

#[test]
fn only_a_file_that_was_quiesced_twice_and_has_its_times_is_not_read() {
    let Some(mut scene) = Scene::new("ext4") else {
        return;
    };
    let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
    let mut image = vec![0; BLOCKS * BLOCK];
    let ship = |scene: &Scene, image: &mut Vec<u8>, quiesced| {
        let at = if quiesced {
            scene.quiesced()
        } else {
            scene.live()
        };
        let cut = scene.engine().begin_interval(&at).unwrap();
        apply(image, &cut).unwrap();
        scene.commit(&cut, image);
        cut.changed.len().get()
    };
    let settle = || std::thread::sleep(std::time::Duration::from_millis(150));
    // Whoever reads the file finds that its first block is not what the table says.
    let (first, wrong) = (BlockIndex::ZERO, Checksum128::from_bytes([9; 16]));
    let reads = |scene: &Scene, quiesced| {
        let was = scene.table.block(first).unwrap();
        scene.table.apply([(first, wrong)]).unwrap();
        let at = if quiesced {
            scene.quiesced()
        } else {
            scene.live()
        };
        let cut = scene.engine().begin_interval(&at).unwrap();
        scene.engine().give_up_interval().unwrap();
        scene.table.apply([(first, was)]).unwrap();
        !cut.changed.is_empty()
    };
    file.write_all_at(&[1; BLOCK], 0).unwrap();
    settle();
    assert_eq!(ship(&scene, &mut image, false), 1);
    assert!(reads(&scene, true), "a write may have been under way");
    assert_eq!(ship(&scene, &mut image, true), 0);
    assert!(
        reads(&scene, false),
        "without quiescing times prove nothing"
    );
    assert!(reads(&scene, true), "it was found to differ");
    assert_eq!(ship(&scene, &mut image, true), 0);
    assert!(!reads(&scene, true));
    let all = geometry().all();
    assert!(
        scene.engine().tracked(all).is_empty(),
        "the scrub may compare it"
    );
    scene.open_again();
    assert!(!reads(&scene, true), "the same boot and mount");
    scene.engine().doubt().unwrap();
    assert!(reads(&scene, true));
    // So is one whose blocks come in doubt while its interval is on its way.
    let at = scene.quiesced();
    let cut = scene.engine().begin_interval(&at).unwrap();
    scene.engine().doubt().unwrap();
    scene.commit(&cut, &image);
    drop(cut);
    assert!(reads(&scene, true));
    assert_eq!(ship(&scene, &mut image, true), 0);
    assert!(!reads(&scene, true));
    // The same bytes, and the time of modification set back: the inode tells.
    let was = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[1; BLOCK], 0).unwrap();
    file.set_modified(was).unwrap();
    assert!(reads(&scene, true));
    assert_eq!(scene.engine().tracked(all), std::iter::once(all).collect());
    // What was written just now may be written again within the same tick.
    assert_eq!(ship(&scene, &mut image, true), 0);
    file.write_all_at(&[2; BLOCK], 0).unwrap();
    assert_eq!(ship(&scene, &mut image, true), 1);
    assert!(reads(&scene, true));
}
