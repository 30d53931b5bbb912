//! One request in the engine: its tokens, how much of them is in a KV cache, and what its output is so
//! far. Commits a step's result (text, stop strings, lengths) and talks to the request's receiver without
//! ever waiting for it: deltas that do not fit the channel coalesce here.

use tokio::sync::{mpsc, oneshot};

use super::sampling::sample_at;
use super::work::{
    Delta, Finish, GenerateEvent, GenerateWork, Generated, Sampling, ScoreWork, Scored, Stopping, WorkOrigin,
};
use crate::backend::{CHECKPOINTS_MAX, SlotId, SpanOutput, SpanResult, TokenLogprobs};
use crate::clock::Moment;
use crate::error::Error;
use crate::text::{Detokenizer, StopMatcher, Tokenizer};

/// Tokens of output that pile up for a caller who does not read before its sequence pauses.
const COALESCED_TOKENS_MAX: usize = 256;

/// Tokens between two checkpoints, and before the first: fewer are not worth the memory.
const CHECKPOINT_DISTANCE: usize = 8;

/// Positions of a score that one step takes: each costs a row of logits.
const SCORE_SPAN_MAX: u32 = 128;

/// A request and its state.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) origin: WorkOrigin,
    /// All tokens known so far.
    pub(super) tokens: Vec<u32>,
    /// How many of them are in the KV cache.
    pub(super) computed: u32,
    /// Where that is; set while it runs.
    pub(super) slot: Option<SlotId>,
    /// Its priority class since it was admitted.
    pub(super) class: u32,
    /// Lengths at which its states were kept.
    pub(super) checkpoints: Vec<u32>,
    /// Lengths at which they are to be kept.
    borders: Vec<u32>,
    output: Output,
}

#[derive(Debug)]
enum Output {
    Generate(Box<Generation>),
    Score(Box<Scoring>),
}

#[derive(Debug)]
struct Generation {
    prompt_tokens: usize,
    sampling: Sampling,
    stopping: Stopping,
    top_logprobs: Option<u32>,
    detokenizer: Detokenizer,
    tokenizer: Tokenizer,
    stops: StopMatcher,
    /// Output that was not sent yet.
    pending: Delta,
    /// When the first token came, and the last one.
    times: Option<(Moment, Moment)>,
    /// Its caller was told that it runs.
    started: bool,
    /// Since when its caller has no room for the output.
    stalled: Option<Moment>,
    events: mpsc::Sender<GenerateEvent>,
    /// Room kept in the channel for the last delta and the end.
    last: Option<(mpsc::OwnedPermit<GenerateEvent>, mpsc::OwnedPermit<GenerateEvent>)>,
}

#[derive(Debug)]
struct Scoring {
    from: u32,
    top: u32,
    cached: u32,
    scores: Vec<Option<TokenLogprobs>>,
    reply: oneshot::Sender<Result<Scored, Error>>,
}

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

impl Sequence {
    pub(super) fn generate(work: GenerateWork) -> Self {
        let reserve = || work.events.clone().try_reserve_owned().ok();
        let generation = Generation {
            prompt_tokens: work.prompt.len(),
            stops: StopMatcher::new(work.stopping.stop_strings.clone()),
            sampling: work.sampling,
            stopping: work.stopping,
            top_logprobs: work.top_logprobs,
            detokenizer: work.tokenizer.detokenizer(),
            tokenizer: work.tokenizer,
            pending: Delta::default(),
            times: None,
            started: false,
            stalled: None,
            last: reserve().zip(reserve()),
            events: work.events,
        };
        let output = Output::Generate(Box::new(generation));
        Self::new(work.origin, work.prompt.tokens.to_vec(), output)
    }

    pub(super) fn score(work: ScoreWork) -> Self {
        let first = work.score_from == 0;
        let scoring = Scoring {
            from: work.score_from,
            top: work.top_logprobs,
            cached: 0,
            scores: if first { vec![None] } else { vec![] },
            reply: work.reply,
        };
        let output = Output::Score(Box::new(scoring));
        Self::new(work.origin, work.prompt.tokens.to_vec(), output)
    }

    fn new(origin: WorkOrigin, tokens: Vec<u32>, output: Output) -> Self {
        let (checkpoints, borders) = (Vec::new(), Vec::new());
        Self { origin, tokens, computed: 0, slot: None, class: 0, checkpoints, borders, output }
    }

