//! How long models stay: what calls and configurations say about it, and who may not leave by itself.

use std::time::Duration;

use super::world::World;
use crate::backend::ModelId;
use crate::engine::model::Resident;
use crate::engine::{KeepAlive, ModelSettings, ResidencySettings, Stay};
use crate::ids::ModelName;

impl World {
    /// What a call says about how long its model stays after its last use: mostly nothing.
    pub(super) fn keep_alive(&mut self) -> Option<KeepAlive> {
        match self.random.below(16) {
            0 => Some(KeepAlive::For(Duration::ZERO)),
            1 | 2 => {
                let most = self.random.below(4000);
                Some(KeepAlive::For(Duration::from_millis(most)))
            }
            3 => Some(KeepAlive::Forever),
            _ => None,
        }
    }

    /// What a load says about its model's stay.
    pub(super) fn stay(&mut self) -> Stay {
        let pin = match self.random.below(8) {
            0 => Some(true),
            1 | 2 => Some(false),
            _ => None,
        };
        Stay { keep_alive: self.keep_alive(), pin }
    }

    /// Settings that a new configuration may have; in half of them models stay forever.
    pub(super) fn residency(&mut self, budget: u64) -> ResidencySettings {
        let seconds = |of: u64| KeepAlive::For(Duration::from_secs(of));
        let keep_alive =
            if self.random.once_in(2) { seconds(self.random.below(20)) } else { KeepAlive::Forever };
        let keep_alive_max = if self.random.once_in(4) { seconds(30) } else { KeepAlive::Forever };
        let own = ModelSettings { keep_alive: self.keep_alive(), pin: self.random.once_in(4) };
        let own = self.random.once_in(4).then(|| ("other".into(), own));
        ResidencySettings {
            memory_budget_bytes: Some(budget),
            keep_alive: keep_alive.min(keep_alive_max),
            keep_alive_max,
            models: own.into_iter().collect(),
        }
    }

    /// Returns the models that may not leave in the next tick: the pinned ones, and those that calls hold.
    /// Whose step fails is lost, whoever holds it.
    pub(super) fn those_who_stay(&self) -> Vec<(ModelName, ModelId)> {
        if self.engine.backend.faults.next_step_fails {
            return vec![];
        }
        let stays = |(model, resident): &(&ModelName, &Resident)| {
            resident.lifetime.is_pinned(model, &self.engine.residency)
                || self.leases.iter().any(|lease| resident.tenancy.granted(lease))
        };
        let models = self.engine.models.iter().filter(stays);
        models.map(|(model, resident)| (model.clone(), resident.id)).collect()
    }

    /// Nobody is evicted or expires while a pin or a lease holds the model.
    pub(super) fn check_stays(&self) {
        for (model, id) in &self.staying {
            let found = self.engine.models.get(model).map(|resident| resident.id);
            assert_eq!(found, Some(*id), "{model} is pinned or leased, and left by itself");
        }
    }
}
