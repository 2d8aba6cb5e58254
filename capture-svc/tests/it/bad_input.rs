//! What users, disks and other programs get wrong: a clear error that says what to do, nothing lost, nothing half done.

use std::{os::unix::fs::FileExt, path::Path, process::Command};

use tidemark_proto::{
    Reason, RpcError,
    capture::v1::{self as pb, VolumeState},
};

use crate::rig::{Rig, capture_config, eventually, noise};

fn leftovers(rig: &Rig) -> usize {
    std::fs::read_dir(rig.path("capture/volumes"))
        .unwrap()
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_cannot_be_is_not_added_and_leaves_nothing_behind() {
    let rig = Rig::new().await;
    rig.add("there", 16).await;
    std::fs::write(rig.path("odd.img"), [0; 5000]).unwrap();
    std::fs::write(rig.path("empty.img"), []).unwrap();
    std::fs::write(rig.path("whole.img"), [0; 8192]).unwrap();
    std::fs::hard_link(rig.path("there.img"), rig.path("link.img")).unwrap();
    std::os::unix::fs::symlink(rig.path("there.img"), rig.path("symlink.img")).unwrap();
    let cases = [
        (
            "new",
            rig.path("new.img"),
            0,
            0,
            Reason::VolumeFileInvalid,
            "give a length",
        ),
        (
            "new",
            rig.path("odd.img"),
            0,
            0,
            Reason::GeometryInvalid,
            "multiple of the block size",
        ),
        (
            "new",
            rig.path("empty.img"),
            0,
            0,
            Reason::GeometryInvalid,
            "multiple of the block size",
        ),
        (
            "new",
            rig.path("whole.img"),
            4096,
            0,
            Reason::VolumeFileInvalid,
            "leave the length out",
        ),
        (
            "new",
            rig.path("new.img"),
            4097,
            0,
            Reason::GeometryInvalid,
            "multiple",
        ),
        (
            "new",
            rig.path("new.img"),
            4096,
            512,
            Reason::GeometryInvalid,
            "power of two",
        ),
        (
            "new",
            rig.path("new.img"),
            4096,
            65536,
            Reason::GeometryInvalid,
            "multiple",
        ),
        (
            "new",
            rig.path("new.img"),
            !4095,
            0,
            Reason::GeometryInvalid,
            "block size",
        ),
        (
            "new",
            rig.path("no/such/dir.img"),
            4096,
            0,
            Reason::VolumeFileInvalid,
            "directory exists",
        ),
        (
            "new",
            rig.path("capture"),
            4096,
            0,
            Reason::VolumeFileInvalid,
            "name the file",
        ),
        (
            "new",
            "relative.img".into(),
            4096,
            0,
            Reason::VolumeFileInvalid,
            "absolute path",
        ),
        (
            "new",
            rig.path("there.img"),
            0,
            0,
            Reason::VolumeExists,
            "use that volume",
        ),
        (
            "new",
            rig.path("link.img"),
            0,
            0,
            Reason::VolumeExists,
            "use that volume",
        ),
        (
            "new",
            rig.path("symlink.img"),
            0,
            0,
            Reason::VolumeExists,
            "use that volume",
        ),
        (
            "there",
            rig.path("new.img"),
            4096,
            0,
            Reason::VolumeExists,
            "another name",
        ),
        (
            "No Way",
            rig.path("new.img"),
            4096,
            0,
            Reason::VolumeNameInvalid,
            "1 to 63",
        ),
    ];
    for (name, file, length, block_size, reason, action) in cases {
        let error = rig
            .try_add(name, &file, length, block_size)
            .await
            .unwrap_err();
        assert_eq!(error.reason, reason, "{}: {error}", file.display());
        let text = format!("{}: {}", error.message, error.action);
        assert!(text.contains(action), "{text:?} says what to do");
        assert!(!rig.path("new.img").exists(), "{text}");
        assert_eq!(leftovers(&rig), 1, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_volume_is_named_in_every_call() {
    let rig = Rig::new().await;
    let mut client = rig.client().await;
    let volume = "nobody".to_owned();
    let errors = [
        client
            .get_volume(pb::GetVolumeRequest {
                volume: volume.clone(),
            })
            .await
            .unwrap_err(),
        client
            .remove_volume(pb::RemoveVolumeRequest {
                volume: volume.clone(),
                force: true,
            })
            .await
            .unwrap_err(),
        client
            .readopt_volume(pb::ReadoptVolumeRequest {
                volume: volume.clone(),
                engine: String::new(),
            })
            .await
            .unwrap_err(),
        client
            .create_snapshot(pb::CreateSnapshotRequest {
                volume: volume.clone(),
                label: String::new(),
                now: false,
            })
            .await
            .unwrap_err(),
        client
            .list_snapshots(pb::ListSnapshotsRequest {
                volume: volume.clone(),
            })
            .await
            .unwrap_err(),
        client
            .read_snapshot(pb::ReadSnapshotRequest {
                volume: volume.clone(),
                snapshot: 1,
                since_snapshot: 0,
            })
            .await
            .unwrap_err(),
        client
            .delete_snapshot(pb::DeleteSnapshotRequest {
                volume: volume.clone(),
                snapshot: 1,
            })
            .await
            .unwrap_err(),
        client
            .trigger_interval(pb::TriggerIntervalRequest {
                volume: volume.clone(),
            })
            .await
            .unwrap_err(),
    ];
    for status in errors {
        let error = RpcError::from(status);
        assert_eq!(error.reason, Reason::VolumeNotFound);
        assert!(error.message.contains("nobody") && !error.action.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_has_one_service_and_a_file_one_owner() {
    let rig = Rig::new().await;
    rig.add("data", 16).await;
    let mut second = capture_config(rig.dir.path(), &rig.proxy.url());
    second.nbd.0.clear();
    let error = capture_svc::start(second.clone()).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("capture"), "{text}");
    second.state = rig.path("elsewhere");
    let other = capture_svc::start(second).await.unwrap();
    let url = format!("http://{}", other.control_addr());
    let channel = tonic::transport::Endpoint::from_shared(url)
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut client = pb::capture_client::CaptureClient::new(channel);
    let request = pb::AddVolumeRequest {
        name: "mine".into(),
        file: rig.path("data.img").display().to_string(),
        length: 0,
        block_size: 0,
        engine: "intercept".into(),
    };
    let error = RpcError::from(client.add_volume(request).await.unwrap_err());
    assert_eq!(error.reason, Reason::VolumeFileInUse, "{error}");
    other.shutdown().await.unwrap();
    rig.ship("data").await;
}

async fn state_of(rig: &Rig, name: &str) -> (VolumeState, String) {
    let volume = rig.volume(name).await;
    (volume.state(), volume.problem)
}

/// Each way to spoil a volume while the service is away: the volume is listed with its problem, the other one
/// serves, and once the cause is gone the volume serves again by itself, with nothing lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_spoilt_volume_stops_no_other_and_recovers_by_itself() {
    let mut rig = Rig::new().await;
    rig.add("data", 64).await;
    rig.add("other", 64).await;
    let id = tidemark_proto::convert::volume_id(&rig.volume("data").await.volume_id).unwrap();
    let state = rig.path("capture/volumes").join(id.to_string());
    let image = rig.path("data.img");
    let content = noise(1, 64 * 4096);
    rig.nbd("data").write(0, &content).unwrap();
    rig.ship("data").await;
    let moved = |path: &Path| path.with_extension("away");
    let swap_length = |path: &Path, length: u64| {
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(length).unwrap();
    };
    let damage = |path: &Path, byte: u8| {
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&[byte], 1).unwrap();
    };
    type Act<'a> = Box<dyn Fn() + 'a>;
    let cases: Vec<(&str, Act<'_>, Act<'_>, &str)> = vec![
        (
            "missing",
            Box::new(|| std::fs::rename(&image, moved(&image)).unwrap()),
            Box::new(|| std::fs::rename(moved(&image), &image).unwrap()),
            "is missing",
        ),
        (
            "longer",
            Box::new(|| swap_length(&image, 65 * 4096)),
            Box::new(|| swap_length(&image, 64 * 4096)),
            "bytes",
        ),
        (
            "a directory",
            Box::new(|| {
                std::fs::rename(&image, moved(&image)).unwrap();
                std::fs::create_dir(&image).unwrap();
            }),
            Box::new(|| {
                std::fs::remove_dir(&image).unwrap();
                std::fs::rename(moved(&image), &image).unwrap();
            }),
            "not a regular file",
        ),
        (
            "a damaged uplink record",
            Box::new(|| damage(&state.join("uplink"), b'X')),
            Box::new(|| damage(&state.join("uplink"), b'M')),
            "uplink record",
        ),
    ];
    for (what, spoil, mend, problem) in &cases {
        rig.capture.take().unwrap().shutdown().await.unwrap();
        spoil();
        rig.capture = Some(capture_svc::start(rig.config.clone()).await.unwrap());
        let (found, text) = state_of(&rig, "data").await;
        assert_eq!(found, VolumeState::Failed, "{what}");
        assert!(text.contains(problem), "{what}: {text}");
        let error = rig.try_ship("data").await.unwrap_err();
        assert_eq!(error.reason, Reason::VolumeFailed, "{what}");
        rig.ship("other").await;
        mend();
        eventually("it serves again", || async {
            (state_of(&rig, "data").await.0 == VolumeState::Serving).then_some(())
        })
        .await;
        rig.ship("data").await;
        assert!(rig.restore("data", 0).await == content, "{what}");
    }
}

async fn readopt(rig: &Rig, name: &str) -> Result<pb::Volume, RpcError> {
    let request = pb::ReadoptVolumeRequest {
        volume: name.to_owned(),
        engine: String::new(),
    };
    let answer = rig.client().await.readopt_volume(request).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(RpcError::from)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_file_is_not_served_until_it_is_readopted_and_then_only_differences_are_shipped()
{
    let mut rig = Rig::new().await;
    rig.add("data", 1024).await;
    let image = rig.path("data.img");
    let mut content = noise(1, 1024 * 4096);
    rig.nbd("data").write(0, &content).unwrap();
    let generation = rig.ship("data").await.generation.get();
    rig.snapshot("data", "").await;
    rig.stop_capture().await;

    content[5 * 4096..7 * 4096].fill(9);
    let copy = rig.path("copy.img");
    std::fs::write(&copy, &content).unwrap();
    std::fs::rename(&copy, &image).unwrap();
    rig.start_capture().await;
    let (state, problem) = state_of(&rig, "data").await;
    assert_eq!(state, VolumeState::Failed);
    assert!(problem.contains("readopt"), "{problem}");
    let refused = rig.try_ship("data").await.unwrap_err();
    assert_eq!(refused.reason, Reason::VolumeFailed);
    assert!(crate::nbd::Nbd::connect(&rig.path("nbd.sock"), "data").is_err());

    // While it is missing, readopting says so, and decides nothing.
    std::fs::rename(&image, &copy).unwrap();
    let missing = readopt(&rig, "data").await.unwrap_err();
    assert_eq!(missing.reason, Reason::VolumeFileInvalid, "{missing}");
    std::fs::rename(&copy, &image).unwrap();
    eventually("the replaced file is seen again", || async {
        let (state, problem) = state_of(&rig, "data").await;
        assert_eq!(state, VolumeState::Failed);
        problem.contains("replaced").then_some(())
    })
    .await;

    let volume = readopt(&rig, "data").await.unwrap();
    assert_eq!(volume.state(), VolumeState::Serving);
    assert_eq!(volume.snapshots, 0, "those of the other file are gone");
    let receipt = rig.ship("data").await;
    assert_eq!(receipt.generation.get(), generation + 1);
    assert!(rig.restore("data", generation + 1).await == content);
    let generations = rig.generations("data").await;
    assert_eq!(generations.last().unwrap().changed_blocks, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn readopting_a_served_volume_finds_what_was_written_past_it() {
    let rig = Rig::new().await;
    rig.add("data", 256).await;
    let image = rig.path("data.img");
    rig.nbd("data").write(0, &noise(1, 256 * 4096)).unwrap();
    rig.ship("data").await;
    rig.snapshot("data", "").await;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap();
    file.write_all_at(&[7; 4096], 100 * 4096).unwrap();
    let mut nbd = rig.nbd("data");
    let volume = readopt(&rig, "data").await.unwrap();
    assert_eq!(volume.state(), VolumeState::Serving);
    assert_eq!((volume.snapshots, volume.clients), (1, 1));
    nbd.write(0, &[3; 4096]).unwrap();
    rig.ship("data").await;
    assert!(rig.restore("data", 0).await == std::fs::read(&image).unwrap());

    // The file that is open is not the one at the path any more: that one can't be meant.
    let aside = rig.path("aside.img");
    std::fs::rename(&image, &aside).unwrap();
    std::fs::copy(&aside, &image).unwrap();
    let refused = readopt(&rig, "data").await.unwrap_err();
    assert_eq!(refused.reason, Reason::VolumeFileInUse, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_another_volume_is_not_taken_for_ones_own() {
    let mut rig = Rig::new().await;
    rig.add("a", 16).await;
    rig.add("b", 16).await;
    let dir = async |name: &str| {
        let id = tidemark_proto::convert::volume_id(&rig.volume(name).await.volume_id).unwrap();
        rig.path("capture/volumes").join(id.to_string())
    };
    let (a, b) = (dir("a").await, dir("b").await);
    rig.stop_capture().await;
    // The directories change places, then only one file of them does.
    let swap = |a: &Path, b: &Path| {
        let spare = a.with_extension("spare");
        std::fs::rename(a, &spare).unwrap();
        std::fs::rename(b, a).unwrap();
        std::fs::rename(&spare, b).unwrap();
    };
    swap(&a, &b);
    rig.start_capture().await;
    for id in [&a, &b] {
        let name = id.file_name().unwrap().to_str().unwrap();
        let (state, problem) = state_of(&rig, name).await;
        assert_eq!(state, VolumeState::Failed);
        assert!(problem.contains("record of volume"), "{problem}");
    }
    rig.stop_capture().await;
    swap(&a, &b);
    swap(&a.join("uplink"), &b.join("uplink"));
    rig.start_capture().await;
    for name in ["a", "b"] {
        let (state, problem) = state_of(&rig, name).await;
        assert_eq!(state, VolumeState::Failed);
        assert!(
            problem.contains("another volume's state directory"),
            "{problem}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_half_added_is_gone_after_a_restart() {
    let mut rig = Rig::new().await;
    rig.add("data", 16).await;
    rig.stop_capture().await;
    let half = rig.path("capture/volumes/00112233-4455-6677-8899-aabbccddeeff");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("uplink"), b"anything").unwrap();
    let stranger = rig.path("capture/volumes/lost+found");
    std::fs::create_dir(&stranger).unwrap();
    rig.start_capture().await;
    assert!(!half.exists());
    assert!(stranger.exists(), "what isn't ours is left alone");
    assert_eq!(state_of(&rig, "data").await.0, VolumeState::Serving);
}

fn program(arguments: &[&str], environment: &[(&str, &str)]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_capture-svc"))
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn the_program_names_what_is_wrong_with_its_settings() {
    let (code, out, _) = program(&["--print-config", "--interval-max", "7m"], &[]);
    assert_eq!(code, 0);
    assert!(out.contains("interval_max = \"7m\""), "{out}");
    let (code, _, err) = program(&["--no-such-flag"], &[]);
    assert_eq!(code, 2);
    assert!(err.contains("--no-such-flag"), "{err}");
    let bad = [("CAPTURE_SPEED", "9"), ("CAPTURE_LISTEN", "nowhere")];
    let (code, _, err) = program(&["--print-config"], &bad);
    assert_eq!(code, 1);
    assert!(
        err.contains("speed = \"9\" (CAPTURE_SPEED): no such key")
            && err.contains("listen = \"nowhere\" (CAPTURE_LISTEN): "),
        "{err}"
    );
    let (code, _, err) = program(&["--config", "/no/such/file.toml"], &[]);
    assert_eq!(code, 1);
    assert!(err.contains("/no/such/file.toml"), "{err}");
    // What a cluster puts into the environment of a service named `capture`.
    let cluster = [
        ("CAPTURE_PORT", "tcp://10.0.0.1:7401"),
        ("CAPTURE_SERVICE_HOST", "10.0.0.1"),
        ("CAPTURE_PORT_7401_TCP_ADDR", "10.0.0.1"),
    ];
    let (code, _, err) = program(&["--print-config"], &cluster);
    assert_eq!((code, err.as_str()), (0, ""));
}

/// Sets or takes away the attribute immutable, which keeps root too from writing. False where that isn't possible here.
fn set_immutable(path: &Path, immutable: bool) -> bool {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let file = std::fs::File::open(path).unwrap();
    let done = ioctl_getflags(&file).and_then(|mut flags| {
        flags.set(IFlags::IMMUTABLE, immutable);
        ioctl_setflags(&file, flags)
    });
    let Err(error) = done else {
        return true;
    };
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "the attribute immutable can't be set: {error}"
    );
    println!("skipped: the attribute immutable can't be set, which takes root: {error}");
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_file_that_nobody_may_write_is_told_with_what_to_do() {
    let mut rig = Rig::new().await;
    let fixed = rig.path("fixed.img");
    std::fs::write(&fixed, [1; 8192]).unwrap();
    if !set_immutable(&fixed, true) {
        return;
    }
    let added = rig.try_add("fixed", &fixed, 0, 0).await;
    set_immutable(&fixed, false);
    let refused = added.unwrap_err();
    assert_eq!(refused.reason, Reason::VolumeFileInvalid, "{refused}");
    assert!(refused.message.contains("fixed.img"), "{refused}");
    assert!(refused.action.contains("chattr -i"), "{}", refused.action);
    assert_eq!(leftovers(&rig), 0);
    assert_eq!(std::fs::read(&fixed).unwrap(), [1; 8192]);

    rig.add("data", 16).await;
    let image = rig.path("data.img");
    rig.stop_capture().await;
    set_immutable(&image, true);
    rig.start_capture().await;
    let (state, problem) = state_of(&rig, "data").await;
    set_immutable(&image, false);
    assert_eq!(state, VolumeState::Failed);
    assert!(
        problem.contains("data.img") && problem.contains("chattr -i"),
        "{problem}"
    );
    eventually("it serves again", || async {
        (state_of(&rig, "data").await.0 == VolumeState::Serving).then_some(())
    })
    .await;
    rig.ship("data").await;
}
