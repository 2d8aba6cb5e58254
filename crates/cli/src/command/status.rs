//! `tidemark status`.

use std::{io::IsTerminal, time::Duration};

use jiff::Timestamp;
use tidemark_proto::{
    capture::v1::{CaptureStatus, GetStatusRequest as CaptureStatusRequest, WatchStatusRequest},
    vault::v1::{GetStatusRequest as VaultStatusRequest, VaultStatus},
};
use tonic::Streaming;

use super::volume::uplink_state;
use crate::{
    args::{Global, StatusArgs},
    failure::{Failure, Kind},
    format, output,
    report::{Service, Status, VaultVolume, Volume},
};

/// Between two tries to reach a service that is watched.
const RETRY: Duration = Duration::from_secs(1);
const PERIOD_MIN_MS: u32 = 500;
/// Clears the screen and goes to its top.
const CLEAR: &str = "\x1b[2J\x1b[H";

pub(super) async fn run(global: &Global, args: StatusArgs) -> Result<(), Failure> {
    if args.watch {
        return watch(global).await;
    }
    let status = Status {
        capture: capture(global, capture_once(global).await)?,
        vault: vault(global).await?,
    };
    show(global, &status, "")?;
    let problems: Vec<_> = [&status.capture.problem, &status.vault.problem]
        .into_iter()
        .filter(|problem| !problem.is_empty())
        .map(String::as_str)
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Unavailable,
        "UNREACHABLE",
        problems.join("; "),
        "start it (`tidemark up` runs both), or say where it is with --capture and --vault",
    ))
}

