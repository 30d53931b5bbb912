//! One request in the engine, whatever it is for: its tokens, how many of them are in a KV cache and where,
//! and what it wants of its next span.

use std::time::Duration;

use super::Task;
use super::generate::Generation;
use super::guide::{Bounds, Guide, Mask};
use super::reading::Reader;
use super::sampling::{forced, sample_after, without};
use super::score::{self, Scoring};
use crate::backend::{
    Allow, CHECKPOINTS_MAX, LogitEdit, RowOutput, RowResult, Sample, SlotId, Span, SpanKind, Want,
};
use crate::cache::{CacheKey, Salt, Transcript};
use crate::clock::Moment;
use crate::count::count;
use crate::engine::api::{CacheUse, Finish, GenerateWork, Sampling, ScoreWork, WorkOrigin};
use crate::engine::masks::MaskWorkers;
use crate::error::Error;
use crate::prompt::Prompt;
use crate::residency::ModelLease;

/// Least tokens between two checkpoints, and before the first: fewer are not worth the memory.
const CHECKPOINT_DISTANCE: usize = 8;

/// Most tokens between the last place where a message begins or ends and the prompt's own end, at which its
/// states are saved too if there are more: that costs a step of one token.
const UNSAVED_END: usize = 32;

/// A request and its state.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) origin: WorkOrigin,
    /// Holds its model until it ends, whether or not its caller reads.
    pub(crate) lease: ModelLease,
    /// Which caches it may use.
    pub(crate) key: CacheKey,
    /// All tokens known so far.
    pub(crate) transcript: Transcript,
    /// Number of them that are in the KV cache.
    pub(crate) computed: u32,
    /// Slot of the KV cache; set while it runs.
    pub(crate) slot: Option<SlotId>,
    /// Its priority class.
    pub(crate) class: u32,
    /// Time since when it waits, less the time of the steps that prefilled it.
    pub(crate) since: Moment,
    /// Lengths at which its states were saved.
    pub(crate) checkpoints: Vec<u32>,
    /// Lengths at which they are to be saved.
    planned: Vec<u32>,
    task: Task,
}

impl Sequence {
    /// Returns a generation that waits.
    pub(crate) fn generate(work: GenerateWork) -> Self {
        let (origin, lease, prompt, generation) = Generation::new(work);
        Self::new(origin, lease, prompt, Task::Generate(Box::new(generation)))
    }

    /// Returns a score that waits.
    pub(crate) fn score(work: ScoreWork) -> Self {
        let (origin, lease, prompt, scoring) = Scoring::new(work);
        Self::new(origin, lease, prompt, Task::Score(Box::new(scoring)))
    }

    fn new(origin: WorkOrigin, lease: ModelLease, prompt: Prompt, task: Task) -> Self {
        let (checkpoints, planned) = (Vec::new(), Vec::new());
        let salt = match origin.cache {
            CacheUse::Shared(salt) => salt,
            CacheUse::Off => Salt::private(0),
        };
        let key = CacheKey { owner: origin.owner.principal.clone(), salt };
        let (transcript, since) = (Transcript::new(prompt), origin.arrived);
        let (computed, slot, class) = (0, None, 0);
        Self { origin, lease, key, transcript, computed, slot, class, since, checkpoints, planned, task }
    }

