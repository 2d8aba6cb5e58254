//! `tidemark snapshot read`, whole and since an older snapshot.

use std::{fs, path::Path, process::Output};

use tidemark_block::{BlockCount, BlockIndex, CodecChoice, Extent, FrameEncoder, block_checksum};

use crate::{
    fake::{BLOCK, Fake, Script, Step, geometry, image},
    names, stderr, stdout, tidemark,
};

fn read(script: Script, dir: &Path, more: &[&str]) -> Output {
    let fake = Fake::serve(script);
    tidemark()
        .args(["snapshot", "read", "data", "4", "--output", "s.img"])
        .args(["--capture", &fake.url()])
        .args(more)
        .current_dir(dir)
        .output()
        .unwrap()
}

/// Block 8 gets new data, blocks 500 to 699 become zero.
fn changes(image: &mut [u8]) -> Script {
    let geometry = geometry(image.len());
    let data = [0xee; BLOCK];
    image[8 * BLOCK..9 * BLOCK].copy_from_slice(&data);
    image[500 * BLOCK..700 * BLOCK].fill(0);
    let mut frames = Vec::new();
    let mut encoder = FrameEncoder::new(geometry);
    let changed = [(BlockIndex::new(8), block_checksum(&data))];
    encoder.encode_data(&changed, &data, CodecChoice::Raw, &mut frames);
    encoder.encode_zero(
        &[Extent::new(BlockIndex::new(500), BlockCount::new(200))],
        &mut frames,
    );
    Script {
        geometry,
        digest: Vec::new(),
        steps: vec![Step::Frames(frames.into()), Step::End(201)],
    }
}

#[test]
fn a_snapshot_is_read_whole_and_its_digest_is_proved() {
    let dir = tempfile::tempdir().unwrap();
    let image = image();
    let output = read(Script::of(&image), dir.path(), &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(dir.path().join("s.img")).unwrap() == image);
    assert!(
        stdout(&output).contains("and the image digest"),
        "{}",
        stdout(&output)
    );
}

#[test]
fn a_whole_snapshot_without_its_digest_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut script = Script::of(&image());
    script.digest.clear();
    let output = read(script, dir.path(), &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn changes_since_an_older_snapshot_are_written_into_its_copy() {
    let dir = tempfile::tempdir().unwrap();
    let mut image = image();
    fs::write(dir.path().join("s.img"), &image).unwrap();
    let script = changes(&mut image);
    let output = read(script, dir.path(), &["--since", "3"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(dir.path().join("s.img")).unwrap() == image);
}

#[test]
fn changes_need_a_copy_of_the_older_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let script = changes(&mut image());
    let output = read(script.clone(), dir.path(), &["--since", "3"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("read that one first"),
        "{}",
        stderr(&output)
    );

    fs::write(dir.path().join("s.img"), b"something else").unwrap();
    let output = read(script, dir.path(), &["--since", "3"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert_eq!(
        fs::read(dir.path().join("s.img")).unwrap(),
        b"something else"
    );
}

#[test]
fn changes_that_do_not_all_arrive_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut image = image();
    fs::write(dir.path().join("s.img"), &image).unwrap();
    let mut script = changes(&mut image);
    script.steps[1] = Step::End(202);
    let output = read(script, dir.path(), &["--since", "3"]);
    assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
}
