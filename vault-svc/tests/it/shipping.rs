//! Intervals arrive, and come back as images.

use tidemark_proto::{
    Reason,
    convert::{
        CurrentMark, DigestLevel, DigestRun, DigestsRequest, NodeRange, ShipAnswer, ShipMessage,
    },
    vault::v1::{
        GetBlockDigestsRequest, GetGenerationRequest, ListGenerationsRequest, ListVolumesRequest,
        MarkCurrentRequest,
    },
};

use crate::source::{Source, Wire, config, connect, digest_of, restore, ship};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_retained_generation_is_restored_byte_for_byte_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Source::new(1, 3000);
    let mut images = Vec::new();
    for round in 0..3 {
        let running = vault_svc::start(config(dir.path())).await.unwrap();
        let mut clients = connect(&running).await;
        let grant = source.start_term(&mut clients).await.unwrap();
        assert_eq!(grant.term.get(), round + 1);
        assert_eq!(
            grant.head.map_or(0, |head| head.generation.get()),
            source.base.get()
        );
        source.write_some(700);
        source.ship(&mut clients).await.unwrap();
        images.push(source.image.clone());
        for (image, generation) in images.iter().zip(1..) {
            assert!(
                restore(&mut clients, &source, generation).await.unwrap() == *image,
                "generation {generation}"
            );
        }
        running.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interval_of_many_parts_resumes_behind_what_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Source::new(2, 9000);
    let small_parts = || vault_svc::Config {
        part_bytes_max: vault_svc::config::ByteSize::mib(1),
        ..config(dir.path())
    };
    let mut running = vault_svc::start(small_parts()).await.unwrap();
    let mut clients = connect(&running).await;
    source.start_term(&mut clients).await.unwrap();
    source.write_some(4000);
    let prepared = source.prepare();
    let mut durable = 0;
    for stop_after in [5, 3, 4] {
        let mut wire = Wire::open(&mut clients, &prepared.header).await.unwrap();
        let ShipAnswer::Ready { durable_end } = wire.answer().await.unwrap() else {
            panic!()
        };
        assert!(
            durable_end.get() >= durable,
            "what was acknowledged is still there"
        );
        let rest = prepared
            .batches
            .iter()
            .filter(|batch| batch.end > durable_end);
        let mut sent = 0;
        for batch in rest.take(stop_after) {
            wire.send(ShipMessage::Frames(batch.clone())).await;
            sent = batch.end.get();
        }
        while durable < sent {
            let ShipAnswer::Ack { durable_end, .. } = wire.answer().await.unwrap() else {
                panic!()
            };
            durable = durable_end.get();
        }
        if stop_after == 3 {
            running.shutdown().await.unwrap();
            running = vault_svc::start(small_parts()).await.unwrap();
            clients = connect(&running).await;
        }
        wire.hang_up();
    }
    let receipt = ship(&mut clients, &prepared).await.unwrap();
    source.committed(&receipt);
    // Asked again, the receipt is the same.
    assert_eq!(ship(&mut clients, &prepared).await.unwrap(), receipt);
    assert!(restore(&mut clients, &source, 0).await.unwrap() == source.image);
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_term_is_fenced_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(3, 100);
    source.start_term(&mut clients).await.unwrap();
    let old = source.term;
    source.start_term(&mut clients).await.unwrap();
    source.write_some(10);
    let mut prepared = source.prepare();
    prepared.header.term = old;
    let error = ship(&mut clients, &prepared).await.unwrap_err();
    assert_eq!(error.reason, Reason::Fenced);
    source.term = old;
    assert_eq!(
        source.start_term(&mut clients).await.unwrap_err().reason,
        Reason::Fenced
    );
    let listed = clients
        .vault
        .list_volumes(ListVolumesRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (listed.volumes[0].term, listed.volumes[0].head_generation),
        (2, 0)
    );
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unchanged_image_stays_current_and_makes_no_generation() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(4, 100);
    source.start_term(&mut clients).await.unwrap();
    // The first generation may be of an image that is all zero.
    let first = source.ship(&mut clients).await.unwrap();
    assert_eq!((first.generation.get(), first.changed_blocks.get()), (1, 0));
    let later = first.cut_time_ms + 60_000;
    let mark = CurrentMark {
        volume: source.volume,
        term: source.term,
        interval: tidemark_block::IntervalId::from_bytes(source.numbers.id()),
        generation: source.base,
        image_digest: source.digest(),
        cut_time_ms: later,
    };
    let receipt = clients
        .ingest
        .mark_current(MarkCurrentRequest::from(mark.clone()))
        .await
        .unwrap()
        .into_inner();
    assert!(!receipt.created);
    assert_eq!(receipt.generation, 1);
    let wrong = CurrentMark {
        image_digest: tidemark_block::ImageDigest::from_bytes([1; 16]),
        ..mark
    };
    let error = clients
        .ingest
        .mark_current(MarkCurrentRequest::from(wrong))
        .await
        .unwrap_err();
    assert_eq!(
        tidemark_proto::RpcError::from(error).reason,
        Reason::DigestMismatch
    );
    running.shutdown().await.unwrap();
    // It survives a clean stop.
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let request = ListGenerationsRequest {
        volume: "data".into(),
    };
    let listed = clients
        .vault
        .list_generations(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(listed.generations.len(), 1);
    assert_eq!(listed.generations[0].current_through_ms, later);
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn digests_are_those_of_the_head_at_every_level() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(5, 5000);
    source.start_term(&mut clients).await.unwrap();
    source.write_some(300);
    source.ship(&mut clients).await.unwrap();
    let table = tidemark_block::MemoryTable::of_image(source.geometry, &source.image);
    use tidemark_block::TableView;
    for (level, nodes) in [
        (DigestLevel::Leaf, 5),
        (DigestLevel::Group, 157),
        (DigestLevel::Block, 5000),
    ] {
        let request = DigestsRequest {
            volume: source.volume,
            term: source.term,
            generation: source.base,
            level,
            ranges: vec![
                NodeRange { start: 0, count: 1 },
                NodeRange {
                    start: 1,
                    count: nodes - 1,
                },
            ],
        };
        let mut stream = clients
            .ingest
            .get_block_digests(GetBlockDigestsRequest::from(request))
            .await
            .unwrap()
            .into_inner();
        let mut found = vec![tidemark_block::Checksum128::ZERO; usize::try_from(nodes).unwrap()];
        while let Some(run) = stream.message().await.unwrap() {
            let run = DigestRun::try_from(run).unwrap();
            let at = usize::try_from(run.start).unwrap();
            found[at..at + run.digests.len()].copy_from_slice(&run.digests);
        }
        for (node, found) in (0..nodes).zip(&found) {
            let expected = match level {
                DigestLevel::Leaf => {
                    let mut one = [tidemark_block::Checksum128::ZERO];
                    let Ok(()) = table.leaves(node, &mut one);
                    one[0]
                }
                DigestLevel::Group => {
                    let Ok(groups) = table.groups(node / 32);
                    groups[usize::try_from(node % 32).unwrap()]
                }
                DigestLevel::Block => table.get(tidemark_block::BlockIndex::new(node)),
            };
            assert_eq!(*found, expected, "{level:?} {node}");
        }
    }
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_checksum_table_is_made_anew_from_segments() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Source::new(6, 4000);
    for _ in 0..3 {
        let running = vault_svc::start(config(dir.path())).await.unwrap();
        let mut clients = connect(&running).await;
        source.start_term(&mut clients).await.unwrap();
        source.write_some(500);
        source.ship(&mut clients).await.unwrap();
        source.write_some(500);
        source.ship(&mut clients).await.unwrap();
        running.shutdown().await.unwrap();
        std::fs::remove_dir_all(dir.path().join("state")).unwrap();
    }
    assert_eq!(source.base.get(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_and_numbers_that_are_not_there_are_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut get = async |volume: &str, generation| {
        let request = GetGenerationRequest {
            volume: volume.into(),
            generation,
        };
        let result = clients.vault.get_generation(request).await;
        result
            .map(|_| ())
            .map_err(|status| tidemark_proto::RpcError::from(status).reason)
    };
    assert_eq!(get("data", 0).await, Err(Reason::VolumeNotFound));
    let mut clients2 = connect(&running).await;
    for seed in [7, 8] {
        let mut source = Source::new(seed, 10);
        source.start_term(&mut clients2).await.unwrap();
        if seed == 7 {
            assert_eq!(get("data", 0).await, Err(Reason::GenerationNotFound));
            source.write(3);
            source.ship(&mut clients2).await.unwrap();
            assert_eq!(get("data", 1).await, Ok(()));
            assert_eq!(get("data", 2).await, Err(Reason::GenerationNotFound));
            assert_eq!(digest_of(source.geometry, &source.image), source.digest());
        } else {
            assert_eq!(get("data", 0).await, Err(Reason::VolumeAmbiguous));
            assert_eq!(
                get(&source.volume.to_string(), 0).await,
                Err(Reason::GenerationNotFound)
            );
        }
    }
    running.shutdown().await.unwrap();
}
