//! `tidemark mount`: the filesystem of a volume or a snapshot on a directory of this machine.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use rustix::io::Errno;
use tidemark_proto::capture::v1::{
    GetVolumeRequest, ListSnapshotsRequest, Volume, VolumeState, capture_client::CaptureClient,
};
use tonic::transport::Channel;
use uuid::Uuid;

use super::restore::blocking;
use crate::{
    args::{Global, MountArgs, UmountArgs},
    attach::{
        filesystem::{Content, HEAD_LEN, Partition, recognize},
        loop_device::LoopDevice,
        mount::{Options, Refused, prepare},
        mounted::{Ours, Unmounted},
        point,
    },
    failure::{Failure, Kind},
    format, output,
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

pub(super) async fn run(global: &Global, args: MountArgs) -> Result<(), Failure> {
    need_root()?;
    let Some((what, dir)) = args.what.zip(args.dir) else {
        let ours = blocking(Ours::list).await?;
        return output::print(global.json, &ours, &describe(&ours));
    };
    let options = args.options;
    let wanted = Wanted {
        at: blocking(move || point::free(&dir)).await?,
        read_only: what.snapshot.is_some() && !args.writable,
        partition: args.partition,
        fs_type: args.fs_type,
        options,
        snapshot: what.snapshot.is_some(),
    };
    let mut capture = global.capture().await?;
    let source = Source::find(&mut capture, what).await?;
    let file = source.open().await?;
    if source.snapshot.is_none() {
        source.is_ours_alone(&mut capture).await?;
    }
    // Where the command is interrupted nobody waits for it any more, and it is not mounted.
    let waiting = Arc::new(());
    let still_waiting = Arc::downgrade(&waiting);
    let mounted = blocking(move || wanted.mount(&source, &file, &still_waiting)).await?;
    drop(waiting);
    let text = format!(
        "{} is mounted at {}{}\n",
        name(&mounted),
        mounted.at.display(),
        if mounted.read_only { ", read-only" } else { "" }
    );
    output::print(global.json, &mounted, &text)
}

pub(super) async fn unmount(global: &Global, args: UmountArgs) -> Result<(), Failure> {
    need_root()?;
    let (ours, how) = blocking(move || {
        let ours = Ours::at(&args.dir)?;
        let how = ours.unmount()?;
        Ok((ours, how))
    })
    .await?;
    let object = serde_json::json!({
        "unmounted": ours.at,
        "volume": ours.volume,
        "snapshot": ours.snapshot,
        "clean": how.clean,
    });
    output::print(global.json, &object, &describe_end(&ours, how))
}

fn name(ours: &Ours) -> String {
    match ours.snapshot {
        Some(snapshot) => format!("{}@{snapshot}", ours.volume),
        None => ours.volume.clone(),
    }
}

fn describe(ours: &[Ours]) -> String {
    if ours.is_empty() {
        return "nothing is mounted\n".to_owned();
    }
    let rows: Vec<_> = ours
        .iter()
        .map(|one| {
            let state = match (one.alive, one.read_only) {
                (false, _) => "dead: umount it",
                (true, true) => "read-only",
                (true, false) => "writable",
            };
            [
                name(one),
                one.at.display().to_string(),
                one.fs_type.clone(),
                one.device.display().to_string(),
                state.to_owned(),
            ]
        })
        .collect();
    format::table(["MOUNTED", "AT", "TYPE", "DEVICE", "STATE"], &rows)
}

fn describe_end(ours: &Ours, how: Unmounted) -> String {
    let at = ours.at.display();
    let name = name(ours);
    let still = if how.lazily {
        "; programs that use it get errors"
    } else {
        ""
    };
    if how.clean {
        format!("{name} is no longer mounted at {at}\n")
    } else {
        format!(
            "{name} is no longer mounted at {at}: the service had stopped serving it, and what was not synced by then is \
             lost{still}\n"
        )
    }
}

fn need_root() -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Failed,
        "NOT_PERMITTED",
        "mounting needs root",
        "run it as root; `tidemark snapshot read` and `tidemark restore` write images as anybody",
    ))
}

/// The file of a volume, or of a scratch of a snapshot, in the service's directory.
#[derive(Debug)]
struct Source {
    volume: String,
    snapshot: Option<u64>,
    file: PathBuf,
}