    /// Chooses where its states are to be kept: before control tokens of the prompt, where messages begin and end. The
    /// first such place is after what all conversations share; the last ones are where its next turn may part
    /// from this one.
    pub(super) fn plan_checkpoints(&mut self) {
        let Output::Generate(generation) = &self.output else { return };
        let control = |&at: &usize| generation.tokenizer.is_control(self.tokens[at]);
        let prompt = generation.prompt_tokens.min(self.tokens.len());
        let places: Vec<u32> = (CHECKPOINT_DISTANCE..prompt).filter(control).map(count).collect();
        let mut kept: Vec<u32> = Vec::new();
        for &place in places.iter().rev() {
            let far = kept.last().is_none_or(|&last| last - place >= count(CHECKPOINT_DISTANCE));
            if far && kept.len() + 1 < CHECKPOINTS_MAX {
                kept.push(place);
            }
        }
        kept.extend(places.first());
        kept.sort_unstable();
        kept.dedup();
        self.borders = kept;
    }

    /// Whether its states are to be kept now.
    pub(super) fn is_at_checkpoint(&self) -> bool {
        self.borders.contains(&self.computed)
            && self.checkpoints.last().is_none_or(|&last| last < self.computed)
    }

    /// The lengths at which its states are kept once it is parked.
    pub(super) fn all_checkpoints(&self) -> Vec<u32> {
        let end = Some(self.computed).filter(|end| self.checkpoints.last() != Some(end));
        self.checkpoints.iter().copied().chain(end).collect()
    }

    /// Whether its caller is gone.
    pub(super) fn is_abandoned(&self) -> bool {
        match &self.output {
            Output::Generate(generation) => generation.events.is_closed(),
            Output::Score(scoring) => scoring.reply.is_closed(),
        }
    }

    /// Since when its caller has not read.
    pub(super) fn stalled(&self) -> Option<Moment> {
        match &self.output {
            Output::Generate(generation) => generation.stalled,
            Output::Score(_) => None,
        }
    }

    /// Whether it waits for its caller to read: enough output has piled up.
    pub(super) fn is_paused(&self) -> bool {
        match &self.output {
            Output::Generate(generation) => generation.pending.tokens.len() >= COALESCED_TOKENS_MAX,
            Output::Score(_) => false,
        }
    }

    /// Whether it runs its prompt, not its output.
    pub(super) fn is_prefilling(&self) -> bool {
        match &self.output {
            Output::Generate(generation) => generation.times.is_none(),
            Output::Score(_) => true,
        }
    }

    /// Tokens known but not in the KV cache.
    pub(super) fn pending(&self) -> u32 {
        count(self.tokens.len()) - self.computed
    }

    /// The most tokens it can come to.
    pub(super) fn tokens_max(&self) -> u32 {
        match &self.output {
            Output::Generate(generation) => {
                count(generation.prompt_tokens).saturating_add(generation.stopping.max_tokens)
            }
            Output::Score(_) => count(self.tokens.len()),
        }
    }

    /// Tokens that a cache can save it at most: at least one token has to run, and for a score everything from the one
    /// before the first scored.
    pub(super) fn reusable_max(&self) -> u32 {
        let end = match &self.output {
            Output::Generate(_) => count(self.tokens.len()),
            Output::Score(scoring) => scoring.from.max(1),
        };
        end - 1
    }

    /// Whether what it computed is worth keeping for a later request.
    pub(super) fn leaves_cache(&self) -> bool {
        matches!(self.output, Output::Generate(_))
    }

    /// Most tokens of it that one step takes.
    pub(super) fn span_max(&self) -> u32 {
        let border = self.borders.iter().find(|&&border| border > self.computed);
        let left = border.map_or(u32::MAX, |border| border - self.computed);
        match &self.output {
            Output::Generate(_) => left,
            Output::Score(_) => SCORE_SPAN_MAX,
        }
    }

    /// What is wanted of the span of the next `tokens` tokens.
    pub(super) fn span_output(&self, tokens: u32) -> SpanOutput {
        let end = self.computed + tokens;
        match &self.output {
            Output::Generate(_) if (end as usize) < self.tokens.len() => SpanOutput::None,
            Output::Generate(generation) => SpanOutput::Sample(Box::new(sample_at(
                &generation.sampling,
                generation.top_logprobs,
                &self.tokens,
            ))),
            Output::Score(scoring) => {
                // The logits at position p are about the token at p + 1.
                let from = self.computed.max(scoring.from.saturating_sub(1));
                let to = (end as usize + 1).min(self.tokens.len());
                let next = self.tokens.get(from as usize + 1..to).unwrap_or_default().to_vec();
                if next.is_empty() {
                    return SpanOutput::None;
                }
                SpanOutput::Score { first: from - self.computed, next, top: scoring.top }
            }
        }
    }

