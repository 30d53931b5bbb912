//! A generation: takes drawn tokens, makes text of them, and finds its end (stop tokens, stop strings,
//! lengths). Talks to its receiver without ever waiting for it: deltas that do not fit the channel coalesce
//! here. The first choice of several has the others with it until the prompt is computed.

use tokio::sync::mpsc;

use super::guide::Guide;
use super::reading::Reader;
use super::sampling::Edits;
use crate::backend::TokenLogprobs;
use crate::clock::Moment;
use crate::engine::api::{
    Delta, Finish, GenerateEvent, GenerateWork, Generated, Sampling, Stopping, WorkOrigin,
};
use crate::error::Error;
use crate::prompt::Prompt;
use crate::residency::ModelLease;
use crate::text::{Detokenizer, StopMatcher, Tokenizer};

/// Tokens of output that pile up for a caller who does not read before its sequence pauses.
const COALESCED_TOKENS_MAX: usize = 256;

#[derive(Debug)]
pub(super) struct Generation {
    pub(super) sampling: Sampling,
    pub(super) edits: Edits,
    pub(super) stopping: Stopping,
    pub(super) top_logprobs: Option<u32>,
    /// Its way through its grammar.
    pub(super) guide: Option<Guide>,
    pub(super) tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    pub(super) reader: Reader,
    /// Output that was not sent yet.
    pending: Delta,
    /// Times of the first token and of the last one.
    times: Option<(Moment, Moment)>,
    /// Whether its caller was told that it runs.
    started: bool,
    /// Time since when its caller has no room for the output.
    stalled: Option<Moment>,
    events: mpsc::Sender<GenerateEvent>,
    /// Whether it is the only choice, or the first.
    pub(super) is_first: bool,
    /// The other choices, until the prompt is computed.
    pub(super) others: Vec<Generation>,
    /// Reserved places in the channel for the last delta and the end.
    last: Option<(mpsc::OwnedPermit<GenerateEvent>, mpsc::OwnedPermit<GenerateEvent>)>,
}

impl Generation {
    /// Splits a work into whose it is, its lease, its prompt, and what is to come of it.
    pub(super) fn new(work: GenerateWork) -> (WorkOrigin, ModelLease, Prompt, Self) {
        let GenerateWork { origin, model, prompt, sampling, stopping, top_logprobs, tokenizer, .. } = work;
        let GenerateWork { constraint, detokenizer, reading, events, others, .. } = work;
        let edits = Edits::new(&sampling, &tokenizer);
        let choice = |(index, events): (u64, mpsc::Sender<GenerateEvent>)| {
            let reserve = || events.clone().try_reserve_owned().ok();
            Self {
                reader: Reader::new(reading.clone(), StopMatcher::new(stopping.stop_strings.clone())),
                edits: edits.clone(),
                sampling: Sampling { seed: sampling.seed.wrapping_add(index), ..sampling.clone() },
                stopping: stopping.clone(),
                top_logprobs,
                guide: constraint.clone().map(Guide::new),
                tokenizer: tokenizer.clone(),
                detokenizer: detokenizer.clone(),
                pending: Delta::default(),
                times: None,
                started: index > 0,
                stalled: None,
                is_first: index == 0,
                others: Vec::new(),
                last: reserve().zip(reserve()),
                events,
            }
        };
        let others = (1..).zip(others).map(choice).collect();
        (origin, model, prompt, Self { others, ..choice((0, events)) })
    }

    /// Returns the other choices, which go on from where the changes to logits are now.
    pub(super) fn take_others(&mut self) -> Vec<Self> {
        let mut others = std::mem::take(&mut self.others);
        others.iter_mut().for_each(|other| other.edits = self.edits.clone());
        others
    }

    /// Returns whether its caller is gone.
    pub(super) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Returns since when its caller has not read.
    pub(super) fn stalled(&self) -> Option<Moment> {
        self.stalled
    }

