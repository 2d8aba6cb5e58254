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
use tidemark_proto::Reason;
use tidemark_telemetry::{SpanExt, step};
use tokio::{
    sync::{Mutex, OwnedMutexGuard, watch},
    task::JoinHandle,
};
use tracing::{Instrument, Span};

use super::{BaseTable, blocking, now_ms, ship::stopped};
use crate::{
    engine::{
        CutAt, Engine, EngineError, EngineKind, IntervalCut,
        group::{self, GroupError},
        intercept::Sample,
    },
    quiesce::{Answer, Hints, Quiesce},
};

/// What the engines say to a cut: what each has made, and what its data path had done right after the flip.
pub(super) type Begun<M> = Result<Vec<(M, Option<Sample>)>, GroupError>;

/// What a cut is made for.
pub(super) trait Aim: Send + Sync + 'static {
    /// What comes of it, for each volume.
    type Made: Send + 'static;

    /// Cuts all of them at one instant.
    fn cut(&self, engines: &[Arc<Engine>], cut_time_ms: u64, at: &CutAt<'_>) -> Begun<Self::Made>;

    /// Undoes a cut that came too late, or is none.
    fn undo(engine: &Engine, made: Self::Made) -> Result<(), EngineError>;
}

/// An interval of each.
pub(super) struct Intervals;

impl Aim for Intervals {
    type Made = IntervalCut;

    fn cut(&self, engines: &[Arc<Engine>], _: u64, at: &CutAt<'_>) -> Begun<IntervalCut> {
        group::begin_intervals(engines, at)
    }

    fn undo(engine: &Engine, made: IntervalCut) -> Result<(), EngineError> {
        drop(made);
        engine.give_up_interval()?;
        match engine {
            // What it went by may not have been so.
            Engine::Scan(engine) => engine.doubt(),
            Engine::Intercept(_) | Engine::Reflink(_) => Ok(()),
        }
    }
}

/// A cut that is wanted.
pub(super) struct Want<A> {
    pub(super) aim: Arc<A>,
    pub(super) limits: Limits,
    /// Nobody is asked to freeze, and no moment is waited for.
    pub(super) at_once: bool,
}

impl Want<Intervals> {
    /// Of intervals, at the best moment within limits.
    pub(super) fn intervals(limits: Limits) -> Self {
        Self {
            aim: Arc::new(Intervals),
            limits,
            at_once: false,
        }
    }
}

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
pub(super) enum Found<M = IntervalCut> {
    /// A cut, not recorded yet.
    Cut {
        cut: M,
        cut_time_ms: u64,
        graded: Graded,
    },
    /// Nothing has changed: no cut was needed.
    Unchanged { cut_time_ms: u64 },
    /// By policy nothing is cut.
    Skipped(Why),
    /// The cut could not be made.
    Failed(CutError),
    /// The service stops, or one of the volumes does; or nobody wants it any more.
    Stopped,
}

/// Why a cut could not be made.
#[derive(Debug, Clone)]
pub(super) struct CutError {
    /// Of which volume, and why, as people are told.
    pub(super) message: String,
    /// The position of the volume whose engine refused, and what it said.
    pub(super) refused: Option<(usize, Arc<EngineError>)>,
}

impl From<String> for CutError {
    fn from(message: String) -> Self {
        Self {
            message,
            refused: None,
        }
    }
}

/// Finds the moment and cuts all of them, or none; not where it isn't wanted any more, once `unwanted` ends. One answer
/// for each, in their order, which is that of their names: two searches never wait for each other.
pub(super) async fn find<A: Aim>(
    members: Vec<Member>,
    want: Want<A>,
    unwanted: impl Future<Output = ()>,
) -> Vec<Found<A::Made>> {
    let count = members.len();
    let mut searching = Searching::begin(members, want).await;
    let each: Box<dyn Fn() -> Found<A::Made> + Send> = match searching.look(unwanted).await {
        Ended::Cut(found) => return found,
        Ended::Unchanged { cut_time_ms } => Box::new(move || Found::Unchanged { cut_time_ms }),
        Ended::Skipped(why) => Box::new(move || Found::Skipped(why.clone())),
        Ended::Failed(error) => Box::new(move || Found::Failed(error.clone())),
        Ended::Stopped => Box::new(|| Found::Stopped),
    };
    (0..count).map(|_| each()).collect()
}

