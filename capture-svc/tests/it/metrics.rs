//! What both services say in numbers of what was done with them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tidemark_proto::{capture::v1 as pb, vault::v1 as vault};
use tidemark_telemetry::metrics::{Family, Kind};

use crate::{
    proxy::Fault,
    rig::{Rig, eventually, noise},
    scrape::{Scrape, scrape},
};

const BLOCK: usize = 4096;
const DATA: &[(&str, &str)] = &[("volume", "data")];

async fn of_capture(rig: &Rig) -> Scrape {
    let addr = rig.capture.as_ref().unwrap().metrics_addr().unwrap();
    tokio::task::spawn_blocking(move || scrape(addr))
        .await
        .unwrap()
}

async fn of_vault(rig: &Rig) -> Scrape {
    let addr = rig.vault.as_ref().unwrap().metrics_addr.unwrap();
    tokio::task::spawn_blocking(move || scrape(addr))
        .await
        .unwrap()
}

fn with<'a>(label: &'a str, value: &'a str) -> [(&'a str, &'a str); 2] {
    [("volume", "data"), (label, value)]
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap().as_secs_f64()
}

/// Names of families that have no series.
fn empty(scrape: &Scrape, families: &[&[&'static Family]]) -> Vec<&'static str> {
    let all = families.iter().flat_map(|list| list.iter());
    let empty = all.filter(|family| {
        let suffix = if family.kind == Kind::Histogram {
            "_count"
        } else {
            ""
        };
        scrape.of(&format!("{}{suffix}", family.name), &[]).count() == 0
    });
    empty.map(|family| family.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_shipped_and_restored_is_what_the_metrics_say() {
    let rig = Rig::with(|config| config.scrub_period = Duration::from_millis(50).into()).await;
    let began = now();
    rig.add("data", 1024).await;
    let mut nbd = rig.nbd("data");
    nbd.write(0, &noise(1, 3 * BLOCK)).unwrap();
    nbd.write(9 * BLOCK as u64, &noise(2, BLOCK)).unwrap();
    let seen = of_capture(&rig).await;
    assert_eq!(seen.value("tidemark_capture_changed_blocks", DATA), 4.0);
    assert_eq!(seen.value("tidemark_capture_clients", DATA), 1.0);
    let receipt = rig.ship("data").await;
    rig.ship("data").await;
    rig.snapshot("data", "kept").await;
    nbd.write(0, &noise(3, 2 * BLOCK)).unwrap();
    rig.restore("data", 0).await;
    eventually("a pass of the source scrub", || async {
        let passes = of_capture(&rig).await;
        (passes.value("tidemark_capture_scrub_passes_total", DATA) > 0.0).then_some(())
    })
    .await;

    let seen = of_capture(&rig).await;
    let value = |name: &str| seen.value(&format!("tidemark_capture_{name}"), DATA);
    assert_eq!(value("changed_blocks"), 2.0);
    assert_eq!(value("raw_bytes_total"), 4.0 * BLOCK as f64);
    assert_eq!(value("sent_bytes_total"), receipt.frame_bytes as f64);
    assert_eq!(value("volume_size_bytes"), 1024.0 * BLOCK as f64);
    assert_eq!(value("volume_serving"), 1.0);
    assert_eq!(value("snapshots"), 1.0);
    assert_eq!(value("spool_used_bytes"), 2.0 * BLOCK as f64);
    assert_eq!(value("copied_blocks_total"), 2.0);
    assert_eq!(value("spool_capacity_bytes"), 64.0 * 1048576.0);
    assert_eq!(value("recovery_point_target_seconds"), 3600.0);
    assert_eq!(value("interval_duration_seconds_count"), 2.0);
    assert_eq!(value("scrub_mismatches_total"), 0.0);
    assert!(value("scrub_blocks_total") >= 1000.0);
    assert!(value("link_rate_bytes_per_second") > 0.0);
    assert!((began..=now()).contains(&value("recovery_point_timestamp_seconds")));
    assert!((began..=now()).contains(&value("last_interval_timestamp_seconds")));
    assert!((began..=now()).contains(&value("scrub_last_pass_timestamp_seconds")));
    assert!(value("recovery_point_age_seconds") <= now() - began);
    let intervals =
        |result| seen.value("tidemark_capture_intervals_total", &with("result", result));
    assert_eq!((intervals("committed"), intervals("unchanged")), (2.0, 1.0));
    assert_eq!(seen.sum("tidemark_capture_cuts_total", DATA), 2.0);
    let states = |value| {
        seen.of("tidemark_capture_uplink_state", DATA)
            .filter(move |s| s.value == value)
    };
    assert_eq!((states(1.0).count(), states(0.0).count()), (1, 5));
    let stages = "tidemark_capture_interval_stage_duration_seconds";
    let stage_sum: f64 = ["moment", "ship", "commit", "settle"]
        .iter()
        .map(|stage| {
            assert_eq!(
                seen.value(&format!("{stages}_count"), &with("stage", stage)),
                2.0
            );
            seen.value(&format!("{stages}_sum"), &with("stage", stage))
        })
        .sum();
    let whole = value("interval_duration_seconds_sum");
    assert!(
        (whole - stage_sum).abs() < 0.05 && whole <= now() - began,
        "{whole} {stage_sum}"
    );
    assert_eq!(
        empty(&seen, capture_svc::metrics::FAMILIES),
        [
            "tidemark_certificate_not_after_timestamp_seconds",
            "tidemark_capture_uplink_failures_total"
        ]
    );

    let mut connected = rig.vault_client().await;
    let maintain = vault::MaintainRequest::default();
    connected.maintain(maintain).await.unwrap();
    let seen = of_vault(&rig).await;
    let value = |name: &str| seen.value(&format!("tidemark_vault_{name}"), &with("source", "test"));
    assert_eq!(value("generations"), 2.0);
    assert_eq!(value("head_generation"), 2.0);
    assert_eq!(value("changed_blocks_total"), 4.0);
    assert_eq!(value("received_bytes_total"), receipt.frame_bytes as f64);
    assert_eq!(value("commit_duration_seconds_count"), 2.0);
    assert!(value("stored_bytes") > receipt.frame_bytes as f64);
    assert!((1.0..=value("stored_bytes")).contains(&value("live_bytes")));
    assert!(value("restored_bytes_total") > 0.0);
    assert!((began..=now()).contains(&value("recovery_point_timestamp_seconds")));
    let intervals = |result| seen.value("tidemark_vault_intervals_total", &with("result", result));
    assert_eq!((intervals("committed"), intervals("unchanged")), (2.0, 1.0));
    assert_eq!(
        seen.value(
            "tidemark_vault_restores_total",
            &with("result", "completed")
        ),
        1.0
    );
    assert_eq!(seen.value("tidemark_vault_restores_open", &[]), 0.0);
    let free = seen.value("tidemark_vault_store_available_bytes", &[]);
    assert!((1.0..=seen.value("tidemark_vault_store_size_bytes", &[])).contains(&free));
    let restores = [
        ("call", "tidemark.vault.v1.Vault/Restore"),
        ("result", "OK"),
    ];
    assert_eq!(seen.value("tidemark_calls_total", &restores), 1.0);
    assert!(seen.value("tidemark_connections", &[]) >= 1.0);
    drop(connected);
    assert_eq!(
        empty(&seen, vault_svc::metrics::FAMILIES),
        [
            "tidemark_certificate_not_after_timestamp_seconds",
            "tidemark_vault_upkeep_failures_total"
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_vault_is_away_the_recovery_point_ages_and_failures_are_counted() {
    let rig = Rig::new().await;
    rig.add("data", 16).await;
    let age = |seen: &Scrape| seen.value("tidemark_capture_recovery_point_age_seconds", DATA);
    rig.proxy.set_target(None);
    let first = of_capture(&rig).await;
    rig.nbd("data").write(0, &noise(1, BLOCK)).unwrap();
    let request = pb::TriggerIntervalRequest {
        volume: "data".to_owned(),
    };
    let mut client = rig.client().await;
    let shipping = client.trigger_interval(request).await.unwrap();
    let failures = "tidemark_capture_uplink_failures_total";
    let later = eventually("failures are counted", || async {
        let seen = of_capture(&rig).await;
        let failed = seen.sum(failures, &with("reason", "UNREACHABLE"));
        (failed >= 2.0 && age(&seen) > age(&first) + 0.2).then_some(seen)
    })
    .await;
    let point = "tidemark_capture_recovery_point_timestamp_seconds";
    assert_eq!(later.value(point, DATA), first.value(point, DATA));
    drop(shipping);
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_that_differ_are_counted_at_both_services() {
    let rig = Rig::new().await;
    rig.add("data", 64).await;
    rig.nbd("data").write(0, &noise(1, BLOCK)).unwrap();
    rig.proxy.fail(Fault::BendDigest);
    rig.ship("data").await;
    let (capture, vault) = (of_capture(&rig).await, of_vault(&rig).await);
    assert_eq!(
        capture.value("tidemark_capture_digest_mismatches_total", DATA),
        1.0
    );
    let given_up = with("result", "given_up");
    assert_eq!(
        capture.value("tidemark_capture_intervals_total", &given_up),
        1.0
    );
    let reason = with("reason", "DIGEST_MISMATCH");
    assert_eq!(
        capture.value("tidemark_capture_uplink_failures_total", &reason),
        1.0
    );
    assert_eq!(
        vault.value("tidemark_vault_digest_mismatches_total", DATA),
        1.0
    );
    let refused = with("result", "refused");
    assert_eq!(vault.value("tidemark_vault_intervals_total", &refused), 1.0);
    let call = [
        ("call", "tidemark.vault.v1.Ingest/Ship"),
        ("result", "DIGEST_MISMATCH"),
    ];
    assert_eq!(vault.value("tidemark_calls_total", &call), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_scrubs_find_is_counted() {
    let rig = Rig::new().await;
    rig.add("data", 64).await;
    rig.nbd("data").write(0, &noise(1, 8 * BLOCK)).unwrap();
    rig.ship("data").await;
    crate::rig::write(&rig.path("data.img"), 2, 0, 3 * BLOCK);
    assert_eq!(rig.scrub("data").await.unwrap().mismatches, 3);
    let seen = of_capture(&rig).await;
    assert_eq!(
        seen.value("tidemark_capture_scrub_mismatches_total", DATA),
        3.0
    );
    assert_eq!(
        seen.value("tidemark_capture_scrub_blocks_total", DATA),
        64.0
    );
    assert_eq!(seen.value("tidemark_capture_scrub_passes_total", DATA), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_removed_is_gone_from_the_metrics() {
    let rig = Rig::new().await;
    rig.add("data", 16).await;
    rig.add("other", 16).await;
    let other = &[("volume", "other")];
    let of = |seen: &Scrape, labels: &[(&str, &str)]| {
        let named = seen.samples.iter().filter(|sample| {
            sample
                .labels
                .get("volume")
                .is_some_and(|v| v == labels[0].1)
        });
        named.count()
    };
    let before = of_capture(&rig).await;
    assert!(of(&before, DATA) > 50 && of(&before, DATA) == of(&before, other));
    let request = pb::RemoveVolumeRequest {
        volume: "data".to_owned(),
        force: false,
    };
    rig.client().await.remove_volume(request).await.unwrap();
    let after = of_capture(&rig).await;
    assert_eq!(of(&after, DATA), 0, "histograms, too");
    assert_eq!(of(&after, other), of(&before, other));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_cannot_be_served_says_so() {
    let mut rig = Rig::new().await;
    rig.add("data", 16).await;
    rig.stop_capture().await;
    std::fs::rename(rig.path("data.img"), rig.path("away.img")).unwrap();
    rig.start_capture().await;
    let seen = of_capture(&rig).await;
    assert_eq!(seen.value("tidemark_capture_volume_serving", DATA), 0.0);
    assert_eq!(
        seen.of("tidemark_capture_recovery_point_age_seconds", DATA)
            .count(),
        0
    );
    std::fs::rename(rig.path("away.img"), rig.path("data.img")).unwrap();
    eventually("it is served again", || async {
        let seen = of_capture(&rig).await;
        (seen.value("tidemark_capture_volume_serving", DATA) == 1.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_for_metrics_that_is_taken_ends_the_start_and_says_which_key() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut config = crate::rig::capture_config(dir.path(), "http://127.0.0.1:1");
    config.metrics_listen.0 = Some(addr);
    let error = capture_svc::start(config).await.unwrap_err();
    let told = format!("{error:#}");
    assert!(
        told.contains(&format!("listen on {addr} for metrics (metrics_listen)")),
        "{told}"
    );
    let mut config = crate::rig::vault_config(dir.path());
    config.metrics_listen.0 = Some(addr);
    let error = vault_svc::start(config).await.unwrap_err();
    assert!(
        format!("{error:#}").contains("(metrics_listen)"),
        "{error:#}"
    );
}
