use proptest::prelude::*;
use tidemark_block::{BlockCount, BlockIndex};

use super::*;

fn geometry() -> Geometry {
    Geometry::new(64 * 4096, BlockSize::MIN).unwrap()
}

fn set(blocks: &[u64]) -> BlockSet {
    let one = |n: &u64| Extent::new(BlockIndex::new(*n), BlockCount::new(1));
    blocks.iter().map(one).collect()
}

fn clone_of(cut: u64) -> CloneFile {
    CloneFile {
        cut,
        inode: 1000 + cut,
        born_s: 1_700_000_000,
        born_ns: 5,
        modified_s: -7,
        modified_ns: 9,
    }
}

fn new(base: Base) -> State {
    let file = FileIdentity {
        filesystem: [3; 16],
        inode: 77,
        born_s: 12,
        born_ns: 13,
        ..FileIdentity::default()
    };
    State {
        dir: b"/srv/.tidemark-x".to_vec(),
        mount: 41,
        ..State::new(VolumeId::from_bytes([7; 16]), geometry(), file, base)
    }
}

fn full() -> State {
    let mut state = new(Base::Clone(clone_of(1)));
    state.last_cut = 1;
    state.boot = [9; 16];
    state.carry = set(&[3, 4]);
    state.begin(clone_of(2));
    state.carry = set(&[60]);
    state.keep(clone_of(3), 1234, "before upgrade");
    state.keep(clone_of(4), 1235, "");
    state.snapshots[0].coherence = Coherence::Quiesced;
    state.snapshots[0].reason = CutReason::default();
    state
}

#[test]
fn an_interval_takes_the_carry_and_its_clone_becomes_the_base() {
    let mut state = new(Base::Zero);
    state.carry = set(&[1, 2]);
    state.begin(clone_of(1));
    assert_eq!((state.carry.len().get(), state.last_cut), (0, 1));
    state.carry = set(&[9]);
    assert!(!state.commit(5), "another cut");
    assert!(state.interval.is_some());
    assert!(state.commit(1));
    assert_eq!(state.base, Base::Clone(clone_of(1)));
    assert_eq!(
        (state.interval.clone(), state.carry.clone()),
        (None, set(&[9]))
    );
    assert!(!state.commit(1), "committed before");
    state.begin(clone_of(2));
    assert!(state.names(1) && state.names(2));
    assert!(state.commit(2));
    assert!(!state.names(1) && state.names(2));
}

#[test]
fn what_is_given_up_is_in_the_next_interval() {
    let mut state = new(Base::Clone(clone_of(1)));
    state.last_cut = 1;
    state.carry = set(&[5]);
    state.begin(clone_of(2));
    state.carry = set(&[7]);
    state.give_up(&set(&[6]));
    assert_eq!(state.carry, set(&[5, 6, 7]));
    assert_eq!(state.base, Base::Clone(clone_of(1)));
    assert!(!state.names(2));
    state.give_up(&set(&[8]));
    assert_eq!(state.carry, set(&[5, 6, 7]), "nothing was open");
}

#[test]
fn a_missing_clone_costs_a_full_comparison_or_a_snapshot_and_nothing_else() {
    let mut state = full();
    assert_eq!(state.missing(|_| true), []);
    assert_eq!(state, full());
    assert_eq!(
        state.missing(|clone| clone.cut != 3),
        [Loss::Snapshot { id: 1, cut: 3 }]
    );
    assert_eq!(state.snapshots.len(), 1);
    assert_eq!(state.missing(|clone| clone.cut != 1), [Loss::Base(1)]);
    assert_eq!(state.base, Base::Lost);
    assert_eq!(state.carry, std::iter::once(geometry().all()).collect());
    assert!(state.interval.is_some());
    let mut state = full();
    assert_eq!(state.missing(|clone| clone.cut != 2), [Loss::Interval(2)]);
    assert_eq!(state.interval, None);
    assert_eq!(state.carry, std::iter::once(geometry().all()).collect());
    assert_eq!(state.last_id, 2, "numbers are never given twice");
}

