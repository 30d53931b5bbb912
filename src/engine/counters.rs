//! Counts since the engine's start.

use super::work::Finish;
use crate::backend::SpanResult;
use crate::error::Error;

#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    pub(super) requests_total: u64,
    pub(super) finished_total: u64,
    pub(super) cancelled_total: u64,
    pub(super) failed_total: u64,
    pub(super) refused_total: u64,
    pub(super) preemptions_total: u64,
    pub(super) prefill_tokens_total: u64,
    pub(super) cached_tokens_total: u64,
    pub(super) decode_tokens_total: u64,
    pub(super) steps_total: u64,
}

impl Counters {
    /// A span of so many tokens was run. A span of one that drew a token fed an earlier drawn one, or was
    /// the last of a prompt; either way it is counted by what it drew.
    pub(super) fn committed(&mut self, tokens: u32, result: &SpanResult) {
        let drew = matches!(result, SpanResult::Token(..));
        self.decode_tokens_total += u64::from(drew);
        if tokens > 1 || !drew {
            self.prefill_tokens_total += u64::from(tokens);
        }
    }

    /// A request ended.
    pub(super) fn ended(&mut self, outcome: &Result<Finish, Error>) {
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
