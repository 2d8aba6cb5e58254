//! Volumes of the engine `scan` in a whole service.

use std::{fs, os::unix::fs::FileExt, path::Path};

use capture_svc::config::{EngineSetting, NbdListens, Span};
use tidemark_block::{Coherence, block_checksum};
use tidemark_proto::{Reason, RpcError, capture::v1 as pb};

use super::Disk;
use crate::rig::{Rig, eventually, state_dir, write};

const LEN: usize = 32 << 20;

async fn add(rig: &Rig, name: &str, file: &Path, engine: &str) -> Result<pb::Volume, RpcError> {
    rig.add_file(name, file, LEN, engine).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_on_any_local_filesystem_is_shipped_exactly() {
    let Some(disk) = Disk::new("ext4", 128) else {
        return;
    };
    let mut rig = Rig::with(|config| {
        config.nbd = NbdListens(Vec::new());
        config.engine = EngineSetting::Auto;
        config.lull_wait_max = Span::from_secs(5);
    })
    .await;
    let file = disk.path("data.img");
    let volume = add(&rig, "data", &file, "").await.unwrap();
    let why = "auto: no front end is configured, and the file can't be cloned, or not in time";
    assert_eq!((&*volume.engine, &*volume.engine_why), ("scan", why));
    rig.first_generation("data").await;
    for round in 0..4 {
        write(&file, round, 12_345 * round, 300_000);
        let receipt = rig.ship("data").await;
        assert_eq!(receipt.generation.get(), round + 2);
        assert_eq!(receipt.coherence, Coherence::Crash);
        assert!(receipt.changed_blocks.get() <= 80, "{receipt:?}");
        assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
    }
    assert!(!rig.ship("data").await.created, "nothing was written");
    // Each cut compares everything: a scrub has nothing to add.
    let scrubbed = rig.scrub("data").await.unwrap();
    assert_eq!(scrubbed.mismatches, 0);

    // Nobody has to watch: what is written while nothing runs is shipped like everything else.
    rig.stop_capture().await;
    write(&file, 77, 1 << 20, 50_000);
    rig.start_capture().await;
    let receipt = rig.ship("data").await;
    assert!(receipt.changed_blocks.get() <= 16, "{receipt:?}");
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn under_quiesce_a_cut_is_quiesced_and_an_unchanged_file_costs_nothing() {
    let Some(disk) = Disk::new("ext4", 128) else {
        return;
    };
    let rig = Rig::with(|config| {
        config.quiesce_pre = "true".into();
        config.quiesce_post = "true".into();
    })
    .await;
    let file = disk.path("data.img");
    add(&rig, "data", &file, "scan").await.unwrap();
    rig.first_generation("data").await;
    write(&file, 1, 5000, 100_000);
    tokio::time::sleep(std::time::Duration::from_millis(150)).await;
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.coherence, Coherence::Quiesced);
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
    assert!(!rig.ship("data").await.created);
    let scrubbed = rig.scrub("data").await.unwrap();
    assert_eq!(
        (scrubbed.mismatches, scrubbed.blocks_changed),
        (0, 0),
        "its times prove what it is: it is compared"
    );
    // Another byte, past everybody: found by what is compared.
    write(&file, 2, 70_000, 10);
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.changed_blocks.get(), 1);
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_lets_go_too_early_gets_no_cut_and_is_told_why() {
    let Some(disk) = Disk::new("ext4", 128) else {
        return;
    };
    let file = disk.path("data.img");
    let mut rig = Rig::with(|config| {
        // It says that it holds still, and doesn't.
        let (pid, file) = (disk.path("pid"), file.display());
        let writer = format!(
            "while :; do yes | dd of={file} bs=512 count=20000 conv=notrunc status=none; done"
        );
        let both = format!("({writer}) & ({writer}) & wait");
        let pre = format!(
            "setsid sh -c '{both}' >/dev/null 2>&1 & echo $! >{}; sleep 0.2",
            pid.display()
        );
        config.quiesce_pre = pre.as_str().into();
        config.quiesce_post = format!("kill -- -$(cat {})", pid.display()).as_str().into();
        config.quiesce_timeout = Span::from_secs(5);
    })
    .await;
    add(&rig, "data", &file, "scan").await.unwrap();
    let told = eventually("the cut is refused", async || {
        let uplink = rig.volume("data").await.uplink.unwrap_or_default();
        uplink
            .error
            .contains("said to hold still")
            .then_some(uplink.error)
    })
    .await;
    assert!(told.contains("quiesce_pre"), "{told}");
    assert_eq!(rig.generations("data").await.len(), 0);
    rig.stop_capture().await;
    rig.config.quiesce_pre = "true".into();
    rig.config.quiesce_post = "true".into();
    rig.start_capture().await;
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_is_held_a_cut_may_take_longer_than_quiesce_timeout() {
    let Some(disk) = Disk::new("ext4", 128) else {
        return;
    };
    let rig = Rig::with(|config| {
        config.quiesce_pre = "exit 1".into();
        config.quiesce_post = "true".into();
        config.quiesce_timeout = Span::from_millis(300);
        config.lull_wait_max = Span::from_secs(30);
        // The file must rest for longer than anybody may be held.
        config.lull_min = Span::from_millis(1500);
    })
    .await;
    let file = disk.path("data.img");
    add(&rig, "data", &file, "scan").await.unwrap();
    rig.first_generation("data").await;
    write(&file, 1, 5000, 100_000);
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.coherence, Coherence::Crash);
    assert!(
        receipt.reason.to_string().contains("quiesce_pre failed"),
        "{receipt:?}"
    );
    assert!(rig.restore("data", 0).await == fs::read(&file).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_engine_cannot_do_is_refused_with_what_to_do() {
    let Some(disk) = Disk::new("ext4", 128) else {
        return;
    };
    let rig = Rig::new().await;
    let file = disk.path("data.img");
    add(&rig, "data", &file, "scan").await.unwrap();
    rig.first_generation("data").await;
    let refused = rig.snapshots_together(&["data"]).await.unwrap_err();
    assert_eq!(refused.reason, Reason::EngineUnsupported);
    assert!(refused.action.contains("volume readopt"), "{refused:?}");
    let rollback = pb::RollbackVolumeRequest {
        volume: "data".to_owned(),
        snapshot: 1,
        ..pb::RollbackVolumeRequest::default()
    };
    let answer = rig.client().await.rollback_volume(rollback).await;
    let answer = answer.unwrap().into_inner().message().await;
    let refused = RpcError::from(answer.unwrap_err());
    assert_eq!(refused.reason, Reason::EngineUnsupported);
    assert!(
        refused.action.contains("tidemark restore data"),
        "{refused:?}"
    );
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let refused = add(&rig, "memory", &memory.path().join("data.img"), "scan")
        .await
        .unwrap_err();
    assert_eq!(refused.reason, Reason::EngineUnsupported);
    assert!(refused.message.contains("tmpfs"), "{refused:?}");
    assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interval_that_was_compared_with_a_damaged_table_is_made_anew() {
    let Some(disk) = Disk::new("ext4", 128) else {
        return;
    };
    let mut rig = Rig::new().await;
    let file = disk.path("data.img");
    add(&rig, "data", &file, "scan").await.unwrap();
    rig.first_generation("data").await;
    write(&file, 1, 40 * 4096, 4096);
    rig.ship("data").await;
    // The table forgets a block that then becomes what it says: no comparison with it finds that.
    let state = state_dir(&rig, "data").await;
    let table = fs::File::options()
        .read(true)
        .write(true)
        .open(state.join("table"))
        .unwrap();
    let (place, mut entry) = (8192 + 40 * 16, [0; 16]);
    table.read_exact_at(&mut entry, place).unwrap();
    let content = fs::read(&file).unwrap();
    assert_eq!(
        entry,
        *block_checksum(&content[40 * 4096..41 * 4096]).as_bytes()
    );
    table.write_all_at(&[0; 16], place).unwrap();
    let written = fs::File::options().write(true).open(&file).unwrap();
    written.write_all_at(&[0; 4096], 40 * 4096).unwrap();
    // In another group, whose checksum doesn't tell.
    write(&file, 2, 100 * 4096, 4096);
    rig.proxy.set_target(None);
    let client = rig.client().await;
    let asked = tokio::spawn(async move {
        let mut client = client;
        let request = pb::TriggerIntervalRequest {
            volume: "data".to_owned(),
        };
        let _ = client.trigger_interval(request).await;
    });
    eventually("the interval is open", || async {
        rig.volume("data").await.changed_blocks.eq(&1).then_some(())
    })
    .await;
    asked.abort();
    rig.stop_capture().await;
    // The next start finds that the table isn't the base's: another leaf of it is damaged, too.
    table.write_all_at(&[0xee; 16], 7 * 16).unwrap();
    rig.proxy
        .set_target(Some(rig.vault.as_ref().unwrap().listen_addr));
    rig.start_capture().await;
    let generation = eventually("the next generation", || async {
        let generations = rig.generations("data").await;
        generations
            .iter()
            .map(|g| g.generation)
            .max()
            .filter(|newest| *newest > 2)
    })
    .await;
    assert_eq!(generation, 3);
    assert!(rig.restore("data", 3).await == fs::read(&file).unwrap());
}
