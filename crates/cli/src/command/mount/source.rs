//! The file to mount, in the service's directory: found, opened, and for a volume used by nobody else.

use std::{
    fs::{File, OpenOptions},
    path::PathBuf,
    time::Duration,
};

use tidemark_proto::capture::v1::{GetVolumeRequest, ListSnapshotsRequest, Volume, VolumeState};
use uuid::Uuid;

use super::super::restore::blocking;
use crate::{
    attach::mounted::Ours,
    connect::Capture,
    failure::{Failure, Kind},
    parse::SnapshotRef,
};

/// The type of the service's directory, as `statfs` tells it.
const FUSE_MAGIC: u64 = 0x6573_5546;
/// Characters of a scratch's name: enough that no two mounts have the same.
const SCRATCH_NAME_LEN: usize = 16;
/// How often, and how long, other users of a volume are waited for: the kernel tells the service of a file's end a
/// moment later than whoever has closed it.
const USERS_LOOKS: u32 = 20;
const USERS_LOOK: Duration = Duration::from_millis(50);

/// The file of a volume, or of a scratch of a snapshot, in the service's directory.
#[derive(Debug)]
pub(super) struct Source {
    volume: String,
    pub(super) snapshot: Option<u64>,
    pub(super) file: PathBuf,
}

impl Source {
    pub(super) async fn find(capture: &mut Capture, what: SnapshotRef) -> Result<Self, Failure> {
        let volume = volume(capture, &what.volume).await?;
        if volume.state() != VolumeState::Serving {
            return Err(Failure::new(
                Kind::Conflict,
                "VOLUME_FAILED",
                format!("volume {} is not served: {}", volume.name, volume.problem),
                "it is tried again by itself every few seconds once the cause is gone",
            ));
        }
        let file = PathBuf::from(volume.fuse_path);
        let Some(directory) = file.parent() else {
            return Err(Failure::new(
                Kind::Conflict,
                "NO_FUSE_MOUNT",
                "the capture service serves no files to mount",
                "start it with a directory for them: fuse_mount in its configuration, CAPTURE_FUSE_MOUNT, --fuse-mount",
            ));
        };
        let Some(text) = what.snapshot else {
            return Ok(Self {
                volume: volume.name,
                snapshot: None,
                file,
            });
        };
        let snapshot = number_of(capture, &volume.name, &text).await?;
        // A scratch of its own: others that look at the same snapshot aren't written to.
        let own = Uuid::new_v4().simple().to_string();
        let name = format!("{snapshot}+scratch-{}.img", &own[..SCRATCH_NAME_LEN]);
        Ok(Self {
            file: directory.join(".snapshots").join(&volume.name).join(name),
            volume: volume.name,
            snapshot: Some(snapshot),
        })
    }

    pub(super) async fn open(&self) -> Result<File, Failure> {
        let path = self.file.clone();
        blocking(move || {
            let open = OpenOptions::new().read(true).write(true).open(&path);
            let unseen = |why: &str| {
                Failure::new(
                    Kind::Failed,
                    "FUSE_PATH_NOT_SEEN",
                    format!("cannot use {}, the service's file: {why}", path.display()),
                    "run the command on the service's machine, where its directory is mounted (in a container: with that \
                     directory shared)",
                )
            };
            let file = open.map_err(|error| unseen(&error.to_string()))?;
            let kind = rustix::fs::fstatfs(&file).map_err(|errno| unseen(&errno.to_string()))?;
            if u64::try_from(kind.f_type).ok() != Some(FUSE_MAGIC) {
                return Err(unseen("it is not what the service has mounted"));
            }
            Ok(file)
        })
        .await
    }

    /// Fails unless the file that we have open is the volume's only use.
    pub(super) async fn is_ours_alone(&self, capture: &mut Capture) -> Result<(), Failure> {
        let mut clients = 0;
        for _ in 0..USERS_LOOKS {
            clients = volume(capture, &self.volume).await?.clients;
            if clients <= 1 {
                return Ok(());
            }
            tokio::time::sleep(USERS_LOOK).await;
        }
        let mounted = Ours::list().await?;
        let mounted = mounted
            .iter()
            .find(|one| one.alive && one.volume == self.volume && one.snapshot.is_none());
        let others = match mounted {
            Some(one) => format!("it is mounted at {}", one.at.display()),
            None => format!("it has {} other clients", clients - 1),
        };
        Err(Failure::new(
            Kind::Conflict,
            "VOLUME_IN_USE",
            format!("cannot mount volume {}: {others}", self.volume),
            "disconnect or unmount them first, or take a snapshot and mount that",
        ))
    }
}

pub(super) async fn volume(capture: &mut Capture, volume: &str) -> Result<Volume, Failure> {
    let request = GetVolumeRequest {
        volume: volume.to_owned(),
    };
    Ok(capture.get_volume(request).await?.into_inner())
}

/// The snapshot with this number, or the newest with this label.
async fn number_of(capture: &mut Capture, volume: &str, text: &str) -> Result<u64, Failure> {
    let request = ListSnapshotsRequest {
        volume: volume.to_owned(),
    };
    let listed = capture
        .list_snapshots(request)
        .await?
        .into_inner()
        .snapshots;
    let numbered = listed.iter().find(|one| one.snapshot.to_string() == text);
    let labelled = || listed.iter().rfind(|one| one.label == text);
    numbered
        .or_else(labelled)
        .map(|one| one.snapshot)
        .ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                "SNAPSHOT_NOT_FOUND",
                format!("volume {volume} has no snapshot {text:?}"),
                format!("`tidemark snapshot list {volume}` shows numbers and labels"),
            )
        })
}
