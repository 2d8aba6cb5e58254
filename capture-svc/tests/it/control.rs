//! The control interface: volumes, snapshots, status.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tidemark_proto::{Reason, RpcError, capture::v1 as pb, convert::volume_id};
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    nbd::Nbd,
    rig::{Rig, eventually, noise},
};

const BLOCK: usize = 4096;

#[tokio::test(flavor = "multi_thread")]
async fn so_many_snapshots_are_read_at_a_time_and_no_more() {
    let rig = Rig::new().await;
    rig.add("data", 2048).await;
    let mut nbd = rig.nbd("data");
    for part in 0..8 {
        nbd.write(part << 20, &noise(part, 1 << 20)).unwrap();
    }
    rig.snapshot("data", "").await;
    let client = rig.client().await;
    // Nobody takes more of the answers than the connection holds.
    let read = || async {
        let request = pb::ReadSnapshotRequest {
            volume: "data".to_owned(),
            snapshot: 1,
            since_snapshot: 0,
        };
        client.clone().read_snapshot(request).await
    };
    let mut held = Vec::new();
    for _ in 0..16 {
        held.push(read().await.unwrap());
    }
    let error = RpcError::from(read().await.unwrap_err());
    assert_eq!(error.reason, Reason::LimitReached);
    held.pop();
    held.push(eventually("a place", || async { read().await.ok() }).await);
}

fn named(volume: &str) -> pb::GetVolumeRequest {
    pb::GetVolumeRequest {
        volume: volume.to_owned(),
    }
}

