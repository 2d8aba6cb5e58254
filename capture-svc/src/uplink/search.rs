//! From "a cut is due" to the cut: looks for the moment, cuts, lets the workload go on. Of one volume, or of several that
//! are cut at one instant.
//!
//! [`Search`] decides; here the workloads are asked and the cut is made. What it sees of several volumes is the sum of
//! them: a lull is one of all. Whoever was frozen is let go on as soon as the cut has settled: before the interval is
//! recorded, and long before it is shipped.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use capture_core::coherence::{Effect, Event, Graded, Limits, Search, Seen, Why};
use futures::future::select_all;
use tidemark_block::Coherence;
use tokio::{
    sync::{Mutex, OwnedMutexGuard, watch},
    task::JoinHandle,
};

use super::{BaseTable, blocking, now_ms, ship::stopped};
use crate::{
    engine::{
        CutAt, Engine, EngineError, EngineKind, IntervalCut,
        group::{self, GroupError},
        intercept::Sample,
    },
    quiesce::{Answer, Hints, Quiesce},
};

/// What the engines say to a cut: the interval of each, and what its data path had done right after the flip.
type Begun = Result<Vec<(IntervalCut, Option<Sample>)>, GroupError>;

/// A volume that is to be cut.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) engine: Arc<Engine>,
    pub(super) table: Arc<BaseTable>,
    pub(super) quiesce: Arc<Mutex<Quiesce>>,
    pub(super) hints: Hints,
    /// Set before the flip: what is asked for from then on is not in this cut.
    pub(super) cutting: Arc<AtomicBool>,
    /// The search ends where one of its volumes stops.
    pub(super) stop: watch::Receiver<bool>,
    /// No later than the time of any of its writes.
    pub(super) started: Instant,
    pub(super) last_cut_ms: u64,
    /// The longest that whoever freezes it may have to hold still for the cut itself.
    pub(super) quiesce_timeout: Duration,
    /// The vault has its base, and the digest is known: where nothing has changed no cut is needed.
    pub(super) has_base: bool,
}

impl Member {
    fn is_unchanged(&self) -> bool {
        self.has_base && self.engine.changed_hint() == Some(0)
    }
}

/// What a search came to, for one of its volumes.
#[derive(Debug)]
pub(super) enum Found {
    /// A cut, not recorded yet.
    Cut {
        cut: IntervalCut,
        cut_time_ms: u64,
        graded: Graded,
    },
    /// Nothing has changed: no cut was needed.
    Unchanged { cut_time_ms: u64 },
    /// By policy nothing is cut.
    Skipped(Why),
    /// The cut could not be made.
    Failed(String),
    /// The service stops, or one of the volumes does.
    Stopped,
}

/// Finds the moment and cuts all of them, or none. One answer for each, in their order.
pub(super) async fn find(members: Vec<Member>, limits: Limits) -> Vec<Found> {
    let count = members.len();
    let same = |found: fn() -> Found| (0..count).map(|_| found()).collect();
    let mut searching = Searching::begin(members, limits).await;
    match searching.look().await {
        Ended::Cut(found) => found,
        Ended::Unchanged { cut_time_ms } => (0..count)
            .map(|_| Found::Unchanged { cut_time_ms })
            .collect(),
        Ended::Skipped(why) => (0..count).map(|_| Found::Skipped(why.clone())).collect(),
        Ended::Failed(error) => (0..count).map(|_| Found::Failed(error.clone())).collect(),
        Ended::Stopped => same(|| Found::Stopped),
    }
}

/// How a search ended, for all.
enum Ended {
    Cut(Vec<Found>),
    Unchanged { cut_time_ms: u64 },
    Skipped(Why),
    Failed(String),
    Stopped,
}

enum Next {
    Look,
    Cut,
    Skip(Why),
}

/// A cut that is being made.
struct Cutting {
    task: JoinHandle<Begun>,
    /// Nobody wants it any more.
    abandoned: Arc<AtomicBool>,
}

struct Searching {
    members: Vec<Member>,
    limits: Limits,
    quiesces: Vec<OwnedMutexGuard<Quiesce>>,
    /// By party: the member, and its number there.
    parties: Vec<(usize, usize)>,
    /// Times are counted from here.
    origin: Instant,
}

