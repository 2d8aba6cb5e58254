//! `tidemark snapshot …`.

use std::{path::PathBuf, sync::Arc, time::Instant};

use futures::{Stream, StreamExt};
use serde::Serialize;
use tidemark_proto::capture::v1::{
    CreateSnapshotRequest, CreateSnapshotsRequest, DeleteSnapshotRequest, ListSnapshotsRequest,
    ReadSnapshotRequest, ReadSnapshotResponse, Snapshot, read_snapshot_response,
};
use tonic::Streaming;

use super::restore::{blocking, describe, digest, finish, geometry};
use crate::{
    args::{Global, SnapshotCommand},
    failure::Failure,
    format,
    image::{self, ImageFile, Message},
    output,
    progress::Progress,
    report::{self, Written},
};

pub(super) async fn run(global: &Global, command: SnapshotCommand) -> Result<(), Failure> {
    match command {
        SnapshotCommand::Create {
            volumes,
            label,
            now,
        } => create(global, volumes, label, now).await,
        SnapshotCommand::List { volume } => list(global, volume).await,
        SnapshotCommand::Read {
            volume,
            snapshot,
            output,
            since,
            force,
        } => {
            let read = Read {
                volume,
                snapshot,
                output,
                since,
                force,
            };
            let written = read.write(global).await?;
            output::print(global.json, &written, &describe(&written))
        }
        SnapshotCommand::Rollback {
            volume,
            snapshot,
            force,
        } => super::rollback::run(global, volume, snapshot, force).await,
        SnapshotCommand::Delete { volume, snapshot } => {
            let request = DeleteSnapshotRequest {
                volume: volume.clone(),
                snapshot,
            };
            global.capture().await?.delete_snapshot(request).await?;
            output::print(
                global.json,
                &serde_json::json!({ "deleted": snapshot }),
                &format!("snapshot {snapshot} of {volume} is deleted\n"),
            )
        }
    }
}

async fn create(
    global: &Global,
    volumes: Vec<String>,
    label: String,
    now: bool,
) -> Result<(), Failure> {
    if let [volume] = &volumes[..] {
        let request = CreateSnapshotRequest {
            volume: volume.clone(),
            label,
            now,
        };
        let created = global.capture().await?.create_snapshot(request).await?;
        let created = report::Snapshot::new(created.into_inner());
        let text = table(std::slice::from_ref(&created));
        return output::print(global.json, &created, &text);
    }
    let request = CreateSnapshotsRequest {
        volumes: volumes.clone(),
        label,
        now,
    };
    let created = global.capture().await?.create_snapshots(request).await?;
    let snapshots = created.into_inner().snapshots;
    let created: Vec<_> = volumes
        .into_iter()
        .zip(snapshots.into_iter().map(report::Snapshot::new))
        .map(|(volume, snapshot)| Created { volume, snapshot })
        .collect();
    let rows: Vec<_> = created
        .iter()
        .map(|Created { volume, snapshot }| {
            [
                volume.clone(),
                snapshot.snapshot.to_string(),
                format::time(snapshot.cut_time),
                snapshot.coherence.to_owned(),
                snapshot.label.clone(),
                snapshot.coherence_reason.clone(),
            ]
        })
        .collect();
    let titles = [
        "VOLUME",
        "SNAPSHOT",
        "CUT",
        "COHERENCE",
        "LABEL",
        "WHY NO BETTER",
    ];
    let text = format::table(titles, &rows);
    output::print(global.json, &created, &text)
}

/// One of several snapshots.
#[derive(Debug, Serialize)]
struct Created {
    /// As it was named.
    volume: String,
    #[serde(flatten)]
    snapshot: report::Snapshot,
}

async fn list(global: &Global, volume: String) -> Result<(), Failure> {
    let request = ListSnapshotsRequest {
        volume: volume.clone(),
    };
    let listed = global.capture().await?.list_snapshots(request).await?;
    let snapshots: Vec<_> = listed
        .into_inner()
        .snapshots
        .into_iter()
        .map(report::Snapshot::new)
        .collect();
    let text = if snapshots.is_empty() {
        format!("no snapshots of {volume}\n")
    } else {
        table(&snapshots)
    };
    output::print(global.json, &snapshots, &text)
}

