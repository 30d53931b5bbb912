//! Messages to the engine thread.

use std::time::Duration;

use tokio::sync::oneshot;

use super::{EngineStats, GenerateWork, LoadWork, ScoreWork};
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
            Self::Fits(..) | Self::Stats(_) => false,
        }
    }
}
