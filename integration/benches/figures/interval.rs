//! What an interval costs, from the trigger to the receipt.

use std::{collections::BTreeSet, fs::File, io::Write as _, path::Path};

use anyhow::{Result, ensure};
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};
use tidemark_integration::nbd::Client;

use crate::{
    Args,
    report::{Bound, Report, median, timed},
    services::Services,
};

const BLOCK: usize = 4096;
const CHANGED: usize = 10_240;
/// Connections that write at a time: the first touch of a region costs a sync, which they share.
const WRITERS: usize = 16;
const GIB: u64 = 1 << 30;

pub(crate) fn run(dir: &Path, args: &Args, report: &mut Report) -> Result<()> {
    report.section("An interval of 10,240 scattered changed 4 KiB blocks, trigger to receipt");
    let mut raw_8_gib = 0.0;
    for (codec, gib, bound) in [("raw", 8, 5.0), ("zstd", 8, 8.0), ("raw", 1024, 5.0)] {
        if !args.interval_gib.contains(&gib) {
            continue;
        }
        let dir = dir.join(format!("interval-{codec}-{gib}"));
        let mut services = Services::start(&dir, &["--codec", codec])?;
        services.add("data", &dir.join("data.img"), gib * GIB);
        let mut clients = (0..WRITERS)
            .map(|_| Client::connect(&services.socket(), "data"))
            .collect::<std::io::Result<Vec<_>>>()?;
        services.ship("data")?;

        let mut rng = StdRng::seed_from_u64(1);
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        // The first round is for warming up.
        for round in 0..=args.rounds {
            let bytes = scatter(&mut clients, gib * GIB, &mut rng)?;
            let (peer, ()) = timed(|| write_and_sync(&dir.join(format!("peer-{round}")), &bytes))?;
            let (time, receipt) = timed(|| services.ship("data"))?;
            ensure!(receipt.changed_blocks == CHANGED as u64, "{receipt:?}");
            if round > 0 {
                ours.push(time);
                peers.push(peer);
            }
        }
        let (ours, peer) = (median(&ours), median(&peers));
        let what = format!("{codec} frames, {gib} GiB; peer: write + fsync of the same bytes");
        report.ratio(&what, "ms", ours, peer, Bound::AtMost(bound));
        if codec == "raw" && gib == 8 {
            raw_8_gib = ours;
            let mut idle = Vec::new();
            for _ in 0..args.rounds {
                idle.push(timed(|| services.ship("data"))?.0);
            }
            report.alone("no change", "ms", median(&idle), Bound::AtMost(10.0));
        }
        if gib == 1024 && raw_8_gib > 0.0 {
            let what = "1 TiB sparse against 8 GiB, both ours";
            report.ratio(what, "ms", ours, raw_8_gib, Bound::AtMost(1.5));
        }
        drop(clients);
        services.stop(&format!("intervals, {codec}, {gib} GiB"), report);
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(())
}

/// Writes as many blocks as an interval has, at random places, each with new content that compresses to about a half,
/// and gives what was written.
fn scatter(clients: &mut [Client], size: u64, rng: &mut StdRng) -> Result<Vec<u8>> {
    let mut places = BTreeSet::new();
    while places.len() < CHANGED {
        places.insert(rng.random_range(0..size / BLOCK as u64));
    }
    let places: Vec<_> = places.into_iter().collect();
    let mut bytes = vec![0x2E; CHANGED * BLOCK];
    for block in bytes.chunks_exact_mut(BLOCK) {
        rng.fill_bytes(&mut block[..BLOCK / 2]);
    }
    let share = CHANGED.div_ceil(clients.len());
    std::thread::scope(|scope| -> Result<()> {
        let writers: Vec<_> = clients
            .iter_mut()
            .zip(places.chunks(share).zip(bytes.chunks(share * BLOCK)))
            .map(|(client, (places, bytes))| {
                scope.spawn(move || -> std::io::Result<()> {
                    for (place, block) in places.iter().zip(bytes.chunks_exact(BLOCK)) {
                        client.write(place * BLOCK as u64, block)?;
                    }
                    client.flush()
                })
            })
            .collect();
        for writer in writers {
            writer.join().expect("a writer doesn't panic")?;
        }
        Ok(())
    })?;
    Ok(bytes)
}

/// Into a new file each time, as a store of generations has to: truncating and filling one again would get the same
/// warm pages and the same blocks of the disk back.
fn write_and_sync(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(())
}
