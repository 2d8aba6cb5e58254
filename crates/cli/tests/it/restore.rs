//! `tidemark restore` from a vault that tells the truth, and from ones that do not.

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Output, time::Duration};

use serde_json::Value;
use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, CodecChoice, Extent, FrameEncoder, Geometry, block_checksum,
};

use crate::{
    fake::{BLOCK, Fake, Script, Step, digest, geometry, image},
    names, stderr, stdout, tidemark,
};

fn restore(script: Script, dir: &Path, more: &[&str]) -> Output {
    let fake = Fake::serve(script);
    tidemark()
        .args(["restore", "data@7", "out.img", "--vault", &fake.url()])
        .args(more)
        .current_dir(dir)
        .output()
        .unwrap()
}

/// The restore fails with this exit code and this text, and leaves nothing behind.
fn refused(script: Script, code: i32, text: &str) {
    let dir = tempfile::tempdir().unwrap();
    let output = restore(script, dir.path(), &[]);
    assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
    assert!(stderr(&output).contains(text), "{}", stderr(&output));
    assert_eq!(names(dir.path()), Vec::<String>::new());
    assert_eq!(stdout(&output), "");
}

#[test]
fn a_restored_image_is_exact_sparse_and_its_digest_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let image = image();
    let output = restore(Script::of(&image), dir.path(), &["--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(names(dir.path()), ["out.img"]);
    assert!(fs::read(dir.path().join("out.img")).unwrap() == image);
    let found = fs::metadata(dir.path().join("out.img")).unwrap();
    let data = image.chunks(BLOCK).filter(|b| b.iter().any(|&b| b != 0));
    let data_bytes = (data.count() * BLOCK) as u64;
    assert!(
        found.blocks() * 512 <= data_bytes + (1 << 20),
        "holes stay holes"
    );
    let told: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(told["image_digest"], digest(&image).to_string());
    assert_eq!(told["generation"], 7);
    assert_eq!(told["size"], image.len());
    assert_eq!(told["data_bytes"], data_bytes);
}

#[test]
fn an_image_of_nothing_but_zeros_is_restored_as_one_hole() {
    let dir = tempfile::tempdir().unwrap();
    let image = vec![0; 512 * BLOCK];
    let mut script = Script::of(&image);
    script.steps = vec![Step::End(0)];
    let output = restore(script, dir.path(), &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let found = fs::metadata(dir.path().join("out.img")).unwrap();
    assert_eq!((found.len(), found.blocks()), (image.len() as u64, 0));
}

#[test]
fn an_existing_output_is_kept_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("out.img"), b"precious").unwrap();
    let image = image();
    let output = restore(Script::of(&image), dir.path(), &[]);
    assert_eq!(output.status.code(), Some(4));
    insta::assert_snapshot!(stderr(&output), @r"
    error: out.img exists
      → name another file, or replace it with --force
    ");
    assert_eq!(fs::read(dir.path().join("out.img")).unwrap(), b"precious");

    let output = restore(Script::of(&image), dir.path(), &["--force"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(dir.path().join("out.img")).unwrap() == image);
}

#[test]
fn a_forced_restore_that_fails_keeps_the_old_output() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("out.img"), b"precious").unwrap();
    let mut script = Script::of(&image());
    script.digest[3] ^= 1;
    let output = restore(script, dir.path(), &["--force"]);
    assert_eq!(output.status.code(), Some(6));
    assert_eq!(fs::read(dir.path().join("out.img")).unwrap(), b"precious");
    assert_eq!(names(dir.path()), ["out.img"]);
}

#[test]
fn a_flipped_bit_anywhere_in_a_frame_is_found() {
    let clean = Script::of(&image());
    let Step::Frames(frames) = clean.steps[3].clone() else {
        panic!("frames come first");
    };
    for at in [40, 60, frames.len() - 1] {
        let mut script = clean.clone();
        let mut bent = frames.to_vec();
        bent[at] ^= 4;
        script.steps[3] = Step::Frames(bent.into());
        refused(script, 6, "cannot be trusted");
    }
}

#[test]
fn an_image_that_is_not_the_generations_is_refused_though_every_frame_is_sound() {
    let right = image();
    let mut wrong = right.clone();
    wrong[512 * BLOCK] ^= 1;
    let mut script = Script::of(&wrong);
    script.digest = digest(&right).as_bytes().to_vec();
    refused(script, 6, "was promised");
}

#[test]
fn a_block_that_was_left_out_is_missed() {
    let image = image();
    let mut script = Script::of(&image);
    let Some(Step::End(blocks)) = script.steps.pop() else {
        panic!("the end comes last");
    };
    script.steps.pop();
    script.steps.push(Step::End(blocks));
    refused(script, 6, "the service says that it sent");
}

#[test]
fn frames_out_of_order_or_twice_are_refused() {
    let mut swapped = Script::of(&image());
    swapped.steps.swap(3, 4);
    refused(swapped, 6, "out of order");
    let mut twice = Script::of(&image());
    twice.steps.insert(3, twice.steps[3].clone());
    refused(twice, 6, "out of order");
}

#[test]
fn blocks_outside_of_the_volume_are_refused() {
    let larger = geometry(10_000 * BLOCK);
    let mut frames = Vec::new();
    FrameEncoder::new(larger).encode_zero(
        &[Extent::new(BlockIndex::new(9000), BlockCount::new(5))],
        &mut frames,
    );
    let mut script = Script::of(&image());
    let last = script.steps.len() - 1;
    script.steps.insert(last, Step::Frames(frames.into()));
    refused(script, 6, "block 9000 is not one of the volume's 3000");
}

#[test]
fn frames_of_another_block_size_are_refused() {
    let other = Geometry::new(1 << 20, BlockSize::new(8192).unwrap()).unwrap();
    let mut frames = Vec::new();
    let block = [1; 8192];
    FrameEncoder::new(other).encode_data(
        &[(BlockIndex::ZERO, block_checksum(&block))],
        &block,
        CodecChoice::Raw,
        &mut frames,
    );
    let mut script = Script::of(&image());
    script.steps[0] = Step::Frames(frames.into());
    refused(script, 6, "blocks have 8192 bytes");
}

#[test]
fn a_stream_that_ends_early_leaves_nothing_behind() {
    let mut script = Script::of(&image());
    script.steps.truncate(5);
    refused(script, 5, "the stream ended before the image was whole");
}

#[test]
fn corruption_that_the_vault_reports_is_told_as_such() {
    let mut script = Script::of(&image());
    script.steps[5] = Step::Fail;
    refused(script, 6, "segment 7 is corrupt");
}

#[test]
fn garbage_instead_of_frames_is_refused() {
    let mut script = Script::of(&image());
    script.steps[2] = Step::Frames(vec![0xff; 5000].into());
    refused(script, 6, "no frame begins here");
}

#[test]
fn sigint_ends_it_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut script = Script::of(&image());
    script.steps.truncate(5);
    script.steps.push(Step::Hang);
    let fake = Fake::serve(script);
    let child = tidemark()
        .args(["restore", "data@7", "out.img", "--vault", &fake.url()])
        .current_dir(dir.path())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while names(dir.path()).is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = i32::try_from(child.id()).unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::INT,
    )
    .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(stderr(&output), "error: interrupted\n");
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn an_output_in_a_folder_that_is_not_there_is_an_error_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::serve(Script::of(&image()));
    let output = tidemark()
        .args(["restore", "data", "none/out.img", "--vault", &fake.url()])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("No such file or directory"),
        "{}",
        stderr(&output)
    );
}
