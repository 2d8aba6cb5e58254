//! A state that 0.1.0 wrote, as it lies in `tests/golden`: opened, it loses nothing, and is as safe as a new one.

use std::time::UNIX_EPOCH;

use capture_core::engine::records::{IDENTITY_MAGIC, Identity, Place};
use tidemark_block::wire::{seal, unseal};

use super::*;

const BLOCKS: u64 = 1024;

/// How it was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Closed,
    Killed,
}

/// The volume and its state, as the release left them: on this machine, in this boot.
fn left(how: Left) -> Setup {
    let mut setup = Setup::new(BLOCKS);
    setup.options.spool_bytes_max = 8 * BLOCK;
    setup.options.spool_index_memory_max = 40 * 64;
    // A new state tells what identifies the volume file and the filesystem.
    let probe = setup.dir.path().join("probe");
    let file = File::options().write(true).open(setup.file()).unwrap();
    for (block, byte) in NOW {
        file.write_all_at(&[*byte; 4096], block * BLOCK).unwrap();
    }
    drop(file);
    let options = EngineOptions::default();
    drop(
        Engine::create(EngineSetup {
            dir: &probe,
            volume: volume(),
            file: &setup.file(),
            geometry: setup.geometry(),
            options,
        })
        .unwrap(),
    );
    let told = Identity::decode(&fs::read(probe.join("identity")).unwrap()).unwrap();

    let golden = match how {
        Left::Closed => "closed",
        Left::Killed => "killed",
    };
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/state-0.1.0-{golden}"));
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .args([&golden, &setup.state()])
        .status();
    assert!(copied.unwrap().success());
    let path = setup.state().join("identity");
    let found = Identity::decode(&fs::read(&path).unwrap()).unwrap();
    assert!(found.old && found.clean == (how == Left::Closed));
    let tracking = fs::metadata(setup.state().join("tracking")).unwrap();
    let born = tracking.created().map_or((0, 0), |time| {
        let since = time.duration_since(UNIX_EPOCH).unwrap();
        (
            i64::try_from(since.as_secs()).unwrap(),
            since.subsec_nanos(),
        )
    });
    let identity = Identity {
        file: told.file,
        state: Place {
            inode: tracking.ino(),
            born_s: born.0,
            born_ns: born.1,
            ..told.state
        },
        ..found
    };
    write_old(&path, &identity);
    setup
}

/// As 0.1.0 wrote it: without the digests.
fn write_old(path: &Path, identity: &Identity) {
    let encoded = identity.encode();
    let (_, payload) = unseal(IDENTITY_MAGIC, 2, &encoded).unwrap();
    fs::write(path, seal(IDENTITY_MAGIC, 1, &payload[..172])).unwrap();
}

/// What is in the blocks: as of the first snapshot, the second one, the interval's cut, and now.
const ONE: &[(u64, u8)] = &[(1, 1), (2, 1), (3, 2), (300, 1)];
const TWO: &[(u64, u8)] = &[(1, 3), (2, 1), (3, 2), (300, 1), (600, 3)];
const CUT: &[(u64, u8)] = &[(1, 4), (2, 1), (3, 4), (300, 1), (600, 3)];
const NOW: &[(u64, u8)] = &[(1, 4), (2, 5), (3, 6), (300, 1), (600, 3), (900, 5)];

fn image(blocks: &[(u64, u8)]) -> Vec<u8> {
    let mut image = vec![0; usize::try_from(BLOCKS * BLOCK).unwrap()];
    for (block, byte) in blocks {
        let at = usize::try_from(block * BLOCK).unwrap();
        image[at..at + 4096].fill(*byte);
    }
    image
}

