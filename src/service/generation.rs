//! A running generation: owns the engine's events and the session's turn. Dropping it stops the work before
//! the next launch and rolls the turn back; nothing else has to be cleaned up. The edge commits the turn once
//! the answer is on its way.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Sleep;

use super::Service;
use super::answer::Answer;
use super::choices::{Choice, ChoiceCounts, Streams, best};
use super::demand::ThinksFirst;
use super::event::{
    CallPart, ChoiceFinished, Event, Finished, OutputDelta, Started, TokenLogprob, TokenLogprobs, Usage,
};
use super::format::OutputOptions;
use super::history::text_of;
use super::sampling::Resolved;
use super::saves::Saves;
use super::sessions::{Turn, or_session_deleted};
use crate::count::count;
use crate::engine::{
    Constraint, Delta, Finish, GenerateEvent, GenerateWork, Generated, KeepAlive, Reading, WorkOrigin,
};
use crate::error::Error;
use crate::grammar::Source;
use crate::hub::ModelAssets;
use crate::output::{Format, Piece};
use crate::prompt::Prompt;
use crate::residency::ModelLease;
use crate::session::{
    AnswerForms, AnswerStart, HistoryOutcome, Message, TurnContent, chat_text, joined, messages_bytes,
    tokens_bytes,
};
use crate::text::Detokenizer;

/// A generation that can be handed to the engine.
pub(super) struct Prepared {
    pub(super) origin: WorkOrigin,
    pub(super) assets: Arc<ModelAssets>,
    pub(super) context: Context,
    pub(super) resolved: Resolved,
    /// What the answers obey.
    pub(super) constraint: Option<Constraint>,
    pub(super) output: OutputOptions,
    pub(super) turn: Option<Turn>,
    pub(super) keep_alive: Option<KeepAlive>,
    pub(super) choices: ChoiceCounts,
}

/// The prompt a generation runs on, and what its turn adds to the session.
pub(super) struct Context {
    pub(super) prompt: Prompt,
    pub(super) adds: Adds,
    /// What became of the session's tokens; None if there were none.
    pub(super) outcome: Option<HistoryOutcome>,
    /// Turns the output into the text that follows the prompt's.
    pub(super) detokenizer: Detokenizer,
    /// How that text is read; None where all of it is text, and once the engine has it.
    pub(super) reading: Option<Box<Reading>>,
    /// How the tool calls in it are written, and how many the conversation has before them.
    pub(super) calls: Option<(Format, u64)>,
    /// What its session will know of how it was written.
    pub(super) forms: AnswerForms,
    /// The reasoning that comes before the answer; None if none does, and once a grammar knows of it.
    pub(super) thinks_first: Option<ThinksFirst>,
    /// The grammar of the calls that it has to make; None once it is compiled.
    pub(super) demanded: Option<Source>,
}

/// A turn's additions to its session besides the answer.
pub(super) enum Adds {
    Raw,
    Chat {
        messages: Vec<Message>,
        /// The text of the prompt, where it is known.
        text: Option<String>,
    },
}

impl Prepared {
    /// Returns the text of an output as it was generated, and that of the token that ended it.
    fn texts(&self, finish: Finish, generated: &[u32]) -> (String, String) {
        let ends = match finish {
            Finish::StopToken | Finish::ToolCalls => &self.resolved.stopping.stop_token_ids[..],
            Finish::StopString(_) | Finish::Complete | Finish::Length => &[],
        };
        let (output, ending) = match generated.split_last() {
            Some((last, before)) if ends.contains(last) => (before, text_of(&self.assets.tokenizer, *last)),
            Some(_) | None => (generated, String::new()),
        };
        let mut detokenizer = self.context.detokenizer.clone();
        let mut text: String = output.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(&detokenizer.finish());
        (text, ending)
    }
}

impl Context {
    /// Returns an id for the call of this number in the output.
    fn call_id(&self, name: &str, index: u32) -> String {
        let (format, before) = self.calls.unwrap_or((Format::Hermes, 0));
        format.call_id(name, before + u64::from(index), rand::random())
    }

    /// Returns the bytes that a session would keep of it, besides the answer.
    pub(super) fn kept_bytes(&self) -> usize {
        let tokens = tokens_bytes(self.prompt.len());
        match &self.adds {
            Adds::Raw => tokens,
            Adds::Chat { messages, text } => {
                tokens + text.as_ref().map_or(0, String::len) + messages_bytes(messages)
            }
        }
    }
}

