//! Volumes of the engine `reflink` in a whole service, and volumes that change their engine.

use std::{fs, path::Path};

use tidemark_block::Coherence;
use tidemark_proto::{Reason, RpcError, capture::v1 as pb};

use super::{CLONING, Disk};
use crate::rig::{Rig, eventually, noise, state_dir, write};

const LEN: usize = 4 << 20;

async fn add(rig: &Rig, name: &str, file: &Path, engine: &str) -> Result<pb::Volume, RpcError> {
    rig.add_file(name, file, LEN, engine).await
}

async fn readopt(rig: &Rig, name: &str, engine: &str) -> Result<pb::Volume, RpcError> {
    let request = pb::ReadoptVolumeRequest {
        volume: name.to_owned(),
        engine: engine.to_owned(),
    };
    let answer = rig.client().await.readopt_volume(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(RpcError::from)
}

async fn try_remove(rig: &Rig, name: &str, force: bool) -> Result<String, RpcError> {
    let request = pb::RemoveVolumeRequest {
        volume: name.to_owned(),
        force,
    };
    let removed = rig.client().await.remove_volume(request).await?;
    Ok(removed.into_inner().left_behind)
}

async fn remove(rig: &Rig, name: &str) {
    assert_eq!(try_remove(rig, name, true).await.unwrap(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_that_are_out_of_reach_are_left_behind_only_where_that_is_wanted() {
    let Some(disk) = Disk::new("xfs", 512) else {
        return;
    };
    let mut rig = Rig::new().await;
    add(&rig, "data", &disk.path("data.img"), "reflink")
        .await
        .unwrap();
    rig.first_generation("data").await;
    let clones = disk.clones().unwrap();
    rig.stop_capture().await;
    disk.unmount();
    rig.start_capture().await;
    let error = try_remove(&rig, "data", false).await.unwrap_err();
    assert_eq!(error.reason, Reason::VolumeFailed);
    let path = clones.display().to_string();
    assert!(error.message.contains(&path), "{error}");
    assert_eq!(rig.volume("data").await.name, "data");

    // Nothing was done: mounted again, it is served on.
    disk.mount();
    eventually("the volume", || async {
        rig.volume("data").await.problem.is_empty().then_some(())
    })
    .await;
    rig.stop_capture().await;
    disk.unmount();
    rig.start_capture().await;
    assert_eq!(try_remove(&rig, "data", true).await.unwrap(), path);
    disk.mount();
    assert_eq!(disk.clones().as_deref(), Some(&*clones));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_its_workload_writes_itself_is_shipped_exactly() {
    for kind in CLONING {
        let Some(disk) = Disk::new(kind, 512) else {
            return;
        };
        let mut rig = Rig::new().await;
        let file = disk.path("data.img");
        let volume = add(&rig, "data", &file, "reflink").await.unwrap();
        assert_eq!(
            (&*volume.engine, &*volume.engine_why),
            ("reflink", "it was asked for")
        );
        assert_eq!((volume.nbd_uris.len(), &*volume.fuse_path), (0, ""));
        rig.first_generation("data").await;
        for round in 0..4 {
            write(&file, round, 12_345 * round, 300_000);
            let receipt = rig.ship("data").await;
            assert_eq!(receipt.generation.get(), round + 2);
            assert_eq!(receipt.coherence, Coherence::Crash);
            assert!(
                receipt
                    .reason
                    .to_string()
                    .ends_with("the engine does not see writes")
            );
            assert!(receipt.changed_blocks.get() <= 80, "{receipt:?}");
            assert!(
                rig.restore("data", 0).await == fs::read(&file).unwrap(),
                "{kind}"
            );
        }
        assert!(!rig.ship("data").await.created, "nothing was written");
        let scrubbed = rig.scrub("data").await.unwrap();
        assert_eq!(scrubbed.mismatches, 0);
        let shown = rig.volume("data").await;
        assert!(shown.cut_stall_us > 0 && shown.extents > 0, "{shown:?}");
        assert_eq!(shown.warning, "");

        // Nobody has to watch: what is written while nothing runs is shipped like everything else.
        rig.stop_capture().await;
        write(&file, 77, 1 << 20, 50_000);
        rig.start_capture().await;
        let receipt = rig.ship("data").await;
        assert!(receipt.changed_blocks.get() <= 16, "{receipt:?}");
        assert!(
            rig.restore("data", 0).await == fs::read(&file).unwrap(),
            "{kind}"
        );
        remove(&rig, "data").await;
        assert_eq!(disk.clones(), None);
        assert!(file.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_reflinked_file_are_read_and_a_rollback_is_refused() {
    let Some(disk) = Disk::new("xfs", 512) else {
        return;
    };
    let rig = Rig::new().await;
    let file = disk.path("data.img");
    add(&rig, "data", &file, "reflink").await.unwrap();
    write(&file, 1, 0, 1 << 20);
    let first = rig.snapshot("data", "first").await.snapshot;
    let then = fs::read(&file).unwrap();
    write(&file, 2, 500_000, 5000);
    let second = rig.snapshot("data", "second").await.snapshot;
    let mut image = vec![0; LEN];
    rig.read_snapshot("data", first, 0, &mut image)
        .await
        .unwrap();
    assert!(image == then);
    let end = rig
        .read_snapshot("data", second, first, &mut image)
        .await
        .unwrap();
    assert!(end.blocks_sent <= 3, "{end:?}");
    assert!(image == fs::read(&file).unwrap());
    // By NBD too, under its label.
    let by_nbd = rig.nbd("data@first").read(0, LEN).unwrap();
    assert!(by_nbd == then);

    let request = pb::RollbackVolumeRequest {
        volume: "data".to_owned(),
        snapshot: first,
        force: false,
    };
    let mut answers = rig
        .client()
        .await
        .rollback_volume(request)
        .await
        .unwrap()
        .into_inner();
    let refused = RpcError::from(answers.message().await.unwrap_err());
    assert_eq!(refused.reason, Reason::EngineUnsupported);
    assert!(
        refused.action.contains("tidemark snapshot read data"),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_was_missed_is_found_by_the_source_scrub() {
    let Some(disk) = Disk::new("xfs", 512) else {
        return;
    };
    let rig = Rig::new().await;
    let file = disk.path("data.img");
    add(&rig, "data", &file, "reflink").await.unwrap();
    write(&file, 1, 0, 1 << 20);
    let receipt = rig.ship("data").await;
    // As if the map of the clones had not told: the base's clone is not what was shipped.
    let clone = fs::read_dir(disk.clones().unwrap())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    write(&clone, 9, 40_960, 4096);
    let scrubbed = rig.scrub("data").await.unwrap();
    assert_eq!(scrubbed.mismatches, 1);
    eventually("an interval of the block", || async {
        let shown = rig.volume("data").await;
        (shown.changed_blocks == 0).then_some(())
    })
    .await;
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
    assert_eq!(
        rig.volume("data").await.base_generation,
        receipt.generation.get()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_is_changed_by_readopting_and_no_change_is_lost() {
    let Some(disk) = Disk::new("xfs", 512) else {
        return;
    };
    let mut rig = Rig::new().await;
    let file = disk.path("data.img");
    let volume = add(&rig, "data", &file, "").await.unwrap();
    assert_eq!(volume.engine, "intercept");
    assert!(
        volume.engine_why.starts_with("auto: "),
        "{}",
        volume.engine_why
    );
    rig.first_generation("data").await;
    rig.nbd("data").write(0, &noise(1, 100_000)).unwrap();
    rig.ship("data").await;
    rig.snapshot("data", "gone").await;
    rig.nbd("data").write(8192, &noise(2, 4096)).unwrap();

    let client = rig.nbd("data");
    let busy = readopt(&rig, "data", "reflink").await.unwrap_err();
    assert_eq!(busy.reason, Reason::VolumeInUse);
    drop(client);
    let volume = eventually("clients are gone", || async {
        readopt(&rig, "data", "reflink").await.ok()
    })
    .await;
    assert_eq!((&*volume.engine, volume.snapshots), ("reflink", 0));
    assert_eq!(
        volume.changed_blocks,
        LEN as u64 / 4096,
        "every block is compared"
    );
    let state = state_dir(&rig, "data").await;
    assert!(!state.join("identity").exists() && state.join("reflink").exists());
    write(&file, 3, 1 << 20, 10_000);
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
    rig.stop_capture().await;
    rig.start_capture().await;
    assert_eq!(rig.volume("data").await.engine, "reflink");
    write(&file, 4, 2 << 20, 10_000);

    // The same one again is a comparison, nothing else.
    assert_eq!(
        readopt(&rig, "data", "reflink").await.unwrap().engine,
        "reflink"
    );
    let volume = readopt(&rig, "data", "auto").await.unwrap();
    assert_eq!(volume.engine, "intercept");
    assert_eq!(disk.clones(), None);
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
    rig.nbd("data").write(0, &noise(5, 8192)).unwrap();
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
    assert_eq!(rig.scrub("data").await.unwrap().mismatches, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_engine_that_ends_early_leaves_the_old_one_or_the_new_one() {
    let Some(disk) = Disk::new("xfs", 512) else {
        return;
    };
    let mut rig = Rig::new().await;
    let file = disk.path("data.img");
    add(&rig, "data", &file, "reflink").await.unwrap();
    write(&file, 1, 0, 100_000);
    rig.ship("data").await;
    let state = state_dir(&rig, "data").await;
    let before = fs::read(state.join("volume")).unwrap();
    let kept = rig.path("kept");
    fs::create_dir(&kept).unwrap();
    for name in ["reflink", "uplink"] {
        fs::copy(state.join(name), kept.join(name)).unwrap();
    }
    readopt(&rig, "data", "intercept").await.unwrap();
    rig.stop_capture().await;

    // Before the record of the volume was written: the new engine's state is there in part.
    fs::write(state.join("volume"), &before).unwrap();
    fs::copy(kept.join("reflink"), state.join("reflink")).unwrap();
    rig.start_capture().await;
    assert_eq!(rig.volume("data").await.engine, "reflink");
    assert!(!state.join("identity").exists());
    write(&file, 2, 200_000, 100_000);
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());

    // Behind it: the old engine's state is still there.
    rig.stop_capture().await;
    fs::copy(state.join("reflink"), kept.join("reflink")).unwrap();
    rig.start_capture().await;
    readopt(&rig, "data", "intercept").await.unwrap();
    rig.stop_capture().await;
    fs::copy(kept.join("reflink"), state.join("reflink")).unwrap();
    rig.start_capture().await;
    assert!(!state.join("reflink").exists());
    rig.nbd("data").write(0, &noise(3, 8192)).unwrap();
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_does_not_fit_is_refused_and_the_volume_goes_on_with_its_own() {
    let Some(disk) = Disk::new("ext4", 64) else {
        return;
    };
    let rig = Rig::new().await;
    let file = disk.path("data.img");
    for (engine, reason) in [
        ("reflink", Reason::EngineUnsupported),
        ("magic", Reason::RequestInvalid),
    ] {
        let refused = add(&rig, "data", &file, engine).await.unwrap_err();
        assert_eq!(refused.reason, reason, "{refused:?}");
        assert!(!file.exists(), "it was made for this");
    }
    add(&rig, "data", &file, "").await.unwrap();
    rig.first_generation("data").await;
    let refused = readopt(&rig, "data", "reflink").await.unwrap_err();
    assert_eq!(refused.reason, Reason::EngineUnsupported);
    assert_eq!(rig.volume("data").await.engine, "intercept");
    rig.nbd("data").write(0, &noise(1, 8192)).unwrap();
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_front_end_auto_takes_clones_or_scans_or_says_what_is_missing() {
    let Some(disk) = Disk::new("btrfs", 512) else {
        return;
    };
    let rig = Rig::with(|config| config.nbd.0.clear()).await;
    let volume = add(&rig, "data", &disk.path("data.img"), "auto")
        .await
        .unwrap();
    assert_eq!(volume.engine, "reflink");
    assert!(
        volume.engine_why.contains("clones files"),
        "{}",
        volume.engine_why
    );
    let Some(other) = Disk::new("ext4", 64) else {
        return;
    };
    let volume = add(&rig, "other", &other.path("o.img"), "auto").await;
    assert_eq!(volume.unwrap().engine, "scan");
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let refused = add(&rig, "memory", &memory.path().join("m.img"), "auto")
        .await
        .unwrap_err();
    assert_eq!(refused.reason, Reason::EngineUnsupported);
    assert!(
        refused.action.starts_with("set nbd or fuse_mount, or "),
        "{refused:?}"
    );
    for why in ["can't be cloned", "it lies on tmpfs"] {
        assert!(refused.message.contains(why), "{refused:?}");
    }
}
