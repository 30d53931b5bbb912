//! One request in the engine, whatever it is for: its tokens, how many of them are in a KV cache and where, and what
//! it wants of its next span.

use super::generate::Generation;
use super::sampling::sample_at;
use super::score::{self, Scoring};
use super::{Task, count};
use crate::backend::{CHECKPOINTS_MAX, SlotId, SpanOutput, SpanResult};
use crate::clock::Moment;
use crate::engine::api::{Finish, GenerateWork, ScoreWork, WorkOrigin};
use crate::error::Error;

/// Least tokens between two checkpoints, and before the first: fewer are not worth the memory.
const CHECKPOINT_DISTANCE: usize = 8;

/// A request and its state.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) origin: WorkOrigin,
    /// All tokens known so far.
    pub(crate) tokens: Vec<u32>,
    /// Number of them that are in the KV cache.
    pub(crate) computed: u32,
    /// Slot of the KV cache; set while it runs.
    pub(crate) slot: Option<SlotId>,
    /// Its priority class since it was admitted.
    pub(crate) class: u32,
    /// Lengths at which its states were saved.
    pub(crate) checkpoints: Vec<u32>,
    /// Lengths at which they are to be saved.
    planned: Vec<u32>,
    task: Task,
}

impl Sequence {
    /// Returns a generation that waits.
    pub(crate) fn generate(work: GenerateWork) -> Self {
        let (origin, prompt, generation) = Generation::new(work);
        Self::new(origin, prompt.tokens.to_vec(), Task::Generate(Box::new(generation)))
    }

    /// Returns a score that waits.
    pub(crate) fn score(work: ScoreWork) -> Self {
        let (origin, prompt, scoring) = Scoring::new(work);
        Self::new(origin, prompt.tokens.to_vec(), Task::Score(Box::new(scoring)))
    }

    fn new(origin: WorkOrigin, tokens: Vec<u32>, task: Task) -> Self {
        let (checkpoints, planned) = (Vec::new(), Vec::new());
        Self { origin, tokens, computed: 0, slot: None, class: 0, checkpoints, planned, task }
    }

    /// Chooses where its states are to be saved: before control tokens of the prompt, where messages begin and end. The
    /// first such place is after what all conversations share; the last ones are where its next turn may part
    /// from this one.
    pub(crate) fn plan_checkpoints(&mut self) {
        let Task::Generate(generation) = &self.task else { return };
        let control = |&at: &usize| generation.tokenizer.is_control(self.tokens[at]);
        let prompt = generation.prompt_tokens.min(self.tokens.len());
        let places: Vec<u32> = (CHECKPOINT_DISTANCE..prompt).filter(control).map(count).collect();
        let mut planned: Vec<u32> = Vec::new();
        for &place in places.iter().rev() {
            let far = planned.last().is_none_or(|&last| last - place >= count(CHECKPOINT_DISTANCE));
            if far && planned.len() + 1 < CHECKPOINTS_MAX {
                planned.push(place);
            }
        }
        planned.extend(places.first());
        planned.sort_unstable();
        planned.dedup();
        self.planned = planned;
    }

    /// Returns whether its states are to be saved now.
    pub(crate) fn is_at_checkpoint(&self) -> bool {
        self.planned.contains(&self.computed)
            && self.checkpoints.last().is_none_or(|&last| last < self.computed)
    }

    /// Returns the lengths at which its states are saved once it is parked.
    pub(crate) fn all_checkpoints(&self) -> Vec<u32> {
        let end = Some(self.computed).filter(|end| self.checkpoints.last() != Some(end));
        self.checkpoints.iter().copied().chain(end).collect()
    }