fn table(snapshots: &[report::Snapshot]) -> String {
    let rows: Vec<_> = snapshots
        .iter()
        .map(|s| {
            [
                s.snapshot.to_string(),
                format::time(s.cut_time),
                s.epoch.to_string(),
                s.coherence.to_owned(),
                s.scratches.len().to_string(),
                s.label.clone(),
                s.coherence_reason.clone(),
            ]
        })
        .collect();
    let titles = [
        "SNAPSHOT",
        "CUT",
        "EPOCH",
        "COHERENCE",
        "SCRATCHES",
        "LABEL",
        "WHY NO BETTER",
    ];
    format::table(titles, &rows)
}

/// What is to be read, and into which file.
pub(super) struct Read {
    pub(super) volume: String,
    pub(super) snapshot: u64,
    pub(super) output: PathBuf,
    pub(super) since: Option<u64>,
    pub(super) force: bool,
}

impl Read {
    pub(super) async fn write(self, global: &Global) -> Result<Written, Failure> {
        let began = Instant::now();
        let request = ReadSnapshotRequest {
            volume: self.volume.clone(),
            snapshot: self.snapshot,
            since_snapshot: self.since.unwrap_or(0),
        };
        let mut capture = global.capture().await?;
        let mut answers = capture.read_snapshot(request).await?.into_inner();
        let geometry = geometry(header(&mut answers).await?.geometry.as_ref())?;

        let (output, patch, force) = (self.output.clone(), self.since.is_some(), self.force);
        let file = blocking(move || {
            if patch {
                ImageFile::patch(&output, geometry.length())
            } else {
                ImageFile::create(&output, geometry.length(), force)
            }
        });
        let file = Arc::new(file.await?);
        let progress = Progress::bytes(
            &format!("snapshot {} of {}", self.snapshot, self.volume),
            geometry.length(),
        );
        let messages = messages(answers, self.since.is_none());
        let received = image::receive(messages, geometry, &file, &progress).await?;
        finish(file).await?;
        drop(progress);

        Ok(Written {
            volume: self.volume,
            generation: None,
            snapshot: Some(self.snapshot),
            since: self.since,
            output: self.output.display().to_string(),
            size: geometry.length(),
            data_bytes: received.data_bytes,
            image_digest: received.digest.map(|digest| digest.to_string()),
            took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }
}

async fn header(answers: &mut Streaming<ReadSnapshotResponse>) -> Result<Snapshot, Failure> {
    match answers.message().await?.and_then(|answer| answer.message) {
        Some(read_snapshot_response::Message::Header(header)) => Ok(header),
        _ => Err(Failure::protocol(
            "a snapshot does not begin with its header",
        )),
    }
}

/// `whole`: the last message must carry the digest of the image.
fn messages(
    answers: Streaming<ReadSnapshotResponse>,
    whole: bool,
) -> impl Stream<Item = Result<Message, Failure>> {
    answers.map(move |answer| match answer?.message {
        Some(read_snapshot_response::Message::Frames(frames)) => Ok(Message::Frames(frames)),
        Some(read_snapshot_response::Message::End(end)) => Ok(Message::End {
            blocks_sent: end.blocks_sent,
            digest: whole.then(|| digest(&end.image_digest)).transpose()?,
        }),
        _ => Err(Failure::protocol("a second header amid a snapshot")),
    })
}

#[cfg(test)]
mod tests {
    use tidemark_proto::{capture::v1 as capture, common::v1 as common};

    use super::*;

    #[test]
    fn a_snapshot_is_printed_for_people_and_for_programs() {
        let snapshot = report::Snapshot::new(capture::Snapshot {
            snapshot: 3,
            label: "before upgrade".into(),
            epoch: 12,
            cut_time_ms: 1_793_337_404_000,
            coherence: common::Coherence::Flushed.into(),
            geometry: Some(common::Geometry {
                length: 8 << 30,
                block_size: 4096,
            }),
            coherence_reason: "no agent or command quiesces the workload".into(),
            scratches: vec![capture::Scratch {
                name: "data@3+scratch".into(),
                snapshot: 3,
                clients: 2,
                bytes_used: 4096,
            }],
        });
        insta::assert_json_snapshot!(snapshot);
        insta::assert_snapshot!(table(&[snapshot]));
    }
}