    /// Chooses where its states are to be saved: before control tokens of the prompt, where messages begin
    /// and end. The first such place is after what all conversations share; the last ones are where its next
    /// turn may part from this one. And before the last token of a prompt that ends far from one, as raw text
    /// does, so that it is found when it is sent again. None is within a media span.
    pub(crate) fn plan_checkpoints(&mut self) {
        let Task::Generate(generation) = &self.task else { return };
        let prompt = self.transcript.prompt();
        let whole = |&at: &usize| self.transcript.whole(at) == at;
        let between = |&at: &usize| generation.tokenizer.is_control(prompt.tokens[at]) && whole(&at);
        // Only the ends are looked through: a long context has many places.
        let mut places = (CHECKPOINT_DISTANCE..prompt.len()).filter(between);
        let first = places.next();
        let from_end = (CHECKPOINT_DISTANCE..prompt.len()).rev().filter(between);
        let mut others = from_end.take(if first.is_some() { usize::MAX } else { 0 });
        let last = others.next();
        // One token has to run.
        let end = prompt.len().checked_sub(1).filter(|end| end - last.unwrap_or(0) >= UNSAVED_END);
        let end = end.filter(whole);
        let mut planned: Vec<u32> = Vec::new();
        for place in end.into_iter().chain(last).chain(others).map(count) {
            if planned.len() + 1 == CHECKPOINTS_MAX {
                break;
            }
            if planned.last().is_none_or(|&last| last - place >= count(CHECKPOINT_DISTANCE)) {
                planned.push(place);
            }
        }
        planned.extend(first.or(end).map(count));
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

    /// Returns the number of choices that it is: those beside its own wait for its prompt.
    pub(crate) fn choices(&self) -> u32 {
        match &self.task {
            Task::Generate(generation) => 1 + count(generation.others.len()),
            Task::Score(_) => 1,
        }
    }

    /// Returns whether it stands for its request in counts: the other choices do not.
    pub(crate) fn is_first(&self) -> bool {
        match &self.task {
            Task::Generate(generation) => generation.is_first,
            Task::Score(_) => true,
        }
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

    /// Returns whether its caller has had something of it.
    pub(crate) fn has_begun(&self) -> bool {
        match &self.task {
            Task::Generate(generation) => generation.has_begun(),
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

    fn prompt_tokens(&self) -> u32 {
        count(self.transcript.prompt().len())
    }

    /// Returns the number of known tokens that are not in the KV cache.
    pub(crate) fn pending(&self) -> u32 {
        count(self.transcript.len()) - self.computed
    }

    /// Returns the most tokens it can come to.
    pub(crate) fn tokens_max(&self) -> u32 {
        match &self.task {
            Task::Generate(generation) => self.prompt_tokens().saturating_add(generation.stopping.max_tokens),
            Task::Score(_) => self.prompt_tokens(),
        }
    }

    /// Returns the most tokens that it may still draw.
    pub(crate) fn draws_left(&self) -> u32 {
        match &self.task {
            Task::Generate(generation) => {
                generation.stopping.max_tokens.saturating_sub(count(self.transcript.generated().len()))
            }
            Task::Score(_) => 0,
        }
    }

    /// Returns the most tokens that a cache can save it: at least one token has to run, and for a score
    /// everything from the one before the first scored.
    pub(crate) fn reusable_max(&self) -> u32 {
        let end = match &self.task {
            Task::Generate(_) => count(self.transcript.len()),
            Task::Score(scoring) => scoring.from.max(1),
        };
        end - 1
    }

    /// Returns whether only itself may find what it computed: while it is preempted.
    pub(crate) fn is_private(&self) -> bool {
        self.origin.cache == CacheUse::Off
    }

    /// Notes that it runs, with a number above 0 that no other has: what it leaves when it is preempted is
    /// its own from the first time on.
    pub(crate) fn claim_caches(&mut self, number: u64) {
        if self.key.salt == Salt::private(0) {
            self.key.salt = Salt::private(number);
        }
    }

    /// Returns whether what it computed is worth parking for a later request.
    pub(crate) fn leaves_cache(&self) -> bool {
        match &self.task {
            Task::Generate(_) => !self.origin.is_orphaned(),
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

    /// Returns what its next span is for. A context that is computed again is prefilled, whoever wrote it.
    pub(crate) fn span_kind(&self) -> SpanKind {
        match &self.task {
            Task::Generate(_) if self.pending() == 1 && self.computed >= self.prompt_tokens() => {
                SpanKind::Decode
            }
            Task::Generate(_) | Task::Score(_) => SpanKind::Prefill,
        }
    }

    /// Lifts its class by the time that its prompt waits. A context that is computed keeps its class.
    pub(crate) fn age(&mut self, now: Moment, ageing: Duration) {
        if self.span_kind() == SpanKind::Prefill {
            self.class = self.class.min(self.origin.priority.class(self.since, now, ageing));
        }
    }

    /// Notes that it was part of a step that took this time, in which it did not wait.
    pub(crate) fn served(&mut self, took: Duration) {
        self.since = self.since.after(took);
    }

    /// Returns the span of its next `tokens` tokens; None without a slot.
    pub(crate) fn span(&mut self, tokens: u32) -> Option<Span> {
        let range = self.computed as usize..(self.computed + tokens) as usize;
        Some(Span {
            slot: self.slot?,
            start: self.computed,
            kind: self.span_kind(),
            tokens: self.transcript.tokens(range).collect(),
            outputs: self.outputs(tokens),
        })
    }

    /// Returns the rows of the next `tokens` tokens that return something.
    fn outputs(&mut self, tokens: u32) -> Vec<RowOutput> {
        let end = self.computed + tokens;
        match &mut self.task {
            Task::Generate(generation) => {
                let Generation { sampling, edits, top_logprobs, guide, reader, others, .. } =
                    &mut **generation;
                edits.count(&self.transcript, end as usize);
                if (end as usize) < self.transcript.len() {
                    return Vec::new();
                }
                // The choices of a prompt begin alike, and may draw the same tokens at first.
                let bounds = guide.as_ref().map(Guide::bounds);
                // The last choice takes them: usually there is one.
                let edits = std::iter::repeat_n(edits.after(&self.transcript), 1 + others.len());
                let others = others.iter().map(|other| (&other.sampling, &other.reader));
                let draw = |((sampling, reader), edits): ((&Sampling, &Reader), Vec<LogitEdit>)| {
                    let sample = || sample_after(&self.transcript, sampling, edits, *top_logprobs);
                    let sample = match (reader.forced(), bounds) {
                        (Some(token), _) => forced(token, *top_logprobs),
                        (None, Some(Bounds::Barred(barred))) => without(sample(), barred, reader),
                        (None, _) => sample(),
                    };
                    let awaits = matches!(bounds, Some(Bounds::Mask));
                    let sample = Sample { allow: if awaits { Allow::Awaited } else { Allow::All }, ..sample };
                    RowOutput { row: tokens - 1, want: Want::Sample(sample) }
                };
                std::iter::once((&*sampling, &*reader)).chain(others).zip(edits).map(draw).collect()
            }
            Task::Score(scoring) => {
                // The logits at position p are about the token at p + 1.
                let from = self.computed.max(scoring.from.saturating_sub(1));
                let next = self.transcript.tokens(from as usize + 1..end as usize + 1);
                let score = |(row, next)| RowOutput { row, want: Want::Score { next, top: scoring.top } };
                (from - self.computed..).zip(next).map(score).collect()
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

    /// Returns how many of the results of a span are its own: those after them are the first tokens of the
    /// other choices.
    pub(crate) fn own_results(&self, results: usize) -> usize {
        if results == 0 { 0 } else { results - (self.choices() - 1) as usize }
    }

    /// Returns the other choices, once the prompt is computed and each has its first token, with the outcome
    /// of those that end with it. They wait as if they had been preempted after it.
    pub(crate) fn fork(
        &mut self,
        results: impl Iterator<Item = RowResult>,
        now: Moment,
    ) -> Vec<(Self, Option<Result<Finish, Error>>)> {
        let results: Vec<RowResult> = results.collect();
        let Task::Generate(generation) = &mut self.task else { return Vec::new() };
        if results.is_empty() {
            return Vec::new();
        }
        let others = generation.take_others().into_iter().zip(results);
        let forks = others.map(|(other, result)| {
            let (prompt, task) = (self.transcript.prompt().clone(), Task::Generate(Box::new(other)));
            let mut fork = Self {
                key: self.key.clone(),
                class: self.class,
                since: self.since,
                ..Self::new(self.origin.clone(), self.lease.clone(), prompt, task)
            };
            let outcome = fork.commit(0, std::iter::once(result), now);
            (fork, outcome)
        });
        forks.collect()
    }

    /// Takes the results of the span of the next `tokens` tokens, row by row, up to the one that ends the
    /// sequence. Returns the outcome if there is one.
    pub(crate) fn commit(
        &mut self,
        tokens: u32,
        results: impl Iterator<Item = RowResult>,
        now: Moment,
    ) -> Option<Result<Finish, Error>> {
        self.computed += tokens;
        let mut rows = 0;
        for result in results {
            rows += 1;
            match (&mut self.task, result) {
                (_, RowResult::NotFinite) => return Some(Err(Error::NonFiniteLogits)),
                // Only its context was asked for; the row says that it is sound.
                (Task::Generate(generation), RowResult::Token(..)) if generation.stopping.max_tokens == 0 => {
                    return Some(Ok(Finish::Length));
                }
                (Task::Generate(generation), RowResult::Token(token, logprobs)) => {
                    self.transcript.push(token);
                    let generated = count(self.transcript.generated().len());
                    if let Some(finish) = generation.take(token, logprobs, generated, now) {
                        return Some(Ok(finish));
                    }
                }
                (Task::Score(scoring), RowResult::Score(score)) => scoring.scores.push(Some(score)),
                (Task::Generate(_), RowResult::Score(_)) | (Task::Score(_), RowResult::Token(..)) => {
                    unreachable!("a row returns what was wanted of it")
                }
            }
        }
        match &self.task {
            Task::Generate(generation) if rows == 0 => generation.progress(self.computed),
            Task::Generate(_) => {}
            Task::Score(_) if self.pending() == 0 => return Some(Ok(Finish::Length)),
            Task::Score(_) => {}
        }
        None
    }

    /// Lets a worker find out what may follow the token that was drawn last.
    pub(crate) fn ask_mask(&mut self, workers: &mut MaskWorkers) {
        let Task::Generate(generation) = &mut self.task else { return };
        if let (Some(guide), Some(&token)) = (&mut generation.guide, self.transcript.generated().last()) {
            guide.take(token, &generation.reader, workers);
        }
    }

    /// Returns what is known of its next token, of which its grammar decides.
    pub(crate) fn mask(&self) -> Mask {
        self.guide().map_or(Mask::Late, Guide::mask)
    }

    /// Looks for what it may draw, and waits for it at most for `wait`.
    pub(crate) fn settle_mask(&mut self, wait: Duration) {
        self.guide_mut().into_iter().for_each(|guide| guide.settle(wait));
    }

    /// Looks for what it may draw. What takes longer than `limit` fails.
    pub(crate) fn look_for_mask(&mut self, now: Moment, limit: Duration) {
        self.guide_mut().into_iter().for_each(|guide| guide.look(now, limit));
    }

    /// Returns whether steps go on without it until it is known what it may draw; with `is_strict` no step
    /// begins before.
    pub(crate) fn waits_for_mask(&self, is_strict: bool) -> bool {
        self.guide().is_some_and(|guide| guide.waits(is_strict))
    }

    fn guide(&self) -> Option<&Guide> {
        match &self.task {
            Task::Generate(generation) => generation.guide.as_ref(),
            Task::Score(_) => None,
        }
    }

    fn guide_mut(&mut self) -> Option<&mut Guide> {
        match &mut self.task {
            Task::Generate(generation) => generation.guide.as_mut(),
            Task::Score(_) => None,
        }
    }

    /// Takes in that the span of the next `tokens` tokens has run, and the last one has to again: nothing was
    /// drawn after it.
    pub(crate) fn run_again(&mut self, tokens: u32) {
        self.computed += tokens - 1;
    }

    /// Ends at an output that is whole by its grammar, or at an error of the grammar: the span of the next
    /// `tokens` tokens has run, and nothing is drawn after it.
    pub(crate) fn commit_end(&mut self, tokens: u32, end: Result<(), Error>) -> Result<Finish, Error> {
        self.computed += tokens;
        match (&mut self.task, end) {
            (_, Err(error)) => Err(error),
            (Task::Generate(generation), Ok(())) => Ok(generation.complete()),
            (Task::Score(_), Ok(())) => unreachable!("a score obeys no grammar"),
        }
    }

    /// Sends what there is to send, if the channel has room.
    pub(crate) fn flush(&mut self, now: Moment) {
        if let Task::Generate(generation) = &mut self.task {
            generation.flush(now);
        }
    }

    /// Gives the lease up, and tells its caller the outcome.
    pub(crate) fn end(self, outcome: Result<Finish, Error>, now: Moment) {
        drop(self.lease);
        match self.task {
            Task::Generate(generation) => {
                generation.end(outcome, self.transcript.into_generated(), self.origin.arrived, now);
            }
            Task::Score(scoring) => scoring.end(outcome),
        }
    }
}
