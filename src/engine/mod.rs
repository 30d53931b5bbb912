//! The engine: one OS thread that owns MLX and everything of every model, and the handle to it.

mod handle;
mod work;

pub use handle::EngineHandle;
pub use work::{
    Command, ComputeDtype, Delta, DeviceInfo, EVENTS_BUFFERED_MAX, EngineStats, Finish, Fit, GenerateEvent,
    GenerateWork, Generated, LoadEvent, LoadSpec, Penalty, ResidentModel, Sampling, ScoreWork, Scored,
    SlabClass, Stopping, TokenLogprobs, WorkOrigin,
};
