//! A resident model as the policy sees it.

use crate::backend::Formats;
use crate::clock::Moment;
use crate::ids::ModelName;

/// A resident model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Its name.
    pub model: ModelName,
    /// Its number formats; none is `Auto`.
    pub formats: Formats,
    /// The description of how it computes.
    pub computes_in: String,
    /// Bytes that it holds and has promised: weights, KV slabs, cached KV, growth of running sequences.
    pub bytes: u64,
    /// Bytes of empty KV slabs among them.
    pub empty_bytes: u64,
    /// Bytes of cached KV among them.
    pub parked_bytes: u64,
    /// Number of calls that use it, those that wait included.
    pub users: u32,
    /// Whether it stays whatever happens.
    pub pinned: bool,
    /// Time of its last use.
    pub used: Moment,
    /// Time at which it is unloaded unless it is used before; None is never.
    pub expires: Option<Moment>,
}

impl Tenant {
    /// Returns whether a call uses it.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.users > 0
    }

    /// Returns whether it may be evicted for another.
    #[must_use]
    pub fn is_evictable(&self) -> bool {
        !self.pinned && !self.is_in_use()
    }

    /// Returns whether it has stayed as long as it was to stay.
    #[must_use]
    pub fn has_expired(&self, now: Moment) -> bool {
        self.is_evictable() && self.expires.is_some_and(|expires| expires <= now)
    }

    /// Returns the bytes that stay while the model does.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.empty_bytes + self.parked_bytes)
    }

    /// Returns the bytes that no load may take from it.
    #[must_use]
    pub fn stay_bytes(&self) -> u64 {
        if self.is_evictable() { 0 } else { self.held_bytes() }
    }
}
