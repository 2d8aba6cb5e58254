//! When certificates end, as a monitor sees it.

use std::{net::SocketAddr, time::Duration};

use capture_svc::config::OptionalAddr;
use jiff::{Timestamp, ToSpan};
use tidemark_cli::pki::VALID_DEFAULT;
use tidemark_identity::Role;
use tidemark_integration::scrape::{Scrape, scrape};

use super::site::{Site, eventually, url_of};

const METRIC: &str = "tidemark_certificate_not_after_timestamp_seconds";
const DAY: f64 = 86400.0;

async fn ends(addr: Option<SocketAddr>) -> Scrape {
    let reading = tokio::task::spawn_blocking(move || scrape(addr.unwrap()));
    reading.await.unwrap()
}

/// When a certificate of the usual kind ends that was made then.
#[allow(clippy::cast_precision_loss)]
fn end_of(made: Timestamp) -> f64 {
    made.as_second() as f64 + VALID_DEFAULT.as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_each_certificate_is_told_and_that_of_its_successor_without_a_restart() {
    let site = Site::new();
    site.knows(&[("edge-7", &[Role::Source], &["*"])]);
    site.certificate("edge-7", &[]);
    let listen = OptionalAddr(Some(([127, 0, 0, 1], 0).into()));
    let vault = vault_svc::start(vault_svc::Config {
        metrics_listen: listen,
        tls_reload_period: Duration::from_millis(20).into(),
        ..site.vault_config()
    });
    let vault = vault.await.unwrap();
    let capture = capture_svc::start(capture_svc::Config {
        metrics_listen: listen,
        tls_reload_period: Duration::from_millis(20).into(),
        ..site.capture_config(&url_of(&vault), "edge-7")
    });
    let capture = capture.await.unwrap();
    let now = end_of(Timestamp::now());
    let seen = ends(vault.metrics_addr).await;
    let own = seen.value(METRIC, &[("certificate", "tls_cert")]);
    assert!((own - now).abs() < 2.0 * DAY, "{own} {now}");
    assert!(seen.value(METRIC, &[("certificate", "tls_ca")]) > own);
    let of_dialer = [("certificate", "vault_cert")];
    let shown = eventually("the uplink's certificate is looked at", async || {
        let seen = ends(capture.metrics_addr()).await;
        seen.of(METRIC, &of_dialer)
            .next()
            .map(|sample| sample.value)
    });
    assert!((shown.await - now).abs() < 2.0 * DAY);
    assert_eq!(
        ends(capture.metrics_addr()).await.of(METRIC, &[]).count(),
        4
    );

    let earlier = Timestamp::now() - 2400.hours();
    site.certificate_of("service", &["127.0.0.1"], earlier);
    site.certificate_of("edge-7", &[], earlier);
    let before = end_of(earlier);
    eventually("the new ends are told", async || {
        let own = ends(vault.metrics_addr)
            .await
            .value(METRIC, &[("certificate", "tls_cert")]);
        let shown = ends(capture.metrics_addr()).await.value(METRIC, &of_dialer);
        let is_new = |end: f64| (end - before).abs() < 2.0 * DAY;
        (is_new(own) && is_new(shown)).then_some(())
    })
    .await;
    capture.shutdown().await.unwrap();
    vault.shutdown().await.unwrap();
}
