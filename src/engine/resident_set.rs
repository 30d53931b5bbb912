//! Carries out what `residency` decides about loads, and shares memory among models. How models leave is in
//! `departures`.

use std::collections::VecDeque;

use super::api::{LoadEvent, LoadWork};
use super::core::Engine;
use super::departures::{LOAD_WAIT, LOAD_WAIT_MAX, LOAD_WAITS_BYTES_MAX, Save};
use super::load::{Advance, Load};
use super::model::{Resident, Room};
use crate::backend::{Backend, KvDtype, LoadPlan, LoadSpec};
use crate::error::{Error, Shortage};
use crate::ids::ModelName;
use crate::residency::{
    Demand, Evictions, Fit, Lifetime, Memory, ModelLease, Plan, ResidencySettings, State, Tenant,
    available_bytes, plan,
};
use crate::sched::{Blocked, Claims};

impl<B: Backend> Engine<B> {
    /// Returns the bytes that are used or promised.
    pub(super) fn used_bytes(&self) -> u64 {
        let models = self.models.values();
        models.map(|resident| resident.bytes() + resident.promised_bytes()).sum::<u64>()
            + self.loading_bytes()
            + self.saving.charged_bytes()
    }

    /// Returns the bytes that are reserved for loads.
    pub(super) fn loading_bytes(&self) -> u64 {
        self.loads.iter().map(Load::reserved_bytes).sum()
    }

    /// Returns the byte budget and its use.
    pub(super) fn memory(&self) -> Memory {
        Memory { budget_bytes: self.budget_bytes, used_bytes: self.used_bytes() }
    }

    /// Returns the same once all is written that waits for it: a load waits for that.
    fn memory_soon(&self) -> Memory {
        let memory = self.memory();
        Memory { used_bytes: memory.used_bytes - self.saving.charged_bytes(), ..memory }
    }

    /// Returns the resident models as the policy sees them.
    pub(super) fn tenants(&self) -> Vec<Tenant> {
        self.models.values().map(|resident| resident.tenant(&self.residency)).collect()
    }

    /// Returns the bytes that a model may use in a tick.
    pub(super) fn room(&self, name: &ModelName) -> Room {
        let beside = |stays: fn(&Resident, &ResidencySettings) -> bool| {
            let stay = self.models.iter().filter(|(other, of)| *other == name || stays(of, &self.residency));
            self.budget_bytes.saturating_sub(stay.map(|(_, resident)| resident.shape.weight_bytes).sum())
        };
        let others = || self.models.iter().filter(|(other, _)| *other != name).map(|(_, other)| other);
        let claims = self.blocked.as_ref().map_or(Claims::default(), |blocked| {
            others().map(|other| other.claims(blocked.passed_from)).fold(Claims::default(), Claims::and)
        });
        Room {
            free_bytes: self.budget_bytes.saturating_sub(self.used_bytes()),
            others_empty_bytes: others().map(|other| other.slots.empty_bytes()).sum(),
            elsewhere_bytes: others().map(Resident::reclaimable_bytes).sum(),
            kv_bytes_max: beside(Resident::is_pinned),
            // Idle models go where nothing else makes room.
            kv_bytes_now: beside(|other, settings| !other.is_evictable(settings)),
            is_quiet: self.is_quiet(),
            is_pinned: self.models.get(name).is_some_and(|resident| resident.is_pinned(&self.residency)),
            claims,
            idle_bytes_max: self.settings.kv_idle_bytes_max.unwrap_or(self.budget_bytes / 4),
        }
    }

    /// Returns whether no sequence of any model runs, and none is being read.
    pub(super) fn is_quiet(&self) -> bool {
        let mut models = self.models.values();
        models.all(|resident| resident.running.is_empty()) && !self.loads.iter().any(Load::has_begun)
    }

    /// Returns the most bytes that a model may hold and promise: the budget less what others have.
    pub(super) fn bytes_max(&self, name: &ModelName) -> u64 {
        let own = self.models.get(name).map_or(0, |resident| resident.bytes() + resident.promised_bytes());
        self.budget_bytes.saturating_sub(self.used_bytes() - own)
    }

    /// Closes other models' empty slabs if the largest cache that a model may come to park has no room beside
    /// its slot.
    pub(super) fn make_room_to_park(&mut self, name: &ModelName) {
        let Some(resident) = self.models.get(name) else { return };
        let held = resident.bytes() + resident.promised_bytes() + resident.parking_bytes();
        let missing = held.saturating_sub(self.bytes_max(name));
        self.give_back(missing.min(self.room(name).others_empty_bytes), Some(name));
    }

