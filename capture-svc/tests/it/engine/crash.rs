//! Closing, crashing, and opening again.

use super::*;

#[test]
fn a_clean_close_keeps_snapshots_and_tracking() {
    let setup = Setup::new(64);
    let engine = setup.create();
    write(&engine, 1, 1);
    let id = engine.create_snapshot("kept", 5).unwrap().id;
    write(&engine, 1, 2);
    write(&engine, 2, 2);
    let interval = engine.begin_interval().unwrap();
    let cut = interval.epoch;
    write(&engine, 3, 3);
    engine.close().unwrap();
    drop((interval, engine));
    let (engine, trust) = setup.open();
    assert_eq!(trust, Trust::Clean);
    let reader = engine.open_snapshot(id).unwrap();
    assert_eq!((at(&reader, 1), at(&reader, 2)), (1, 0));
    let interval = engine.open_interval().unwrap();
    assert_eq!((interval.epoch, &*interval.changed), (cut, &set(&[(1, 2)])));
    assert_eq!(at(&interval.reader, 3), 0);
    assert_eq!(engine.tracked(extent(0, 64)), set(&[(1, 3)]));
    engine.commit_interval(cut).unwrap();
    assert_eq!(engine.tracked(extent(0, 64)), set(&[(3, 1)]));
    let later = engine.create_snapshot("", 6).unwrap().id;
    assert_eq!(engine.changed_between(id, later).unwrap(), set(&[(1, 3)]));
}

/// Opens the state as if the machine had started again: the boot id in the identity is another.
pub(super) fn pretend_reboot(setup: &Setup) {
    use capture_core::engine::records::Identity;
    let path = setup.state().join("identity");
    let mut identity = Identity::decode(&fs::read(&path).unwrap()).unwrap();
    identity.file.boot[0] ^= 1;
    fs::write(&path, identity.encode()).unwrap();
}

#[test]
fn after_a_power_loss_the_intent_regions_are_in_doubt_and_snapshots_are_gone() {
    let setup = Setup::new(4096);
    let engine = setup.create();
    write(&engine, 1, 1);
    let interval = engine.begin_interval().unwrap();
    engine.commit_interval(interval.epoch).unwrap();
    write(&engine, 600, 1);
    engine.create_snapshot("", 0).unwrap();
    let epoch = engine.epoch();
    drop((interval, engine));
    pretend_reboot(&setup);
    let (engine, trust) = setup.open();
    // Region 0 is hot, region 2 has block 600.
    assert_eq!(
        trust,
        Trust::PowerLoss {
            doubtful: tidemark_block::BlockCount::new(512)
        }
    );
    assert_eq!(
        engine.tracked(extent(0, 4096)),
        set(&[(0, 256), (512, 256)])
    );
    assert!(engine.list_snapshots().is_empty());
    assert!(engine.epoch() > epoch);
    let interval = engine.begin_interval().unwrap();
    assert_eq!(interval.changed.len().get(), 512);
    engine.commit_interval(interval.epoch).unwrap();
    let interval = engine.begin_interval().unwrap();
    engine.commit_interval(interval.epoch).unwrap();
    assert_eq!(engine.stats().intent_regions, 0);
}

#[test]
fn a_state_on_another_mount_or_with_a_failed_sync_is_as_after_a_power_loss() {
    use capture_core::engine::records::Identity;
    let changes: [fn(&mut Identity); 3] = [
        |identity| identity.state.mount ^= 1,
        |identity| identity.state.device ^= 1,
        |identity| identity.failed = true,
    ];
    for change in changes {
        let setup = Setup::new(16);
        let engine = setup.create();
        write(&engine, 1, 1);
        drop(engine);
        let path = setup.state().join("identity");
        let mut identity = Identity::decode(&fs::read(&path).unwrap()).unwrap();
        assert!(!identity.clean && !identity.failed);
        change(&mut identity);
        fs::write(&path, identity.encode()).unwrap();
        let (engine, trust) = setup.open();
        assert!(matches!(trust, Trust::PowerLoss { .. }), "{trust:?}");
        assert_eq!(engine.tracked(extent(0, 16)), set(&[(0, 16)]));
        // Intent read from a doubtful file is written again before it counts.
        write(&engine, 2, 1);
        drop(engine);
        assert_eq!(setup.open().1, Trust::ProcessCrash);
    }
}

#[test]
fn a_clean_mark_follows_the_syncs() {
    for close in [true, false] {
        let setup = Setup::new(64);
        let engine = setup.create();
        write(&engine, 1, 1);
        let id = engine.create_snapshot("", 0).unwrap().id;
        write(&engine, 1, 2);
        if close {
            engine.close().unwrap();
        }
        drop(engine);
        pretend_reboot(&setup);
        let (engine, trust) = setup.open();
        if close {
            assert_eq!(trust, Trust::Clean);
            assert_eq!(at(&engine.open_snapshot(id).unwrap(), 1), 1);
        } else {
            assert!(matches!(trust, Trust::PowerLoss { .. }));
            assert!(matches!(
                engine.open_snapshot(id),
                Err(EngineError::NoSuchSnapshot(_))
            ));
        }
        // The mark is taken off before the first request: a crash now is a crash.
        write(&engine, 2, 1);
        drop(engine);
        pretend_reboot(&setup);
        assert!(matches!(setup.open().1, Trust::PowerLoss { .. }));
    }
}

