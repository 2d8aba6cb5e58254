//! Groups: volumes that are cut at one instant, whole or not at all.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use capture_svc::{Config, config::Span};
use tidemark_block::{Coherence, Receipt};
use tidemark_proto::{Reason, capture::v1 as pb};

use crate::{
    disk::Disk,
    rig::{Rig, eventually},
};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;

fn grouped(config: &mut Config) {
    config.groups = "db=log,data".parse().unwrap();
}

async fn rig(change: impl FnOnce(&mut Config)) -> Rig {
    let rig = Rig::with(|config| {
        grouped(config);
        change(config);
    })
    .await;
    // The first one has nobody to wait for.
    rig.add("log", BLOCKS as u64).await;
    rig.add("data", BLOCKS as u64).await;
    rig
}

/// A workload that writes each number to the log, and when that is answered to the data.
struct Numbers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Numbers {
    fn start(rig: &Rig) -> Self {
        let (mut log, mut data) = (rig.nbd("log"), rig.nbd("data"));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            for number in 1_u64.. {
                if stopped.load(Relaxed) {
                    return;
                }
                let mut block = [0; BLOCK];
                block[..8].copy_from_slice(&number.to_le_bytes());
                log.write(0, &block).unwrap();
                data.write(0, &block).unwrap();
            }
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap();
    }
}

fn assert_causal(log: &[u8], data: &[u8]) {
    let number = |image: &[u8]| u64::from_le_bytes(*image.first_chunk().unwrap());
    let (log, data) = (number(log), number(data));
    assert!(
        (data..=data + 1).contains(&log),
        "the log has {log} and the data {data}"
    );
}

/// The images of the moment of a receipt of `data`.
async fn images_at(rig: &Rig, receipt: &Receipt) -> [Vec<u8>; 2] {
    let data = rig.restore("data", receipt.generation.get()).await;
    let of_log = eventually("the log's generation of that moment", || async {
        let log = rig.generations("log").await;
        let at = log.iter().rfind(|g| g.cut_time_ms == receipt.cut_time_ms)?;
        Some(at.generation)
    });
    [rig.restore("log", of_log.await).await, data]
}

