//! A step as plain data: the spans of many sequences, packed on the token axis, which of their rows return
//! what, and what came of them. A row is one token's place on the token axis; its logits are about the token
//! that comes next.

use std::sync::Arc;

use super::SlotId;

/// One forward pass of one model over the spans of many sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Spans in the order of [`Span::order`].
    pub spans: Vec<Span>,
}

impl Step {
    /// Returns whether some row is drawn only once it is known what it may draw: see `Backend::draw`.
    #[must_use]
    pub fn awaits_masks(&self) -> bool {
        self.spans.iter().flat_map(|span| &span.outputs).any(|output| output.want.awaits_mask())
    }

    /// Says what the rows may draw that wait for it, in their order; None is everything.
    pub(crate) fn mask(&mut self, masks: Vec<Option<TokenSet>>) {
        let mut masks = masks.into_iter();
        for output in self.spans.iter_mut().flat_map(|span| &mut span.outputs) {
            if let Want::Sample(sample @ Sample { allow: Allow::Awaited, .. }) = &mut output.want {
                sample.allow = masks.next().flatten().map_or(Allow::All, Allow::These);
            }
        }
    }
}

/// What a span is for. Steps are planned, counted and learned from by it; how a device lays rows out is its
/// own affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Tokens of a prompt, or of a context that is computed again.
    Prefill,
    /// The one token that was drawn last; a user waits for the next.
    Decode,
    /// The token that was drawn last and a draft of those that follow, each row sampled. What is rejected is
    /// cut off by `Backend::truncate`. Backends run it; the engine drafts nothing yet.
    Verify,
}

/// One sequence's tokens in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Slot of its KV cache.
    pub slot: SlotId,
    /// Position of its first token, which is the length of its cache before the step.
    pub start: u32,
    /// What it is for.
    pub kind: SpanKind,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Rows that return something, ascending; none if more of the prompt follows. A row may return several
    /// tokens, each drawn by itself.
    pub outputs: Vec<RowOutput>,
}

impl Span {
    /// Returns the key of a step's order: spans of one row first, by slot, so that those of a slab stand
    /// together; then the longer ones.
    #[must_use]
    pub fn order(&self) -> (bool, SlotId) {
        (self.tokens.len() > 1, self.slot)
    }
}

/// A row that returns something.
#[derive(Clone, Debug, PartialEq)]
pub struct RowOutput {
    /// Index of the row in its span.
    pub row: u32,
    /// What it returns.
    pub want: Want,
}

/// What a row returns.
#[derive(Clone, Debug, PartialEq)]
pub enum Want {
    /// A token drawn after it.
    Sample(Sample),
    /// The log-probability of the given token after it.
    Score {
        /// The token that comes next.
        next: u32,
        /// Number of alternatives to return.
        top: u32,
    },
}

impl Want {
    /// Returns whether it waits for what may be drawn.
    #[must_use]
    pub fn awaits_mask(&self) -> bool {
        matches!(self, Self::Sample(Sample { allow: Allow::Awaited, .. }))
    }
}

/// A set of tokens: bit `id % 32` of word `id / 32`.
pub type TokenSet = Arc<[u32]>;

/// What a row may draw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Allow {
    /// Every token.
    #[default]
    All,
    /// What `Backend::draw` says, while the step runs.
    Awaited,
    /// One of these, at least one.
    These(TokenSet),
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
    /// Mass of the tokens whose surprisal is nearest to the entropy; 1 is off.
    pub typical_p: f32,
    /// Uniform number in [0, 1) at which the distribution is inverted.
    pub uniform: f32,
    /// Changes to single logits: bias and penalties.
    pub edits: Vec<LogitEdit>,
    /// XTC, if it removes the most likely candidates this time.
    pub xtc: Option<Xtc>,
    /// Number of alternatives to return with the raw logprobs; None returns no logprobs.
    pub top_logprobs: Option<u32>,
    /// The tokens that it is drawn from: the others have no probability before any filter.
    pub allow: Allow,
}

impl Default for Sample {
    /// Draws the most likely token.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            uniform: 0.0,
            edits: Vec::new(),
            xtc: None,
            top_logprobs: None,
            allow: Allow::All,
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

/// Change of one logit: `l += bias`, then `l = l < 0 ? l * repetition : l / repetition`, then `l -=
/// subtract`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitEdit {
    /// The token.
    pub token: u32,
    /// Logit bias; 0 is none.
    pub bias: f32,
    /// Repetition penalty; 1 is none.
    pub repetition: f32,
    /// Sum of presence and frequency penalties and of DRY's; 0 is none.
    pub subtract: f32,
}

/// What came of a row with an output.
#[derive(Clone, Debug, PartialEq)]
pub enum RowResult {
    /// The drawn token, with logprobs if asked for.
    Token(u32, Option<TokenLogprobs>),
    /// The logprobs of the given token.
    Score(TokenLogprobs),
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