    /// Says that it runs now, with so many tokens found in a cache. False if it ran before.
    pub(super) fn start(&mut self, cached: u32, now: Moment) -> bool {
        match &mut self.output {
            Output::Generate(generation) if generation.started => return false,
            Output::Generate(generation) => {
                generation.started = true;
                let queue_time = now - self.origin.arrived;
                let _ =
                    generation.events.try_send(GenerateEvent::Started { cached_tokens: cached, queue_time });
            }
            Output::Score(scoring) => scoring.cached = cached,
        }
        true
    }

    /// Takes the result of the span of `tokens` tokens. Some if the sequence is at its end.
    pub(super) fn commit(
        &mut self,
        tokens: u32,
        result: SpanResult,
        now: Moment,
    ) -> Option<Result<Finish, Error>> {
        self.computed += tokens;
        match (&mut self.output, result) {
            (_, SpanResult::NotFinite) => return Some(Err(Error::NonFiniteLogits)),
            (Output::Generate(generation), SpanResult::Token(token, logprobs)) => {
                self.tokens.push(token);
                let generated = self.tokens.len() - generation.prompt_tokens;
                return generation.take(token, logprobs, count(generated), now).map(Ok);
            }
            (Output::Generate(generation), _) => {
                let _ = generation.events.try_send(GenerateEvent::Progress { done_tokens: self.computed });
            }
            (Output::Score(scoring), SpanResult::Scores(scores)) => {
                scoring.scores.extend(scores.into_iter().map(Some));
            }
            (Output::Score(_), _) => {}
        }
        let scored = matches!(self.output, Output::Score(_)) && self.pending() == 0;
        scored.then_some(Ok(Finish::Length))
    }

    /// Sends what there is to send, if the channel has room.
    pub(super) fn flush(&mut self, now: Moment) {
        if let Output::Generate(generation) = &mut self.output {
            generation.flush(now);
        }
    }

    /// Says the last word.
    pub(super) fn end(self, outcome: Result<Finish, Error>, now: Moment) {
        match self.output {
            Output::Generate(generation) => generation.end(outcome, &self.tokens, self.origin.arrived, now),
            Output::Score(scoring) => {
                let Scoring { scores, cached, reply, .. } = *scoring;
                let _ = reply.send(outcome.map(|_| Scored { scores, cached_tokens: cached }));
            }
        }
    }
}

impl Generation {
    fn take(
        &mut self,
        token: u32,
        logprobs: Option<TokenLogprobs>,
        generated: u32,
        now: Moment,
    ) -> Option<Finish> {
        self.times = Some(self.times.map_or((now, now), |(first, _)| (first, now)));
        self.pending.tokens.push(token);
        self.pending.logprobs.extend(logprobs);
        if self.stopping.stop_token_ids.contains(&token) {
            return Some(self.finish_text().unwrap_or(Finish::StopToken));
        }
        let text = self.detokenizer.push(token);
        if let Some(stop) = self.push_text(&text) {
            return Some(stop);
        }
        (generated >= self.stopping.max_tokens).then(|| self.finish_text().unwrap_or(Finish::Length))
    }

    fn push_text(&mut self, text: &str) -> Option<Finish> {
        let step = self.stops.push(text);
        self.pending.text.push_str(&step.emit);
        step.matched.map(Finish::StopString)
    }

    /// Releases what detokenizer and stop matcher hold back; a stop string may still turn up in it.
    fn finish_text(&mut self) -> Option<Finish> {
        let text = self.detokenizer.finish();
        let stop = self.push_text(&text);
        if stop.is_none() {
            self.pending.text.push_str(&self.stops.finish());
        }
        stop
    }

    fn flush(&mut self, now: Moment) {
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

    fn end(mut self, outcome: Result<Finish, Error>, tokens: &[u32], arrived: Moment, now: Moment) {
        let Some((delta, end)) = self.last.take() else { return };
        if self.pending != Delta::default() {
            delta.send(GenerateEvent::Delta(self.pending));
        }
        let (first, last) = self.times.unwrap_or((now, now));
        let generated = outcome.map(|finish| Generated {
            finish,
            tokens: tokens[self.prompt_tokens..].to_vec(),
            time_to_first_token: first - arrived,
            decode_time: last - first,
            total_time: now - arrived,
        });
        end.send(GenerateEvent::Ended(generated));
    }
}
