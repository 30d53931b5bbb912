//! What crosses the border between the edge and the engine thread: plain data, checked and tokenized
//! by the edge, and the events that come back over bounded channels. Dropping the receiving end of
//! `events` cancels the work before the next launch, in whatever state it is.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot};

use crate::backend::{LoadSpec, TokenLogprobs};
use crate::cache::SlabClass;
use crate::clock::Moment;
use crate::error::Error;
use crate::ids::{ClientId, ModelName, Principal, RequestId, SessionKey};
use crate::prompt::Prompt;
use crate::sched::Priority;
use crate::text::Tokenizer;

/// Events an engine's sender may buffer for one request; past that, deltas coalesce in the sequence.
pub const EVENTS_BUFFERED_MAX: usize = 32;

/// Whose work it is; the same for generations and scores.
#[derive(Clone, Debug)]
pub struct WorkOrigin {
    /// The RPC.
    pub request: RequestId,
    /// The owner of the KV cache the work may read and leaves behind.
    pub principal: Principal,
    /// Who is treated fairly.
    pub client: ClientId,
    /// Who goes first where not all can run.
    pub priority: Priority,
    /// The session whose turn it is; its KV cache is dropped with the session.
    pub session: Option<SessionKey>,
    /// When the RPC arrived.
    pub arrived: Moment,
    /// When the RPC's deadline passes.
    pub deadline: Option<Moment>,
}

/// How tokens are chosen: every field is in range, defaults are applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 is off.
    pub top_p: f32,
    /// Most likely tokens kept; 0 is off. Below the vocabulary's size.
    pub top_k: u32,
    /// Least likelihood relative to the likeliest token; 0 is off.
    pub min_p: f32,
    /// Seed of the uniform numbers, one for each position.
    pub seed: u64,
    /// Factor above 0; 1 is off.
    pub repetition: Penalty,
    /// Subtracted once; 0 is off.
    pub presence: Penalty,
    /// Subtracted for each occurrence; 0 is off.
    pub frequency: Penalty,
    /// Added to logits, by token id below the vocabulary's size.
    pub logit_bias: Vec<(u32, f32)>,
    /// XTC; None is off.
    pub xtc: Option<XtcSampling>,
}

/// Removing the likeliest candidates now and then.
#[derive(Clone, Debug, PartialEq)]
pub struct XtcSampling {
    /// How often, in (0, 1].
    pub probability: f32,
    /// How likely a candidate has to be to be removed, in [0, 0.5].
    pub threshold: f32,
    /// Tokens that are never removed.
    pub spared: Arc<[u32]>,
}

/// A penalty on recent tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalty {
    /// Its strength.
    pub value: f32,
    /// How many last tokens it looks at; 0 is all.
    pub context_size: u32,
}

/// When a generation ends.
#[derive(Clone, Debug)]
pub struct Stopping {
    /// Most tokens to generate, at least 1; prompt and these fit the context.
    pub max_tokens: u32,
    /// None is empty.
    pub stop_strings: Arc<[String]>,
    /// Ids that end the output, the model's own included unless they are ignored.
    pub stop_token_ids: Vec<u32>,
}

/// A generation.
#[derive(Debug)]
pub struct GenerateWork {
    /// Whose it is.
    pub origin: WorkOrigin,
    /// The resident model to run.
    pub model: ModelName,
    /// The whole context, a session's earlier tokens included; at least one token.
    pub prompt: Prompt,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// When it ends.
    pub stopping: Stopping,
    /// Return logprobs with this many alternatives.
    pub top_logprobs: Option<u32>,
    /// Turns tokens into text.
    pub tokenizer: Tokenizer,
    /// Where events go: `Started`, any number of `Progress`, then `Delta`, then one `Ended`.
    pub events: mpsc::Sender<GenerateEvent>,
}

/// What happens to a generation, in order.
#[derive(Debug)]
pub enum GenerateEvent {
    /// It was admitted.
    Started {
        /// Tokens found in a KV cache.
        cached_tokens: u32,
        /// From arrival to admission.
        queue_time: Duration,
    },
    /// So many tokens of the context are done, cached ones included.
    Progress {
        /// Tokens done.
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
    /// Whole characters.
    pub text: String,
    /// The tokens that are new, the ending one included.
    pub tokens: Vec<u32>,
    /// One entry per token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
}

/// How a generation ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// Why.
    pub finish: Finish,
    /// Every generated token, the ending one included.
    pub tokens: Vec<u32>,
    /// From arrival to the first generated token.
    pub time_to_first_token: Duration,
    /// From the first generated token to the last.
    pub decode_time: Duration,
    /// From arrival to the end.
    pub total_time: Duration,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// At a stop token.
    StopToken,
    /// At this stop string of the request.
    StopString(usize),
    /// At max_tokens.
    Length,
}

