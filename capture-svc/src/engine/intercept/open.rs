//! Creating, opening and closing a volume's state: what happens around the recovery.

use std::{
    fs, io,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64},
};

use capture_core::engine::{
    capture::{Capture, Tuning},
    media::Map,
    records::{FileIdentity, Identity, Seals},
    recover::{EPOCHS_RESERVED, Outcome},
    spool::INDEX_BYTES_PER_ENTRY,
    trust::{Judgement, Reason, judge, replaced},
};
use tidemark_block::{Geometry, VolumeId};
use tidemark_disk::{
    durable,
    lock::{FileLock, LockError},
};

use super::{
    EngineError, EngineOptions, EngineSetup, Intercept, Trust,
    files::{self, Files, REGION_LEN},
    seals, upgrade, volume_file,
};

/// Blocks under one lock.
const STRIPE_BLOCKS: u64 = 64;
/// Records of changes since the newest snapshot, before they are merged.
const CHANGES_MAX: usize = 32;

fn tuning(options: &EngineOptions, geometry: Geometry) -> Tuning {
    let entries_max = options.spool_index_memory_max / INDEX_BYTES_PER_ENTRY;
    Tuning {
        region_bytes: REGION_LEN,
        stripe_blocks: STRIPE_BLOCKS,
        spool: files::limits(options.spool_bytes_max, entries_max, geometry),
        hot_regions_max: options.hot_regions_max,
        snapshots_max: options.snapshots_max.max(1),
        changes_max: CHANGES_MAX,
    }
}

/// Takes a state directory for this process alone.
pub(in super::super) fn lock_state(dir: &Path) -> Result<FileLock, EngineError> {
    FileLock::of_dir(dir).map_err(|error| match error {
        LockError::Owned { path, .. } => EngineError::StateLocked { path },
        LockError::Io { path, source } => {
            EngineError::io(format!("lock state directory {}", path.display()), source)
        }
    })
}

fn failed(action: &'static str, dir: &Path) -> impl Fn(io::Error) -> EngineError {
    move |error| EngineError::io(format!("{action} in {}", dir.display()), error)
}

/// Makes the state of a new volume and opens it.
pub(super) fn create(setup: EngineSetup<'_>) -> Result<Intercept, EngineError> {
    let EngineSetup {
        dir,
        volume,
        file,
        geometry,
        options,
    } = setup;
    durable::create_dir(dir).map_err(failed("create the state", dir))?;
    let state_lock = lock_state(dir)?;
    if dir.join("identity").exists() {
        return Err(EngineError::StateExists {
            path: dir.to_owned(),
        });
    }
    let (opened, volume_lock) = volume_file::open(file, geometry)?;
    let tuning = tuning(&options, geometry);
    let made = (|| {
        // The first sync also makes the holes final, that are taken for zeroes from here on.
        opened.sync_all()?;
        let carry = volume_file::data_blocks(&opened, geometry, geometry.all())?;
        let identity = volume_file::identity(&opened)?;
        files::remove_all(dir)?;
        let files = Files::create(dir, volume, geometry, tuning.spool, opened)?;
        files::put_records(dir, volume, &carry, 0)?;
        Ok((files, identity))
    })();
    let (files, identity) = made.map_err(|error| {
        // Best effort: without an identity there is no volume here, and the next creation removes the rest.
        let _ = files::remove_all(dir);
        failed("create the volume's state", dir)(error)
    })?;
    let judgement = Judgement::Exact { clean: true };
    let locks = (state_lock, volume_lock);
    let (engine, _) = start(
        dir,
        files,
        volume,
        tuning,
        judgement,
        1,
        (identity, locks),
        geometry,
        options,
    )?;
    Ok(engine)
}

/// Removes the state, the identity first: what is left without it is none.
pub(in super::super) fn remove_state(dir: &Path) -> io::Result<()> {
    durable::remove_file(&dir.join("identity"))?;
    files::remove_all(dir)
}

/// As what a volume file is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// As the recorded one, or not at all.
    AsRecorded,
    /// As the volume's from now on, whatever it is: every block is in doubt.
    Anew,
}

