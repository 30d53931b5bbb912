//! What the engine tells its callers: the events of a generation and of a load, and the answer of a score.

use std::time::Duration;

use super::ResidentModel;
use crate::backend::TokenLogprobs;
use crate::error::Error;
use crate::output::Piece;
use crate::residency::{Door, ModelLease};

/// Most events that an engine's sender may buffer for one request; past that, deltas coalesce in the
/// sequence.
pub const EVENTS_BUFFERED_MAX: usize = 32;

/// What happens to a generation, in order.
#[derive(Debug)]
pub enum GenerateEvent {
    /// It was admitted.
    Started {
        /// Tokens found in a KV cache.
        cached_tokens: u32,
        /// Time from arrival to admission.
        queue_time: Duration,
    },
    /// More of the context was prefilled.
    Progress {
        /// Tokens of the context that are done, cached ones included.
        done_tokens: u32,
    },
    /// New output.
    Delta(Delta),
    /// It ended; the last event.
    Ended(Result<Generated, Error>),
}

/// A piece of output.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// Text of whole characters, without reasoning and tool calls.
    pub text: String,
    /// Reasoning, the same way.
    pub reasoning: String,
    /// The pieces of tool calls, and no others.
    pub calls: Vec<Piece>,
    /// New tokens, the ending one included.
    pub tokens: Vec<u32>,
    /// Logprobs, one entry per token if asked for.
    pub logprobs: Vec<TokenLogprobs>,
}

/// How a generation ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// Reason for the end.
    pub finish: Finish,
    /// All generated tokens, the ending one included.
    pub tokens: Vec<u32>,
    /// Number of them that are reasoning.
    pub reasoning_tokens: u32,
    /// Time from arrival to the first generated token.
    pub time_to_first_token: Duration,
    /// Time from the first generated token to the last.
    pub decode_time: Duration,
    /// Time from arrival to the end.
    pub total_time: Duration,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// At a stop token.
    StopToken,
    /// At the stop string of this index in the request.
    StopString(usize),
    /// With the grammar, which allows nothing more, where no token ends an output.
    Complete,
    /// At max_tokens.
    Length,
    /// Where a stop token would end it, with tool calls in it.
    ToolCalls,
}

/// The scores of a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// One entry for each token from `score_from` on; None for the first token of a text.
    pub scores: Vec<Option<TokenLogprobs>>,
    /// Tokens found in a KV cache.
    pub cached_tokens: u32,
}

/// What happens during a load; the last is `Loaded` or `Failed`.
#[derive(Debug)]
pub enum LoadEvent {
    /// Weights are being read.
    Progress {
        /// Bytes of the files that were read.
        done_bytes: u64,
        /// Bytes of all files.
        total_bytes: u64,
    },
    /// The model runs its first steps.
    Warming,
    /// The model is resident. Brings a lease only to those who asked for one.
    Loaded(Box<ResidentModel>, Door, Option<ModelLease>),
    /// It could not be loaded.
    Failed(Error),
}
