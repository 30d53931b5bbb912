//! A score: collects the logprobs of given tokens and answers once.

use tokio::sync::oneshot;

use crate::backend::TokenLogprobs;
use crate::engine::api::{Finish, ScoreWork, Scored, WorkOrigin};
use crate::error::Error;
use crate::prompt::Prompt;
use crate::residency::ModelLease;

/// Most positions of a score that one step takes: each costs a row of logits.
pub(super) const SPAN_MAX: u32 = 128;

#[derive(Debug)]
pub(super) struct Scoring {
    /// First token that is scored.
    pub(super) from: u32,
    /// Alternatives to return per token.
    pub(super) top: u32,
    /// Tokens found in a cache.
    pub(super) cached: u32,
    /// Entries so far.
    pub(super) scores: Vec<Option<TokenLogprobs>>,
    reply: oneshot::Sender<Result<Scored, Error>>,
}

impl Scoring {
    /// Splits a work into whose it is, its lease, its prompt, and what is to come of it.
    pub(super) fn new(work: ScoreWork) -> (WorkOrigin, ModelLease, Prompt, Self) {
        // The engine has read the stay already.
        let ScoreWork { origin, model, prompt, score_from: from, top_logprobs: top, keep_alive: _, reply } =
            work;
        // Nothing comes before a text's first token that could say how likely it is.
        let scores = if from == 0 { vec![None] } else { vec![] };
        (origin, model, prompt, Self { from, top, cached: 0, scores, reply })
    }

    /// Returns whether its caller is gone.
    pub(super) fn is_abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    /// Answers.
    pub(super) fn end(self, outcome: Result<Finish, Error>) {
        let Self { scores, cached, reply, .. } = self;
        let _ = reply.send(outcome.map(|_| Scored { scores, cached_tokens: cached }));
    }
}
