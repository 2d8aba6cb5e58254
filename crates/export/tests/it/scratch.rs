//! Throw-away writes over a device that never changes, compared with plain bytes.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;
use tidemark_block::{BlockSize, Geometry};
use tidemark_export::{BlockDevice, Durability, Export, Scratch, ScratchRoom, ZeroFlags};

use crate::devices::MemoryDevice;

const BLOCK: u64 = 4096;
/// More blocks than share a lock of changes.
const LENGTH: u64 = 600 * BLOCK;

fn geometry() -> Geometry {
    Geometry::new(LENGTH, BlockSize::MIN).unwrap()
}

/// What is below, a third of it holes.
fn content() -> Vec<u8> {
    (0..LENGTH)
        .map(|at| match at / (7 * BLOCK) % 3 {
            0 => 0,
            _ => u8::try_from(at / BLOCK % 251).unwrap() | 1,
        })
        .collect()
}

fn below() -> Arc<MemoryDevice> {
    let device = MemoryDevice::new(LENGTH);
    for (n, bytes) in content().chunks(64 << 10).enumerate() {
        if bytes.iter().any(|&byte| byte != 0) {
            device
                .write(n as u64 * (64 << 10), bytes, Durability::Volatile)
                .unwrap();
        }
    }
    Arc::new(device.read_only())
}

fn room(dir: &TempDir, blocks: u64) -> Arc<ScratchRoom> {
    Arc::new(ScratchRoom::new(dir.path().to_owned(), blocks * BLOCK))
}

fn whole(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(LENGTH).unwrap()];
    device.read(0, &mut bytes).unwrap();
    bytes
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[derive(Debug, Clone)]
enum Step {
    Write(u8),
    Trim,
    Zero { may_punch: bool },
    Read,
}

fn steps() -> impl Strategy<Value = Vec<(Step, u64, u64)>> {
    let step = prop_oneof![
        4 => (1..=255u8).prop_map(Step::Write),
        1 => Just(Step::Trim),
        2 => any::<bool>().prop_map(|may_punch| Step::Zero { may_punch }),
        2 => Just(Step::Read),
    ];
    let unit = prop_oneof![Just(1u64), Just(512), Just(BLOCK)];
    let one = (step, unit, 0..LENGTH, 1..300 * BLOCK, any::<bool>()).prop_map(
        |(step, unit, at, length, short)| {
            let at = at / unit * unit;
            let most = if short { length % (3 * BLOCK) } else { length };
            let length = (most / unit * unit).max(unit).min(LENGTH - at);
            (step, at, length)
        },
    );
    prop::collection::vec(one, 1..40)
}

fn range(at: u64, length: u64) -> std::ops::Range<usize> {
    usize::try_from(at).unwrap()..usize::try_from(at + length).unwrap()
}

/// What the extents of the whole device say agrees with what it holds.
fn assert_extents(device: &dyn BlockDevice, content: &[u8]) {
    let mut at = 0;
    while at < LENGTH {
        let extents = device.extents(at, LENGTH - at, 3).unwrap();
        assert!((1..=3).contains(&extents.len()));
        for extent in extents {
            assert!(extent.length > 0);
            if extent.zero {
                assert!(content[range(at, extent.length)].iter().all(|&b| b == 0));
            }
            at += extent.length;
        }
    }
    assert_eq!(at, LENGTH);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_scratch_reads_as_plain_bytes_would_and_what_is_below_never_changes(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let (below, room) = (below(), room(&dir, 600));
        let scratch = Scratch::new(Arc::clone(&below) as _, geometry(), Arc::clone(&room));
        let mut model = content();
        for (step, at, length) in steps {
            let part = range(at, length);
            match step {
                Step::Write(byte) => {
                    model[part.clone()].fill(byte);
                    scratch.write(at, &model[part], Durability::Fua).unwrap();
                }
                Step::Trim => {
                    scratch.trim(at, length, true).unwrap();
                    let mut now = vec![0; part.len()];
                    scratch.read(at, &mut now).unwrap();
                    for (now, model) in now.iter().zip(&mut model[part]) {
                        prop_assert!(*now == 0 || now == model);
                        *model = *now;
                    }
                }
                Step::Zero { may_punch } => {
                    let flags = ZeroFlags { may_punch, ..ZeroFlags::default() };
                    scratch.write_zeroes(at, length, flags).unwrap();
                    model[part].fill(0);
                }
                Step::Read => {
                    let mut now = vec![0xEE; part.len()];
                    scratch.read(at, &mut now).unwrap();
                    prop_assert!(now == model[part]);
                }
            }
        }
        prop_assert!(whole(&scratch) == model);
        assert_extents(&scratch, &model);
        prop_assert!(whole(&*below) == content());
        // Nothing has a name, and what was taken is given back.
        prop_assert_eq!(entries(dir.path()), 0);
        drop(scratch);
        prop_assert_eq!(room.bytes_used(), 0);
    }
}

