//! The events of a generation and the parts of answers, as every edge translates them.

use std::time::Duration;

use super::sampling::EffectiveSampling;
use crate::engine::Finish;
use crate::ids::RequestId;
use crate::session::HistoryOutcome;
use crate::text::Tokenizer;

/// An event of a generation: one `Started`, any number of `Progress`, then of `Delta`, one `Finished`. Of
/// several choices each ends with `ChoiceFinished` before that.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request was admitted.
    Started(Started),
    /// The prompt is being prefilled.
    Progress {
        /// Prompt tokens done, cached ones included.
        done_tokens: u32,
        /// Prompt tokens in all.
        total_tokens: u32,
    },
    /// New output.
    Delta(OutputDelta),
    /// One of several choices ended.
    ChoiceFinished(ChoiceFinished),
    /// The end; a session's turn waits to be committed.
    Finished(Finished),
}

/// Facts of a request that was admitted.
#[derive(Clone, Debug, PartialEq)]
pub struct Started {
    /// Identifies the request in the log.
    pub request: RequestId,
    /// Identifies the weights that answer.
    pub model_revision: String,
    /// Tokens of the context before the first generated one.
    pub prompt_tokens: u32,
    /// Those of `prompt_tokens` that were found in a KV cache.
    pub cached_tokens: u32,
    /// Time from arrival to admission.
    pub queue_time: Duration,
    /// Sampling values in force.
    pub sampling: EffectiveSampling,
    /// What became of the session's tokens; None if there were none.
    pub history: Option<HistoryOutcome>,
}

/// A piece of output.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OutputDelta {
    /// Number of its choice, from 0 on.
    pub choice: u32,
    /// Whole characters, without reasoning and tool calls.
    pub text: String,
    /// Reasoning, the same way.
    pub reasoning: String,
    /// Parts of tool calls, in order.
    pub calls: Vec<CallPart>,
    /// New tokens, if asked for.
    pub token_ids: Vec<u32>,
    /// One entry per new token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
}

/// A part of a tool call. One that never ends was cut off, or turned out to be text: it is none.
#[derive(Clone, Debug, PartialEq)]
pub enum CallPart {
    /// It begins; what came of an earlier one of this number that did not end is void.
    Begin {
        /// Its number in the output, from 0.
        index: u32,
        /// Identifies it within the conversation.
        id: String,
        /// The function's name.
        name: String,
    },
    /// More of its arguments' JSON.
    Arguments {
        /// Its number.
        index: u32,
        /// The next characters.
        fragment: String,
    },
    /// It is whole: its arguments are a JSON object.
    End {
        /// Its number.
        index: u32,
    },
}

impl CallPart {
    fn bytes(&self) -> usize {
        let text = match self {
            Self::Begin { index: _, id, name } => id.len() + name.len(),
            Self::Arguments { index: _, fragment } => fragment.len(),
            Self::End { index: _ } => 0,
        };
        size_of::<Self>() + text
    }
}

impl OutputDelta {
    /// Adds what follows it.
    pub(super) fn append(&mut self, next: Self) {
        let Self { choice: _, text, reasoning, calls, token_ids, logprobs } = next;
        self.text.push_str(&text);
        self.reasoning.push_str(&reasoning);
        self.calls.extend(calls);
        self.token_ids.extend(token_ids);
        self.logprobs.extend(logprobs);
    }

    /// Returns about the bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        let tokens = |list: &[TokenLogprob]| {
            list.iter().map(|token| size_of::<TokenLogprob>() + token.bytes.len()).sum::<usize>()
        };
        let logprobs = self.logprobs.iter().map(|of| size_of::<TokenLogprobs>() + tokens(&of.top));
        let calls = self.calls.iter().map(CallPart::bytes).sum::<usize>();
        self.text.len()
            + self.reasoning.len()
            + calls
            + size_of_val(self.token_ids.as_slice())
            + logprobs.sum::<usize>()
    }
}

/// Facts of a choice that ended well.
#[derive(Clone, Debug, PartialEq)]
pub struct ChoiceFinished {
    /// Its number, from 0 on.
    pub choice: u32,
    /// Reason of the end.
    pub finish: Finish,
    /// The stop string that was met; empty for other reasons.
    pub stop_string: String,
    /// Generated tokens, the ending one included.
    pub completion_tokens: u32,
    /// The seed with which it comes alone.
    pub seed: u64,
    /// Mean log-probability of its tokens, where log-probabilities were asked for or decided.
    pub mean_logprob: Option<f32>,
}

/// Facts of a generation that ended well. Of several choices the first says how it ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Reason of the end.
    pub finish: Finish,
    /// The stop string that was met; empty for other reasons.
    pub stop_string: String,
    /// Token counts.
    pub usage: Usage,
    /// Time from arrival to admission.
    pub queue_time: Duration,
    /// Time from arrival to the first generated token.
    pub time_to_first_token: Duration,
    /// Time from the first generated token to the last.
    pub decode_time: Duration,
    /// Time from arrival to the end.
    pub total_time: Duration,
    /// The session's token count after this turn; none without a session.
    pub session_token_count: Option<u32>,
}

/// Token counts of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the context before the first generated one.
    pub prompt_tokens: u32,
    /// Those of `prompt_tokens` that were found in a KV cache.
    pub cached_tokens: u32,
    /// Generated tokens, the ending one included.
    pub completion_tokens: u32,
    /// Those of them that are reasoning.
    pub reasoning_tokens: u32,
}

/// A token and its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The bytes it stands for; not always whole UTF-8 characters.
    pub bytes: Vec<u8>,
}

/// The log-probability of an output token and of its most likely alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token that was chosen.
    pub chosen: TokenLogprob,
    /// Most likely tokens, best first.
    pub top: Vec<TokenLogprob>,
}

/// The score of one given token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// The token; its `logprob` is 0 where there is none.
    pub token: TokenLogprob,
    /// Whether anything came before the token, so that it has a log-probability.
    pub has_logprob: bool,
    /// Most likely tokens at this position, best first.
    pub top: Vec<TokenLogprob>,
}

impl TokenLogprob {
    /// Adds the token's bytes to an engine's pair of id and log-probability.
    pub(super) fn new(tokenizer: &Tokenizer, (id, logprob): (u32, f32)) -> Self {
        Self { id, logprob, bytes: tokenizer.token_bytes(id) }
    }

    /// Adds the bytes of each token.
    pub(super) fn list(tokenizer: &Tokenizer, pairs: &[(u32, f32)]) -> Vec<Self> {
        pairs.iter().map(|pair| Self::new(tokenizer, *pair)).collect()
    }
}
