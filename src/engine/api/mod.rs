//! What crosses the border between the edge and the engine thread: plain data, checked and tokenized by the
//! edge, and the events that come back over bounded channels.

mod cached;
mod command;
mod counters;
mod event;
mod handle;
mod pulse;
mod settings;
mod snapshot;
mod stats;
mod work;

pub use cached::{CachedAsk, CachedKv};
pub use command::Command;
pub use counters::Counters;
pub use event::{Delta, EVENTS_BUFFERED_MAX, Finish, GenerateEvent, Generated, LoadEvent, Scored};
pub use handle::EngineHandle;
pub(super) use handle::{QUEUE_RETRY, command_capacity};
pub use pulse::Pulse;
pub use settings::EngineSettings;
pub use snapshot::{AdoptWork, ExportAsk, KvCharge, KvCopy, KvFacts, KvOutbox, KvRoom, RoomAsk};
pub use stats::{EngineStats, ResidentModel};
pub use work::{
    Barred, CacheUse, Constraint, DrySampling, GenerateWork, LoadWork, Penalty, Reading, ReasoningBudget,
    Sampling, ScoreWork, Starts, Stopping, TurnTie, WorkOrigin, XtcSampling,
};
