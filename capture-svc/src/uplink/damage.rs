//! Damage to what the uplink keeps: one bit flipped at every byte of its record, the checksum table, its stamp and the
//! pending checksums; each cut short, gone, or another volume's. Whatever it is, the next generation is the volume, and
//! the damage is found: at the opening, by the digests of both sides, or by the scrub.
//!
//! The vault is a naive one: it takes an interval if it comes to the digest that was announced, and gives away the
//! checksums of its head.

use std::{collections::BTreeMap, fs, path::Path, sync::LazyLock};

use tidemark_block::{
    BlockCount, BlockIndex, BlockSet, Extent, GenerationId, Geometry, ImageDigest, IntervalId,
    MemoryTable, VolumeId, block_checksum, image_digest,
};

use super::{
    BaseTable,
    open::{TableDoubt, record_path, table_doubt, table_path},
    pending::{PendingKey, PendingWriter, path_in},
    record::UplinkRecord,
    walk::tests::{MemoryImage, apply, image_of, walk_all},
};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const OTHER: VolumeId = VolumeId::from_bytes([2; 16]);
const FILES: [&str; 4] = ["uplink", "table", "table.stamp", "pending"];

fn geometry() -> Geometry {
    super::walk::tests::geometry(70)
}

fn id(generation: u64) -> IntervalId {
    IntervalId::from_bytes([u8::try_from(generation).unwrap(); 16])
}

/// What is in each block of a generation; the last one is the volume, which is not shipped yet.
fn image(generation: u64) -> &'static [u8] {
    static IMAGES: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| [1, 2, 3].map(make_image));
    &IMAGES[usize::try_from(generation - 1).unwrap()]
}

fn make_image(generation: u64) -> Vec<u8> {
    let mut numbers = [0; 70];
    numbers[..4].fill(1);
    numbers[40] = 1;
    if generation >= 2 {
        numbers[2] = 0;
        numbers[3..6].fill(2);
        numbers[69] = 2;
    }
    if generation >= 3 {
        numbers[4] = 3;
        numbers[40] = 0;
        numbers[65] = 3;
    }
    image_of(&numbers)
}

/// What may have changed since the second generation: what has, and some in doubt.
fn changed() -> BlockSet {
    let extent = |at, count| Extent::new(BlockIndex::new(at), BlockCount::new(count));
    [extent(3, 3), extent(38, 4), extent(65, 1)]
        .into_iter()
        .collect()
}

fn digest_of(image: &[u8]) -> ImageDigest {
    let Ok(digest) = image_digest(&MemoryTable::of_image(geometry(), image));
    digest
}

/// How the files were left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// With the table stamped.
    Settled,
    /// Amid the applying of the last interval's checksums.
    Applying,
}

type Files = BTreeMap<&'static str, Vec<u8>>;

/// Makes the files of a volume whose second generation is its base.
fn left(dir: &Path, volume: VolumeId, left: Left) -> Files {
    let path = table_path(dir);
    drop(BaseTable::open(&path, volume, geometry()).unwrap());
    let table = BaseTable::open(&path, volume, geometry()).unwrap().table();
    let sums = |generation| {
        let bytes: Vec<_> = image(generation).chunks(4096).map(block_checksum).collect();
        geometry().all().iter().zip(bytes)
    };
    table.apply(sums(1)).unwrap();
    table.sync_and_stamp(GenerationId::new(1)).unwrap();
    let shipped = MemoryImage::new(geometry(), image(2).to_vec());
    let all = std::iter::once(geometry().all()).collect();
    let (total, gathered) = walk_all(&shipped, &table, &all, 1 << 20);
    assert_eq!(total.image_digest, digest_of(image(2)));
    let key = PendingKey {
        volume,
        interval: id(2),
        base: GenerationId::new(1),
    };
    let mut pending = PendingWriter::create(&path_in(dir), key).unwrap();
    pending.append(&gathered.entries).unwrap();
    let applied = match left {
        Left::Settled => 70,
        Left::Applying => 4,
    };
    table.apply(sums(2).take(applied)).unwrap();
    if left == Left::Settled {
        table.sync_and_stamp(GenerationId::new(2)).unwrap();
    }
    let mut record = UplinkRecord::new(volume, [3; 16]);
    record.base = GenerationId::new(2);
    record.base_digest = Some(total.image_digest);
    record.base_interval = Some(id(2));
    record.store(&record_path(dir)).unwrap();
    FILES
        .map(|name| (name, fs::read(dir.join(name)).unwrap()))
        .into()
}