/// Shows the status at each change at the capture service; while that cannot be reached, every second.
async fn watch(global: &Global) -> Result<(), Failure> {
    let clear = if std::io::stdout().is_terminal() && !global.json {
        CLEAR
    } else {
        ""
    };
    loop {
        let mut changes = match subscribe(global).await {
            Ok(changes) => changes,
            Err(failure) => {
                show_once(global, Err(failure), clear).await?;
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        loop {
            match changes.message().await {
                Ok(Some(status)) => show_once(global, Ok(status), clear).await?,
                Ok(None) => break,
                Err(status) => {
                    show_once(global, Err(status.into()), clear).await?;
                    break;
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn subscribe(global: &Global) -> Result<Streaming<CaptureStatus>, Failure> {
    let request = WatchStatusRequest {
        period_min_ms: PERIOD_MIN_MS,
    };
    let answers = global.capture().await?.watch_status(request).await?;
    Ok(answers.into_inner())
}

async fn show_once(
    global: &Global,
    capture_status: Result<CaptureStatus, Failure>,
    clear: &str,
) -> Result<(), Failure> {
    let status = Status {
        capture: capture(global, capture_status)?,
        vault: vault(global).await?,
    };
    show(global, &status, clear)
}

async fn capture_once(global: &Global) -> Result<CaptureStatus, Failure> {
    let mut capture = global.capture().await?;
    let status = capture.get_status(CaptureStatusRequest {}).await?;
    Ok(status.into_inner())
}

async fn vault_once(global: &Global) -> Result<VaultStatus, Failure> {
    let mut vault = global.vault().await?;
    let status = vault.get_status(VaultStatusRequest {}).await?;
    Ok(status.into_inner())
}

fn capture(
    global: &Global,
    status: Result<CaptureStatus, Failure>,
) -> Result<Service<Volume>, Failure> {
    match status {
        Ok(status) => Ok(Service {
            url: global.capture.clone(),
            reachable: true,
            problem: String::new(),
            version: status.version,
            volumes: collect(status.volumes, Volume::new)?,
        }),
        Err(failure) => unreachable(&global.capture, failure),
    }
}

async fn vault(global: &Global) -> Result<Service<VaultVolume>, Failure> {
    match vault_once(global).await {
        Ok(status) => Ok(Service {
            url: global.vault.clone(),
            reachable: true,
            problem: String::new(),
            version: status.version,
            volumes: collect(status.volumes, VaultVolume::new)?,
        }),
        Err(failure) => unreachable(&global.vault, failure),
    }
}

fn collect<A, B>(
    items: Vec<A>,
    convert: impl Fn(A) -> Result<B, Failure>,
) -> Result<Vec<B>, Failure> {
    items.into_iter().map(convert).collect()
}

fn unreachable<V>(url: &str, failure: Failure) -> Result<Service<V>, Failure> {
    if failure.kind() != Kind::Unavailable {
        return Err(failure);
    }
    Ok(Service {
        url: url.to_owned(),
        reachable: false,
        problem: failure.message().to_owned(),
        version: String::new(),
        volumes: Vec::new(),
    })
}

fn show(global: &Global, status: &Status, clear: &str) -> Result<(), Failure> {
    let text = format!("{clear}{}", describe(status, Timestamp::now()));
    output::print(global.json, status, &text)
}

fn describe(status: &Status, now: Timestamp) -> String {
    let mut text = headline("capture", &status.capture);
    text.push_str(&captured(&status.capture.volumes, now));
    text.push_str(&scratches(&status.capture.volumes));
    text.push_str(&problems(&status.capture.volumes));
    text.push('\n');
    text.push_str(&headline("vault", &status.vault));
    text.push_str(&vaulted(&status.vault.volumes, now));
    text.push_str(&damage(&status.vault.volumes));
    text
}

fn captured(volumes: &[Volume], now: Timestamp) -> String {
    if volumes.is_empty() {
        return String::new();
    }
    let rows: Vec<_> = volumes
        .iter()
        .map(|v| {
            [
                v.volume.clone(),
                v.state.to_owned(),
                v.changed_blocks.to_string(),
                v.snapshots.to_string(),
                v.generation.to_string(),
                format::ago(v.uplink.recovery_point, now),
                uplink_state(&v.uplink),
            ]
        })
        .collect();
    format::table(
        [
            "VOLUME",
            "STATE",
            "CHANGED",
            "SNAPSHOTS",
            "GENERATION",
            "RECOVERY POINT",
            "UPLINK",
        ],
        &rows,
    )
}

fn scratches(volumes: &[Volume]) -> String {
    let all = volumes.iter().flat_map(|v| &v.scratches);
    all.map(|scratch| format!("scratch {}\n", super::volume::scratch(scratch)))
        .collect()
}

fn problems(volumes: &[Volume]) -> String {
    let mut text = String::new();
    for v in volumes {
        for problem in [&v.problem, &v.uplink.error] {
            if !problem.is_empty() {
                text.push_str(&format!("{}: {problem}\n", v.volume));
            }
        }
        if v.scrub.mismatches > 0 {
            text.push_str(&format!(
                "{}: the source scrub found {} blocks that tracking had missed; see the capture service's log\n",
                v.volume, v.scrub.mismatches
            ));
        }
    }
    text
}

fn vaulted(volumes: &[VaultVolume], now: Timestamp) -> String {
    if volumes.is_empty() {
        return String::new();
    }
    let rows: Vec<_> = volumes
        .iter()
        .map(|v| {
            [
                v.volume.clone(),
                v.source.clone(),
                v.generations.to_string(),
                v.generation.to_string(),
                format::ago(v.current_through, now),
                format::bytes(v.stored_bytes),
            ]
        })
        .collect();
    format::table(
        [
            "VOLUME",
            "SOURCE",
            "GENERATIONS",
            "NEWEST",
            "CURRENT THROUGH",
            "STORED",
        ],
        &rows,
    )
}

fn damage(volumes: &[VaultVolume]) -> String {
    let damaged = volumes.iter().filter(|v| v.scrub.damaged_objects > 0);
    damaged
        .map(|v| {
            format!(
                "{}: {} stored objects are damaged; `tidemark scrub {} --stored` names them\n",
                v.volume, v.scrub.damaged_objects, v.volume
            )
        })
        .collect()
}

fn headline<V>(service: &str, status: &Service<V>) -> String {
    if status.reachable {
        format!("{service} service {} at {}\n", status.version, status.url)
    } else {
        format!("{service} service: {}\n", status.problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report;

    fn example() -> Status {
        Status {
            capture: Service {
                url: "http://127.0.0.1:7401".into(),
                reachable: true,
                problem: String::new(),
                version: "0.1.0".into(),
                volumes: vec![super::super::volume::tests::example()],
            },
            vault: Service {
                url: "http://127.0.0.1:7402".into(),
                reachable: true,
                problem: String::new(),
                version: "0.1.0".into(),
                volumes: vec![VaultVolume {
                    volume: "data".into(),
                    id: "11111111-1111-1111-1111-111111111111".into(),
                    source: "edge-1".into(),
                    size: 8 << 30,
                    block_size: 4096,
                    term: 2,
                    generation: 7,
                    generations: 4,
                    stored_bytes: 123 << 20,
                    current_through: report::time(1_793_337_404_000),
                    scrub: report::StoredScrub {
                        passes: 1,
                        completed: report::time(1_793_337_000_000),
                        bytes_done: 23 << 20,
                        bytes_total: 123 << 20,
                        damaged_objects: 1,
                    },
                }],
            },
        }
    }

    fn now() -> Timestamp {
        Timestamp::from_millisecond(1_793_337_464_000).unwrap()
    }

    #[test]
    fn the_status_shows_both_services_and_how_far_back_the_vault_is() {
        insta::assert_snapshot!(describe(&example(), now()));
        insta::assert_json_snapshot!(example());
    }

    #[test]
    fn a_service_that_cannot_be_reached_and_a_scrub_that_found_something_are_told() {
        let mut status = example();
        status.capture.volumes[0].scrub.mismatches = 2;
        status.vault = Service {
            url: "http://127.0.0.1:7402".into(),
            reachable: false,
            problem: "the vault service cannot be reached at http://127.0.0.1:7402: refused".into(),
            version: String::new(),
            volumes: Vec::new(),
        };
        insta::assert_snapshot!(describe(&status, now()));
    }
}
