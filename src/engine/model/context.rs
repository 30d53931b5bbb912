//! What a model needs of the engine during a tick.

use crate::backend::Backend;
use crate::cache::Hit;
use crate::clock::{Clock, Moment};
use crate::engine::api::{Counters, EngineSettings};
use crate::engine::masks::MaskWorkers;
use crate::engine::saving::Saving;
use crate::sched::{Allowance, Blocked, Claims, Timeline};

/// The engine's parts that a model uses.
pub(crate) struct Context<'a, B: Backend> {
    pub(crate) backend: &'a mut B,
    pub(crate) counters: &'a mut Counters,
    pub(crate) settings: &'a EngineSettings,
    pub(crate) clock: &'a dyn Clock,
    /// The request that waits for memory, of whichever model.
    pub(crate) blocked: &'a mut Option<Blocked>,
    /// Number of the next sequence that starts, of whichever model.
    pub(crate) sequence_next: &'a mut u64,
    /// The time for prefill in this tick, all models together.
    pub(crate) allowance: &'a mut Allowance,
    /// The steps of all models on the device.
    pub(crate) timeline: &'a mut Timeline,
    /// Those who find out what constrained outputs may draw.
    pub(crate) masks: &'a mut MaskWorkers,
    /// Most bytes of parked caches of a model.
    pub(crate) idle_bytes_max: u64,
    /// Caches on their way to disk.
    pub(crate) saving: &'a mut Saving,
    /// Time of the tick; later once a step was waited for.
    pub(crate) now: Moment,
    /// Most bytes that the model of this tick may hold and promise: the budget less what others have.
    pub(crate) bytes_max: u64,
}

/// Bytes that a model may use in a tick, decided by the engine for all models together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Bytes of the budget that are neither used nor promised.
    pub(crate) free_bytes: u64,
    /// Bytes of other models' empty slabs.
    pub(crate) others_empty_bytes: u64,
    /// Bytes that other models can give back, those included.
    pub(crate) elsewhere_bytes: u64,
    /// Most bytes of KV caches that there can be room for: the budget less the weights of this model and of
    /// pinned ones. A running load may take part of them for a while, or for good once it is resident.
    pub(crate) kv_bytes_max: u64,
    /// The same while the models that are in use stay.
    pub(crate) kv_bytes_now: u64,
    /// Whether no sequence of any model runs, and none is being read.
    pub(crate) is_quiet: bool,
    /// Whether the model is pinned, so that nobody waits for it to leave.
    pub(crate) is_pinned: bool,
    /// What the blocked request waits for in other models.
    pub(crate) claims: Claims,
    /// Most bytes of parked caches.
    pub(crate) idle_bytes_max: u64,
}

/// What may be freed for a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reclaim {
    /// Slabs that no sequence uses.
    EmptySlabs,
    /// Those, and parked caches, except the one that the sequence will start from.
    AllBut(Option<Hit>),
}
