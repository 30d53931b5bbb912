//! Carries out what `residency` decides: loads and unloads, and what is evicted for whom.

use tokio::sync::mpsc;

use super::api::LoadEvent;
use super::core::Engine;
use super::load::{Advance, Load};
use super::model::{Resident, Room};
use crate::backend::{Backend, KvDtype, LoadSpec};
use crate::error::Error;
use crate::ids::ModelName;
use crate::residency::{Decision, Demand, Fit, Memory, Standing, decide};
use crate::sched::{Blocked, Claims};

impl<B: Backend> Engine<B> {
    /// Returns the bytes that are used or promised.
    pub(super) fn used_bytes(&self) -> u64 {
        let models = self.models.values();
        models.map(|resident| resident.bytes() + resident.promised_bytes()).sum::<u64>()
            + self.loading_bytes()
    }

    fn loading_bytes(&self) -> u64 {
        self.loads.iter().map(Load::reserved_bytes).sum()
    }

    /// Returns the byte budget and its use.
    fn memory(&self) -> Memory {
        Memory {
            budget_bytes: self.budget_bytes,
            used_bytes: self.used_bytes(),
            reclaimable_bytes: self.models.values().map(Resident::reclaimable_bytes).sum(),
        }
    }

    /// Returns the bytes that a model may use in a tick.
    pub(super) fn room(&self, name: &ModelName) -> Room {
        let weights: u64 = self.models.values().map(|resident| resident.shape.weight_bytes).sum();
        let others = || self.models.iter().filter(|(other, _)| *other != name).map(|(_, other)| other);
        let claims = self.blocked.as_ref().map_or(Claims::default(), |blocked| {
            others().map(|other| other.claims(blocked.passed_from)).fold(Claims::default(), Claims::and)
        });
        Room {
            free_bytes: self.budget_bytes.saturating_sub(self.used_bytes()),
            others_empty_bytes: others().map(|other| other.slots.empty_bytes()).sum(),
            elsewhere_bytes: others().map(Resident::reclaimable_bytes).sum(),
            kv_bytes_max: self.budget_bytes.saturating_sub(weights),
            claims,
            idle_bytes_max: self.settings.kv_idle_bytes_max.unwrap_or(self.budget_bytes / 4),
        }
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
    /// first, then parked caches, the least recently used of all models first.
    pub(super) fn give_back(&mut self, missing: u64, spared: Option<&ModelName>) {
        let mut left = missing;
        if missing == 0 {
            return;
        }
        self.each_model(|resident, cx| {
            if left > 0 && Some(resident.spec.model()) != spared {
                left = left.saturating_sub(freed(resident, |resident| resident.close_empty(cx, left))?);
            }
            Ok(())
        });
        while left > 0 {
            let Some(name) = self.oldest_parked(spared) else { return };
            self.each_model(|resident, cx| {
                if *resident.spec.model() == name {
                    left = left.saturating_sub(freed(resident, |resident| resident.evict(cx, 1, None))?);
                }
                Ok(())
            });
        }
    }

    /// Returns the model with the cache that is evicted first, among all but `spared`.
    fn oldest_parked(&self, spared: Option<&ModelName>) -> Option<ModelName> {
        let others = self.models.iter().filter(|(name, _)| Some(*name) != spared);
        let oldest = others.filter_map(|(name, resident)| Some((resident.oldest_parked()?, name)));
        oldest.min().map(|(_, name)| name.clone())
    }

    /// Answers whether a model would fit.
    pub(super) fn fits(&self, spec: &LoadSpec) -> Fit {
        let available_bytes = self.memory().available_bytes();
        let needed_bytes = match self.models.get(spec.model()) {
            Some(_) => 0,
            None => self.backend.plan(spec, available_bytes).needed_bytes,
        };
        Fit { needed_bytes, available_bytes }
    }

    /// Queues a load, joins the one that runs, or answers at once if the model is resident.
    pub(super) fn request_load(
        &mut self,
        mut spec: LoadSpec,
        events: mpsc::Sender<LoadEvent>,
        draining: bool,
    ) {
        let demand = Demand { dtype: spec.dtype, kv: spec.kv };
        match decide(self.standing(spec.model()), demand, draining) {
            Decision::Ready => {
                let resident = self.models.get(spec.model());
                drop(resident.map(|resident| events.try_send(loaded(resident))));
            }
            Decision::Wait => {
                let running = self.loads.iter_mut().find(|load| load.spec.model() == spec.model());
                running.into_iter().for_each(|load| load.join(events.clone()));
            }
            Decision::Load => {
                if spec.kv == KvDtype::Auto {
                    spec.kv = self.settings.kv_dtype;
                }
                self.loads.push_back(Load::new(spec, events));
                self.publish();
            }
            Decision::Refuse(error) => drop(events.try_send(LoadEvent::Failed(error))),
        }
    }

    fn standing(&self, model: &ModelName) -> Standing<'_> {
        if let Some(Resident { spec, shape, .. }) = self.models.get(model) {
            let loaded = Demand { dtype: spec.dtype, kv: spec.kv };
            return Standing::Resident { loaded, computes_in: &shape.computes_in };
        }
        let is_loading = self.loads.iter().any(|load| load.spec.model() == model);
        if is_loading { Standing::Loading } else { Standing::Absent }
    }