#[test]
fn only_with_a_clone_of_the_base_are_blocks_clean() {
    let all = geometry().all();
    for base in [Base::Zero, Base::Lost] {
        assert_eq!(new(base).tracked(all), std::iter::once(all).collect());
    }
    assert_eq!(full().tracked(all), set(&[3, 4, 60]));
    let part = Extent::new(BlockIndex::new(4), BlockCount::new(8));
    assert_eq!(full().tracked(part), set(&[4]));
}

#[test]
fn a_record_survives_and_damage_is_seen_at_every_byte() {
    for state in [new(Base::Zero), new(Base::Lost), full()] {
        let bytes = state.encode();
        let mut expected = state.clone();
        // Only what tells the file from others is recorded.
        expected.file.boot = [0; 16];
        assert_eq!(State::decode(&bytes), Ok(expected));
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            State::decode(&flipped).unwrap_err();
            State::decode(&bytes[..at]).unwrap_err();
        }
    }
}

#[test]
fn a_record_that_no_service_writes_is_refused() {
    type Change = fn(&mut State);
    let changes: [(&str, Change); 5] = [
        ("cut", |state| state.last_cut = 3),
        ("cut", |state| state.base = Base::Clone(clone_of(0))),
        ("number of a snapshot", |state| state.last_id = 1),
        ("number of a snapshot", |state| state.snapshots.reverse()),
        ("path of the clones", |state| {
            state.dir = vec![b'x'; DIR_BYTES_MAX + 1]
        }),
    ];
    for (what, change) in changes {
        let mut state = full();
        change(&mut state);
        let refused = State::decode(&state.encode());
        assert_eq!(refused, Err(WireError::Range(what).into()));
    }
}

#[test]
fn a_record_of_version_1_is_still_read() {
    let golden = include_bytes!("../../../tests/golden/reflink-v1");
    let mut expected = full();
    // Only what tells the file from others is recorded.
    expected.file.boot = [0; 16];
    for snapshot in &mut expected.snapshots {
        (snapshot.coherence, snapshot.reason) = no_grade();
    }
    assert_eq!(State::decode(golden), Ok(expected));
}

#[test]
#[allow(clippy::disallowed_methods, reason = "a test's own files")]
fn the_golden_record_keeps_decoding() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/reflink-v2");
    if std::env::var("TIDEMARK_BLESS").is_ok() {
        std::fs::write(path, full().encode()).unwrap();
    }
    let golden = std::fs::read(path).unwrap();
    assert!(full().encode() == golden, "it is encoded as ever");
    let mut expected = full();
    expected.file.boot = [0; 16];
    assert_eq!(State::decode(&golden), Ok(expected));
}

#[test]
fn the_page_of_formats_has_these_places() {
    let page = include_str!("../../../../../docs/FORMAT-CAPTURE.md");
    let part = page.split("## reflink: payload").nth(1).unwrap();
    let state = new(Base::Zero);
    let bytes = &state.encode()[40..];
    let at = |place: usize, length: usize| &bytes[place..place + length];
    assert_eq!(at(0, 16), state.volume.as_bytes());
    assert_eq!(at(16, 8), state.geometry.length().to_le_bytes());
    assert_eq!(at(48, 8), 41_u64.to_le_bytes());
    assert_eq!(at(56, 16), [3; 16]);
    assert_eq!(at(72, 8), 77_u64.to_le_bytes());
    assert_eq!(at(88, 4), 13_u32.to_le_bytes());
    assert_eq!(at(108, 8), (state.dir.len() as u64).to_le_bytes());
    assert_eq!(at(116, state.dir.len()), state.dir);
    for stated in [
        "| 48 | 8 | mount id",
        "| 56 | 16 | filesystem",
        "| 72 | 8 | its inode number",
        "| 88 | 4 | and nanoseconds",
        "| 116 | n | absolute path",
        "A clone, 40 bytes",
    ] {
        assert!(part.contains(stated), "{stated}");
    }
    let mut clone = Vec::new();
    put_clone(&mut clone, clone_of(1));
    assert_eq!(clone.len(), 40);
    assert!(page.contains("`TMREFLNK`"));
}

proptest! {
    #[test]
    fn whatever_the_bytes_nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = State::decode(&bytes);
        let _ = State::decode(&seal(REFLINK_MAGIC, VERSION, &bytes));
    }
}
