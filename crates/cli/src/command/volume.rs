//! `tidemark volume …`.

use std::path::{Path, PathBuf};

use tidemark_proto::{
    Reason,
    capture::v1::{
        AddVolumeRequest, GetVolumeRequest, ListVolumesRequest, ReadoptVolumeRequest,
        RemoveVolumeRequest,
    },
};

use crate::{
    args::{Engine, Global, VolumeCommand},
    failure::{Failure, Kind},
    format, output, report,
};

pub(super) async fn run(global: &Global, command: VolumeCommand) -> Result<(), Failure> {
    match command {
        VolumeCommand::Add {
            name,
            file,
            size,
            block_size,
            engine,
            if_missing,
        } => {
            let request = AddVolumeRequest {
                name,
                file: absolute(&file)?,
                length: size.map(check_size).transpose()?.unwrap_or(0),
                block_size: u32::try_from(block_size).map_err(|_| {
                    Failure::new(
                        Kind::Usage,
                        "GEOMETRY_INVALID",
                        format!("block size {block_size} is not a power of two from 4096 to 65536"),
                        "use 4KiB, 8KiB, 16KiB, 32KiB or 64KiB",
                    )
                })?,
                engine: named(engine),
            };
            let volume = match if_missing {
                true => add_if_missing(global, request).await?,
                false => {
                    let added = global.capture().await?.add_volume(request).await?;
                    report::Volume::new(added.into_inner())?
                }
            };
            show(global, &volume)
        }
        VolumeCommand::List => list(global).await,
        VolumeCommand::Show { volume } => {
            let mut capture = global.capture().await?;
            let volume = capture.get_volume(GetVolumeRequest { volume }).await?;
            show(global, &report::Volume::new(volume.into_inner())?)
        }
        VolumeCommand::Remove { volume, force } => {
            let request = RemoveVolumeRequest {
                volume: volume.clone(),
                force,
            };
            let mut capture = global.capture().await?;
            let removed = capture.remove_volume(request).await?.into_inner();
            let left = removed.left_behind;
            let mut text =
                format!("{volume} is no longer protected; its file and its generations stay\n");
            if !left.is_empty() {
                text += &format!(
                    "its clones are left behind: delete {left} once their filesystem is mounted\n"
                );
            }
            let left = Some(left).filter(|left| !left.is_empty());
            output::print(
                global.json,
                &serde_json::json!({ "removed": volume, "left_behind": left }),
                &text,
            )
        }
        VolumeCommand::Readopt { volume, engine } => {
            let mut capture = global.capture().await?;
            let request = ReadoptVolumeRequest {
                volume,
                engine: named(engine),
            };
            let volume = capture.readopt_volume(request).await?;
            show(global, &report::Volume::new(volume.into_inner())?)
        }
    }
}

/// Adds a volume, unless it is there just as it is asked for.
async fn add_if_missing(
    global: &Global,
    asked: AddVolumeRequest,
) -> Result<report::Volume, Failure> {
    let mut capture = global.capture().await?;
    let refused = match capture.add_volume(asked.clone()).await {
        Ok(added) => return report::Volume::new(added.into_inner()),
        Err(status) => Failure::from(status),
    };
    if refused.reason() != Reason::VolumeExists.as_str() {
        return Err(refused);
    }
    let name = GetVolumeRequest {
        volume: asked.name.clone(),
    };
    match capture.get_volume(name).await {
        Ok(found) => same(&asked, report::Volume::new(found.into_inner())?),
        // Its file is another volume's.
        Err(_) => Err(refused),
    }
}

/// The volume that was found, where it is what was asked for.
fn same(asked: &AddVolumeRequest, found: report::Volume) -> Result<report::Volume, Failure> {
    let differs = [
        ("file", found.file != asked.file, found.file.clone()),
        (
            "length in bytes",
            asked.length != 0 && found.size != asked.length,
            found.size.to_string(),
        ),
        (
            "block size",
            found.block_size != asked.block_size,
            found.block_size.to_string(),
        ),
        (
            "engine",
            !["", "auto", &*found.engine].contains(&&*asked.engine),
            found.engine.clone(),
        ),
    ];
    match differs.into_iter().find(|(_, differs, _)| *differs) {
        None => Ok(found),
        Some((what, _, is)) => Err(Failure::new(
            Kind::Conflict,
            Reason::VolumeExists.as_str(),
            format!(
                "there is a volume {:?} already, whose {what} is {is}",
                asked.name
            ),
            "ask for what it is, choose another name, or remove that volume first",
        )),
    }
}