impl Searching {
    async fn begin(members: Vec<Member>, limits: Limits) -> Self {
        let mut quiesces = Vec::with_capacity(members.len());
        for member in &members {
            quiesces.push(Arc::clone(&member.quiesce).lock_owned().await);
        }
        let origins = members.iter().map(|member| member.started);
        Self {
            origin: origins.min().unwrap_or_else(Instant::now),
            members,
            limits,
            quiesces,
            parties: Vec::new(),
        }
    }

    /// Who takes part, in the order in which they freeze.
    async fn gather(&mut self) -> Vec<capture_core::coherence::Party> {
        let mut all = Vec::new();
        let several = self.members.len() > 1;
        for (at, (member, quiesce)) in self.members.iter_mut().zip(&mut self.quiesces).enumerate() {
            let held = member.hints.take();
            for (local, mut party) in quiesce.gather(&held).await.into_iter().enumerate() {
                if several {
                    party.name = format!("{} of {}", party.name, member.name);
                }
                self.parties.push((at, local));
                all.push(party);
            }
        }
        all
    }

    async fn look(&mut self) -> Ended {
        let parties = self.gather().await;
        if parties.is_empty() {
            self.set_cutting(true);
            if let Some(unchanged) = self.unchanged_at(self.next_cut_ms()) {
                return unchanged;
            }
            self.set_cutting(false);
        }
        let (mut search, mut effects) =
            Search::begin(self.origin.elapsed(), self.seen(), self.limits, parties);
        loop {
            match self.perform(&effects) {
                Next::Look => {}
                Next::Cut => return self.cut(search).await,
                Next::Skip(why) => return Ended::Skipped(why),
            }
            let wake = self.origin + search.wake().unwrap_or_default();
            let event = tokio::select! {
                () = any_stopped(&self.members) => None,
                () = tokio::time::sleep_until(wake.into()) => Some(Event::Look),
                (party, answer) = answered(&mut self.quiesces, &self.parties) => {
                    Some(of_answer(party, answer))
                }
            };
            let Some(event) = event else {
                self.end(&mut search, Event::Abandoned);
                return Ended::Stopped;
            };
            effects = search.on(self.origin.elapsed(), self.seen(), event);
        }
    }

    async fn cut(&mut self, mut search: Search) -> Ended {
        self.set_cutting(true);
        // Before the hint: what is counted as unchanged was so at this time.
        let cut_time_ms = self.next_cut_ms();
        if let Some(unchanged) = self.unchanged_at(cut_time_ms) {
            self.end(&mut search, Event::CutFailed);
            return unchanged;
        }
        let quiesced = search.is_held();
        let mut cutting = self.begin_cut(quiesced);
        let limits = self.members.iter().map(|member| member.quiesce_timeout);
        let limit = limits.min().filter(|_| !self.parties.is_empty());
        let begun = tokio::select! {
            begun = &mut cutting.task => begun,
            () = elapsed(limit) => {
                return self.cut_too_late(search, cutting, limit.unwrap_or_default()).await;
            }
            () = any_stopped(&self.members) => {
                cutting.abandoned.store(true, SeqCst);
                cutting.task.await
            }
        };
        let (error, event) = match begun {
            Ok(Ok(cuts)) => {
                // Whoever went away before the cut was made may not have held still.
                while let Some((party, answer)) = self.answered_now() {
                    if answer.is_err() {
                        self.end(&mut search, of_answer(party, answer));
                    }
                }
                let seen = self.sum(cuts.iter().map(|(_, at_flip)| *at_flip));
                let effects = search.on(self.origin.elapsed(), seen, Event::CutMade);
                self.perform(&effects);
                let graded = effects.into_iter().find_map(|effect| match effect {
                    Effect::Graded(graded) => Some(graded),
                    _ => None,
                });
                let false_start = self.is_false_start(quiesced, graded.as_ref());
                if let Some(why) = false_start {
                    return give_up(&self.members, cuts, why.to_owned()).await;
                }
                if let Some(graded) = graded {
                    let found = cuts.into_iter().map(|(cut, _)| Found::Cut {
                        cut,
                        cut_time_ms,
                        graded: graded.clone(),
                    });
                    return Ended::Cut(found.collect());
                }
                ("a cut without a grade".to_owned(), Event::CutFailed)
            }
            Ok(Err(GroupError {
                error: EngineError::Closed | EngineError::Abandoned,
                ..
            })) => {
                self.end(&mut search, Event::Abandoned);
                return Ended::Stopped;
            }
            Ok(Err(error)) => {
                if let EngineError::Table(error) = &error.error {
                    // Of a group no engine reads one.
                    self.members[0].table.failed(error);
                }
                (self.told(&error), Event::CutFailed)
            }
            Err(error) => (error.to_string(), Event::CutFailed),
        };
        self.end(&mut search, event);
        Ended::Failed(error)
    }

