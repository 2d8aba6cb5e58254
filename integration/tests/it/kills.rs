//! `kill -9` of either service, or of both, at random moments, again and again: under load, while an interval is in
//! flight, while a service is still starting. Nothing is lost, nothing is half there, and it goes on by itself.
//!
//! The rounds go in batches, each with a fresh volume. At the end of a batch every retained generation must be the
//! volume as the writers' logs have it, in the order of the generations; each receipt that was given on the way must be
//! for an image between its request and its answer; and the source scrub finds nothing.
//!
//! `TIDEMARK_KILL_ROUNDS` says how many rounds, `TIDEMARK_SEED` which ones; `make soak` is the long run.

use std::{collections::BTreeMap, fs, path::Path, thread::JoinHandle, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    programs::{Split, args, wait_for},
    workload::{Progress, Writer, seed},
};

const SIZE: usize = 16 << 20;
const WRITERS: usize = 2;
const ROUNDS: usize = 200;
const ROUNDS_PER_BATCH: usize = 25;

/// A receipt, and what each writer had done before its request and begun until its answer.
struct Shipped {
    generation: u64,
    before: [usize; WRITERS],
    after: [usize; WRITERS],
}

struct Batch {
    services: Split,
    writers: [Writer; WRITERS],
    ships: Vec<JoinHandle<Option<Shipped>>>,
    rng: StdRng,
    // Last, so that the services end before it goes.
    dir: tempfile::TempDir,
}

fn services(dir: &Path) -> Split {
    let mut services = Split::new(dir);
    services.capture_flags = [
        "--interval-max=250ms",
        "--backoff-min=20ms",
        "--backoff-max=300ms",
        "--scrub-period=500ms",
        "--retry-period=100ms",
    ]
    .map(str::to_owned)
    .to_vec();
    // Everything that the vault does in the background is under way at some kill.
    services.vault_flags = [
        "--retain=10",
        "--reader-grace=300ms",
        "--maintenance-period=200ms",
        "--part-bytes-max=256KiB",
    ]
    .map(str::to_owned)
    .to_vec();
    services.start_vault();
    services.start_capture();
    services
}

