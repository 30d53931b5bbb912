//! The byte budget that all models share.

use crate::error::Error;
use crate::ids::ModelName;

/// Bytes of the budget and their use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Budget for weights and KV caches.
    pub budget_bytes: u64,
    /// Bytes in use by models, promised to running sequences, or reserved for loads.
    pub used_bytes: u64,
    /// Bytes in use that can be evicted: parked caches and empty slabs.
    pub reclaimable_bytes: u64,
}

/// Whether a model would fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Bytes that the load takes.
    pub needed_bytes: u64,
    /// Bytes available for it, reclaimable ones included.
    pub available_bytes: u64,
}

impl Memory {
    /// Returns the bytes that are neither used nor promised.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.budget_bytes.saturating_sub(self.used_bytes)
    }

    /// Returns the free bytes and the reclaimable ones.
    #[must_use]
    pub fn available_bytes(&self) -> u64 {
        self.free_bytes() + self.reclaimable_bytes
    }

    /// Admits a load of `needed_bytes`; returns the bytes to evict for it.
    ///
    /// # Errors
    /// `ModelTooLarge` if it exceeds the whole budget, `MemoryBudget` if it does not fit beside what is
    /// resident.
    pub fn admit(&self, model: &ModelName, needed_bytes: u64) -> Result<u64, Error> {
        let (model, available_bytes) = (model.clone(), self.available_bytes());
        if needed_bytes > self.budget_bytes {
            return Err(Error::ModelTooLarge { model, needed_bytes, available_bytes: self.budget_bytes });
        }
        if needed_bytes > available_bytes {
            return Err(Error::MemoryBudget { model, needed_bytes, available_bytes });
        }
        Ok(needed_bytes.saturating_sub(self.free_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEMORY: Memory = Memory { budget_bytes: 100, used_bytes: 70, reclaimable_bytes: 20 };

    #[test]
    fn a_load_evicts_only_what_is_missing() {
        assert_eq!(MEMORY.admit(&"m".into(), 30), Ok(0));
        assert_eq!(MEMORY.admit(&"m".into(), 45), Ok(15));
        assert_eq!(MEMORY.admit(&"m".into(), 50), Ok(20));
    }

    #[test]
    fn a_load_that_does_not_fit_is_refused_with_numbers() {
        let model = ModelName::from("m");
        let beside = Error::MemoryBudget { model: model.clone(), needed_bytes: 51, available_bytes: 50 };
        assert_eq!(MEMORY.admit(&model, 51), Err(beside));
        let whole = Error::ModelTooLarge { model: model.clone(), needed_bytes: 101, available_bytes: 100 };
        assert_eq!(MEMORY.admit(&model, 101), Err(whole));
    }

    #[test]
    fn a_budget_that_shrank_has_nothing_free() {
        let memory = Memory { budget_bytes: 50, ..MEMORY };
        assert_eq!((memory.free_bytes(), memory.available_bytes()), (0, 20));
    }

    proptest! {
        #[test]
        fn an_admitted_load_never_exceeds_the_budget(
            budget_bytes in 0..1000_u64, used in 0..1000_u64, part in 0..=100_u64, needed in 0..1000_u64,
        ) {
            let used_bytes = used.min(budget_bytes);
            let memory = Memory { budget_bytes, used_bytes, reclaimable_bytes: used_bytes * part / 100 };
            if let Ok(evicted) = memory.admit(&"m".into(), needed) {
                prop_assert!(evicted <= memory.reclaimable_bytes);
                prop_assert!(used_bytes - evicted + needed <= budget_bytes);
            }
        }
    }
}
