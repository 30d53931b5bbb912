//! Requests as the engine takes them: every field is in range, defaults are applied, text is tokenized.
//! Dropping the receiving end of `events` or `reply` cancels the work before the next launch, in whatever
//! state it is.

use std::convert::Infallible;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use super::{GenerateEvent, LoadEvent, Scored};
use crate::backend::LoadSpec;
use crate::cache::{Rank, Salt};
use crate::clock::Moment;
use crate::error::Error;
use crate::grammar::Grammar;
use crate::ids::{RequestId, SessionKey};
use crate::output::Parser;
use crate::prompt::Prompt;
use crate::residency::{KeepAlive, ModelLease, Stay};
use crate::sched::{Owner, Priority};
use crate::text::{Detokenizer, Tokenizer};

/// Whose work it is; the same for generations and scores.
#[derive(Clone, Debug)]
pub struct WorkOrigin {
    /// The RPC.
    pub request: RequestId,
    /// Who is treated fairly; the principal owns the KV cache that the work may read and leaves behind.
    pub owner: Owner,
    /// Precedence where not all can run.
    pub priority: Priority,
    /// Session whose turn it is; its KV cache is dropped with the session.
    pub session: Option<SessionKey>,
    /// Whether that session is pinned: its KV cache is evicted last.
    pub pinned: bool,
    /// News of that session; none for a work that changes none.
    pub turn: Option<TurnTie>,
    /// Which cached KV of its principal it may use.
    pub cache: CacheUse,
    /// Time when the RPC arrived.
    pub arrived: Moment,
    /// Time when the RPC's deadline passes.
    pub deadline: Option<Moment>,
}

/// Which of its principal's cached KV a work may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheUse {
    /// That with this salt; it leaves its own there.
    Shared(Salt),
    /// None, and it leaves none.
    Off,
}

impl Default for CacheUse {
    fn default() -> Self {
        Self::Shared(Salt::default())
    }
}

/// Ties a work to the turn of a session that it is for: a deleted session ends it and keeps no cache, and the
/// turn learns when it has ended, read or unread.
#[derive(Clone, Debug)]
pub struct TurnTie {
    /// Whether the session was deleted.
    pub deleted: watch::Receiver<bool>,
    /// Closed when the work has ended.
    pub working: mpsc::Sender<Infallible>,
}

impl WorkOrigin {
    /// Returns how long the cache that the work leaves is worth keeping.
    pub(crate) fn rank(&self) -> Rank {
        match self.session {
            Some(_) if self.pinned => Rank::Pinned,
            Some(_) => Rank::Session,
            None => Rank::Anonymous,
        }
    }

    /// Returns whether its session was deleted.
    pub(crate) fn is_orphaned(&self) -> bool {
        self.turn.as_ref().is_some_and(|turn| *turn.deleted.borrow())
    }
}

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 is off.
    pub top_p: f32,
    /// Number of most likely tokens to draw from, below the vocabulary's size; 0 is off.
    pub top_k: u32,
    /// Least probability relative to the most likely token's; 0 is off.
    pub min_p: f32,
    /// Mass of locally typical sampling in (0, 1]; 1 is off.
    pub typical_p: f32,
    /// Seed of the uniform numbers, one for each position.
    pub seed: u64,
    /// Repetition penalty, a factor above 0; 1 is off.
    pub repetition: Penalty,
    /// Presence penalty, subtracted once; 0 is off.
    pub presence: Penalty,
    /// Frequency penalty, subtracted for each occurrence; 0 is off.
    pub frequency: Penalty,
    /// Logit bias by token id below the vocabulary's size.
    pub logit_bias: Vec<(u32, f32)>,
    /// XTC; None is off.
    pub xtc: Option<XtcSampling>,
    /// DRY; None is off.
    pub dry: Option<DrySampling>,
}

/// XTC: removes the most likely candidates now and then.
#[derive(Clone, Debug, PartialEq)]
pub struct XtcSampling {
    /// Probability that a token is drawn with XTC, in (0, 1].
    pub probability: f32,
    /// Least probability of a candidate to be removed, in [0, 0.5].
    pub threshold: f32,
    /// Tokens that are never removed.
    pub spared: Arc<[u32]>,
}

/// DRY: penalizes tokens that would go on with a repetition.
#[derive(Clone, Debug, PartialEq)]
pub struct DrySampling {
    /// Strength of the penalty, above 0.
    pub multiplier: f32,
    /// Its growth with each token repeated, at least 1.
    pub base: f32,
    /// Length from which a repetition is penalized, at least 1.
    pub allowed_length: u32,
    /// Number of last tokens that are examined; 0 is all.
    pub context_size: u32,
    /// Texts after which what counts as repeated begins; none is empty.
    pub breakers: Arc<[String]>,
}

/// A penalty on recent tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalty {
    /// Strength.
    pub value: f32,
    /// Number of last tokens that it applies to; 0 is all.
    pub context_size: u32,
}