async fn list(global: &Global) -> Result<(), Failure> {
    let listed = global
        .capture()
        .await?
        .list_volumes(ListVolumesRequest {})
        .await?;
    let volumes = listed
        .into_inner()
        .volumes
        .into_iter()
        .map(report::Volume::new)
        .collect::<Result<Vec<_>, _>>()?;
    let text = if volumes.is_empty() {
        "no volumes; `tidemark volume add --help` shows how to protect a file\n".to_owned()
    } else {
        table(&volumes)
    };
    output::print(global.json, &volumes, &text)
}

fn table(volumes: &[report::Volume]) -> String {
    let rows: Vec<_> = volumes
        .iter()
        .map(|v| {
            [
                v.volume.clone(),
                v.state.to_owned(),
                format::bytes(v.size),
                v.changed_blocks.to_string(),
                v.snapshots.to_string(),
                v.generation.to_string(),
                v.uplink.state.to_owned(),
                v.file.clone(),
            ]
        })
        .collect();
    let mut text = format::table(
        [
            "VOLUME",
            "STATE",
            "SIZE",
            "CHANGED",
            "SNAPSHOTS",
            "GENERATION",
            "UPLINK",
            "FILE",
        ],
        &rows,
    );
    for v in volumes {
        for told in [&v.problem, &v.warning]
            .into_iter()
            .filter(|told| !told.is_empty())
        {
            text.push_str(&format!("{}: {told}\n", v.volume));
        }
    }
    text
}

fn show(global: &Global, v: &report::Volume) -> Result<(), Failure> {
    output::print(global.json, v, &describe(v))
}

/// A scratch, who uses it and what it keeps.
pub(super) fn scratch(s: &report::Scratch) -> String {
    let clients = match s.clients {
        1 => "1 client".to_owned(),
        n => format!("{n} clients"),
    };
    let written = format::bytes(s.bytes_used);
    format!("{}: {clients}, {written} written", s.name)
}

fn describe(v: &report::Volume) -> String {
    let mut fields = vec![
        ("volume", v.volume.clone()),
        ("id", v.id.clone()),
        ("file", v.file.clone()),
        (
            "size",
            format!(
                "{} ({} bytes, blocks of {})",
                format::bytes(v.size),
                v.size,
                format::bytes(v.block_size.into())
            ),
        ),
        ("engine", engine(v)),
        ("state", v.state.to_owned()),
    ];
    if !v.warning.is_empty() {
        fields.push(("warning", v.warning.clone()));
    }
    if !v.problem.is_empty() {
        fields.push(("problem", v.problem.clone()));
    }
    if !v.nbd_uris.is_empty() || v.engine == "intercept" {
        fields.push(("nbd", v.nbd_uris.join("  ")));
    }
    if !v.fuse_path.is_empty() {
        fields.push(("path", v.fuse_path.clone()));
    }
    if !v.group.is_empty() {
        fields.push(("group", v.group.clone()));
    }
    fields.extend([
        ("clients", v.clients.to_string()),
        ("epoch", v.epoch.to_string()),
        ("changed", format!("{} blocks", v.changed_blocks)),
        ("snapshots", v.snapshots.to_string()),
        (
            "scratches",
            match v.scratches.as_slice() {
                [] => "none".to_owned(),
                some => some.iter().map(scratch).collect::<Vec<_>>().join("; "),
            },
        ),
        (
            "spool",
            format!(
                "{} of {}",
                format::bytes(v.spool_bytes_used),
                format::bytes(v.spool_bytes_max)
            ),
        ),
        ("generation", v.generation.to_string()),
        ("term", v.term.to_string()),
        ("uplink", uplink_state(&v.uplink)),
    ]);
    if !v.uplink.error.is_empty() {
        fields.push(("uplink error", v.uplink.error.clone()));
    }
    fields.extend([
        ("recovery point", format::time(v.uplink.recovery_point)),
        ("last cut", last_cut(&v.uplink)),
        ("cut stall", cut_stall(v)),
        (
            "source scrub",
            format!(
                "{} passes, {} of {} blocks in this one, {} mismatches",
                v.scrub.passes, v.scrub.blocks_done, v.scrub.blocks_total, v.scrub.mismatches
            ),
        ),
    ]);
    format::fields(&fields)
}

/// How changes are tracked, and why so.
fn engine(v: &report::Volume) -> String {
    if v.engine_why.is_empty() {
        v.engine.clone()
    } else {
        format!("{} ({})", v.engine, v.engine_why)
    }
}

/// For how long the last cut held writers up.
fn cut_stall(v: &report::Volume) -> String {
    let millis = v.cut_stall_us / 1000;
    let time = match v.cut_stall_us {
        0 => return "-".to_owned(),
        us if us < 10_000 => format!("{us} us"),
        _ => format!("{millis} ms"),
    };
    match v.extents {
        0 => time,
        extents => format!("{time}, {extents} extents"),
    }
}