    /// Renews the class of the blocked request, or forgets it if it no longer waits.
    pub(super) fn renew_blocked(&mut self) {
        let (now, ageing) = (self.clock.now(), self.settings.priority_ageing);
        self.blocked = self.blocked.take().and_then(|blocked| {
            let resident = self.models.get(&blocked.model)?;
            let ticket = resident.queue.renewed(&blocked.ticket, now, ageing)?;
            Some(Blocked { ticket, ..blocked })
        });
    }

    /// Evicts what overdraws the budget: a load may take more than was planned.
    pub(super) fn repay(&mut self) {
        self.give_back(self.used_bytes().saturating_sub(self.budget_bytes), None);
    }

    /// Frees `missing` bytes, as far as they are reclaimable, from all models but `spared`: empty slabs
    /// first, then parked caches in the order of eviction, over all models.
    pub(super) fn give_back(&mut self, missing: u64, spared: Option<&ModelName>) {
        let mut left = self.close_empty(missing, spared);
        while left > 0 {
            let Some(model) = self.first_to_go(spared) else { return };
            left = left.saturating_sub(self.evict_cached(&model, 1, Save::Beside(0)));
        }
    }

    /// Closes empty slabs of `missing` bytes, of all models but `spared`; returns the bytes that are missing
    /// then.
    pub(super) fn close_empty(&mut self, missing: u64, spared: Option<&ModelName>) -> u64 {
        let mut left = missing;
        self.each_model(|resident, cx| {
            if left > 0 && Some(resident.spec.model()) != spared {
                left = left.saturating_sub(freed(resident, |resident| resident.close_empty(cx, left))?);
            }
            Ok(())
        });
        left
    }

    /// Evicts parked caches of a model, of at least `bytes` or all; returns the bytes that were freed.
    pub(super) fn evict_cached(&mut self, model: &ModelName, bytes: u64, save: Save) -> u64 {
        let (mut evicted, bytes_max) = (0, self.bytes_max(model));
        self.each_model(|resident, cx| {
            if resident.spec.model() == model {
                evicted = freed(resident, |resident| match save {
                    Save::Beside(_) => resident.evict(cx, bytes, None),
                    Save::First => {
                        cx.bytes_max = bytes_max;
                        resident.evict_saved(cx, bytes, LOAD_WAITS_BYTES_MAX)
                    }
                })?;
            }
            Ok(())
        });
        evicted
    }

    /// Returns the model with the cache that is evicted first, among all but `spared`.
    fn first_to_go(&self, spared: Option<&ModelName>) -> Option<ModelName> {
        let others = self.models.iter().filter(|(name, _)| Some(*name) != spared);
        let first = others.filter_map(|(name, resident)| Some((resident.first_to_go()?, name)));
        first.min().map(|(_, name)| name.clone())
    }

    /// Answers whether a model would fit now, and what its load would evict; where other files of it are
    /// resident, in their place. A question changes nothing.
    pub(super) fn fits(&self, spec: &LoadSpec) -> Result<Fit, Error> {
        let mut tenants = self.tenants();
        let mut memory = Memory { budget_bytes: self.current_budget(), ..self.memory_soon() };
        let resident = self.models.get(spec.model());
        if resident.is_some_and(|resident| resident.spec.files().revision != spec.files().revision) {
            let replaced = tenants.extract_if(.., |tenant| tenant.model == *spec.model());
            memory.used_bytes -= replaced.map(|tenant| tenant.bytes).sum::<u64>();
        }
        let fit = Fit {
            available_bytes: available_bytes(&tenants, &memory),
            budget_bytes: memory.budget_bytes,
            ..Fit::default()
        };
        Ok(match self.plan_load(spec, &self.state(spec.model(), &tenants), &memory) {
            Ok((_, Plan::Ready | Plan::Join)) => fit,
            Ok((load, Plan::Wait)) => Fit { needed_bytes: load.reserved_bytes(), ..fit },
            Ok((load, Plan::Load(Evictions { models, .. }))) => {
                let bytes = |model: &ModelName| self.models.get(model).map_or(0, Resident::bytes);
                let evictions = models.into_iter().map(|model| (model.clone(), bytes(&model)));
                Fit { needed_bytes: load.reserved_bytes(), evictions: evictions.collect(), ..fit }
            }
            Err(Error::ModelTooLarge(shortage) | Error::MemoryBudget(shortage)) => {
                let Shortage { needed_bytes, available_bytes, rule, in_the_way, .. } = *shortage;
                Fit { needed_bytes, available_bytes, refused: Some((rule, in_the_way)), ..fit }
            }
            Err(error) => return Err(error),
        })
    }

