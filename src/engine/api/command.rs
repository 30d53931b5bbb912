//! Messages to the engine thread.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{EngineStats, GenerateWork, LoadWork, ScoreWork};
use crate::backend::LoadSpec;
use crate::cache::Salt;
use crate::error::Error;
use crate::ids::{ModelName, Principal, SessionKey};
use crate::residency::{Fit, ResidencySettings};

/// A question about cached KV.
#[derive(Clone, Debug)]
pub struct CachedAsk {
    /// The model.
    pub model: ModelName,
    /// Whose caches may be used.
    pub owner: Principal,
    /// The salt that they have.
    pub salt: Salt,
    /// The tokens that are looked for; at least one more follows.
    pub tokens: Arc<[u32]>,
}

/// What is cached of some tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CachedKv {
    /// Number of the first of them that need not be computed.
    pub tokens: u32,
    /// Bytes of their KV.
    pub bytes: u64,
}

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
            | Self::Configure(_)
            | Self::Drain(..) => true,
            Self::Fits(..) | Self::PinSession(..) | Self::Cached(..) | Self::Stats(_) => false,
        }
    }
}