    /// A cut takes too long while the workload holds still. Everyone is let go on first: that may be what it waits for.
    async fn cut_too_late(
        &mut self,
        mut search: Search,
        cutting: Cutting,
        limit: Duration,
    ) -> Ended {
        self.end(&mut search, Event::CutFailed);
        cutting.abandoned.store(true, SeqCst);
        let cuts = match cutting.task.await {
            Ok(Ok(cuts)) => cuts,
            Ok(Err(GroupError {
                error: EngineError::Closed,
                ..
            })) => return Ended::Stopped,
            Ok(Err(GroupError {
                error: EngineError::Abandoned,
                ..
            })) => Vec::new(),
            Ok(Err(error)) => return Ended::Failed(self.told(&error)),
            Err(error) => return Ended::Failed(error.to_string()),
        };
        let why = format!(
            "the workload was let go on before the cut was made, which took longer than quiesce_timeout ({limit:?}): \
             freeze what is in the volume, never the filesystem that the volume file lies on, or raise quiesce_timeout (with \
             the engine scan the whole file is read meanwhile)"
        );
        give_up(&self.members, cuts, why).await
    }

    /// Sets the cut going.
    fn begin_cut(&self, quiesced: bool) -> Cutting {
        let engines: Vec<_> = self.members.iter().map(|m| Arc::clone(&m.engine)).collect();
        // Engines of a group compare nothing.
        let table = self.members.first().map(|member| &member.table);
        let base = table
            .filter(|table| table.is_sound())
            .map(|table| table.table());
        let abandoned = Arc::new(AtomicBool::new(false));
        let (limits, stop) = (self.limits, Arc::clone(&abandoned));
        let task = tokio::task::spawn_blocking(move || {
            let at = CutAt {
                quiesced,
                base: base.as_deref(),
                lull_wait_max: limits.lull_wait_max,
                lull_min: limits.lull_min,
                abandoned: Some(&stop),
            };
            group::begin_intervals(&engines, &at)
        });
        Cutting { task, abandoned }
    }

