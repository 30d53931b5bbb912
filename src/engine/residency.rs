//! Which models are in memory, and the byte budget they share: loads and unloads, and what is evicted for
//! whom.

use tokio::sync::mpsc;

use super::api::{Fit, LoadEvent};
use super::core::Engine;
use super::load::Load;
use super::model::{Resident, Room};
use crate::backend::{Backend, ComputeDtype, KvDtype, LoadSpec, ModelId, ModelShape};
use crate::error::Error;
use crate::ids::ModelName;

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

    /// Returns the bytes of the budget that are neither used nor promised.
    fn free_bytes(&self) -> u64 {
        self.budget_bytes.saturating_sub(self.used_bytes())
    }

    /// Returns the free bytes and the reclaimable ones.
    fn available_bytes(&self) -> u64 {
        let reclaimable: u64 = self.models.values().map(Resident::reclaimable_bytes).sum();
        self.free_bytes() + reclaimable
    }

    /// Returns the bytes that one model may use in a tick.
    pub(super) fn room(&self) -> Room {
        let weights: u64 = self.models.values().map(|resident| resident.shape.weight_bytes).sum();
        Room {
            free_bytes: self.free_bytes(),
            kv_bytes_max: self.budget_bytes.saturating_sub(weights + self.loading_bytes()),
            idle_bytes_max: self.settings.kv_idle_bytes_max.unwrap_or(self.budget_bytes / 4),
        }
    }

    /// Evicts what overdraws the budget: parking may do so for a moment.
    pub(super) fn repay(&mut self) {
        self.give_back(self.used_bytes().saturating_sub(self.budget_bytes), None);
    }

    /// Evicts up to `missing` bytes of reclaimable cache from every model but `spared`.
    pub(super) fn give_back(&mut self, mut missing: u64, spared: Option<&ModelName>) {
        if missing == 0 {
            return;
        }
        self.each_model(|resident, cx| {
            if missing > 0 && Some(resident.spec.model()) != spared {
                missing = missing.saturating_sub(resident.give_back(cx, missing, None)?);
            }
            Ok(())
        });
    }

    /// Answers whether a model would fit.
    pub(super) fn fits(&self, spec: &LoadSpec) -> Fit {
        let available_bytes = self.available_bytes();
        let needed_bytes = match self.models.get(spec.model()) {
            Some(_) => 0,
            None => self.backend.plan(spec, available_bytes).needed_bytes,
        };
        Fit { needed_bytes, available_bytes }
    }

    /// Queues a load, joins the one that runs, or answers at once if the model is resident.
    pub(super) fn request_load(&mut self, spec: LoadSpec, events: &mpsc::Sender<LoadEvent>, draining: bool) {
        let outcome = if draining { Err(Error::Draining) } else { self.take_load(spec, events) };
        if let Err(error) = outcome {
            let _ = events.try_send(LoadEvent::Failed(error));
        }
    }

    fn take_load(&mut self, mut spec: LoadSpec, events: &mpsc::Sender<LoadEvent>) -> Result<(), Error> {
        if let Some(resident) = self.models.get(spec.model()) {
            if spec.dtype != resident.spec.dtype && spec.dtype != ComputeDtype::Auto {
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
        if let Some(load) = self.loads.iter_mut().find(|load| load.spec.model() == spec.model()) {
            load.listeners.push(events.clone());
            return Ok(());
        }
        if spec.kv == KvDtype::Auto {
            spec.kv = self.settings.kv_dtype;
        }
        self.loads.push_back(Load::new(spec, events.clone()));
        Ok(())
    }

    /// Reads one more piece of the first load.
    pub(super) fn advance_load(&mut self) {
        let Some(mut load) = self.loads.pop_front() else { return };
        match self.load_piece(&mut load) {
            Ok(None) => self.loads.push_front(load),
            Ok(Some((id, shape))) => {
                tracing::info!(model = %load.spec.model(), bytes = shape.weight_bytes, "loaded");
                let resident = Resident::new(id, load.spec.clone(), shape, self.clock.wall());
                let described = resident.describe();
                self.models.insert(load.spec.model().clone(), resident);
                load.end(|| LoadEvent::Loaded(Box::new(described.clone())));
            }
            Err(error) => {
                tracing::warn!(model = %load.spec.model(), ?error, "the load failed");
                load.abandon(&mut self.backend);
                load.end(|| LoadEvent::Failed(error.clone()));
            }
        }
    }

    fn load_piece(&mut self, load: &mut Load) -> Result<Option<(ModelId, ModelShape)>, Error> {
        if load.has_begun() {
            return load.advance(&mut self.backend);
        }
        let available_bytes = self.available_bytes();
        let plan = self.backend.plan(&load.spec, available_bytes);
        let (model, needed_bytes) = (load.spec.model().clone(), plan.needed_bytes);
        if needed_bytes > self.budget_bytes {
            return Err(Error::ModelTooLarge { model, needed_bytes, available_bytes: self.budget_bytes });
        }
        if needed_bytes > available_bytes {
            return Err(Error::MemoryBudget { model, needed_bytes, available_bytes });
        }
        self.give_back(needed_bytes.saturating_sub(self.free_bytes()), None);
        tracing::info!(%model, needed_bytes, available_bytes, "loading");
        load.begin(&mut self.backend, plan)?;
        Ok(None)
    }

    /// Frees a model; returns the bytes that were freed.
    pub(super) fn unload(&mut self, model: &ModelName) -> Result<u64, Error> {
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
}
