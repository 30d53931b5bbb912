//! Counts since the engine's start. The engine writes each in one place, the edge translates the whole
//! struct.

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
    /// Loads that were begun.
    pub loads_total: u64,
    /// Models evicted for another, or because the budget shrank.
    pub evictions_total: u64,
    /// Models unloaded because nobody had used them for their time.
    pub expirations_total: u64,
    /// Evicted caches that were worth saving and were not, because too many waited to be written.
    pub snapshots_dropped_total: u64,
}

impl Counters {
    /// Counts a span that was run: `prefilled` tokens of a prompt, and `drawn` new ones.
    pub(crate) fn committed(&mut self, prefilled: u32, drawn: u32) {
        self.prefill_tokens_total += u64::from(prefilled);
        self.decode_tokens_total += u64::from(drawn);
    }

    /// Counts the end of a request.
    pub(crate) fn ended<T>(&mut self, outcome: &Result<T, Error>) {
        match outcome {
            Ok(_) => self.finished_total += 1,
            Err(Error::Cancelled(_) | Error::Deadline) => self.cancelled_total += 1,
            Err(
                Error::QueueFull { .. }
                | Error::KvTooLarge { .. }
                | Error::KvShortage { .. }
                | Error::KvCrowded { .. }
                | Error::DeadlineUnmeetable { .. }
                | Error::Draining,
            ) => self.refused_total += 1,
            Err(_) => self.failed_total += 1,
        }
    }
}