/// When a generation ends.
#[derive(Clone, Debug)]
pub struct Stopping {
    /// Most tokens to generate, at least 1; prompt and these fit the context.
    pub max_tokens: u32,
    /// Stop strings; none is empty.
    pub stop_strings: Arc<[String]>,
    /// Ids that end the output, the model's own included unless they are ignored.
    pub stop_token_ids: Vec<u32>,
}

/// How the text of an output is read.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Parts it into text, reasoning and tool calls.
    pub parser: Parser,
    /// Whether tool calls are looked for; white space before one is none of the text.
    pub calls: bool,
    /// Whether the output ends after its first tool call.
    pub one_call: bool,
    /// How long it may reason; None as long as it wants.
    pub budget: Option<ReasoningBudget>,
}

/// A bound on reasoning.
#[derive(Clone, Debug)]
pub struct ReasoningBudget {
    /// Tokens after which it is closed.
    pub tokens: u32,
    /// The tokens that close it; at least one.
    pub closing: Arc<[u32]>,
}

/// What an output obeys.
#[derive(Clone, Debug)]
pub struct Constraint {
    /// The grammar.
    pub grammar: Arc<Grammar>,
    /// Where in the output the grammar begins.
    pub starts: Starts,
}

/// Where in an output its grammar begins.
#[derive(Clone, Debug)]
pub enum Starts {
    /// With the first token.
    Immediately,
    /// Where the answer begins, as the output's [`Reading`] says; before it anything may be drawn.
    AfterReasoning {
        /// The tokens that begin reasoning, which the output may begin with; none if it is under way.
        opening: Arc<[u32]>,
        /// What is not drawn in reasoning.
        barred: Arc<Barred>,
    },
}

/// Tokens that are not drawn in reasoning.
#[derive(Debug, Default)]
pub struct Barred {
    /// Those that end an output.
    pub ends: Vec<u32>,
    /// Those that would bring the beginning of the answer unseen by its grammar: they end what closes the
    /// reasoning, of which this number of bytes has come, and go on.
    pub closing: Vec<Vec<u32>>,
}

/// A generation.
#[derive(Debug)]
pub struct GenerateWork {
    /// Whose it is.
    pub origin: WorkOrigin,
    /// The resident model to run. The engine holds it until the work ends.
    pub model: ModelLease,
    /// The whole context, a session's earlier tokens included; at least one token. With `max_tokens` of 0 it
    /// is only computed, and left in a cache.
    pub prompt: Prompt,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// When it ends.
    pub stopping: Stopping,
    /// What every choice obeys; None is anything.
    pub constraint: Option<Constraint>,
    /// Number of alternatives to return with logprobs; None returns no logprobs.
    pub top_logprobs: Option<u32>,
    /// Knows the model's control tokens.
    pub tokenizer: Tokenizer,
    /// Turns the output into text; it knows what stands before.
    pub detokenizer: Detokenizer,
    /// How that text is read; None where all of it is text.
    pub reading: Option<Box<Reading>>,
    /// How long the model stays after it; None leaves that as it is.
    pub keep_alive: Option<KeepAlive>,
    /// Receiver of events: `Started`, any number of `Progress`, then `Delta`, then one `Ended`.
    pub events: mpsc::Sender<GenerateEvent>,
    /// Receivers of the other choices: output after the same prompt, which is computed once. The first of
    /// them has the seed plus 1, and so on. Their events begin with output, or are one `Ended`.
    pub others: Vec<mpsc::Sender<GenerateEvent>>,
}

/// A score: one pass over given tokens.
#[derive(Debug)]
pub struct ScoreWork {
    /// Whose it is.
    pub origin: WorkOrigin,
    /// The resident model to run. The engine holds it until the work ends.
    pub model: ModelLease,
    /// The whole context, a session's tokens first; at least one token.
    pub prompt: Prompt,
    /// First token that is scored; those before are only context.
    pub score_from: u32,
    /// Number of alternatives to return for each position.
    pub top_logprobs: u32,
    /// How long the model stays after it; None leaves that as it is.
    pub keep_alive: Option<KeepAlive>,
    /// Receiver of the scores; closing it cancels the work.
    pub reply: oneshot::Sender<Result<Scored, Error>>,
}

/// The wish to have a model in memory.
#[derive(Debug)]
pub struct LoadWork {
    /// The model.
    pub spec: LoadSpec,
    /// What the caller says about its stay.
    pub stay: Stay,
    /// Whether the last event brings a lease, so that the model cannot go before the caller uses it. Only for
    /// those who read their events at once: an unread lease keeps the model.
    pub wants_lease: bool,
    /// Receiver of events; closing it ends the wish.
    pub events: mpsc::Sender<LoadEvent>,
}

impl LoadWork {
    /// Returns the wish for a model, whose stay is as configured.
    #[must_use]
    pub fn new(spec: LoadSpec, events: mpsc::Sender<LoadEvent>) -> Self {
        Self { spec, stay: Stay::default(), wants_lease: false, events }
    }
}
