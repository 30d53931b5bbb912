//! The engine itself: models and loads, moved on by commands and ticks. No thread and no channel of its own,
//! so that a test can drive it by hand.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tokio::sync::{oneshot, watch};

use super::api::{CachedKv, Command, Counters, EngineSettings, EngineStats, QUEUE_RETRY, ResidentModel};
use super::load::Load;
use super::masks::MaskWorkers;
use super::model::{Context, Resident};
use super::saving::Saving;
use super::task::Sequence;
use crate::backend::Backend;
use crate::clock::{Clock, Moment};
use crate::error::Error;
use crate::ids::ModelName;
use crate::residency::{KeepAlive, ModelTable, ResidencySettings, Stay};
use crate::sched::{self, Allowance, Blocked, Entry, Timeline, Waiter};

/// Everything the engine thread owns.
pub(super) struct Engine<B: Backend> {
    pub(super) backend: B,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) budget_bytes: u64,
    pub(super) models: BTreeMap<ModelName, Resident>,
    pub(super) loads: VecDeque<Load>,
    pub(super) settings: EngineSettings,
    /// The configuration of who stays in memory, and for how long.
    pub(super) residency: ResidencySettings,
    /// Published for the callers.
    table: watch::Sender<ModelTable>,
    pub(super) counters: Counters,
    /// The request that waits for memory.
    pub(super) blocked: Option<Blocked>,
    sequence_next: u64,
    allowance: Allowance,
    timeline: Timeline,
    pub(super) masks: MaskWorkers,
    /// Caches on their way to disk.
    pub(super) saving: Saving,
    /// Since when a load waits for caches to be written.
    pub(super) load_waits: Option<Moment>,
    drain: Option<(Moment, oneshot::Sender<()>)>,
    pub(super) draining: bool,
}

impl<B: Backend> Engine<B> {
    /// Returns an engine without models.
    pub(super) fn new(
        backend: B,
        clock: Arc<dyn Clock>,
        settings: EngineSettings,
        budget_bytes: u64,
    ) -> Self {
        Self {
            backend,
            clock: Arc::clone(&clock),
            budget_bytes,
            models: BTreeMap::new(),
            loads: VecDeque::new(),
            settings,
            residency: ResidencySettings {
                memory_budget_bytes: Some(budget_bytes),
                ..ResidencySettings::default()
            },
            table: watch::Sender::default(),
            counters: Counters::default(),
            blocked: None,
            sequence_next: 1,
            allowance: Allowance::default(),
            timeline: Timeline::default(),
            masks: MaskWorkers::new(settings.mask_threads, clock),
            saving: Saving::default(),
            load_waits: None,
            drain: None,
            draining: false,
        }
    }

    /// Returns the published table of models.
    pub(super) fn table(&self) -> watch::Receiver<ModelTable> {
        self.table.subscribe()
    }

    /// Publishes which models are loading and resident.
    pub(super) fn publish(&self) {
        let loading = self.loads.iter().map(|load| load.spec.model());
        let resident = self.models.iter().map(|(name, resident)| (name, &resident.tenancy));
        self.table.send_replace(ModelTable::new(loading, resident));
    }

    /// Returns whether there is nothing to do until the next command.
    pub(super) fn is_idle(&self) -> bool {
        self.loads.is_empty() && self.drain.is_none() && self.models.values().all(Resident::is_idle)
    }

    /// Carries out a command, or takes it on.
    pub(super) fn command(&mut self, command: Command) {
        self.saving.settle();
        match command {
            Command::Generate(work) => {
                let keep_alive = work.keep_alive;
                self.submit(Sequence::generate(*work), keep_alive);
            }
            Command::Score(work) => {
                let keep_alive = work.keep_alive;
                self.submit(Sequence::score(*work), keep_alive);
            }
            Command::Load(work) => self.request_load(work),
            Command::Fits(spec, reply) => drop(reply.send(self.fits(&spec))),
            Command::Configure(settings) => self.configure(*settings),
            Command::Unload(model, reply) => drop(reply.send(self.unload_on_request(&model))),
            Command::Forget(session) => {
                self.each_model(|resident, cx| resident.forget(cx, &session));
            }
            Command::Cached(asked, reply) => {
                let cached = asked.iter().map(|asked| {
                    let resident = self.models.get(&asked.model);
                    resident.map_or_else(CachedKv::default, |resident| resident.cached(asked))
                });
                let _ = reply.send(cached.collect());
            }
            Command::Room(ask, reply) => drop(reply.send(self.room_to_restore(&ask))),
            Command::SaveEvicted(outbox) => self.saving.begin(outbox),
            Command::Export(ask, reply) => drop(reply.send(self.export(&ask))),
            Command::Adopt(work, reply) => drop(reply.send(self.adopt(*work))),
            Command::PinSession(session, pinned) => {
                self.models.values_mut().for_each(|resident| resident.pin_session(&session, pinned));
            }
            Command::Stats(reply) => drop(reply.send(self.stats())),
            Command::Drain(limit, reply) => {
                self.draining = true;
                self.drain = Some((self.clock.now().after(limit), reply));
            }
        }
    }