/// How the damage was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// The record is not read, and named.
    Refused,
    /// At the opening: the table is compared with the vault's.
    Compared(TableDoubtShown),
    /// The vault refuses the interval; the tables are compared, and another one comes.
    Mismatch,
    /// By the next pass of the scrub.
    Scrub,
    /// Not at all: it is in what nobody reads, or was written anew.
    Nothing,
}

/// [`TableDoubt`], in an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum TableDoubtShown {
    Anew,
    Digest,
}

/// Makes the table that of the vault's head, as the comparison with the vault does.
fn compare(table: &BaseTable) {
    let repaired = table.to_repair().unwrap();
    repaired.rebuild_upper_levels().unwrap();
    let sums: Vec<_> = image(2).chunks(4096).map(block_checksum).collect();
    repaired.apply(geometry().all().iter().zip(sums)).unwrap();
    assert_eq!(repaired.digest().unwrap(), digest_of(image(2)));
    repaired.sync_and_stamp(GenerationId::new(2)).unwrap();
    table.set_sound(true);
}

/// Ships what has changed. None where the vault refuses it, because it comes to another digest.
fn ship(table: &BaseTable) -> Option<Vec<u8>> {
    static VOLUME: LazyLock<(MemoryImage, ImageDigest)> = LazyLock::new(|| {
        let volume = MemoryImage::new(geometry(), image(3).to_vec());
        (volume, digest_of(image(3)))
    });
    let (volume, digest) = &*VOLUME;
    let (total, gathered) = walk_all(volume, &table.table(), &changed(), 1 << 20);
    let mut vault = image(2).to_vec();
    let batches: Vec<_> = gathered
        .batches
        .iter()
        .map(|batch| (batch.end, batch.frames.clone()))
        .collect();
    apply(geometry(), &mut vault, &batches);
    // The vault comes to the digest of what it has.
    let is_volume = vault == image(3);
    let found = if is_volume {
        *digest
    } else {
        digest_of(&vault)
    };
    (found == total.image_digest).then_some(vault)
}

/// Opens what is there and ships.
fn opened(dir: &Path) -> Verdict {
    let path = record_path(dir);
    let record = match UplinkRecord::load(&path, VOLUME) {
        Ok(Some(record)) => record,
        Ok(None) => return Verdict::Refused,
        Err(error) => {
            let told = format!("{error:#}");
            assert!(told.contains(&path.display().to_string()), "{told}");
            return Verdict::Refused;
        }
    };
    let table = BaseTable::open(&table_path(dir), VOLUME, geometry()).unwrap();
    let mut verdict = match table_doubt(dir, &record, &table, true).unwrap() {
        None => Verdict::Nothing,
        Some(TableDoubt::Anew) => Verdict::Compared(TableDoubtShown::Anew),
        Some(TableDoubt::Digest) => Verdict::Compared(TableDoubtShown::Digest),
        Some(other) => panic!("{other}"),
    };
    table.set_sound(verdict == Verdict::Nothing);
    if verdict != Verdict::Nothing {
        compare(&table);
    } else if !table.table().is_whole(geometry().all()).unwrap() {
        verdict = Verdict::Scrub;
    }
    let shipped = ship(&table).unwrap_or_else(|| {
        assert!(
            verdict == Verdict::Scrub,
            "a table that was whole has a wrong digest"
        );
        verdict = Verdict::Mismatch;
        compare(&table);
        ship(&table).expect("the table is that of the vault now")
    });
    assert!(shipped == *image(3), "the generation is the volume");
    verdict
}

struct Scene {
    dir: tempfile::TempDir,
    files: Files,
    counts: BTreeMap<(String, Verdict), u64>,
}

impl Scene {
    fn new(how: Left) -> Self {
        let dir = super::crash::scratch();
        let files = left(dir.path(), VOLUME, how);
        let mut scene = Self {
            dir,
            files,
            counts: BTreeMap::new(),
        };
        assert_eq!(scene.with("pending", |_| {}), Verdict::Nothing, "undamaged");
        scene.counts.clear();
        scene
    }

    /// What is found after a file was damaged.
    fn with(&mut self, name: &'static str, damage: impl FnOnce(&mut Vec<u8>)) -> Verdict {
        self.put_back();
        let mut bytes = self.files[name].clone();
        damage(&mut bytes);
        fs::write(self.dir.path().join(name), bytes).unwrap();
        self.count(name)
    }

    fn put_back(&self) {
        for (name, bytes) in &self.files {
            fs::write(self.dir.path().join(name), bytes).unwrap();
        }
    }

    fn count(&mut self, name: &str) -> Verdict {
        let verdict = opened(self.dir.path());
        *self.counts.entry((name.to_owned(), verdict)).or_default() += 1;
        verdict
    }

