//! Peers that lie, stall or send garbage: a clear refusal, and nothing changes.

use bytes::Bytes;
use tidemark_block::{BlockCount, BlockIndex, GenerationId, Geometry, ImageDigest};
use tidemark_proto::{
    Reason,
    convert::{FrameBatch, ShipAnswer, ShipMessage},
    vault::v1::{ListVolumesRequest, RestoreRequest, vault_client::VaultClient},
};
use tonic::transport::Channel;

use crate::source::{Clients, Prepared, Source, Wire, config, connect, restore, ship};

/// Makes a lie of what would be accepted.
type Spoil = Box<dyn Fn(&mut Prepared)>;

async fn refused(clients: &mut Clients, prepared: &Prepared) -> Reason {
    let error = ship(clients, prepared).await.unwrap_err();
    assert!(!error.message.is_empty() && !error.action.is_empty());
    error.reason
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_lie_is_refused_and_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(11, 2000);
    source.start_term(&mut clients).await.unwrap();
    source.write_some(900);
    source.ship(&mut clients).await.unwrap();
    let before = source.image.clone();
    source.write_some(900);
    let good = source.prepare();
    let id = |source: &mut Source| tidemark_block::IntervalId::from_bytes(source.numbers.id());
    let cases: Vec<(Reason, Spoil)> = vec![
        (
            Reason::BaseNotHead,
            Box::new(|p| p.header.base = GenerationId::new(9)),
        ),
        (
            Reason::BaseNotHead,
            Box::new(|p| p.header.base = GenerationId::ZERO),
        ),
        (
            Reason::GeometryMismatch,
            Box::new(|p| {
                p.header.geometry = Geometry::new(4096, p.header.geometry.block_size()).unwrap();
            }),
        ),
        (
            Reason::DigestMismatch,
            Box::new(|p| p.seal.image_digest = ImageDigest::from_bytes([7; 16])),
        ),
        (
            Reason::RequestInvalid,
            Box::new(|p| p.seal.changed_blocks = BlockCount::new(1)),
        ),
        (
            Reason::RequestInvalid,
            Box::new(|p| p.seal.frame_count += 1),
        ),
        (
            Reason::RequestInvalid,
            Box::new(|p| {
                p.batches.pop();
            }),
        ),
        (Reason::OutOfOrder, Box::new(|p| p.batches.swap(0, 1))),
        (
            Reason::OutOfOrder,
            Box::new(|p| {
                let b = p.batches[0].clone();
                p.batches.insert(1, b);
            }),
        ),
        (
            Reason::OutOfOrder,
            Box::new(|p| p.batches[1].end = BlockIndex::new(1 << 40)),
        ),
        (
            Reason::OutOfOrder,
            Box::new(|p| p.batches[1].end = p.batches[0].end.next()),
        ),
        (
            Reason::FrameCorrupt,
            Box::new(|p| flip(&mut p.batches[1], 9)),
        ),
        (
            Reason::FrameCorrupt,
            Box::new(|p| flip(&mut p.batches[1], 1000)),
        ),
        (
            Reason::FrameCorrupt,
            Box::new(|p| {
                let f = p.batches[1].frames.clone();
                p.batches[1].frames = f.slice(..f.len() - 1);
            }),
        ),
        (
            Reason::FrameCorrupt,
            Box::new(|p| p.batches[1].frames = Bytes::from(vec![0xA5; 1 << 20])),
        ),
    ];
    for (n, (reason, spoil)) in cases.into_iter().enumerate() {
        let mut bad = good.clone();
        bad.header.interval = id(&mut source);
        spoil(&mut bad);
        assert_eq!(refused(&mut clients, &bad).await, reason, "case {n}");
    }
    let listed = clients
        .vault
        .list_volumes(ListVolumesRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(listed.volumes[0].head_generation, 1);
    assert!(restore(&mut clients, &source, 0).await.unwrap() == before);
    let receipt = ship(&mut clients, &good).await.unwrap();
    source.committed(&receipt);
    assert!(restore(&mut clients, &source, 0).await.unwrap() == source.image);
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_have_a_limit_and_what_is_below_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(15, 200_000);
    source.start_term(&mut clients).await.unwrap();
    for block in (0..200_000).step_by(2) {
        source.block(block)[0] = 1;
        source.changed.insert(block);
    }
    source.compressed = Some(true);
    source.batch_frames = 400;
    source.ship(&mut clients).await.unwrap();
    // Every second block back to zero: as many runs as there are blocks.
    source.zero_each((0..200_000).step_by(2));
    source.batch_frames = 3000;
    let prepared = source.prepare();
    let longest = prepared
        .batches
        .iter()
        .map(|batch| batch.frames.len())
        .max()
        .unwrap();
    assert!(
        prepared.batches.len() == 1 && longest < 2 << 20,
        "{longest}"
    );
    let receipt = ship(&mut clients, &prepared).await.unwrap();
    source.committed(&receipt);
    assert!(restore(&mut clients, &source, 2).await.unwrap() == source.image);
    assert!(restore(&mut clients, &source, 1).await.is_ok());
    let mut large = prepared.clone();
    large.header.base = source.base;
    large.header.interval = tidemark_block::IntervalId::from_bytes([9; 16]);
    large.batches[0].frames = Bytes::from(vec![0; (2 << 20) + 1]);
    assert_eq!(refused(&mut clients, &large).await, Reason::RequestInvalid);
    running.shutdown().await.unwrap();
}

fn flip(batch: &mut FrameBatch, at: usize) {
    let mut bytes = batch.frames.to_vec();
    bytes[at] ^= 1;
    batch.frames = bytes.into();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_in_the_wrong_order_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(12, 100);
    source.start_term(&mut clients).await.unwrap();
    source.write_some(20);
    let prepared = source.prepare();
    let mut wire = Wire::bare(&mut clients).await.unwrap();
    wire.send(ShipMessage::Seal(prepared.seal)).await;
    assert_eq!(wire.answer().await.unwrap_err().reason, Reason::OutOfOrder);
    let mut wire = Wire::open(&mut clients, &prepared.header).await.unwrap();
    wire.answer().await.unwrap();
    wire.send(ShipMessage::Header(prepared.header.clone()))
        .await;
    assert_eq!(wire.answer().await.unwrap_err().reason, Reason::OutOfOrder);
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interval_is_not_resumed_under_another_cut() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(13, 1000);
    source.start_term(&mut clients).await.unwrap();
    source.write_some(500);
    let prepared = source.prepare();
    let mut wire = Wire::open(&mut clients, &prepared.header).await.unwrap();
    wire.answer().await.unwrap();
    wire.send(ShipMessage::Frames(prepared.batches[0].clone()))
        .await;
    let ShipAnswer::Ack { .. } = wire.answer().await.unwrap() else {
        panic!()
    };
    wire.hang_up();
    let mut other = prepared.clone();
    other.header.cut_time_ms += 1;
    assert_eq!(
        refused(&mut clients, &other).await,
        Reason::IntervalConflict
    );
    let receipt = ship(&mut clients, &prepared).await.unwrap();
    source.committed(&receipt);
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_stream_ends_an_older_one_of_the_same_volume() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(14, 1000);
    source.start_term(&mut clients).await.unwrap();
    source.write_some(500);
    let prepared = source.prepare();
    let mut stale = Wire::open(&mut clients, &prepared.header).await.unwrap();
    stale.answer().await.unwrap();
    stale
        .send(ShipMessage::Frames(prepared.batches[0].clone()))
        .await;
    let receipt = ship(&mut clients, &prepared).await.unwrap();
    source.committed(&receipt);
    loop {
        match stale.answer().await {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.reason, Reason::IntervalGivenUp);
                break;
            }
        }
    }
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_beyond_the_limit_are_refused_and_stalled_ones_are_closed() {
    let dir = tempfile::tempdir().unwrap();
    let config = vault_svc::Config {
        streams_max: 2,
        stream_idle_max: std::time::Duration::from_secs(2).into(),
        part_age_max: std::time::Duration::from_millis(20).into(),
        ..config(dir.path())
    };
    let running = vault_svc::start(config).await.unwrap();
    let mut clients = connect(&running).await;
    let mut wires = Vec::new();
    let mut reasons = Vec::new();
    for seed in 20..24 {
        let mut source = Source::new(seed, 100);
        source.start_term(&mut clients).await.unwrap();
        source.write(1);
        let prepared = source.prepare();
        let mut wire = Wire::open(&mut clients, &prepared.header).await.unwrap();
        match wire.answer().await {
            Ok(_) => wires.push(wire),
            Err(error) => reasons.push(error.reason),
        }
    }
    assert_eq!(reasons, [Reason::LimitReached, Reason::LimitReached]);
    for wire in &mut wires {
        assert_eq!(
            wire.answer().await.unwrap_err().reason,
            Reason::IntervalGivenUp
        );
    }
    let mut source = Source::new(25, 100);
    source.start_term(&mut clients).await.unwrap();
    source.write(1);
    source.ship(&mut clients).await.unwrap();
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_nothing_of_an_image_makes_room_for_others() {
    let dir = tempfile::tempdir().unwrap();
    let config = vault_svc::Config {
        restores_max: 1,
        stream_idle_max: std::time::Duration::from_millis(300).into(),
        part_age_max: std::time::Duration::from_millis(20).into(),
        ..config(dir.path())
    };
    let running = vault_svc::start(config).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(26, 3000);
    source.start_term(&mut clients).await.unwrap();
    for block in 0..3000 {
        source.write(block);
    }
    source.ship(&mut clients).await.unwrap();

    // It has room for 64 KiB, and looks at nothing.
    let channel = Channel::from_shared(format!("http://{}", running.listen_addr)).unwrap();
    let mut slow = VaultClient::new(channel.connect().await.unwrap());
    let request = RestoreRequest {
        volume: source.volume.to_string(),
        generation: 1,
    };
    let mut unread = slow.restore(request).await.unwrap().into_inner();
    let error = restore(&mut clients, &source, 1).await.unwrap_err();
    assert_eq!(error.reason, Reason::LimitReached);
    let began = std::time::Instant::now();
    let image = loop {
        match restore(&mut clients, &source, 1).await {
            Ok(image) => break image,
            Err(error) => assert_eq!(error.reason, Reason::LimitReached),
        }
        assert!(began.elapsed().as_secs() < 20, "its place is never free");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert!(image == source.image);
    // Once it looks, it hears why there is no more.
    let error = loop {
        match unread.message().await {
            Ok(message) => assert!(message.is_some(), "an end without a reason"),
            Err(error) => break tidemark_proto::RpcError::from(error),
        }
    };
    assert_eq!(error.reason, Reason::TooSlow);
    running.shutdown().await.unwrap();
}
