//! The task of one uplink: asks what to do, does it, tells how it ended.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use capture_core::{
    interval::{Controller, Event as IntervalEvent, Ticket},
    uplink::{Action, Event, Failure, Uplink as Machine},
};
use tidemark_block::{IntervalHeader, IntervalId, Receipt};
use tidemark_proto::{
    ErrorKind, Reason, RpcError,
    convert::{CurrentMark, TermRequest},
};
use tidemark_telemetry::SpanExt;
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};
use tracing::{Instrument, Span};

use super::{
    BaseTable, Opened, Request, Settings, UplinkState, UplinkStatus, blocking,
    figures::{Figures, Moments},
    link::{Link, failure_of},
    now_ms, open, pending, produce, random_id,
    record::UplinkRecord,
    resync::{self, EngineDoubt, ResyncError, Target},
    ship::{ShipError, Shipment, Shipped, stopped},
    shutting_down,
    snapshot::Seat,
    trace::Trace,
    walk,
};
use crate::{
    engine::{Engine, EngineError, EngineKind, IntervalCut},
    quiesce::{Hints, Quiesce},
};

/// How long the end of an uplink waits for the workload to be let go on.
const THAW_MAX: Duration = Duration::from_secs(5);

/// The state of one uplink; its one owner is its task.
pub(super) struct Driver {
    pub(super) settings: Settings,
    pub(super) engine: Arc<Engine>,
    pub(super) table: Arc<BaseTable>,
    pub(super) record: UplinkRecord,
    pub(super) machine: Machine,
    pub(super) controller: Controller,
    /// The open interval.
    pub(super) cut: Option<IntervalCut>,
    /// Whether the vault may know the open interval.
    pub(super) announced: bool,
    pub(super) link: Option<Link>,
    pub(super) in_flight_max: u64,
    pub(super) inbox: mpsc::Receiver<Request>,
    pub(super) waiters: HashMap<Ticket, oneshot::Sender<Result<Receipt, RpcError>>>,
    pub(super) tickets: u64,
    pub(super) show: watch::Sender<UplinkStatus>,
    pub(super) figures: Arc<Figures>,
    /// Of the interval under way.
    pub(super) moments: Moments,
    pub(super) stop: watch::Receiver<bool>,
    pub(super) started: Instant,
    pub(super) stamping: Option<JoinHandle<()>>,
    /// Why the last cut failed; none once one has been made.
    pub(super) cut_error: Option<String>,
    /// Lent to the search for a moment, which may be that of the volume's group.
    pub(super) quiesce: Arc<Mutex<Quiesce>>,
    pub(super) hints: Hints,
    /// The next time of the schedule, in milliseconds since the Unix epoch.
    pub(super) scheduled_ms: Option<u64>,
    pub(super) trace: Trace,
}

/// What performing an action led to.
pub(super) enum Outcome {
    Event(Event),
    /// Nothing that the state machine must know.
    Again,
    Stop,
}

impl Driver {
    pub(super) fn new(
        settings: Settings,
        engine: Arc<Engine>,
        opened: Opened,
        inbox: mpsc::Receiver<Request>,
        show: watch::Sender<UplinkStatus>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let initial = opened.record.base.get() == 0;
        let in_flight = opened.cut.is_some();
        Self {
            machine: Machine::new(opened.facts, settings.backoff),
            controller: Controller::new(settings.triggers, Duration::ZERO, initial, in_flight),
            quiesce: Arc::new(Mutex::new(Quiesce::new(
                settings.quiesce.clone(),
                settings.volume,
                &settings.name,
                &settings.dir,
            ))),
            hints: Hints::default(),
            scheduled_ms: settings.schedule.next_after(now_ms()),
            trace: Trace::of(settings.name.clone()),
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
            figures: Arc::default(),
            moments: Moments::default(),
            stop,
            started: Instant::now(),
            stamping: None,
            cut_error: None,
        }
    }

