//! Files and directories that aren't fit: each a clear error, nothing changed.

use super::*;

#[test]
fn a_volume_file_that_is_not_as_recorded_is_refused_and_comes_back_when_it_is() {
    let setup = Setup::new(16);
    let engine = setup.create();
    write(&engine, 1, 1);
    drop(engine);
    for length in [15 * BLOCK, 17 * BLOCK, 16 * BLOCK + 1] {
        let aside = setup.dir.path().join("aside");
        fs::copy(setup.file(), &aside).unwrap();
        File::options()
            .write(true)
            .open(setup.file())
            .unwrap()
            .set_len(length)
            .unwrap();
        match setup.try_open() {
            Err(EngineError::VolumeLength {
                found, recorded, ..
            }) => {
                assert_eq!((found, recorded), (length, 16 * BLOCK));
            }
            other => panic!("{other:?}"),
        }
        File::options()
            .write(true)
            .open(setup.file())
            .unwrap()
            .set_len(16 * BLOCK)
            .unwrap();
    }
    let elsewhere = setup.dir.path().join("elsewhere");
    fs::rename(setup.file(), &elsewhere).unwrap();
    assert!(matches!(
        setup.try_open(),
        Err(EngineError::VolumeMissing { .. })
    ));
    fs::create_dir(setup.file()).unwrap();
    assert!(matches!(
        setup.try_open(),
        Err(EngineError::NotAFile { .. })
    ));
    fs::remove_dir(setup.file()).unwrap();
    fs::rename(&elsewhere, setup.file()).unwrap();
    let (engine, trust) = setup.open();
    assert_eq!(trust, Trust::ProcessCrash);
    assert_eq!(engine.tracked(extent(0, 16)), set(&[(1, 1)]));
}

/// A volume with a snapshot, a committed base and an uncommitted write, that was left by a crash or closed.
fn left(clean: bool) -> Setup {
    let setup = Setup::new(16);
    let engine = setup.create();
    let interval = engine.begin_interval().unwrap();
    engine.commit_interval(interval.epoch).unwrap();
    write(&engine, 1, 1);
    engine.create_snapshot("", 0).unwrap();
    write(&engine, 2, 1);
    if clean {
        engine.close().unwrap();
    }
    setup
}

/// Puts a copy into the file's place, and keeps the file itself aside.
fn replace_by_copy(setup: &Setup) -> PathBuf {
    let (aside, copy) = (
        setup.dir.path().join("aside"),
        setup.dir.path().join("copy"),
    );
    fs::copy(setup.file(), &copy).unwrap();
    fs::rename(setup.file(), &aside).unwrap();
    fs::rename(&copy, setup.file()).unwrap();
    aside
}

fn assert_refused(setup: &Setup, case: &str) {
    let refused = setup.try_open();
    let Err(EngineError::VolumeReplaced { .. }) = refused else {
        panic!("{case}: {refused:?}");
    };
}

fn assert_all_in_doubt(engine: &Arc<Engine>, case: &str) {
    assert_eq!(engine.tracked(extent(0, 16)).len().get(), 16, "{case}");
    assert!(engine.list_snapshots().is_empty(), "{case}");
    assert!(engine.open_interval().is_none(), "{case}");
}

#[test]
fn a_replaced_file_is_refused_until_it_is_readopted() {
    for clean in [true, false] {
        for lost in [None, Some("tracking"), Some("intent")] {
            let case = format!("{clean} {lost:?}");
            let setup = left(clean);
            let aside = replace_by_copy(&setup);
            assert_refused(&setup, &case);
            // Nothing was changed by that: the recorded file is taken back as it was left.
            let copy = setup.dir.path().join("copy");
            fs::rename(setup.file(), &copy).unwrap();
            fs::rename(&aside, setup.file()).unwrap();
            let (engine, trust) = setup.open();
            let expected = if clean {
                Trust::Clean
            } else {
                Trust::ProcessCrash
            };
            assert_eq!(trust, expected, "{case}");
            assert_eq!(engine.tracked(extent(0, 16)), set(&[(1, 2)]), "{case}");
            assert_eq!(engine.list_snapshots().len(), 1, "{case}");
            if clean {
                engine.close().unwrap();
            }
            drop(engine);

            fs::rename(&copy, setup.file()).unwrap();
            if let Some(lost) = lost {
                fs::remove_file(setup.state().join(lost)).unwrap();
            }
            assert_refused(&setup, &case);
            if let Some(lost) = lost {
                assert!(!setup.state().join(lost).exists(), "{case}: left alone");
            }
            let (engine, trust) = setup.readopt().unwrap();
            assert!(matches!(trust, Trust::Everything { .. }), "{case}");
            assert_all_in_doubt(&engine, &case);
            drop(engine);
            let (engine, trust) = setup.open();
            assert_eq!(trust, Trust::ProcessCrash, "{case}");
            assert_all_in_doubt(&engine, &case);
        }
    }
}

