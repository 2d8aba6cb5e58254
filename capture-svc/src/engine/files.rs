//! The files of one volume, as what the decisions stand on.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use capture_core::engine::{
    capture::TRACKING_WORDS,
    dirty::DirtyLayout,
    intent::{PAGE_LEN, encode_page, page_count, place_of},
    media::{Map, Media, MediaError, MediaResult, Record},
    records::{
        DIRTY_MAGIC, SLOTS_MAGIC, SnapshotTable, TRACKING_MAGIC, encode_carry, encode_map_header,
    },
    spool::{ENTRY_WORDS, SpoolLimits},
};
use tidemark_block::{Geometry, VolumeId};
use tidemark_disk::{durable, guarded_map::VolumeMap};

use super::{mapped::MappedWords, stripes::Stripes, volume_file};

/// Entries by which the slots' file grows.
const ENTRIES_STEP: u64 = 16 << 10;
/// Bytes by which the spool's file grows.
const SPOOL_STEP: u64 = 64 << 20;
/// Every file of the engine, so that a creation that failed can be undone.
const NAMES: [&str; 10] = [
    "identity",
    "tracking",
    "dirty.0",
    "dirty.1",
    "intent",
    "spool.data",
    "spool.slots",
    "snapshots",
    "carry",
    "interval",
];

/// The files of a volume.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    block_len: u64,
    volume: Arc<File>,
    map: VolumeMap,
    tracking: MappedWords,
    dirty: [MappedWords; 2],
    slots: MappedWords,
    entries_max: u64,
    spool: File,
    spool_len: AtomicU64,
    slots_max: u64,
    intent: File,
    stripes: Stripes,
}

/// Whether the files that are updated in place were found whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wholeness {
    Whole,
    /// This one was missing or damaged; all were made anew.
    Lost(&'static str),
}

fn errno(error: &io::Error) -> MediaError {
    MediaError(error.raw_os_error().unwrap_or(libc::EIO))
}

fn done<T>(result: io::Result<T>) -> MediaResult<T> {
    result.map_err(|error| errno(&error))
}

/// Bounds of the spool by the room on disk and in memory.
pub(super) const fn limits(bytes_max: u64, entries_max: u64, geometry: Geometry) -> SpoolLimits {
    let slots_max = bytes_max / geometry.block_size().get() as u64;
    SpoolLimits {
        entries_max,
        slots_max,
    }
}

/// Removes every file of the engine from a directory.
pub(super) fn remove_all(dir: &Path) -> io::Result<()> {
    for name in NAMES {
        durable::remove_file(&dir.join(name))?;
    }
    durable::remove_dir(&dir.join("changes"))
}

fn record_path(dir: &Path, record: Record) -> PathBuf {
    match record {
        Record::Carry => dir.join("carry"),
        Record::Interval => dir.join("interval"),
        Record::Snapshots => dir.join("snapshots"),
        Record::Changes(cut) => dir.join("changes").join(cut.to_string()),
    }
}

