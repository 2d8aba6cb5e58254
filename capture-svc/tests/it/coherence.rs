//! How good the moment of a cut was: commands that quiesce, flushes, pauses, and what is told of them.

use std::time::Duration;

use capture_svc::{
    Config,
    config::{QuiesceFailure, Span},
};
use tidemark_block::{Coherence, Trigger};
use tidemark_proto::Reason;

use crate::rig::{Rig, eventually};

const NOBODY: &str = "no agent or command quiesces the workload";

/// Commands that write down that they ran, and then do more.
fn commands(config: &mut Config, pre: &str, post: &str) {
    let log = config.state.with_file_name("log");
    let note = format!(
        "echo $TIDEMARK_PHASE $TIDEMARK_VOLUME $TIDEMARK_EPOCH >> {}",
        log.display()
    );
    config.quiesce_pre = format!("{note}; {pre}").as_str().into();
    config.quiesce_post = format!("{note}; {post}").as_str().into();
}

fn logged(rig: &Rig) -> Vec<String> {
    let log = std::fs::read_to_string(rig.path("log")).unwrap_or_default();
    log.lines().map(str::to_owned).collect()
}

/// Waits until what ran last was a thaw, and gives the log.
async fn thawed(rig: &Rig) -> Vec<String> {
    eventually("a thaw", || async {
        let log = logged(rig);
        log.last()?.starts_with("thaw").then_some(log)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn flushed_and_unflushed_writes_are_told_apart_and_the_vault_remembers_why() {
    let rig = Rig::with(|config| {
        config.lull_wait_max = Span::from_secs(3600);
        config.lull_min = Span::from_millis(20);
    })
    .await;
    rig.add("data", 64).await;
    let mut nbd = rig.nbd("data");
    let cases = [
        (true, Coherence::Flushed, String::new()),
        (
            false,
            Coherence::Lull,
            "; the last write was not flushed".to_owned(),
        ),
    ];
    for (n, (flushed, coherence, why)) in (1_u8..).zip(cases) {
        nbd.write(0, &[n; 4096]).unwrap();
        if flushed {
            nbd.flush().unwrap();
        }
        let receipt = rig.ship("data").await;
        assert_eq!(receipt.coherence, coherence);
        assert_eq!(receipt.reason.as_str(), format!("{NOBODY}{why}"));
        let listed = rig.generations("data").await.pop().unwrap();
        assert_eq!(listed.coherence, i32::from(coherence.code()));
        assert_eq!(listed.coherence_reason, receipt.reason.as_str());
    }
    let last = rig
        .volume("data")
        .await
        .uplink
        .unwrap()
        .last_receipt
        .unwrap();
    assert!(last.coherence_reason.ends_with("not flushed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_freezes_before_the_cut_and_thaws_behind_it() {
    let rig = Rig::with(|config| commands(config, "true", "true")).await;
    rig.add("data", 64).await;
    thawed(&rig).await;
    let before = logged(&rig).len();
    let mut nbd = rig.nbd("data");
    nbd.write(0, &[1; 4096]).unwrap();
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.coherence, Coherence::Quiesced);
    assert_eq!(receipt.trigger, Trigger::Request);
    assert!(receipt.reason.is_empty());
    let log = thawed(&rig).await.split_off(before);
    let [frozen, thawed] = &log[..] else {
        panic!("{log:?}")
    };
    let (frozen, thawed): (Vec<_>, Vec<_>) =
        (frozen.split(' ').collect(), thawed.split(' ').collect());
    assert_eq!(frozen[..2], ["freeze", "data"]);
    assert_eq!(thawed[..2], ["thaw", "data"]);
    let epochs = [frozen[2], thawed[2]].map(|epoch| epoch.parse::<u64>().unwrap());
    assert!(epochs[0] < epochs[1], "the cut lies between: {epochs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_hangs_or_fails_is_followed_by_the_other_one_and_costs_the_grade() {
    for (pre, why) in [
        ("sleep 1000", "quiesce_pre did not answer within 100ms"),
        ("exit 3", "quiesce_pre failed: exit status: 3"),
    ] {
        let rig = Rig::with(|config| {
            commands(config, pre, "sleep 1000");
            config.quiesce_timeout = Span::from_millis(100);
        })
        .await;
        rig.add("data", 64).await;
        let mut nbd = rig.nbd("data");
        nbd.write(0, &[1; 4096]).unwrap();
        nbd.flush().unwrap();
        let receipt = rig.ship("data").await;
        assert_eq!(receipt.coherence, Coherence::Flushed);
        assert_eq!(receipt.reason.as_str(), why);
        let log = thawed(&rig).await;
        let count = |phase: &str| log.iter().filter(|line| line.starts_with(phase)).count();
        assert_eq!(count("freeze"), count("thaw"), "{log:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn by_policy_nothing_is_cut_and_whoever_asked_is_told_why() {
    let rig = Rig::with(|config| {
        commands(config, "exit 3", "true");
        config.quiesce_failure = QuiesceFailure::Skip;
    })
    .await;
    let file = rig.path("data.img");
    rig.try_add("data", &file, 64 * 4096, 0).await.unwrap();
    let error = rig.try_ship("data").await.unwrap_err();
    assert_eq!(error.reason, Reason::NotQuiesced);
    assert!(error.message.contains("quiesce_pre failed"), "{error}");
    thawed(&rig).await;
    assert_eq!(rig.volume("data").await.base_generation, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_shutdown_nor_an_earlier_crash_leaves_the_workload_frozen() {
    let mut rig = Rig::with(|config| {
        commands(config, "sleep 1000", "true");
        config.quiesce_timeout = Span::from_secs(3600);
    })
    .await;
    let file = rig.path("data.img");
    let added = rig.try_add("data", &file, 64 * 4096, 0).await.unwrap();
    eventually("a freeze", || async {
        (!logged(&rig).is_empty()).then_some(())
    })
    .await;
    rig.stop_capture().await;
    let log = logged(&rig);
    assert_eq!(log.len(), 2, "{log:?}");
    assert!(log[1].starts_with("thaw data"));
    // As a process that was killed between the two leaves it.
    let id = tidemark_proto::convert::volume_id(&added.volume_id).unwrap();
    let mark = rig
        .path("capture/volumes")
        .join(id.to_string())
        .join("frozen");
    assert!(!mark.exists());
    std::fs::write(mark, []).unwrap();
    rig.start_capture().await;
    eventually("the thaw before all else", || async {
        let log = logged(&rig);
        (log.get(2)?.as_str() == "thaw data 0").then_some(())
    })
    .await;
    tokio::time::timeout(Duration::from_secs(60), rig.stop_capture())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_volume_is_quiesced_by_its_own_commands_and_what_is_not_given_is_as_for_all() {
    let rig = Rig::with(|config| {
        commands(config, "true", "true");
        let own = config.state.with_file_name("own");
        let own = own.display();
        let note = format!("echo $TIDEMARK_PHASE $TIDEMARK_VOLUME >> {own}");
        config.quiesce = format!(
            "{{ db = {{ pre = \"{note}; test ! -e {own}.fails\", post = \"{note}\", failure = \"skip\" }}, \
             plain = {{ pre = \"\", post = \"\" }} }}"
        )
        .parse()
        .unwrap();
        config.groups = "all=db,plain,data".parse().unwrap();
    })
    .await;
    for name in ["db", "plain", "data"] {
        let file = rig.path(&format!("{name}.img"));
        rig.try_add(name, &file, 64 * 4096, 0).await.unwrap();
    }
    rig.ship("plain").await;
    rig.nbd("data").write(0, &[1; 4096]).unwrap();
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.coherence, Coherence::Quiesced);
    let own = std::fs::read_to_string(rig.path("own")).unwrap();
    assert!(own.starts_with("freeze db\n"), "{own}");
    assert!(own.lines().all(|line| line.ends_with(" db")), "{own}");
    let of_all = logged(&rig);
    assert!(
        !of_all.is_empty() && of_all.iter().all(|line| line.contains(" data ")),
        "{of_all:?}"
    );

    // The policy of one holds for its group.
    std::fs::write(rig.path("own.fails"), "").unwrap();
    rig.nbd("data").write(0, &[2; 4096]).unwrap();
    let error = rig.try_ship("data").await.unwrap_err();
    assert_eq!(error.reason, Reason::NotQuiesced);
    assert!(
        error.message.contains("quiesce_pre of db failed"),
        "{error}"
    );
}
