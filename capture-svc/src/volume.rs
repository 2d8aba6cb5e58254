//! One protected volume: what is recorded of it, and what runs for it while it is served.

mod record;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result};
use capture_core::{
    codec::CodecRule,
    coherence::{Limits, OnFailure},
    interval::{Backoff, Triggers},
};
use parking_lot::RwLock;
use tidemark_export::{BlockDevice, Export, ExportRegistry, RegistryError, ScratchRoom};
use tidemark_proto::{Reason, RpcError};
use tokio::sync::watch;

pub(crate) use record::VolumeRecord;

use crate::{
    config::{CodecSetting, Config, QuiesceFailure, SpoolFull},
    engine::{Engine, EngineError, EngineOptions, EngineSetup, SnapshotId, SpoolPolicy, Trust},
    front::SnapshotExports,
    quiesce::{QuiesceSettings, agents::Agents},
    rollback,
    scrub::{Scrub, ScrubSettings},
    uplink::{self, Opened, Settings, Uplink, blocking, group::AllGroups},
};

/// What the volumes of a service share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Arc<Config>,
    pub(crate) exports: Arc<ExportRegistry>,
    /// Agents that are attached.
    pub(crate) agents: Arc<Agents>,
    pub(crate) groups: AllGroups,
    /// What the scratches of all snapshots may keep.
    pub(crate) scratch_room: Arc<ScratchRoom>,
    pub(crate) stop: watch::Receiver<bool>,
}

/// A volume, served or not.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) record: VolumeRecord,
    /// Its state directory.
    pub(crate) dir: PathBuf,
    state: RwLock<State>,
}

#[derive(Debug, Clone)]
enum State {
    Serving(Arc<Serving>),
    Failed(String),
}

/// What runs for a served volume.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) engine: Arc<Engine>,
    pub(crate) uplink: Uplink,
    pub(crate) scrub: Scrub,
    /// Since when it is served.
    pub(crate) since: Instant,
    name: String,
    /// None where clients don't write through the engine.
    export: Option<RwLock<Arc<Export>>>,
    snapshots: SnapshotExports,
}

impl Serving {
    /// Clients of the volume now: NBD connections and open files.
    pub(crate) fn clients(&self) -> u32 {
        let export = self.export.as_ref();
        export.map_or(0, |export| export.read().clients())
    }

    /// The name under which it is exported, or its snapshots are.
    pub(crate) fn export_name(&self) -> &str {
        &self.name
    }

    /// Whether clients can write it through a front end.
    pub(crate) const fn is_exported(&self) -> bool {
        self.export.is_some()
    }

    /// The exports of its snapshots, oldest first.
    pub(crate) fn list_snapshots(&self) -> Vec<Arc<Export>> {
        let all = self.snapshots.list(self.export_name(), &self.engine);
        all.into_iter().map(|(_, export)| export).collect()
    }

    /// The scratches that clients use now, each with its snapshot.
    pub(crate) fn scratches(&self) -> Vec<(SnapshotId, Arc<Export>)> {
        self.snapshots.scratches()
    }

    /// The export of the snapshot with this number, or the newest one with this label.
    pub(crate) fn find_snapshot(&self, text: &str) -> Option<Arc<Export>> {
        self.snapshots.find(self.export_name(), &self.engine, text)
    }

    /// Exports it again, after its export was removed.
    pub(crate) fn export_again(&self, exports: &ExportRegistry) -> Result<(), RegistryError> {
        let Some(export) = &self.export else {
            return Ok(());
        };
        let mut export = export.write();
        let device = Arc::clone(export.device());
        *export = exports.add(export.name(), "", device)?;
        Ok(())
    }
}

/// An engine and an uplink that are ready to run. Blocking work made it; starting it doesn't block.
#[derive(Debug)]
pub(crate) struct Ready {
    engine: Arc<Engine>,
    opened: Opened,
}

impl Ready {
    /// Makes the state of a new volume.
    pub(crate) fn create(record: &VolumeRecord, dir: &Path, config: &Config) -> Result<Self> {
        let engine = Engine::create(record.engine, setup(record, dir, config))?;
        let opened = Opened::create(dir, record.id, &engine)?;
        Ok(Self { engine, opened })
    }

