//! One stream at a time ships into a volume, and the newest one wins: the older may be a connection that has died
//! without anybody noticing.

use std::sync::Arc;

use parking_lot::Mutex;
use tidemark_block::IntervalId;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, watch};

/// Where streams for one volume queue.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    running: Arc<AsyncMutex<()>>,
    newest: Mutex<Option<watch::Sender<bool>>>,
}

/// The right to ship, or a view of it.
#[derive(Debug)]
pub(crate) struct Turn {
    superseded: watch::Receiver<bool>,
    _guard: Option<OwnedMutexGuard<()>>,
}

impl Gate {
    /// Ends whoever ships or waits, and waits until it has; `None` where a newer one came meanwhile.
    pub(crate) async fn take_turn(&self) -> Option<Turn> {
        let (sender, mut superseded) = watch::channel(false);
        if let Some(older) = self.newest.lock().replace(sender) {
            older.send_replace(true);
        }
        let running = Arc::clone(&self.running);
        let guard = tokio::select! {
            guard = running.lock_owned() => guard,
            _ = superseded.wait_for(|over| *over) => return None,
        };
        if *superseded.borrow() {
            return None;
        }
        Some(Turn {
            superseded,
            _guard: Some(guard),
        })
    }

    /// Ends whoever ships or waits.
    pub(crate) fn end(&self) {
        if let Some(older) = self.newest.lock().take() {
            older.send_replace(true);
        }
    }
}

impl Turn {
    /// A view that can be awaited while the turn itself is used.
    pub(crate) fn watch(&self) -> Self {
        Self {
            superseded: self.superseded.clone(),
            _guard: None,
        }
    }

    /// Resolves when a newer stream has come.
    pub(crate) async fn superseded(&mut self) {
        // The sender is dropped only together with the volume.
        let _ = self.superseded.wait_for(|over| *over).await;
    }
}

/// Which interval is being received, so that its parts aren't taken for strays.
#[derive(Debug, Default)]
pub(crate) struct Receiving {
    interval: AsyncMutex<Option<IntervalId>>,
}

impl Receiving {
    /// From now on the parts of `interval` are no strays; those of the one before it may be.
    pub(crate) async fn begin(&self, interval: IntervalId) {
        *self.interval.lock().await = Some(interval);
    }

    /// Allows parts of an interval to be deleted while the answer is held; `None` where it is being received.
    pub(crate) async fn allow_deletion(&self, interval: IntervalId) -> Option<impl Sized + '_> {
        let receiving = self.interval.lock().await;
        (*receiving != Some(interval)).then_some(receiving)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_stream_wins_and_the_ones_between_give_up() {
        let gate = Arc::new(Gate::default());
        let first = gate.take_turn().await.unwrap();
        let mut watch = first.watch();
        let between = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.take_turn().await.is_none() }
        });
        tokio::task::yield_now().await;
        watch.superseded().await;
        let newest = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.take_turn().await.is_some() }
        });
        assert!(between.await.unwrap());
        drop(first);
        assert!(newest.await.unwrap());
    }
}
