//! `tidemark mount`: the filesystem of a volume or a snapshot on a directory of this machine.

mod source;

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use rustix::io::Errno;

use self::source::Source;
use super::restore::blocking;
use crate::{
    args::{Global, MountArgs, UmountArgs},
    attach::{
        aside::{self, ANSWER_MAX, Answer},
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

pub(super) async fn run(global: &Global, args: MountArgs) -> Result<(), Failure> {
    need_root()?;
    let Some((what, dir)) = args.what.clone().zip(args.dir.clone()) else {
        let ours = Ours::list().await?;
        return output::print(global.json, &ours, &describe(&ours));
    };
    if aside::is_aside() {
        return mount(global, args, what, dir).await;
    }
    let volume = &what.volume;
    match aside::run(async || service_answers(global, volume).await).await? {
        Some(output) => output::relay(&output),
        None => Err(silent(format!(
            "the capture service does not answer: {volume} is not mounted at {}",
            dir.display()
        ))),
    }
}

async fn mount(
    global: &Global,
    args: MountArgs,
    what: SnapshotRef,
    dir: PathBuf,
) -> Result<(), Failure> {
    let wanted = Wanted {
        at: blocking(move || point::free(&dir)).await?,
        read_only: what.snapshot.is_some() && !args.writable,
        partition: args.partition,
        fs_type: args.fs_type,
        options: args.options,
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
    let dir = args.dir.clone();
    let ours = blocking(move || Ours::at(&dir)).await?;
    if !aside::is_aside() {
        return watch_unmount(&ours).await;
    }
    let (ours, how) = blocking(move || {
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

async fn watch_unmount(ours: &Ours) -> Result<(), Failure> {
    let answers = async || aside::ask(&ours.device).await != Answer::None;
    let output = match answers().await {
        true => aside::run(answers).await?,
        false => None,
    };
    if let Some(output) = output {
        return output::relay(&output);
    }
    let (name, at) = (name(ours), ours.at.display());
    let what = match Ours::at(&ours.at) {
        Ok(still) if still.device == ours.device => "is still mounted at",
        _ => "will have all that was written once it goes on, and is no longer mounted at",
    };
    Err(silent(format!(
        "the capture service does not answer: {name} {what} {at}"
    )))
}

/// Whether the service answers in time, whatever it says.
async fn service_answers(global: &Global, volume: &str) -> bool {
    let asked = async {
        let mut capture = global.capture().await?;
        source::volume(&mut capture, volume).await
    };
    tokio::time::timeout(ANSWER_MAX, asked).await.is_ok()
}

fn silent(message: String) -> Failure {
    Failure::new(
        Kind::Unavailable,
        "SERVICE_SILENT",
        message,
        "let the service go on where its process is stopped (kill -CONT), or end it, then run this again",
    )
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
            let state = match (one.alive, one.answers, one.read_only) {
                (false, ..) => "dead: umount it",
                (true, false, _) => "no answer: is the service stopped?",
                (true, true, true) => "read-only",
                (true, true, false) => "writable",
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
            options.add("nouuid");
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
            answers: alive,
        }
    }

    #[test]
    fn what_is_mounted_is_printed_for_people_and_for_programs() {
        let stopped = Ours {
            answers: false,
            ..ours(Some(4), true)
        };
        let all = [
            ours(None, true),
            ours(Some(3), true),
            ours(None, false),
            stopped,
        ];
        insta::assert_snapshot!(describe(&all), @r"
        MOUNTED  AT         TYPE  DEVICE      STATE
        data     /mnt/data  ext4  /dev/loop3  writable
        data@3   /mnt/data  ext4  /dev/loop3  read-only
        data     /mnt/data  ext4  /dev/loop3  dead: umount it
        data@4   /mnt/data  ext4  /dev/loop3  no answer: is the service stopped?
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
