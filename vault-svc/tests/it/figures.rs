//! Figures, printed and not judged: `cargo nextest run -p vault-svc --run-ignored only figures --no-capture`.

use std::{io::Write, time::Instant};

use crate::source::{Source, config, connect, restore, ship};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures"]
async fn figures_of_an_interval_of_10240_scattered_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let running = vault_svc::start(config(dir.path())).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(1, 262_144);
    source.compressed = Some(false);
    source.start_term(&mut clients).await.unwrap();
    for round in 0..4 {
        for _ in 0..10_240 {
            let block = source.numbers.below(262_144);
            source.write(block);
        }
        let prepared = source.prepare();
        let bytes: Vec<u8> = prepared
            .batches
            .iter()
            .flat_map(|batch| batch.frames.to_vec())
            .collect();
        let begin = Instant::now();
        let mut file = std::fs::File::create(dir.path().join("plain")).unwrap();
        file.write_all(&bytes).unwrap();
        file.sync_all().unwrap();
        let plain = begin.elapsed();
        let begin = Instant::now();
        let receipt = ship(&mut clients, &prepared).await.unwrap();
        let shipped = begin.elapsed();
        source.committed(&receipt);
        let begin = Instant::now();
        let image = restore(&mut clients, &source, 0).await.unwrap();
        let restored = begin.elapsed();
        assert!(image == source.image);
        println!(
            "round {round}: {} MiB, written and synced {plain:.1?}, shipped {shipped:.1?}, {:.1}x; restored {} blocks in {restored:.1?}",
            bytes.len() >> 20,
            shipped.as_secs_f64() / plain.as_secs_f64(),
            receipt.generation.get() * 10_240,
        );
    }
    running.shutdown().await.unwrap();
}