    /// What others need to look for a moment as it does.
    pub(super) fn seat(&self) -> Seat {
        Seat {
            name: self.settings.name.clone(),
            engine: Arc::clone(&self.engine),
            table: Arc::clone(&self.table),
            quiesce: Arc::clone(&self.quiesce),
            stop: self.stop.clone(),
            started: self.started.into_std(),
            quiesce_timeout: self.settings.quiesce.time,
            limits: self.settings.moment,
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    #[tracing::instrument(name = "uplink", skip_all, fields(volume = %self.settings.name))]
    pub(super) async fn run(mut self) {
        while !*self.stop.borrow() {
            self.notice_requests();
            if self.machine.facts().table_sound && !self.table.is_sound() {
                // Its checksums were not all there, or couldn't be written: it is fetched from the vault.
                self.machine.on(self.now(), Event::TableLost);
            }
            let action = self.machine.next(self.now());
            self.show_action(action);
            if action != Action::AwaitCut {
                self.hints.decline("no cut can be made now");
            }
            let open = self.record.interval.as_ref();
            let span = self
                .trace
                .step(action, open.map(|open| (open.id, open.trigger)));
            let outcome = self.perform(action).instrument(span).await;
            self.trace.step_ended();
            match outcome {
                Outcome::Event(event) => self.machine.on(self.now(), event),
                Outcome::Again => {}
                Outcome::Stop => break,
            }
        }
        if let Some(cut) = self.cut.take() {
            // Whoever lets go of it last frees its before-images, which may take a while.
            let _ = tokio::task::spawn_blocking(move || drop(cut)).await;
        }
        for (_, waiter) in self.waiters.drain() {
            let _ = waiter.send(Err(shutting_down()));
        }
        let resumed = "the service, or the volume, stops: it is resumed at the next start";
        self.trace.fail(Reason::ShuttingDown, resumed);
        self.trace.step_ended();
        self.hints.decline("the service stops");
        // What hangs is killed with this process.
        let thawed = async { self.quiesce.lock().await.settled().await };
        let _ = tokio::time::timeout(THAW_MAX, thawed).await;
        self.stamp_at_end().await;
    }

    async fn perform(&mut self, action: Action) -> Outcome {
        match action {
            Action::StartTerm => self.start_term().await,
            Action::AdoptHead { head, doubt } => self.adopt_head(head, doubt).await,
            Action::RepairTable => self.repair_table().await,
            Action::DropInterval => self.drop_interval().await,
            Action::AwaitCut => self.await_cut().await,
            Action::Ship(_) => self.ship().await,
            Action::Wait { until } => self.wait(until).await,
            Action::Halt => self.halt().await,
        }
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
                status.error.clone_from(&self.cut_error);
            }
            changed
        });
    }

    /// Takes note of a failure: logs it once, shows it, and says what it means.
    fn failed(&mut self, what: &str, error: &RpcError, failure: Failure) -> Outcome {
        self.figures.failed(error.reason);
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
        Span::current().fail(error.reason.as_str(), &error.message);
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

    pub(super) fn failed_here(&mut self, what: &str, error: &anyhow::Error) -> Outcome {
        let error = RpcError::new(
            Reason::IoFailed,
            format!("{what}: {error:#}"),
            "check the disk; it is tried again by itself",
        );
        self.failed(what, &error, Failure::Transient)
    }

    pub(super) async fn store(&self, record: UplinkRecord) -> Result<()> {
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
        let (vault, dialer) = (self.settings.vault.clone(), self.settings.dialer.clone());
        let connect = async {
            let link = Link::connect(&vault, &dialer).await?;
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
                let failure = if error.kind == ErrorKind::Fenced {
                    Failure::Fenced
                } else {
                    Failure::Transient
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
        self.end_stamping().await;
        if self.engine.kind() == EngineKind::Scan && self.record.interval.is_some() {
            // It holds what differs from a table that is in doubt.
            return self.drop_interval().await;
        }
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
        let base_table = Arc::clone(&self.table);
        let table = match blocking(move || base_table.to_repair()).await {
            Ok(table) => table,
            Err(error) => return self.failed_here("open the checksum table again", &error),
        };
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
            Err(ResyncError::Table(error)) => {
                self.table.failed(&error);
                let error = anyhow::Error::new(ResyncError::Table(error));
                return self.failed_here("compare checksum tables with the vault", &error);
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
        let base_table = Arc::clone(&self.table);
        let stamped = blocking(move || {
            table
                .sync_and_stamp(base)
                .context("sync the checksum table")?;
            stored.store(&path)?;
            base_table.set_sound(true);
            Ok(())
        });
        if let Err(error) = stamped.await {
            return self.failed_here("record the compared table", &error);
        }
        self.record = record;
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
        self.trace.fail(Reason::Fenced, &fenced.message);
        for (_, waiter) in self.waiters.drain() {
            let _ = waiter.send(Err(fenced.clone()));
        }
        // Also one that could not be let go of before.
        let (engine, cut) = (Arc::clone(&self.engine), self.cut.take());
        let given_up = blocking(move || {
            drop(cut);
            Ok(engine.give_up_interval()?)
        });
        if let Err(error) = given_up.await {
            tracing::warn!(error = %format!("{error:#}"), "give up the interval");
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

    pub(super) fn notice_requests(&mut self) {
        while let Ok(request) = self.inbox.try_recv() {
            self.take(request);
        }
    }

    pub(super) fn take(&mut self, request: Request) {
        let now = self.now();
        match request {
            Request::Interval(answer, asker) => {
                self.trace.asked_by(asker);
                self.tickets += 1;
                let ticket = Ticket(self.tickets);
                // Whoever hung up isn't waited for, but the interval comes all the same.
                self.waiters.retain(|_, waiter| !waiter.is_closed());
                self.waiters.insert(ticket, answer);
                self.controller.on(now, IntervalEvent::Requested(ticket));
            }
            Request::Hint(hint) => {
                self.hints.add(hint);
                self.controller.on(now, IntervalEvent::Hinted);
            }
            Request::Doubted => {
                self.controller.on(now, IntervalEvent::ResyncWanted);
            }
        }
    }

    async fn ship(&mut self) -> Outcome {
        if self.cut.is_none() {
            // Its receipt could not be recorded: it is asked for again.
            let engine = Arc::clone(&self.engine);
            let open = match blocking(move || Ok(engine.open_interval())).await {
                Ok(open) => open,
                Err(error) => return self.failed_here("ship", &error),
            };
            if open.is_none() {
                // It was given up, and that could not be recorded.
                return self.given_up().await;
            }
            self.cut = open;
        }
        let (Some(interval), Some(cut), Some(link)) = (
            self.record.interval.clone(),
            self.cut.clone(),
            self.link.clone(),
        ) else {
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
                reason: interval.reason.clone(),
                trigger: interval.trigger,
            },
            bytes_in_flight_max: self.in_flight_max,
            status: &self.show,
            figures: &self.figures,
            stop: self.stop.clone(),
            announced: self.announced,
            progressed: false,
            sealed: None,
        };
        let job = produce::Job {
            image: cut.reader,
            changed: Arc::clone(&cut.changed),
            table: self.table.table(),
            pending: pending::path_in(&self.settings.dir),
            key: self.pending_key(&interval),
            codec: self.settings.codec,
            zstd_level: self.settings.zstd_level,
        };
        let shipped = shipment.run(job).await;
        let (announced, progressed) = (shipment.announced, shipment.progressed);
        self.moments.sealed = shipment.sealed;
        self.announced = announced;
        if progressed {
            let now = self.now();
            self.machine.on(now, Event::Progressed);
        }
        match shipped {
            Ok(Shipped::Receipt(receipt)) => self.settle(interval, receipt).await,
            Ok(Shipped::Unchanged) => self.mark_current(interval.id, interval.cut_time_ms).await,
            Err(error) => self.ship_failed(error).await,
        }
    }

    async fn ship_failed(&mut self, error: ShipError) -> Outcome {
        match error {
            ShipError::Stopped => Outcome::Stop,
            ShipError::GivenUp => self.given_up().await,
            ShipError::Rpc(error) => {
                let failure = failure_of(&error);
                self.failed("ship the interval", &error, failure)
            }
            ShipError::Local(walk::WalkError::Engine(error @ EngineError::SpoolDamaged { .. })) => {
                let error = RpcError::new(Reason::IoFailed, error.to_string(), "");
                self.failed("read the cut", &error, Failure::Refused)
            }
            ShipError::Local(error) => {
                if let walk::WalkError::Table(error) = &error {
                    self.table.failed(error);
                }
                self.failed_here("read the cut", &error.into())
            }
        }
    }

    /// Says at the vault that the base is still current.
    pub(super) async fn mark_current(&mut self, interval: IntervalId, cut_time_ms: u64) -> Outcome {
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
                    self.trace.fail(error.reason, &error.message);
                }
                let failure = failure_of(&error);
                self.failed("mark the image as current", &error, failure)
            }
        }
    }
}

/// Random, 0 to 1000.
pub(super) fn jitter() -> u16 {
    let [a, b, ..] = random_id();
    u16::from_le_bytes([a, b]) % 1001
}