#[test]
fn what_is_written_beyond_the_room_is_refused_and_zeroing_makes_room() {
    let dir = tempfile::tempdir().unwrap();
    let (below, room) = (below(), room(&dir, 4));
    let new = || Scratch::new(Arc::clone(&below) as _, geometry(), Arc::clone(&room));
    let (first, second) = (new(), new());
    let data = vec![7; 3 * BLOCK as usize];
    first.write(0, &data, Durability::Volatile).unwrap();
    // The room is that of both, and what a refused write would have changed is as before.
    let refused = second.write(0, &data, Durability::Volatile).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
    assert!(whole(&second) == content());
    second.write(BLOCK, &[8], Durability::Volatile).unwrap();
    assert_eq!(room.bytes_used(), 4 * BLOCK);
    // What is there already takes no more.
    first
        .write(100, &data[..5000], Durability::Volatile)
        .unwrap();
    let may_punch = ZeroFlags {
        may_punch: true,
        ..ZeroFlags::default()
    };
    first.write_zeroes(0, LENGTH, may_punch).unwrap();
    assert_eq!(room.bytes_used(), BLOCK);
    assert!(whole(&first).iter().all(|&byte| byte == 0));
    second
        .write(2 * BLOCK, &data, Durability::Volatile)
        .unwrap();
    assert_eq!(room.bytes_used(), 4 * BLOCK);
    drop((first, second));
    assert_eq!(room.bytes_used(), 0);
}

#[test]
fn a_write_into_a_directory_that_is_gone_fails_and_takes_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let room = Arc::new(ScratchRoom::new(dir.path().join("gone"), LENGTH));
    let scratch = Scratch::new(below(), geometry(), Arc::clone(&room));
    let refused = scratch
        .write(0, &[1; 10], Durability::Volatile)
        .unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::NotFound);
    assert_eq!(room.bytes_used(), 0);
    assert!(whole(&scratch) == content());
}

#[test]
fn requests_outside_of_the_device_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(below(), geometry(), room(&dir, 600));
    for at in [LENGTH, LENGTH - 1, u64::MAX] {
        let kind = |done: io::Result<()>| done.unwrap_err().kind();
        let invalid = io::ErrorKind::InvalidInput;
        assert_eq!(kind(scratch.read(at, &mut [0; 2])), invalid);
        assert_eq!(kind(scratch.write(at, &[0; 2], Durability::Fua)), invalid);
        assert_eq!(kind(scratch.trim(at, 2, false)), invalid);
        assert_eq!(
            kind(scratch.write_zeroes(at, 2, ZeroFlags::default())),
            invalid
        );
        assert_eq!(kind(scratch.extents(at, 2, 1).map(|_| ())), invalid);
    }
    let fast = ZeroFlags {
        fast_only: true,
        ..ZeroFlags::default()
    };
    let refused = scratch.write_zeroes(0, BLOCK, fast).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
}

#[test]
fn threads_that_write_parts_of_the_same_blocks_lose_nothing_of_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(below(), geometry(), room(&dir, 600));
    let threads = 8;
    // Each writes every eighth slice of 512 bytes: all of them parts of every block.
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let scratch = &scratch;
            scope.spawn(move || {
                for slice in (0..LENGTH / 512).filter(|slice| slice % threads == thread) {
                    let bytes = [u8::try_from(thread + 1).unwrap(); 512];
                    scratch
                        .write(slice * 512, &bytes, Durability::Volatile)
                        .unwrap();
                }
            });
        }
    });
    for (slice, bytes) in whole(&scratch).chunks(512).enumerate() {
        let expected = u8::try_from(slice as u64 % threads + 1).unwrap();
        assert!(bytes.iter().all(|&byte| byte == expected), "slice {slice}");
    }
}

#[test]
fn clients_at_the_same_time_share_a_scratch_and_the_next_one_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let room = room(&dir, 600);
    let export = Export::scratch("data@1+scratch", below(), geometry(), Arc::clone(&room));
    let export = Arc::new(export);
    assert!(!export.read_only());
    let first = export.connect().unwrap();
    let second = export.connect().unwrap();
    first
        .device()
        .write(5, &[9; 3], Durability::Volatile)
        .unwrap();
    drop(first);
    let mut read = [0; 3];
    second.device().read(5, &mut read).unwrap();
    assert_eq!(read, [9; 3]);
    drop(second);
    assert_eq!(room.bytes_used(), 0);
    let third = export.connect().unwrap();
    assert!(whole(&**third.device()) == content());
    assert!(whole(&**export.device()) == content());
}