    /// Returns whether enough output has piled up to wait for its caller.
    pub(super) fn is_paused(&self) -> bool {
        self.pending.tokens.len() >= COALESCED_TOKENS_MAX
    }

    /// Returns whether its caller was told that it runs.
    pub(super) fn has_begun(&self) -> bool {
        self.started
    }

    /// Returns whether it has no output yet.
    pub(super) fn is_prefilling(&self) -> bool {
        self.times.is_none()
    }

    /// Says that it runs after `queue_time`, with `cached_tokens` found in a cache. Returns false if it ran
    /// before.
    pub(super) fn start(&mut self, cached_tokens: u32, queue_time: std::time::Duration) -> bool {
        if self.started {
            return false;
        }
        self.started = true;
        let _ = self.events.try_send(GenerateEvent::Started { cached_tokens, queue_time });
        true
    }

    /// Says how much of the context is done, unless output has come already: that is computed anew.
    pub(super) fn progress(&self, done_tokens: u32) {
        if self.times.is_none() {
            let _ = self.events.try_send(GenerateEvent::Progress { done_tokens });
        }
    }

    /// Takes a drawn token, the `generated`th. Returns the reason if the generation is at its end.
    pub(super) fn take(
        &mut self,
        token: u32,
        logprobs: Option<TokenLogprobs>,
        generated: u32,
        now: Moment,
    ) -> Option<Finish> {
        self.times = Some(self.times.map_or((now, now), |(first, _)| (first, now)));
        self.pending.tokens.push(token);
        self.pending.logprobs.extend(logprobs);
        // A form of reasoning may be closed with a token that ends outputs.
        let is_forced = self.reader.forced() == Some(token);
        if !is_forced && self.stopping.stop_token_ids.contains(&token) {
            return Some(self.finish_text(Finish::StopToken));
        }
        let text = self.detokenizer.push(token);
        if let Some(stop) = self.reader.push(&text, &mut self.pending) {
            return Some(stop);
        }
        (generated >= self.stopping.max_tokens).then(|| self.finish_text(Finish::Length))
    }

    /// Ends at a text that is whole by its grammar.
    pub(super) fn complete(&mut self) -> Finish {
        self.finish_text(Finish::Complete)
    }

    /// Releases what detokenizer and reader hold back at an end, which may turn out to be another one.
    fn finish_text(&mut self, end: Finish) -> Finish {
        let text = self.detokenizer.finish();
        self.reader.finish(&text, end == Finish::Length, &mut self.pending).unwrap_or(end)
    }

    /// Sends new output, if the channel has room.
    pub(super) fn flush(&mut self, now: Moment) {
        if self.pending == Delta::default() {
            return;
        }
        match self.events.try_reserve() {
            Ok(permit) => {
                permit.send(GenerateEvent::Delta(std::mem::take(&mut self.pending)));
                self.stalled = None;
            }
            Err(_) => self.stalled = self.stalled.or(Some(now)),
        }
    }

    /// Sends the last delta and the end, with all generated tokens. Choices that it still has end with it.
    pub(super) fn end(
        mut self,
        outcome: Result<Finish, Error>,
        tokens: Vec<u32>,
        arrived: Moment,
        now: Moment,
    ) {
        for other in std::mem::take(&mut self.others) {
            other.end(outcome.clone(), Vec::new(), arrived, now);
        }
        let Some((delta, end)) = self.last.take() else { return };
        if self.pending != Delta::default() {
            delta.send(GenerateEvent::Delta(self.pending));
        }
        let (first, last) = self.times.unwrap_or((now, now));
        let generated = outcome.map(|finish| Generated {
            finish,
            tokens,
            reasoning_tokens: self.reader.reasoning_tokens,
            time_to_first_token: first - arrived,
            decode_time: last - first,
            total_time: now - arrived,
        });
        end.send(GenerateEvent::Ended(generated));
    }
}
