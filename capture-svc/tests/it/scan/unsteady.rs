//! A file that is written while it is read is refused, never torn; and its times alone would not have told.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::Duration,
};

use capture_core::scan::moment::Unsteady;
use capture_svc::engine::{EngineSetup, scan::Scan};
use tidemark_block::{BlockCount, BlockIndex, BlockSize, Extent, Geometry};

use super::{
    BLOCK, CutAt, EngineError, EngineOptions, KINDS, Scene, VOLUME, apply, geometry,
    held::HeldWrite,
};
use crate::{disk::resident, writer::aligned};

const LEN: usize = 64 << 20;

fn scene(kind: &str) -> Option<Scene> {
    let geometry = Geometry::new(LEN as u64, BlockSize::MIN).unwrap();
    Scene::with(kind, geometry, EngineOptions::default())
}

fn impatient(scene: &Scene) -> CutAt<'_> {
    CutAt {
        lull_wait_max: Duration::from_millis(300),
        ..scene.live()
    }
}

/// Writes to the first block and then to the last one, again and again, and never pauses.
fn write_in_turn(scene: &Scene, how: &str, stop: &AtomicBool) {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if how == "direct" {
        options.custom_flags(libc::O_DIRECT);
    }
    let file = options.open(scene.file()).unwrap();
    let last = LEN - BLOCK;
    #[allow(unsafe_code)]
    // SAFETY: the file is not cut short while it is mapped, and nobody holds references into the map.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
    let mut block = aligned(&[0; BLOCK]);
    let mut turn = 0_u64;
    while !stop.load(SeqCst) {
        turn += 1;
        for at in [0, last] {
            if how == "mapped" {
                map[at..at + 8].copy_from_slice(&turn.to_le_bytes());
                std::sync::atomic::fence(SeqCst);
            } else {
                block[..8].copy_from_slice(&turn.to_le_bytes());
                file.write_all_at(&block, at as u64).unwrap();
            }
        }
    }
}

fn turn_at(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
}

#[test]
fn writers_that_never_pause_make_it_refuse_and_nothing_is_ever_torn() {
    for (kind, how) in [
        ("ext4", "buffered"),
        ("ext4", "direct"),
        ("ext4", "mapped"),
        ("xfs", "buffered"),
        ("xfs", "direct"),
        ("xfs", "mapped"),
        ("btrfs", "mapped"),
    ] {
        let Some(scene) = scene(kind) else {
            return;
        };
        let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
        file.write_all_at(&vec![0; LEN], 0).unwrap();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| write_in_turn(&scene, how, &stop));
            let mut refused = 0;
            for attempt in 0..6 {
                let at = if attempt % 2 == 0 {
                    impatient(&scene)
                } else {
                    scene.quiesced()
                };
                match scene.engine().begin_interval(&at) {
                    Err(EngineError::Unsteady { why, .. }) => {
                        let expected = if at.quiesced {
                            Unsteady::Quiesced
                        } else {
                            Unsteady::Live
                        };
                        assert_eq!(why, expected);
                        refused += 1;
                    }
                    // The machine had something else to do than to write.
                    Ok(cut) => {
                        let mut image = vec![0; LEN];
                        apply(&mut image, &cut).unwrap();
                        let (first, last) = (turn_at(&image, 0), turn_at(&image, LEN - BLOCK));
                        assert!(
                            at.quiesced || first == last || first == last + 1,
                            "{kind} {how}: {first} {last}"
                        );
                        scene.engine().give_up_interval().unwrap();
                    }
                    Err(other) => panic!("{other}"),
                }
                assert_eq!(scene.put_aside(), [] as [&str; 0]);
            }
            stop.store(true, SeqCst);
            assert!(refused > 0, "{kind} {how}");
        });
        let still = scene.engine().begin_interval(&scene.live()).unwrap();
        assert!(still.changed.len().get() <= 2, "it recovers by itself");
    }
}

/// The bytes of one write, in order, as far as it came, and behind them those of the write before.
fn is_prefix(image: &[u8], new: u8, old: u8) -> bool {
    let end = image.iter().position(|byte| *byte != new);
    image[end.unwrap_or(LEN)..].iter().all(|byte| *byte == old)
}

#[test]
fn a_write_that_goes_on_between_two_passes_is_refused_though_the_times_stay() {
    let Some(scene) = scene("ext4") else {
        return;
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(scene.file())
        .unwrap();
    file.write_all_at(&vec![0x10; LEN], 0).unwrap();
    let (mut refused, mut old) = (0, 0x10);
    for new in 0x11..0x16 {
        let held = HeldWrite::begin(&scene.file(), LEN, new);
        // Its times are set once, at its beginning.
        held.allow(LEN / 2);
        let mut byte = [old];
        while byte == [old] {
            file.read_exact_at(&mut byte, (LEN / 4) as u64).unwrap();
        }
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                // The first pass is nearly over.
                while scene.bytes_put_aside() < (LEN / 8 * 7) as u64 && !stop.load(SeqCst) {
                    thread::yield_now();
                }
                held.allow(LEN);
            });
            let once = CutAt {
                lull_wait_max: Duration::ZERO,
                ..scene.live()
            };
            match scene.engine().begin_interval(&once) {
                Err(EngineError::Unsteady { .. }) => refused += 1,
                Ok(cut) => {
                    let mut image = vec![0; LEN];
                    apply(&mut image, &cut).unwrap();
                    assert!(is_prefix(&image, new, old));
                    scene.engine().give_up_interval().unwrap();
                }
                Err(other) => panic!("{other}"),
            }
            stop.store(true, SeqCst);
        });
        drop(held);
        old = new;
    }
    assert!(refused > 0);
}

