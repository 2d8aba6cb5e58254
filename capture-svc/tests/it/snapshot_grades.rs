//! How good the moment of a snapshot taken by hand was, and that it is looked for and recorded.

use std::{path::PathBuf, time::Duration};

use capture_svc::config::{QuiesceFailure, Span};
use tidemark_block::Coherence;
use tidemark_proto::{Reason, RpcError, capture::v1 as pb};

use crate::{
    disk::Disk,
    rig::{PATIENCE, Rig, eventually, state_dir},
};

const NOBODY: &str = "no agent or command quiesces the workload";
const AT_ONCE: &str = "it was to be made at once";

async fn take(rig: &Rig, volumes: &[&str], now: bool) -> Result<Vec<pb::Snapshot>, RpcError> {
    let request = pb::CreateSnapshotsRequest {
        volumes: volumes.iter().map(|&name| name.to_owned()).collect(),
        label: "by hand".to_owned(),
        now,
    };
    let asked = tokio::time::timeout(PATIENCE, async {
        rig.client().await.create_snapshots(request).await
    });
    let taken = asked.await.expect("an answer in time")?;
    Ok(taken.into_inner().snapshots)
}

async fn listed(rig: &Rig, volume: &str) -> Vec<(u64, Coherence, String)> {
    let request = pb::ListSnapshotsRequest {
        volume: volume.to_owned(),
    };
    let listed = rig.client().await.list_snapshots(request).await.unwrap();
    let listed = listed.into_inner().snapshots.into_iter();
    listed.map(|snapshot| grade(&snapshot)).collect()
}