    /// Why a cut that compared the file with the table is none, where what it went by wasn't so.
    fn is_false_start(&self, quiesced: bool, graded: Option<&Graded>) -> Option<&'static str> {
        let mut members = self.members.iter();
        let scan = members.find(|member| member.engine.kind() == EngineKind::Scan)?;
        let holds = graded.is_some_and(|graded| graded.coherence == Coherence::Quiesced);
        if quiesced && !holds {
            Some("the workload was let go on while the cut was made: it is tried again")
        } else if !scan.table.is_sound() {
            Some(
                "the checksum table is in doubt since the cut began: it is compared with the vault's, then there is a cut",
            )
        } else {
            None
        }
    }

    /// What a cut failed with, and which volume where there are several.
    fn told(&self, failed: &GroupError) -> String {
        match &self.members[..] {
            [_] => failed.to_string(),
            members => format!("volume {}: {failed}", members[failed.index].name),
        }
    }

    fn set_cutting(&self, cutting: bool) {
        for member in &self.members {
            member.cutting.store(cutting, SeqCst);
        }
    }

    /// One time for all, and later than that of the last cut of each.
    fn next_cut_ms(&self) -> u64 {
        let last = self.members.iter().map(|member| member.last_cut_ms).max();
        now_ms().max(last.unwrap_or(0) + 1)
    }

    fn unchanged_at(&self, cut_time_ms: u64) -> Option<Ended> {
        let unchanged = self.members.iter().all(Member::is_unchanged);
        unchanged.then_some(Ended::Unchanged { cut_time_ms })
    }

    fn seen(&self) -> Seen {
        self.sum(self.members.iter().map(|member| member.engine.activity()))
    }

    fn sum(&self, samples: impl Iterator<Item = Option<Sample>>) -> Seen {
        let each =
            samples.map(|sample| sample.map_or(Seen::NOTHING, |sample| sample.since(self.origin)));
        each.reduce(Seen::and).unwrap_or_default()
    }

    fn answered_now(&mut self) -> Option<(usize, Answer)> {
        let mut members = self.quiesces.iter_mut().enumerate();
        members.find_map(|(member, quiesce)| {
            let (local, answer) = quiesce.answered_now()?;
            let party = self.parties.iter().position(|at| *at == (member, local))?;
            Some((party, answer))
        })
    }

    fn end(&mut self, search: &mut Search, event: Event) {
        let effects = search.on(self.origin.elapsed(), self.seen(), event);
        self.perform(&effects);
    }

    fn perform(&mut self, effects: &[Effect]) -> Next {
        let graded = effects.iter().find_map(|effect| match effect {
            Effect::Graded(graded) => Some(graded),
            _ => None,
        });
        for (at, quiesce) in self.quiesces.iter_mut().enumerate() {
            let epoch = self.members[at].engine.epoch();
            let thaws: Vec<_> = effects
                .iter()
                .filter_map(|effect| match effect {
                    Effect::Thaw(party) => Some(self.parties[*party]),
                    _ => None,
                })
                .filter_map(|(member, local)| (member == at).then_some(local))
                .collect();
            quiesce.thaw(&thaws, epoch, graded);
        }
        let mut next = Next::Look;
        for effect in effects {
            match effect {
                Effect::Freeze(party) => {
                    let (at, local) = self.parties[*party];
                    let epoch = self.members[at].engine.epoch();
                    self.quiesces[at].freeze(local, epoch);
                }
                Effect::Cut => next = Next::Cut,
                Effect::Skip(why) => next = Next::Skip(why.clone()),
                Effect::Thaw(_) | Effect::Graded(_) => {}
            }
        }
        next
    }
}

/// One of the volumes stops.
fn any_stopped(members: &[Member]) -> impl Future<Output = ()> + 'static {
    let mut stops: Vec<_> = members.iter().map(|member| member.stop.clone()).collect();
    async move {
        select_all(stops.iter_mut().map(|stop| Box::pin(stopped(stop)))).await;
    }
}

/// So much time has passed; never without a limit.
async fn elapsed(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Lets go of cuts that are none, and says why.
async fn give_up(
    members: &[Member],
    cuts: Vec<(IntervalCut, Option<Sample>)>,
    why: String,
) -> Ended {
    let engines: Vec<_> = members.iter().map(|m| Arc::clone(&m.engine)).collect();
    let given_up = blocking(move || {
        drop(cuts);
        for engine in engines {
            engine.give_up_interval()?;
        }
        Ok(())
    });
    if let Err(error) = given_up.await {
        tracing::warn!(error = %format!("{error:#}"), "give up the interval");
    }
    Ended::Failed(why)
}

/// The next answer of any of them, with the number of the party.
async fn answered(
    quiesces: &mut [OwnedMutexGuard<Quiesce>],
    parties: &[(usize, usize)],
) -> (usize, Answer) {
    loop {
        let answers = quiesces
            .iter_mut()
            .map(|quiesce| Box::pin(quiesce.answered()));
        let ((local, answer), member, _) = select_all(answers).await;
        if let Some(party) = parties.iter().position(|at| *at == (member, local)) {
            return (party, answer);
        }
    }
}

fn of_answer(party: usize, answer: Answer) -> Event {
    match answer {
        Ok(()) => Event::Frozen(party),
        Err(failure) => Event::Failed(party, failure),
    }
}
