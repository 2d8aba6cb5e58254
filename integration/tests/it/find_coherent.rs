//! Going back through the images of a volume until a check passes.

use std::fs;

use tidemark_integration::nbd::Client;

use crate::programs::{Split, args};

/// It writes to the image, as a check that mounts it would.
const CHECK: &str = "test \"$(head -c 4 {image})\" = good && echo spoilt >{image}";

#[test]
fn the_newest_image_that_passes_is_found_among_snapshots_and_generations() {
    let dir = tempfile::tempdir().unwrap();
    let mut split = Split::new(dir.path());
    split.start_vault();
    split.start_capture();
    let file = dir.path().join("data.img");
    split.cli.json(args![
        "volume", "add", "data", "--file", file, "--size", "1MiB"
    ]);
    let mut client = Client::connect(&split.socket, "data").unwrap();
    let mut write = |offset: u64, text: &[u8; 4]| client.write(offset, text).unwrap();
    write(0, b"good");
    split.cli.json(args!["ship", "data"]);
    write(8192, b"more");
    let snapshot = split.cli.json(args!["snapshot", "create", "data"]);
    write(0, b"bad!");
    split.cli.json(args!["ship", "data"]);
    split.cli.json(args!["snapshot", "create", "data"]);

    let kept = dir.path().join("kept.img");
    let search = |split: &Split, more: &[&str]| {
        let mut command = split.cli.command(args![
            "find-coherent",
            "data",
            "--check",
            CHECK,
            "--dir",
            dir.path(),
            "--json"
        ]);
        let ended = command.args(more).output().unwrap();
        let told = String::from_utf8(ended.stderr).unwrap();
        let found: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap_or_default();
        (ended.status.code().unwrap(), found, told)
    };
    for order in [&[][..], &["--bisect"]] {
        let (code, found, told) = search(&split, order);
        assert_eq!(code, 0, "{told}");
        assert_eq!(found["found"]["snapshot"], snapshot["snapshot"], "{told}");
    }
    let (_, found, _) = search(&split, &["--keep", kept.to_str().unwrap()]);
    let checked = found["checked"].as_array().unwrap();
    let passed: Vec<_> = checked.iter().map(|c| &c["passed"]).collect();
    assert_eq!(passed, [false, false, true]);
    let image = fs::read(&kept).unwrap();
    assert_eq!(
        (&image[..4], &image[8192..8196]),
        (&b"good"[..], &b"more"[..])
    );

    // A check that can't be run says nothing of any image.
    let bad = args!["find-coherent", "data", "--check", "/no/such {image}"];
    split.cli.fails(bad, 2, "CHECK_NOT_RUN");
    let bad = args!["find-coherent", "data", "--check", "true"];
    split.cli.fails(bad, 2, "CHECK_INVALID");
    let bad = args!["find-coherent", "data", "--check", "false {image}"];
    split.cli.fails(bad, 3, "NONE_COHERENT");

    // Without the capture service the vault's images are left.
    split.stop_capture();
    let (code, found, told) = search(&split, &[]);
    assert_eq!(code, 0, "{told}");
    assert_eq!(found["found"]["generation"], 1);
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("tidemark-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    split.stop_vault();
}
