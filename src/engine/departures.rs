//! How models leave: evicted for another, unloaded with time or on request, or because the budget shrank. Who
//! goes is `residency`'s to say.

use std::time::Duration;

use super::core::Engine;
use super::model::Resident;
use crate::backend::Backend;
use crate::clock::Moment;
use crate::error::Error;
use crate::ids::ModelName;
use crate::residency::{Evictions, ResidencySettings, evictions, evictions_towards};
use crate::sched::{Blocked, Wanted};

/// Most bytes of caches of a model that are saved before another one is loaded in its place: a load waits for
/// about two seconds then, by the speed that a disk is taken to have.
pub(super) const LOAD_WAITS_BYTES_MAX: u64 = 1_000_000_000;

/// Time that a load waits for them; then they are given up.
pub(super) const LOAD_WAIT: Duration = Duration::from_secs(3);

/// Time after which it no longer counts on that memory: the disk may hang.
pub(super) const LOAD_WAIT_MAX: Duration = Duration::from_secs(30);

/// Which caches are saved of a model that leaves.
#[derive(Clone, Copy, Debug)]
pub(super) enum Save {
    /// Those that the budget has room for until they are written, beside these bytes. Of a model that stays,
    /// none: what it frees is wanted at once.
    Beside(u64),
    /// Those that a load may wait for.
    First,
}

impl<B: Backend> Engine<B> {
    /// Changes the configuration of the policy. What follows from it is done in the next tick.
    pub(super) fn configure(&mut self, settings: ResidencySettings) {
        self.residency = settings;
        self.renew_budget();
    }

    /// Reads the byte budget again, which the device may have changed.
    pub(super) fn renew_budget(&mut self) {
        self.budget_bytes = self.current_budget();
    }

    /// Returns the byte budget that a load would have now.
    pub(super) fn current_budget(&self) -> u64 {
        self.residency.memory_budget_bytes.unwrap_or_else(|| self.backend.budget_bytes())
    }

