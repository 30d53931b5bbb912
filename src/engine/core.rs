//! The engine itself: models, loads and the byte budget, moved on by commands and turns. No thread and
//! no channel of its own, so that a test can drive it by hand.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::counters::Counters;
use super::load::Load;
use super::resident::{Allowance, Resident};
use super::sequence::Sequence;
use super::work::{Command, EngineStats, Fit, LoadEvent};
use crate::backend::{Backend, KvDtype, LoadSpec};
use crate::clock::{Clock, Moment};
use crate::error::Error;
use crate::ids::ModelName;
use crate::sched::PaceLimits;

/// What the engine may use; every value is a key of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct EngineSettings {
    /// Bytes for weights and KV caches; None lets the device say.
    pub memory_budget_bytes: Option<u64>,
    /// Bytes that KV caches of sequences that do not run may keep; None is a quarter of the budget.
    pub kv_idle_bytes_max: Option<u64>,
    /// How KV caches are kept where a load does not say.
    pub kv_dtype: KvDtype,
    /// Tokens that one step may prefill.
    pub prefill_chunk_tokens: u32,
    /// Time that a step which only prefills may take.
    pub prefill_step: Duration,
    /// What a step may take when it prefills while others decode, in percent of one that only decodes.
    pub prefill_stretch_percent: u32,
    /// Sequences of one model that may run at once.
    pub running_sequences_max: u32,
    /// Requests that may wait, all models together.
    pub queue_length_max: u32,
    /// Requests of one client that may wait, all models together.
    pub queue_length_per_client_max: u32,
    /// Waiting that lifts a request by a priority class.
    pub priority_ageing: Duration,
    /// How long a caller may leave its stream unread.
    pub slow_reader: Duration,
}

/// When a request that found the queue full should try again.
const QUEUE_RETRY: Duration = Duration::from_secs(1);

/// Everything the engine thread owns.
pub(super) struct Engine<B: Backend> {
    pub(super) backend: B,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) budget_bytes: u64,
    pub(super) models: BTreeMap<ModelName, Resident>,
    pub(super) loads: VecDeque<Load>,
    settings: EngineSettings,
    counters: Counters,
    drain: Option<(Moment, oneshot::Sender<()>)>,
    draining: bool,
}

impl<B: Backend> Engine<B> {
    pub(super) fn new(
        backend: B,
        clock: Arc<dyn Clock>,
        settings: EngineSettings,
        budget_bytes: u64,
    ) -> Self {
        Self {
            backend,
            clock,
            budget_bytes,
            models: BTreeMap::new(),
            loads: VecDeque::new(),
            settings,
            counters: Counters::default(),
            drain: None,
            draining: false,
        }
    }

    /// Whether there is nothing to do until the next command.
    pub(super) fn is_idle(&self) -> bool {
        self.loads.is_empty() && self.drain.is_none() && self.models.values().all(Resident::is_idle)
    }

