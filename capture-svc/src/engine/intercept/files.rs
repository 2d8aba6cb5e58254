//! The files of one volume, as what the decisions stand on.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, SeqCst},
            fence,
        },
    },
};

use capture_core::engine::{
    capture::TRACKING_WORDS,
    damage::{Damage, Fault, StateFile},
    dirty::DirtyLayout,
    intent::{PAGE_LEN, PAGE_WORDS, encode_page, page_count, place_of},
    media::{Map, Media, MediaError, MediaResult, Record},
    records::{SnapshotTable, encode_carry, encode_interval, encode_map_header},
    spool::{ENTRY_WORDS, SpoolLimits},
};
use tidemark_block::{BlockSet, Geometry, VolumeId};
use tidemark_disk::{
    durable,
    guarded_map::{VolumeMap, is_unreadable},
};

use super::{
    mapped::{MappedWords, Size},
    stripes::Stripes,
    volume_file,
};

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

fn errno(error: &io::Error) -> MediaError {
    MediaError(error.raw_os_error().unwrap_or(libc::EIO))
}

fn done<T>(result: io::Result<T>) -> MediaResult<T> {
    result.map_err(|error| errno(&error))
}

/// What was read of a file of the state, or what is wrong with a file that is missing or that the disk can't read.
pub(super) fn found<T>(read: io::Result<T>) -> io::Result<Result<T, Fault>> {
    match read {
        Ok(read) => Ok(Ok(read)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Err(Fault::Missing)),
        Err(error) if is_unreadable(&error) => Ok(Err(Fault::Unreadable)),
        Err(error) => Err(error),
    }
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

/// Where a file of the state lies.
pub(super) fn path_of(dir: &Path, file: impl Into<StateFile>) -> PathBuf {
    dir.join(file.into().to_string())
}

/// The cuts of the records of changes that there are.
pub(super) fn changes(dir: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(dir.join("changes")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut cuts = Vec::new();
    for entry in entries {
        // Temporaries of a replacement that a crash interrupted have other names.
        if let Some(Ok(cut)) = entry?.file_name().to_str().map(str::parse) {
            cuts.push(cut);
        }
    }
    Ok(cuts)
}

/// Writes every record of a state that has no cut: all of it durable on return.
pub(super) fn put_records(
    dir: &Path,
    id: VolumeId,
    carry: &BlockSet,
    last_id: u64,
) -> io::Result<()> {
    let put = |record: Record, content: &[u8]| durable::write_file(&path_of(dir, record), content);
    put(Record::Carry, &encode_carry(id, carry))?;
    let snapshots = SnapshotTable {
        last_id,
        snapshots: Vec::new(),
    };
    put(Record::Snapshots, &snapshots.encode(id))?;
    put(Record::Interval, &encode_interval(id, None))
}

/// Puts every block into the carry and drops all cuts, durably, before files are made anew: from then on the empty
/// ones look like any others, and an opening that ends early must not be followed by one that trusts them.
fn doubt_everything(
    dir: &Path,
    id: VolumeId,
    geometry: Geometry,
    epoch_limit: u64,
) -> io::Result<()> {
    let all = std::iter::once(geometry.all()).collect();
    let table = found(fs::read(path_of(dir, Record::Snapshots)))?
        .ok()
        .and_then(|bytes| SnapshotTable::decode(&bytes, id).ok());
    // Each number was given in an epoch of its own.
    put_records(
        dir,
        id,
        &all,
        table.map_or(epoch_limit, |table| table.last_id),
    )
}

/// How many words a mapped file has.
pub(super) fn size_of(map: Map, geometry: Geometry, limits: SpoolLimits) -> Size {
    match map {
        Map::Tracking => Size::Fixed(TRACKING_WORDS as u64),
        Map::Dirty(_) => Size::Fixed(DirtyLayout::new(geometry.block_count().get()).total() as u64),
        Map::Slots => Size::Growing {
            entry: ENTRY_WORDS as u64,
            max: limits.entries_max * ENTRY_WORDS as u64,
        },
    }
}

/// Opens the intent file.
fn open_intent(path: &Path, geometry: Geometry) -> io::Result<Result<File, Fault>> {
    let file = match found(File::options().read(true).write(true).open(path))? {
        Ok(file) => file,
        Err(fault) => return Ok(Err(fault)),
    };
    let length = page_count(regions(geometry)) as u64 * 2 * PAGE_LEN as u64;
    Ok(if file.metadata()?.len() == length {
        Ok(file)
    } else {
        Err(Fault::Length)
    })
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
        let mapped = |map| {
            let header = encode_map_header(map, id, geometry);
            let size = size_of(map, geometry, limits);
            MappedWords::create(&path_of(dir, map), &header, size)
        };
        let tracking = mapped(Map::Tracking)?;
        let dirty = [mapped(Map::Dirty(0))?, mapped(Map::Dirty(1))?];
        let slots = mapped(Map::Slots)?;
        durable::remove_file(&path_of(dir, StateFile::Spool))?;
        let intent = create_intent(&path_of(dir, StateFile::Intent), id, geometry, |_| {
            [0; PAGE_WORDS]
        })?;
        Self::assemble(
            dir, geometry, limits, volume, tracking, dirty, slots, intent,
        )
    }

    /// Opens the files. If one that is updated in place isn't whole, every block joins the carry, all of them are made
    /// anew, and the damage is given.
    pub(super) fn open(
        dir: &Path,
        id: VolumeId,
        geometry: Geometry,
        limits: SpoolLimits,
        volume: File,
        epoch_limit: u64,
    ) -> io::Result<(Self, Option<Damage>)> {
        let mut damage = None;
        let mut mapped = |map| {
            let header = encode_map_header(map, id, geometry);
            let size = size_of(map, geometry, limits);
            let opened = MappedWords::open(&path_of(dir, map), &header, size)?;
            Ok::<_, io::Error>(whole(map.into(), opened, &mut damage))
        };
        let tracking = mapped(Map::Tracking)?;
        let dirty = [mapped(Map::Dirty(0))?, mapped(Map::Dirty(1))?];
        let slots = mapped(Map::Slots)?;
        let intent = open_intent(&path_of(dir, StateFile::Intent), geometry)?;
        let intent = whole(StateFile::Intent, intent, &mut damage);
        if let (Some(tracking), [Some(even), Some(odd)], Some(slots), Some(intent)) =
            (tracking, dirty, slots, intent)
        {
            durable::create_dir(&dir.join("changes"))?;
            let dirty = [even, odd];
            let files = Self::assemble(
                dir, geometry, limits, volume, tracking, dirty, slots, intent,
            )?;
            return Ok((files, None));
        }
        doubt_everything(dir, id, geometry, epoch_limit)?;
        Ok((Self::create(dir, id, geometry, limits, volume)?, damage))
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

pub(super) fn regions(geometry: Geometry) -> u64 {
    geometry.length().div_ceil(REGION_LEN)
}

/// What was opened; a fault becomes the damage, unless there is one already.
fn whole<T>(file: StateFile, opened: Result<T, Fault>, damage: &mut Option<Damage>) -> Option<T> {
    opened
        .map_err(|fault| {
            damage
                .get_or_insert(Damage::everything(file, fault))
                .clone()
        })
        .ok()
}

/// Makes an intent file with pages of these bits, in both of their places. They are written, not only allocated: so that
/// no later sync has to record that they are in use now.
pub(super) fn create_intent(
    path: &Path,
    id: VolumeId,
    geometry: Geometry,
    bits: impl Fn(u64) -> [u64; PAGE_WORDS],
) -> io::Result<File> {
    durable::remove_file(path)?;
    let pages = page_count(regions(geometry)) as u64;
    let file = durable::open_allocated(path, pages * 2 * PAGE_LEN as u64)?;
    for (number, sequence) in (0..pages).flat_map(|number| [(number, 0), (number, 1)]) {
        let page = encode_page(id, number, sequence, &bits(number));
        file.write_all_at(&page[..], place_of(number, sequence) * PAGE_LEN as u64)?;
    }
    file.sync_all()?;
    Ok(file)
}

impl Media for Files {
    fn read_volume(&self, offset: u64, buffer: &mut [u8]) -> MediaResult {
        let read = self.map.read_into(offset, buffer);
        // The bytes come by plain loads, which a processor may put off until after those that follow.
        fence(Acquire);
        done(read)
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
        let path = path_of(&self.dir, record);
        done(match content {
            Some(content) => durable::write_file(&path, content),
            None => durable::remove_file(&path),
        })
    }

    fn get(&self, record: Record) -> MediaResult<Option<Vec<u8>>> {
        match fs::read(path_of(&self.dir, record)) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(errno(&error)),
        }
    }

    fn changes(&self) -> MediaResult<Vec<u64>> {
        done(changes(&self.dir))
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
