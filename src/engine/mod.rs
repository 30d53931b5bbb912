//! The engine: one OS thread that owns MLX and everything of every model, and the handle to it. What it
//! decides is pure (`sched`, `cache`); what it does goes through a [`crate::backend::Backend`].

mod admit;
mod core;
mod counters;
mod handle;
mod load;
mod resident;
mod sampling;
mod sequence;
#[cfg(test)]
#[path = "../../tests/sim/mod.rs"]
mod sim;
mod step;
#[cfg(test)]
mod tests;
mod thread;
mod work;

pub use core::EngineSettings;
pub use handle::EngineHandle;
pub use thread::start;
pub use work::{
    Command, Delta, EVENTS_BUFFERED_MAX, EngineStats, Finish, Fit, GenerateEvent, GenerateWork, Generated,
    LoadEvent, Penalty, ResidentModel, Sampling, ScoreWork, Scored, Stopping, WorkOrigin, XtcSampling,
};

// The edge names these too, but needs nothing else of a backend.
pub use crate::backend::{ComputeDtype, DeviceInfo, KvDtype, LoadSpec, TokenLogprobs};
pub use crate::cache::SlabClass;
pub use crate::prompt::Prompt;
pub use crate::sched::Priority;