    /// Evicts models and frees cached KV for a load or a request of `wanted`. Returns false if a model was
    /// leased since this was decided, which is to be done again then.
    pub(super) fn make_room(
        &mut self,
        evictions: &Evictions,
        wanted: &ModelName,
        save: Save,
    ) -> Result<bool, Error> {
        for model in &evictions.models {
            match self.unload(model, save) {
                Ok(freed) => {
                    self.counters.evictions_total += 1;
                    tracing::info!(%model, freed, %wanted, "evicted");
                }
                Err(Error::ModelBusy { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.empty(evictions, save);
        Ok(true)
    }

    /// Evicts idle models for the request that waits for memory, or for one that may pass it, if that lets it
    /// start.
    pub(super) fn make_room_for_blocked(&mut self) {
        let Some(blocked) = &mut self.blocked else { return };
        let (passer, is_owed) = (blocked.passer.take(), blocked.wanted.is_owed);
        let (model, missing_bytes) = (blocked.model.clone(), blocked.wanted.missing_bytes);
        // What is owed starts in any case, with what there is.
        let in_any_case = is_owed && self.is_quiet();
        self.make_room_for_request(&model, missing_bytes, in_any_case);
        if let Some((model, missing_bytes)) = passer {
            self.make_room_for_request(&model, missing_bytes, false);
        }
    }

    fn make_room_for_request(&mut self, model: &ModelName, missing_bytes: u64, in_any_case: bool) {
        let missing = self.memory().missing_bytes(missing_bytes);
        // Admission frees what is cached, or waits with that for a reason of its own.
        let cached: u64 = self.models.values().map(Resident::reclaimable_bytes).sum();
        if missing <= cached {
            return;
        }
        let (tenants, now) = (self.tenants(), self.clock.now());
        let evictions = if in_any_case {
            Some(evictions_towards(&tenants, missing, now))
        } else {
            evictions(&tenants, missing, now)
        };
        let evictions = evictions.filter(|evictions| !evictions.models.is_empty());
        // Where a model was leased since, it is decided again in the next tick.
        let save = Save::Beside(missing_bytes);
        if let Some(Err(error)) = evictions.map(|evictions| self.make_room(&evictions, model, save)) {
            tracing::error!(%model, ?error, "there is no room for a request");
        }
    }

    /// Refuses the request that waits for models in use to leave, if calls that came later keep them in use:
    /// it could wait forever.
    pub(super) fn refuse_crowded_out(&mut self) {
        let waits_for_models =
            |blocked: &&Blocked| blocked.wanted.waits_for_models && !blocked.wanted.is_owed;
        let Some(blocked) = self.blocked.as_ref().filter(waits_for_models).cloned() else { return };
        let Blocked { model, ticket, wanted: Wanted { needed_bytes, .. }, .. } = blocked.clone();
        let waiting = self.models.get(&model).and_then(|resident| resident.queue.peek(&ticket));
        let Some(arrived) = waiting.map(|sequence| sequence.origin.arrived) else { return };
        let is_kept = |other: &&Resident| {
            *other.spec.model() != model
                && !other.is_pinned(&self.residency)
                && other.is_kept_by_later_than(arrived)
        };
        let kept: Vec<&Resident> = self.models.values().filter(is_kept).collect();
        let kept_bytes = kept.iter().map(|other| other.shape.weight_bytes).sum();
        let available_bytes = self.room(&model).kv_bytes_max.saturating_sub(kept_bytes);
        if needed_bytes <= available_bytes {
            return;
        }
        let in_the_way = kept.iter().map(|other| other.spec.model().clone()).collect();
        let error = Error::KvCrowded { needed_bytes, available_bytes, in_the_way };
        let (models, mut cx) = self.parts();
        if let Some(resident) = models.get_mut(&model) {
            resident.refuse(&mut cx, &ticket, &error);
        }
    }

    /// Frees what is cached of models that stay, in the order of the policy.
    fn empty(&mut self, evictions: &Evictions, save: Save) {
        let mut left = self.close_empty(evictions.cached_bytes, None);
        for model in &evictions.emptied {
            left = left.saturating_sub(self.evict_cached(model, left, save));
        }
    }

    /// Frees what exceeds the budget, models included, as far as the policy allows it.
    pub(super) fn shrink(&mut self) {
        let missing = self.memory().missing_bytes(0);
        if missing == 0 {
            return;
        }
        let evictions = evictions_towards(&self.tenants(), missing, self.clock.now());
        for model in &evictions.models {
            // One that was leased since stays; what it holds is missing in the next tick.
            match self.unload(model, Save::Beside(0)) {
                Ok(freed) => {
                    self.counters.evictions_total += 1;
                    tracing::info!(%model, freed, budget = self.budget_bytes, "evicted: the budget is smaller");
                }
                Err(Error::ModelBusy { .. }) => {}
                Err(error) => tracing::error!(%model, ?error, "the model could not be unloaded"),
            }
        }
        self.empty(&evictions, Save::Beside(0));
    }

    /// Unloads the models that nobody has used for their time. Returns whether there was one.
    pub(super) fn expire(&mut self) -> bool {
        let now = self.clock.now();
        let mut expired = Vec::new();
        for (model, resident) in &mut self.models {
            if resident.is_in_use() {
                resident.lifetime.touch(now);
            } else if resident.lifetime.expires(model, &self.residency).is_some_and(|expires| expires <= now)
            {
                expired.push(model.clone());
            }
        }
        let mut unloaded = false;
        for model in expired {
            match self.unload(&model, Save::Beside(0)) {
                Ok(freed) => {
                    (unloaded, self.counters.expirations_total) = (true, self.counters.expirations_total + 1);
                    tracing::info!(%model, freed, "unloaded: nobody has used it for its keep_alive");
                }
                // Leased since.
                Err(Error::ModelBusy { .. }) => {}
                Err(error) => tracing::error!(%model, ?error, "the model could not be unloaded"),
            }
        }
        unloaded
    }

    /// Returns when the first model expires, unless it is used before.
    pub(super) fn next_expiry(&self) -> Option<Moment> {
        let models = self.models.iter();
        models.filter_map(|(model, resident)| resident.lifetime.expires(model, &self.residency)).min()
    }

    /// Frees a model because a caller asks for it.
    pub(super) fn unload_on_request(&mut self, model: &ModelName) -> Result<u64, Error> {
        let unloaded = self.unload(model, Save::Beside(0));
        if let Ok(freed) = unloaded {
            tracing::info!(%model, freed, "unloaded");
        }
        unloaded
    }

    /// Frees a model; returns the bytes that were freed. A model that is in use stays. Caches of sessions are
    /// saved if that is worth it, and keep their memory until they are written.
    pub(super) fn unload(&mut self, model: &ModelName, save: Save) -> Result<u64, Error> {
        let Some(resident) = self.models.remove(model) else {
            return Err(Error::ModelNotLoaded(model.clone()));
        };
        let freed = resident.bytes();
        if !resident.is_in_use() {
            let free_bytes = self.memory().free_bytes();
            let spare_bytes = match save {
                Save::Beside(wanted_bytes) => free_bytes.saturating_sub(wanted_bytes),
                Save::First => free_bytes.min(LOAD_WAITS_BYTES_MAX),
            };
            resident.hand_over_all(&mut self.parts().1, spare_bytes);
        }
        match resident.retire() {
            Err(resident) => {
                // The last caller may have gone since.
                let running = resident.users().max(1);
                self.models.insert(model.clone(), *resident);
                Err(Error::ModelBusy { model: model.clone(), running })
            }
            Ok(id) => {
                self.blocked.take_if(|blocked| blocked.model == *model);
                self.publish();
                self.backend.unload(id)?;
                Ok(freed)
            }
        }
    }
}
