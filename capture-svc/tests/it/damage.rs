//! Damaged files of the state, with a vault: what a damage costs, what is told of it, and that the next generation is the
//! volume. What each byte of the files does is in `engine/damage.rs`, and beside the uplink.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use tidemark_proto::{
    Reason, RpcError,
    capture::v1::{self as pb, VolumeState},
};

use crate::{
    proxy::Fault,
    rig::{Rig, cut_is_open, eventually, noise, state_dir},
};

const BLOCK: usize = 4096;

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
}

async fn assert_newest_is_the_volume(rig: &Rig) {
    let volume = std::fs::read(rig.path("data.img")).unwrap();
    assert!(rig.restore("data", 0).await == volume);
}

/// A volume of one leaf and 32 groups, shipped, with the service stopped.
async fn stopped() -> (Rig, PathBuf) {
    let mut rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.nbd("data").write(0, &noise(1, 2 << 20)).unwrap();
    rig.ship("data").await;
    let dir = state_dir(&rig, "data").await;
    rig.stop_capture().await;
    (rig, dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checksum_table_whose_bits_flipped_is_found_and_the_next_generation_is_right() {
    // Of the leaf; of a group, and of a block, beside what is written.
    for (at, at_the_opening) in [
        (3, true),
        (4096 + 2 * 16 + 3, false),
        (8192 + 33 * 16 + 3, false),
    ] {
        let (mut rig, dir) = stopped().await;
        flip(&dir.join("table"), at);
        rig.start_capture().await;
        if at_the_opening {
            eventually("the tables are compared", || async {
                (rig.proxy.digest_calls() > 0).then_some(())
            })
            .await;
        }
        let (calls, headers, sent) = (
            rig.proxy.digest_calls(),
            rig.proxy.headers(),
            rig.proxy.frame_bytes(),
        );
        rig.nbd("data")
            .write(40 * BLOCK as u64, &[7; BLOCK])
            .unwrap();
        let receipt = rig.ship("data").await;
        assert!(receipt.created);
        assert_eq!(receipt.changed_blocks.get(), 1, "byte {at}");
        assert_newest_is_the_volume(&rig).await;
        if !at_the_opening {
            assert!(
                rig.proxy.digest_calls() > calls,
                "byte {at}: the tables were compared"
            );
            assert_eq!(
                rig.proxy.headers() - headers,
                2,
                "the vault has refused the first one"
            );
        }
        assert!(
            rig.proxy.frame_bytes() - sent < 64 << 10,
            "only what differs was sent"
        );
        let scrubbed = rig.scrub("data").await.unwrap();
        assert_eq!((scrubbed.mismatches, scrubbed.blocks_changed), (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrub_accuses_a_damaged_table_and_not_the_volume() {
    let (mut rig, dir) = stopped().await;
    flip(&dir.join("table"), 8192 + 300 * 16);
    rig.start_capture().await;
    let told = rig.scrub("data").await.unwrap_err();
    assert_eq!(told.reason, Reason::Busy, "{told}");
    assert!(told.message.contains("checksum table"), "{told}");
    let scrubbed = eventually("the table is compared with the vault's", || async {
        rig.scrub("data").await.ok()
    })
    .await;
    assert_eq!(scrubbed.mismatches, 0);
    assert!(rig.proxy.digest_calls() > 0);
    rig.nbd("data").write(0, &[7; BLOCK]).unwrap();
    assert_eq!(rig.ship("data").await.changed_blocks.get(), 1);
    assert_newest_is_the_volume(&rig).await;
    assert_eq!(rig.volume("data").await.scrub.unwrap().mismatches, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checksum_table_that_the_disk_cannot_read_is_made_anew_and_compared() {
    // Found by the scrub, or by the next interval.
    for scrubbed in [true, false] {
        let mut rig = Rig::new().await;
        rig.add("data", 1024).await;
        rig.nbd("data").write(0, &noise(1, 2 << 20)).unwrap();
        rig.ship("data").await;
        let dir = state_dir(&rig, "data").await;
        let calls = rig.proxy.digest_calls();
        // What an open file has lost is read as a bad sector is.
        let table = File::options().write(true).open(dir.join("table"));
        table.unwrap().set_len(4096).unwrap();
        if scrubbed {
            let told = rig.scrub("data").await.unwrap_err();
            assert_eq!(told.reason, Reason::Busy, "{told}");
            eventually("the table is compared with the vault's", || async {
                rig.scrub("data").await.ok()
            })
            .await;
        }
        rig.nbd("data").write(0, &[7; BLOCK]).unwrap();
        let (receipt, sent) = (rig.ship("data").await, rig.proxy.frame_bytes());
        assert!(receipt.created);
        assert!(rig.proxy.digest_calls() > calls);
        assert_newest_is_the_volume(&rig).await;
        // The one that was made anew is believed from now on.
        let calls = rig.proxy.digest_calls();
        rig.stop_capture().await;
        rig.start_capture().await;
        rig.nbd("data").write(0, &[8; BLOCK]).unwrap();
        rig.ship("data").await;
        assert_newest_is_the_volume(&rig).await;
        assert_eq!(rig.proxy.digest_calls(), calls);
        assert!(rig.proxy.frame_bytes() - sent < 64 << 10);
        assert_eq!(rig.scrub("data").await.unwrap().mismatches, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interval_whose_before_images_are_damaged_is_cut_anew() {
    let mut rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.ship("data").await;
    rig.nbd("data").write(0, &noise(1, 1 << 20)).unwrap();
    let dir = state_dir(&rig, "data").await;
    for _ in 0..10_000 {
        rig.proxy.fail(Fault::RefuseShip(Reason::Unreachable));
    }
    let request = pb::TriggerIntervalRequest {
        volume: "data".into(),
    };
    let answers = rig.client().await.trigger_interval(request).await.unwrap();
    eventually("the cut", || async { cut_is_open(&dir).then_some(()) }).await;
    rig.nbd("data").write(0, &noise(2, 16 * BLOCK)).unwrap();
    drop(answers);
    rig.stop_capture().await;
    assert!(cut_is_open(&dir));
    let slots = std::fs::read(dir.join("spool.slots")).unwrap();
    let used = slots[4096..].chunks_exact(64).filter(|entry| entry[0] != 0);
    let used: Vec<_> = used
        .map(|entry| u64::from_le_bytes(entry[24..32].try_into().unwrap()))
        .collect();
    assert_eq!(used.len(), 16);
    for slot in used {
        flip(&dir.join("spool.data"), slot * BLOCK as u64 + slot);
    }
    rig.proxy.forgive();
    let headers = rig.proxy.headers();
    rig.start_capture().await;
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.changed_blocks.get(), 256);
    assert!(rig.proxy.headers() > headers);
    assert_newest_is_the_volume(&rig).await;
}

async fn problem_of(rig: &Rig, name: &str) -> String {
    let volume = rig.volume(name).await;
    assert_eq!(volume.state(), VolumeState::Failed, "{volume:?}");
    volume.problem
}

async fn readopt(rig: &Rig) -> Result<(), RpcError> {
    let request = pb::ReadoptVolumeRequest {
        volume: "data".to_owned(),
        engine: String::new(),
    };
    let answer = rig.client().await.readopt_volume(request).await;
    answer.map(drop).map_err(RpcError::from)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_identity_is_named_and_a_readoption_ships_what_differs() {
    let (mut rig, dir) = stopped().await;
    flip(&dir.join("identity"), 50);
    rig.start_capture().await;
    let told = problem_of(&rig, "data").await;
    let named = dir.join("identity").display().to_string();
    assert!(
        told.contains(&named) && told.contains("`tidemark volume readopt`"),
        "{told}"
    );
    readopt(&rig).await.unwrap();
    let sent = rig.proxy.frame_bytes();
    rig.nbd("data").write(0, &[7; BLOCK]).unwrap();
    let receipt = rig.ship("data").await;
    assert!(
        receipt.created,
        "the volume is the one that the vault knows"
    );
    assert_newest_is_the_volume(&rig).await;
    assert!(
        rig.proxy.frame_bytes() - sent < 64 << 10,
        "only what differs was sent"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_lost_record_of_the_uplink_is_named_with_what_to_do() {
    for gone in [true, false] {
        let (mut rig, dir) = stopped().await;
        let path = dir.join("uplink");
        match gone {
            true => std::fs::remove_file(&path).unwrap(),
            false => flip(&path, 60),
        }
        rig.start_capture().await;
        let told = problem_of(&rig, "data").await;
        let named = path.display().to_string();
        assert!(
            told.contains(&named) && told.contains("`tidemark volume remove`"),
            "{told}"
        );
        assert!(!path.exists() || !gone, "nothing was made in its place");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_record_is_lost_is_listed_and_its_state_is_kept() {
    let (mut rig, dir) = stopped().await;
    let (record, aside) = (dir.join("volume"), rig.path("aside"));
    std::fs::rename(&record, &aside).unwrap();
    rig.start_capture().await;
    let id = dir.file_name().unwrap().to_str().unwrap().to_owned();
    let told = problem_of(&rig, &id).await;
    assert!(told.contains(&record.display().to_string()), "{told}");
    assert!(told.contains("put the file back"), "{told}");
    assert!(dir.join("identity").exists() && dir.join("uplink").exists());
    // Put back, it serves again by itself.
    std::fs::rename(&aside, &record).unwrap();
    eventually("it serves again", || async {
        let volumes = rig
            .client()
            .await
            .get_status(pb::GetStatusRequest {})
            .await
            .unwrap();
        let volumes = volumes.into_inner().volumes;
        volumes
            .iter()
            .any(|volume| volume.name == "data" && volume.state() == VolumeState::Serving)
            .then_some(())
    })
    .await;
    rig.nbd("data").write(0, &[7; BLOCK]).unwrap();
    rig.ship("data").await;
    assert_newest_is_the_volume(&rig).await;
}