/// A score: one pass over given tokens.
#[derive(Debug)]
pub struct ScoreWork {
    /// Whose it is.
    pub origin: WorkOrigin,
    /// The resident model to run.
    pub model: ModelName,
    /// The whole context, a session's tokens first; at least one token.
    pub prompt: Prompt,
    /// Tokens from here on are scored; those before are only context.
    pub score_from: u32,
    /// How many alternatives to return for each position.
    pub top_logprobs: u32,
    /// Where the scores go; closing it cancels the work.
    pub reply: oneshot::Sender<Result<Scored, Error>>,
}

/// The scores of a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// One entry for each token from `score_from` on; None for a text's first token.
    pub scores: Vec<Option<TokenLogprobs>>,
    /// Tokens found in a KV cache.
    pub cached_tokens: u32,
}

/// What happens during a load; the last is `Loaded` or `Failed`.
#[derive(Debug)]
pub enum LoadEvent {
    /// Weights are being read; bytes of the files.
    Progress {
        /// Bytes read.
        done_bytes: u64,
        /// Bytes to read.
        total_bytes: u64,
    },
    /// A first run.
    Warming,
    /// The model is resident.
    Loaded(Box<ResidentModel>),
    /// It could not be loaded.
    Failed(Error),
}

/// Whether a model would fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Bytes the load takes.
    pub needed_bytes: u64,
    /// Bytes free for it, counting what can be dropped without harm.
    pub available_bytes: u64,
}

/// A model in memory, and what it does now.
#[derive(Clone, Debug, PartialEq)]
pub struct ResidentModel {
    /// Its name.
    pub model: ModelName,
    /// Identifies the weights.
    pub revision: String,
    /// How it computes, in words.
    pub computes_in: String,
    /// Weights, counted as numbers.
    pub parameter_count: u64,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes of its KV slabs.
    pub kv_slab_bytes: u64,
    /// Bytes of KV caches that no running sequence uses.
    pub kv_idle_bytes: u64,
    /// Bytes one token takes in the KV cache.
    pub kv_bytes_per_token: u64,
    /// Bytes that running sequences may still come to need.
    pub kv_reserved_bytes: u64,
    /// Sequences that run.
    pub running_sequences: u32,
    /// Those of them whose prompt is not done yet.
    pub prefilling_sequences: u32,
    /// Those of them that pause because their caller does not read.
    pub stalled_sequences: u32,
    /// Requests that wait.
    pub queued_sequences: u32,
    /// When it became resident.
    pub loaded: SystemTime,
    /// When it last ran.
    pub last_used: SystemTime,
    /// Its KV slabs by capacity.
    pub slabs: Vec<SlabClass>,
}

/// Counts since the engine's start, and what it holds now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Generations and scores that reached the engine.
    pub requests_total: u64,
    /// Those that ended well.
    pub finished_total: u64,
    /// Those whose caller went away or whose deadline passed.
    pub cancelled_total: u64,
    /// Those that failed otherwise.
    pub failed_total: u64,
    /// Those that were refused at admission.
    pub refused_total: u64,
    /// Running sequences that made room for others.
    pub preemptions_total: u64,
    /// Tokens prefilled.
    pub prefill_tokens_total: u64,
    /// Tokens found in a KV cache.
    pub cached_tokens_total: u64,
    /// Tokens generated.
    pub decode_tokens_total: u64,
    /// Steps launched.
    pub steps_total: u64,
    /// Bytes for weights and KV caches that may be used.
    pub budget_bytes: u64,
    /// MLX's count of bytes in use.
    pub mlx_active_bytes: u64,
    /// The most there were.
    pub mlx_peak_bytes: u64,
    /// What MLX keeps for reuse.
    pub mlx_cache_bytes: u64,
    /// Models in memory, by name.
    pub models: Vec<ResidentModel>,
}

/// A message to the engine thread.
#[derive(Debug)]
pub enum Command {
    /// Run a generation.
    Generate(Box<GenerateWork>),
    /// Run a score.
    Score(Box<ScoreWork>),
    /// Make a model resident. A load goes on when its listener is gone.
    Load(LoadSpec, mpsc::Sender<LoadEvent>),
    /// Say whether a model would fit.
    Fits(LoadSpec, oneshot::Sender<Result<Fit, Error>>),
    /// Free a model; answers with the bytes given back.
    Unload(ModelName, oneshot::Sender<Result<u64, Error>>),
    /// Drop the KV caches of a session that is gone.
    Forget(SessionKey),
    /// Count.
    Stats(oneshot::Sender<EngineStats>),
    /// Refuse new work; answer when the running work is done or the time is up.
    Drain(Duration, oneshot::Sender<()>),
}

impl Command {
    /// Whether memory may be used or freed because of it.
    pub(super) fn is_work(&self) -> bool {
        match self {
            Self::Generate(_)
            | Self::Score(_)
            | Self::Load(..)
            | Self::Unload(..)
            | Self::Forget(_)
            | Self::Drain(..) => true,
            Self::Fits(..) | Self::Stats(_) => false,
        }
    }
}