    /// Runs every model's step once, and moves the load that is on. Returns whether anything was under way:
    /// if not, everything waits for a reader, for memory, for weights to be read or for the end of a drain.
    pub(super) fn tick(&mut self) -> bool {
        let mut busy = false;
        self.blocked.iter_mut().for_each(|blocked| blocked.others.clear());
        self.saving.settle();
        self.shrink();
        self.share_out();
        let names: Vec<ModelName> = self.models.keys().cloned().collect();
        for name in names {
            match self.tick_of(&name) {
                Ok(launched) => busy |= launched,
                Err(error) => self.lose(&name, &error),
            }
        }
        self.refuse_crowded_out();
        self.make_room_for_blocked();
        if self.blocked.is_some() {
            self.saving.hurry();
        }
        busy |= self.advance_load();
        self.expire();
        self.advance_drain();
        busy
    }

    /// Shares out what the tick may run besides what is in every step.
    fn share_out(&mut self) {
        let demand = |resident: &Resident| resident.demand(&self.allowance, &self.settings);
        let demands = self.models.iter().map(|(name, resident)| (name.clone(), demand(resident))).collect();
        self.allowance.share_out(&demands, self.settings.pace_limits());
    }

    /// Ticks one model. Models are collected in the order in which they were launched, which is the order in
    /// which the device runs their steps: so the time of each is known. Returns whether it runs a step now.
    fn tick_of(&mut self, name: &ModelName) -> Result<bool, Error> {
        self.make_room_to_park(name);
        let Some((resident, mut cx)) = self.parts_of(name) else { return Ok(false) };
        resident.collect(&mut cx)?;
        resident.drop_abandoned(&mut cx)?;
        resident.clear_leftovers(&mut cx)?;
        self.repay();
        self.renew_blocked();
        let room = self.room(name);
        let Some((resident, mut cx)) = self.parts_of(name) else { return Ok(false) };
        let missing = resident.admit(&mut cx, room)?;
        let launched = resident.launch(&mut cx)?;
        resident.settle(&mut cx, room.idle_bytes_max)?;
        // Other models' reclaimable bytes are evicted; the request is examined again in the next tick.
        self.give_back(missing, Some(name));
        Ok(launched)
    }

    /// Frees what is only cached for reuse; called when nothing was asked for in a while.
    pub(super) fn rest(&mut self) {
        self.each_model(|resident, cx| resident.close_empty(cx, u64::MAX));
        if let Err(error) = self.backend.trim() {
            tracing::warn!(?error, "the device did not free its cached memory");
        }
    }

    /// Returns a model and what it needs of the engine, with the bytes that it may use now; none if it is
    /// not resident.
    pub(super) fn parts_of(&mut self, name: &ModelName) -> Option<(&mut Resident, Context<'_, B>)> {
        let bytes_max = self.bytes_max(name);
        let (models, cx) = self.parts();
        Some((models.get_mut(name)?, Context { bytes_max, ..cx }))
    }

    /// Returns the models, and what they need of the engine.
    pub(super) fn parts(&mut self) -> (&mut BTreeMap<ModelName, Resident>, Context<'_, B>) {
        let cx = Context {
            backend: &mut self.backend,
            counters: &mut self.counters,
            settings: &self.settings,
            clock: &*self.clock,
            blocked: &mut self.blocked,
            sequence_next: &mut self.sequence_next,
            allowance: &mut self.allowance,
            timeline: &mut self.timeline,
            masks: &mut self.masks,
            idle_bytes_max: self.settings.kv_idle_bytes_max.unwrap_or(self.budget_bytes / 4),
            saving: &mut self.saving,
            now: self.clock.now(),
            bytes_max: 0,
        };
        (&mut self.models, cx)
    }

