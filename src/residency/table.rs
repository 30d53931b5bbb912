//! The published table of models. The engine replaces it whenever a model changes its state; callers read it
//! without a round trip through the engine's thread.

use std::collections::BTreeMap;

use super::{Door, ModelLease, Tenancy};
use crate::ids::ModelName;

/// Where a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelState {
    /// On disk only.
    Available,
    /// Being loaded, or waiting to be.
    Loading,
    /// In memory.
    Resident,
}

/// The models that are loading or resident, by name.
#[derive(Clone, Debug, Default)]
pub struct ModelTable(BTreeMap<ModelName, Place>);

#[derive(Clone, Debug)]
enum Place {
    Loading,
    Resident(Door),
}

impl ModelTable {
    /// Makes the table of these models.
    #[must_use]
    pub fn new<'a>(
        loading: impl Iterator<Item = &'a ModelName>,
        resident: impl Iterator<Item = (&'a ModelName, &'a Tenancy)>,
    ) -> Self {
        let loading = loading.map(|name| (name.clone(), Place::Loading));
        let resident = resident.map(|(name, tenancy)| (name.clone(), Place::Resident(tenancy.door())));
        Self(loading.chain(resident).collect())
    }

    /// Returns a lease of a model, if it is resident.
    #[must_use]
    pub fn lease(&self, model: &ModelName) -> Option<ModelLease> {
        self.door(model)?.lease()
    }

    /// Returns a model's door, if it is resident. Takes no lease.
    #[must_use]
    pub fn door(&self, model: &ModelName) -> Option<&Door> {
        match self.0.get(model)? {
            Place::Resident(door) => Some(door),
            Place::Loading => None,
        }
    }

    /// Returns where a model is.
    #[must_use]
    pub fn state(&self, model: &ModelName) -> ModelState {
        match self.0.get(model) {
            None => ModelState::Available,
            Some(Place::Loading) => ModelState::Loading,
            Some(Place::Resident(_)) => ModelState::Resident,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::hub::ModelAssets;

    #[test]
    fn the_table_tells_states_and_leases_what_is_resident() {
        let (name, loading): (ModelName, ModelName) = ("m".into(), "l".into());
        let tenancy = Tenancy::new(Arc::new(ModelAssets::fake("m")));
        let table = ModelTable::new([&loading].into_iter(), [(&name, &tenancy)].into_iter());
        let states = ["m", "l", "x"].map(|model| table.state(&model.into()));
        assert_eq!(states, [ModelState::Resident, ModelState::Loading, ModelState::Available]);
        assert_eq!(table.lease(&name).unwrap().model(), &name);
        assert!(table.lease(&loading).is_none());
        assert!(table.door(&loading).is_none());
        let assets = table.door(&name).unwrap().assets();
        tenancy.retire().unwrap();
        assert_eq!(assets.files.name, name, "assets hold no lease");
        assert!(table.lease(&name).is_none(), "an old table leases nothing that is gone");
    }
}
