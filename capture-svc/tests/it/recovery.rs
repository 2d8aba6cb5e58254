//! Crashes, lost tables, foreign writes, a vault that isn't what it was: it goes on by itself, and stays exact.

use std::{
    net::TcpListener,
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use capture_svc::config::{ByteSize, Span};
use tidemark_proto::{
    Reason,
    capture::v1::{self as pb, capture_client::CaptureClient},
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    nbd::Nbd,
    proxy::Fault,
    rig::{PATIENCE, Rig, cut_is_open, eventually, noise, state_dir, vault_config},
};

const BLOCK: usize = 4096;

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_checksum_table_is_fetched_and_only_differences_are_shipped() {
    let mut rig = Rig::new().await;
    rig.add("data", 4096).await;
    let content = noise(1, 8 << 20);
    rig.nbd("data").write(0, &content).unwrap();
    rig.ship("data").await;
    let dir = state_dir(&rig, "data").await;
    for (round, spoil) in (1u8..).zip(["remove", "empty"]) {
        rig.stop_capture().await;
        match spoil {
            "remove" => std::fs::remove_file(dir.join("table")).unwrap(),
            _ => {
                let table = std::fs::OpenOptions::new()
                    .write(true)
                    .open(dir.join("table"))
                    .unwrap();
                let length = table.metadata().unwrap().len();
                table.set_len(0).unwrap();
                table.set_len(length).unwrap();
            }
        }
        rig.start_capture().await;
        rig.nbd("data")
            .write(BLOCK as u64, &[round; BLOCK])
            .unwrap();
        let receipt = rig.ship("data").await;
        assert!(receipt.created, "{spoil}");
        assert!(
            rig.proxy.digest_calls() > 0,
            "{spoil}: the vault's table was asked for"
        );
        let mut expected = content.clone();
        expected[BLOCK..2 * BLOCK].fill(round);
        assert!(
            rig.restore("data", 0).await[..content.len()] == expected,
            "{spoil}"
        );
    }
    assert!(
        rig.proxy.frame_bytes() < 10 << 20,
        "the volume was not sent again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_and_a_table_lost_together_are_made_good_by_the_vault() {
    let mut rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.nbd("data").write(0, &noise(1, 1 << 20)).unwrap();
    let dir = state_dir(&rig, "data").await;
    rig.proxy.fail(Fault::LoseReceipt);
    for _ in 0..10_000 {
        rig.proxy.fail(Fault::RefuseTerm(Reason::Unreachable));
    }
    let request = pb::TriggerIntervalRequest {
        volume: "data".into(),
    };
    let answers = rig.client().await.trigger_interval(request).await.unwrap();
    eventually("the vault has committed", || async {
        (rig.generations("data").await.len() == 2).then_some(())
    })
    .await;
    drop(answers);
    rig.stop_capture().await;
    std::fs::remove_file(dir.join("table")).unwrap();
    rig.proxy.forgive();
    let sent = rig.proxy.frame_bytes();
    rig.start_capture().await;
    rig.nbd("data").write(4096, &[1; BLOCK]).unwrap();
    rig.ship("data").await;
    assert!(rig.proxy.digest_calls() > 0);
    assert!(
        rig.proxy.frame_bytes() - sent < 1 << 19,
        "only what differed"
    );
    assert!(rig.restore("data", 0).await == std::fs::read(rig.path("data.img")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_could_not_be_written_is_opened_again_and_compared() {
    let rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.nbd("data").write(0, &noise(1, 1 << 20)).unwrap();
    let in_the_way = state_dir(&rig, "data").await.join("table.stamp.tmp");
    std::fs::create_dir(&in_the_way).unwrap();
    rig.ship("data").await;
    rig.nbd("data").write(4096, &[1; BLOCK]).unwrap();
    let clearing = async {
        eventually("the status says so", || async {
            let uplink = rig.volume("data").await.uplink.unwrap();
            (!uplink.error.is_empty()).then_some(())
        })
        .await;
        std::fs::remove_dir(&in_the_way).unwrap();
    };
    let (receipt, ()) = tokio::join!(rig.try_ship("data"), clearing);
    receipt.unwrap();
    rig.nbd("data").write(8192, &[2; BLOCK]).unwrap();
    rig.ship("data").await;
    assert!(rig.proxy.digest_calls() > 0);
    assert!(rig.restore("data", 0).await == std::fs::read(rig.path("data.img")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_that_could_neither_be_recorded_nor_given_up_is_let_go_of_later() {
    let rig = Rig::new().await;
    rig.add("data", 1024).await;
    rig.ship("data").await;
    let dir = state_dir(&rig, "data").await;
    let in_the_way = [dir.join("uplink.tmp"), dir.join("carry.tmp")];
    for path in &in_the_way {
        std::fs::create_dir(path).unwrap();
    }
    rig.nbd("data").write(0, &noise(1, 1 << 20)).unwrap();
    let clearing = async {
        eventually("the cut", || async { cut_is_open(&dir).then_some(()) }).await;
        // Some more attempts.
        tokio::time::sleep(Duration::from_millis(200)).await;
        for path in &in_the_way {
            std::fs::remove_dir(path).unwrap();
        }
    };
    let shipping = tokio::time::timeout(PATIENCE, rig.try_ship("data"));
    let (receipt, ()) = tokio::join!(shipping, clearing);
    assert!(receipt.unwrap().unwrap().created);
    assert!(rig.restore("data", 0).await == std::fs::read(rig.path("data.img")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_changed_behind_our_back_is_compared_and_shipped() {
    let mut rig = Rig::new().await;
    rig.add("data", 4096).await;
    rig.nbd("data").write(0, &noise(1, 8 << 20)).unwrap();
    rig.ship("data").await;
    let sent = rig.proxy.frame_bytes();
    rig.stop_capture().await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(rig.path("data.img"))
        .unwrap();
    file.write_all_at(&[7; BLOCK], 100 * BLOCK as u64).unwrap();
    file.sync_all().unwrap();
    drop(file);
    rig.start_capture().await;
    let receipt = rig.ship("data").await;
    assert!(receipt.generation.get() >= 2);
    assert!(
        rig.proxy.frame_bytes() - sent < 1 << 20,
        "only what differed was sent"
    );
    let restored = rig.restore("data", 0).await;
    assert!(restored == std::fs::read(rig.path("data.img")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrub_finds_what_tracking_cannot_have_seen() {
    let rig = Rig::with(|config| {
        config.scrub_period = Span::from_millis(300);
        config.scrub_bytes_per_second_max = ByteSize::mib(4096);
    })
    .await;
    rig.add("data", 2048).await;
    rig.nbd("data").write(0, &noise(1, 4 << 20)).unwrap();
    rig.ship("data").await;
    let scrub = async || rig.volume("data").await.scrub.unwrap();
    eventually("two passes", || async {
        (scrub().await.passes >= 2).then_some(())
    })
    .await;
    assert_eq!(scrub().await.mismatches, 0);
    // Somebody writes to the file past the service: into data, and into a hole.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(rig.path("data.img"))
        .unwrap();
    file.write_all_at(&[7; BLOCK], 100 * BLOCK as u64).unwrap();
    file.write_all_at(&[8; BLOCK], 1900 * BLOCK as u64).unwrap();
    eventually("the scrub finds both and they are shipped", || async {
        let volume = rig.volume("data").await;
        (volume.scrub.unwrap().mismatches == 2 && volume.base_generation >= 2).then_some(())
    })
    .await;
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == std::fs::read(rig.path("data.img")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrub_finds_nothing_in_a_busy_volume() {
    let rig = Rig::with(|config| {
        config.scrub_period = Span::from_millis(50);
        config.scrub_bytes_per_second_max = ByteSize::mib(4096);
        config.interval_max = Span::from_millis(40);
    })
    .await;
    rig.add("data", 512).await;
    let mut nbd = rig.nbd("data");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let writer = std::thread::spawn(move || {
        for n in 0.. {
            if stopped.load(Ordering::Relaxed) {
                return;
            }
            nbd.write(n * 40_961 % (500 * 4096), &noise(n, 9000))
                .unwrap();
        }
    });
    eventually("intervals come meanwhile", || async {
        (rig.volume("data").await.base_generation >= 4).then_some(())
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    rig.ship("data").await;
    eventually("passes over the quiet volume", || async {
        (rig.volume("data").await.scrub.unwrap().passes >= 5).then_some(())
    })
    .await;
    let volume = rig.volume("data").await;
    assert_eq!(volume.scrub.unwrap().mismatches, 0);
    assert!(rig.restore("data", 0).await == std::fs::read(rig.path("data.img")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interval_that_the_spool_has_no_room_for_folds_into_the_next_one() {
    let rig = Rig::with(|config| config.spool_bytes_max = ByteSize::mib(1)).await;
    rig.add("data", 4096).await;
    let content = noise(1, 12 << 20);
    rig.nbd("data").write(0, &content).unwrap();
    rig.proxy.set_delay(Duration::from_millis(100));
    let in_the_way = state_dir(&rig, "data").await.join("uplink.tmp");
    let shipping = tokio::time::timeout(PATIENCE, rig.try_ship("data"));
    let overwriting = async {
        eventually("shipping has begun", || async {
            (rig.proxy.frame_bytes() > 1 << 20).then_some(())
        })
        .await;
        // That it was given up can't be recorded at once.
        std::fs::create_dir(&in_the_way).unwrap();
        let other = noise(2, 8 << 20);
        rig.nbd("data").write(4 << 20, &other).unwrap();
        eventually("the status says so", || async {
            let uplink = rig.volume("data").await.uplink.unwrap();
            (!uplink.error.is_empty()).then_some(())
        })
        .await;
        std::fs::remove_dir(&in_the_way).unwrap();
        rig.proxy.set_delay(Duration::ZERO);
    };
    let (receipt, ()) = tokio::join!(shipping, overwriting);
    receipt.unwrap().unwrap();
    assert!(rig.proxy.headers() >= 2, "the first cut was given up");
    // The cut that replaced it may have been made amid the overwriting.
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == std::fs::read(rig.path("data.img")).unwrap());
}

fn copy_dir(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let copied = Command::new("cp")
        .arg("-a")
        .arg(from)
        .arg(to)
        .status()
        .unwrap();
    assert!(copied.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vault_that_lost_its_newest_generation_gets_what_differs() {
    let mut rig = Rig::new().await;
    rig.add("data", 4096).await;
    let content = noise(1, 8 << 20);
    rig.nbd("data").write(0, &content).unwrap();
    rig.ship("data").await;
    // A backup of the vault is taken, the source goes on, the backup is restored.
    rig.proxy.set_target(None);
    rig.vault.take().unwrap().shutdown().await.unwrap();
    copy_dir(&rig.path("store"), &rig.path("backup"));
    let vault = vault_svc::start(vault_config(rig.dir.path()))
        .await
        .unwrap();
    rig.proxy.set_target(Some(vault.listen_addr));
    rig.vault = Some(vault);
    rig.nbd("data").write(1 << 20, &noise(2, 1 << 20)).unwrap();
    assert!(rig.ship("data").await.created);
    rig.proxy.set_target(None);
    rig.vault.take().unwrap().shutdown().await.unwrap();
    copy_dir(&rig.path("backup"), &rig.path("store"));
    let _ = std::fs::remove_dir_all(rig.path("vault-state"));
    let vault = vault_svc::start(vault_config(rig.dir.path()))
        .await
        .unwrap();
    rig.proxy.set_target(Some(vault.listen_addr));
    rig.vault = Some(vault);
    let sent = rig.proxy.frame_bytes();
    rig.nbd("data").write(3 << 20, &[3; BLOCK]).unwrap();
    let receipt = rig.ship("data").await;
    assert!(receipt.created);
    assert!(rig.restore("data", 0).await == std::fs::read(rig.path("data.img")).unwrap());
    assert!(
        rig.proxy.frame_bytes() - sent < 3 << 20,
        "only what differed was sent"
    );
}

/// The program, in a process of its own.
struct Program {
    child: Child,
    client: CaptureClient<Channel>,
}

impl Program {
    async fn start(rig: &Rig, port: u16) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_capture-svc"))
            .arg("--state")
            .arg(&rig.config.state)
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .arg("--nbd")
            .arg(format!("unix:{}", rig.path("nbd.sock").display()))
            .args(["--vault", &rig.proxy.url()])
            .args([
                "--interval-max",
                "100ms",
                "--backoff-min",
                "20ms",
                "--backoff-max",
                "200ms",
            ])
            .args(["--scrub-period", "500ms", "--spool-bytes-max", "64MiB"])
            .args(["--scrub-bytes-per-second-max", "4GiB"])
            .args(["--log-filter", "warn"])
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
        let channel = eventually("the program is up", || async {
            endpoint.connect().await.ok()
        });
        Self {
            child,
            client: CaptureClient::new(channel.await),
        }
    }

    async fn volume(&mut self) -> pb::Volume {
        let request = pb::GetVolumeRequest {
            volume: "data".into(),
        };
        self.client.get_volume(request).await.unwrap().into_inner()
    }

    async fn ship(&mut self) {
        let request = pb::TriggerIntervalRequest {
            volume: "data".into(),
        };
        let mut answers = self
            .client
            .trigger_interval(request)
            .await
            .unwrap()
            .into_inner();
        while answers.message().await.unwrap().is_some() {}
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_nine_at_any_moment_loses_nothing_and_it_goes_on_by_itself() {
    let mut rig = Rig::new().await;
    rig.add("data", 4096).await;
    rig.stop_capture().await;
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    rig.proxy.set_delay(Duration::from_millis(5));
    for round in 0..8u64 {
        let mut program = Program::start(&rig, port).await;
        let socket = rig.path("nbd.sock");
        let writer = std::thread::spawn(move || {
            let Ok(mut nbd) = Nbd::connect(&socket, "data") else {
                return;
            };
            for n in 0..400u64 {
                let seed = round * 1000 + n;
                let at = seed * 77_773 % (4000 * 4096);
                if nbd.write(at, &noise(seed, 30_000)).is_err() {
                    return;
                }
                if n % 50 == 0 && nbd.flush().is_err() {
                    return;
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(40 + round * 97 % 600)).await;
        program.child.kill().unwrap();
        program.child.wait().unwrap();
        writer.join().unwrap();
    }
    rig.proxy.set_delay(Duration::ZERO);
    let mut program = Program::start(&rig, port).await;
    program.ship().await;
    assert!(rig.restore("data", 0).await == std::fs::read(rig.path("data.img")).unwrap());
    let passes = program.volume().await.scrub.unwrap().passes;
    eventually("the scrub has seen everything", || {
        let mut client = program.client.clone();
        async move {
            let request = pb::GetVolumeRequest {
                volume: "data".into(),
            };
            let volume = client.get_volume(request).await.unwrap().into_inner();
            (volume.scrub.unwrap().passes >= passes + 2).then_some(())
        }
    })
    .await;
    let volume = program.volume().await;
    assert_eq!(volume.scrub.unwrap().mismatches, 0);

    // SIGTERM ends it cleanly, and soon.
    let began = std::time::Instant::now();
    let pid = program.child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert!(program.child.wait().unwrap().success());
    assert!(began.elapsed() < Duration::from_secs(10));
}
