//! A step as plain data: the spans of many sequences, packed on the token axis, what each is to return, and what came
//! of it.

use std::sync::Arc;

use super::SlotId;

/// One forward pass of one model over the spans of many sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Spans of one token first, in the order of their slots; then the longer ones.
    pub spans: Vec<Span>,
}

/// One sequence's tokens in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Slot of its KV cache.
    pub slot: SlotId,
    /// Position of its first token, which is the length of its cache before the step.
    pub start: u32,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Results to return for it.
    pub output: SpanOutput,
}

/// What a step returns for a span.
#[derive(Clone, Debug, PartialEq)]
pub enum SpanOutput {
    /// Nothing: more of the prompt follows.
    None,
    /// A token after the span's last one.
    Sample(Box<Sample>),
    /// The log-probability of given tokens after the span's positions from `first` on.
    Score {
        /// The first position in the span with a next token to score.
        first: u32,
        /// The tokens that come next, one for each position from `first`; not empty.
        next: Vec<u32>,
        /// Number of alternatives to return per token.
        top: u32,
    },
}

/// How one token is drawn; see `Sampling` for the values.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass; 1 is off.
    pub top_p: f32,
    /// Number of most likely tokens to draw from; 0 is off.
    pub top_k: u32,
    /// Least probability relative to the most likely token's; 0 is off.
    pub min_p: f32,
    /// Uniform number in [0, 1) at which the distribution is inverted.
    pub uniform: f32,
    /// Changes to single logits: bias and penalties.
    pub edits: Vec<LogitEdit>,
    /// XTC, if it removes the most likely candidates this time.
    pub xtc: Option<Xtc>,
    /// Number of alternatives to return with the raw logprobs; None returns no logprobs.
    pub top_logprobs: Option<u32>,
}

impl Default for Sample {
    /// Draws the most likely token.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            uniform: 0.0,
            edits: Vec::new(),
            xtc: None,
            top_logprobs: None,
        }
    }
}

/// XTC: of all candidates with probability ≥ `threshold`, keeps only the least likely.
#[derive(Clone, Debug, PartialEq)]
pub struct Xtc {
    /// Probability, in [0, 0.5].
    pub threshold: f32,
    /// Tokens that are never removed.
    pub spared: Arc<[u32]>,
}

/// Change of one logit: `l += bias`, then `l = l < 0 ? l * repetition : l / repetition`, then `l -= subtract`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitEdit {
    /// The token.
    pub token: u32,
    /// Logit bias; 0 is none.
    pub bias: f32,
    /// Repetition penalty; 1 is none.
    pub repetition: f32,
    /// Sum of presence and frequency penalties; 0 is none.
    pub subtract: f32,
}

/// What came of a span.
#[derive(Clone, Debug, PartialEq)]
pub enum SpanResult {
    /// Nothing was asked for.
    None,
    /// The drawn token, with logprobs if asked for.
    Token(u32, Option<TokenLogprobs>),
    /// One entry for each next token.
    Scores(Vec<TokenLogprobs>),
    /// The logits were not finite; the sequence cannot continue.
    NotFinite,
}

/// Raw log-probabilities of one token and of the most likely ones.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token that was drawn, or that came next, and its logprob.
    pub chosen: (u32, f32),
    /// The most likely tokens and their logprobs, best first.
    pub top: Vec<(u32, f32)>,
}
