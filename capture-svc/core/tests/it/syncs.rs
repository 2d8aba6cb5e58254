//! Syncs of the volume while something else goes on, on a medium that reports a failure as the kernel does: to one of
//! them only.

use std::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use capture_core::engine::{
    capture::{Capture, CaptureError, MARK_SYNC_FAILED, MARKS_WORD, TRACKING_WORDS, Tuning},
    cut::Purpose,
    dirty::DirtyLayout,
    intent::encode_page,
    media::{Map, Media, MediaError, MediaResult, Record},
    records::{SnapshotTable, encode_carry, encode_interval},
    spool::SpoolLimits,
    trust::Judgement,
    write::{Change, Step, WriteOp},
};
use tidemark_block::{BlockSet, BlockSize, Geometry, VolumeId};

const BLOCK: usize = 4096;

/// Nothing but words, and a sync that fails once, or takes its time, when it is told to.
struct Reporting {
    words: [Vec<AtomicU64>; 4],
    syncs: Mutex<Syncs>,
    changed: Condvar,
}

#[derive(Default)]
struct Syncs {
    fail_next: bool,
    failing: bool,
    /// Syncs that ended while another one was failing.
    passed: u64,
    begun: u64,
    hold_next: bool,
    /// One is under way until this is taken back.
    held: bool,
}

fn geometry() -> Geometry {
    Geometry::new(16 * BLOCK as u64, BlockSize::MIN).unwrap()
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([1; 16])
}

impl Media for Reporting {
    fn read_volume(&self, _: u64, buffer: &mut [u8]) -> MediaResult {
        buffer.fill(0);
        Ok(())
    }
    fn write_volume(&self, _: u64, _: &[u8]) -> MediaResult {
        Ok(())
    }
    fn zero_volume(&self, _: u64, _: u64, _: bool) -> MediaResult {
        Ok(())
    }
    fn sync_volume(&self) -> MediaResult {
        let mut syncs = self.syncs.lock().unwrap();
        syncs.begun += 1;
        if std::mem::take(&mut syncs.hold_next) {
            syncs.held = true;
            self.changed.notify_all();
            drop(self.changed.wait_while(syncs, |syncs| syncs.held).unwrap());
            return Ok(());
        }
        if !std::mem::take(&mut syncs.fail_next) {
            syncs.passed += u64::from(syncs.failing);
            self.changed.notify_all();
            return Ok(());
        }
        syncs.failing = true;
        self.changed.notify_all();
        // Gives another one time to come and end well.
        let waited = self
            .changed
            .wait_timeout_while(syncs, Duration::from_millis(200), |syncs| syncs.passed == 0);
        waited.unwrap().0.failing = false;
        Err(MediaError(5))
    }
    fn drop_volume_cache(&self) -> MediaResult {
        Ok(())
    }
    fn read_before(&self, _: u64, _: &mut [u8]) -> MediaResult {
        Ok(())
    }
    fn write_before(&self, _: u64, _: &[u8]) -> MediaResult {
        Ok(())
    }
    fn reserve(&self, _: u64, _: u64) -> MediaResult<(u64, u64)> {
        Ok((0, 0))
    }
    fn read_intent(&self, place: u64, page: &mut [u8]) -> MediaResult {
        page.copy_from_slice(&encode_page(volume(), 0, place % 2, &[0; _])[..]);
        Ok(())
    }
    fn write_intent(&self, _: u64, _: &[u8]) -> MediaResult {
        Ok(())
    }
    fn sync_intent(&self) -> MediaResult {
        Ok(())
    }
    fn put(&self, _: Record, _: Option<&[u8]>) -> MediaResult {
        Ok(())
    }
    fn get(&self, record: Record) -> MediaResult<Option<Vec<u8>>> {
        Ok(Some(match record {
            Record::Carry => encode_carry(volume(), &BlockSet::new()),
            Record::Interval => encode_interval(volume(), None),
            _ => SnapshotTable::default().encode(volume()),
        }))
    }
    fn changes(&self) -> MediaResult<Vec<u64>> {
        Ok(Vec::new())
    }
    fn words(&self, map: Map) -> &[AtomicU64] {
        match map {
            Map::Tracking => &self.words[0],
            Map::Dirty(parity) => &self.words[1 + usize::from(parity)],
            Map::Slots => &self.words[3],
        }
    }
    fn reset(&self, _: Map) -> MediaResult {
        Ok(())
    }
    fn lock(&self, _: u64, _: u64) -> bool {
        true
    }
    fn unlock(&self, _: u64, _: u64) {}
}