/// The identity in a state directory, which must be of this volume. One that is damaged is made up for where the volume
/// is readopted.
fn read_identity(
    dir: &Path,
    volume: VolumeId,
    geometry: Geometry,
    taken: Taken,
) -> Result<(Identity, FileLock), EngineError> {
    let path = dir.join("identity");
    if !path.exists() && !files::path_of(dir, Map::Tracking).exists() {
        return Err(EngineError::StateMissing {
            path: dir.to_owned(),
        });
    }
    let state_lock = lock_state(dir)?;
    let found = files::found(fs::read(&path)).map_err(failed("read the identity", dir))?;
    let recorded = found.and_then(|bytes| Ok(Identity::decode(&bytes)?));
    let recorded = recorded.map_err(|fault| fault.to_string());
    let recorded = match (recorded, taken) {
        (Ok(recorded), _) => recorded,
        (Err(what), Taken::AsRecorded) => return Err(EngineError::StateDamaged { path, what }),
        (Err(what), Taken::Anew) => {
            tracing::error!(%volume, file = %path.display(), what, "the identity of the state is damaged");
            let made_up = upgrade::made_up(dir, volume, geometry);
            let made_up = made_up.map_err(failed("read the volume's state", dir))?;
            made_up.ok_or(EngineError::StateLost { path, what })?
        }
    };
    volume_file::check_record(
        dir,
        (recorded.volume, recorded.geometry),
        (volume, geometry),
    )?;
    Ok((recorded, state_lock))
}

/// Opens a volume's state and recovers it.
///
/// The identity is written last: until then another opening finds the recorded one, and refuses the file again.
pub(super) fn open(
    setup: EngineSetup<'_>,
    taken: Taken,
) -> Result<(Intercept, Trust), EngineError> {
    let EngineSetup {
        dir,
        volume,
        file,
        geometry,
        options,
    } = setup;
    let (recorded, state_lock) = read_identity(dir, volume, geometry, taken)?;
    let (opened, volume_lock) = volume_file::open(file, geometry)?;
    let identity = volume_file::identity(&opened).map_err(failed("identify the volume", dir))?;
    // Before anything of the state is touched: the recorded file may come back.
    if let (Taken::AsRecorded, Some(what)) = (taken, replaced(&recorded.file, &identity)) {
        return Err(EngineError::VolumeReplaced {
            path: file.to_owned(),
            what,
        });
    }
    let tuning = tuning(&options, geometry);
    let limit = recorded.epoch_limit;
    if recorded.old {
        upgrade::upgrade(dir, volume, geometry, tuning.spool)
            .map_err(failed("convert the volume's state", dir))?;
        tracing::info!(%volume, "the volume's state is converted from that of release 0.1.0");
    }
    let (files, damage) = Files::open(dir, volume, geometry, tuning.spool, opened, limit)
        .map_err(failed("open the volume's state", dir))?;
    let judgement = match damage {
        None => {
            let place = volume_file::place(dir).map_err(failed("identify the state", dir))?;
            let judgement = match taken {
                Taken::AsRecorded => judge(&recorded, &identity, &place),
                Taken::Anew => Judgement::Everything(Reason::Readopted),
            };
            let judgement = heard(judgement, &files, dir, &recorded)?;
            unsealed(judgement, dir, &recorded)?
        }
        Some(damage) => Judgement::Everything(Reason::Damaged(damage)),
    };
    let locks = (state_lock, volume_lock);
    let (engine, outcome) = start(
        dir,
        files,
        volume,
        tuning,
        judgement,
        limit,
        (identity, locks),
        geometry,
        options,
    )?;
    Ok((engine, trust(outcome)))
}

/// Syncs the state before it is trusted. A failure that the last process has not heard of is told once, so it is
/// noted durably before anything else.
fn heard(
    judgement: Judgement,
    files: &Files,
    dir: &Path,
    recorded: &Identity,
) -> Result<Judgement, EngineError> {
    let Err(error) = files.sync_state() else {
        return Ok(judgement);
    };
    tracing::error!(
        volume = %recorded.volume,
        %error,
        "a file of the volume's state could not be written to the disk: snapshots are gone, what was written lately is \
         compared with the vault's; check the disk"
    );
    let noted = Identity {
        clean: false,
        failed: true,
        seals: None,
        ..*recorded
    };
    durable::write_file(&dir.join("identity"), &noted.encode())
        .map_err(failed("write the identity", dir))?;
    Ok(match judgement {
        Judgement::Exact { .. } => Judgement::PowerLoss,
        worse => worse,
    })
}