/// The inode of a file that was removed is given to the next one.
#[test]
fn a_file_made_anew_with_the_inode_of_the_recorded_one_is_refused() {
    use capture_core::engine::records::Identity;
    let setup = left(false);
    let path = setup.state().join("identity");
    let mut identity = Identity::decode(&fs::read(&path).unwrap()).unwrap();
    assert!(
        identity.file.born_s > 0,
        "the filesystem of the temporary directory tells it"
    );
    identity.file.born_ns ^= 1;
    fs::write(&path, identity.encode()).unwrap();
    assert_refused(&setup, "another time of creation");
    assert_all_in_doubt(&setup.readopt().unwrap().0, "readopted");
}

#[test]
fn readopting_the_recorded_file_puts_everything_in_doubt() {
    for clean in [true, false] {
        let setup = left(clean);
        let (engine, trust) = setup.readopt().unwrap();
        assert!(matches!(trust, Trust::Everything { .. }), "{trust:?}");
        assert_all_in_doubt(&engine, "readopted");
    }
}

#[test]
fn a_file_that_cannot_be_a_volume_is_not_readopted() {
    let setup = left(true);
    let aside = replace_by_copy(&setup);
    let file = File::options().write(true).open(setup.file()).unwrap();
    file.set_len(15 * BLOCK).unwrap();
    assert!(matches!(
        setup.readopt(),
        Err(EngineError::VolumeLength { .. })
    ));
    fs::remove_file(setup.file()).unwrap();
    assert!(matches!(
        setup.readopt(),
        Err(EngineError::VolumeMissing { .. })
    ));
    fs::rename(&aside, setup.file()).unwrap();
    let (engine, trust) = setup.open();
    assert_eq!(trust, Trust::Clean, "nothing was decided by that");
    assert_eq!(engine.list_snapshots().len(), 1);
}

/// A readoption that ends at each of its steps, where something stands in the way, leaves the file refused; once it is
/// through, a crash at once leaves everything in doubt.
#[test]
fn a_readoption_that_ends_early_leaves_the_file_refused() {
    let lost = [None, Some("tracking"), Some("dirty.1"), Some("intent")];
    let obstacles = [
        "carry.tmp",
        "snapshots.tmp",
        "interval",
        "spool.data",
        "identity.tmp",
    ];
    for (lost, obstacle) in lost
        .iter()
        .flat_map(|lost| obstacles.map(|obstacle| (lost, obstacle)))
    {
        for reboot in [false, true] {
            let case = format!("{lost:?} {obstacle} {reboot}");
            let setup = left(false);
            replace_by_copy(&setup);
            if let Some(lost) = lost {
                fs::remove_file(setup.state().join(lost)).unwrap();
            }
            let (path, aside) = (setup.state().join(obstacle), setup.dir.path().join("moved"));
            let moved = fs::rename(&path, &aside).is_ok();
            fs::create_dir(&path).unwrap();
            setup.readopt().unwrap_err();
            fs::remove_dir(&path).unwrap();
            if moved {
                fs::rename(&aside, &path).unwrap();
            }
            if reboot {
                super::crash::pretend_reboot(&setup);
            }
            assert_refused(&setup, &case);
            drop(setup.readopt().unwrap());
            if reboot {
                super::crash::pretend_reboot(&setup);
            }
            assert_all_in_doubt(&setup.open().0, &case);
        }
    }
}

#[test]
fn a_volume_file_modified_behind_our_back_is_compared_whole() {
    for clean in [true, false] {
        let setup = Setup::new(16);
        let engine = setup.create();
        // Every sixteenth write is recorded, the first among them.
        write(&engine, 1, 1);
        if clean {
            engine.close().unwrap();
        }
        drop(engine);
        let file = File::options().write(true).open(setup.file()).unwrap();
        file.write_all_at(&[9], BLOCK + 77).unwrap();
        let (engine, trust) = setup.open();
        assert!(
            matches!(trust, Trust::Everything { .. }),
            "{clean} {trust:?}"
        );
        assert_eq!(engine.tracked(extent(0, 16)).len().get(), 16);
    }
}