/// How a search ended, for all.
enum Ended<M> {
    Cut(Vec<Found<M>>),
    Unchanged { cut_time_ms: u64 },
    Skipped(Why),
    Failed(CutError),
    Stopped,
}

enum Next {
    Look,
    Cut,
    Skip(Why),
}

/// A cut that is being made.
struct Cutting<M> {
    task: JoinHandle<Begun<M>>,
    /// Nobody wants it any more.
    abandoned: Arc<AtomicBool>,
}

struct Searching<A> {
    want: Want<A>,
    members: Vec<Member>,
    quiesces: Vec<OwnedMutexGuard<Quiesce>>,
    /// By party: the member, and its number there.
    parties: Vec<(usize, usize)>,
    /// By party: its name, and its span from when it is asked to freeze until it is told to thaw.
    quiescing: Vec<(String, Span)>,
    /// Times are counted from here.
    origin: Instant,
}

impl<A: Aim> Searching<A> {
    async fn begin(members: Vec<Member>, want: Want<A>) -> Self {
        let mut quiesces = Vec::with_capacity(members.len());
        // At once: not even another search is waited for.
        for member in members.iter().filter(|_| !want.at_once) {
            quiesces.push(Arc::clone(&member.quiesce).lock_owned().await);
        }
        let origins = members.iter().map(|member| member.started);
        Self {
            origin: origins.min().unwrap_or_else(Instant::now),
            want,
            members,
            quiesces,
            parties: Vec::new(),
            quiescing: Vec::new(),
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
                self.quiescing.push((party.name.clone(), Span::none()));
                all.push(party);
            }
        }
        all
    }

    async fn look(&mut self, unwanted: impl Future<Output = ()>) -> Ended<A::Made> {
        let mut unwanted = std::pin::pin!(unwanted);
        let parties = self.gather().await;
        if parties.is_empty() {
            self.set_cutting(true);
            if let Some(unchanged) = self.unchanged_at(self.next_cut_ms()) {
                return unchanged;
            }
            self.set_cutting(false);
        }
        let (now, seen, limits) = (self.origin.elapsed(), self.seen(), self.want.limits);
        let (mut search, mut effects) = if self.want.at_once {
            Search::at_once(now, seen, limits)
        } else {
            Search::begin(now, seen, limits, parties)
        };
        loop {
            match self.perform(&effects) {
                Next::Look => {}
                Next::Cut => {
                    let span = step!("cut");
                    let ended = self.cut(search).instrument(span.clone()).await;
                    if let Ended::Failed(error) = &ended {
                        span.fail(Reason::IoFailed.as_str(), &error.message);
                    }
                    return ended;
                }
                Next::Skip(why) => return Ended::Skipped(why),
            }
            let wake = self.origin + search.wake().unwrap_or_default();
            let event = tokio::select! {
                () = any_stopped(&self.members) => None,
                () = &mut unwanted => None,
                () = tokio::time::sleep_until(wake.into()) => Some(Event::Look),
                (party, answer) = answered(&mut self.quiesces, &self.parties) => {
                    if let Err(failure) = &answer {
                        let (_, span) = &self.quiescing[party];
                        span.fail(Reason::NotQuiesced.as_str(), &format!("{failure:?}"));
                    }
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

    async fn cut(&mut self, mut search: Search) -> Ended<A::Made> {
        self.set_cutting(true);
        // Before the hint: what is counted as unchanged was so at this time.
        let cut_time_ms = self.next_cut_ms();
        if let Some(unchanged) = self.unchanged_at(cut_time_ms) {
            self.end(&mut search, Event::CutFailed);
            return unchanged;
        }
        let quiesced = search.is_held();
        let mut cutting = self.begin_cut(cut_time_ms, quiesced);
        let limits = self.members.iter().map(|member| member.quiesce_timeout);
        // Where nobody is held nobody has to be let go on.
        let limit = limits.min().filter(|_| quiesced);
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
                if let Some(why) = self.is_false_start(quiesced, graded.as_ref()) {
                    self.undo(cuts).await;
                    return Ended::Failed(why.to_owned().into());
                }
                if let Some(graded) = graded {
                    let found = cuts.into_iter().map(|(cut, _)| Found::Cut {
                        cut,
                        cut_time_ms,
                        graded: graded.clone(),
                    });
                    return Ended::Cut(found.collect());
                }
                let ungraded = "a cut without a grade".to_owned();
                (CutError::from(ungraded), Event::CutFailed)
            }
            Ok(Err(GroupError {
                error: EngineError::Closed | EngineError::Abandoned,
                ..
            })) => {
                self.end(&mut search, Event::Abandoned);
                return Ended::Stopped;
            }
            Ok(Err(error)) => (self.told(error), Event::CutFailed),
            Err(error) => (error.to_string().into(), Event::CutFailed),
        };
        self.end(&mut search, event);
        Ended::Failed(error)
    }

    /// A cut takes too long while the workload holds still. Everyone is let go on first: that may be what it waits for.
    async fn cut_too_late(
        &mut self,
        mut search: Search,
        cutting: Cutting<A::Made>,
        limit: Duration,
    ) -> Ended<A::Made> {
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
            Ok(Err(error)) => return Ended::Failed(self.told(error)),
            Err(error) => return Ended::Failed(error.to_string().into()),
        };
        self.undo(cuts).await;
        let message = format!(
            "the workload was let go on before the cut was made, which took longer than quiesce_timeout ({limit:?}): \
             freeze what is in the volume, never the filesystem that the volume file lies on, or raise quiesce_timeout (with \
             the engine scan the whole file is read meanwhile)"
        );
        Ended::Failed(message.into())
    }

    /// Sets the cut going.
    fn begin_cut(&self, cut_time_ms: u64, quiesced: bool) -> Cutting<A::Made> {
        let engines: Vec<_> = self.members.iter().map(|m| Arc::clone(&m.engine)).collect();
        // Engines of a group compare nothing.
        let table = self.members.first().map(|member| &member.table);
        let base = table
            .filter(|table| table.is_sound())
            .map(|table| table.table());
        let abandoned = Arc::new(AtomicBool::new(false));
        let (limits, stop) = (self.want.limits, Arc::clone(&abandoned));
        let aim = Arc::clone(&self.want.aim);
        let span = Span::current();
        let task = tokio::task::spawn_blocking(move || {
            let _within = span.enter();
            let at = CutAt {
                quiesced,
                base: base.as_deref(),
                lull_wait_max: limits.lull_wait_max,
                lull_min: limits.lull_min,
                abandoned: Some(&stop),
            };
            aim.cut(&engines, cut_time_ms, &at)
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

    /// Lets go of what was made.
    async fn undo(&self, cuts: Vec<(A::Made, Option<Sample>)>) {
        let engines: Vec<_> = self.members.iter().map(|m| Arc::clone(&m.engine)).collect();
        let undone = blocking(move || {
            for (engine, (made, _)) in engines.iter().zip(cuts) {
                A::undo(engine, made)?;
            }
            Ok(())
        });
        if let Err(error) = undone.await {
            tracing::warn!(error = %format!("{error:#}"), "undo a cut that came too late, or is none");
        }
    }

    /// What a cut failed with, and which volume where there are several.
    fn told(&self, failed: GroupError) -> CutError {
        if let EngineError::Table(error) = &failed.error {
            self.members[failed.index].table.failed(error);
        }
        let message = match &self.members[..] {
            [_] => failed.to_string(),
            members => format!("volume {}: {failed}", members[failed.index].name),
        };
        CutError {
            message,
            refused: Some((failed.index, Arc::new(failed.error))),
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

    fn unchanged_at(&self, cut_time_ms: u64) -> Option<Ended<A::Made>> {
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
                    let (name, span) = &mut self.quiescing[*party];
                    *span = step!("quiesce");
                    span.note("party", name);
                    let epoch = self.members[at].engine.epoch();
                    self.quiesces[at].freeze(local, epoch);
                }
                Effect::Cut => next = Next::Cut,
                Effect::Skip(why) => next = Next::Skip(why.clone()),
                Effect::Thaw(party) => self.quiescing[*party].1 = Span::none(),
                Effect::Graded(_) => {}
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
