//! The images, as what runs of Tidemark where it runs in containers.

#[path = "containers/fleet.rs"]
mod fleet;
#[path = "containers/site.rs"]
mod site;

use std::fs;

use serde_json::Value;

use crate::programs::wait_for;
use fleet::{Fleet, NEXT_TAG, build_next_vault, kill_and_restart, wait_for_log};
pub(crate) use fleet::{TAG, docker, docker_does, have_images};

#[test]
fn images_are_small_without_a_shell_not_roots_and_say_what_they_are() {
    if !have_images() {
        return;
    }
    let images = [
        ("vault", "vault-svc"),
        ("capture", "capture-svc"),
        ("cli", "tidemark"),
    ];
    for (name, program) in images {
        let image = format!("tidemark-{name}:{TAG}");
        let told: Value =
            serde_json::from_str(&docker_does(&["image", "inspect", &image])).unwrap();
        let told = &told[0];
        let bytes = told["Size"].as_u64().unwrap();
        assert!(bytes < 60_000_000, "{image} has {bytes} bytes");
        let config = &told["Config"];
        assert_eq!(config["User"], "65532:65532", "{image}");
        let label = |key: &str| &config["Labels"][format!("org.opencontainers.image.{key}")];
        assert_eq!(label("version"), TAG, "{image}");
        assert_eq!(label("licenses"), "Apache-2.0", "{image}");
        let checked = config["Healthcheck"]["Test"][2] == "health";
        assert_eq!(checked, name != "cli", "{image} asks its service");
        let shell = [
            "run",
            "--rm",
            "--network=none",
            "--entrypoint=/bin/sh",
            &image,
        ];
        let shell = docker().args(shell).output().unwrap();
        assert_eq!(shell.status.code(), Some(127), "{image} has a shell");
        let version = ["run", "--rm", "--network=none", &image, "--version"];
        assert_eq!(
            docker_does(&version),
            format!("{program} {}", env!("CARGO_PKG_VERSION")),
            "{image}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_sources_get_back_what_they_wrote_whatever_is_cut_off_or_killed() {
    if !have_images() {
        return;
    }
    let fleet = Fleet::start(&["north", "east", "west"]).await;
    let mut sources = [
        fleet.source("north", 0xc0).await,
        fleet.source("east", 0xc1).await,
        fleet.source("west", 0xc2).await,
    ];
    sources.iter().for_each(|source| source.goes_on());

    // Without the link writers go on, and so do the other sources.
    let [cut, others @ ..] = &mut sources;
    cut.cut_off();
    cut.writer().wait_for(300);
    others.iter().for_each(|source| source.goes_on());
    cut.writer().wait_for(300);
    let behind = cut.generation();
    cut.connect();
    wait_for("what was written without the link", || {
        (cut.generation() > behind).then_some(())
    });

    for source in &mut sources {
        source.kill_and_restart();
        source.writer().wait_for(100);
    }
    kill_and_restart(&fleet.vault_name(), "vault-svc");
    for source in &mut sources {
        source.goes_on();
        assert!(source.writer().retries() > 0, "the kill hit the writer");
        source.settle_and_check();
    }
    let listed = &sources[0].json(&["status"])["vault"]["volumes"];
    let mut from: Vec<_> = (listed.as_array().unwrap().iter())
        .map(|volume| volume["source"].as_str().unwrap())
        .collect();
    from.sort_unstable();
    assert_eq!(from, ["east", "north", "west"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vault_is_replaced_by_another_release_while_intervals_flow() {
    if !have_images() {
        return;
    }
    build_next_vault();
    let mut fleet = Fleet::start(&["north"]).await;
    let mut source = fleet.source("north", 0xc3).await;
    for tag in [NEXT_TAG, TAG] {
        source.goes_on();
        let kept = source.generation();
        let image = fs::read(source.restore(kept)).unwrap();
        fleet.stop_vault().await;
        source.writer().wait_for(200);
        fleet.start_vault(tag).await;
        source.goes_on();
        let again = fs::read(source.restore(kept)).unwrap();
        assert!(image == again, "generation {kept} is what it was");
    }
    assert_eq!(source.writer().retries(), 0, "no writer ever noticed");
    source.settle_and_check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vault_whose_disk_is_full_keeps_what_it_has_and_goes_on_when_there_is_room() {
    if !have_images() {
        return;
    }
    const DISK: u64 = 64 << 20;
    let fleet = Fleet::start_with_disk(DISK, &["north"]).await;
    let mut source = fleet.source("north", 0xc4).await;
    source.goes_on();
    let kept = source.generation();
    let image = fs::read(source.restore(kept)).unwrap();

    // The container's own view of its disk, as this machine sees it.
    let pid = docker_does(&["inspect", "--format={{.State.Pid}}", &fleet.vault_name()]);
    let ballast = format!("/proc/{pid}/root/var/lib/tidemark/ballast");
    let mut bytes = DISK;
    // As much as there is room for.
    while bytes >= 4096 {
        let mut file = fs::OpenOptions::new();
        let mut file = file.create(true).append(true).open(&ballast).unwrap();
        if std::io::Write::write_all(&mut file, &vec![0x5a; usize::try_from(bytes).unwrap()])
            .is_err()
        {
            bytes /= 2;
        }
    }
    wait_for("the vault to be full", || {
        let uplink = &source.show()["uplink"];
        let told = uplink["error"].as_str().unwrap().to_owned();
        (told.contains("room") || told.contains("full")).then_some(())
    });
    source.writer().wait_for(200);
    assert!(image == fs::read(source.restore(kept)).unwrap());

    fs::remove_file(&ballast).unwrap();
    source.goes_on();
    assert_eq!(source.writer().retries(), 0, "no writer ever noticed");
    source.settle_and_check();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_certificates_are_refused_for_a_reason_that_both_log_and_right_ones_are_taken_by_themselves()
 {
    if !have_images() {
        return;
    }
    let fleet = Fleet::start(&["north"]).await;
    let vault = fleet.vault_name();
    let mut source = fleet.source("north", 0xc5).await;
    source.goes_on();
    let (site, began) = (fleet.site(), source.started_at());
    // A certificate is shown at the beginning of a connection.
    site.put_of_another_ca("north");
    kill_and_restart(&vault, "vault-svc");
    let refused = |at_the_source: &str, at_the_vault: &str| {
        source.tells(at_the_source);
        wait_for_log(&vault, at_the_vault);
    };
    refused(
        "the CA of our certificate is not trusted there",
        "the peer's certificate is of a CA that is not trusted here",
    );
    site.put_expired("north", &[]);
    refused(
        "our certificate has expired",
        "the peer's certificate has expired",
    );
    site.put_of_another_name();
    refused(
        "the peer's certificate is for another name",
        "our certificate is not accepted",
    );
    site.put_expired("vault", &[&vault]);
    refused(
        "the peer's certificate has expired",
        "our certificate has expired",
    );
    site.put_of_another_ca("vault");
    refused(
        "the peer's certificate is of a CA that is not trusted here",
        "the CA of our certificate is not trusted there",
    );
    source.writer().wait_for(100);
    let behind = source.generation();
    site.put_right("vault");
    site.put_right("north");
    source.goes_on();
    assert!(source.generation() > behind);
    assert_eq!(source.started_at(), began);
    assert_eq!(source.writer().retries(), 0, "no writer ever noticed");
    source.settle_and_check();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_a_source_is_refused_says_so_and_takes_nothing_away() {
    if !have_images() {
        return;
    }
    let fleet = Fleet::start(&["north"]).await;
    let mut source = fleet.source("north", 0xc6).await;
    source.goes_on();
    source.stop();
    let copy = fleet.copy_of(&source).await;
    source.start();
    source.goes_on();

    // Its file is another one than the state tells of: somebody has to say that it is meant.
    copy.json(&["volume", "readopt", "north"]);
    let output = copy.tidemark(&["ship", "north"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        told.contains("FENCED") && told.contains("another writer"),
        "{told}"
    );
    assert_eq!(copy.show()["uplink"]["state"], "fenced");
    copy.logs("another writer owns the volume");

    source.goes_on();
    source.settle_and_check();
}
