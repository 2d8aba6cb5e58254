//! Creating, opening and removing the state of a volume that is scanned.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use capture_core::{
    engine::{records::FileIdentity, trust::replaced},
    scan::state::State,
};
use parking_lot::Mutex;
use tidemark_block::{Epoch, Geometry, VolumeId};
use tidemark_disk::durable;

use super::{
    super::{EngineError, EngineSetup, Trust, lock_state, volume_file},
    IntervalCut, Kept, Now, Scan, ScanReader, Source,
    kept::{path_in, sweep},
};

/// Where the record lies in a volume's state directory.
pub(super) fn record_path(dir: &Path) -> PathBuf {
    dir.join("scan")
}

/// Whether a state directory has the record of a volume that is scanned.
pub(in super::super) fn has_record(dir: &Path) -> bool {
    record_path(dir).exists()
}

fn identity(source: &Source, file: &Path) -> Result<FileIdentity, EngineError> {
    volume_file::identity(source.file())
        .map_err(|error| EngineError::io(format!("identify volume file {}", file.display()), error))
}

/// Notes which boot and which mount of the state's directory this is.
fn notes_place(state: &mut State, dir: &Path, identity: FileIdentity) -> Result<(), EngineError> {
    state.file = identity;
    state.boot = identity.boot;
    state.mount = File::open(dir)
        .and_then(|dir| volume_file::mount_id(&dir))
        .map_err(|error| EngineError::io(format!("identify {}", dir.display()), error))?;
    Ok(())
}

fn write(dir: &Path, state: &State) -> Result<(), EngineError> {
    let path = record_path(dir);
    durable::write_file(&path, &state.encode())
        .map_err(|error| EngineError::io(format!("write {}", path.display()), error))
}

/// Makes the state of a new volume and opens it.
pub(super) fn create(setup: EngineSetup<'_>) -> Result<Scan, EngineError> {
    let dir = setup.dir;
    durable::create_dir(dir)
        .map_err(|error| EngineError::io(format!("create {}", dir.display()), error))?;
    if has_record(dir) {
        return Err(EngineError::StateExists {
            path: dir.to_owned(),
        });
    }
    prepare(&setup)?;
    let opened = open(setup, false);
    if opened.is_err() {
        // Best effort, as the caller removes what is left.
        let _ = remove_state(dir);
    }
    opened.map(|(engine, _)| engine)
}

/// Writes the record of a volume of which nothing was cut by this engine yet, if the file can be scanned.
pub(in super::super) fn prepare(setup: &EngineSetup<'_>) -> Result<(), EngineError> {
    let source = Source::open(setup.file, setup.geometry)?;
    let identity = identity(&source, setup.file)?;
    let mut state = State::new(setup.volume, setup.geometry, identity);
    notes_place(&mut state, setup.dir, identity)?;
    write(setup.dir, &state)
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
            tracing::error!(%volume, file = %path.display(), what, "the record of the scans can't be used: it is made anew");
            State::new(volume, geometry, identity)
        }
        Err(what) => return Err(EngineError::StateDamaged { path, what }),
    };
    volume_file::check_record(dir, (state.volume, state.geometry), (volume, geometry))?;
    Ok(state)
}

/// Opens a volume's record, and what was put aside for its open interval.
pub(super) fn open(setup: EngineSetup<'_>, anew: bool) -> Result<(Scan, Trust), EngineError> {
    let EngineSetup {
        dir,
        volume,
        file,
        geometry,
        options,
    } = setup;
    let lock = lock_state(dir)?;
    let source = Arc::new(Source::open(file, geometry)?);
    let identity = identity(&source, file)?;
    let mut state = read_state(dir, volume, geometry, identity, anew)?;
    if let (false, Some(what)) = (anew, replaced(&state.file, &identity)) {
        return Err(EngineError::VolumeReplaced {
            path: file.to_owned(),
            what,
        });
    }
    let (boot, mount) = (state.boot, state.mount);
    notes_place(&mut state, dir, identity)?;
    let stores_kept = (boot, mount) == (state.boot, state.mount);
    let trust = if anew {
        state.interval = None;
        state.proof = None;
        Trust::Everything {
            reason: "the volume was readopted".to_owned(),
        }
    } else {
        Trust::Untracked { stores_kept }
    };
    let interval = take_up(dir, &mut state, &source)?;
    write(dir, &state)?;
    let named = state.interval.map(|interval| interval.cut);
    sweep(dir, |cut| Some(cut) == named)
        .map_err(|error| EngineError::io(format!("clear {}", dir.display()), error))?;
    let engine = Scan {
        volume,
        geometry,
        path: file.to_owned(),
        source,
        dir: dir.to_owned(),
        identity,
        options,
        cutting: Mutex::default(),
        changing: Mutex::default(),
        now: Mutex::new(Now {
            state,
            interval,
            doubts: 0,
            held: Duration::ZERO,
        }),
        closed: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        _lock: lock,
    };
    Ok((engine, trust))
}

/// Opens what was put aside for the open interval. Where that can't be used the interval is given up.
fn take_up(
    dir: &Path,
    state: &mut State,
    source: &Arc<Source>,
) -> Result<Option<IntervalCut>, EngineError> {
    let Some(open) = state.interval else {
        return Ok(None);
    };
    let (volume, geometry, path) = (state.volume, state.geometry, path_in(dir, open.cut));
    let kept = match open.kept_bytes {
        0 => None,
        bytes => match Kept::open(&path, volume, geometry, open.cut, bytes) {
            Ok(kept) => Some(kept),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::InvalidData
                        | io::ErrorKind::UnexpectedEof
                ) =>
            {
                tracing::error!(
                    %volume, file = %path.display(), %error,
                    "what was put aside for the open interval is lost: it is given up, and made anew"
                );
                state.give_up();
                return Ok(None);
            }
            Err(error) => {
                return Err(EngineError::io(format!("read {}", path.display()), error));
            }
        },
    };
    let reader = ScanReader::new(kept, Arc::clone(source), volume, geometry, open.cut);
    Ok(Some(IntervalCut {
        epoch: Epoch::new(open.cut),
        changed: reader.changed(),
        reader,
    }))
}

/// Removes what was put aside, and then the record. Nothing happens where there is none.
pub(in super::super) fn remove_state(dir: &Path) -> io::Result<()> {
    if !has_record(dir) {
        return Ok(());
    }
    sweep(dir, |_| false)?;
    durable::remove_file(&record_path(dir))
}
