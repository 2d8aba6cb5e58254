//! A crash at every step of what the uplink keeps: its record, the pending checksums, the table and its stamp.
//!
//! The files are real ones, written by the code that ships; a [`Disk`] reads them after each step and remembers what
//! each has been since it was last synced. A crash in a step leaves what could have been left of it:
//!
//! - **The end of the process**: of table and pending checksums, each 512-byte sector as before the step or after it.
//! - **A loss of power**: each sector of them as it was at the last sync or after any step since.
//! - **Records**, the uplink's and the stamp: old or new; new the stamp only with the table as it was synced.
//!
//! After it a table is trusted only where it is that of the base, and after the end of a process it always is: the
//! rule `tables_follow_the_receipt` of `docs/CRASH-RULES.md`.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs,
    path::Path,
};

use tidemark_block::{
    BlockCount, BlockIndex, BlockSize, Checksum128, Coherence, CutReason, Epoch, Extent,
    GenerationId, Geometry, ImageDigest, IntervalId, MemoryTable, Trigger, VolumeId, image_digest,
    xxh3_128,
};

use super::{
    BaseTable,
    open::{record_path, table_doubt, table_path},
    pending::{Entry, PendingKey, PendingWriter, path_in},
    record::{IntervalRecord, UplinkRecord},
    settle::record_base,
};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const SECTOR: usize = 512;
const INTERVALS: u64 = 3;
/// Replaced whole, and durable when the step ends.
const RECORDS: [&str; 2] = ["uplink", "table.stamp"];
/// Updated in place.
const IN_PLACE: [&str; 2] = ["pending", "table"];

type Files = BTreeMap<&'static str, Vec<u8>>;

/// More than two leaves, so that one is zeroed whole.
fn geometry() -> Geometry {
    Geometry::new(2500 * 4096, BlockSize::MIN).unwrap()
}

fn extent(start: u64, count: u64) -> Extent {
    Extent::new(BlockIndex::new(start), BlockCount::new(count))
}

fn id(generation: u64) -> IntervalId {
    IntervalId::from_bytes([u8::try_from(generation).unwrap(); 16])
}

fn sum(generation: u64, block: u64) -> Checksum128 {
    xxh3_128(&[generation.to_le_bytes(), block.to_le_bytes()].concat())
}

/// What the interval that becomes a generation changes.
fn changes(generation: u64) -> (Vec<Extent>, Vec<Extent>) {
    let data = vec![
        extent(3 * generation, 5),
        extent(1020, 10),
        extent(2490, 10),
    ];
    let zeroes = match generation {
        1 => vec![extent(100, 1)],
        2 => vec![extent(1024, 1024)],
        _ => vec![extent(2048, 200)],
    };
    (data, zeroes)
}

/// The naive table of a generation, as the vault has it.
fn table_of(generation: GenerationId) -> MemoryTable {
    let mut table = MemoryTable::new(geometry());
    for g in 1..=generation.get() {
        let (data, zeroes) = changes(g);
        for block in data.iter().flat_map(|extent| extent.iter()) {
            table.set(block, sum(g, block.get()));
        }
        for block in zeroes.iter().flat_map(|extent| extent.iter()) {
            table.set(block, Checksum128::ZERO);
        }
    }
    table
}

fn digest_of(generation: GenerationId) -> ImageDigest {
    let Ok(digest) = image_digest(&table_of(generation));
    digest
}

fn numbers(seed: u64) -> impl FnMut() -> u64 {
    let mut n = seed;
    move || {
        n = n
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        n >> 33
    }
}

/// What the files of a state directory are and have been.
#[derive(Debug, Clone, Default)]
struct Disk {
    now: Files,
    /// What each file updated in place has been since its last sync, but for now.
    since: BTreeMap<&'static str, Vec<Option<Vec<u8>>>>,
}

fn read(dir: &Path) -> Files {
    let names = RECORDS.into_iter().chain(IN_PLACE);
    names
        .filter_map(|name| Some((name, fs::read(dir.join(name)).ok()?)))
        .collect()
}

/// Each sector is that of one of the versions; the file is as long as one of them.
fn mixed(versions: &[Option<Vec<u8>>], next: &mut impl FnMut() -> u64) -> Option<Vec<u8>> {
    let mut pick = || &versions[usize::try_from(next()).unwrap() % versions.len()];
    let mut bytes = pick().clone()?;
    for (n, sector) in bytes.chunks_mut(SECTOR).enumerate() {
        // What a version doesn't have of a file that has grown reads as zeroes.
        let from = pick().as_deref().unwrap_or_default();
        let from = from.get(n * SECTOR..).unwrap_or_default();
        let length = sector.len().min(from.len());
        sector[..length].copy_from_slice(&from[..length]);
        sector[length..].fill(0);
    }
    Some(bytes)
}

impl Disk {
    /// A step has ended with these files. `synced`: the table was synced in it, before its stamp was replaced.
    fn becomes(&mut self, after: Files, synced: bool) {
        for name in IN_PLACE {
            let since = self.since.entry(name).or_default();
            since.push(self.now.get(name).cloned());
            if synced && name == "table" {
                since.clear();
            }
        }
        self.now = after;
    }