/// A generation that the engine has admitted.
pub struct Generation {
    prepared: Prepared,
    events: Streams,
    /// The first event, which [`Self::start`] waited for.
    first: Option<(usize, GenerateEvent)>,
    /// Events that have come of it and are not read.
    ready: VecDeque<Event>,
    choices: Vec<Choice>,
    /// Bytes of output that is held, and the limit of them.
    held_bytes: usize,
    held_bytes_max: usize,
    deadline: Option<Pin<Box<Sleep>>>,
    cached_tokens: u32,
    queue_time: Duration,
    /// What the output says so far; kept for a session only.
    answer: Answer,
    /// The ids of the calls in it.
    call_ids: Vec<String>,
    /// Time that an outcome may stay unread.
    slow_reader: Duration,
    saves: Saves,
    /// Whether all choices have ended.
    is_over: bool,
}

impl Generation {
    /// Hands a prepared request and its lease to the engine; returns once the engine has admitted it.
    pub(super) async fn start(
        service: &Service,
        mut prepared: Prepared,
        lease: ModelLease,
    ) -> Result<Self, Error> {
        let slow_reader = service.engine.settings().slow_reader;
        let until = |deadline| Box::pin(tokio::time::sleep(deadline - service.clock.now()));
        let drawn = prepared.choices.drawn;
        let mut generation = Self {
            events: submit(service, &mut prepared, lease).await?,
            first: None,
            ready: VecDeque::new(),
            choices: (0..drawn).map(|_| Choice::default()).collect(),
            held_bytes: 0,
            held_bytes_max: service.limits.answer_bytes_max,
            deadline: prepared.origin.deadline.map(until),
            prepared,
            cached_tokens: 0,
            queue_time: Duration::ZERO,
            answer: Answer::default(),
            call_ids: Vec::new(),
            slow_reader,
            saves: service.saves.clone(),
            is_over: false,
        };
        let first = generation.event().await?;
        if let (_, GenerateEvent::Ended(Err(error))) = first {
            return Err(error);
        }
        generation.first = Some(first);
        Ok(generation)
    }