async fn remove(rig: &Rig, volume: &str, force: bool) -> Result<(), RpcError> {
    let request = pb::RemoveVolumeRequest {
        volume: volume.to_owned(),
        force,
    };
    let removed = rig.client().await.remove_volume(request).await;
    removed.map(|_| ()).map_err(RpcError::from)
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_found_by_name_and_uuid_and_survive_a_restart() {
    let mut rig = Rig::new().await;
    let a = rig.add("a", 64).await;
    rig.try_add("b", &rig.path("b.img"), 65536 * 3, 65536)
        .await
        .unwrap();
    rig.first_generation("b").await;
    let id = volume_id(&a.volume_id).unwrap();
    let by_id = rig.client().await.get_volume(named(&id.to_string())).await;
    assert_eq!(by_id.unwrap().into_inner().name, "a");
    assert_eq!(
        a.nbd_uris,
        [format!(
            "nbd+unix:///a?socket={}",
            rig.path("nbd.sock").display()
        )]
    );
    rig.nbd("b").write(65536, &noise(1, 65536)).unwrap();
    let receipt = rig.ship("b").await;
    assert_eq!(receipt.changed_blocks.get(), 1);
    rig.stop_capture().await;
    rig.start_capture().await;
    let list = rig
        .client()
        .await
        .list_volumes(pb::ListVolumesRequest {})
        .await
        .unwrap()
        .into_inner()
        .volumes;
    let names: Vec<_> = list.iter().map(|v| v.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(list.iter().all(|v| v.state() == pb::VolumeState::Serving));
    assert_eq!(list[1].base_generation, 2);
    assert_eq!(list[1].geometry.unwrap().block_size, 65536);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_in_use_is_removed_only_by_force_and_its_file_stays() {
    let rig = Rig::new().await;
    let volume = rig.add("data", 64).await;
    let mut nbd = rig.nbd("data");
    nbd.write(0, &[5; BLOCK]).unwrap();
    let refused = remove(&rig, "data", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::VolumeInUse);
    nbd.write(0, &[6; BLOCK]).unwrap();
    remove(&rig, "data", true).await.unwrap();
    assert!(
        nbd.write(0, &[7; BLOCK]).is_err(),
        "the client is disconnected"
    );
    assert!(Nbd::connect(&rig.path("nbd.sock"), "data").is_err());
    let id = volume_id(&volume.volume_id).unwrap();
    assert!(!rig.path("capture/volumes").join(id.to_string()).exists());
    assert_eq!(
        std::fs::read(rig.path("data.img")).unwrap()[..BLOCK],
        [6; BLOCK]
    );
    assert_eq!(
        remove(&rig, "data", false).await.unwrap_err().reason,
        Reason::VolumeNotFound
    );

    // The name and the file are free again.
    let again = rig
        .try_add("data", &rig.path("data.img"), 0, 0)
        .await
        .unwrap();
    assert_ne!(again.volume_id, volume.volume_id);
    rig.snapshot("data", "").await;
    let refused = remove(&rig, "data", false).await.unwrap_err();
    assert_eq!(
        refused.reason,
        Reason::VolumeInUse,
        "snapshots are uses too"
    );
    remove(&rig, "data", true).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn overlapping_snapshots_show_their_cuts_while_writes_go_on() {
    let rig = Rig::new().await;
    rig.add("data", 1024).await;
    let mut nbd = rig.nbd("data");
    let mut model = vec![0; 1024 * BLOCK];
    let mut cuts = Vec::new();
    for n in 1..=5u64 {
        let data = noise(n, 300_000);
        let at = usize::try_from(n).unwrap() * 123_457;
        nbd.write(at as u64, &data).unwrap();
        model[at..at + data.len()].copy_from_slice(&data);
        let snapshot = rig.snapshot("data", &format!("cut {n}")).await;
        assert_eq!(snapshot.snapshot, n);
        cuts.push(model.clone());
    }
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let writer = std::thread::spawn(move || {
        let mut n = 0;
        while !stopped.load(Ordering::Relaxed) {
            n += 1;
            nbd.write((n * 65_537) % (900 * 4096), &noise(n, 20_000))
                .unwrap();
        }
    });
    for (n, cut) in (1u64..).zip(&cuts) {
        let mut image = vec![0; model.len()];
        let end = rig.read_snapshot("data", n, 0, &mut image).await.unwrap();
        assert!(image == *cut, "snapshot {n}");
        assert!(end.blocks_sent > 0);
        for older in 1..n {
            let mut image = cuts[usize::try_from(older - 1).unwrap()].clone();
            let end = rig
                .read_snapshot("data", n, older, &mut image)
                .await
                .unwrap();
            assert!(image == *cut, "snapshot {n} since {older}");
            assert!(end.image_digest.is_empty());
        }
    }
    // An interval amid snapshots.
    let receipt = rig.ship("data").await;
    assert!(receipt.created);
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();

    let mut client = rig.client().await;
    let delete = |snapshot| pb::DeleteSnapshotRequest {
        volume: "data".into(),
        snapshot,
    };
    client.delete_snapshot(delete(2)).await.unwrap();
    let gone = client.delete_snapshot(delete(2)).await.unwrap_err();
    assert_eq!(RpcError::from(gone).reason, Reason::SnapshotNotFound);
    let listed = client
        .list_snapshots(pb::ListSnapshotsRequest {
            volume: "data".into(),
        })
        .await
        .unwrap()
        .into_inner()
        .snapshots;
    let labels: Vec<_> = listed.iter().map(|s| s.label.as_str()).collect();
    assert_eq!(labels, ["cut 1", "cut 3", "cut 4", "cut 5"]);
    let mut image = vec![0; model.len()];
    for (snapshot, since) in [(2, 0), (99, 0), (3, 2)] {
        let error = rig
            .read_snapshot("data", snapshot, since, &mut image)
            .await
            .unwrap_err();
        assert_eq!(error.reason, Reason::SnapshotNotFound);
    }
    let error = rig
        .read_snapshot("data", 3, 4, &mut image)
        .await
        .unwrap_err();
    assert_eq!(error.reason, Reason::RequestInvalid, "{error}");
    let long = pb::CreateSnapshotRequest {
        volume: "data".into(),
        label: "x".repeat(256),
        now: false,
    };
    let error = RpcError::from(client.create_snapshot(long).await.unwrap_err());
    assert_eq!(error.reason, Reason::RequestInvalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_is_told_at_each_change_and_its_watchers_delay_no_shutdown() {
    let mut rig = Rig::new().await;
    let mut client = rig.client().await;
    let below = client
        .watch_status(pb::WatchStatusRequest { period_min_ms: 99 })
        .await
        .unwrap_err();
    assert_eq!(RpcError::from(below).reason, Reason::RequestInvalid);
    let mut watch = client
        .watch_status(pb::WatchStatusRequest { period_min_ms: 100 })
        .await
        .unwrap()
        .into_inner();
    assert!(watch.message().await.unwrap().unwrap().volumes.is_empty());
    rig.add("data", 64).await;
    loop {
        let status = watch.message().await.unwrap().unwrap();
        assert_eq!(status.vault, rig.proxy.url());
        if status.volumes.iter().any(|v| v.base_generation == 1) {
            break;
        }
    }
    let mut health = {
        let url = format!("http://{}", rig.capture.as_ref().unwrap().control_addr());
        HealthClient::new(Endpoint::from_shared(url).unwrap().connect().await.unwrap())
    };
    for service in ["", "tidemark.capture.v1.Capture"] {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status, 1, "{service:?} serves");
    }
    let _nbd = rig.nbd("data");
    let began = Instant::now();
    rig.stop_capture().await;
    assert!(began.elapsed() < Duration::from_secs(10));
    while let Ok(Some(_)) = watch.message().await {}
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_no_more_volumes_than_configured() {
    let rig = Rig::with(|config| config.volumes_max = 1).await;
    rig.add("a", 4).await;
    let error = rig
        .try_add("b", &rig.path("b.img"), 4096, 0)
        .await
        .unwrap_err();
    assert_eq!(error.reason, Reason::LimitReached);
    assert!(!rig.path("b.img").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_requests_at_once_all_get_a_receipt_of_a_cut_after_them() {
    let rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.ship("data").await;
    for round in 1..=3u8 {
        rig.nbd("data").write(0, &[round; BLOCK]).unwrap();
        let ships = futures::future::join_all((0..6).map(|_| rig.ship("data"))).await;
        for receipt in ships {
            let image = rig.restore("data", receipt.generation.get()).await;
            assert_eq!(image[0], round, "the write was before the request");
        }
    }
    eventually("nobody is left waiting", || async {
        let uplink = rig.volume("data").await.uplink.unwrap();
        (uplink.state() == pb::UplinkState::Idle).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_by_hand_finds_what_was_written_past_the_service_and_nothing_else() {
    use std::os::unix::fs::FileExt;
    let rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.nbd("data").write(0, &noise(1, 600 * BLOCK)).unwrap();
    rig.ship("data").await;
    let clean = pb::ScrubEnd {
        blocks_compared: 1024,
        blocks_changed: 0,
        mismatches: 0,
    };
    assert_eq!(rig.scrub("data").await.unwrap(), clean);
    // One block changes as it should, two behind the service's back: one in data, one in a hole.
    rig.nbd("data").write(0, &[5; BLOCK]).unwrap();
    let image = rig.path("data.img");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap();
    for block in [100, 900] {
        file.write_all_at(&[7; BLOCK], block * 4096).unwrap();
    }
    let end = rig.scrub("data").await.unwrap();
    assert_eq!((end.blocks_changed, end.mismatches), (1, 2));
    assert_eq!(end.blocks_compared, 1023);
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == std::fs::read(&image).unwrap());
    assert_eq!(rig.scrub("data").await.unwrap(), clean);
    let scrub = rig.volume("data").await.scrub.unwrap();
    assert_eq!((scrub.passes, scrub.mismatches), (3, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_fails_leaves_the_volume_served_and_exported() {
    let rig = Rig::new().await;
    let volume = rig.add("data", 16).await;
    let id = volume_id(&volume.volume_id).unwrap();
    let record = rig
        .path("capture/volumes")
        .join(id.to_string())
        .join("volume");
    let aside = rig.path("aside");
    std::fs::rename(&record, &aside).unwrap();
    std::fs::create_dir(&record).unwrap();
    let failed = remove(&rig, "data", false).await.unwrap_err();
    assert_eq!(failed.reason, Reason::IoFailed, "{failed}");
    assert_eq!(rig.volume("data").await.state(), pb::VolumeState::Serving);
    rig.nbd("data").write(0, &[5; BLOCK]).unwrap();
    rig.ship("data").await;
    std::fs::remove_dir(&record).unwrap();
    std::fs::rename(&aside, &record).unwrap();
    remove(&rig, "data", false).await.unwrap();
    assert!(Nbd::connect(&rig.path("nbd.sock"), "data").is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_error_of_a_failed_cut_is_shown_until_a_cut_is_made() {
    let rig = Rig::new().await;
    let volume = rig.add("data", 16).await;
    let id = volume_id(&volume.volume_id).unwrap();
    let obstacle = rig
        .path("capture/volumes")
        .join(id.to_string())
        .join("interval.tmp");
    std::fs::create_dir(&obstacle).unwrap();
    rig.nbd("data").write(0, &[5; BLOCK]).unwrap();
    let asked = async { rig.try_ship("data").await.unwrap() };
    let looked = async {
        let shown = async || rig.volume("data").await.uplink.unwrap();
        eventually("the error is shown", || async {
            (!shown().await.error.is_empty()).then_some(())
        })
        .await;
        for _ in 0..50 {
            let uplink = shown().await;
            assert!(!uplink.error.is_empty(), "{uplink:?}");
        }
        std::fs::remove_dir(&obstacle).unwrap();
    };
    let (receipt, ()) = tokio::join!(asked, looked);
    assert!(receipt.created);
    assert_eq!(rig.volume("data").await.uplink.unwrap().error, "");
}
