//! Ships the intervals of one volume to the vault: performs what the state machine decides.
//!
//! One task per volume. It asks [`capture_core::uplink::Uplink`] what to do, does it, and tells how it ended; blocking
//! work goes to blocking threads. The order of durable steps is here, and only here: id before header, base before
//! release, release before table, doubt before anything that could make it look unneeded.

mod link;
mod open;
mod pending;
mod produce;
mod record;
mod resync;
mod settle;
mod ship;
mod status;
mod table;
pub(crate) mod walk;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use capture_core::{
    codec::CodecRule,
    interval::{Controller, Event as IntervalEvent, Ticket, Triggers},
    uplink::{Action, Event, Failure, Uplink as Machine},
};
use tidemark_block::{
    BlockSet, Coherence, Geometry, IntervalHeader, IntervalId, Receipt, Trigger, VolumeId,
};
use tidemark_proto::{
    Reason, RpcError,
    convert::{CurrentMark, TermRequest},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};

pub(crate) use open::Opened;
pub use status::{UplinkState, UplinkStatus};
pub(crate) use table::BaseTable;

use crate::engine::{Engine, EngineError, IntervalCut};
use link::{Link, failure_of};
use record::{IntervalRecord, UplinkRecord};
use resync::{Doubt, ResyncError, Target};
pub(crate) use ship::stopped;
use ship::{ShipError, Shipment, Shipped};

/// Requests that may wait to be noticed.
const REQUESTS_MAX: usize = 64;
/// How often the number of changed blocks is looked at while `changed_blocks_max` is set.
const CHANGED_PERIOD: Duration = Duration::from_millis(250);

/// What one volume's uplink is told.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) volume: VolumeId,
    pub(crate) name: String,
    pub(crate) source_name: String,
    pub(crate) geometry: Geometry,
    pub(crate) vault: String,
    /// The volume's state directory.
    pub(crate) dir: PathBuf,
    pub(crate) triggers: Triggers,
    pub(crate) backoff: capture_core::interval::Backoff,
    pub(crate) codec: CodecRule,
    pub(crate) zstd_level: i32,
    pub(crate) bytes_in_flight_max: u64,
}

/// What the uplink can be asked.
#[derive(Debug)]
pub(crate) enum Request {
    /// An interval from now on.
    Interval(oneshot::Sender<Result<Receipt, RpcError>>),
    /// Blocks have joined the doubt: an interval soon.
    Doubted,
}

/// A running uplink.
#[derive(Debug)]
pub(crate) struct Uplink {
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<UplinkStatus>,
    table: Arc<BaseTable>,
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
        let started = Instant::now();
        let initial = opened.record.base.get() == 0;
        let in_flight = opened.cut.is_some();
        let driver = Driver {
            machine: Machine::new(opened.facts, settings.backoff),
            controller: Controller::new(settings.triggers, Duration::ZERO, initial, in_flight),
            settings,
            engine,
            table: opened.table,
            record: opened.record,
            cut: opened.cut,
            announced: true,
            link: None,
            in_flight_max: 0,
            inbox,
            waiters: HashMap::new(),
            tickets: 0,
            show,
            stop: stopping,
            started,
            stamping: None,
        };
        Self {
            requests,
            status,
            table,
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
            .send(Request::Interval(answer))
            .await
            .map_err(|_| shutting_down())?;
        Ok(receipt)
    }

    /// A way to say that blocks have joined the doubt.
    pub(crate) fn requests(&self) -> mpsc::Sender<Request> {
        self.requests.clone()
    }

    /// What it shows.
    pub(crate) fn status(&self) -> watch::Receiver<UplinkStatus> {
        self.status.clone()
    }

