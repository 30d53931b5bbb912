//! What a model needs of the engine during a tick.

use crate::backend::Backend;
use crate::clock::{Clock, Moment};
use crate::engine::api::{Counters, EngineSettings};

/// The engine's parts that a model uses.
pub(crate) struct Context<'a, B: Backend> {
    pub(crate) backend: &'a mut B,
    pub(crate) counters: &'a mut Counters,
    pub(crate) settings: &'a EngineSettings,
    pub(crate) clock: &'a dyn Clock,
    /// Time of the tick; later once a step was waited for.
    pub(crate) now: Moment,
}

/// Bytes that a model may use in a tick, decided by the engine for all models together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Bytes of the budget that are neither used nor promised.
    pub(crate) free_bytes: u64,
    /// Most bytes of KV caches: the budget less all weights.
    pub(crate) kv_bytes_max: u64,
    /// Most bytes of parked caches.
    pub(crate) idle_bytes_max: u64,
}