    /// Opens a volume's state, recovering it. `readopt`: whatever its file is now, with every block in doubt.
    pub(crate) fn open(
        record: &VolumeRecord,
        dir: &Path,
        config: &Config,
        readopt: bool,
    ) -> Result<Self> {
        let open = if readopt {
            // Epochs may begin anew.
            uplink::forget_epochs(dir, record.id)?;
            Engine::readopt
        } else {
            Engine::open
        };
        let (engine, trust) = open(record.engine, setup(record, dir, config))?;
        match &trust {
            Trust::Clean | Trust::ProcessCrash => {
                tracing::info!(volume = %record.name, ?trust, "opened");
            }
            Trust::Clones { .. } => {
                tracing::info!(volume = %record.name, "opened: its clones are whole");
            }
            Trust::Untracked { .. } => {
                tracing::info!(volume = %record.name, "opened: each cut compares all of it");
            }
            Trust::PowerLoss { doubtful } => {
                tracing::warn!(volume = %record.name, %doubtful, "opened after a power loss: snapshots are gone, doubtful blocks will be compared");
            }
            Trust::Everything { reason } => {
                tracing::warn!(volume = %record.name, reason, "opened in doubt: every block will be compared");
            }
        }
        if readopt {
            // Whatever was decided was decided on another file.
            rollback::forget(dir)?;
        } else if let Some(engine) = engine.intercept() {
            rollback::carry_out(dir, record.id, engine, &mut |_, _| true)?;
        }
        let stores_kept = match trust {
            Trust::Clean | Trust::ProcessCrash => true,
            Trust::Clones { stores_kept } | Trust::Untracked { stores_kept } => stores_kept,
            Trust::PowerLoss { .. } | Trust::Everything { .. } => false,
        };
        let opened = Opened::open(dir, record.id, &engine, stores_kept)?;
        Ok(Self { engine, opened })
    }

    /// Lets go of it again.
    pub(crate) fn close(self) {
        drop(self.opened);
        if let Err(error) = self.engine.close() {
            tracing::warn!(%error, "close a volume");
        }
    }
}

/// What an engine of the volume is made or opened for.
pub(crate) fn setup<'a>(
    record: &'a VolumeRecord,
    dir: &'a Path,
    config: &Config,
) -> EngineSetup<'a> {
    EngineSetup {
        dir,
        volume: record.id,
        file: &record.file,
        geometry: record.geometry,
        options: options(config),
    }
}

fn options(config: &Config) -> EngineOptions {
    EngineOptions {
        spool_bytes_max: config.spool_bytes_max.get(),
        spool_policy: match config.spool_full {
            SpoolFull::GiveUp => SpoolPolicy::GiveUp,
            SpoolFull::Stall => SpoolPolicy::Stall,
        },
        snapshots_max: config.snapshots_max as usize,
        cut_stall_max: (!config.cut_stall_max.is_zero()).then(|| config.cut_stall_max.get()),
        ..EngineOptions::default()
    }
}

fn settings(record: &VolumeRecord, dir: PathBuf, shared: &Shared) -> Settings {
    let config = &shared.config;
    let quiescing = config.quiescing(&record.name);
    let backoff = Backoff {
        min: config.backoff_min.get(),
        max: config.backoff_max.get(),
    };
    Settings {
        volume: record.id,
        name: record.name.clone(),
        source_name: config.source_name.clone(),
        geometry: record.geometry,
        vault: config.vault.clone(),
        dialer: config.dialer(),
        dir,
        triggers: Triggers {
            interval_max: config.interval_max.get(),
            changed_blocks_max: (config.changed_blocks_max > 0)
                .then_some(config.changed_blocks_max),
            backoff,
        },
        schedule: config.schedule.clone(),
        moment: Limits {
            lull_wait_max: config.lull_wait_max.get(),
            lull_min: config.lull_min.get(),
            on_failure: match quiescing.failure {
                QuiesceFailure::Cut => OnFailure::Cut,
                QuiesceFailure::Skip => OnFailure::Skip,
            },
        },
        group: shared.groups.of(&record.name),
        quiesce: QuiesceSettings {
            pre: quiescing.pre.clone(),
            post: quiescing.post.clone(),
            time: quiescing.timeout,
            agents: Arc::clone(&shared.agents),
        },
        backoff,
        codec: match config.codec {
            CodecSetting::Auto => CodecRule::Auto,
            CodecSetting::Raw => CodecRule::Raw,
            CodecSetting::Zstd => CodecRule::Zstd,
        },
        zstd_level: config.zstd_level,
        bytes_in_flight_max: config.bytes_in_flight_max.get(),
    }
}

