//! Creating, opening and removing a volume's clones and their record.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use capture_core::{
    engine::{records::FileIdentity, trust::replaced},
    reflink::state::{Base, State},
};
use parking_lot::Mutex;
use tidemark_block::{Epoch, Geometry, VolumeId};
use tidemark_disk::durable;

use super::{
    super::{EngineError, EngineOptions, EngineSetup, Trust, lock_state, volume_file},
    CloneReader, Clones, IntervalCut, Now, Reflink, clones,
    compare::changed_since,
    explain,
};

/// In pieces of this many bytes the filesystem is to allocate a file that is still empty.
const EXTENT_BYTES: u32 = 1 << 20;

/// Where the record lies in a volume's state directory.
fn record_path(dir: &Path) -> PathBuf {
    dir.join("reflink")
}

/// Whether a state directory has a record of clones.
pub(in super::super) fn has_record(dir: &Path) -> bool {
    record_path(dir).exists()
}

/// The volume file, and the directory of its clones.
struct Opened {
    source: File,
    identity: FileIdentity,
    clones: Clones,
}

impl Opened {
    fn new(file: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self, EngineError> {
        let source = volume_file::open_to_read(file, geometry)?;
        let failed =
            |action: &str, error| EngineError::io(format!("{action} {}", file.display()), error);
        Ok(Self {
            identity: volume_file::identity(&source)
                .map_err(|error| failed("identify volume file", error))?,
            clones: Clones::beside(file, volume)
                .map_err(|error| failed("find the folder of volume file", error))?,
            source,
        })
    }

    /// The directory, so that clones can be made in it.
    fn ready(&self, state: &mut State, dir: &Path) -> Result<(), EngineError> {
        let path = self.clones.path();
        self.clones
            .create_dir()
            .map_err(|source| EngineError::NoClones {
                path: path.to_owned(),
                source,
            })?;
        state.dir = path.as_os_str().as_bytes().to_vec();
        state.file = self.identity;
        state.boot = self.identity.boot;
        state.mount = File::open(dir)
            .and_then(|dir| volume_file::mount_id(&dir))
            .map_err(|error| EngineError::io(format!("identify {}", dir.display()), error))?;
        Ok(())
    }
}

/// Makes the state of a new volume and opens it, once a clone of its file could be made in time.
pub(super) fn create(setup: EngineSetup<'_>) -> Result<Reflink, EngineError> {
    let (dir, volume) = (setup.dir, setup.volume);
    durable::create_dir(dir)
        .map_err(|error| EngineError::io(format!("create {}", dir.display()), error))?;
    if has_record(dir) {
        return Err(EngineError::StateExists {
            path: dir.to_owned(),
        });
    }
    prepare(&setup, Base::Zero)?;
    let opened = open(setup, false);
    if opened.is_err() {
        // Best effort, as the caller removes what is left.
        let _ = remove_state(dir, volume);
    }
    opened.map(|(engine, _)| engine)
}

/// Writes the record of a volume whose clones are compared with `base` from now on: with [`Base::Lost`], every block is.
/// Tries first whether the file can be cloned, and in time. What was recorded before is replaced.
pub(in super::super) fn prepare(setup: &EngineSetup<'_>, base: Base) -> Result<(), EngineError> {
    let (volume, geometry) = (setup.volume, setup.geometry);
    let opened = Opened::new(setup.file, volume, geometry)?;
    volume_file::keep_whole(&opened.source, EXTENT_BYTES);
    let mut state = State::new(volume, geometry, opened.identity, base);
    if base == Base::Lost {
        state.doubt_everything();
    }
    opened.ready(&mut state, setup.dir)?;
    let tried = try_out(&opened, setup.file, &setup.options).and_then(|()| {
        let record = record_path(setup.dir);
        durable::write_file(&record, &state.encode())
            .map_err(|error| EngineError::io(format!("write {}", record.display()), error))
    });
    if tried.is_err() {
        // Nothing names it. What can't be removed is an empty directory.
        let _ = clones::remove_dir(opened.clones.path(), volume);
    }
    tried
}

/// Makes a clone, and removes it.
fn try_out(opened: &Opened, file: &Path, options: &EngineOptions) -> Result<(), EngineError> {
    let made = opened.clones.make(&opened.source, 0);
    let made = made.map_err(|error| explain(error, file, &AtomicBool::new(false)))?;
    opened.clones.remove(0);
    match options.cut_stall_max.filter(|most| made.stall > *most) {
        Some(most) => Err(EngineError::CutStalls {
            path: file.to_owned(),
            took: made.stall,
            most,
        }),
        None => Ok(()),
    }
}

/// The record in a state directory, which must be of this volume. One that is damaged or missing is made up for where the
/// volume is readopted.
fn read_state(
    dir: &Path,
    volume: VolumeId,
    geometry: Geometry,
    identity: FileIdentity,
    anew: bool,
) -> Result<State, EngineError> {
    let path = record_path(dir);
    let recorded = match fs::read(&path) {
        Ok(bytes) => State::decode(&bytes).map_err(|error| error.to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err("it is missing".to_owned()),
        Err(error) => return Err(EngineError::io(format!("read {}", path.display()), error)),
    };
    let state = match recorded {
        Ok(state) => state,
        Err(what) if anew => {
            tracing::error!(%volume, file = %path.display(), what, "the record of the clones can't be used: snapshots are gone");
            State::new(volume, geometry, identity, Base::Lost)
        }
        Err(what) => return Err(EngineError::StateDamaged { path, what }),
    };
    volume_file::check_record(dir, (state.volume, state.geometry), (volume, geometry))?;
    Ok(state)
}

/// Opens a volume's record and brings the clones in line with it.
pub(super) fn open(setup: EngineSetup<'_>, anew: bool) -> Result<(Reflink, Trust), EngineError> {
    let EngineSetup {
        dir,
        volume,
        file,
        geometry,
        options,
    } = setup;
    let lock = lock_state(dir)?;
    let opened = Opened::new(file, volume, geometry)?;
    let mut state = read_state(dir, volume, geometry, opened.identity, anew)?;
    if let (false, Some(what)) = (anew, replaced(&state.file, &opened.identity)) {
        return Err(EngineError::VolumeReplaced {
            path: file.to_owned(),
            what,
        });
    }
    let (boot, mount) = (state.boot, state.mount);
    opened.ready(&mut state, dir)?;
    let stores_kept = (boot, mount) == (state.boot, state.mount);
    let length = geometry.length();
    let failed = |error| {
        EngineError::io(
            format!("look at the clones in {}", opened.clones.path().display()),
            error,
        )
    };
    // Read first: a disk that can't tell is no reason to give a clone up.
    for clone in state.clones() {
        opened.clones.open(clone, length).map_err(failed)?;
    }
    let lost = state.missing(|clone| matches!(opened.clones.open(clone, length), Ok(Some(_))));
    for loss in &lost {
        tracing::error!(%volume, clones = %opened.clones.path().display(), "{loss}");
    }
    if anew {
        state.interval = None;
        state.doubt_everything();
    }
    let record = record_path(dir);
    durable::write_file(&record, &state.encode())
        .map_err(|error| EngineError::io(format!("write {}", record.display()), error))?;
    opened
        .clones
        .sweep(|cut| state.names(cut))
        .map_err(failed)?;
    let trust = if anew {
        Trust::Everything {
            reason: "the volume was readopted".to_owned(),
        }
    } else if let Some(loss) = lost.first() {
        Trust::Everything {
            reason: loss.to_string(),
        }
    } else {
        Trust::Clones { stores_kept }
    };
    let now = now(&opened.clones, state)?;
    let engine = Reflink {
        volume,
        geometry,
        path: file.to_owned(),
        source: opened.source,
        record,
        clones: opened.clones,
        options,
        cutting: Mutex::default(),
        changing: Mutex::default(),
        now: Mutex::new(now),
        closed: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        _lock: lock,
    };
    Ok((engine, trust))
}

/// Opens what the record names, and finds once more what the open interval holds.
fn now(clones: &Clones, state: State) -> Result<Now, EngineError> {
    let geometry = state.geometry;
    let reader = |clone| match clones.open(clone, geometry.length()) {
        Ok(Some(file)) => Ok(CloneReader::in_passes(file, clone.cut, geometry)),
        Ok(None) => Err(EngineError::io(
            format!("open {}", clones.path_of(clone.cut).display()),
            io::ErrorKind::NotFound.into(),
        )),
        Err(error) => Err(EngineError::io(
            format!("open {}", clones.path_of(clone.cut).display()),
            error,
        )),
    };
    let base = match state.base {
        Base::Clone(clone) => Some(reader(clone)?),
        Base::Zero | Base::Lost => None,
    };
    let interval = match &state.interval {
        None => None,
        Some(open) => {
            let reader = reader(open.clone)?;
            let found = changed_since(state.volume, state.base, base.as_ref(), &reader)?;
            let mut changed = found.changed;
            changed.union_with(&open.doubted);
            Some(IntervalCut {
                epoch: Epoch::new(open.clone.cut),
                changed: Arc::new(changed),
                reader,
            })
        }
    };
    Ok(Now {
        state,
        interval,
        base,
        stall: Duration::ZERO,
        extents: 0,
    })
}

/// The directory of the clones, where it is recorded and not there: its filesystem isn't mounted, or somebody has taken
/// it away.
pub(in super::super) fn missing_clones(dir: &Path, volume: VolumeId) -> Option<PathBuf> {
    let state = State::decode(&fs::read(record_path(dir)).ok()?).ok()?;
    let clones = PathBuf::from(OsStr::from_bytes(&state.dir));
    (state.volume == volume && !clones.is_dir()).then_some(clones)
}

/// Removes the clones and then their record. Nothing happens where there is none.
pub(in super::super) fn remove_state(dir: &Path, volume: VolumeId) -> io::Result<()> {
    let path = record_path(dir);
    match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(bytes) => match State::decode(&bytes) {
            Ok(state) if state.volume == volume => {
                clones::remove_dir(Path::new(OsStr::from_bytes(&state.dir)), volume)?;
            }
            Ok(_) | Err(_) => tracing::warn!(
                %volume, file = %path.display(),
                "the record of the clones can't be used: they stay in the directory .tidemark-{volume} beside the volume file"
            ),
        },
    }
    durable::remove_file(&path)
}