    /// Returns whether its caller is gone.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.task {
            Task::Generate(generation) => generation.is_abandoned(),
            Task::Score(scoring) => scoring.is_abandoned(),
        }
    }

    /// Returns since when its caller has not read.
    pub(crate) fn stalled(&self) -> Option<Moment> {
        match &self.task {
            Task::Generate(generation) => generation.stalled(),
            Task::Score(_) => None,
        }
    }

    /// Returns whether it waits for its caller to read.
    pub(crate) fn is_paused(&self) -> bool {
        match &self.task {
            Task::Generate(generation) => generation.is_paused(),
            Task::Score(_) => false,
        }
    }

    /// Returns whether it runs its prompt, not its output.
    pub(crate) fn is_prefilling(&self) -> bool {
        match &self.task {
            Task::Generate(generation) => generation.is_prefilling(),
            Task::Score(_) => true,
        }
    }

    /// Returns the number of known tokens that are not in the KV cache.
    pub(crate) fn pending(&self) -> u32 {
        count(self.tokens.len()) - self.computed
    }

    /// Returns the most tokens it can come to.
    pub(crate) fn tokens_max(&self) -> u32 {
        match &self.task {
            Task::Generate(generation) => {
                count(generation.prompt_tokens).saturating_add(generation.stopping.max_tokens)
            }
            Task::Score(_) => count(self.tokens.len()),
        }
    }

    /// Returns the most tokens that a cache can save it: at least one token has to run, and for a score everything from
    /// the one before the first scored.
    pub(crate) fn reusable_max(&self) -> u32 {
        let end = match &self.task {
            Task::Generate(_) => count(self.tokens.len()),
            Task::Score(scoring) => scoring.from.max(1),
        };
        end - 1
    }

    /// Returns whether what it computed is worth parking for a later request.
    pub(crate) fn leaves_cache(&self) -> bool {
        match &self.task {
            Task::Generate(_) => true,
            Task::Score(_) => false,
        }
    }

    /// Returns the most tokens of it that one step takes.
    pub(crate) fn span_max(&self) -> u32 {
        match &self.task {
            Task::Generate(_) => {
                let next = self.planned.iter().find(|&&planned| planned > self.computed);
                next.map_or(u32::MAX, |planned| planned - self.computed)
            }
            Task::Score(_) => score::SPAN_MAX,
        }
    }

    /// Returns what is wanted of the span of the next `tokens` tokens.
    pub(crate) fn span_output(&self, tokens: u32) -> SpanOutput {
        let end = self.computed + tokens;
        match &self.task {
            Task::Generate(_) if (end as usize) < self.tokens.len() => SpanOutput::None,
            Task::Generate(generation) => SpanOutput::Sample(Box::new(sample_at(
                &generation.sampling,
                generation.top_logprobs,
                &self.tokens,
            ))),
            Task::Score(scoring) => {
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

    /// Says that it runs now, with `cached` tokens found in a cache. Returns false if it ran before.
    pub(crate) fn start(&mut self, cached: u32, now: Moment) -> bool {
        match &mut self.task {
            Task::Generate(generation) => generation.start(cached, now - self.origin.arrived),
            Task::Score(scoring) => {
                scoring.cached = cached;
                true
            }
        }
    }

    /// Takes the result of the span of `tokens` tokens. Returns the outcome if the sequence is at its end.
    pub(crate) fn commit(
        &mut self,
        tokens: u32,
        result: SpanResult,
        now: Moment,
    ) -> Option<Result<Finish, Error>> {
        self.computed += tokens;
        match (&mut self.task, result) {
            (_, SpanResult::NotFinite) => return Some(Err(Error::NonFiniteLogits)),
            (Task::Generate(generation), SpanResult::Token(token, logprobs)) => {
                self.tokens.push(token);
                let generated = self.tokens.len() - generation.prompt_tokens;
                return generation.take(token, logprobs, count(generated), now).map(Ok);
            }
            (Task::Generate(generation), _) => generation.progress(self.computed),
            (Task::Score(scoring), SpanResult::Scores(scores)) => {
                scoring.scores.extend(scores.into_iter().map(Some));
            }
            (Task::Score(_), _) => {}
        }
        let scored = matches!(self.task, Task::Score(_)) && self.pending() == 0;
        scored.then_some(Ok(Finish::Length))
    }

    /// Sends what there is to send, if the channel has room.
    pub(crate) fn flush(&mut self, now: Moment) {
        if let Task::Generate(generation) = &mut self.task {
            generation.flush(now);
        }
    }

    /// Tells its caller the outcome.
    pub(crate) fn end(self, outcome: Result<Finish, Error>, now: Moment) {
        match self.task {
            Task::Generate(generation) => generation.end(outcome, &self.tokens, self.origin.arrived, now),
            Task::Score(scoring) => scoring.end(outcome),
        }
    }
}
