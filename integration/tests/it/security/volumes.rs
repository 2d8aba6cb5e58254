//! Whose volumes are whose.

use bytes::Bytes;
use prost::Message;
use tidemark_identity::{
    Role,
    rules::{RULES, Who},
};
use tidemark_proto::{
    Reason, RpcError, capture::v1 as capture, common::v1 as common, vault::v1 as vault,
};
use tidemark_tls::Line;

use super::site::{Site, call, dial, url_of};

const LENGTH: u64 = 64 << 10;

fn id() -> Bytes {
    Bytes::from_static(&[7; 16])
}

fn geometry() -> Option<common::Geometry> {
    Some(common::Geometry {
        length: LENGTH,
        block_size: 4096,
    })
}

fn start_term(id: Bytes, name: &str, source: &str) -> vault::StartTermRequest {
    vault::StartTermRequest {
        volume_id: id,
        volume_name: name.to_owned(),
        source_name: source.to_owned(),
        geometry: geometry(),
        last_term: 0,
        nonce: Bytes::from_static(&[9; 16]),
    }
}

/// A request of the vault that concerns the volume `data` with [`id`]; none where a call names no volume, and shows
/// only those that the caller has.
fn about_the_volume(path: &str) -> Option<Vec<u8>> {
    let volume = "data".to_owned();
    let request = match path.rsplit('/').next().unwrap() {
        "StartTerm" => start_term(id(), "data", "edge-7").encode_to_vec(),
        "Ship" => vault::ShipRequest {
            message: Some(vault::ship_request::Message::Header(
                vault::IntervalHeader {
                    volume_id: id(),
                    term: 1,
                    interval_id: Bytes::from_static(&[3; 16]),
                    geometry: geometry(),
                    coherence: common::Coherence::Crash.into(),
                    trigger: common::Trigger::Request.into(),
                    ..vault::IntervalHeader::default()
                },
            )),
        }
        .encode_to_vec(),
        "MarkCurrent" => vault::MarkCurrentRequest {
            volume_id: id(),
            term: 1,
            interval_id: Bytes::from_static(&[3; 16]),
            generation: 1,
            image_digest: Bytes::from_static(&[5; 16]),
            cut_time_ms: 1,
        }
        .encode_to_vec(),
        "GetBlockDigests" => vault::GetBlockDigestsRequest {
            volume_id: id(),
            term: 1,
            generation: 1,
            level: vault::DigestLevel::Leaf.into(),
            ranges: vec![vault::NodeRange { start: 0, count: 1 }],
        }
        .encode_to_vec(),
        "ListGenerations" => vault::ListGenerationsRequest { volume }.encode_to_vec(),
        "GetGeneration" => vault::GetGenerationRequest {
            volume,
            generation: 0,
        }
        .encode_to_vec(),
        "Restore" => vault::RestoreRequest {
            volume,
            generation: 0,
        }
        .encode_to_vec(),
        "Maintain" => vault::MaintainRequest {
            volume,
            dry_run: true,
        }
        .encode_to_vec(),
        "Scrub" => vault::ScrubRequest { volume }.encode_to_vec(),
        "ListVolumes" | "GetStatus" => return None,
        other => panic!("{other} is a new call: say here what it asks for"),
    };
    Some(request)
}

async fn volumes_of(line: &Line) -> Vec<String> {
    let path = "/tidemark.vault.v1.Vault/ListVolumes";
    let answer = call(line, path, Bytes::new()).await.unwrap().unwrap();
    let listed = vault::ListVolumesResponse::decode(answer).unwrap();
    let path = "/tidemark.vault.v1.Vault/GetStatus";
    let answer = call(line, path, Bytes::new()).await.unwrap().unwrap();
    let status = vault::VaultStatus::decode(answer).unwrap();
    assert_eq!(status.volumes, listed.volumes);
    listed
        .volumes
        .into_iter()
        .map(|volume| format!("{}/{}", volume.source_name, volume.name))
        .collect()
}

