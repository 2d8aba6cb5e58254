//! The first full interval and the restore of a filesystem with real files.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use tidemark_integration::{
    args,
    programs::{have, run as run_program},
};

use crate::{
    Args,
    report::{Bound, Report, median, timed},
    services::Services,
};

const GIB: u64 = 1 << 30;
const IMAGE: u64 = 8 * GIB;

pub(crate) fn run(dir: &Path, args: &Args, report: &mut Report) -> Result<()> {
    report.section("An 8 GiB ext4 image of real files; peer: cp --sparse=auto + fsync");
    if !have(&["mkfs.ext4"]) {
        return Ok(());
    }
    let dir = dir.join("image");
    std::fs::create_dir(&dir)?;
    let image = dir.join("files.img");
    let held = make(&image, &dir.join("files"), args)?;
    #[allow(clippy::cast_precision_loss, reason = "figures")]
    report.alone(
        "data in the image",
        "GiB",
        held as f64 / GIB as f64,
        Bound::None,
    );

    let rounds = args.rounds.min(3);
    let copy = dir.join("copy.img");
    let (mut shipped, mut restored, mut copied) = (Vec::new(), Vec::new(), Vec::new());
    // Pages that are new to a virtual machine cost it more than the copying into them. Before each measurement as many
    // as it needs are used and let go, so that whoever comes second doesn't pay for the first.
    let level = || -> Result<()> {
        copy_and_sync(&image, &copy)?;
        Ok(std::fs::remove_file(&copy)?)
    };
    for round in 0..rounds {
        level()?;
        copied.push(timed(|| copy_and_sync(&image, &copy))?.0);
        std::fs::remove_file(&copy)?;
        let dir = dir.join(format!("round-{round}"));
        let mut services = Services::start(&dir, &[])?;
        services.add("files", &image, IMAGE);
        level()?;
        shipped.push(timed(|| services.ship("files"))?.0);
        level()?;
        let output = dir.join("restored.img");
        restored.push(
            timed(|| {
                services.split.cli.json(args!["restore", "files", output]);
                Ok(File::open(&output)?.sync_all()?)
            })?
            .0,
        );
        run_program("cmp", args![image, output]);
        services.stop("full image", report);
        std::fs::remove_dir_all(&dir)?;
    }
    let cp = median(&copied);
    report.ratio(
        "first full interval",
        "ms",
        median(&shipped),
        cp,
        Bound::AtMost(2.5),
    );
    report.ratio(
        "full restore, verified",
        "ms",
        median(&restored),
        cp,
        Bound::AtMost(1.5),
    );
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

/// Makes an ext4 of real files and gives how many bytes it holds.
fn make(image: &Path, stage: &Path, args: &Args) -> Result<u64> {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a size"
    )]
    let wanted = (args.image_gib * GIB as f64) as u64;
    std::fs::create_dir(stage)?;
    let mut gathered = Gathered::default();
    for from in &args.image_from {
        gather(from, stage, wanted, &mut gathered)?;
    }
    run_program(
        "mkfs.ext4",
        args!["-q", "-F", "-b", "4096", "-d", stage, image, "8G"],
    );
    std::fs::remove_dir_all(stage)?;
    File::open(image)?.sync_all()?;
    // Both are measured with the image in the page cache.
    run_program("cp", args!["--sparse=never", image, "/dev/null"]);
    Ok(gathered.bytes)
}

/// Files of one folder: mke2fs looks through a whole folder for each file that it adds.
const FOLDER_FILES: u64 = 256;

#[derive(Default)]
struct Gathered {
    bytes: u64,
    files: u64,
}

/// Links, or copies, regular files below `from` into folders below `stage`, until there is enough of them.
fn gather(from: &Path, stage: &Path, wanted: u64, gathered: &mut Gathered) -> Result<()> {
    // What can't be read is left out.
    let Ok(entries) = std::fs::read_dir(from) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if gathered.bytes >= wanted {
            return Ok(());
        }
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let path: PathBuf = entry.path();
        if kind.is_dir() {
            gather(&path, stage, wanted, gathered)?;
        } else if kind.is_file() {
            let length = entry.metadata().map_or(0, |meta| meta.len());
            let folder = stage.join((gathered.files / FOLDER_FILES).to_string());
            std::fs::create_dir_all(&folder)?;
            let to = folder.join((gathered.files % FOLDER_FILES).to_string());
            let linked = || std::fs::hard_link(&path, &to).is_ok();
            if length > 0 && (linked() || std::fs::copy(&path, &to).is_ok()) {
                gathered.bytes += length;
                gathered.files += 1;
            }
        }
    }
    Ok(())
}

fn copy_and_sync(from: &Path, to: &Path) -> Result<()> {
    run_program("cp", args!["--sparse=auto", "--reflink=never", from, to]);
    let file = File::open(to).context("the copy")?;
    file.sync_all()?;
    ensure!(file.metadata()?.len() == IMAGE);
    Ok(())
}
