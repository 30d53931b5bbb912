//! The engine's settings; every value is a key of the configuration.

use std::time::Duration;

use crate::backend::KvDtype;
use crate::sched::PaceLimits;

/// What the engine may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineSettings {
    /// Most bytes of parked KV caches, per model; None is a quarter of the budget.
    pub kv_idle_bytes_max: Option<u64>,
    /// Most parked KV caches, per model.
    pub kv_idle_caches_max: u32,
    /// Element type of KV caches where a load does not say.
    pub kv_dtype: KvDtype,
    /// Most tokens that one step may prefill.
    pub prefill_chunk_tokens: u32,
    /// Longest time of a step that only prefills.
    pub prefill_step: Duration,
    /// Longest time of a tick while somebody decodes, in percent of what whoever has fewest takes by itself.
    pub prefill_stretch_percent: u32,
    /// Most sequences of one model that run at once.
    pub running_sequences_max: u32,
    /// Most requests that wait, all models together.
    pub queue_length_max: u32,
    /// Most requests of one client that wait, all models together.
    pub queue_length_per_client_max: u32,
    /// Waiting time that lifts a request by one priority class.
    pub priority_ageing: Duration,
    /// Longest time that a caller may leave its stream unread.
    pub slow_reader: Duration,
    /// Threads that compute masks; 0 computes them on the engine's.
    pub mask_threads: u32,
    /// Longest time that the mask of one token may take.
    pub mask_max: Duration,
}

impl EngineSettings {
    /// Returns the bounds of a step's prefill.
    pub(crate) fn pace_limits(&self) -> PaceLimits {
        PaceLimits {
            prefill_tokens_max: self.prefill_chunk_tokens,
            stretch_percent: self.prefill_stretch_percent,
            step_max: self.prefill_step,
        }
    }
}