    /// Moves the first load on; it stays in the published table until it ends. Returns whether there was
    /// something to do.
    pub(super) fn advance_load(&mut self) -> bool {
        let outcome = match self.advance_first() {
            Ok(Advance::Waited) => return false,
            Ok(Advance::Read) => return true,
            Ok(Advance::Warmed) => {
                self.models.values_mut().for_each(Resident::disturb);
                return true;
            }
            Ok(Advance::Ready(id, shape)) => Ok((id, shape)),
            Err(error) => Err(error),
        };
        let Some(load) = self.loads.pop_front() else { return false };
        match outcome {
            Ok((id, shape)) => {
                tracing::info!(model = %load.spec.model(), bytes = shape.weight_bytes, "loaded");
                let resident = Resident::new(id, load.spec.clone(), shape, self.clock.wall());
                self.models.insert(load.spec.model().clone(), resident);
                self.publish();
                if let Some(resident) = self.models.get(load.spec.model()) {
                    load.end(|| loaded(resident));
                }
            }
            Err(error) => {
                tracing::warn!(model = %load.spec.model(), ?error, "the load failed");
                load.abandon(&mut self.backend);
                self.publish();
                load.end(|| LoadEvent::Failed(error.clone()));
            }
        }
        true
    }

    fn advance_first(&mut self) -> Result<Advance, Error> {
        let Self { loads, backend, .. } = self;
        if let Some(load) = loads.front_mut().filter(|load| load.has_begun()) {
            return load.advance(backend);
        }
        let memory = self.memory();
        let available_bytes = memory.available_bytes();
        let Some(load) = self.loads.front() else { return Ok(Advance::Waited) };
        let plan = self.backend.plan(&load.spec, available_bytes);
        let (model, needed_bytes) = (load.spec.model(), plan.needed_bytes);
        let missing = memory.admit(model, needed_bytes)?;
        tracing::info!(%model, needed_bytes, available_bytes, "loading");
        self.give_back(missing, None);
        let Self { loads, backend, .. } = self;
        loads.front_mut().map_or(Ok(()), |load| load.begin(backend, plan))?;
        Ok(Advance::Read)
    }

    /// Frees a model; returns the bytes that were freed. A model that is in use stays.
    pub(super) fn unload(&mut self, model: &ModelName) -> Result<u64, Error> {
        let Some(resident) = self.models.remove(model) else {
            return Err(Error::ModelNotLoaded(model.clone()));
        };
        let freed = resident.bytes();
        match resident.retire() {
            Err(resident) => {
                // The last caller may have gone since.
                let running = resident.users().max(1);
                self.models.insert(model.clone(), *resident);
                Err(Error::ModelBusy { model: model.clone(), running })
            }
            Ok(id) => {
                self.publish();
                self.backend.unload(id)?;
                tracing::info!(%model, freed, "unloaded");
                Ok(freed)
            }
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

/// Returns the last event of a load.
fn loaded(resident: &Resident) -> LoadEvent {
    LoadEvent::Loaded(Box::new(resident.describe()), resident.tenancy.door())
}
