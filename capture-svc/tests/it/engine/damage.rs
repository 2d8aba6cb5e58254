//! Damage to the state: one bit flipped at every byte of every file, files cut short, gone, or another volume's. Each is
//! found and named; nothing wrong is served, and nothing that has to be shipped is missed.
//!
//! A small volume has everything that a state can hold: an open interval, a carry, snapshots with before-images, records
//! of changes, recorded blocks, blocks dirty in the open epoch. It is left closed cleanly, killed, or as a loss of power
//! leaves it. Then, damage by damage, it is opened and held to what it was.
//!
//! A flip that is in nothing which is ever read may go unnoticed: then the opening has to make of the state, byte by
//! byte, what it makes of the undamaged one.

use std::collections::BTreeMap;

use super::*;

#[path = "damage/scene.rs"]
mod scene;

use scene::{Left, Scene, Shown, Verdict};

const ALL: [Left; 3] = [Left::Closed, Left::Killed, Left::PowerLost];
/// Updated in place, with words behind a header.
const MAPPED: [&str; 4] = ["tracking", "dirty.0", "dirty.1", "spool.slots"];

/// Counts verdicts by file.
#[derive(Default)]
struct Counts(BTreeMap<(String, Verdict), u64>);

impl Counts {
    fn add(&mut self, name: &str, verdict: Verdict) {
        *self.0.entry((name.to_owned(), verdict)).or_default() += 1;
    }

    fn of(&self, name: &str, verdict: Verdict) -> u64 {
        let count = self.0.get(&(name.to_owned(), verdict));
        count.copied().unwrap_or(0)
    }

    /// Prints them; nothing but these files may have damage that nobody is told of.
    fn show(&self, what: impl std::fmt::Debug, unread: &[&str]) {
        for ((name, verdict), count) in &self.0 {
            println!("{what:?}: {count} of {name}: {verdict:?}");
            let may_be = *verdict != Verdict::Nothing || unread.contains(&name.as_str());
            assert!(may_be, "{count} of {name} passed unnoticed");
        }
    }
}

/// What is left out of the parts that have thousands of bytes, since every one of them is flipped elsewhere: of words and
/// pages in `core/tests/it/damage.rs`, before the words beside `mapped`, of what a close has sealed beside `seals`.
fn is_left_out(name: &str, at: usize) -> bool {
    let first = match name {
        "intent" => 256,
        _ if MAPPED.contains(&name) && at < 4096 => 96,
        "tracking" => 4096 + 128,
        _ => return false,
    };
    at >= first && !at.is_multiple_of(if at < 4096 { 101 } else { 13 })
}

/// One bit at every byte of the files that an opening reads, but for what is left out.
fn flip_everywhere(left: Left) -> Counts {
    let scene = Scene::new(left, volume());
    let mut counts = Counts::default();
    let read = |name: &&String| !name.starts_with("changes") && *name != "spool.data";
    for name in scene.files.keys().filter(read) {
        for at in (0..scene.files[name].len()).filter(|at| !is_left_out(name, *at)) {
            let _shown = Shown(format!("{left:?}, byte {at} of {name}"));
            scene.put_back();
            let mut bytes = scene.files[name].clone();
            bytes[at] ^= 1 << (at % 8);
            scene.put(name, &bytes);
            counts.add(name, scene.judge(name));
        }
    }
    counts
}

#[test]
fn a_flipped_bit_of_a_closed_state_is_found_and_named() {
    flip_everywhere(Left::Closed).show(Left::Closed, &[]);
}

#[test]
fn a_flipped_bit_of_a_killed_process_s_state_is_found_and_named() {
    let counts = flip_everywhere(Left::Killed);
    // Entries that are free, recorded blocks that are none.
    counts.show(Left::Killed, &["spool.slots", "tracking"]);
    assert!(counts.of("spool.slots", Verdict::Named) > 500);
    assert!(counts.of("tracking", Verdict::Everything) > 300);
}

#[test]
fn a_flipped_bit_after_a_loss_of_power_is_found_and_named() {
    flip_everywhere(Left::PowerLost).show(Left::PowerLost, &MAPPED);
}

#[test]
fn a_file_of_the_state_that_is_cut_short_or_too_long_is_found_and_named() {
    let mut counts = Counts::default();
    for left in ALL {
        let scene = Scene::new(left, volume());
        for (name, bytes) in &scene.files {
            let step = if bytes.len() > 1000 { 509 } else { 61 };
            let shorter = (0..bytes.len()).step_by(step);
            let whole = (0..bytes.len())
                .step_by(64)
                .filter(|length| length % 4096 < 128);
            for length in shorter
                .chain(whole)
                .chain([bytes.len() + 1, bytes.len() + 8])
            {
                let _shown = Shown(format!("{left:?}, {length} bytes of {name}"));
                let entries = length
                    .checked_sub(4096)
                    .is_some_and(|n| n.is_multiple_of(64));
                if left == Left::PowerLost && name == "spool.slots" && entries {
                    // Only a smaller number of entries, of which none is used any more.
                    continue;
                }
                scene.put_back();
                let mut other = bytes.clone();
                other.resize(length, 0);
                scene.put(name, &other);
                counts.add(name, scene.judge(name));
            }
        }
    }
    // The spool's bytes beyond those that are used; and of cuts that power loss has taken, all of them.
    let unread = ["spool.data", "changes/4", "changes/5"];
    counts.show("cut short", &unread);
    assert!(counts.of("spool.data", Verdict::Named) > 50);
    assert!(counts.of("changes/4", Verdict::Named) > 20);
}