/// The engine's name, as a request has it.
fn named(engine: Option<Engine>) -> String {
    engine.map_or_else(String::new, |engine| engine.as_str().to_owned())
}

/// How good the last cut was of which there is a receipt.
fn last_cut(u: &report::Uplink) -> String {
    u.last_receipt.as_ref().map_or_else(
        || "-".to_owned(),
        |receipt| report::graded(receipt.coherence, &receipt.coherence_reason),
    )
}

/// The state of an uplink in a few words.
pub(super) fn uplink_state(u: &report::Uplink) -> String {
    if u.blocks_total == 0 || u.state == "idle" {
        return u.state.to_owned();
    }
    format!(
        "{} {} of {} blocks, {} sent",
        u.state,
        u.blocks_done,
        u.blocks_total,
        format::bytes(u.bytes_sent)
    )
}

/// The capture service may have another working directory.
fn absolute(file: &Path) -> Result<String, Failure> {
    let path: PathBuf = std::path::absolute(file)
        .map_err(|e| Failure::io(format_args!("make {} absolute", file.display()), &e))?;
    path.into_os_string().into_string().map_err(|_| {
        Failure::new(
            Kind::Usage,
            "VOLUME_FILE_INVALID",
            format!("the path {} is not UTF-8", file.display()),
            "give the volume file a name that is",
        )
    })
}

/// 0 would mean "the file's own length" to the service.
fn check_size(size: u64) -> Result<u64, Failure> {
    if size > 0 {
        return Ok(size);
    }
    Err(Failure::new(
        Kind::Usage,
        "GEOMETRY_INVALID",
        "a volume has at least one block",
        "name a --size above 0, or leave it out to adopt a file as it is",
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use tidemark_proto::{capture::v1 as capture, common::v1 as common};

    use super::*;

    pub(crate) fn example() -> report::Volume {
        report::Volume::new(capture::Volume {
            volume_id: vec![0x11; 16].into(),
            name: "data".into(),
            file: "/srv/data.img".into(),
            geometry: Some(common::Geometry {
                length: 8 << 30,
                block_size: 4096,
            }),
            engine: "intercept".into(),
            engine_why: "auto: a front end, NBD or FUSE, is configured".into(),
            cut_stall_us: 41,
            state: capture::VolumeState::Serving.into(),
            epoch: 12,
            changed_blocks: 345,
            base_generation: 7,
            term: 2,
            snapshots: 3,
            spool_bytes_used: 5 << 20,
            spool_bytes_max: 1 << 30,
            nbd_uris: vec!["nbd+unix:///data?socket=/run/nbd.sock".into()],
            fuse_path: "/mnt/volumes/data.img".into(),
            group: "db".into(),
            clients: 1,
            scratches: vec![capture::Scratch {
                name: "data@3+scratch".into(),
                snapshot: 3,
                clients: 1,
                bytes_used: 12 << 20,
            }],
            uplink: Some(capture::Uplink {
                state: capture::UplinkState::Backoff.into(),
                error: "the vault cannot be reached".into(),
                recovery_point_ms: 1_793_337_404_000,
                blocks_total: 345,
                blocks_done: 12,
                bytes_sent: 40_000,
                last_receipt: None,
            }),
            ..capture::Volume::default()
        })
        .unwrap()
    }

    #[test]
    fn a_volume_is_shown_with_everything_about_it() {
        insta::assert_snapshot!(describe(&example()));
        insta::assert_snapshot!(table(&[example()]));
    }

    #[test]
    fn a_volume_that_does_not_serve_says_why() {
        let mut volume = example();
        volume.state = "failed";
        volume.problem = "the file is gone: put it back, then restart".into();
        assert!(describe(&volume).contains("problem:         the file is gone: put it back"));
        assert!(table(&[volume]).ends_with("data: the file is gone: put it back, then restart\n"));
    }

    #[test]
    fn what_the_workload_writes_itself_has_no_nbd_address_and_shows_what_cuts_cost() {
        let mut volume = example();
        volume.engine = "reflink".into();
        volume.engine_why = "it was asked for".into();
        volume.nbd_uris.clear();
        volume.fuse_path.clear();
        volume.group.clear();
        volume.cut_stall_us = 4_200_000;
        volume.extents = 100_000;
        volume.warning = "the last cut held writers up for 4.2 s: copy it".into();
        insta::assert_snapshot!(describe(&volume));
        assert!(
            table(&[volume]).ends_with("data: the last cut held writers up for 4.2 s: copy it\n")
        );
    }

    #[test]
    fn a_size_of_nothing_is_refused() {
        assert_eq!(check_size(0).unwrap_err().kind(), Kind::Usage);
        assert_eq!(check_size(1).unwrap(), 1);
    }
}