#[test]
fn a_copied_state_is_not_trusted() {
    let setup = Setup::new(16);
    let engine = setup.create();
    write(&engine, 1, 1);
    let copy = setup.dir.path().join("copy");
    let copied = |from: &Path, to: &Path| {
        let done = std::process::Command::new("cp")
            .arg("-a")
            .args([from, to])
            .status();
        assert!(done.unwrap().success());
    };
    copied(&setup.state(), &copy);
    // Only the original's map has this one.
    write(&engine, 7, 7);
    drop(engine);
    fs::remove_dir_all(setup.state()).unwrap();
    copied(&copy, &setup.state());
    let (engine, trust) = setup.open();
    assert!(matches!(trust, Trust::Everything { .. }), "{trust:?}");
    assert_eq!(engine.tracked(extent(0, 16)).len().get(), 16);
}

#[test]
fn a_file_or_a_state_in_use_is_refused() {
    let setup = Setup::new(16);
    let engine = setup.create();
    assert!(matches!(
        setup.try_open(),
        Err(EngineError::StateLocked { .. })
    ));
    let other = setup.dir.path().join("other");
    let created = Engine::create(EngineSetup {
        dir: &other,
        volume: volume(),
        file: &setup.file(),
        geometry: setup.geometry(),
        options: EngineOptions::default(),
    });
    assert!(matches!(created, Err(EngineError::VolumeLocked { .. })));
    drop(engine);
    let created = Engine::create(EngineSetup {
        dir: &setup.state(),
        volume: volume(),
        file: &setup.file(),
        geometry: setup.geometry(),
        options: EngineOptions::default(),
    });
    assert!(matches!(created, Err(EngineError::StateExists { .. })));
    setup.open();
}

#[test]
fn the_state_of_another_volume_or_geometry_is_refused() {
    let setup = Setup::new(16);
    let (state, file) = (setup.state(), setup.file());
    assert!(matches!(
        setup.try_open(),
        Err(EngineError::StateMissing { .. })
    ));
    drop(setup.create());
    let open = |id, geometry| {
        Engine::open(EngineSetup {
            dir: &state,
            volume: id,
            file: &file,
            geometry,
            options: EngineOptions::default(),
        })
    };
    let other = VolumeId::from_bytes([8; 16]);
    assert!(matches!(
        open(other, setup.geometry()),
        Err(EngineError::OtherVolume { .. })
    ));
    let larger = Geometry::new(32 * BLOCK, BlockSize::MIN).unwrap();
    assert!(matches!(
        open(volume(), larger),
        Err(EngineError::OtherGeometry { .. })
    ));
    fs::write(state.join("identity"), "garbage").unwrap();
    assert!(matches!(
        setup.try_open(),
        Err(EngineError::StateDamaged { .. })
    ));
}

#[test]
fn a_lost_or_damaged_file_of_the_state_costs_a_comparison_not_the_volume() {
    for name in [
        "tracking",
        "dirty.0",
        "intent",
        "spool.slots",
        "carry",
        "snapshots",
    ] {
        for damage in [true, false] {
            let setup = Setup::new(16);
            let engine = setup.create();
            write(&engine, 1, 1);
            engine.create_snapshot("", 0).unwrap();
            write(&engine, 2, 1);
            drop(engine);
            let path = setup.state().join(name);
            if damage {
                let file = File::options().write(true).open(&path).unwrap();
                file.write_all_at(b"damage", 3).unwrap();
                if name == "intent" {
                    file.write_all_at(b"damage", 4096).unwrap();
                }
            } else if name == "carry" || name == "snapshots" {
                continue;
            } else {
                fs::remove_file(&path).unwrap();
            }
            let (engine, trust) = setup.open();
            // A damaged intent page only widens what a later power loss would put in doubt.
            if name != "intent" || !damage {
                assert!(
                    matches!(trust, Trust::Everything { .. }),
                    "{name} {damage} {trust:?}"
                );
                assert_eq!(engine.tracked(extent(0, 16)).len().get(), 16);
                assert!(engine.list_snapshots().is_empty());
            }
            write(&engine, 3, 1);
            engine.begin_interval().unwrap();
        }
    }
}

