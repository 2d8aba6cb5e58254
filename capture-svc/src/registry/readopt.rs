//! Readopting a volume: its file is taken as it is now, and every block is compared. The volume may get another engine.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use tidemark_proto::{Reason, RpcError};

use super::{
    DISCONNECT_MAX, Registry,
    choose::{Candidate, candidates, first_that_fits},
    local, sweep,
};
use crate::{
    config::{Config, EngineSetting},
    engine::Engine,
    front::FrontEnds,
    rollback,
    uplink::{Request, blocking, forget_epochs},
    volume::{Serving, Volume, VolumeRecord, setup},
};

impl Registry {
    /// Takes a volume's file as it is now. One that isn't served is opened, even if it is not the recorded one; one that
    /// is served goes on, with every block in doubt. With another engine it is closed and opened anew.
    pub(crate) async fn readopt(
        &self,
        text: &str,
        engine: Option<EngineSetting>,
        fronts: &FrontEnds,
    ) -> Result<(), RpcError> {
        self.stopping()?;
        let _change = self.change.lock().await;
        let volume = self.find(text)?;
        let kept = |(kind, _): &Candidate| *kind == volume.record.engine;
        let other = engine.filter(|setting| {
            !candidates(*setting, self.config())
                .first()
                .is_some_and(kept)
        });
        if let Some(setting) = other {
            self.change_engine(&volume, setting, fronts).await?;
        } else {
            match volume.serving() {
                Ok(serving) => doubt(&volume, serving).await?,
                Err(_) => {
                    let opened = self.try_open(&volume, true).await;
                    opened.map_err(|error| local(&error))?;
                }
            }
        }
        tracing::warn!(volume = %volume.record.name, "readopted: every block is compared");
        Ok(())
    }

    /// Gives a volume another engine. A crash in the middle leaves it with the one that it had, or with the new one and
    /// every block in doubt.
    async fn change_engine(
        &self,
        volume: &Arc<Volume>,
        setting: EngineSetting,
        fronts: &FrontEnds,
    ) -> Result<(), RpcError> {
        let serving = volume.serving();
        if let Ok(serving) = serving {
            self.unexport(&serving, false, fronts).await?;
            let held = Arc::downgrade(&serving.engine);
            drop(serving);
            if let Err(error) = volume.end("its engine is being changed").await {
                // Every block will be compared, whatever could not be written.
                tracing::warn!(volume = %volume.record.name, error = %format!("{error:#}"), "close a volume whose engine is being changed");
            }
            // Whoever looks at it just now has it, and with it the state's lock, for a moment longer.
            let deadline = tokio::time::Instant::now() + DISCONNECT_MAX;
            while held.strong_count() > 0 && tokio::time::Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let (changed, config) = (Arc::clone(volume), Arc::clone(&self.shared.config));
        let made = tokio::task::spawn_blocking(move || {
            let (record, dir) = (&changed.record, &changed.dir);
            first_that_fits(setting, &config, &record.file, |candidate| {
                prepare(record, dir, candidate, &config).map_err(|error| local(&error))
            })
        });
        let made = made
            .await
            .map_err(|error| RpcError::internal(format!("change the engine: {error}")))
            .and_then(|made| made);
        let opened = self.try_open(volume, false).await;
        made?;
        opened.map_err(|error| local(&error))
    }
}

/// Makes the state of another engine, and then records that it is the volume's. Everything before that is taken back by
/// the next opening, everything behind it is done by it.
fn prepare(
    record: &VolumeRecord,
    dir: &Path,
    (engine, why): Candidate,
    config: &Config,
) -> anyhow::Result<()> {
    if engine == record.engine {
        return Ok(());
    }
    Engine::prepare(engine, &setup(record, dir, config))?;
    // Its epochs begin anew, and whatever was decided was decided on snapshots that are gone.
    forget_epochs(dir, record.id)?;
    rollback::forget(dir)?;
    let changed = VolumeRecord {
        engine,
        engine_why: why.to_owned(),
        ..record.clone()
    };
    changed.store(dir).context("record the engine")?;
    tracing::info!(volume = %record.name, from = %record.engine, to = %engine, why, "the volume has another engine");
    sweep(&changed, dir);
    Ok(())
}

/// Puts every block of a served volume in doubt, and has an interval come soon.
async fn doubt(volume: &Arc<Volume>, serving: Arc<Serving>) -> Result<(), RpcError> {
    let (requests, tried) = (serving.uplink.requests(), Arc::clone(volume));
    let same = blocking(move || {
        let same = serving.engine.has_open(&tried.record.file)?;
        if same {
            serving
                .engine
                .doubt_everything("the volume was readopted")?;
        }
        Ok(same)
    });
    if !same.await.map_err(|e| local(&e))? {
        return Err(RpcError::new(
            Reason::VolumeFileInUse,
            format!(
                "volume {} is served from the file that was at {} before",
                volume.record.name,
                volume.record.file.display()
            ),
            "restart the service, which lets go of that file, then readopt the volume",
        ));
    }
    // Full means that an interval will come anyway.
    let _ = requests.try_send(Request::Doubted);
    Ok(())
}
