//! Ships the intervals of one volume to the vault: performs what the state machine decides.
//!
//! One task per volume. It asks [`capture_core::uplink::Uplink`] what to do, does it, and tells how it ended; blocking
//! work goes to blocking threads. The order of durable steps is here, and only here: id before header, base before
//! release, release before table, doubt before anything that could make it look unneeded.

#[cfg(test)]
mod crash;
mod cut;
#[cfg(test)]
mod damage;
mod driver;
pub(crate) mod figures;
pub(crate) mod group;
mod link;
mod open;
mod pending;
mod produce;
mod record;
mod resync;
mod search;
mod settle;
mod ship;
pub(crate) mod snapshot;
mod status;
mod table;
mod trace;
pub(crate) mod walk;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use capture_core::{
    codec::CodecRule,
    coherence::Limits,
    interval::{Backoff, Triggers},
};
use tidemark_block::{Geometry, Receipt, VolumeId};
use tidemark_proto::{Reason, RpcError};
use tidemark_telemetry::Origin;
use tidemark_tls::Dialer;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

pub(crate) use open::{Opened, forget_epochs};
pub(crate) use ship::stopped;
pub use status::{UplinkState, UplinkStatus};
pub(crate) use table::BaseTable;

use crate::{
    config::Schedule,
    engine::Engine,
    quiesce::{QuiesceSettings, agents::Hint},
};
use driver::Driver;
use figures::Figures;
use group::Group;
use snapshot::Seat;

/// Requests that may wait to be noticed.
const REQUESTS_MAX: usize = 64;

/// What one volume's uplink is told.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) volume: VolumeId,
    pub(crate) name: String,
    pub(crate) source_name: String,
    pub(crate) geometry: Geometry,
    pub(crate) vault: String,
    pub(crate) dialer: Dialer,
    /// The volume's state directory.
    pub(crate) dir: PathBuf,
    pub(crate) triggers: Triggers,
    pub(crate) schedule: Schedule,
    pub(crate) moment: Limits,
    /// Those it is cut with at one instant.
    pub(crate) group: Option<Arc<Group>>,
    pub(crate) quiesce: QuiesceSettings,
    pub(crate) backoff: Backoff,
    pub(crate) codec: CodecRule,
    pub(crate) zstd_level: i32,
    pub(crate) bytes_in_flight_max: u64,
}

/// What the uplink can be asked.
#[derive(Debug)]
pub(crate) enum Request {
    /// An interval from now on.
    Interval(oneshot::Sender<Result<Receipt, RpcError>>, Option<Origin>),
    /// Blocks have joined the doubt: an interval soon.
    Doubted,
    /// An agent holds still.
    Hint(Hint),
}

/// A running uplink.
#[derive(Debug)]
pub(crate) struct Uplink {
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<UplinkStatus>,
    figures: Arc<Figures>,
    table: Arc<BaseTable>,
    seat: Seat,
    stop: watch::Sender<bool>,
    task: parking_lot::Mutex<Option<JoinHandle<()>>>,
}

impl Uplink {
    /// Starts what [`Opened`] found.
    pub(crate) fn start(settings: Settings, engine: Arc<Engine>, opened: Opened) -> Self {
        let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
        let (stop, stopping) = watch::channel(false);
        let (show, status) = watch::channel(UplinkStatus {
            recovery_point_ms: opened.record.recovery_point_ms,
            base: opened.record.base,
            term: opened.record.term,
            ..UplinkStatus::default()
        });
        let table = Arc::clone(&opened.table);
        let driver = Driver::new(settings, engine, opened, inbox, show, stopping);
        Self {
            requests,
            status,
            figures: Arc::clone(&driver.figures),
            table,
            seat: driver.seat(),
            stop,
            task: parking_lot::Mutex::new(Some(tokio::spawn(driver.run()))),
        }
    }

    /// Asks for an interval; the answer comes with its receipt.
    pub(crate) async fn request(
        &self,
    ) -> Result<oneshot::Receiver<Result<Receipt, RpcError>>, RpcError> {
        let (answer, receipt) = oneshot::channel();
        self.requests
            .send(Request::Interval(answer, Origin::current()))
            .await
            .map_err(|_| shutting_down())?;
        Ok(receipt)
    }

    /// Says that an agent holds still. Gives it back where nobody hears it.
    pub(crate) fn hint(&self, hint: Hint) -> Result<(), Hint> {
        use mpsc::error::TrySendError::{Closed, Full};
        match self.requests.try_send(Request::Hint(hint)) {
            Err(Closed(Request::Hint(hint)) | Full(Request::Hint(hint))) => Err(hint),
            _ => Ok(()),
        }
    }

    /// A way to say that blocks have joined the doubt.
    pub(crate) fn requests(&self) -> mpsc::Sender<Request> {
        self.requests.clone()
    }

    /// What it shows.
    pub(crate) fn status(&self) -> watch::Receiver<UplinkStatus> {
        self.status.clone()
    }

    /// What it has done.
    pub(crate) const fn figures(&self) -> &Arc<Figures> {
        &self.figures
    }

    /// The checksum table of the base.
    pub(crate) const fn table(&self) -> &Arc<BaseTable> {
        &self.table
    }

    /// For a cut of the volume that is not an interval.
    pub(crate) fn seat(&self) -> Seat {
        self.seat.clone()
    }

    /// Tells it to stop, without waiting.
    pub(crate) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until it has stopped and let go of everything.
    pub(crate) async fn ended(&self) {
        let task = self.task.lock().take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "an uplink failed");
        }
    }
}

pub(crate) fn shutting_down() -> RpcError {
    RpcError::new(
        Reason::ShuttingDown,
        "the service, or the volume, is being stopped",
        "ask again once it is up",
    )
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.map_or(0, |d| d.as_millis())).unwrap_or(u64::MAX)
}

/// Sixteen random bytes.
pub(crate) fn random_id() -> [u8; 16] {
    uuid::Uuid::new_v4().into_bytes()
}

/// Runs blocking work on a thread for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("join blocking work")?
}