impl Volume {
    /// A volume that isn't served yet.
    pub(crate) fn failed(record: VolumeRecord, dir: PathBuf, problem: impl Into<String>) -> Self {
        Self {
            record,
            dir,
            state: RwLock::new(State::Failed(problem.into())),
        }
    }

    /// What runs for it, or why nothing does.
    pub(crate) fn serving(&self) -> Result<Arc<Serving>, String> {
        match &*self.state.read() {
            State::Serving(serving) => Ok(Arc::clone(serving)),
            State::Failed(problem) => Err(problem.clone()),
        }
    }

    /// As [`Self::serving`], for a call that needs it.
    pub(crate) fn need(&self) -> Result<Arc<Serving>, RpcError> {
        self.serving().map_err(|problem| {
            RpcError::new(
                Reason::VolumeFailed,
                format!("volume {} is not served: {problem}", self.record.name),
                "it is tried again by itself every few seconds once the cause is gone",
            )
        })
    }

    /// Notes why it can't be served.
    pub(crate) fn set_problem(&self, problem: String) {
        let mut state = self.state.write();
        if let State::Failed(known) = &mut *state
            && *known != problem
        {
            tracing::error!(volume = %self.record.name, problem, "the volume can't be served");
            *known = problem;
        }
    }

    /// Serves it from now on; where that fails it is closed again.
    pub(crate) async fn serve(&self, ready: Ready, shared: &Shared) -> Result<()> {
        let export = ready.engine.intercept().map(|engine| {
            let device: Arc<dyn BlockDevice> = Arc::clone(engine) as Arc<dyn BlockDevice>;
            shared.exports.add(&self.record.name, "", device)
        });
        let export = match export.transpose() {
            Ok(export) => export,
            Err(error) => {
                blocking(move || {
                    ready.close();
                    Ok(())
                })
                .await?;
                return Err(error).context("export the volume");
            }
        };
        let Ready { engine, opened } = ready;
        let uplink = Uplink::start(
            settings(&self.record, self.dir.clone(), shared),
            Arc::clone(&engine),
            opened,
        );
        let scrub = Scrub::start(
            ScrubSettings {
                name: self.record.name.clone(),
                period: shared.config.scrub_period.get(),
                bytes_per_second_max: shared.config.scrub_bytes_per_second_max.get(),
            },
            Arc::clone(&engine),
            Arc::clone(uplink.table()),
            uplink.requests(),
            shared.stop.clone(),
        );
        *self.state.write() = State::Serving(Arc::new(Serving {
            engine,
            uplink,
            scrub,
            since: Instant::now(),
            name: self.record.name.clone(),
            export: export.map(RwLock::new),
            snapshots: SnapshotExports::new(Arc::clone(&shared.scratch_room)),
        }));
        Ok(())
    }

    /// Ends what runs for it and closes it cleanly. No client may be connected any more.
    pub(crate) async fn end(&self, problem: &str) -> Result<()> {
        let state = std::mem::replace(&mut *self.state.write(), State::Failed(problem.to_owned()));
        let State::Serving(serving) = state else {
            return Ok(());
        };
        serving.uplink.stop();
        serving.scrub.end().await;
        serving.uplink.ended().await;
        let engine = Arc::clone(&serving.engine);
        drop(serving);
        blocking(move || match engine.close() {
            Ok(()) | Err(EngineError::Closed) => Ok(()),
            Err(error) => Err(error.into()),
        })
        .await
        .with_context(|| format!("close volume {}", self.record.name))
    }
}