/// An opening that makes lost files anew fails at each of its steps, where something stands in the way; the next one
/// finds whole files, and must not take their being empty for knowledge.
#[test]
fn files_are_made_anew_only_after_everything_is_in_doubt() {
    let lost = ["tracking", "dirty.0", "dirty.1", "spool.slots", "intent"];
    let obstacles = [
        "carry.tmp",
        "snapshots.tmp",
        "interval",
        "spool.data",
        "intent",
        "identity.tmp",
    ];
    for (lost, obstacle, reboot) in lost
        .iter()
        .flat_map(|lost| obstacles.map(|obstacle| (lost, obstacle)))
        .flat_map(|(lost, obstacle)| [(lost, obstacle, false), (lost, obstacle, true)])
    {
        let setup = Setup::new(16);
        let engine = setup.create();
        let interval = engine.begin_interval().unwrap();
        engine.commit_interval(interval.epoch).unwrap();
        write(&engine, 1, 1);
        let id = engine.create_snapshot("", 0).unwrap().id;
        write(&engine, 2, 1);
        let epoch = engine.begin_interval().unwrap().epoch;
        write(&engine, 3, 1);
        drop((interval, engine));

        fs::remove_file(setup.state().join(lost)).unwrap();
        let (path, aside) = (setup.state().join(obstacle), setup.dir.path().join("aside"));
        let moved = fs::rename(&path, &aside).is_ok();
        fs::create_dir(&path).unwrap();
        setup.try_open().unwrap_err();
        fs::remove_dir(&path).unwrap();
        if moved {
            fs::rename(&aside, &path).unwrap();
        }
        if reboot {
            super::crash::pretend_reboot(&setup);
        }
        let (engine, trust) = setup.open();
        let case = format!("{lost} {obstacle} {reboot} {trust:?}");
        assert_eq!(engine.tracked(extent(0, 16)).len().get(), 16, "{case}");
        assert!(engine.open_interval().is_none(), "{case}");
        assert!(engine.list_snapshots().is_empty(), "{case}");
        assert!(engine.epoch() > epoch, "{case}");
        let again = engine.create_snapshot("", 0).unwrap();
        assert!(again.id > id, "{case}");
    }
}

#[test]
fn a_file_cut_short_while_in_use_gives_errors_not_a_dead_process() {
    let setup = Setup::new(64);
    let engine = setup.create();
    engine
        .write(0, &vec![1; 64 * 4096], Durability::Volatile)
        .unwrap();
    let interval = engine.begin_interval().unwrap();
    let mut bytes = vec![0; 64 * 4096];
    engine.read(0, &mut bytes).unwrap();
    File::options()
        .write(true)
        .open(setup.file())
        .unwrap()
        .set_len(8 * BLOCK)
        .unwrap();
    let error = engine.read(32 * BLOCK, &mut bytes[..4096]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(
        interval
            .reader
            .read_blocks(extent(32, 1), &mut bytes[..4096])
            .is_err()
    );
    // It is no hole, which would be shipped as zeroes.
    assert!(interval.reader.data_extents(extent(0, 64)).is_err());
    assert!(engine.extents(0, 64 * BLOCK, 16).is_err());
    // The before-image can't be read: the block is not overwritten.
    assert!(
        engine
            .write(32 * BLOCK, &[2; 4096], Durability::Volatile)
            .is_err()
    );
    assert_eq!(at(&interval.reader, 3), 1);
}

#[test]
fn requests_outside_the_volume_or_after_the_close_are_refused() {
    let setup = Setup::new(16);
    let engine = setup.create();
    assert!(
        engine
            .write(16 * BLOCK, &[1], Durability::Volatile)
            .is_err()
    );
    assert!(
        engine
            .write(u64::MAX, &[1, 2], Durability::Volatile)
            .is_err()
    );
    assert!(engine.read(16 * BLOCK - 1, &mut [0, 0]).is_err());
    engine.write(16 * BLOCK, &[], Durability::Volatile).unwrap();
    engine.close().unwrap();
    engine.close().unwrap();
    let error = engine.write(0, &[1], Durability::Volatile).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESHUTDOWN));
    assert!(matches!(engine.begin_interval(), Err(EngineError::Closed)));
}
