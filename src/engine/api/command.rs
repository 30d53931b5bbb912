//! Messages to the engine thread.

use std::time::Duration;

use tokio::sync::oneshot;

use super::{
    AdoptWork, CachedAsk, CachedKv, EngineStats, ExportAsk, GenerateWork, KvCopy, KvOutbox, KvRoom, LoadWork,
    RoomAsk, ScoreWork,
};
use crate::backend::LoadSpec;
use crate::error::Error;
use crate::ids::{ModelName, SessionKey};
use crate::residency::{Fit, ResidencySettings};

/// A message to the engine thread.
#[derive(Debug)]
pub enum Command {
    /// Runs a generation.
    Generate(Box<GenerateWork>),
    /// Runs a score.
    Score(Box<ScoreWork>),
    /// Makes a model resident. A load ends when all who wait for it have left.
    Load(LoadWork),
    /// Asks whether a model would fit, and what its load would evict.
    Fits(LoadSpec, oneshot::Sender<Result<Fit, Error>>),
    /// Changes the configuration of the policy.
    Configure(Box<ResidencySettings>),
    /// Frees a model; answers with the bytes that were freed.
    Unload(ModelName, oneshot::Sender<Result<u64, Error>>),
    /// Drops the KV caches of a session that is gone.
    Forget(SessionKey),
    /// Notes whether a session is pinned.
    PinSession(SessionKey, bool),
    /// Asks how much of some tokens is cached; answers in the order of the questions.
    Cached(Vec<CachedAsk>, oneshot::Sender<Vec<CachedKv>>),
    /// Asks for room for what a snapshot has and no cache; none if there is no need or no room.
    Room(Box<RoomAsk>, oneshot::Sender<Option<KvRoom>>),
    /// Hands caches of sessions over before they are evicted, from now on.
    SaveEvicted(KvOutbox),
    /// Asks for what is cached of a session as plain data; none if there is nothing to save.
    Export(Box<ExportAsk>, oneshot::Sender<Result<Option<KvCopy>, Error>>),
    /// Parks a cache that was read from disk; answers with the bytes that it takes.
    Adopt(Box<AdoptWork>, oneshot::Sender<Result<u64, Error>>),
    /// Asks for the counts.
    Stats(oneshot::Sender<EngineStats>),
    /// Refuses new work from now on; answers when the running work is done or the time has passed.
    Drain(Duration, oneshot::Sender<()>),
}

impl Command {
    /// Returns whether it may use or free memory.
    pub(crate) fn is_work(&self) -> bool {
        match self {
            Self::Generate(_)
            | Self::Score(_)
            | Self::Load(_)
            | Self::Unload(..)
            | Self::Forget(_)
            | Self::Export(..)
            | Self::Adopt(..)
            | Self::Room(..)
            | Self::Configure(_)
            | Self::Drain(..) => true,
            Self::Fits(..)
            | Self::PinSession(..)
            | Self::Cached(..)
            | Self::SaveEvicted(_)
            | Self::Stats(_) => false,
        }
    }
}