    /// The checksum table of the base.
    pub(crate) const fn table(&self) -> &Arc<BaseTable> {
        &self.table
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

#[derive(Clone)]
struct EngineDoubt(Arc<Engine>);

impl Doubt for EngineDoubt {
    fn doubt(&self, blocks: &BlockSet) -> Result<()> {
        if !blocks.is_empty() {
            self.0.doubt(blocks).context("put blocks in doubt")?;
        }
        Ok(())
    }
}

struct Driver {
    settings: Settings,
    engine: Arc<Engine>,
    table: Arc<BaseTable>,
    record: UplinkRecord,
    machine: Machine,
    controller: Controller,
    /// The open interval.
    cut: Option<IntervalCut>,
    /// Whether the vault may know the open interval.
    announced: bool,
    link: Option<Link>,
    in_flight_max: u64,
    inbox: mpsc::Receiver<Request>,
    waiters: HashMap<Ticket, oneshot::Sender<Result<Receipt, RpcError>>>,
    tickets: u64,
    show: watch::Sender<UplinkStatus>,
    stop: watch::Receiver<bool>,
    started: Instant,
    stamping: Option<JoinHandle<()>>,
}

/// What performing an action led to.
enum Outcome {
    Event(Event),
    /// Nothing that the state machine must know.
    Again,
    Stop,
}

impl Driver {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    #[tracing::instrument(name = "uplink", skip_all, fields(volume = %self.settings.name))]
    async fn run(mut self) {
        while !*self.stop.borrow() {
            self.notice_requests();
            let action = self.machine.next(self.now());
            self.show_action(action);
            let outcome = match action {
                Action::StartTerm => self.start_term().await,
                Action::AdoptHead { head, doubt } => self.adopt_head(head, doubt).await,
                Action::RepairTable => self.repair_table().await,
                Action::DropInterval => self.drop_interval().await,
                Action::AwaitCut => self.await_cut().await,
                Action::Ship(_) => self.ship().await,
                Action::Wait { until } => self.wait(until).await,
                Action::Halt => self.halt().await,
            };
            match outcome {
                Outcome::Event(event) => self.machine.on(self.now(), event),
                Outcome::Again => {}
                Outcome::Stop => break,
            }
        }
        self.cut = None;
        for (_, waiter) in self.waiters.drain() {
            let _ = waiter.send(Err(shutting_down()));
        }
        self.stamp_at_end().await;
    }

    fn show_action(&self, action: Action) {
        let state = match action {
            Action::StartTerm => UplinkState::Connecting,
            Action::AdoptHead { .. } | Action::RepairTable => UplinkState::Resyncing,
            Action::DropInterval => return,
            Action::AwaitCut => UplinkState::Idle,
            Action::Ship(_) => UplinkState::Shipping,
            Action::Wait { .. } => UplinkState::Backoff,
            Action::Halt => UplinkState::Fenced,
        };
        self.show.send_if_modified(|status| {
            let changed = status.state != state;
            status.state = state;
            if state == UplinkState::Idle {
                status.error = None;
            }
            changed
        });
    }

    /// Takes note of a failure: logs it once, shows it, and says what it means.
    fn failed(&mut self, what: &str, error: &RpcError, failure: Failure) -> Outcome {
        if failure == Failure::Mismatch {
            tracing::error!(
                error = %error, reason = %error.reason, action = %error.action,
                "{what}: source and vault disagree about the image; their checksum tables are compared"
            );
            self.show
                .send_modify(|status| status.digest_mismatches += 1);
        } else {
            tracing::warn!(error = %error, reason = %error.reason, action = %error.action, "{what}");
        }
        self.show.send_modify(|status| {
            status.error = Some(if error.action.is_empty() {
                error.message.clone()
            } else {
                format!("{}: {}", error.message, error.action)
            });
        });
        self.link = None;
        Outcome::Event(Event::Failed {
            failure,
            jitter_permille: jitter(),
        })
    }

    fn failed_here(&mut self, what: &str, error: &anyhow::Error) -> Outcome {
        let error = RpcError::new(
            Reason::IoFailed,
            format!("{what}: {error:#}"),
            "check the disk; it is tried again by itself",
        );
        self.failed(what, &error, Failure::Transient)
    }

    async fn store(&self, record: UplinkRecord) -> Result<()> {
        let path = open::record_path(&self.settings.dir);
        blocking(move || record.store(&path)).await
    }

    async fn start_term(&mut self) -> Outcome {
        let request = TermRequest {
            volume: self.settings.volume,
            volume_name: self.settings.name.clone(),
            source_name: self.settings.source_name.clone(),
            geometry: self.settings.geometry,
            last_term: open::last_term(&self.record),
            nonce: self.record.nonce,
        };
        let vault = self.settings.vault.clone();
        let connect = async {
            let link = Link::connect(&vault).await?;
            let grant = link.start_term(request).await?;
            Ok::<_, RpcError>((link, grant))
        };
        let mut stop = self.stop.clone();
        let granted = tokio::select! {
            () = stopped(&mut stop) => return Outcome::Stop,
            granted = connect => granted,
        };
        let (link, grant) = match granted {
            Ok(granted) => granted,
            Err(error) => {
                let failure = match failure_of(&error) {
                    Failure::Fenced => Failure::Fenced,
                    _ => Failure::Transient,
                };
                return self.failed("ask the vault for the writer term", &error, failure);
            }
        };
        if !self.record.nonce_granted || self.record.term != grant.term {
            let mut record = self.record.clone();
            record.term = grant.term;
            record.nonce_granted = true;
            if let Err(error) = self.store(record.clone()).await {
                return self.failed_here("record the writer term", &error);
            }
            self.record = record;
            tracing::info!(term = %grant.term, "the writer term is granted");
        }
        self.link = Some(link);
        self.in_flight_max = grant
            .bytes_in_flight_max
            .min(self.settings.bytes_in_flight_max);
        let term = grant.term;
        self.show.send_modify(|status| status.term = term);
        Outcome::Event(Event::Granted { head: grant.head })
    }

    async fn repair_table(&mut self) -> Outcome {
        self.table.set_sound(false);
        if !self.record.table_doubtful {
            let mut record = self.record.clone();
            record.table_doubtful = true;
            if let Err(error) = self.store(record.clone()).await {
                return self.failed_here("record that the table is compared", &error);
            }
            self.record = record;
        }
        let Some(link) = self.link.clone() else {
            return self.failed_here("compare tables", &anyhow::anyhow!("not connected"));
        };
        let target = Target {
            volume: self.settings.volume,
            term: self.record.term,
            generation: self.record.base,
            digest: self.record.base_digest,
        };
        let table = Arc::clone(self.table.table());
        let doubt = EngineDoubt(Arc::clone(&self.engine));
        let mut stop = self.stop.clone();
        let done = tokio::select! {
            () = stopped(&mut stop) => return Outcome::Stop,
            done = resync::resync(&link, target, &table, doubt) => done,
        };
        let differing = match done {
            Ok(differing) => differing,
            Err(ResyncError::Rpc(error)) => {
                let failure = failure_of(&error);
                return self.failed("compare checksum tables with the vault", &error, failure);
            }
            Err(ResyncError::Local(error)) => {
                return self.failed_here("compare checksum tables with the vault", &error);
            }
        };
        let base = self.record.base;
        let mut record = self.record.clone();
        record.table_doubtful = false;
        let path = open::record_path(&self.settings.dir);
        let stored = record.clone();
        let stamped = blocking(move || {
            table
                .sync_and_stamp(base)
                .context("sync the checksum table")?;
            stored.store(&path)
        });
        if let Err(error) = stamped.await {
            return self.failed_here("record the compared table", &error);
        }
        self.record = record;
        self.table.set_sound(true);
        tracing::info!(generation = %base, differing, "the checksum table is that of the vault");
        if differing > 0 {
            let now = self.now();
            self.controller.on(now, IntervalEvent::ResyncWanted);
        }
        Outcome::Event(Event::TableRepaired)
    }

    async fn wait(&mut self, until: Duration) -> Outcome {
        let mut stop = self.stop.clone();
        tokio::select! {
            () = stopped(&mut stop) => Outcome::Stop,
            () = tokio::time::sleep_until(self.started + until) => Outcome::Again,
            request = self.inbox.recv() => match request {
                Some(request) => {
                    self.take(request);
                    Outcome::Event(Event::Poked)
                }
                None => Outcome::Stop,
            },
        }
    }

    /// Nothing more is shipped: whoever asks for an interval is told so.
    async fn halt(&mut self) -> Outcome {
        let fenced = RpcError::new(
            Reason::Fenced,
            format!(
                "volume {} has another writer at the vault",
                self.settings.name
            ),
            "find the other writer; to ship from here again, remove the volume and add it anew",
        );
        self.controller.drain();
        for (_, waiter) in self.waiters.drain() {
            let _ = waiter.send(Err(fenced.clone()));
        }
        if let Some(IntervalCut { .. }) = self.cut.take() {
            let engine = Arc::clone(&self.engine);
            if let Err(error) = blocking(move || Ok(engine.give_up_interval()?)).await {
                tracing::warn!(error = %format!("{error:#}"), "give up the interval");
            }
        }
        let mut stop = self.stop.clone();
        tokio::select! {
            () = stopped(&mut stop) => Outcome::Stop,
            request = self.inbox.recv() => match request {
                Some(request) => {
                    self.take(request);
                    Outcome::Again
                }
                None => Outcome::Stop,
            },
        }
    }

    fn notice_requests(&mut self) {
        while let Ok(request) = self.inbox.try_recv() {
            self.take(request);
        }
    }

    fn take(&mut self, request: Request) {
        let now = self.now();
        match request {
            Request::Interval(answer) => {
                self.tickets += 1;
                let ticket = Ticket(self.tickets);
                // Whoever hung up isn't waited for, but the interval comes all the same.
                self.waiters.retain(|_, waiter| !waiter.is_closed());
                self.waiters.insert(ticket, answer);
                self.controller.on(now, IntervalEvent::Requested(ticket));
            }
            Request::Doubted => {
                self.controller.on(now, IntervalEvent::ResyncWanted);
            }
        }
    }

    async fn await_cut(&mut self) -> Outcome {
        self.stamp_behind();
        loop {
            self.notice_requests();
            let now = self.now();
            let hint = self.engine.changed_hint();
            self.controller.on(now, IntervalEvent::Changed(hint));
            if let Some(trigger) = self.controller.due(now) {
                return self.cut(trigger).await;
            }
            let mut wake = self.controller.wake(now).unwrap_or(now + CHANGED_PERIOD);
            if self.settings.triggers.changed_blocks_max.is_some() {
                wake = wake.min(now + CHANGED_PERIOD);
            }
            let mut stop = self.stop.clone();
            tokio::select! {
                () = stopped(&mut stop) => return Outcome::Stop,
                () = tokio::time::sleep_until(self.started + wake) => {}
                request = self.inbox.recv() => match request {
                    Some(request) => self.take(request),
                    None => return Outcome::Stop,
                },
            }
        }
    }

    async fn cut(&mut self, trigger: Trigger) -> Outcome {
        // Before the hint: what is counted as unchanged was so at this time.
        let cut_time_ms = now_ms().max(self.record.last_cut_ms + 1);
        let unchanged = self.engine.changed_hint() == 0 && self.record.base.get() > 0;
        if unchanged && self.record.base_digest.is_some() {
            let now = self.now();
            self.controller.on(now, IntervalEvent::Cut);
            return self
                .mark_current(IntervalId::from_bytes(random_id()), cut_time_ms)
                .await;
        }
        let engine = Arc::clone(&self.engine);
        let begun = tokio::task::spawn_blocking(move || engine.begin_interval()).await;
        let cut = match begun {
            Ok(Ok(cut)) => cut,
            Ok(Err(EngineError::Closed)) => return Outcome::Stop,
            Ok(Err(error)) => return self.cut_failed(&error.into()),
            Err(error) => return self.cut_failed(&error.into()),
        };
        let id = IntervalId::from_bytes(random_id());
        let mut record = self.record.clone();
        record.last_cut_ms = cut_time_ms;
        record.interval = Some(IntervalRecord {
            id,
            epoch: cut.epoch,
            base: record.base,
            cut_time_ms,
            coherence: Coherence::Crash,
            trigger,
        });
        if let Err(error) = self.store(record.clone()).await {
            drop(cut);
            let engine = Arc::clone(&self.engine);
            if let Err(error) = blocking(move || Ok(engine.give_up_interval()?)).await {
                tracing::warn!(error = %format!("{error:#}"), "give up the interval");
            }
            return self.cut_failed(&error);
        }
        tracing::info!(interval = %id, epoch = %cut.epoch, blocks = %cut.changed.len(), %trigger, "cut");
        self.record = record;
        self.cut = Some(cut);
        self.announced = false;
        let now = self.now();
        self.controller.on(now, IntervalEvent::Cut);
        self.show.send_modify(|status| status.bytes_sent = 0);
        Outcome::Event(Event::CutMade(id))
    }

    fn cut_failed(&mut self, error: &anyhow::Error) -> Outcome {
        let text = format!("{error:#}");
        tracing::error!(error = %text, "cut the volume");
        self.show.send_modify(|status| status.error = Some(text));
        let now = self.now();
        self.controller.on(
            now,
            IntervalEvent::GivenUp {
                jitter_permille: jitter(),
            },
        );
        Outcome::Again
    }

    async fn ship(&mut self) -> Outcome {
        if self.cut.is_none() {
            // Its receipt could not be recorded: it is asked for again.
            let engine = Arc::clone(&self.engine);
            let open = tokio::task::spawn_blocking(move || engine.open_interval()).await;
            self.cut = open.ok().flatten();
        }
        let (Some(interval), Some(cut), Some(link)) =
            (self.record.interval, self.cut.clone(), self.link.clone())
        else {
            return self.failed_here("ship", &anyhow::anyhow!("the interval is not open"));
        };
        let mut shipment = Shipment {
            link: &link,
            header: IntervalHeader {
                volume: self.settings.volume,
                term: self.record.term,
                interval: interval.id,
                base: interval.base,
                geometry: self.settings.geometry,
                epoch: interval.epoch,
                cut_time_ms: interval.cut_time_ms,
                coherence: interval.coherence,
                trigger: interval.trigger,
            },
            bytes_in_flight_max: self.in_flight_max,
            status: &self.show,
            stop: self.stop.clone(),
            announced: self.announced,
            progressed: false,
        };
        let job = produce::Job {
            image: cut.reader,
            changed: Arc::clone(&cut.changed),
            table: Arc::clone(self.table.table()),
            pending: pending::path_in(&self.settings.dir),
            key: self.pending_key(&interval),
            codec: self.settings.codec,
            zstd_level: self.settings.zstd_level,
        };
        let shipped = shipment.run(job).await;
        let (announced, progressed) = (shipment.announced, shipment.progressed);
        self.announced = announced;
        if progressed {
            let now = self.now();
            self.machine.on(now, Event::Progressed);
        }
        match shipped {
            Ok(Shipped::Receipt(receipt)) => self.settle(interval, receipt).await,
            Ok(Shipped::Unchanged) => self.mark_current(interval.id, interval.cut_time_ms).await,
            Err(ShipError::Stopped) => Outcome::Stop,
            Err(ShipError::GivenUp) => self.given_up().await,
            Err(ShipError::Rpc(error)) => {
                let failure = failure_of(&error);
                self.failed("ship the interval", &error, failure)
            }
            Err(ShipError::Local(walk::WalkError::Engine(
                error @ EngineError::SpoolDamaged { .. },
            ))) => {
                let error = RpcError::new(Reason::IoFailed, error.to_string(), "");
                self.failed("read the cut", &error, Failure::Refused)
            }
            Err(ShipError::Local(error)) => self.failed_here("read the cut", &error.into()),
        }
    }

    /// Says at the vault that the base is still current.
    async fn mark_current(&mut self, interval: IntervalId, cut_time_ms: u64) -> Outcome {
        let (Some(link), Some(image_digest)) = (self.link.clone(), self.record.base_digest) else {
            return self.failed_here("mark as current", &anyhow::anyhow!("no base"));
        };
        let mark = CurrentMark {
            volume: self.settings.volume,
            term: self.record.term,
            interval,
            generation: self.record.base,
            image_digest,
            cut_time_ms,
        };
        let mut stop = self.stop.clone();
        let marked = tokio::select! {
            () = stopped(&mut stop) => return Outcome::Stop,
            marked = link.mark_current(mark) => marked,
        };
        match marked {
            Ok(receipt) => self.settle_unchanged(receipt, cut_time_ms).await,
            Err(error) => {
                if self.record.interval.is_none() {
                    // There was no cut: the next one comes with the next session.
                    let now = self.now();
                    self.controller
                        .on(now, IntervalEvent::GivenUp { jitter_permille: 0 });
                }
                let failure = failure_of(&error);
                self.failed("mark the image as current", &error, failure)
            }
        }
    }
}

/// Random, 0 to 1000.
fn jitter() -> u16 {
    let [a, b, ..] = random_id();
    u16::from_le_bytes([a, b]) % 1001
}
