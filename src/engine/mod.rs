//! The engine: one OS thread that owns the device and everything of every model. `api` is what crosses its
//! border, `task` one request, `model` one resident model; `core` drives them, `resident_set` loads models,
//! `departures` frees them and `load` is one load. What it decides is pure (`residency`, `sched`, `cache`);
//! what it does goes through a [`crate::backend::Backend`].

mod api;
mod core;
mod departures;
mod load;
mod masks;
mod model;
mod resident_set;
mod saving;
#[cfg(test)]
#[path = "../../tests/sim/mod.rs"]
mod sim;
mod snapshots;
mod task;
#[cfg(test)]
mod tests;
mod thread;

pub use api::{
    AdoptWork, Barred, CacheUse, CachedAsk, CachedKv, Command, Constraint, Counters, Delta, DrySampling,
    EVENTS_BUFFERED_MAX, EngineHandle, EngineSettings, EngineStats, ExportAsk, Finish, GenerateEvent,
    GenerateWork, Generated, KvCharge, KvCopy, KvFacts, KvOutbox, KvRoom, LoadEvent, LoadWork, Penalty,
    Pulse, Reading, ReasoningBudget, ResidentModel, RoomAsk, Sampling, ScoreWork, Scored, Starts, Stopping,
    TurnTie, WorkOrigin, XtcSampling,
};
pub use thread::start;

// The edge names these too, but needs nothing else of a backend.
pub use crate::backend::{
    BuildKv, ComputeDtype, DeviceInfo, DeviceMemory, Formats, KvDtype, KvLayout, KvSegment, LoadSpec,
    TokenLogprobs,
};
pub use crate::cache::{Salt, SlabClass};
pub use crate::prompt::Prompt;
pub use crate::residency::{
    Fit, KeepAlive, ModelLease, ModelSettings, ModelState, ModelTable, NotAKeepAlive, ResidencySettings,
    Stay, Tenancy,
};
pub use crate::sched::{Owner, Priority};