#[test]
fn a_file_of_the_state_that_is_gone_is_missed() {
    let mut counts = Counts::default();
    for left in ALL {
        let scene = Scene::new(left, volume());
        for name in scene.files.keys() {
            let _shown = Shown(format!("{left:?}, no {name}"));
            scene.put_back();
            fs::remove_file(scene.setup.state().join(name)).unwrap();
            counts.add(name, scene.judge(name));
        }
        let _shown = Shown(format!("{left:?}, no changes"));
        scene.put_back();
        fs::remove_dir_all(scene.setup.state().join("changes")).unwrap();
        counts.add("changes/4", scene.judge("changes/4"));
    }
    // One of them no snapshot of these asks for.
    counts.show("gone", &["spool.data", "changes/4", "changes/5"]);
    assert_eq!(counts.of("changes/4", Verdict::Named), 4);
    assert_eq!(counts.of("spool.data", Verdict::Named), 2);
}

#[test]
fn a_file_of_the_state_that_the_disk_cannot_read_is_named_and_costs_what_a_damaged_one_does() {
    for left in ALL {
        let scene = Scene::new(left, volume());
        for name in ["carry", "interval", "snapshots", "identity"] {
            let _shown = Shown(format!("{left:?}, {name}"));
            scene.put_back();
            let path = scene.make_unreadable(name);
            let verdict = scene.judge(name);
            if name == "identity" {
                assert_eq!(verdict, Verdict::Refused);
                let (engine, trust) = scene.setup.readopt().unwrap();
                assert!(matches!(trust, Trust::Everything { .. }), "{trust:?}");
                let found = scene.hold(&engine, trust);
                assert_eq!(found.tracked.len().get(), scene::BLOCKS);
            } else {
                assert_eq!(verdict, Verdict::Everything);
            }
            // It was written anew, and is believed.
            assert!(!path.is_symlink());
            let (engine, trust) = scene.setup.open();
            assert_eq!(
                (trust, engine.damage_at_opening()),
                (Trust::ProcessCrash, &[][..])
            );
        }
        // Found while others of the files are made anew.
        scene.put_back();
        let path = scene.make_unreadable("snapshots");
        scene.put("tracking", b"damaged");
        assert_eq!(scene.judge("tracking"), Verdict::Everything);
        assert!(!path.is_symlink());
    }
}

#[test]
fn a_file_of_another_volume_or_in_the_place_of_another_is_found_and_named() {
    let mut counts = Counts::default();
    for left in ALL {
        let scene = Scene::new(left, volume());
        let other = Scene::new(left, VolumeId::from_bytes([99; 16]));
        for name in scene.files.keys() {
            let mut instead: Vec<_> = scene
                .files
                .iter()
                .filter(|(from, _)| *from != name)
                .collect();
            instead.extend(other.files.get_key_value(name));
            for (from, bytes) in instead {
                let _shown = Shown(format!("{left:?}, {from} in place of {name}"));
                scene.put_back();
                scene.put(name, bytes);
                counts.add(name, scene.judge(name));
            }
        }
    }
    counts.show("swapped", &["spool.data", "changes/4", "changes/5"]);
    assert!(counts.of("spool.data", Verdict::Named) > 10);
}

#[test]
fn a_flipped_bit_of_a_before_image_is_found_by_whoever_reads_the_block() {
    let scene = Scene::new(Left::Killed, volume());
    scene.put_back();
    let (engine, trust) = scene.setup.open();
    assert_eq!(scene.hold(&engine, trust).refused, 0);
    let used: BTreeMap<u64, u64> = scene.files["spool.slots"][4096..]
        .chunks_exact(64)
        .filter(|entry| entry[..6] == *b"TMSLOT")
        .map(|entry| [24, 8].map(|at| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap())))
        .map(|[slot, block]| (slot, block))
        .collect();
    let path = scene.setup.state().join("spool.data");
    let spool = File::options().write(true).open(path).unwrap();
    let cuts = scene.readers(&engine);
    let (mut found, mut unread) = (0, 0);
    for (at, byte) in (0_u64..).zip(&scene.files["spool.data"]) {
        let _shown = Shown(format!("byte {at} of spool.data"));
        spool.write_all_at(&[byte ^ 1 << (at % 8)], at).unwrap();
        let blocks = used.get(&(at / BLOCK));
        let refused: u64 = cuts
            .iter()
            .map(|(reader, image)| scene::right_or_refused(reader, image, blocks))
            .sum();
        spool.write_all_at(&[*byte], at).unwrap();
        assert_eq!(refused > 0, blocks.is_some());
        found += u64::from(refused > 0);
        unread += u64::from(refused == 0);
    }
    println!("{found} found, {unread} in slots that are free");
    assert!(found >= 3 * BLOCK);
}