/// Puts every block into the carry and drops all cuts, durably, before files are made anew: from then on the empty
/// ones look like any others, and an opening that ends early must not be followed by one that trusts them.
fn doubt_everything(dir: &Path, geometry: Geometry) -> io::Result<()> {
    let put = |record, content: &[u8]| durable::write_file(&record_path(dir, record), content);
    let all = std::iter::once(geometry.all()).collect();
    put(Record::Carry, &encode_carry(&all))?;
    let last_id = match fs::read(record_path(dir, Record::Snapshots)) {
        // A damaged table tells no number; the recovery makes the same of it.
        Ok(bytes) => SnapshotTable::decode(&bytes).map_or(0, |table| table.last_id),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let snapshots = SnapshotTable {
        last_id,
        snapshots: Vec::new(),
    };
    put(Record::Snapshots, &snapshots.encode())?;
    durable::remove_file(&record_path(dir, Record::Interval))
}

impl Files {
    /// Makes the files that are updated in place, all empty.
    pub(super) fn create(
        dir: &Path,
        id: VolumeId,
        geometry: Geometry,
        limits: SpoolLimits,
        volume: File,
    ) -> io::Result<Self> {
        durable::create_dir(&dir.join("changes"))?;
        let words = DirtyLayout::new(geometry.block_count().get()).total() as u64;
        let mapped = |name: &str, magic, words, max| {
            MappedWords::create(
                &dir.join(name),
                &encode_map_header(magic, id, geometry),
                words,
                max,
            )
        };
        let tracking = mapped("tracking", TRACKING_MAGIC, TRACKING_WORDS as u64, 0)?;
        let dirty = [
            mapped("dirty.0", DIRTY_MAGIC[0], words, 0)?,
            mapped("dirty.1", DIRTY_MAGIC[1], words, 0)?,
        ];
        let slots = mapped(
            "spool.slots",
            SLOTS_MAGIC,
            0,
            limits.entries_max * ENTRY_WORDS as u64,
        )?;
        durable::remove_file(&dir.join("spool.data"))?;
        let intent = create_intent(&dir.join("intent"), id, geometry)?;
        Self::assemble(
            dir, geometry, limits, volume, tracking, dirty, slots, intent,
        )
    }

    /// Opens the files. If one that is updated in place isn't whole, every block joins the carry and all of them are
    /// made anew.
    pub(super) fn open(
        dir: &Path,
        id: VolumeId,
        geometry: Geometry,
        limits: SpoolLimits,
        volume: File,
    ) -> io::Result<(Self, Wholeness)> {
        let words = DirtyLayout::new(geometry.block_count().get()).total() as u64;
        let mapped = |name: &str, magic, words, max| {
            MappedWords::open(
                &dir.join(name),
                &encode_map_header(magic, id, geometry),
                words,
                max,
            )
        };
        let intent_len = page_count(regions(geometry)) as u64 * 2 * PAGE_LEN as u64;
        let intent = File::options()
            .read(true)
            .write(true)
            .open(dir.join("intent"))
            .ok();
        let intent =
            intent.filter(|file| file.metadata().is_ok_and(|found| found.len() == intent_len));
        let found = (
            mapped("tracking", TRACKING_MAGIC, TRACKING_WORDS as u64, 0)?,
            mapped("dirty.0", DIRTY_MAGIC[0], words, 0)?,
            mapped("dirty.1", DIRTY_MAGIC[1], words, 0)?,
            mapped(
                "spool.slots",
                SLOTS_MAGIC,
                0,
                limits.entries_max * ENTRY_WORDS as u64,
            )?,
            intent,
        );
        let lost = match &found {
            (None, ..) => "tracking",
            (_, None, ..) => "dirty.0",
            (_, _, None, ..) => "dirty.1",
            (_, _, _, None, _) => "spool.slots",
            (.., None) => "intent",
            _ => "",
        };
        if let (Some(tracking), Some(even), Some(odd), Some(slots), Some(intent)) = found {
            durable::create_dir(&dir.join("changes"))?;
            let dirty = [even, odd];
            let files = Self::assemble(
                dir, geometry, limits, volume, tracking, dirty, slots, intent,
            )?;
            return Ok((files, Wholeness::Whole));
        }
        doubt_everything(dir, geometry)?;
        Ok((
            Self::create(dir, id, geometry, limits, volume)?,
            Wholeness::Lost(lost),
        ))
    }

    #[allow(clippy::too_many_arguments, reason = "the two constructors above")]
    fn assemble(
        dir: &Path,
        geometry: Geometry,
        limits: SpoolLimits,
        volume: File,
        tracking: MappedWords,
        dirty: [MappedWords; 2],
        slots: MappedWords,
        intent: File,
    ) -> io::Result<Self> {
        let spool = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join("spool.data"))?;
        let volume = Arc::new(volume);
        Ok(Self {
            dir: dir.to_owned(),
            block_len: geometry.block_size().get().into(),
            map: VolumeMap::new(Arc::clone(&volume), geometry.length()),
            volume,
            tracking,
            dirty,
            slots,
            entries_max: limits.entries_max,
            spool_len: AtomicU64::new(spool.metadata()?.len()),
            spool,
            slots_max: limits.slots_max,
            intent,
            stripes: Stripes::default(),
        })
    }

    /// The volume's file.
    pub(super) fn volume(&self) -> &File {
        &self.volume
    }

    /// Makes everything durable that is updated in place.
    pub(super) fn sync_state(&self) -> io::Result<()> {
        self.tracking.sync()?;
        self.dirty[0].sync()?;
        self.dirty[1].sync()?;
        self.spool.sync_all()?;
        self.slots.sync()?;
        self.intent.sync_all()
    }

    fn mapped(&self, map: Map) -> &MappedWords {
        match map {
            Map::Tracking => &self.tracking,
            Map::Dirty(parity) => &self.dirty[usize::from(parity)],
            Map::Slots => &self.slots,
        }
    }

    fn grow_spool(&self, slots: u64) -> io::Result<u64> {
        let now = self.spool_len.load(SeqCst);
        let wanted = slots.min(self.slots_max) * self.block_len;
        if wanted <= now {
            return Ok(now / self.block_len);
        }
        let most = self.slots_max * self.block_len;
        let length = (wanted.div_ceil(SPOOL_STEP) * SPOOL_STEP).min(most);
        durable::extend_allocated(&self.spool, now, length)?;
        self.spool_len.store(length, SeqCst);
        Ok(length / self.block_len)
    }
}