    /// Returns the next event; none after the end. A session's turn is open until [`Self::commit`].
    ///
    /// # Errors
    /// The generation failed or was stopped; its session is as it was before the turn once `self` is dropped.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            if self.is_over {
                return Ok(None);
            }
            let (choice, event) = match self.first.take() {
                Some(event) => event,
                None => self.event().await?,
            };
            match event {
                GenerateEvent::Started { cached_tokens, queue_time } => {
                    (self.cached_tokens, self.queue_time) = (cached_tokens, queue_time);
                    self.ready.push_back(Event::Started(self.started()));
                }
                GenerateEvent::Progress { done_tokens } => {
                    let total_tokens = self.prompt_tokens();
                    self.ready.push_back(Event::Progress { done_tokens, total_tokens });
                }
                GenerateEvent::Delta(delta) => self.take(choice, delta)?,
                GenerateEvent::Ended(outcome) => self.end(choice, outcome?),
            }
        }
    }

    /// Commits the session's turn, if there is one, after the last event, and waits until it is saved. Call
    /// it when that event can be delivered: what is not, is not part of the session. A caller who leaves
    /// while the turn is being saved has it in the session, like one who leaves while the event is on its
    /// way.
    ///
    /// # Errors
    /// The session was deleted, or the end was not read in time.
    pub async fn commit(&mut self) -> Result<(), Error> {
        let Some(ended) = self.choices[0].ended.as_ref().filter(|_| self.is_over) else { return Ok(()) };
        let Some(turn) = self.prepared.turn.take() else { return Ok(()) };
        let Generated { finish, tokens: generated, .. } = ended;
        let has_answer = self.prepared.resolved.has_answer();
        let content = match std::mem::replace(&mut self.prepared.context.adds, Adds::Raw) {
            Adds::Raw => TurnContent::Raw,
            Adds::Chat { messages, text } if !has_answer => {
                TurnContent::Chat { messages, text: text.map(Into::into), text_is_whole: true, answer: None }
            }
            Adds::Chat { mut messages, text } => {
                let (output, ending) = self.prepared.texts(*finish, generated);
                let answer = Some(AnswerStart {
                    tokens: self.prepared.context.prompt.len(),
                    text_bytes: text.as_ref().map(String::len),
                    ending_bytes: Some(ending.len()),
                    forms: std::mem::take(&mut self.prepared.context.forms),
                });
                let text = text.map(|text| chat_text(&text, &output, &ending));
                let ids = std::mem::take(&mut self.call_ids);
                messages.push(std::mem::take(&mut self.answer).into_message(ids));
                let text_is_whole = !matches!(finish, Finish::StopString(_));
                TurnContent::Chat { messages, text, text_is_whole, answer }
            }
        };
        let prompt = &self.prepared.context.prompt;
        let tokens = joined(&prompt.tokens, generated);
        let key = turn.key().clone();
        turn.commit(self.slow_reader, (tokens, self.prepared.assets.tokenizer_hash), content)?;
        self.saves.saved(&key).await;
        Ok(())
    }

    async fn event(&mut self) -> Result<(usize, GenerateEvent), Error> {
        let Self { events, deadline, prepared, .. } = self;
        let next = async {
            tokio::select! {
                biased;
                event = events.event() => event,
                () = resolved(deadline.as_mut().map(Pin::as_mut)) => Err(Error::Deadline),
            }
        };
        or_session_deleted(prepared.turn.as_mut(), next).await
    }

    fn prompt_tokens(&self) -> u32 {
        count(self.prepared.context.prompt.len())
    }

    fn started(&self) -> Started {
        Started {
            request: self.prepared.origin.request.clone(),
            model_revision: self.prepared.assets.files.revision.clone(),
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: self.cached_tokens,
            queue_time: self.queue_time,
            sampling: self.prepared.resolved.effective(),
            history: self.prepared.context.outcome,
        }
    }

    /// Takes output of a choice. It is held until the best are known where the best are asked for.
    fn take(&mut self, number: usize, delta: Delta) -> Result<(), Error> {
        let Delta { text, reasoning, calls, tokens, logprobs } = delta;
        let calls = self.call_parts(calls);
        let choice = &mut self.choices[number];
        choice.logprob += logprobs.iter().map(|token| f64::from(token.chosen.1)).sum::<f64>();
        if self.prepared.turn.is_some() {
            self.answer.add_reasoning(&reasoning);
            self.answer.add_text(&text);
        }
        let output = self.prepared.output;
        let tokenizer = &self.prepared.assets.tokenizer;
        let logprobs = logprobs.iter().filter(|_| output.top_logprobs.is_some());
        let logprobs = logprobs.map(|token| TokenLogprobs {
            chosen: TokenLogprob::new(tokenizer, token.chosen),
            top: TokenLogprob::list(tokenizer, &token.top),
        });
        let delta = OutputDelta {
            choice: count(number),
            text,
            reasoning,
            calls,
            logprobs: logprobs.collect(),
            token_ids: if output.token_ids { tokens } else { Vec::new() },
        };
        if !self.prepared.choices.chooses() {
            self.ready.push_back(Event::Delta(delta));
            return Ok(());
        }
        self.held_bytes += delta.bytes();
        choice.held.append(delta);
        if self.held_bytes > self.held_bytes_max {
            return Err(Error::AnswerTooLarge { limit_bytes: self.held_bytes_max as u64 });
        }
        Ok(())
    }

    /// Notes how a choice ended, and what can be told now.
    fn end(&mut self, number: usize, generated: Generated) {
        self.choices[number].ended = Some(generated);
        self.is_over = self.choices.iter().all(|choice| choice.ended.is_some());
        let ChoiceCounts { returned, drawn } = self.prepared.choices;
        let mut first = 0;
        if self.prepared.choices.chooses() {
            if !self.is_over {
                return;
            }
            let best = best(&self.choices, returned);
            first = best[0];
            for (rank, number) in (0..).zip(best) {
                let held = std::mem::take(&mut self.choices[number].held);
                self.ready.push_back(Event::Delta(OutputDelta { choice: rank, ..held }));
                self.finish_choice(rank, number);
            }
        } else if drawn > 1 {
            self.finish_choice(count(number), number);
        }
        if self.is_over {
            let finished = self.finished(first);
            self.ready.push_back(Event::Finished(finished));
        }
    }

    /// Notes pieces of tool calls, gives those an id that the model gave none, and returns them as they are
    /// told.
    fn call_parts(&mut self, pieces: Vec<Piece>) -> Vec<CallPart> {
        let mut parts = Vec::with_capacity(pieces.len());
        for piece in pieces {
            // A session has one choice.
            let is_kept = self.prepared.turn.is_some();
            if is_kept {
                self.answer.add(&piece);
            }
            match piece {
                Piece::CallBegin { index, id, name } => {
                    let id = id.unwrap_or_else(|| self.prepared.context.call_id(&name, index));
                    if is_kept {
                        self.call_ids.truncate(index as usize);
                        self.call_ids.push(id.clone());
                    }
                    parts.push(CallPart::Begin { index, id, name });
                }
                Piece::CallArguments { index, fragment } => {
                    parts.push(CallPart::Arguments { index, fragment });
                }
                Piece::CallEnd { index } => parts.push(CallPart::End { index }),
                // It never ends, or another begins with its number.
                Piece::CallDropped { .. } | Piece::Text(_) | Piece::Reasoning(_) => {}
            }
        }
        parts
    }

    /// Tells the end of a choice, under the number that its caller knows.
    fn finish_choice(&mut self, choice: u32, number: usize) {
        let has_logprobs = self.prepared.output.top_logprobs.is_some() || self.prepared.choices.chooses();
        let ended = &self.choices[number];
        let Some(Generated { finish, tokens, .. }) = &ended.ended else { return };
        let finished = ChoiceFinished {
            choice,
            finish: *finish,
            stop_string: self.stop_string(*finish),
            completion_tokens: count(tokens.len()),
            seed: self.prepared.resolved.sampling.seed.wrapping_add(number as u64),
            mean_logprob: has_logprobs.then(|| ended.mean_logprob()),
        };
        self.ready.push_back(Event::ChoiceFinished(finished));
    }

    fn stop_string(&self, finish: Finish) -> String {
        let stop = match finish {
            Finish::StopString(index) => self.prepared.resolved.stopping.stop_strings.get(index).cloned(),
            Finish::StopToken | Finish::Complete | Finish::Length | Finish::ToolCalls => None,
        };
        stop.unwrap_or_default()
    }

    /// Returns the facts of all choices together; the choice `first` says how it ended.
    fn finished(&self, first: usize) -> Finished {
        let ended = || self.choices.iter().filter_map(|choice| choice.ended.as_ref());
        let tokens: usize = ended().map(|generated| generated.tokens.len()).sum();
        let begun = ended().map(|generated| generated.time_to_first_token).min().unwrap_or_default();
        let last = |generated: &Generated| generated.time_to_first_token + generated.decode_time;
        let usage = Usage {
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: self.cached_tokens,
            completion_tokens: count(tokens),
            reasoning_tokens: ended().map(|generated| generated.reasoning_tokens).sum(),
        };
        let finish = self.choices[first].ended.as_ref().map_or(Finish::Length, |generated| generated.finish);
        Finished {
            finish,
            stop_string: self.stop_string(finish),
            usage,
            queue_time: self.queue_time,
            time_to_first_token: begun,
            decode_time: ended().map(last).max().unwrap_or_default().saturating_sub(begun),
            total_time: ended().map(|generated| generated.total_time).max().unwrap_or_default(),
            session_token_count: self.prepared.turn.is_some().then(|| self.prompt_tokens() + count(tokens)),
        }
    }
}