#[test]
fn a_flipped_bit_of_the_records_of_changes_makes_every_block_one_that_may_have_changed() {
    let scene = Scene::new(Left::Killed, volume());
    scene.put_back();
    let engine = scene.setup.open().0;
    let snapshots = engine.list_snapshots();
    let three = engine.create_snapshot("three", 3).unwrap();
    let pairs = [
        (snapshots[0].id, snapshots[1].id),
        (snapshots[1].id, three.id),
    ];
    let sound = pairs.map(|(older, newer)| engine.changed_between(older, newer).unwrap());
    for (name, bytes) in scene
        .files
        .iter()
        .filter(|(name, _)| name.starts_with("changes"))
    {
        for at in 0..bytes.len() {
            let _shown = Shown(format!("byte {at} of {name}"));
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            scene.put(name, &flipped);
            let before = engine.stats().damaged;
            let found = pairs.map(|(older, newer)| engine.changed_between(older, newer).unwrap());
            let whole = found
                .iter()
                .filter(|found| found.len().get() == scene::BLOCKS);
            assert_eq!(whole.count(), 1, "one of them reads it");
            assert!(
                found
                    .iter()
                    .zip(&sound)
                    .all(|(found, sound)| scene::covers(found, sound))
            );
            assert_eq!(engine.stats().damaged, before + 1, "it is told");
        }
        scene.put(name, bytes);
    }
    assert_eq!(
        pairs.map(|(older, newer)| engine.changed_between(older, newer).unwrap()),
        sound
    );
}

#[test]
fn a_lost_identity_is_made_up_for_by_a_readoption() {
    for (left, gone) in ALL
        .into_iter()
        .flat_map(|left| [(left, true), (left, false)])
    {
        let scene = Scene::new(left, volume());
        scene.put_back();
        let path = scene.setup.state().join("identity");
        let spoil = || match gone {
            true => fs::remove_file(&path).unwrap(),
            false => fs::write(&path, "damaged").unwrap(),
        };
        spoil();
        let refused = scene.setup.try_open();
        assert!(
            matches!(refused, Err(EngineError::StateDamaged { .. })),
            "{refused:?}"
        );
        let (engine, trust) = scene.setup.readopt().unwrap();
        assert!(matches!(trust, Trust::Everything { .. }), "{trust:?}");
        let found = scene.hold(&engine, trust);
        assert_eq!(found.tracked.len().get(), scene::BLOCKS);
        assert!(found.epoch > scene.sound.as_ref().unwrap().epoch);
        assert!(
            engine.create_snapshot("", 0).unwrap().id.0 > 2,
            "numbers never come back"
        );
        drop(engine);
        let (engine, trust) = scene.setup.open();
        assert_eq!(trust, Trust::ProcessCrash);
        drop(engine);

        // Of a state of today's no record may be missing, whatever became of the identity.
        for record in ["snapshots", "carry", "interval"] {
            let _shown = Shown(format!("{left:?}, no identity, no {record}"));
            scene.put_back();
            spoil();
            fs::remove_file(scene.setup.state().join(record)).unwrap();
            let (engine, trust) = scene.setup.readopt().unwrap();
            let found = scene.hold(&engine, trust);
            let named: Vec<_> = found.damage.iter().map(|d| d.file.to_string()).collect();
            assert_eq!(named, [record]);
            assert_eq!(found.tracked.len().get(), scene::BLOCKS);
            assert!(engine.create_snapshot("", 0).unwrap().id.0 > 2);
        }

        spoil();
        fs::write(scene.setup.state().join("tracking"), "damaged").unwrap();
        let lost = scene.setup.readopt();
        assert!(
            matches!(lost, Err(EngineError::StateLost { .. })),
            "{lost:?}"
        );
    }
}

#[test]
fn what_a_reader_lets_go_of_after_the_close_leaves_the_state_as_it_was_closed() {
    let setup = Setup::new(16);
    let engine = setup.create();
    write(&engine, 1, 1);
    let id = engine.create_snapshot("", 0).unwrap().id;
    write(&engine, 1, 2);
    let reader = engine.open_snapshot(id).unwrap();
    engine.delete_snapshot(id).unwrap();
    engine.close().unwrap();
    drop((reader, engine));
    let (engine, trust) = setup.open();
    assert_eq!((trust, engine.damage_at_opening()), (Trust::Clean, &[][..]));
    assert_eq!(engine.stats().spool_used, 0);
}

#[test]
fn an_opening_of_a_closed_state_that_ends_early_is_followed_by_one_that_trusts_it() {
    for obstacle in ["identity.tmp", "changes/6.tmp", "carry.tmp"] {
        let scene = Scene::new(Left::Closed, volume());
        scene.put_back();
        let path = scene.setup.state().join(obstacle);
        fs::create_dir(&path).unwrap();
        scene.setup.try_open().unwrap_err();
        fs::remove_dir(&path).unwrap();
        let found = scene.open().unwrap();
        assert_eq!(
            (found.trust, found.damage, found.snapshots),
            (Trust::Clean, vec![], vec![1, 2])
        );
    }
}