    /// Returns what the policy decides by on a wish that comes now.
    fn state<'a>(&self, model: &ModelName, tenants: &'a [Tenant]) -> State<'a> {
        let loading = self.loads.iter().find(|load| load.spec.model() == model);
        State {
            tenants,
            loading: loading.map(|load| load.spec.formats),
            others_first: !self.loads.is_empty(),
            draining: self.draining,
        }
    }

    /// Decides on the load of a model, and how it is loaded.
    fn plan_load(
        &self,
        spec: &LoadSpec,
        state: &State<'_>,
        memory: &Memory,
    ) -> Result<(LoadPlan, Plan), Error> {
        let (wanted, now) = (spec.formats, self.clock.now());
        let mut spec = spec.clone();
        if wanted.kv == KvDtype::Auto {
            spec.formats.kv = self.settings.kv_dtype;
        }
        let decide = |load: &LoadPlan| {
            let demand = Demand {
                model: spec.model().clone(),
                formats: wanted,
                weight_bytes: load.needed_bytes,
                kv_bytes: load.kv_bytes,
            };
            plan(state, &demand, memory, now)
        };
        let cached = |tenant: &Tenant| tenant.empty_bytes + tenant.parked_bytes;
        let cached_bytes: u64 = state.tenants.iter().map(cached).sum();
        let load = self.backend.plan(&spec, memory.free_bytes() + cached_bytes)?;
        let decided = decide(&load)?;
        let Plan::Load(Evictions { models, .. }) = &decided else { return Ok((load, decided)) };
        if models.is_empty() {
            return Ok((load, decided));
        }
        // Models that must go may leave room for a faster format than the smallest.
        let goes = |tenant: &&Tenant| models.contains(&tenant.model);
        let freed_bytes: u64 = state.tenants.iter().filter(goes).map(|tenant| tenant.bytes).sum();
        let left = Memory { used_bytes: memory.used_bytes - freed_bytes, ..*memory };
        let load = self.backend.plan(&spec, left.free_bytes())?;
        let decided = decide(&load)?;
        Ok((load, decided))
    }

    /// Queues a load, joins the one that runs, or answers at once.
    pub(super) fn request_load(&mut self, work: LoadWork) {
        self.renew_budget();
        let (model, tenants) = (work.spec.model().clone(), self.tenants());
        match self.plan_load(&work.spec, &self.state(&model, &tenants), &self.memory_soon()) {
            Err(error) => drop(work.events.try_send(LoadEvent::Failed(error))),
            Ok((_, Plan::Ready)) => self.answer(&model, &work),
            Ok((_, Plan::Join)) => {
                if let Some(load) = self.loads.iter_mut().find(|load| *load.spec.model() == model) {
                    load.join(work);
                }
            }
            Ok((load, Plan::Wait | Plan::Load(_))) => {
                self.loads.push_back(Load::new(load.spec, work));
                self.publish();
            }
        }
    }

    /// Answers a wish for a resident model, which is a use of it.
    fn answer(&mut self, model: &ModelName, work: &LoadWork) {
        let now = self.clock.now();
        let Some(resident) = self.models.get_mut(model) else { return };
        resident.lifetime.ask(work.stay);
        resident.lifetime.touch(now);
        let lease = work.wants_lease.then(|| resident.tenancy.lease());
        drop(work.events.try_send(self.loaded(model, lease)));
    }

    /// Moves the first load on; it stays in the published table until it ends. Returns whether there was
    /// something to do.
    pub(super) fn advance_load(&mut self) -> bool {
        let abandoned = self.abandon_unwanted();
        let outcome = match self.advance_first() {
            Ok(Advance::Waited) => return abandoned,
            Ok(Advance::Opening) => {
                // Another one may go on meanwhile. Once it is being read, a load stays the first.
                self.loads.rotate_left(1);
                return abandoned;
            }
            Ok(Advance::Read) => return true,
            Ok(Advance::Warmed) => {
                self.models.values_mut().for_each(Resident::disturb);
                return true;
            }
            Ok(Advance::Ready(id, shape)) => Ok((id, shape)),
            Err(error) => Err(error),
        };
        let Some(load) = self.loads.pop_front() else { return abandoned };
        match outcome {
            Ok((id, shape)) => {
                let model = load.spec.model().clone();
                tracing::info!(%model, bytes = shape.weight_bytes, "loaded");
                let lifetime = Lifetime::new(load.stay(), self.clock.now());
                let resident = Resident::new(id, load.spec.clone(), shape, (self.clock.wall(), lifetime));
                let tenancy = resident.tenancy.lease();
                self.models.insert(model.clone(), resident);
                self.publish();
                load.end(|lease| self.loaded(&model, lease), &tenancy);
            }
            Err(error) => {
                tracing::warn!(model = %load.spec.model(), ?error, "the load failed");
                load.abandon(&mut self.backend);
                self.load_waits = None;
                self.publish();
                load.fail(&error);
            }
        }
        true
    }

    /// Ends the loads that nobody waits for any more; returns whether there was one.
    fn abandon_unwanted(&mut self) -> bool {
        if self.loads.iter().all(Load::is_wanted) {
            return false;
        }
        let (wanted, unwanted): (VecDeque<Load>, VecDeque<Load>) =
            std::mem::take(&mut self.loads).into_iter().partition(Load::is_wanted);
        (self.loads, self.load_waits) = (wanted, None);
        for load in unwanted {
            tracing::info!(model = %load.spec.model(), "nobody waits for the load any more");
            load.abandon(&mut self.backend);
        }
        self.publish();
        true
    }

    fn advance_first(&mut self) -> Result<Advance, Error> {
        let Self { loads, backend, budget_bytes, .. } = self;
        match loads.front_mut() {
            None => return Ok(Advance::Waited),
            Some(load) if load.has_begun() => return load.advance(backend, *budget_bytes),
            Some(_) => self.renew_budget(),
        }
        let Some(load) = self.loads.front() else { return Ok(Advance::Waited) };
        let (spec, tenants) = (load.spec.clone(), self.tenants());
        let state = State { tenants: &tenants, draining: self.draining, ..State::default() };
        // What a disk holds for long is not counted on: others leave, or the load is refused.
        let now = self.clock.now();
        let is_stuck = self.load_waits.is_some_and(|since| since.after(LOAD_WAIT_MAX) < now);
        let memory = if is_stuck { self.memory() } else { self.memory_soon() };
        let (load, evictions) = match self.plan_load(&spec, &state, &memory) {
            Ok((load, Plan::Load(evictions))) => (load, evictions),
            Ok((_, Plan::Ready | Plan::Join | Plan::Wait)) => {
                return Err(Error::Internal("a load of a resident model".into()));
            }
            // A load whose files are being opened holds the memory: this one waits until it has ended.
            Err(Error::MemoryBudget(_)) if self.loads.iter().any(Load::has_begun) => {
                return Ok(Advance::Opening);
            }
            Err(error) => return Err(error),
        };
        let model = spec.model();
        if !self.make_room(&evictions, model, Save::First)? {
            return Ok(Advance::Waited);
        }
        if self.saving.charged_bytes() > 0 && self.memory().missing_bytes(load.reserved_bytes()) > 0 {
            // What is saved of models that left gives its memory back first.
            if self.load_waits.get_or_insert(now).after(LOAD_WAIT) < now {
                self.saving.hurry();
            }
            return Ok(Advance::Waited);
        }
        self.load_waits = None;
        tracing::info!(%model, needed_bytes = load.needed_bytes, kv_bytes = load.kv_bytes, "loading");
        self.counters.loads_total += 1;
        let Self { loads, backend, .. } = self;
        loads.front_mut().map_or(Ok(()), |front| front.begin(backend, load))?;
        Ok(Advance::Read)
    }

    /// Returns the last event of a load.
    fn loaded(&self, model: &ModelName, lease: Option<ModelLease>) -> LoadEvent {
        match self.models.get(model) {
            Some(resident) => {
                let described = resident.describe(&self.residency, &*self.clock);
                LoadEvent::Loaded(Box::new(described), resident.tenancy.door(), lease)
            }
            None => LoadEvent::Failed(Error::ModelUnloaded(model.clone())),
        }
    }
}

/// Returns the bytes that `act` frees of a model.
fn freed(
    resident: &mut Resident,
    act: impl FnOnce(&mut Resident) -> Result<(), Error>,
) -> Result<u64, Error> {
    let before = resident.bytes();
    act(resident)?;
    Ok(before - resident.bytes())
}
