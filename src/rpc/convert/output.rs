//! Answers: times, log-probabilities, reasons to end.

use std::time::{Duration, SystemTime};

use crate::engine::{Finish, TokenLogprobs};
use crate::rpc::pb;
use crate::text::Tokenizer;

pub(in crate::rpc) fn duration(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

pub(in crate::rpc) fn timestamp(time: SystemTime) -> Option<prost_types::Timestamp> {
    Some(time.into())
}

pub(in crate::rpc) fn token_logprob(tokenizer: &Tokenizer, (id, logprob): (u32, f32)) -> pb::TokenLogprob {
    pb::TokenLogprob { token_id: id, logprob, token_bytes: tokenizer.token_bytes(id) }
}

pub(in crate::rpc) fn token_logprobs(tokenizer: &Tokenizer, token: &TokenLogprobs) -> pb::TokenLogprobs {
    pb::TokenLogprobs {
        chosen: Some(token_logprob(tokenizer, token.chosen)),
        top: token.top.iter().map(|pair| token_logprob(tokenizer, *pair)).collect(),
    }
}

/// The reason, and the stop string that was met.
pub(in crate::rpc) fn finish(finish: Finish, stop_strings: &[String]) -> (pb::FinishReason, String) {
    match finish {
        Finish::StopToken => (pb::FinishReason::Stop, String::new()),
        Finish::Length => (pb::FinishReason::Length, String::new()),
        Finish::StopString(index) => {
            (pb::FinishReason::StopString, stop_strings.get(index).cloned().unwrap_or_default())
        }
    }
}
