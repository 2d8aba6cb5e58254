//! The background's scrub: every volume once in each period, whenever it came.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tidemark_block::VolumeId;
use tidemark_proto::Reason;
use tokio::{sync::watch, time::Instant};

use super::Pace;
use crate::{vault::Vault, volume::Volume};

/// The wait after the store could not be read.
const RETRY: Duration = Duration::from_secs(60);
/// How often a volume whose store can't be read is tried in one period.
const TRIES: u32 = 60;
/// How often new volumes are looked for when all others have had their turn.
const NEW_PERIOD: Duration = Duration::from_secs(1);
/// How often it is looked how much there is to be read.
const GROWTH_PERIOD: Duration = Duration::from_secs(60);

/// Whose turn it is in one period.
#[derive(Debug)]
struct Turns<V> {
    had: HashSet<VolumeId>,
    left: VecDeque<(V, u32)>,
}

impl<V> Turns<V> {
    fn new() -> Self {
        Self {
            had: HashSet::new(),
            left: VecDeque::new(),
        }
    }

    /// Volumes that have come since it was last told have their turn behind the others.
    fn learn(&mut self, volumes: impl IntoIterator<Item = (VolumeId, V)>) {
        for (id, volume) in volumes {
            if self.had.insert(id) {
                self.left.push_back((volume, 1));
            }
        }
    }

    fn next(&mut self) -> Option<(V, u32)> {
        self.left.pop_front()
    }

    /// It could not be read. The others first: what keeps one from being read need not keep them.
    fn again(&mut self, volume: V, tries: u32) {
        if tries < TRIES {
            self.left.push_back((volume, tries + 1));
        }
    }
}

impl Vault {
    /// Scrubs all volumes, once in each `scrub_period`, until told to stop.
    pub(crate) async fn scrub_always(self: Arc<Self>, mut stopping: watch::Receiver<bool>) {
        let period = self.config().scrub_period.get();
        if period.is_zero() {
            return;
        }
        let stored = Arc::new(AtomicU64::new(self.named_bytes()));
        let growth = async {
            loop {
                tokio::time::sleep(GROWTH_PERIOD).await;
                stored.store(self.named_bytes(), Ordering::Relaxed);
            }
        };
        let periods = async {
            loop {
                self.scrub_for(period, &stored).await;
            }
        };
        tokio::select! {
            () = periods => {}
            () = growth => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
    }

    fn named_bytes(&self) -> u64 {
        let volumes = self.volumes();
        let named = volumes.iter().map(|volume| volume.manifest().named_bytes());
        named.sum()
    }

    /// One period: those volumes that there are, and those that come.
    async fn scrub_for(&self, period: Duration, stored: &Arc<AtomicU64>) {
        let at_most = self.config().scrub_bytes_per_second_max.get();
        stored.store(self.named_bytes(), Ordering::Relaxed);
        let mut pace = Pace::over(period, Arc::clone(stored), at_most);
        let mut turns = Turns::new();
        let mut end = None;
        loop {
            let mut volumes = self.volumes();
            // A service that is restarted often still sees every volume.
            let turn = usize::from(uuid::Uuid::new_v4().as_bytes()[0]);
            let turn = turn % volumes.len().max(1);
            volumes.rotate_left(turn);
            turns.learn(volumes.into_iter().map(|volume| (volume.id, volume)));
            if let Some((volume, tries)) = turns.next() {
                if !scrub(&volume, &mut pace, tries).await {
                    turns.again(volume, tries);
                    tokio::time::sleep(RETRY).await;
                }
                continue;
            }
            // All have had their turn: the rest of the period is for new ones.
            let end = *end.get_or_insert_with(|| pace.end());
            let now = Instant::now();
            if now >= end {
                return;
            }
            tokio::time::sleep_until(end.min(now + NEW_PERIOD)).await;
        }
    }
}

/// Whether it came to its end.
async fn scrub(volume: &Arc<Volume>, pace: &mut Pace, tries: u32) -> bool {
    let done = volume
        .scrub(pace, &mut |progress| volume.scrub.progress(progress))
        .await;
    match done {
        Ok(_) => true,
        Err(error) if error.reason == Reason::StoreCorrupt => {
            tracing::error!(volume = %volume.id, %error, tries, "the scrub has ended: {}", error.action);
            false
        }
        Err(error) => {
            tracing::warn!(
                volume = %volume.id, reason = %error.reason, %error, tries,
                "the scrub can't read the store, and tries again in a minute: {}", error.action
            );
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> VolumeId {
        VolumeId::from_bytes([n; 16])
    }

    #[test]
    fn each_volume_has_its_turn_once_in_a_period_whenever_it_came() {
        let mut turns = Turns::new();
        turns.learn([]);
        assert_eq!(turns.next(), None, "the vault starts empty");
        turns.learn([(id(1), 'a'), (id(2), 'b')]);
        assert_eq!(turns.next(), Some(('a', 1)));
        turns.learn([(id(2), 'b'), (id(3), 'c'), (id(1), 'a')]);
        turns.again('a', 1);
        assert_eq!(turns.next(), Some(('b', 1)));
        assert_eq!(turns.next(), Some(('c', 1)), "it came meanwhile");
        assert_eq!(turns.next(), Some(('a', 2)), "behind the others");
        turns.again('a', TRIES);
        turns.learn([(id(1), 'a'), (id(2), 'b'), (id(3), 'c')]);
        assert_eq!(turns.next(), None, "tried often enough");
    }
}