impl Reporting {
    fn syncs(&self) -> MutexGuard<'_, Syncs> {
        self.syncs.lock().unwrap()
    }

    /// Waits until the syncs are so.
    fn until(&self, are: impl Fn(&Syncs) -> bool) {
        drop(self.changed.wait_while(self.syncs(), |s| !are(s)).unwrap());
    }
}

fn capture() -> Capture<Reporting> {
    let words = |n: usize| std::iter::repeat_with(AtomicU64::default).take(n).collect();
    let dirty = DirtyLayout::new(16).total();
    let media = Reporting {
        words: [words(TRACKING_WORDS), words(dirty), words(dirty), words(0)],
        syncs: Mutex::default(),
        changed: Condvar::new(),
    };
    let tuning = Tuning {
        region_bytes: 4 * BLOCK as u64,
        stripe_blocks: 1,
        spool: SpoolLimits {
            entries_max: 0,
            slots_max: 0,
        },
        hot_regions_max: 0,
        snapshots_max: 1,
        changes_max: 1,
    };
    let exact = Judgement::Exact { clean: true };
    Capture::recover(media, volume(), geometry(), tuning, exact, 1)
        .unwrap()
        .0
}

/// Writes a block, and cuts an interval of it.
fn write_and_cut(capture: &Capture<Reporting>) -> u64 {
    let epoch = capture.enter().unwrap();
    let mut write = WriteOp::new(capture, epoch, 0, Change::Data(&[1; BLOCK]));
    while write.step(capture, &mut [0; BLOCK]).unwrap() != Step::Done {}
    capture.exit(epoch);
    let cut = capture.begin_cut(Purpose::Interval).unwrap();
    capture.finish_cut(cut).unwrap();
    epoch
}

#[test]
fn a_sync_that_fails_is_heard_by_a_commit_at_the_same_time() {
    let capture = capture();
    let epoch = write_and_cut(&capture);
    capture.media().syncs().fail_next = true;
    thread::scope(|scope| {
        let flush = scope.spawn(|| capture.sync());
        capture.media().until(|syncs| syncs.failing);
        assert_eq!(capture.commit_interval(epoch), Err(CaptureError::Poisoned));
        assert!(matches!(flush.join().unwrap(), Err(CaptureError::Media(_))));
    });
    assert!(capture.open_interval().is_some(), "it is not dropped");
    assert_eq!(capture.intent().set_regions(), [0], "and no intent cleared");
    let marks = capture.media().words(Map::Tracking)[MARKS_WORD].load(SeqCst);
    assert_eq!(marks, MARK_SYNC_FAILED);
}

#[test]
fn a_sync_that_began_before_a_cut_had_settled_does_not_count_for_it() {
    let capture = capture();
    let media = capture.media();
    let opened = media.syncs().begun;
    media.syncs().hold_next = true;
    let epoch = thread::scope(|scope| {
        let flush = scope.spawn(|| capture.sync());
        media.until(|syncs| syncs.held);
        // What is written now, that sync may have passed by already.
        let epoch = write_and_cut(&capture);
        media.syncs().held = false;
        media.changed.notify_all();
        flush.join().unwrap().unwrap();
        epoch
    });
    assert_eq!(media.syncs().begun, opened + 1);
    capture.commit_interval(epoch).unwrap();
    assert_eq!(
        media.syncs().begun,
        opened + 2,
        "committed without one of its own"
    );
    assert_eq!(capture.intent().set_regions(), [0; 0]);
}
