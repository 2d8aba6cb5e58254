//! What `tidemark mount` and `tidemark umount` refuse, and what they say then.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::Command,
};

use tidemark_integration::small_disk::{SmallDisk, may_mount};

use super::EXT4;
use crate::{
    nbd::Client,
    programs::{Up, args},
    scene::Scene,
};

#[test]
fn what_cannot_be_mounted_or_unmounted_is_said_with_what_to_do() {
    let Some(scene) = Scene::with(&EXT4) else {
        return;
    };
    let (at, cli) = (scene.dir_at("mounted"), &scene.services.cli);
    fs::create_dir_all(scene.path("full/entry")).unwrap();
    let (full, none) = (scene.path("full"), scene.path("none"));
    cli.fails(args!["mount", "data", full], 2, "MOUNT_POINT_INVALID");
    cli.fails(args!["mount", "data", none], 3, "MOUNT_POINT_INVALID");
    cli.fails(args!["mount", "dta", at], 3, "VOLUME_NOT_FOUND");
    cli.fails(args!["mount", "data@7", at], 3, "SNAPSHOT_NOT_FOUND");
    let typed = args!["mount", "data", at, "--fs-type", "nofs"];
    cli.fails(typed, 1, "MOUNT_FAILED");
    let why = cli.fails(
        args!["mount", "data", at, "-o", "nosuchoption"],
        1,
        "MOUNT_FAILED",
    );
    assert!(why.contains("nosuchoption"), "what the kernel says: {why}");
    cli.fails(args!["umount", at], 3, "NOT_MOUNTED");
    cli.fails(args!["umount", none], 3, "MOUNT_POINT_INVALID");
    let foreign = SmallDisk::mount(&at, 1).unwrap();
    cli.fails(args!["umount", at], 4, "NOT_OURS");
    cli.fails(args!["mount", "data", at], 4, "MOUNT_POINT_IN_USE");
    drop(foreign);

    // Somebody else's use, by NBD.
    let client = Client::connect(&scene.services.socket, "data").unwrap();
    let why = cli.fails(args!["mount", "data", at], 4, "VOLUME_IN_USE");
    assert!(why.contains("take a snapshot"), "{why}");
    drop(client);

    let empty = scene.path("empty.img");
    cli.json(args![
        "volume", "add", "empty", "--file", empty, "--size", "1MiB"
    ]);
    cli.fails(args!["mount", "empty", at], 4, "FILESYSTEM_UNKNOWN");
    scene.assert_nothing_is_left();

    // Without root. The program must be where everybody may run it.
    let copy = scene.path("tidemark");
    let everybody = || fs::Permissions::from_mode(0o755);
    fs::copy(crate::programs::bin_dir().join("tidemark"), &copy).unwrap();
    fs::set_permissions(&copy, everybody()).unwrap();
    fs::set_permissions(scene.dir.path(), everybody()).unwrap();
    for arguments in [
        &["mount", "data", "/mnt"][..],
        &["mount"],
        &["umount", "/mnt"],
    ] {
        let refused = Command::new(&copy)
            .args(arguments)
            .uid(65_534)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{told}");
        assert!(
            told.contains("needs root") && told.contains("snapshot read"),
            "{told}"
        );
    }
    scene.services_stop();
}

#[test]
fn a_service_without_a_mounted_directory_says_how_it_gets_one() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&dir.path().join("state"), &[]);
    let (file, at) = (dir.path().join("data.img"), dir.path().join("at"));
    fs::create_dir(&at).unwrap();
    let add = args!["volume", "add", "data", "--file", file, "--size", "1MiB"];
    up.cli.json(add);
    let why = up.cli.fails(args!["mount", "data", at], 4, "NO_FUSE_MOUNT");
    assert!(why.contains("--fuse-mount"), "{why}");
    up.process.terminate();
}
