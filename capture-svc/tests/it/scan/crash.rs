//! What is left of an interval after crashes, damage and full disks.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
};

use capture_core::scan::state::State;
use capture_svc::engine::{EngineSetup, scan::Scan};

use super::{BLOCK, BLOCKS, EngineError, Scene, Trust, VOLUME, apply, geometry};
use crate::disk::Disk;

fn write(scene: &Scene, byte: u8) {
    let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
    file.write_all_at(&vec![byte; 20 * BLOCK], 7 * BLOCK as u64)
        .unwrap();
}

#[test]
fn what_an_attempt_left_behind_is_removed_and_an_open_interval_is_taken_up() {
    let Some(mut scene) = Scene::new("ext4") else {
        return;
    };
    fs::write(scene.state.path().join("scan-1"), b"half").unwrap();
    scene.open_again();
    assert_eq!(scene.put_aside(), [] as [&str; 0]);
    write(&scene, 1);
    let cut = scene.engine().begin_interval(&scene.live()).unwrap().epoch;
    fs::write(scene.state.path().join("scan-77"), b"half").unwrap();
    let trust = scene.open_again();
    assert_eq!(trust, Trust::Untracked { stores_kept: true });
    assert_eq!(scene.put_aside(), [format!("scan-{cut}")]);
    let open = scene.engine().open_interval().unwrap();
    assert_eq!((open.epoch, open.changed.len().get()), (cut, 20));
    let again = scene.engine().begin_interval(&scene.live());
    assert!(matches!(again, Err(EngineError::IntervalOpen(epoch)) if epoch == cut));
}

#[test]
fn what_was_put_aside_and_is_damaged_is_given_up_and_found_anew() {
    let Some(mut scene) = Scene::new("ext4") else {
        return;
    };
    for damage in ["cut short", "header", "head", "bytes", "missing"] {
        write(&scene, 1);
        let cut = scene.engine().begin_interval(&scene.live()).unwrap().epoch;
        let path = scene.state.path().join(format!("scan-{cut}"));
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let length = file.metadata().unwrap().len();
        match damage {
            "cut short" => file.set_len(length - 1).unwrap(),
            "header" => file.write_all_at(&[0xee], 50).unwrap(),
            "head" => file.write_all_at(&[0xee], 100).unwrap(),
            "bytes" => file.write_all_at(&[0xee], length - 1).unwrap(),
            _ => fs::remove_file(&path).unwrap(),
        }
        if damage == "bytes" {
            let open = scene.engine().open_interval().unwrap();
            let read = apply(&mut vec![0; BLOCKS * BLOCK], &open);
            assert!(matches!(read, Err(EngineError::GivenUp(epoch)) if epoch == cut));
            scene.engine().give_up_interval().unwrap();
        } else {
            scene.open_again();
            assert!(scene.engine().open_interval().is_none(), "{damage}");
        }
        let anew = scene.engine().begin_interval(&scene.live()).unwrap();
        assert!(anew.epoch > cut);
        let mut image = vec![0; BLOCKS * BLOCK];
        apply(&mut image, &anew).unwrap();
        assert!(image == fs::read(scene.file()).unwrap(), "{damage}");
        scene.engine().give_up_interval().unwrap();
    }
}

#[test]
fn a_damaged_record_is_refused_until_the_volume_is_readopted() {
    let Some(mut scene) = Scene::new("ext4") else {
        return;
    };
    let record = scene.state.path().join("scan");
    let good = fs::read(&record).unwrap();
    for bad in [None, Some(&b"rubbish"[..])] {
        scene.engine = None;
        match bad {
            None => fs::remove_file(&record).unwrap(),
            Some(bytes) => fs::write(&record, bytes).unwrap(),
        }
        let refused = scene.try_open().unwrap_err();
        assert!(refused.to_string().contains("volume readopt"), "{refused}");
        let options = scene.options.clone();
        let (_, trust) = Scan::readopt(EngineSetup {
            dir: scene.state.path(),
            volume: VOLUME,
            file: &scene.file(),
            geometry: geometry(),
            options,
        })
        .unwrap();
        assert!(matches!(trust, Trust::Everything { .. }));
    }
    fs::write(&record, good).unwrap();
    scene.open_again();
}

