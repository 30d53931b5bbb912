//! Counts since the engine's start. The engine writes each in one place, the edge translates the whole struct.

use super::Finish;
use crate::backend::SpanResult;
use crate::error::Error;

/// Counts since the engine's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Generations and scores that reached the engine.
    pub requests_total: u64,
    /// Requests that ended well.
    pub finished_total: u64,
    /// Requests whose caller went away or whose deadline passed.
    pub cancelled_total: u64,
    /// Requests that failed otherwise.
    pub failed_total: u64,
    /// Requests that were refused at admission.
    pub refused_total: u64,
    /// Running sequences that were preempted.
    pub preemptions_total: u64,
    /// Tokens prefilled.
    pub prefill_tokens_total: u64,
    /// Tokens found in a KV cache.
    pub cached_tokens_total: u64,
    /// Tokens generated.
    pub decode_tokens_total: u64,
    /// Steps launched.
    pub steps_total: u64,
}

impl Counters {
    /// Counts a span of `tokens` tokens that was run. A span of one that drew a token fed an earlier drawn one, or was
    /// the last of a prompt; either way it is counted by what it drew.
    pub(crate) fn committed(&mut self, tokens: u32, result: &SpanResult) {
        let drew = matches!(result, SpanResult::Token(..));
        self.decode_tokens_total += u64::from(drew);
        if tokens > 1 || !drew {
            self.prefill_tokens_total += u64::from(tokens);
        }
    }

    /// Counts the end of a request.
    pub(crate) fn ended(&mut self, outcome: &Result<Finish, Error>) {
        match outcome {
            Ok(_) => self.finished_total += 1,
            Err(Error::Cancelled(_) | Error::Deadline) => self.cancelled_total += 1,
            Err(
                Error::QueueFull { .. }
                | Error::KvTooLarge { .. }
                | Error::DeadlineUnmeetable { .. }
                | Error::Draining,
            ) => self.refused_total += 1,
            Err(_) => self.failed_total += 1,
        }
    }
}