async fn submit(service: &Service, prepared: &mut Prepared, lease: ModelLease) -> Result<Streams, Error> {
    let Prepared { origin, assets, context, resolved, constraint, output, turn, keep_alive, choices } =
        prepared;
    let (mut senders, streams) = Streams::new(choices.drawn);
    let others = senders.split_off(1);
    let Some(events) = senders.pop() else {
        return Err(Error::Internal("a request without a choice".into()));
    };
    // The best are known by them.
    let top_logprobs = output.top_logprobs.or(choices.chooses().then_some(0));
    let reading = context.reading.take();
    let turn = turn.as_mut().map(|turn| turn.tie(service.engine.settings().slow_reader));
    let work = GenerateWork {
        origin: WorkOrigin { turn, ..origin.clone() },
        model: lease,
        prompt: context.prompt.clone(),
        sampling: resolved.sampling.clone(),
        stopping: resolved.stopping.clone(),
        constraint: constraint.clone(),
        top_logprobs,
        tokenizer: assets.tokenizer.clone(),
        detokenizer: context.detokenizer.clone(),
        reading,
        keep_alive: *keep_alive,
        events,
        others,
    };
    service.engine.generate(work).await?;
    Ok(streams)
}

/// Waits for something that may be absent; then without end.
async fn resolved(something: Option<impl Future>) {
    match something {
        Some(something) => drop(something.await),
        None => std::future::pending().await,
    }
}