    /// Applies `act` to every model; one that fails is lost.
    pub(super) fn each_model(
        &mut self,
        mut act: impl FnMut(&mut Resident, &mut Context<'_, B>) -> Result<(), Error>,
    ) {
        let mut lost = Vec::new();
        let (models, mut cx) = self.parts();
        for (name, resident) in models {
            if let Err(error) = act(resident, &mut cx) {
                lost.push((name.clone(), error));
            }
        }
        for (name, error) in lost {
            self.lose(&name, &error);
        }
    }

    /// Ends a model's requests and unloads it: after a device error nothing of it can be trusted.
    pub(super) fn lose(&mut self, name: &ModelName, error: &Error) {
        let Some(mut resident) = self.models.remove(name) else { return };
        self.blocked.take_if(|blocked| blocked.model == *name);
        self.publish();
        let cause = if let Error::Internal(text) = error { text } else { "" };
        tracing::error!(model = %name, %error, cause, "the device failed; the model is unloaded");
        resident.fail_all(&mut self.counters, error, self.clock.now());
        if let Err(error) = self.backend.unload(resident.id) {
            tracing::error!(model = %name, ?error, "the model could not be unloaded");
        }
    }

    fn submit(&mut self, sequence: Sequence, keep_alive: Option<KeepAlive>) {
        self.counters.requests_total += 1;
        let now = self.clock.now();
        let entered = self.enter(&sequence);
        let resident = self.models.get_mut(sequence.lease.model());
        let granted = resident.filter(|resident| resident.tenancy.granted(&sequence.lease));
        let error = match (entered, granted) {
            (Err(refused), _) => refused,
            // The device failed since the lease was taken.
            (Ok(_), None) => Error::ModelUnloaded(sequence.lease.model().clone()),
            (Ok(replaced), Some(resident)) => match resident.out_of_reach(&sequence, now) {
                Some(refused) => refused,
                None => {
                    resident.lifetime.ask(Stay { keep_alive, pin: None });
                    return self.enqueue(sequence, &replaced);
                }
            },
        };
        let outcome = Err(error);
        self.counters.ended(&outcome);
        sequence.end(outcome, now);
    }

    /// Returns the places of the waiting requests that go for a new one.
    ///
    /// # Errors
    /// No more requests can wait.
    fn enter(&self, sequence: &Sequence) -> Result<BTreeSet<usize>, Error> {
        if self.draining {
            return Err(Error::Draining);
        }
        let EngineSettings { queue_length_max, queue_length_per_client_max, .. } = self.settings;
        let waiting = self.models.values().flat_map(Resident::waiters);
        // Places are those of the queues; what will wait comes after.
        let promised = self.models.values().flat_map(Resident::promised_waiters);
        let waiting: Vec<Waiter<'_>> = waiting.chain(promised).collect();
        let newcomer = (&sequence.origin.owner, sequence.choices());
        match sched::enter(newcomer, &waiting, queue_length_max, queue_length_per_client_max) {
            Entry::Waits(replaced) => Ok(replaced),
            Entry::Full => Err(queue_full("queue_length_max", queue_length_max)),
            Entry::FullForClient => {
                Err(queue_full("queue_length_per_client_max", queue_length_per_client_max))
            }
        }
    }

    /// Adds a request to its model's queue, in the place of others if need be.
    fn enqueue(&mut self, sequence: Sequence, replaced: &BTreeSet<usize>) {
        let full = queue_full("queue_length_max", self.settings.queue_length_max);
        let (models, mut cx) = self.parts();
        let mut places = 0..;
        let mut goes = || places.next().is_some_and(|place| replaced.contains(&place));
        for resident in models.values_mut().filter(|_| !replaced.is_empty()) {
            resident.turn_away(&mut cx, &mut goes, &full);
        }
        if let Some(resident) = models.get_mut(sequence.lease.model()) {
            resident.enqueue(sequence);
        }
    }

    fn advance_drain(&mut self) {
        let Some((deadline, reply)) = self.drain.take() else { return };
        let now = self.clock.now();
        if self.models.values().all(Resident::is_idle) {
            let _ = reply.send(());
        } else if deadline <= now {
            for resident in self.models.values_mut() {
                resident.fail_all(&mut self.counters, &Error::Draining, now);
            }
            let _ = reply.send(());
        } else {
            self.drain = Some((deadline, reply));
        }
    }

    /// Returns what callers are told.
    ///
    /// # Panics
    /// The parts do not add up to the bytes by which the engine decides.
    fn stats(&self) -> EngineStats {
        let models = self.models.values();
        let models: Vec<ResidentModel> =
            models.map(|resident| resident.describe(&self.residency, &*self.clock)).collect();
        let held = |model: &ResidentModel| {
            let kv_bytes = model.kv_slab_bytes + model.kv_idle_bytes + model.kv_reserved_bytes;
            model.weight_bytes + kv_bytes
        };
        let snapshot_bytes = self.saving.charged_bytes();
        let parts = models.iter().map(held).sum::<u64>() + self.loading_bytes() + snapshot_bytes;
        assert_eq!(parts, self.used_bytes(), "the ledger adds up");
        EngineStats {
            counters: self.counters,
            budget_bytes: self.budget_bytes,
            memory: self.backend.memory(),
            snapshot_bytes,
            models,
        }
    }
}

fn queue_full(limit: &'static str, value: u32) -> Error {
    Error::QueueFull { limit, value, retry_after: QUEUE_RETRY }
}