    fn show(&self, what: Left) {
        for ((name, verdict), count) in &self.counts {
            println!("{what:?}: {count} of {name}: {verdict:?}");
        }
    }
}

/// Most of the table's bytes that are of no entry: a test beside the table flips each of them.
fn is_left_out(name: &str, at: usize) -> bool {
    name == "table" && !is_entry(at) && !at.is_multiple_of(101)
}

/// Whether a byte of the table is of an entry: one leaf, three groups, 70 blocks.
fn is_entry(at: usize) -> bool {
    [0..16, 4096..4096 + 48, 8192..8192 + 70 * 16]
        .iter()
        .any(|used| used.contains(&at))
}

#[test]
fn a_flipped_bit_at_every_byte_of_what_the_uplink_keeps_is_found_and_the_generation_is_right() {
    for how in [Left::Settled, Left::Applying] {
        let mut scene = Scene::new(how);
        let lengths = FILES.map(|name| (name, scene.files[name].len()));
        for (name, at) in lengths
            .into_iter()
            .flat_map(|(name, length)| (0..length).map(move |at| (name, at)))
            .filter(|(name, at)| !is_left_out(name, *at))
        {
            let verdict = scene.with(name, |bytes| bytes[at] ^= 1 << (at % 8));
            let known = match (name, verdict) {
                ("uplink", Verdict::Refused) => true,
                ("table.stamp", Verdict::Compared(TableDoubtShown::Anew)) => true,
                ("table", found) if how == Left::Settled => {
                    is_entry(at) == (found != Verdict::Nothing)
                }
                // What was being applied is applied again, and the upper levels are made anew.
                ("table", found) => found == Verdict::Nothing || is_entry(at),
                ("pending", found) if how == Left::Settled => found == Verdict::Nothing,
                ("pending", found) => found == Verdict::Compared(TableDoubtShown::Digest),
                _ => false,
            };
            assert!(known, "byte {at} of {name}, {how:?}: {verdict:?}");
        }
        scene.show(how);
        if how == Left::Settled {
            for verdict in [
                Verdict::Compared(TableDoubtShown::Digest),
                Verdict::Mismatch,
                Verdict::Scrub,
            ] {
                assert!(
                    scene.counts[&("table".to_owned(), verdict)] > 10,
                    "{verdict:?}"
                );
            }
        }
    }
}

#[test]
fn files_of_the_uplink_that_are_cut_short_gone_or_another_volumes_are_found() {
    for how in [Left::Settled, Left::Applying] {
        let mut scene = Scene::new(how);
        let other = super::crash::scratch();
        let others = left(other.path(), OTHER, how);
        for name in FILES {
            let mut found = Vec::new();
            let length = scene.files[name].len();
            for length in (0..length).step_by(if length > 1000 { 331 } else { 13 }) {
                found.push(scene.with(name, |bytes| bytes.truncate(length)));
            }
            let all = scene.files.clone();
            for (_, bytes) in all.iter().filter(|(from, _)| **from != name) {
                found.push(scene.with(name, |here| here.clone_from(bytes)));
            }
            // The table itself names no volume: the same bytes are the same table.
            if name != "table" {
                found.push(scene.with(name, |here| here.clone_from(&others[name])));
            }
            scene.put_back();
            fs::remove_file(scene.dir.path().join(name)).unwrap();
            found.push(scene.count(name));
            let unread = name == "pending" && how == Left::Settled;
            assert!(
                found
                    .iter()
                    .all(|verdict| (*verdict == Verdict::Nothing) == unread),
                "{name}, {how:?}: {found:?}"
            );
        }
        scene.show(how);
    }
}

#[test]
fn files_of_the_uplink_that_the_disk_cannot_read_cost_what_damaged_ones_do() {
    for how in [Left::Settled, Left::Applying] {
        let mut scene = Scene::new(how);
        for name in ["uplink", "table.stamp", "pending"] {
            let damaged = scene.with(name, |bytes| bytes[40] ^= 1);
            scene.put_back();
            let path = scene.dir.path().join(name);
            fs::remove_file(&path).unwrap();
            // A file of which no byte can be read: this process has nothing at its first address.
            std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap();
            let told = fs::read(&path).unwrap_err();
            assert!(tidemark_disk::guarded_map::is_unreadable(&told));
            assert_eq!(scene.count(name), damaged, "{name}, {how:?}");
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn the_table_of_another_image_is_found_at_the_opening() {
    let mut scene = Scene::new(Left::Settled);
    let other = super::crash::scratch();
    let applied = left(other.path(), VOLUME, Left::Applying);
    let verdict = scene.with("table", |bytes| bytes.clone_from(&applied["table"]));
    assert_eq!(verdict, Verdict::Compared(TableDoubtShown::Digest));
}