/// What a scan would be that goes by the time of modification: what it read is taken for one image if that is the same
/// before and afterwards.
fn naive(file: &File, halfway: impl FnOnce()) -> io::Result<Option<Vec<u8>>> {
    let before = file.metadata()?;
    let mut image = vec![0; LEN];
    let (first, second) = image.split_at_mut(LEN / 2);
    file.read_exact_at(first, 0)?;
    halfway();
    file.read_exact_at(second, (LEN / 2) as u64)?;
    let after = file.metadata()?;
    Ok(same_times(&before, &after).then_some(image))
}

fn same_times(a: &std::fs::Metadata, b: &std::fs::Metadata) -> bool {
    let times = |of: &std::fs::Metadata| (of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec());
    times(a) == times(b)
}

#[test]
fn a_scan_that_goes_by_times_tears_a_write_that_is_under_way() {
    let Some(scene) = scene("ext4") else {
        return;
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(scene.file())
        .unwrap();
    file.write_all_at(&vec![0x10; LEN], 0).unwrap();
    let before = file.metadata().unwrap();
    let held = HeldWrite::begin(&scene.file(), LEN, 0x11);
    while same_times(&before, &file.metadata().unwrap()) {
        thread::yield_now();
    }
    let image = naive(&file, || {
        held.allow(LEN);
        while !held.is_over() {
            thread::yield_now();
        }
    });
    let image = image.unwrap().expect("the times are the same");
    assert!(!is_prefix(&image, 0x11, 0x10), "the file never was this");
}

#[test]
fn a_scan_that_goes_by_times_misses_a_store_through_a_mapping_and_this_one_does_not() {
    for kind in KINDS {
        let Some(scene) = scene(kind) else {
            return;
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(scene.file())
            .unwrap();
        file.write_all_at(&vec![1; LEN], 0).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: the file is not cut short while it is mapped, and nobody holds references into the map.
        let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
        map[0] = 2;
        let read = naive(&file, || {}).unwrap().unwrap();
        let then = file.metadata().unwrap();
        map[0] = 3;
        let now = file.metadata().unwrap();
        assert!(
            same_times(&then, &now) && read[0] == 2,
            "{kind}: it looks unchanged and is not"
        );

        let at = scene.live();
        let cut = scene.engine().begin_interval(&at).unwrap();
        let mut image = vec![0; LEN];
        apply(&mut image, &cut).unwrap();
        assert_eq!(image[0], 3);
        scene.commit(&cut, &image);
        drop(cut);
        map[0] = 4;
        let cut = scene.engine().begin_interval(&at).unwrap();
        let first = Extent::new(BlockIndex::ZERO, BlockCount::new(1));
        assert_eq!(*cut.changed, std::iter::once(first).collect(), "{kind}");
        apply(&mut image, &cut).unwrap();
        assert_eq!(image[0], 4);
    }
}

#[test]
fn a_cut_that_nobody_waits_for_any_more_ends() {
    let Some(scene) = scene("ext4") else {
        return;
    };
    let (stop, abandoned) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| write_in_turn(&scene, "buffered", &stop));
        let at = CutAt {
            lull_wait_max: Duration::from_secs(3600),
            lull_min: Duration::from_secs(60),
            abandoned: Some(&abandoned),
            ..scene.live()
        };
        let engine = scene.engine();
        let cutting = scope.spawn(move || engine.begin_interval(&at).unwrap_err());
        thread::sleep(Duration::from_millis(50));
        abandoned.store(true, SeqCst);
        assert!(matches!(cutting.join().unwrap(), EngineError::Abandoned));
        let at = CutAt {
            abandoned: None,
            ..at
        };
        let cutting = scope.spawn(move || engine.begin_interval(&at).unwrap_err());
        thread::sleep(Duration::from_millis(50));
        engine.close();
        assert!(matches!(cutting.join().unwrap(), EngineError::Closed));
        stop.store(true, SeqCst);
    });
    assert!(matches!(
        scene.engine().begin_interval(&scene.live()),
        Err(EngineError::Closed)
    ));
}

#[test]
fn a_file_whose_times_cannot_be_relied_on_is_refused() {
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let (file, state) = (memory.path().join("data.img"), tempfile::tempdir().unwrap());
    File::create(&file)
        .unwrap()
        .set_len(geometry().length())
        .unwrap();
    let made = Scan::create(EngineSetup {
        dir: state.path(),
        volume: VOLUME,
        file: &file,
        geometry: geometry(),
        options: EngineOptions::default(),
    });
    let refused = made.unwrap_err();
    assert!(
        matches!(&refused, EngineError::NotScannable { filesystem, .. } if filesystem == "tmpfs"),
        "{refused}"
    );
    assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0);
}

#[test]
fn the_page_cache_is_left_as_it_was() {
    let Some(scene) = scene("ext4") else {
        return;
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(scene.file())
        .unwrap();
    file.write_all_at(&vec![7; LEN], 0).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    // What the workload uses.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    file.read_exact_at(&mut vec![0; 1 << 20], 16 << 20).unwrap();
    let before = resident(&file);
    scene.engine().begin_interval(&scene.live()).unwrap();
    let after = resident(&file);
    let kernel = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut version = kernel.split('.').map(|part| part.parse().unwrap_or(0));
    if (version.next(), version.next()) < (Some(6), Some(14)) {
        println!("not compared: Linux {kernel} can't read past the page cache");
        return;
    }
    assert!(before.iter().filter(|page| **page).count() >= 256);
    let lost = before
        .iter()
        .zip(&after)
        .filter(|(was, is)| **was && !**is)
        .count();
    let gained = before
        .iter()
        .zip(&after)
        .filter(|(was, is)| !**was && **is)
        .count();
    assert_eq!(lost, 0);
    assert!(gained * BLOCK < LEN / 8, "{gained} pages came to stay");
}