impl Batch {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let services = services(dir.path());
        let file = dir.path().join("data.img");
        let size = SIZE.to_string();
        services.cli.json(args![
            "volume", "add", "data", "--file", file, "--size", size
        ]);
        let part = SIZE / WRITERS;
        let writers = std::array::from_fn(|n| {
            let (socket, bytes) = (services.socket.clone(), n * part..(n + 1) * part);
            Writer::start_in(socket, "data", bytes, seed.wrapping_add(n as u64))
        });
        Self {
            dir,
            services,
            writers,
            ships: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// One kill and the start after it.
    fn round(&mut self) {
        if self.rng.random_bool(0.5) {
            self.ship_meanwhile();
        }
        // Often so soon that the last start isn't over.
        let pause = if self.rng.random_bool(0.3) {
            self.rng.random_range(0..60)
        } else {
            self.rng.random_range(60..600)
        };
        self.sleep(pause);
        let (capture, vault) = match self.rng.random_range(0..10) {
            0..5 => (true, false),
            5..8 => (false, true),
            _ => (true, true),
        };
        self.services.assert_both_run();
        if capture {
            self.services.kill_capture();
        }
        if vault {
            self.services.kill_vault();
        }
        let (gap, vault_first) = (self.rng.random_range(0..150), self.rng.random_bool(0.5));
        self.sleep(gap);
        if vault && vault_first {
            self.services.spawn_vault();
        }
        if capture {
            self.services.spawn_capture();
        }
        if vault && !vault_first {
            self.sleep(gap);
            self.services.spawn_vault();
        }
        if self.rng.random_bool(0.25) {
            self.goes_on();
        }
    }

    fn sleep(&self, milliseconds: u64) {
        std::thread::sleep(Duration::from_millis(milliseconds));
    }

    /// Asks for an interval; the kill that follows may end it.
    fn ship_meanwhile(&mut self) {
        let mut command =
            self.services
                .cli
                .command(args!["ship", "data", "--json", "--wait-for-vault", "2s"]);
        let writers = self.writers.each_ref().map(Writer::progress);
        self.ships.push(std::thread::spawn(move || {
            let before = writers.each_ref().map(Progress::done);
            let output = command.output().unwrap();
            let after = writers.each_ref().map(Progress::begun);
            let receipt: serde_json::Value = output
                .status
                .success()
                .then(|| serde_json::from_slice(&output.stdout).unwrap())?;
            Some(Shipped {
                generation: receipt["generation"].as_u64().unwrap(),
                before,
                after,
            })
        }));
    }

    fn head(&self) -> Option<u64> {
        let list = args!["generation", "list", "data", "--json"];
        let output = self.services.cli.output(list);
        let listed: serde_json::Value = output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).unwrap())?;
        listed
            .as_array()
            .unwrap()
            .last()
            .map(|newest| newest["generation"].as_u64().unwrap())
    }

    /// Without anybody's help.
    fn goes_on(&mut self) {
        self.services.vault_is_up();
        let before = self.head();
        wait_for("an interval after the kill", || {
            self.services.assert_both_run();
            (self.head() > before).then_some(())
        });
    }

    /// The end of the batch: everything is as the logs have it. Gives the number of receipts that were compared.
    fn check(mut self) -> usize {
        self.services.vault_is_up();
        self.services.capture_is_up();
        self.writers.iter_mut().for_each(Writer::stop);
        let all = self.writers.each_ref().map(Writer::done);
        let receipt = self.services.cli.json(args!["ship", "data"]);
        let volume = fs::read(self.dir.path().join("data.img")).unwrap();
        assert_eq!(self.moments(&volume), all, "the volume holds every write");

        // Retires what would otherwise be retired while it is looked at.
        self.services.cli.json(args!["maintain"]);
        let mut moments = BTreeMap::new();
        let mut last = [0; WRITERS];
        for listed in self.services.cli.generations("data") {
            let generation = listed["generation"].as_u64().unwrap();
            let image = self
                .services
                .cli
                .restore("data", generation, self.dir.path());
            let moment = self.moments(&fs::read(&image).unwrap());
            fs::remove_file(image).unwrap();
            assert!(
                last.iter().zip(&moment).all(|(before, now)| before <= now),
                "generation {generation} is of {moment:?}, the one before it of {last:?}"
            );
            last = moment;
            moments.insert(generation, moment);
        }
        assert_eq!(last, all, "the newest generation is the volume");
        assert_eq!(
            receipt["generation"].as_u64(),
            moments.last_key_value().map(|(newest, _)| *newest)
        );
        let compared = self.check_receipts(&moments);
        self.services.cli.assert_scrub_is_clean("data");
        let logged = self.services.logged();
        let bad = |line: &&str| line.contains("panicked") || line.contains("ERROR");
        let told: Vec<_> = logged.lines().filter(bad).collect();
        assert!(told.is_empty(), "a human is asked for: {told:#?}");
        self.services.stop();
        compared
    }

    /// Each generation that was promised, where it is still retained, is of a moment of its request.
    fn check_receipts(&mut self, moments: &BTreeMap<u64, [usize; WRITERS]>) -> usize {
        let mut compared = 0;
        for ship in std::mem::take(&mut self.ships) {
            let Some(shipped) = ship.join().unwrap() else {
                continue;
            };
            let Some(moment) = moments.get(&shipped.generation) else {
                continue;
            };
            let bounds = shipped.before.iter().zip(&shipped.after);
            for (moment, (&before, &after)) in moment.iter().zip(bounds) {
                assert!(
                    (before..=after).contains(moment),
                    "generation {} has a writer after write {moment}, not within {before} to {after}",
                    shipped.generation,
                );
            }
            compared += 1;
        }
        compared
    }

    fn moments(&self, image: &[u8]) -> [usize; WRITERS] {
        self.writers
            .each_ref()
            .map(|writer| writer.moment_of(image))
    }
}

#[test]
fn either_service_killed_at_random_moments_loses_nothing() {
    let rounds = std::env::var("TIDEMARK_KILL_ROUNDS").map_or(ROUNDS, |text| text.parse().unwrap());
    let seed = seed(0x6b11);
    let (mut left, mut compared) = (rounds, 0);
    for number in 0.. {
        if left == 0 {
            break;
        }
        let mut batch = Batch::new(seed.wrapping_add(number * 1_000));
        for _ in 0..left.min(ROUNDS_PER_BATCH) {
            batch.round();
            left -= 1;
        }
        compared += batch.check();
        println!(
            "{} of {rounds} rounds, {compared} receipts compared",
            rounds - left
        );
    }
    assert!(
        rounds < ROUNDS || compared > 0,
        "some receipt was given under load"
    );
}
