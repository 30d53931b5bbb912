//! The byte budget that all models share, and how a load stands to it.

use crate::error::MemoryRule;
use crate::ids::ModelName;

/// Bytes of the budget and their use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Budget for weights and KV caches.
    pub budget_bytes: u64,
    /// Bytes in use by models, promised to running sequences, or reserved for loads.
    pub used_bytes: u64,
}

/// Whether a model would fit, and what a load would evict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fit {
    /// Bytes that the load takes; 0 for a model that is resident.
    pub needed_bytes: u64,
    /// Bytes available to it, those that evictions free included.
    pub available_bytes: u64,
    /// The whole budget.
    pub budget_bytes: u64,
    /// Models that would be evicted, in this order, and the bytes that each frees.
    pub evictions: Vec<(ModelName, u64)>,
    /// The rule that forbids the load, and the models that would have to go first.
    pub refused: Option<(MemoryRule, Vec<ModelName>)>,
}

impl Memory {
    /// Returns the bytes that are neither used nor promised.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.budget_bytes.saturating_sub(self.used_bytes)
    }

    /// Returns the bytes that must be freed before `needed_bytes` more are used.
    #[must_use]
    pub fn missing_bytes(&self, needed_bytes: u64) -> u64 {
        self.used_bytes.saturating_add(needed_bytes).saturating_sub(self.budget_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_that_shrank_has_nothing_free_and_its_overdraft_is_missing() {
        let memory = Memory { budget_bytes: 50, used_bytes: 70 };
        assert_eq!((memory.free_bytes(), memory.missing_bytes(10)), (0, 30));
        let memory = Memory { budget_bytes: 100, ..memory };
        assert_eq!((memory.free_bytes(), memory.missing_bytes(30), memory.missing_bytes(31)), (30, 0, 1));
    }
}