    /// Carries out a command, or takes it on.
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Generate(work) => self.submit(work.model.clone(), Sequence::generate(*work)),
            Command::Score(work) => self.submit(work.model.clone(), Sequence::score(*work)),
            Command::Load(spec, events) => self.request_load(spec, &events),
            Command::Fits(spec, reply) => drop(reply.send(self.fits(&spec))),
            Command::Unload(model, reply) => drop(reply.send(self.unload(&model))),
            Command::Forget(session) => {
                self.each_model(|resident, backend, _, _| resident.forget(backend, &session));
            }
            Command::Stats(reply) => drop(reply.send(self.stats())),
            Command::Drain(limit, reply) => {
                self.draining = true;
                self.drain = Some((self.clock.now().after(limit), reply));
            }
        }
    }

    /// One turn: every model's step, and a piece of the load that is on. Says whether anything was under way:
    /// if not, everybody waits for a reader, for memory or for the end of a drain.
    pub(super) fn turn(&mut self) -> bool {
        let mut busy = !self.loads.is_empty();
        let names: Vec<ModelName> = self.models.keys().cloned().collect();
        for name in names {
            match self.turn_of(&name) {
                Ok(launched) => busy |= launched,
                Err(error) => self.lose(&name, &error),
            }
        }
        self.advance_load();
        self.advance_drain();
        busy
    }

    /// Says whether the model runs a step now.
    fn turn_of(&mut self, name: &ModelName) -> Result<bool, Error> {
        let Some(resident) = self.models.get_mut(name) else { return Ok(false) };
        resident.collect(&mut self.backend, &mut self.counters, &*self.clock)?;
        let now = self.clock.now();
        resident.drop_abandoned(&mut self.backend, &mut self.counters, self.settings.slow_reader, now)?;
        self.repay();
        let allowance = self.allowance();
        let Some(resident) = self.models.get_mut(name) else { return Ok(false) };
        let (backend, counters) = (&mut self.backend, &mut self.counters);
        let missing = resident.admit(backend, counters, allowance, now)?;
        let launched = resident.launch(backend, counters, allowance, &*self.clock)?;
        resident.settle(backend, allowance.idle_bytes_max, now)?;
        // What other models keep without using it gives way; the request is looked at again next turn.
        self.give_back(missing, Some(name));
        Ok(launched)
    }

    /// Parking may overdraw the budget; what can be dropped gives way at once.
    fn repay(&mut self) {
        self.give_back(self.used_bytes().saturating_sub(self.budget_bytes), None);
    }

    /// Nobody has asked for anything for a while: gives back what is only kept to be used again.
    pub(super) fn rest(&mut self) {
        self.each_model(|resident, backend, _, _| resident.close_empty(backend));
        if let Err(error) = self.backend.trim() {
            tracing::warn!(?error, "the device kept its freed memory");
        }
    }

    /// What one model's turn may use.
    fn allowance(&self) -> Allowance {
        let weights: u64 = self.models.values().map(|resident| resident.shape.weight_bytes).sum();
        let idle = self.settings.kv_idle_bytes_max.unwrap_or(self.budget_bytes / 4);
        Allowance {
            free_bytes: self.free_bytes(),
            kv_bytes_max: self.budget_bytes.saturating_sub(weights + self.loading_bytes()),
            idle_bytes_max: idle,
            pace: PaceLimits {
                prefill_tokens_max: self.settings.prefill_chunk_tokens,
                stretch_percent: self.settings.prefill_stretch_percent,
                step_max: self.settings.prefill_step,
            },
            running_max: self.settings.running_sequences_max,
            ageing: self.settings.priority_ageing,
        }
    }

    fn loading_bytes(&self) -> u64 {
        self.loads.iter().map(Load::reserved_bytes).sum()
    }

    /// Bytes that are used or promised.
    pub(super) fn used_bytes(&self) -> u64 {
        let models = self.models.values();
        models.map(|resident| resident.bytes() + resident.promised_bytes()).sum::<u64>()
            + self.loading_bytes()
    }

    /// Bytes of the budget that nobody uses or was promised.
    pub(super) fn free_bytes(&self) -> u64 {
        self.budget_bytes.saturating_sub(self.used_bytes())
    }

    /// The same, and what could be dropped without harm.
    pub(super) fn available_bytes(&self) -> u64 {
        let droppable: u64 = self.models.values().map(Resident::droppable_bytes).sum();
        self.free_bytes() + droppable
    }

    fn submit(&mut self, model: ModelName, sequence: Sequence) {
        self.counters.requests_total += 1;
        let now = self.clock.now();
        let refused = self.refusal(&sequence).or_else(|| match self.models.get_mut(&model) {
            Some(resident) => resident.out_of_reach(&sequence, now),
            None => Some(Error::ModelUnloaded(model.clone())),
        });
        match (refused, self.models.get_mut(&model)) {
            (None, Some(resident)) => resident.enqueue(sequence),
            (refused, _) => {
                let outcome = Err(refused.unwrap_or(Error::ModelUnloaded(model)));
                self.counters.ended(&outcome);
                sequence.end(outcome, now);
            }
        }
    }

    /// Why no more can wait.
    fn refusal(&self, sequence: &Sequence) -> Option<Error> {
        if self.draining {
            return Some(Error::Draining);
        }
        let client = &sequence.origin.client;
        let waiting: u32 = self.models.values().map(Resident::queued).sum();
        let of_client: u32 = self.models.values().map(|resident| resident.queued_of(client)).sum();
        let limits = [
            ("queue_length_max", self.settings.queue_length_max, waiting),
            ("queue_length_per_client_max", self.settings.queue_length_per_client_max, of_client),
        ];
        let (limit, value, _) = limits.into_iter().find(|(_, value, waiting)| waiting >= value)?;
        Some(Error::QueueFull { limit, value, retry_after: QUEUE_RETRY })
    }

    /// Does something with every model; one that fails is lost.
    fn each_model(
        &mut self,
        mut act: impl FnMut(&mut Resident, &mut B, &mut Counters, Moment) -> Result<(), Error>,
    ) {
        let now = self.clock.now();
        let mut lost = Vec::new();
        for (name, resident) in &mut self.models {
            if let Err(error) = act(resident, &mut self.backend, &mut self.counters, now) {
                lost.push((name.clone(), error));
            }
        }
        for (name, error) in lost {
            self.lose(&name, &error);
        }
    }

    /// After a device error nothing of a model can be trusted: its requests end and it is unloaded.
    fn lose(&mut self, name: &ModelName, error: &Error) {
        let Some(mut resident) = self.models.remove(name) else { return };
        let cause = if let Error::Internal(text) = error { text } else { "" };
        tracing::error!(model = %name, %error, cause, "the device failed; the model is unloaded");
        resident.fail_all(&mut self.counters, error, self.clock.now());
        if let Err(error) = self.backend.unload(resident.id) {
            tracing::error!(model = %name, ?error, "the model could not be unloaded");
        }
    }

    fn request_load(&mut self, spec: LoadSpec, events: &mpsc::Sender<LoadEvent>) {
        let outcome = if self.draining { Err(Error::Draining) } else { self.take_load(spec, events) };
        if let Err(error) = outcome {
            let _ = events.try_send(LoadEvent::Failed(error));
        }
    }

    fn take_load(&mut self, mut spec: LoadSpec, events: &mpsc::Sender<LoadEvent>) -> Result<(), Error> {
        if let Some(resident) = self.models.get(&spec.model) {
            if spec.dtype != resident.spec.dtype && spec.dtype != crate::backend::ComputeDtype::Auto {
                let why = format!("the model is resident in {}; unload it first", resident.shape.computes_in);
                return Err(Error::field("compute_dtype", why));
            }
            if spec.kv != resident.spec.kv && spec.kv != KvDtype::Auto {
                let why = "the model is resident with another KV cache; unload it first";
                return Err(Error::field("kv_dtype", why));
            }
            let _ = events.try_send(LoadEvent::Loaded(Box::new(resident.describe())));
            return Ok(());
        }
        if let Some(load) = self.loads.iter_mut().find(|load| load.spec.model == spec.model) {
            load.listeners.push(events.clone());
            return Ok(());
        }
        if spec.kv == KvDtype::Auto {
            spec.kv = self.settings.kv_dtype;
        }
        self.loads.push_back(Load::new(spec, events.clone()));
        Ok(())
    }

    fn fits(&mut self, spec: &LoadSpec) -> Result<Fit, Error> {
        let available_bytes = self.available_bytes();
        let needed_bytes = match self.models.get(&spec.model) {
            Some(_) => 0,
            None => self.backend.estimate(spec, available_bytes)?,
        };
        Ok(Fit { needed_bytes, available_bytes })
    }

    /// Drops what can be dropped without harm until so many bytes are free.
    pub(super) fn make_room(&mut self, bytes: u64) {
        self.give_back(bytes.saturating_sub(self.free_bytes()), None);
    }

    /// Drops so many bytes of what can be dropped without harm, if there are so many; `spared` keeps its own.
    fn give_back(&mut self, mut missing: u64, spared: Option<&ModelName>) {
        if missing == 0 {
            return;
        }
        self.each_model(|resident, backend, _, _| {
            if missing > 0 && Some(&resident.spec.model) != spared {
                missing = missing.saturating_sub(resident.give_back(backend, missing, None)?);
            }
            Ok(())
        });
    }

    fn unload(&mut self, model: &ModelName) -> Result<u64, Error> {
        let Some(resident) = self.models.get(model) else {
            return Err(Error::ModelNotLoaded(model.clone()));
        };
        if !resident.is_idle() {
            let running = resident.running() + resident.queued();
            return Err(Error::ModelBusy { model: model.clone(), running });
        }
        let (id, freed) = (resident.id, resident.bytes());
        self.models.remove(model);
        self.backend.unload(id)?;
        tracing::info!(%model, freed, "unloaded");
        Ok(freed)
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

    fn stats(&self) -> EngineStats {
        let memory = self.backend.memory();
        let Counters {
            requests_total,
            finished_total,
            cancelled_total,
            failed_total,
            refused_total,
            preemptions_total,
            prefill_tokens_total,
            cached_tokens_total,
            decode_tokens_total,
            steps_total,
        } = self.counters.clone();
        EngineStats {
            requests_total,
            finished_total,
            cancelled_total,
            failed_total,
            refused_total,
            preemptions_total,
            prefill_tokens_total,
            cached_tokens_total,
            decode_tokens_total,
            steps_total,
            budget_bytes: self.budget_bytes,
            mlx_active_bytes: memory.active,
            mlx_peak_bytes: memory.peak,
            mlx_cache_bytes: memory.cache,
            models: self.models.values().map(Resident::describe).collect(),
        }
    }
}