fn grade(snapshot: &pb::Snapshot) -> (u64, Coherence, String) {
    let coherence = u8::try_from(snapshot.coherence).unwrap();
    (
        snapshot.snapshot,
        Coherence::from_code(coherence).unwrap(),
        snapshot.coherence_reason.clone(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_waits_for_a_pause_or_is_taken_at_once_and_its_grade_outlives_the_service() {
    let mut rig = Rig::with(|config| {
        config.lull_wait_max = Span::from_secs(3600);
        config.lull_min = Span::from_millis(20);
    })
    .await;
    rig.add("data", 64).await;
    let mut nbd = rig.nbd("data");
    nbd.write(0, &[1; 4096]).unwrap();
    nbd.flush().unwrap();
    let flushed = take(&rig, &["data"], false).await.unwrap();
    nbd.write(0, &[2; 4096]).unwrap();
    let lull = take(&rig, &["data"], false).await.unwrap();
    nbd.flush().unwrap();
    let at_once = take(&rig, &["data"], true).await.unwrap();
    let expected = [
        (1, Coherence::Flushed, NOBODY.to_owned()),
        (
            2,
            Coherence::Lull,
            format!("{NOBODY}; the last write was not flushed"),
        ),
        (3, Coherence::Flushed, AT_ONCE.to_owned()),
    ];
    let taken: Vec<_> = [flushed, lull, at_once]
        .concat()
        .iter()
        .map(grade)
        .collect();
    assert_eq!(taken, expected);
    assert_eq!(listed(&rig, "data").await, expected);
    drop(nbd);
    rig.stop_capture().await;
    rig.start_capture().await;
    assert_eq!(listed(&rig, "data").await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asked_for_a_snapshot_and_hangs_up_gets_none_and_a_stop_ends_the_search() {
    let mut rig = Rig::new().await;
    rig.add("data", 64).await;
    rig.stop_capture().await;
    rig.config.lull_wait_max = Span::from_secs(3600);
    rig.config.lull_min = Span::from_secs(3600);
    rig.start_capture().await;
    rig.nbd("data").write(0, &[1; 4096]).unwrap();
    let names = ["data"];
    let asked = take(&rig, &names, false);
    let looking = tokio::time::timeout(Duration::from_millis(300), asked).await;
    assert!(looking.is_err(), "no moment was to be found");
    // It doesn't wait for the one that looks, nor keeps it from ending.
    let at_once = take(&rig, &names, true).await.unwrap();
    assert_eq!(grade(&at_once[0]).0, 1, "nothing was taken before");

    let mut client = rig.client().await;
    let asked = tokio::spawn(async move {
        let request = pb::CreateSnapshotRequest {
            volume: "data".to_owned(),
            ..pb::CreateSnapshotRequest::default()
        };
        client.create_snapshot(request).await
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    tokio::time::timeout(PATIENCE, rig.stop_capture())
        .await
        .unwrap();
    assert!(asked.await.unwrap().is_err());
    rig.start_capture().await;
    assert_eq!(listed(&rig, "data").await.len(), 1);
}

/// Commands that write down that they ran; freezing fails where a file says so.
fn commands(config: &mut capture_svc::Config) -> PathBuf {
    let log = config.state.with_file_name("log");
    let note = format!("echo $TIDEMARK_PHASE $TIDEMARK_VOLUME >> {}", log.display());
    let fails = log.with_file_name("fails");
    config.quiesce_pre = format!("{note}; test ! -e {}", fails.display())
        .as_str()
        .into();
    config.quiesce_post = note.as_str().into();
    fails
}

#[tokio::test(flavor = "multi_thread")]
async fn all_workloads_are_frozen_for_their_snapshots_and_let_go_on_again() {
    let mut fails = PathBuf::new();
    let rig = Rig::with(|config| {
        fails = commands(config);
        config.quiesce_failure = QuiesceFailure::Skip;
    })
    .await;
    for name in ["log", "data"] {
        rig.add(name, 64).await;
        rig.nbd(name).write(0, &[1; 4096]).unwrap();
    }
    let log = rig.path("log");
    let lines = || std::fs::read_to_string(&log).unwrap_or_default();
    eventually("the thaws of the first generations", || async {
        (lines().matches("thaw").count() == lines().matches("freeze").count()).then_some(())
    })
    .await;
    std::fs::remove_file(&log).unwrap();
    let taken = take(&rig, &["log", "data"], false).await.unwrap();
    for snapshot in &taken {
        assert_eq!(grade(snapshot), (1, Coherence::Quiesced, String::new()));
    }
    assert_eq!(taken[0].cut_time_ms, taken[1].cut_time_ms);
    let ran = eventually("two thaws", || async {
        (lines().matches("thaw").count() == 2).then(lines)
    })
    .await;
    assert!(ran.starts_with("freeze data\nfreeze log\n"), "{ran}");

    // By policy none is taken where one does not hold still; at once nobody is asked.
    std::fs::write(&fails, "").unwrap();
    let refused = take(&rig, &["data", "log"], false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::NotQuiesced);
    assert!(refused.message.contains("quiesce_pre of data failed"));
    assert!(refused.action.contains("--now"), "{refused:?}");
    let before = lines().matches("freeze").count();
    let at_once = take(&rig, &["data", "log"], true).await.unwrap();
    assert!(grade(&at_once[0]).2.starts_with(AT_ONCE));
    assert_eq!(lines().matches("freeze").count(), before);
    assert_eq!(listed(&rig, "log").await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_file_that_its_workload_writes_is_quiesced_or_as_after_a_power_cut() {
    let Some(disk) = Disk::new("xfs", 512) else {
        return;
    };
    let mut rig = Rig::with(|config| {
        commands(config);
    })
    .await;
    let request = pb::AddVolumeRequest {
        name: "data".to_owned(),
        file: disk.path("data.img").display().to_string(),
        length: 1 << 20,
        engine: "reflink".to_owned(),
        ..pb::AddVolumeRequest::default()
    };
    rig.client().await.add_volume(request).await.unwrap();
    take(&rig, &["data"], false).await.unwrap();
    take(&rig, &["data"], true).await.unwrap();
    let expected = [
        (1, Coherence::Quiesced, String::new()),
        (
            2,
            Coherence::Crash,
            format!("{AT_ONCE}; the engine does not see writes"),
        ),
    ];
    assert_eq!(listed(&rig, "data").await, expected);
    rig.stop_capture().await;
    rig.start_capture().await;
    assert_eq!(listed(&rig, "data").await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_state_without_grades_are_read_and_say_so() {
    let mut rig = Rig::new().await;
    rig.add("data", 64).await;
    take(&rig, &["data"], false).await.unwrap();
    let state = state_dir(&rig, "data").await;
    rig.stop_capture().await;
    let path = state.join("snapshots");
    let volume = state
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let table = capture_core::engine::records::SnapshotTable::decode(
        &std::fs::read(&path).unwrap(),
        volume,
    )
    .unwrap();
    // As the version before wrote it, and a process that was killed then left it: sealed by nobody.
    let one = &table.snapshots[0];
    let mut payload = volume.as_bytes().to_vec();
    for field in [1, 1, one.id, one.cut, one.time_ms, one.changes] {
        payload.extend_from_slice(&field.to_le_bytes());
    }
    payload.push(u8::try_from(one.label.len()).unwrap());
    payload.extend_from_slice(one.label.as_bytes());
    let identity = state.join("identity");
    let mut sealed =
        capture_core::engine::records::Identity::decode(&std::fs::read(&identity).unwrap())
            .unwrap();
    (sealed.seals, sealed.clean) = (None, false);
    std::fs::write(&identity, sealed.encode()).unwrap();
    std::fs::write(
        &path,
        tidemark_block::wire::seal(*b"TMSNAPS\0", 2, &payload),
    )
    .unwrap();
    rig.start_capture().await;
    let ungraded = |id| (id, Coherence::Crash, "no grade was recorded".to_owned());
    assert_eq!(listed(&rig, "data").await, [ungraded(1)]);
    let taken = take(&rig, &["data"], true).await.unwrap();
    let listed = listed(&rig, "data").await;
    assert_eq!(listed, [ungraded(1), grade(&taken[0])]);
}
