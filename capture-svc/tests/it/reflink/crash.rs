//! What a crash, a loss of power or somebody else's hand leaves of clones and their record.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
};

use capture_svc::engine::{EngineError, EngineSetup, Trust, reflink::Reflink};

use super::{BLOCK, BLOCKS, Scene, VOLUME, geometry, whole};

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
        let (engine, trust) = Reflink::readopt(EngineSetup {
            dir: state,
            volume: VOLUME,
            file: &path,
            geometry: geometry(),
            options,
        })
        .unwrap();
        assert!(matches!(trust, Trust::Everything { .. }));
        scene.engine = Some(engine);
        assert!(scene.engine().list_snapshots().is_empty());
        let cut = scene.ship(&mut image);
        assert_eq!(cut.changed.len().get(), BLOCKS as u64);
        assert!(image == fs::read(scene.file()).unwrap());
    }
}