    /// What a crash in a step that would have ended with `after` could have left.
    fn crashed(&self, after: &Files, synced: bool, power: bool, seed: u64) -> Files {
        let mut next = numbers(seed);
        let mut left = Files::new();
        let mut stamped = false;
        for name in RECORDS {
            let is_new = next().is_multiple_of(2);
            stamped |= is_new && synced && self.now.get(name) != after.get(name);
            let found = if is_new { after } else { &self.now };
            left.extend(found.get(name).map(|bytes| (name, bytes.clone())));
        }
        for name in IN_PLACE {
            let mut versions = vec![after.get(name).cloned()];
            if !(stamped && name == "table") {
                versions.push(self.now.get(name).cloned());
                if power {
                    versions.extend(self.since.get(name).into_iter().flatten().cloned());
                }
            }
            left.extend(mixed(&versions, &mut next).map(|bytes| (name, bytes)));
        }
        left
    }
}

/// The uplink of one volume, up to a step at which it ends.
struct Uplink<'a> {
    dir: &'a Path,
    disk: RefCell<Disk>,
    /// Steps before the one in which it ends.
    left: Cell<u64>,
    power: bool,
    seed: u64,
}

/// It has ended.
#[derive(Debug)]
struct Ended;

impl<'a> Uplink<'a> {
    fn new(dir: &'a Path, disk: Disk, left: u64, power: bool, seed: u64) -> Self {
        Self {
            dir,
            disk: RefCell::new(disk),
            left: Cell::new(left),
            power,
            seed,
        }
    }

    /// Does a step, of which a crash may leave any part.
    fn step(&self, synced: bool, does: impl FnOnce()) -> Result<(), Ended> {
        does();
        self.ended(read(self.dir), synced)
    }

    /// A step has ended with these files.
    fn ended(&self, after: Files, synced: bool) -> Result<(), Ended> {
        let mut disk = self.disk.borrow_mut();
        if self.left.get() > 0 {
            self.left.set(self.left.get() - 1);
            disk.becomes(after, synced);
            return Ok(());
        }
        let left = disk.crashed(&after, synced, self.power, self.seed);
        for name in RECORDS.into_iter().chain(IN_PLACE) {
            match left.get(name) {
                Some(bytes) => fs::write(self.dir.join(name), bytes).unwrap(),
                None => _ = fs::remove_file(self.dir.join(name)),
            }
        }
        disk.becomes(left, false);
        if self.power {
            disk.since.clear();
        }
        Err(Ended)
    }

    fn store(&self, record: &UplinkRecord) -> Result<(), Ended> {
        self.step(false, || record.store(&record_path(self.dir)).unwrap())
    }

    /// From a restart to as many generations as are wanted. `head` is the vault's.
    fn run(&self, head: &Cell<GenerationId>, kept: bool) -> Result<(), Ended> {
        let path = record_path(self.dir);
        let loaded = UplinkRecord::load(&path, VOLUME).unwrap();
        let mut record = loaded.unwrap_or_else(|| UplinkRecord::new(VOLUME, [9; 16]));
        let table = self.open(&mut record, kept)?;
        if head.get() != record.base {
            // The receipt was lost: the vault answers it again.
            assert_eq!(
                head.get(),
                record.base.next(),
                "at most one receipt can be lost"
            );
            if record.interval.is_some() && kept {
                self.settle(&mut record, &table)?;
            } else {
                self.adopt(&mut record, &table, head.get())?;
            }
        }
        while record.base.get() < INTERVALS {
            self.interval(&mut record, &table, head)?;
        }
        Ok(())
    }

    fn open(&self, record: &mut UplinkRecord, kept: bool) -> Result<BaseTable, Ended> {
        let mut opened = None;
        self.step(true, || {
            opened = Some(BaseTable::open(&table_path(self.dir), VOLUME, geometry()).unwrap());
        })?;
        let table = opened.unwrap();
        let mut sound = false;
        // It applies again what a crash may have torn.
        self.step(false, || {
            sound = table_doubt(self.dir, record, &table, kept)
                .unwrap()
                .is_none()
        })?;
        table.set_sound(sound);
        if sound {
            exact(&table, record.base);
        }
        assert!(sound || !kept, "the end of a process puts nothing in doubt");
        record.table_doubtful = !sound;
        self.store(record)?;
        if !sound {
            self.adopt(record, &table, record.base)?;
        }
        Ok(table)
    }

    /// Takes the vault's head as base and makes the table that of it, as a comparison with the vault does.
    fn adopt(
        &self,
        record: &mut UplinkRecord,
        table: &BaseTable,
        head: GenerationId,
    ) -> Result<(), Ended> {
        record.base = head;
        record.base_digest = Some(digest_of(head));
        record.base_interval = Some(id(head.get()));
        record.interval = None;
        record.table_doubtful = true;
        self.store(record)?;
        let repaired = table.to_repair().unwrap();
        let wanted = table_of(head);
        self.step(false, || {
            let blocks = geometry().all().iter();
            repaired
                .reapply(blocks.map(|block| (block, wanted.get(block))))
                .unwrap();
            repaired.rebuild_upper_levels().unwrap();
        })?;
        self.step(true, || repaired.sync_and_stamp(head).unwrap())?;
        table.set_sound(true);
        exact(table, head);
        record.table_doubtful = false;
        self.store(record)
    }