#[test]
fn after_a_loss_of_power_times_prove_nothing_and_the_open_interval_is_whole() {
    let Some(mut scene) = Scene::new("ext4") else {
        return;
    };
    write(&scene, 1);
    std::thread::sleep(std::time::Duration::from_millis(150));
    let mut image = vec![0; BLOCKS * BLOCK];
    let cut = scene.engine().begin_interval(&scene.quiesced()).unwrap();
    apply(&mut image, &cut).unwrap();
    scene.commit(&cut, &image);
    write(&scene, 2);
    let open = scene.engine().begin_interval(&scene.live()).unwrap().epoch;
    scene.engine = None;
    let record = scene.state.path().join("scan");
    let mut state = State::decode(&fs::read(&record).unwrap()).unwrap();
    assert!(state.proof.is_some());
    state.boot = [1; 16];
    state.proof.as_mut().unwrap().boot = [1; 16];
    fs::write(&record, state.encode()).unwrap();
    assert_eq!(scene.open_again(), Trust::Untracked { stores_kept: false });
    let taken_up = scene.engine().open_interval().unwrap();
    assert_eq!((taken_up.epoch, taken_up.changed.len().get()), (open, 20));
    scene.engine().give_up_interval().unwrap();
    assert!(!scene.engine().tracked(geometry().all()).is_empty());
    assert_eq!(
        scene
            .engine()
            .begin_interval(&scene.quiesced())
            .unwrap()
            .changed
            .len()
            .get(),
        20
    );
}

#[test]
fn a_full_disk_of_the_state_costs_the_cut_and_nothing_else() {
    let Some(disk) = Disk::new("ext4", 16) else {
        return;
    };
    let Some(scene) = Scene::new("ext4") else {
        return;
    };
    let options = scene.options.clone();
    let state = disk.path("state");
    let engine = Scan::create(EngineSetup {
        dir: &state,
        volume: VOLUME,
        file: &scene.file(),
        geometry: geometry(),
        options,
    })
    .unwrap();
    let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
    file.write_all_at(&vec![3; BLOCKS * BLOCK], 0).unwrap();
    let ballast = disk.path("ballast");
    // All of it, to the last block.
    assert!(fs::write(&ballast, vec![1; 16 << 20]).is_err());
    match engine.begin_interval(&scene.live()) {
        // Checksums alone may have found room.
        Ok(cut) => {
            assert!(engine.stats().spool_used < 1 << 20);
            let mut image = vec![0; BLOCKS * BLOCK];
            apply(&mut image, &cut).unwrap();
            engine.give_up_interval().unwrap();
        }
        Err(EngineError::Io { source, .. }) => {
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        }
        Err(other) => panic!("{other}"),
    }
    assert!(engine.open_interval().is_none());
    let left = fs::read_dir(&state).unwrap();
    let left = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(left.into_iter().all(|name| !name.starts_with("scan-")));
    fs::remove_file(&ballast).unwrap();
    let cut = engine.begin_interval(&scene.live()).unwrap();
    assert_eq!(cut.changed.len().get(), BLOCKS as u64);
    // Half of what is free is left to others: some blocks are read from the file.
    let used = engine.stats().spool_used;
    assert!((2 << 20..7 << 20).contains(&used), "{used}");
    let mut image = vec![0; BLOCKS * BLOCK];
    apply(&mut image, &cut).unwrap();
    assert!(image == fs::read(scene.file()).unwrap());
}

#[test]
fn a_file_that_is_gone_cut_short_or_replaced_is_refused_until_it_is_back() {
    let Some(scene) = Scene::new("ext4") else {
        return;
    };
    write(&scene, 1);
    let begin = || scene.engine().begin_interval(&scene.live());
    let file = OpenOptions::new().write(true).open(scene.file()).unwrap();
    file.set_len(4096).unwrap();
    assert!(matches!(
        begin(),
        Err(EngineError::VolumeLength { found: 4096, .. })
    ));
    file.set_len(geometry().length()).unwrap();
    let aside = scene.disk.path("aside.img");
    fs::rename(scene.file(), &aside).unwrap();
    assert!(matches!(begin(), Err(EngineError::VolumeMissing { .. })));
    fs::copy(&aside, scene.file()).unwrap();
    assert!(matches!(begin(), Err(EngineError::VolumeReplaced { .. })));
    fs::rename(&aside, scene.file()).unwrap();
    begin().unwrap();
}