fn assert_nothing_is_lost(setup: &Setup, trust: &Trust) {
    let (engine, found) = setup.open();
    assert_eq!(found, *trust);
    assert_eq!(engine.damage_at_opening(), []);
    assert_eq!(
        engine.tracked(extent(0, BLOCKS)),
        set(&[(1, 3), (600, 1), (700, 1), (900, 1)])
    );
    assert_eq!(engine.stats().intent_regions, 4);
    let snapshots = engine.list_snapshots();
    let labels: Vec<_> = snapshots
        .iter()
        .map(|s| (s.id.0, s.label.as_str()))
        .collect();
    assert_eq!(labels, [(1, "one"), (2, "two")]);
    for (snapshot, blocks) in snapshots.iter().zip([ONE, TWO]) {
        assert!(whole(&engine.open_snapshot(snapshot.id).unwrap()) == image(blocks));
    }
    let (one, two) = (snapshots[0].id, snapshots[1].id);
    assert_eq!(
        engine.changed_between(one, two).unwrap(),
        set(&[(1, 1), (600, 1)])
    );
    let interval = engine.open_interval().unwrap();
    assert_eq!(*interval.changed, set(&[(1, 1), (3, 1), (600, 1)]));
    assert!(whole(&interval.reader) == image(CUT));
    assert!(contents(&setup.file()) == image(NOW));
}

#[test]
fn a_state_of_0_1_0_is_converted_and_loses_nothing() {
    for (how, trust) in [
        (Left::Closed, Trust::Clean),
        (Left::Killed, Trust::ProcessCrash),
    ] {
        let setup = left(how);
        assert_nothing_is_lost(&setup, &trust);
        let identity = || Identity::decode(&fs::read(setup.state().join("identity")).unwrap());
        assert!(!identity().unwrap().old);
        // And once more, by what is written today.
        assert_nothing_is_lost(&setup, &Trust::ProcessCrash);
        let (engine, _) = setup.open();
        let snapshots = engine.list_snapshots();
        let third = engine.create_snapshot("three", 3).unwrap();
        let changed = engine.changed_between(snapshots[1].id, third.id).unwrap();
        assert_eq!(
            changed,
            set(&[(1, 3), (900, 1)]),
            "over old and new records"
        );
        engine.close().unwrap();
        drop(engine);
        assert!(identity().unwrap().seals.is_some());
        let (engine, trust) = setup.open();
        assert_eq!((trust, engine.list_snapshots().len()), (Trust::Clean, 3));
    }
}

#[test]
fn a_conversion_that_ends_early_is_gone_on_with() {
    let obstacles = [
        "carry.tmp",
        "interval.tmp",
        "snapshots.tmp",
        "dirty.0.tmp",
        "dirty.1.tmp",
        "intent.tmp",
        "identity.tmp",
    ];
    for (how, obstacle) in [Left::Closed, Left::Killed]
        .into_iter()
        .flat_map(|how| obstacles.map(|obstacle| (how, obstacle)))
    {
        let setup = left(how);
        let path = setup.state().join(obstacle);
        fs::create_dir(&path).unwrap();
        setup.try_open().unwrap_err();
        fs::remove_dir(&path).unwrap();
        let trust = match how {
            Left::Closed => Trust::Clean,
            Left::Killed => Trust::ProcessCrash,
        };
        println!("{how:?} {obstacle}");
        assert_nothing_is_lost(&setup, &trust);
    }
}

#[test]
fn a_state_of_0_1_0_that_a_power_loss_left_is_compared_where_it_was_written() {
    let setup = left(Left::Killed);
    let path = setup.state().join("identity");
    let mut identity = Identity::decode(&fs::read(&path).unwrap()).unwrap();
    identity.file.boot[0] ^= 1;
    write_old(&path, &identity);
    let (engine, trust) = setup.open();
    assert!(matches!(trust, Trust::PowerLoss { .. }), "{trust:?}");
    assert_eq!(engine.tracked(extent(0, BLOCKS)).len().get(), BLOCKS);
    assert_eq!(engine.damage_at_opening(), []);
}

#[test]
fn a_damaged_state_of_0_1_0_is_compared_as_a_whole() {
    for name in [
        "carry",
        "interval",
        "snapshots",
        "tracking",
        "dirty.0",
        "dirty.1",
    ] {
        let setup = left(Left::Killed);
        let path = setup.state().join(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[20] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (engine, trust) = setup.open();
        let found: Vec<_> = engine
            .damage_at_opening()
            .iter()
            .map(|d| d.file.to_string())
            .collect();
        assert_eq!(found, [name]);
        match trust {
            Trust::Everything { reason } => assert!(reason.contains(name), "{reason}"),
            other => panic!("{name} {other:?}"),
        }
        assert_eq!(engine.tracked(extent(0, BLOCKS)).len().get(), BLOCKS);
        // A number is never given twice.
        assert!(engine.create_snapshot("", 0).unwrap().id.0 > 2);
    }
}