impl Source {
    async fn find(
        capture: &mut CaptureClient<Channel>,
        what: SnapshotRef,
    ) -> Result<Self, Failure> {
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

    async fn open(&self) -> Result<File, Failure> {
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
    async fn is_ours_alone(&self, capture: &mut CaptureClient<Channel>) -> Result<(), Failure> {
        let mut clients = 0;
        for _ in 0..USERS_LOOKS {
            clients = volume(capture, &self.volume).await?.clients;
            if clients <= 1 {
                return Ok(());
            }
            tokio::time::sleep(USERS_LOOK).await;
        }
        let mounted = blocking(Ours::list).await?;
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

async fn volume(capture: &mut CaptureClient<Channel>, volume: &str) -> Result<Volume, Failure> {
    let request = GetVolumeRequest {
        volume: volume.to_owned(),
    };
    Ok(capture.get_volume(request).await?.into_inner())
}

/// The snapshot with this number, or the newest with this label.
async fn number_of(
    capture: &mut CaptureClient<Channel>,
    volume: &str,
    text: &str,
) -> Result<u64, Failure> {
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

/// How it is to be mounted.
#[derive(Debug)]
struct Wanted {
    at: PathBuf,
    read_only: bool,
    partition: Option<u32>,
    fs_type: Option<String>,
    options: Vec<String>,
    snapshot: bool,
}

impl Wanted {
    fn mount(self, source: &Source, file: &File, waiting: &Weak<()>) -> Result<Ours, Failure> {
        let what = &source.file;
        let part = self.part(what, file)?;
        let kind = match self.fs_type.clone() {
            Some(kind) => kind,
            None => kind_of(what, file, part)?,
        };
        let device = LoopDevice::attach(file, part).map_err(|error| {
            Failure::io("attach a loop device", &error).with_action(
                "the kernel needs loop devices (modprobe loop), and a container the device nodes /dev/loop-control and \
                 /dev/loop*",
            )
        })?;
        let mut options = Options::new(self.read_only, &self.options);
        if self.snapshot && kind == "xfs" {
            // The volume itself, or another snapshot of it, may be mounted: they have the same UUID.
            options.push("nouuid");
        }
        let refused = |refused| self.refused(source, &kind, &refused);
        let ready = prepare(device.path(), &kind, &options).map_err(refused)?;
        // Looked at again at the last moment: somebody may have mounted there meanwhile.
        point::free(&self.at)?;
        if waiting.strong_count() == 0 {
            return Err(Failure::interrupted());
        }
        ready.place(&self.at).map_err(refused)?;
        Ours::at(&self.at)
    }

    fn part(&self, what: &Path, file: &File) -> Result<Option<Partition>, Failure> {
        let Some(number) = self.partition else {
            return Ok(None);
        };
        let partitions = match recognize(&head(what, file, None)?) {
            Content::Partitions(partitions) => partitions,
            _ => Vec::new(),
        };
        let found = partitions.iter().find(|part| part.number == number);
        found.copied().map(Some).ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                "PARTITION_NOT_FOUND",
                format!("{} has no partition {number}", what.display()),
                match numbers(&partitions).as_str() {
                    "" => "leave --partition out: there is no partition table".to_owned(),
                    numbers => format!("name one of {numbers}"),
                },
            )
        })
    }

    fn refused(&self, source: &Source, kind: &str, refused: &Refused) -> Failure {
        let action = match refused.errno {
            Errno::NODEV => {
                "the kernel has no such filesystem: load its module (modprobe), or name another --fs-type"
            }
            Errno::PERM | Errno::ACCESS => {
                "run it as root; in a container with the capability SYS_ADMIN"
            }
            Errno::NOSPC => {
                "make room: scratch_bytes_max of the service, or the disk of its state directory"
            }
            _ => "see the kernel's log (dmesg); check the options and --fs-type",
        };
        Failure::new(
            Kind::Failed,
            "MOUNT_FAILED",
            format!(
                "cannot mount {} at {} as {kind}: {refused}",
                source.file.display(),
                self.at.display()
            ),
            action,
        )
    }
}

fn numbers(partitions: &[Partition]) -> String {
    let numbers: Vec<_> = partitions
        .iter()
        .map(|part| part.number.to_string())
        .collect();
    numbers.join(", ")
}

/// The first bytes of the file or of a part of it.
fn head(what: &Path, file: &File, part: Option<Partition>) -> Result<Vec<u8>, Failure> {
    let mut head = vec![0; HEAD_LEN];
    let (offset, mut filled) = (part.map_or(0, |part| part.offset), 0);
    while filled < head.len() {
        match file.read_at(&mut head[filled..], offset.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Failure::io(format!("read {}", what.display()), &error)),
        }
    }
    head.truncate(filled);
    Ok(head)
}

/// The kernel's name of the filesystem that is there.
fn kind_of(what: &Path, file: &File, part: Option<Partition>) -> Result<String, Failure> {
    let unknown = |message: String, action: String| {
        Err(Failure::new(
            Kind::Conflict,
            "FILESYSTEM_UNKNOWN",
            message,
            action,
        ))
    };
    let what_is_it = what.display();
    match recognize(&head(what, file, part)?) {
        Content::Filesystem(kind) => Ok(kind.to_owned()),
        Content::Partitions(partitions) => unknown(
            format!("{what_is_it} holds a partition table"),
            format!(
                "name a partition with --partition: {}",
                numbers(&partitions)
            ),
        ),
        Content::Other(found) => unknown(
            format!("{what_is_it} holds {found}, not a filesystem"),
            "attach it with losetup, and go on from there".to_owned(),
        ),
        Content::Unknown => unknown(
            format!("{what_is_it} holds no filesystem that is known here"),
            "make one on a volume first (mkfs), or name the kernel's driver with --fs-type"
                .to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(snapshot: Option<u64>, alive: bool) -> Ours {
        Ours {
            volume: "data".into(),
            snapshot,
            at: "/mnt/data".into(),
            device: "/dev/loop3".into(),
            fs_type: "ext4".into(),
            read_only: snapshot.is_some(),
            alive,
        }
    }

    #[test]
    fn what_is_mounted_is_printed_for_people_and_for_programs() {
        let all = [ours(None, true), ours(Some(3), true), ours(None, false)];
        insta::assert_snapshot!(describe(&all), @r"
        MOUNTED  AT         TYPE  DEVICE      STATE
        data     /mnt/data  ext4  /dev/loop3  writable
        data@3   /mnt/data  ext4  /dev/loop3  read-only
        data     /mnt/data  ext4  /dev/loop3  dead: umount it
        ");
        insta::assert_snapshot!(describe(&[]), @"nothing is mounted");
        insta::assert_json_snapshot!(ours(Some(3), true));
    }

    #[test]
    fn an_unmount_says_what_was_lost() {
        let end = |clean, lazily| describe_end(&ours(None, clean), Unmounted { clean, lazily });
        insta::assert_snapshot!(end(true, false), @"data is no longer mounted at /mnt/data");
        insta::assert_snapshot!(end(false, true), @"data is no longer mounted at /mnt/data: the service had stopped serving it, and what was not synced by then is lost; programs that use it get errors");
    }
}
