//! The use of a resident model. `Arc` makes it free of races: a lease is an upgraded `Weak`, and a tenancy
//! ends with `Arc::try_unwrap`, which succeeds only if no lease is left and makes every later upgrade fail.

use std::sync::{Arc, Weak};

use crate::hub::ModelAssets;
use crate::ids::ModelName;

/// A resident model as its owner, the engine, holds it.
#[derive(Debug)]
pub struct Tenancy(Arc<Entry>);

/// The right to use a resident model: while a lease is held, the model is not unloaded.
#[derive(Clone, Debug)]
pub struct ModelLease(Arc<Entry>);

/// What is published of a resident model: what it was loaded from, and a way to a lease while it is resident.
/// Holds no lease.
#[derive(Clone, Debug)]
pub struct Door {
    assets: Arc<ModelAssets>,
    entry: Weak<Entry>,
}

/// What the weights were loaded from. Their files may have changed on disk since.
#[derive(Debug)]
struct Entry {
    assets: Arc<ModelAssets>,
}

impl Tenancy {
    /// Begins the tenancy of a model that was loaded from `assets`.
    #[must_use]
    pub fn new(assets: Arc<ModelAssets>) -> Self {
        Self(Arc::new(Entry { assets }))
    }

    /// Returns a lease.
    #[must_use]
    pub fn lease(&self) -> ModelLease {
        ModelLease(Arc::clone(&self.0))
    }

    /// Returns the number of leases.
    #[must_use]
    pub fn leases(&self) -> u32 {
        u32::try_from(Arc::strong_count(&self.0) - 1).unwrap_or(u32::MAX)
    }

    /// Returns whether `lease` is one of this tenancy, not of an earlier one of the same model.
    #[must_use]
    pub fn granted(&self, lease: &ModelLease) -> bool {
        Arc::ptr_eq(&self.0, &lease.0)
    }

    /// Ends the tenancy; fails while a lease is held.
    ///
    /// # Errors
    /// The tenancy, unchanged.
    pub fn retire(self) -> Result<(), Self> {
        Arc::try_unwrap(self.0).map(drop).map_err(Self)
    }

    /// Returns what is published of the model.
    #[must_use]
    pub fn door(&self) -> Door {
        Door { assets: Arc::clone(&self.0.assets), entry: Arc::downgrade(&self.0) }
    }
}

impl ModelLease {
    /// Returns the model's name.
    #[must_use]
    pub fn model(&self) -> &ModelName {
        &self.0.assets.files.name
    }

    /// Returns what the resident weights were loaded from.
    #[must_use]
    pub fn assets(&self) -> &Arc<ModelAssets> {
        &self.0.assets
    }
}

impl Door {
    /// Returns what the weights were loaded from.
    #[must_use]
    pub fn assets(&self) -> &Arc<ModelAssets> {
        &self.assets
    }

    /// Returns a lease; None once the tenancy has ended.
    #[must_use]
    pub fn lease(&self) -> Option<ModelLease> {
        self.entry.upgrade().map(ModelLease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenancy() -> Tenancy {
        Tenancy::new(Arc::new(ModelAssets::fake("m")))
    }

    #[test]
    fn a_leased_model_cannot_be_retired() {
        let tenancy = tenancy();
        let (door, lease) = (tenancy.door(), tenancy.lease());
        assert_eq!(tenancy.leases(), 1);
        let tenancy = tenancy.retire().unwrap_err();
        assert!(tenancy.granted(&door.lease().unwrap()));
        drop(lease);
        tenancy.retire().unwrap();
        assert!(door.lease().is_none(), "no lease of a retired model");
    }

    #[test]
    fn a_lease_of_an_earlier_tenancy_is_told_apart() {
        assert!(!tenancy().granted(&tenancy().lease()));
    }
}
