//! A pass that somebody asked for: the whole volume, now and at full speed.

use std::sync::Arc;

use tidemark_block::BlockIndex;
use tidemark_proto::{Reason, RpcError};
use tokio::sync::{Mutex, watch};

use super::{Scrub, Worker};
use crate::{
    registry::local,
    uplink::{blocking, shutting_down},
};

/// How far a pass is, or what it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Pass {
    /// Blocks that were looked at.
    pub(crate) done: u64,
    /// Of them, those that have changed since the base or are in doubt, and were therefore not compared.
    pub(crate) changed: u64,
    /// Clean blocks that are not what the table says.
    pub(crate) mismatches: u64,
}

/// A pass that has not begun.
#[derive(Debug)]
pub(crate) struct ByHand {
    worker: Arc<Worker>,
    one: Arc<Mutex<()>>,
    stop: watch::Receiver<bool>,
}

impl Scrub {
    /// A pass by hand. One runs at a time.
    pub(crate) fn by_hand(&self) -> ByHand {
        ByHand {
            worker: Arc::clone(&self.worker),
            one: Arc::clone(&self.by_hand),
            stop: self.stop.subscribe(),
        }
    }
}

impl ByHand {
    /// Compares every clean block. `go_on` is told how far it is after each step, and says whether to go on; none
    /// where it said no.
    ///
    /// # Errors
    /// [`Reason::Busy`] while there is nothing to compare with, [`Reason::ShuttingDown`], or what the files say.
    pub(crate) async fn run(
        self,
        mut go_on: impl FnMut(Pass) -> bool,
    ) -> Result<Option<Pass>, RpcError> {
        let _one = self.one.lock().await;
        let end = self.worker.engine.geometry().all().end();
        let mut pass = Pass::default();
        let mut at = BlockIndex::ZERO;
        while at < end {
            if *self.stop.borrow() {
                return Err(shutting_down());
            }
            let worker = Arc::clone(&self.worker);
            let stepped = blocking(move || worker.step(at)).await;
            let Some(step) = stepped.map_err(|error| local(&error))? else {
                return Err(self.nothing_to_compare_with());
            };
            pass.done += step.next.since(at).get();
            pass.changed += step.changed.get();
            pass.mismatches += step.mismatches.get();
            at = step.next;
            if !go_on(pass) {
                return Ok(None);
            }
        }
        self.worker.counts.pass_ended();
        Ok(Some(pass))
    }

    fn nothing_to_compare_with(&self) -> RpcError {
        RpcError::new(
            Reason::Busy,
            format!(
                "the checksum table of volume {} is not that of its base yet",
                self.worker.settings.name
            ),
            "try again once its uplink has reached the vault and compared it",
        )
    }
}
