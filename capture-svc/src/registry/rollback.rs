//! Rolling a volume back to one of its snapshots, while no client is connected.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use tidemark_proto::{Reason, RpcError};

use super::{Registry, local};
use crate::{
    engine::{EngineKind, SnapshotId, intercept::Intercept},
    front::FrontEnds,
    rollback::{self, Plan, RollbackError},
    uplink::{blocking, shutting_down},
    volume::Volume,
};

impl Registry {
    /// Puts a volume back to what it was at a snapshot, and says what was done; none where it is that already.
    ///
    /// `told` hears how far it is: blocks done and in all.
    pub(crate) async fn rollback(
        &self,
        text: &str,
        snapshot: SnapshotId,
        force: bool,
        fronts: &FrontEnds,
        told: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<Option<Plan>, RpcError> {
        self.stopping()?;
        let _change = self.change.lock().await;
        let volume = self.find(text)?;
        let serving = volume.need()?;
        let engine = serving
            .engine
            .intercept()
            .ok_or_else(|| not_ours(&volume))?;
        // Nobody is disconnected for a snapshot that isn't there.
        let found = Arc::clone(engine);
        let found = blocking(move || Ok(found.open_snapshot(snapshot).map(drop)?));
        found.await.map_err(|error| local(&error))?;
        self.unexport(&serving, force, fronts).await?;
        let done = self.roll_back(&volume, engine, snapshot, told).await;
        if done.is_err() && rollback::is_decided(&volume.dir) {
            // It goes on when the volume is opened again. Until then nobody may see it.
            let problem =
                format!("its rollback to snapshot {snapshot} was interrupted and will go on");
            drop(serving);
            if let Err(error) = volume.end(&problem).await {
                tracing::warn!(volume = %volume.record.name, error = %format!("{error:#}"), "close a volume that is being rolled back");
            }
        } else if let Err(error) = serving.export_again(&self.shared.exports) {
            tracing::error!(volume = %volume.record.name, %error, "export a volume after its rollback");
        }
        done.map_err(|error| explained(&error))
    }

    async fn roll_back(
        &self,
        volume: &Arc<Volume>,
        engine: &Arc<Intercept>,
        snapshot: SnapshotId,
        mut told: impl FnMut(u64, u64) + Send + 'static,
    ) -> Result<Option<Plan>> {
        let (engine, volume, stop) = (
            Arc::clone(engine),
            Arc::clone(volume),
            self.shared.stop.clone(),
        );
        blocking(move || {
            let told = &mut |done, total| {
                told(done, total);
                !*stop.borrow()
            };
            let (dir, id) = (&volume.dir, volume.record.id);
            if rollback::decide(dir, id, &engine, snapshot, told)?.is_none() {
                return Ok(None);
            }
            rollback::carry_out(dir, id, &engine, told)?
                .ok_or_else(|| anyhow!("the plan of the rollback is gone"))
                .map(Some)
        })
        .await
    }
}

/// Whoever writes the file itself isn't known here: blocks must not change beneath them.
fn not_ours(volume: &Volume) -> RpcError {
    let name = &volume.record.name;
    let source = match volume.record.engine {
        EngineKind::Intercept | EngineKind::Reflink => {
            format!(
                "the snapshot over the file: `tidemark snapshot read {name} SNAPSHOT --output FILE`"
            )
        }
        EngineKind::Scan => {
            format!("a generation over the file: `tidemark restore {name}@N FILE`")
        }
    };
    RpcError::new(
        Reason::EngineUnsupported,
        format!("volume {name} is written by its workload itself, not through this service"),
        format!("stop the workload, then write {source} gives its content"),
    )
}

fn explained(error: &anyhow::Error) -> RpcError {
    match error.downcast_ref::<RollbackError>() {
        Some(RollbackError::Stopped) => shutting_down(),
        Some(RollbackError::NoRoom { free, needed }) => RpcError::new(
            Reason::SpoolTooSmall,
            format!(
                "the spool has room for {free} bytes; keeping what the volume holds now takes {needed}"
            ),
            "delete snapshots, or raise spool_bytes_max; nothing was changed",
        ),
        None => local(error),
    }
}