/// Bytes of a region of the intent map.
pub(super) const REGION_LEN: u64 = 1 << 20;

fn regions(geometry: Geometry) -> u64 {
    geometry.length().div_ceil(REGION_LEN)
}

/// Makes an intent file with no region set. Its bytes are written, not only allocated: so that no later sync has to
/// record that they are in use now.
fn create_intent(path: &Path, id: VolumeId, geometry: Geometry) -> io::Result<File> {
    durable::remove_file(path)?;
    let pages = page_count(regions(geometry)) as u64;
    let file = durable::open_allocated(path, pages * 2 * PAGE_LEN as u64)?;
    let at = |place: u64| place * PAGE_LEN as u64;
    for number in 0..pages {
        file.write_all_at(&[0; PAGE_LEN], at(place_of(number, 0)))?;
        let page = encode_page(id, number, 1, &[0; _]);
        file.write_all_at(&page[..], at(place_of(number, 1)))?;
    }
    file.sync_all()?;
    Ok(file)
}

impl Media for Files {
    fn read_volume(&self, offset: u64, buffer: &mut [u8]) -> MediaResult {
        done(self.map.read_into(offset, buffer))
    }

    fn write_volume(&self, offset: u64, data: &[u8]) -> MediaResult {
        done(self.volume.write_all_at(data, offset))
    }

    fn zero_volume(&self, offset: u64, length: u64, allocated: bool) -> MediaResult {
        done(volume_file::zero(&self.volume, offset, length, allocated))
    }

    fn sync_volume(&self) -> MediaResult {
        done(self.volume.sync_data())
    }

    fn drop_volume_cache(&self) -> MediaResult {
        done(volume_file::drop_cache(&self.volume))
    }

    fn read_before(&self, slot: u64, buffer: &mut [u8]) -> MediaResult {
        done(self.spool.read_exact_at(buffer, slot * self.block_len))
    }

    fn write_before(&self, slot: u64, data: &[u8]) -> MediaResult {
        done(self.spool.write_all_at(data, slot * self.block_len))
    }

    fn reserve(&self, entries: u64, slots: u64) -> MediaResult<(u64, u64)> {
        let words = ENTRY_WORDS as u64;
        let entries = (entries.div_ceil(ENTRIES_STEP) * ENTRIES_STEP).min(self.entries_max);
        let entries = done(self.slots.grow(entries * words))? / words;
        Ok((entries, done(self.grow_spool(slots))?))
    }

    fn read_intent(&self, place: u64, page: &mut [u8]) -> MediaResult {
        done(self.intent.read_exact_at(page, place * PAGE_LEN as u64))
    }

    fn write_intent(&self, place: u64, page: &[u8]) -> MediaResult {
        done(self.intent.write_all_at(page, place * PAGE_LEN as u64))
    }

    fn sync_intent(&self) -> MediaResult {
        done(self.intent.sync_data())
    }

    fn put(&self, record: Record, content: Option<&[u8]>) -> MediaResult {
        let path = record_path(&self.dir, record);
        done(match content {
            Some(content) => durable::write_file(&path, content),
            None => durable::remove_file(&path),
        })
    }

    fn get(&self, record: Record) -> MediaResult<Option<Vec<u8>>> {
        match fs::read(record_path(&self.dir, record)) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(errno(&error)),
        }
    }

    fn changes(&self) -> MediaResult<Vec<u64>> {
        let mut cuts = Vec::new();
        for entry in done(fs::read_dir(self.dir.join("changes")))? {
            // Temporaries of a replacement that a crash interrupted have other names.
            if let Some(Ok(cut)) = done(entry)?.file_name().to_str().map(str::parse) {
                cuts.push(cut);
            }
        }
        Ok(cuts)
    }

    fn words(&self, map: Map) -> &[AtomicU64] {
        self.mapped(map).words()
    }

    fn reset(&self, map: Map) -> MediaResult {
        done(self.mapped(map).reset())
    }

    fn lock(&self, first: u64, last: u64) -> bool {
        self.stripes.lock(first, last);
        true
    }

    fn unlock(&self, first: u64, last: u64) {
        self.stripes.unlock(first, last);
    }
}
