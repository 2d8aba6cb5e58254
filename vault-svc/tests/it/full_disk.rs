//! A real file system without room: a small tmpfs, which only root can mount.

use std::process::Command;

use tidemark_proto::Reason;
use vault_svc::{Config, config::ByteSize};

use crate::source::{Source, config, connect, restore, ship};

fn mount(options: &str, at: &std::path::Path) {
    let done = Command::new("mount")
        .args(["-t", "tmpfs", "-o", options, "tmpfs"])
        .arg(at)
        .status()
        .unwrap();
    assert!(done.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_then_goes_on_when_it_has_room() {
    if !rustix::process::geteuid().is_root() {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci != "true"),
            "mounting a tmpfs needs root"
        );
        println!("skipped: mounting a tmpfs needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    std::fs::create_dir(&store).unwrap();
    mount("size=64m", &store);
    let config = Config {
        retain: 1,
        reserve_bytes: ByteSize::mib(8),
        ..config(dir.path())
    };
    let running = vault_svc::start(config.clone()).await.unwrap();
    let mut clients = connect(&running).await;
    let mut source = Source::new(1, 10_000);
    source.compressed = Some(false);
    source.start_term(&mut clients).await.unwrap();
    (0..10_000).for_each(|block| source.write(block));
    source.ship(&mut clients).await.unwrap();
    let before = source.image.clone();
    (0..10_000).for_each(|block| source.write(block));
    let prepared = source.prepare();
    for _ in 0..3 {
        let error = ship(&mut clients, &prepared).await.unwrap_err();
        assert_eq!(error.reason, Reason::StoreFull, "{error}");
        assert!(restore(&mut clients, &source, 0).await.unwrap() == before);
    }
    // Also across a restart, which finds staged leftovers and the reserve.
    running.shutdown().await.unwrap();
    let running = vault_svc::start(config).await.unwrap();
    let mut clients = connect(&running).await;
    assert!(restore(&mut clients, &source, 0).await.unwrap() == before);
    assert_eq!(
        ship(&mut clients, &prepared).await.unwrap_err().reason,
        Reason::StoreFull
    );
    mount("remount,size=256m", &store);
    let receipt = ship(&mut clients, &prepared).await.unwrap();
    source.committed(&receipt);
    assert!(restore(&mut clients, &source, 0).await.unwrap() == source.image);
    running.shutdown().await.unwrap();
    assert!(
        Command::new("umount")
            .arg(&store)
            .status()
            .unwrap()
            .success()
    );
}
