//! Files, folders and filesystems that don't do, and what they cost.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
};

use capture_svc::engine::{EngineError, EngineOptions, EngineSetup, Trust, reflink::Reflink};
use rustix::fs::{FallocateFlags, fallocate};
use tidemark_block::VolumeId;

use super::{BLOCK, BLOCKS, CLONING, Disk, Scene, VOLUME, geometry, new_file};

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
    let (engine, trust) = Reflink::readopt(EngineSetup {
        dir: scene.state.path(),
        volume: VOLUME,
        file: &path,
        geometry: geometry(),
        options,
    })
    .unwrap();
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
    let refused = Reflink::create(EngineSetup {
        dir: state.path(),
        volume: VOLUME,
        file: &path,
        geometry: geometry(),
        options,
    })
    .unwrap_err();
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
        Reflink::create(EngineSetup {
            dir: state.path(),
            volume: VOLUME,
            file: &path,
            geometry: geometry(),
            options,
        })
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
    let refused = Reflink::create(EngineSetup {
        dir: state.path(),
        volume: other,
        file: &path,
        geometry: geometry(),
        options,
    })
    .unwrap_err();
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
