//! Intervals on their way, and everything that can happen to them.

use std::{sync::Arc, time::Duration};

use capture_svc::config::Span;
use tidemark_block::Trigger;
use tidemark_proto::{Reason, capture::v1::UplinkState};
use tokio::sync::mpsc;

use crate::{
    proxy::Fault,
    rig::{Rig, eventually, noise},
};

const BLOCK: usize = 4096;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_through_nbd_comes_back_from_the_vault() {
    let rig = Rig::new().await;
    rig.add("data", 2048).await;
    let mut model = vec![0; 2048 * BLOCK];
    let mut nbd = rig.nbd("data");
    assert_eq!(nbd.length, model.len() as u64);

    let write = |nbd: &mut crate::nbd::Nbd, model: &mut Vec<u8>, at: usize, data: &[u8]| {
        nbd.write(at as u64, data).unwrap();
        model[at..at + data.len()].copy_from_slice(data);
    };
    write(&mut nbd, &mut model, 5, &noise(1, 3 << 20));
    nbd.flush().unwrap();
    let first = rig.ship("data").await;
    assert!(first.created);
    let image_1 = model.clone();
    assert!(rig.restore("data", first.generation.get()).await == image_1);

    write(&mut nbd, &mut model, 1 << 20, &noise(2, 10_000));
    write(&mut nbd, &mut model, 2047 * BLOCK, &[9; BLOCK]);
    nbd.trim(0, 1 << 19).unwrap();
    let trimmed = nbd.read(0, 1 << 19).unwrap();
    model[..1 << 19].copy_from_slice(&trimmed);
    let second = rig.ship("data").await;
    assert_eq!(second.generation, first.generation.next());
    assert_eq!(second.trigger, Trigger::Request);
    assert!(rig.restore("data", 0).await == model);
    assert!(rig.restore("data", first.generation.get()).await == image_1);

    let third = rig.ship("data").await;
    assert!(!third.created, "nothing had changed");
    assert_eq!(third.generation, second.generation);
    // The same bytes again: dirty, but not different.
    let same = model[1 << 20..(1 << 20) + BLOCK].to_vec();
    write(&mut nbd, &mut model, 1 << 20, &same);
    let fourth = rig.ship("data").await;
    assert!(!fourth.created, "nothing differed");
    let listed = rig.generations("data").await;
    assert!(listed.last().unwrap().current_through_ms >= fourth.cut_time_ms);
    let shown = rig.volume("data").await;
    assert_eq!(shown.base_generation, second.generation.get());
    assert_eq!(shown.clients, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untouched_volume_becomes_a_generation_of_zeroes() {
    let rig = Rig::new().await;
    rig.add("data", 256).await;
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.generation.get(), 1);
    assert!(rig.restore("data", 0).await.iter().all(|byte| *byte == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_there_before_is_shipped_whole() {
    let rig = Rig::new().await;
    let image = noise(3, 300 * BLOCK);
    std::fs::write(rig.path("old.img"), &image).unwrap();
    rig.try_add("old", &rig.path("old.img"), 0, 0)
        .await
        .unwrap();
    rig.ship("old").await;
    assert!(rig.restore("old", 0).await == image);
}

/// Whatever message a connection breaks at, in either direction, the interval arrives, once and exact, and not much
/// of it is sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_at_any_message_costs_no_more_than_what_was_in_flight() {
    let rig = Rig::new().await;
    rig.add("data", 4096).await;
    let mut model = vec![0; 4096 * BLOCK];
    rig.ship("data").await;
    let faults = (0..6)
        .map(Fault::BreakBeforeRequest)
        .chain((0..3).map(Fault::BreakBeforeAnswer))
        .chain([Fault::LoseReceipt]);
    for (seed, fault) in (10..).zip(faults) {
        let data = noise(seed, 3 << 20);
        let at = usize::try_from(seed % 4).unwrap() * (3 << 20) + 77;
        rig.nbd("data").write(at as u64, &data).unwrap();
        model[at..at + data.len()].copy_from_slice(&data);
        let before = rig.proxy.frame_bytes();
        let headers = rig.proxy.headers();
        rig.proxy.fail(fault.clone());
        let receipt = rig.ship("data").await;
        assert_eq!(rig.proxy.faults_left(), 0, "{fault:?} happened");
        assert!(rig.proxy.headers() > headers + 1, "{fault:?} was noticed");
        assert!(receipt.created);
        assert!(rig.restore("data", 0).await == model, "{fault:?}");
        assert!(
            rig.proxy.frame_bytes() - before <= 2 * receipt.frame_bytes,
            "{fault:?}"
        );
    }
    assert_eq!(rig.volume("data").await.uplink.unwrap().error, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_receipt_is_asked_for_again_and_nothing_is_sent_twice() {
    let rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.nbd("data").write(0, &noise(1, 1 << 20)).unwrap();
    rig.proxy.fail(Fault::LoseReceipt);
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.generation.get(), 2);
    assert_eq!(rig.proxy.frame_bytes(), receipt.frame_bytes);
    assert_eq!(rig.generations("data").await.len(), 2);
    // The table followed: the next interval is right too.
    rig.nbd("data").write(4096, &[1; BLOCK]).unwrap();
    let next = rig.ship("data").await;
    assert_eq!(next.changed_blocks.get(), 1);
    assert_eq!(rig.proxy.digest_calls(), 0, "no resync was needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_mismatch_compares_tables_and_ships_anew() {
    let rig = Rig::new().await;
    rig.add("data", 1024).await;
    let data = noise(5, 1 << 20);
    rig.nbd("data").write(0, &data).unwrap();
    rig.ship("data").await;
    rig.nbd("data").write(0, &data[4096..]).unwrap();
    rig.proxy.fail(Fault::BendDigest);
    let receipt = rig.ship("data").await;
    assert!(receipt.created);
    assert!(rig.proxy.digest_calls() > 0, "the tables were compared");
    let mut model = vec![0; 1024 * BLOCK];
    model[..data.len()].copy_from_slice(&data);
    model[..data.len() - 4096].copy_from_slice(&data[4096..]);
    assert!(rig.restore("data", 0).await == model);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vault_that_is_away_costs_recovery_point_not_writes() {
    let mut rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.ship("data").await;
    let target = rig.vault.as_ref().unwrap().listen_addr;
    rig.proxy.set_target(None);
    let data = noise(6, 2 << 20);
    let mut nbd = rig.nbd("data");
    nbd.write(0, &data).unwrap();
    let shipping = rig.try_ship("data");
    let watching = async {
        eventually("the status says so", || async {
            let uplink = rig.volume("data").await.uplink.unwrap();
            (uplink.state() == UplinkState::Backoff && !uplink.error.is_empty()).then_some(())
        })
        .await;
        nbd.write(2 << 20, &data).unwrap();
        rig.proxy.set_target(Some(target));
    };
    let (receipt, ()) = tokio::join!(shipping, watching);
    receipt.unwrap();
    let last = rig.ship("data").await;
    let image = rig.restore("data", last.generation.get()).await;
    assert!(image[..2 << 20] == data && image[2 << 20..] == data);
    rig.stop_capture().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_vault_is_resumed_from_what_it_made_durable() {
    let mut rig = Rig::new().await;
    rig.add("data", 8192).await;
    let data = noise(7, 24 << 20);
    rig.nbd("data").write(0, &data).unwrap();
    rig.proxy.set_delay(Duration::from_millis(60));
    let client = rig.client().await;
    let request = tidemark_proto::capture::v1::TriggerIntervalRequest {
        volume: "data".to_owned(),
    };
    let mut client_2 = client.clone();
    let mut answers = client_2
        .trigger_interval(request)
        .await
        .unwrap()
        .into_inner();
    // Parts become durable after a second at the latest.
    let sent = eventually("much is sent", || async {
        let sent = rig.proxy.frame_bytes();
        (sent > 18 << 20).then_some(sent)
    })
    .await;
    assert!(sent < 25 << 20);
    rig.restart_vault().await;
    rig.proxy.set_delay(Duration::ZERO);
    while let Some(answer) = answers.message().await.unwrap() {
        if let Some(tidemark_proto::capture::v1::trigger_interval_response::Message::Receipt(_)) =
            answer.message
        {
            break;
        }
    }
    assert!(rig.restore("data", 0).await[..data.len()] == data);
    let total = rig.proxy.frame_bytes();
    assert!(
        total < (24 << 20) + (20 << 20),
        "the prefix was not sent again: {total}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_source_goes_on_where_it_was() {
    let mut rig = Rig::new().await;
    rig.add("data", 8192).await;
    rig.ship("data").await;
    let data = noise(8, 24 << 20);
    rig.nbd("data").write(0, &data).unwrap();
    rig.proxy.set_delay(Duration::from_millis(60));
    let mut client = rig.client().await;
    let request = tidemark_proto::capture::v1::TriggerIntervalRequest {
        volume: "data".to_owned(),
    };
    let _answers = client.trigger_interval(request).await.unwrap().into_inner();
    eventually("much is sent", || async {
        (rig.proxy.frame_bytes() > 18 << 20).then_some(())
    })
    .await;
    rig.stop_capture().await;
    let before = rig.proxy.frame_bytes();
    rig.proxy.set_delay(Duration::ZERO);
    rig.start_capture().await;
    // By itself, without being asked.
    eventually("the interval is committed", || async {
        (rig.volume("data").await.base_generation == 2).then_some(())
    })
    .await;
    assert!(rig.restore("data", 2).await[..data.len()] == data);
    let resent = rig.proxy.frame_bytes() - before;
    assert!(resent < 20 << 20, "the prefix was not sent again: {resent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_source_stops_shipping_and_says_so() {
    let mut rig = Rig::new().await;
    rig.add("data", 256).await;
    rig.ship("data").await;
    // A copy of the state, as of a cloned machine, starts elsewhere and takes the next term.
    rig.stop_capture().await;
    let here = rig.config.clone();
    let copy = rig.path("copy");
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .arg(&here.state)
        .arg(&copy)
        .status();
    assert!(copied.unwrap().success());
    rig.config.state = copy;
    rig.start_capture().await;
    eventually("the copy has the term", || async {
        (rig.volume("data").await.term == 2).then_some(())
    })
    .await;
    rig.stop_capture().await;
    rig.config = here;
    rig.start_capture().await;
    eventually("the original is fenced", || async {
        let uplink = rig.volume("data").await.uplink.unwrap();
        (uplink.state() == UplinkState::Fenced).then_some(())
    })
    .await;
    rig.nbd("data").write(0, &[1; BLOCK]).unwrap();
    assert_eq!(
        rig.try_ship("data").await.unwrap_err().reason,
        Reason::Fenced
    );
    assert_eq!(rig.generations("data").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_of_the_vault_is_overcome() {
    let rig = Rig::new().await;
    rig.add("data", 1024).await;
    let mut model = vec![0; 1024 * BLOCK];
    let faults = [
        Fault::RefuseTerm(Reason::StoreUnavailable),
        Fault::RefuseTerm(Reason::Internal),
        Fault::RefuseShip(Reason::LimitReached),
        Fault::RefuseShip(Reason::StoreFull),
        Fault::RefuseShip(Reason::BaseNotHead),
        Fault::RefuseShip(Reason::IntervalConflict),
        Fault::RefuseShip(Reason::FrameCorrupt),
        Fault::RefuseShip(Reason::Internal),
        Fault::RefuseShip(Reason::OutOfOrder),
    ];
    for (seed, fault) in (1..).zip(faults) {
        let data = noise(seed, 100_000);
        rig.nbd("data").write(5000 * seed, &data).unwrap();
        let at = usize::try_from(5000 * seed).unwrap();
        model[at..at + data.len()].copy_from_slice(&data);
        if matches!(fault, Fault::RefuseTerm(_)) {
            rig.proxy.fail(Fault::BreakBeforeRequest(1));
        }
        rig.proxy.fail(fault.clone());
        rig.ship("data").await;
        assert_eq!(rig.proxy.faults_left(), 0, "{fault:?} happened");
        assert!(rig.restore("data", 0).await == model, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_mark_is_made_again() {
    let rig = Rig::new().await;
    rig.add("data", 64).await;
    rig.ship("data").await;
    for reason in [
        Reason::StoreUnavailable,
        Reason::BaseNotHead,
        Reason::Internal,
    ] {
        rig.proxy.fail(Fault::RefuseMark(reason));
        let receipt = rig.ship("data").await;
        assert!(!receipt.created, "{reason}");
    }
    assert!(rig.proxy.marks() >= 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn intervals_come_by_themselves_by_time() {
    let rig = Rig::with(|config| config.interval_max = Span::from_millis(300)).await;
    rig.add("data", 1024).await;
    rig.nbd("data").write(0, &[1; BLOCK]).unwrap();
    let through = eventually("an interval by time", || async {
        let volume = rig.volume("data").await;
        (volume.base_generation == 2).then(|| volume.uplink.unwrap().recovery_point_ms)
    })
    .await;
    // Without a change the recovery point moves on, and no generation is made.
    eventually("the recovery point moves", || async {
        let point = rig.volume("data").await.uplink.unwrap().recovery_point_ms;
        (point > through + 600).then_some(())
    })
    .await;
    let generations = rig.generations("data").await;
    assert_eq!(generations.len(), 2);
    assert!(generations[1].current_through_ms > through);
}

#[tokio::test(flavor = "multi_thread")]
async fn intervals_come_by_themselves_by_changes() {
    let rig = Rig::with(|config| config.changed_blocks_max = 100).await;
    rig.add("data", 1024).await;
    rig.nbd("data").write(0, &noise(1, 99 * BLOCK)).unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(rig.volume("data").await.base_generation, 1);
    rig.nbd("data")
        .write(500 * BLOCK as u64, &noise(1, BLOCK))
        .unwrap();
    eventually("an interval by changes", || async {
        (rig.volume("data").await.base_generation == 2).then_some(())
    })
    .await;
    let newest = rig.generations("data").await.pop().unwrap();
    assert_eq!(newest.changed_blocks, 100);
    assert_eq!(
        newest.trigger(),
        tidemark_proto::common::v1::Trigger::ChangedBlocksMax
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_restored_equals_the_cut_though_writes_go_on() {
    let rig = Rig::new().await;
    rig.add("data", 2048).await;
    let mut nbd = rig.nbd("data");
    // Every write fills the whole volume with one number: a cut shows at most two, in order.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    let writer = std::thread::spawn(move || {
        for n in 1..=250u8 {
            if stopped.load(std::sync::atomic::Ordering::Relaxed) {
                break;
            }
            for part in 0..8 {
                nbd.write(part << 20, &vec![n; 1 << 20]).unwrap();
            }
        }
    });
    for _ in 0..4 {
        let receipt = rig.ship("data").await;
        let image = rig.restore("data", receipt.generation.get()).await;
        let parts: Vec<u8> = image.chunks(1 << 20).map(|part| part[0]).collect();
        for (part, first) in image.chunks(1 << 20).zip(&parts) {
            let torn = part.iter().position(|byte| byte != first);
            // The write under way at the cut may be there in part.
            assert!(torn.is_none() || part.iter().all(|byte| byte.abs_diff(*first) <= 1));
        }
        assert!(parts.windows(2).all(|pair| pair[0] >= pair[1]), "{parts:?}");
        assert!(parts[0] - parts[7] <= 1, "{parts:?}");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_before_a_request_is_in_its_generation_while_others_ask_too() {
    let rig = Arc::new(Rig::new().await);
    rig.add("data", 64).await;
    // One interval of somebody else's at a time, so that no generation is retired before it is restored.
    let (ask, mut asked) = mpsc::channel(1);
    let others_rig = Arc::clone(&rig);
    let others = tokio::spawn(async move {
        let mut nbd = others_rig.nbd("data");
        while let Some(number) = asked.recv().await {
            nbd.write(2 * BLOCK as u64, &[number; BLOCK]).unwrap();
            others_rig.ship("data").await;
        }
    });
    let mut nbd = rig.nbd("data");
    for number in 1..=48_u8 {
        ask.send(number).await.unwrap();
        // Sooner or later within the other one's cut.
        tokio::time::sleep(Duration::from_micros(u64::from(number % 16) * 250)).await;
        nbd.write(0, &[number; BLOCK]).unwrap();
        let receipt = rig.ship("data").await;
        let image = rig.restore("data", receipt.generation.get()).await;
        assert_eq!(image[0], number, "{receipt:?}");
    }
    drop(ask);
    others.await.unwrap();
}