fn roles_of(path: &str) -> Vec<Role> {
    let rule = RULES.iter().find(|rule| rule.path == path).unwrap();
    match rule.who {
        Who::Having(roles) => roles.iter().collect(),
        _ => Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_touches_the_volume_of_another() {
    let every = [Role::Source, Role::Restorer, Role::Operator, Role::Viewer];
    let site = Site::new();
    site.knows(&[
        ("edge-7", &[Role::Source], &["*"]),
        // Everything that the owner has, under another name.
        ("edge-8", &every, &["edge-8/*", "data2"]),
        (
            "desk",
            &[Role::Restorer, Role::Operator, Role::Viewer],
            &["edge-7/*"],
        ),
    ]);
    for name in ["edge-7", "edge-8", "desk"] {
        site.certificate(name, &[]);
    }
    let running = site.vault().await;
    let url = url_of(&running);
    let owner = dial(&site.dialer("edge-7"), &url).await.unwrap();
    let other = dial(&site.dialer("edge-8"), &url).await.unwrap();
    let desk = dial(&site.dialer("desk"), &url).await.unwrap();
    let term = "/tidemark.vault.v1.Ingest/StartTerm";
    // A source is called what its certificate says, whatever it says itself.
    let request = start_term(id(), "data", "somebody else").encode_to_vec();
    call(&owner, term, request.into()).await.unwrap();
    assert_eq!(volumes_of(&desk).await, ["edge-7/data"]);
    assert_eq!(volumes_of(&other).await, [""; 0]);

    for rule in RULES
        .iter()
        .filter(|rule| rule.path.starts_with("/tidemark.vault.v1."))
    {
        let Some(request) = about_the_volume(rule.path) else {
            continue;
        };
        let error = call(&other, rule.path, request.clone().into())
            .await
            .unwrap_err();
        assert_eq!(
            error.reason,
            Reason::PermissionDenied,
            "{}: {error}",
            rule.path
        );
        // Whose it is gets past that.
        let whose = if roles_of(rule.path).contains(&Role::Source) {
            &owner
        } else {
            &desk
        };
        if let Err(error) = call(whose, rule.path, request.into()).await {
            assert_ne!(
                error.reason,
                Reason::PermissionDenied,
                "{}: {error}",
                rule.path
            );
        }
    }
    // Nor does a source make a volume that it has no right to, nor take the name of one for its own.
    let free = Bytes::from_static(&[8; 16]);
    let request = start_term(free.clone(), "data", "edge-8").encode_to_vec();
    call(&other, term, request.into()).await.unwrap();
    assert_eq!(volumes_of(&other).await, ["edge-8/data"]);
    site.knows(&[
        ("edge-8", &every, &["wal"]),
        ("edge-7", &[Role::Source], &["*"]),
    ]);
    running.reload();
    let request = start_term(Bytes::from_static(&[6; 16]), "data", "edge-8").encode_to_vec();
    let error = call(&other, term, request.into()).await.unwrap_err();
    assert_eq!(error.reason, Reason::PermissionDenied);
    running.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_of_some_volumes_has_no_others_at_the_capture_service() {
    let roles = [Role::Operator, Role::Restorer];
    let site = Site::new();
    site.knows(&[
        ("all", &roles, &["*"]),
        ("some", &roles, &["edge-7/db-*"]),
        ("edge-8", &[Role::Source], &["*"]),
    ]);
    for name in ["all", "some", "edge-7", "edge-8"] {
        site.certificate(name, &[]);
    }
    let config = site.capture_config("https://127.0.0.1:1", "edge-7");
    let running = capture_svc::start(config).await.unwrap();
    let url = format!("https://{}", running.control_addr());
    let all = dial(&site.dialer("all"), &url).await.unwrap();
    let some = dial(&site.dialer("some"), &url).await.unwrap();
    let path = |call: &str| format!("/tidemark.capture.v1.Capture/{call}");
    let add = |name: &str| -> Bytes {
        let request = capture::AddVolumeRequest {
            name: name.to_owned(),
            file: super::site::volume_file(&site.path(""), name),
            length: LENGTH,
            ..capture::AddVolumeRequest::default()
        };
        request.encode_to_vec().into()
    };
    call(&all, &path("AddVolume"), add("data")).await.unwrap();
    call(&some, &path("AddVolume"), add("db-1")).await.unwrap();
    let denied = |answer: Result<Option<Bytes>, RpcError>, what: &str| {
        let error = answer.unwrap_err();
        assert_eq!(error.reason, Reason::PermissionDenied, "{what}: {error}");
    };
    denied(call(&some, &path("AddVolume"), add("wal")).await, "add");
    // Every other call names its volume, or volumes, in its first field.
    let mut asked = 0;
    for rule in RULES
        .iter()
        .filter(|rule| rule.path.contains("v1.Capture/"))
    {
        let shows = ["AddVolume", "ListVolumes", "GetStatus", "WatchStatus"];
        if shows.iter().any(|name| rule.path.ends_with(name)) {
            continue;
        }
        let request = capture::RollbackVolumeRequest {
            volume: "data".to_owned(),
            ..capture::RollbackVolumeRequest::default()
        };
        denied(
            call(&some, rule.path, request.encode_to_vec().into()).await,
            rule.path,
        );
        asked += 1;
    }
    assert_eq!(asked, 11);
    for name in ["ListVolumes", "GetStatus", "WatchStatus"] {
        let answer = call(&some, &path(name), Bytes::new())
            .await
            .unwrap()
            .unwrap();
        let volumes = match name {
            "ListVolumes" => {
                capture::ListVolumesResponse::decode(answer)
                    .unwrap()
                    .volumes
            }
            _ => capture::CaptureStatus::decode(answer).unwrap().volumes,
        };
        let names: Vec<_> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["db-1"], "{name}");
    }
    let hello = |volume: &str| -> Bytes {
        let hello = capture::Hello {
            name: "agent".to_owned(),
            volumes: vec![volume.to_owned()],
        };
        let request = capture::AttachRequest {
            message: Some(capture::attach_request::Message::Hello(hello)),
        };
        request.encode_to_vec().into()
    };
    let attach = "/tidemark.capture.v1.Coherence/Attach";
    denied(call(&some, attach, hello("data")).await, "attach");
    call(&some, attach, hello("db-1")).await.unwrap();
    tidemark_agent::attach_with(&site.dialer("some"), &url, "agent", ["db-1"])
        .await
        .unwrap();
    // Another source is no workload of this one.
    let other = dial(&site.dialer("edge-8"), &url).await.unwrap();
    denied(
        call(&other, attach, hello("data")).await,
        "attach of another",
    );
    running.shutdown().await.unwrap();
}