/// Every rule of the page has a test of its name.
#[test]
fn every_crash_rule_has_its_test() {
    fn sources(dir: &Path, text: &mut String) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }
    let mut text = String::new();
    for dir in ["src", "tests", "core/src", "core/tests"] {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir), &mut text);
    }
    let page = include_str!("../../../../docs/CRASH-RULES.md");
    let rules: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("- `")?.split('`').next())
        .collect();
    assert!(rules.len() > 20);
    for rule in rules {
        assert!(
            text.contains(&format!("fn {rule}()")),
            "rule {rule} has no test"
        );
    }
}

const CHILD: &str = "TIDEMARK_TEST_ENGINE_CHILD";

/// What the killed process does: writes, cuts, snapshots, until it is killed. Each block holds its number and a
/// count that only rises, so that a snapshot can be checked against what was told of it.
#[test]
#[ignore = "run by the test below, in a process of its own"]
fn child_of_the_kill_test() {
    let Ok(dir) = std::env::var(CHILD) else {
        return;
    };
    let dir = PathBuf::from(dir);
    let geometry = Geometry::new(2048 * BLOCK, BlockSize::MIN).unwrap();
    let (state, file) = (dir.join("state"), dir.join("volume.img"));
    let (engine, _) = Engine::open(EngineSetup {
        dir: &state,
        volume: volume(),
        file: &file,
        geometry,
        options: EngineOptions::default(),
    })
    .unwrap();
    let mut handles = Vec::new();
    for thread in 0..3_u64 {
        let engine = Arc::clone(&engine);
        handles.push(std::thread::spawn(move || {
            let mut random = thread + 1;
            loop {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let block = thread * 600 + (random >> 33) % 600;
                let count = 1 + (random >> 20) % 3;
                let mut bytes = vec![0; usize::try_from(count * BLOCK).unwrap()];
                bytes
                    .chunks_exact_mut(8)
                    .for_each(|word| word.copy_from_slice(&random.to_le_bytes()));
                engine
                    .write(block * BLOCK, &bytes, Durability::Volatile)
                    .unwrap();
            }
        }));
    }
    let mut n = 0;
    loop {
        let info = engine.create_snapshot("", n).unwrap();
        let image = whole(&engine.open_snapshot(info.id).unwrap());
        // The image as read before the crash; written beside and renamed, so that it is whole.
        let path = dir.join(format!("image.{}", info.id));
        fs::write(dir.join("image.tmp"), image).unwrap();
        fs::rename(dir.join("image.tmp"), path).unwrap();
        n += 1;
        if n % 2 == 0 {
            let oldest = engine.list_snapshots()[0].id;
            engine.delete_snapshot(oldest).unwrap();
        }
    }
}

#[test]
fn a_killed_process_loses_nothing() {
    let setup = Setup::new(2048);
    let engine = setup.create();
    let interval = engine.begin_interval().unwrap();
    engine.commit_interval(interval.epoch).unwrap();
    drop((interval, engine));
    let mut base = contents(&setup.file());
    for round in 0..6 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "engine::crash::child_of_the_kill_test",
                "--exact",
                "--ignored",
            ])
            .env(CHILD, setup.dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Until it has taken some snapshots more.
        let images = || {
            fs::read_dir(setup.dir.path())
                .unwrap()
                .filter(|entry| {
                    let name = entry.as_ref().unwrap().file_name();
                    name.to_str().unwrap().starts_with("image.")
                })
                .count()
        };
        let before = images();
        while images() < before + 5 + round {
            assert!(
                child.try_wait().unwrap().is_none(),
                "the child runs until it is killed"
            );
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let (engine, trust) = setup.open();
        assert_eq!(trust, Trust::ProcessCrash);
        let now = contents(&setup.file());
        let tracked = engine.tracked(extent(0, 2048));
        for block in 0..2048_usize {
            let range = block * 4096..(block + 1) * 4096;
            if now[range.clone()] != base[range] {
                assert!(
                    tracked.contains(BlockIndex::new(block as u64)),
                    "block {block} is tracked"
                );
            }
        }
        let mut checked = 0;
        for snapshot in engine.list_snapshots() {
            let reader = engine.open_snapshot(snapshot.id).unwrap();
            let image = whole(&reader);
            if let Ok(told) = fs::read(setup.dir.path().join(format!("image.{}", snapshot.id))) {
                assert!(image == told, "snapshot {} is as it was", snapshot.id);
                checked += 1;
            }
        }
        assert!(checked > 0);
        let interval = engine.begin_interval().unwrap();
        base = whole(&interval.reader);
        assert!(base == now);
        engine.commit_interval(interval.epoch).unwrap();
        assert!(engine.tracked(extent(0, 2048)).is_empty());
    }
}