    /// An interval, from its cut to its receipt.
    fn interval(
        &self,
        record: &mut UplinkRecord,
        table: &BaseTable,
        head: &Cell<GenerationId>,
    ) -> Result<(), Ended> {
        let generation = record.base.next();
        record.interval = Some(IntervalRecord {
            id: id(generation.get()),
            epoch: Epoch::new(generation.get()),
            base: record.base,
            cut_time_ms: generation.get(),
            coherence: Coherence::Crash,
            reason: CutReason::default(),
            trigger: Trigger::Request,
        });
        self.store(record)?;
        let (data, zeroes) = changes(generation.get());
        let mut pending = None;
        self.step(false, || {
            pending = Some(PendingWriter::create(&path_in(self.dir), key(record)).unwrap());
        })?;
        let mut pending = pending.unwrap();
        let mut entries: Vec<Entry> = Vec::new();
        for extent in data {
            let sums = extent
                .iter()
                .map(|block| sum(generation.get(), block.get()))
                .collect();
            entries.push(Entry::Data(vec![extent], sums));
        }
        entries.push(Entry::Zero(zeroes));
        entries.push(Entry::End(BlockCount::new(25)));
        for entry in entries {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            self.step(false, || pending.append(&bytes).unwrap())?;
        }
        // The vault commits; whether that is heard of is another matter.
        head.set(generation);
        self.settle(record, table)
    }

    fn settle(&self, record: &mut UplinkRecord, table: &BaseTable) -> Result<(), Ended> {
        let key = key(record);
        record.base = record.base.next();
        record.base_digest = Some(digest_of(record.base));
        record.base_interval = Some(key.interval);
        record.interval = None;
        // What is there when the engine hears of the receipt.
        let mut released = Files::new();
        record_base(self.dir, record, table, Some(key), || {
            released = read(self.dir);
            Ok(())
        })
        .unwrap()
        .unwrap();
        let now = read(self.dir);
        assert_eq!(
            released.get("uplink"),
            now.get("uplink"),
            "the base is recorded first"
        );
        self.ended(released, false)?;
        self.ended(now, false)?;
        exact(table, record.base);
        self.step(true, || table.table().sync_and_stamp(record.base).unwrap())
    }
}

fn key(record: &UplinkRecord) -> PendingKey {
    PendingKey {
        volume: VOLUME,
        interval: record.interval.as_ref().unwrap().id,
        base: record.base,
    }
}

/// The table is that of a generation, block by block and in its digest.
fn exact(table: &BaseTable, generation: GenerationId) {
    let table = table.table();
    assert_eq!(
        table.digest().unwrap(),
        digest_of(generation),
        "{generation}"
    );
    let wanted = table_of(generation);
    for block in geometry().all().iter() {
        assert_eq!(
            table.block(block).unwrap(),
            wanted.get(block),
            "block {block}"
        );
    }
}

/// In memory where there is such a place: thousands of syncs would take minutes.
pub(super) fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// Ends it at each step, goes on, ends that at each step of its opening, and goes on to the end. Returns how often.
fn crash_everywhere(first: bool, second: bool) -> u64 {
    // Opening, its record and, where the table is in doubt, the comparison.
    const OPENING: u64 = 8;
    let mut crashes = 0;
    for step in 0.. {
        for again in 0..OPENING {
            let dir = scratch();
            let head = Cell::new(GenerationId::ZERO);
            let seed = step * OPENING + again;
            let uplink = Uplink::new(dir.path(), Disk::default(), step, first, seed);
            if uplink.run(&head, true).is_ok() {
                assert_eq!(head.get().get(), INTERVALS);
                return crashes;
            }
            let disk = uplink.disk.into_inner();
            let uplink = Uplink::new(dir.path(), disk, again, second, seed);
            let ended = uplink.run(&head, !first).is_err();
            if ended {
                let uplink = Uplink::new(dir.path(), uplink.disk.into_inner(), u64::MAX, false, 0);
                uplink.run(&head, !(first || second)).unwrap();
                crashes += 1;
            }
            assert_eq!(
                head.get().get(),
                INTERVALS,
                "step {step}, then step {again}"
            );
            crashes += 1;
            if !ended {
                break;
            }
        }
    }
    crashes
}

#[test]
fn tables_follow_the_receipt() {
    let crashes = crash_everywhere(false, false);
    assert!(crashes > 200, "only {crashes}: the test tests little");
}

#[test]
fn a_loss_of_power_at_any_step_leaves_the_table_of_the_base_or_one_in_doubt() {
    let crashes = crash_everywhere(true, true);
    assert!(crashes > 200, "only {crashes}: the test tests little");
}

#[test]
fn the_end_of_the_process_and_then_a_loss_of_power_leave_no_more_in_doubt() {
    let crashes = crash_everywhere(false, true);
    assert!(crashes > 200, "only {crashes}: the test tests little");
}