async fn shown(rig: &Rig, name: &str, snapshot: u64) -> Vec<u8> {
    let mut image = vec![0; BLOCKS * BLOCK];
    let read = rig.read_snapshot(name, snapshot, 0, &mut image).await;
    read.unwrap();
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn no_generation_or_snapshot_of_a_group_shows_an_effect_without_its_cause() {
    let rig = rig(|config| config.lull_wait_max = Span::from_secs(0)).await;
    let numbers = Numbers::start(&rig);
    eventually("a first number", || async {
        (rig.volume("data").await.changed_blocks > 0).then_some(())
    })
    .await;
    for _ in 0..8 {
        let receipt = rig.ship("data").await;
        let [log, data] = images_at(&rig, &receipt).await;
        assert_causal(&log, &data);
        let taken = rig.snapshots_together(&["data", "log"]).await.unwrap();
        let data = shown(&rig, "data", taken[0]).await;
        assert_causal(&shown(&rig, "log", taken[1]).await, &data);
    }
    numbers.end();
    assert_eq!(rig.volume("log").await.group, "db");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_of_a_group_that_has_not_changed_is_current_through_the_cut_of_the_others() {
    let rig = rig(|_| {}).await;
    rig.ship("log").await;
    let before = rig.generations("log").await.len();
    rig.nbd("data").write(0, &[1; BLOCK]).unwrap();
    let receipt = rig.ship("data").await;
    eventually("a mark of that moment", || async {
        let log = rig.generations("log").await;
        (log.last()?.current_through_ms == receipt.cut_time_ms).then_some(())
    })
    .await;
    assert_eq!(rig.generations("log").await.len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_can_not_be_cut_holds_up_its_group_until_it_is_back_or_removed() {
    let mut rig = rig(|config| config.retry_period = Span::from_millis(50)).await;
    let (file, away) = (rig.path("log.img"), rig.path("away.img"));
    for back in [true, false] {
        rig.stop_capture().await;
        std::fs::rename(&file, &away).unwrap();
        rig.start_capture().await;
        let before = rig.volume("data").await.base_generation;
        rig.nbd("data")
            .write(0, &[u8::from(back) + 1; BLOCK])
            .unwrap();
        let told = eventually("who is waited for", || async {
            // Whoever asks hangs up: the want stays.
            let ask = rig.try_ship("data");
            let _ = tokio::time::timeout(std::time::Duration::from_millis(200), ask).await;
            let uplink = rig.volume("data").await.uplink?;
            (!uplink.error.is_empty()).then_some(uplink.error)
        });
        let told = told.await;
        assert!(told.contains("group db") && told.contains("log"), "{told}");
        assert_eq!(rig.volume("data").await.base_generation, before);
        if back {
            std::fs::rename(&away, &file).unwrap();
        } else {
            let request = pb::RemoveVolumeRequest {
                volume: "log".to_owned(),
                force: false,
            };
            rig.client().await.remove_volume(request).await.unwrap();
        }
        let receipt = rig.ship("data").await;
        assert!(receipt.generation.get() > before);
        assert_eq!(rig.volume("data").await.uplink.unwrap().error, "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_workloads_of_a_group_are_frozen_before_its_cut_and_who_was_not_is_named() {
    let rig = rig(|config| {
        let log = config.state.with_file_name("commands");
        let note = format!("echo $TIDEMARK_PHASE $TIDEMARK_VOLUME >> {}", log.display());
        config.quiesce_pre = format!("{note}; test $TIDEMARK_VOLUME != \"$(cat refuses)\"")
            .replace(
                "refuses",
                &log.with_file_name("refuses").display().to_string(),
            )
            .as_str()
            .into();
        config.quiesce_post = note.as_str().into();
        std::fs::write(log.with_file_name("refuses"), "nobody").unwrap();
    })
    .await;
    rig.nbd("data").write(0, &[1; BLOCK]).unwrap();
    std::fs::remove_file(rig.path("commands")).unwrap();
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.coherence, Coherence::Quiesced);
    let lines = eventually("two thaws", || async {
        let log = std::fs::read_to_string(rig.path("commands")).ok()?;
        (log.matches("thaw").count() == 2).then_some(log)
    })
    .await;
    assert!(lines.starts_with("freeze data\nfreeze log\n"), "{lines}");

    std::fs::write(rig.path("refuses"), "log").unwrap();
    rig.nbd("data").write(0, &[2; BLOCK]).unwrap();
    let receipt = rig.ship("data").await;
    assert!(receipt.coherence < Coherence::Quiesced);
    let why = receipt.reason.to_string();
    assert!(why.contains("quiesce_pre of log failed"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_stops_while_its_group_looks_for_a_moment_stops_at_once() {
    let mut rig = rig(|_| {}).await;
    rig.stop_capture().await;
    rig.config.lull_wait_max = Span::from_secs(3600);
    rig.config.lull_min = Span::from_secs(3600);
    rig.start_capture().await;
    rig.nbd("data").write(0, &[1; BLOCK]).unwrap();
    let asked = rig.try_ship("data");
    let looking = tokio::time::timeout(std::time::Duration::from_millis(300), asked).await;
    assert!(looking.is_err(), "no moment was to be found");
    rig.stop_capture().await;
    rig.start_capture().await;
    assert_eq!(rig.volume("data").await.changed_blocks, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_several_volumes_are_all_taken_or_none() {
    let rig = Rig::with(|config| config.snapshots_max = 1).await;
    rig.add("log", BLOCKS as u64).await;
    rig.add("data", BLOCKS as u64).await;
    rig.snapshot("log", "").await;
    for (names, reason) in [
        (&["data", "log"][..], Reason::SnapshotLimit),
        (&["data", "data"], Reason::RequestInvalid),
        (&["data", "nobody"], Reason::VolumeNotFound),
        (&[], Reason::RequestInvalid),
    ] {
        let error = rig.snapshots_together(names).await.unwrap_err();
        assert_eq!(error.reason, reason, "{names:?}: {error}");
    }
    assert_eq!(rig.volume("data").await.snapshots, 0);
    // Nothing of it is left in the way.
    assert_eq!(rig.snapshots_together(&["data"]).await.unwrap(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_with_a_volume_that_its_workload_writes_itself_is_not_cut_and_says_what_to_do() {
    let Some(disk) = Disk::new("xfs", 512) else {
        return;
    };
    let rig = Rig::with(grouped).await;
    rig.add("data", BLOCKS as u64).await;
    let request = pb::AddVolumeRequest {
        name: "log".to_owned(),
        file: disk.path("log.img").display().to_string(),
        length: (BLOCKS * BLOCK) as u64,
        engine: "reflink".to_owned(),
        ..pb::AddVolumeRequest::default()
    };
    rig.client().await.add_volume(request).await.unwrap();
    let told = "volume log: it is written by its workload itself, and can't be cut at one instant with others";
    let action = "take it out of the group, or give it the engine intercept with `tidemark volume readopt --engine \
                  intercept`";

    let refused = rig.snapshots_together(&["data", "log"]).await.unwrap_err();
    assert_eq!(refused.reason, Reason::EngineUnsupported);
    assert_eq!((&*refused.message, &*refused.action), (told, action));
    assert_eq!(rig.volume("data").await.snapshots, 0);

    // The first interval of the new volume is due, and with it one of the others.
    rig.nbd("data").write(0, &[1; BLOCK]).unwrap();
    for name in ["log", "data"] {
        let error = eventually("why the group is not cut", || async {
            let error = rig.volume(name).await.uplink?.error;
            (!error.is_empty()).then_some(error)
        });
        assert_eq!(error.await, format!("{told}: {action}"), "{name}");
    }
    assert_eq!(rig.volume("data").await.base_generation, 1);

    let request = pb::ReadoptVolumeRequest {
        volume: "log".to_owned(),
        engine: "intercept".to_owned(),
    };
    rig.client().await.readopt_volume(request).await.unwrap();
    assert!(rig.ship("data").await.generation.get() > 1);
    rig.snapshots_together(&["data", "log"]).await.unwrap();
}