/// Compares a state that was closed cleanly with the digests that this left. They are taken back before anything
/// changes: an opening that ends early must not be followed by one that finds other files than they say.
fn unsealed(
    judgement: Judgement,
    dir: &Path,
    recorded: &Identity,
) -> Result<Judgement, EngineError> {
    let (Judgement::Exact { clean: true }, Some(seals)) = (&judgement, &recorded.seals) else {
        return Ok(judgement);
    };
    let broken = seals::broken(dir, seals).map_err(failed("read the volume's state", dir))?;
    if let Some(damage) = broken {
        return Ok(Judgement::Everything(Reason::Damaged(damage)));
    }
    let open = Identity {
        seals: None,
        ..*recorded
    };
    durable::write_file(&dir.join("identity"), &open.encode())
        .map_err(failed("write the identity", dir))?;
    Ok(judgement)
}

fn trust(outcome: Outcome) -> Trust {
    match outcome {
        Outcome::Clean => Trust::Clean,
        Outcome::ProcessCrash => Trust::ProcessCrash,
        Outcome::PowerLoss(doubtful) => Trust::PowerLoss { doubtful },
        Outcome::Everything(reason) => Trust::Everything {
            reason: reason.to_string(),
        },
    }
}

#[allow(
    clippy::too_many_arguments,
    reason = "the end of the two functions above"
)]
fn start(
    dir: &Path,
    files: Files,
    volume: VolumeId,
    tuning: Tuning,
    judgement: Judgement,
    epoch_limit: u64,
    (file, (state_lock, volume_lock)): (FileIdentity, (FileLock, FileLock)),
    geometry: Geometry,
    options: EngineOptions,
) -> Result<(Intercept, Outcome), EngineError> {
    let recovered = Capture::recover(files, volume, geometry, tuning, judgement, epoch_limit);
    let (capture, outcome) = recovered.map_err(|error| {
        EngineError::io(
            format!("recover the volume's state in {}", dir.display()),
            io::Error::other(error),
        )
    })?;
    let damage = capture.take_damage();
    let engine = Intercept {
        capture,
        damage,
        damaged: AtomicU64::new(0),
        options,
        dir: dir.to_owned(),
        closed: AtomicBool::new(false),
        activity: super::Activity::new(),
        cutting: parking_lot::Mutex::default(),
        last_flip: parking_lot::Mutex::default(),
        seen: super::Seen::default(),
        relieving: parking_lot::Mutex::default(),
        disk_full_told: AtomicBool::new(false),
        settled: super::Signal::default(),
        intent: super::Signal::default(),
        room: super::Signal::default(),
        zeroes_fast: Default::default(),
        _volume_lock: volume_lock,
        _state_lock: state_lock,
    };
    engine.tell(&engine.damage);
    write_identity(&engine, file, Left::Running)?;
    engine.capture.confirm();
    Ok((engine, outcome))
}

/// How the state is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Running,
    Clean(Seals),
    Failed,
}

fn write_identity(engine: &Intercept, file: FileIdentity, left: Left) -> Result<(), EngineError> {
    let state =
        volume_file::place(&engine.dir).map_err(failed("identify the state", &engine.dir))?;
    let identity = Identity {
        volume: engine.capture.volume(),
        geometry: engine.geometry(),
        clean: matches!(left, Left::Clean(_)),
        failed: left == Left::Failed,
        old: false,
        seals: match left {
            Left::Clean(seals) => Some(seals),
            Left::Running | Left::Failed => None,
        },
        epoch_limit: engine.capture.epoch() + EPOCHS_RESERVED,
        file,
        state,
    };
    durable::write_file(&engine.dir.join("identity"), &identity.encode())
        .map_err(failed("write the identity", &engine.dir))
}

/// Marks the state clean, after everything it stands for is durable. No request is in flight, the volume is synced.
pub(super) fn mark_clean(engine: &Intercept) -> Result<(), EngineError> {
    let files = engine.capture.media();
    let synced = files
        .sync_state()
        .map_err(failed("sync the volume's state", &engine.dir))
        .and_then(|()| {
            seals::of(&engine.dir).map_err(failed("read the volume's state", &engine.dir))
        });
    if synced.is_err() {
        engine.capture.fail();
    }
    let file = volume_file::identity(files.volume())
        .map_err(failed("identify the volume", &engine.dir))?;
    let left = match &synced {
        Ok(seals) => Left::Clean(*seals),
        Err(_) => Left::Failed,
    };
    write_identity(engine, file, left)?;
    synced.map(|_| ())
}
