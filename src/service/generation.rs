//! A running generation: owns the engine's events and the session's turn. Dropping it stops the work before
//! the next launch and rolls the turn back; nothing else has to be cleaned up. The edge commits the turn once
//! the answer is on its way.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Sleep;

use super::Service;
use super::event::{Event, Finished, OutputDelta, Started, TokenLogprob, TokenLogprobs, Usage};
use super::history::text_of;
use super::request::OutputOptions;
use super::sampling::Resolved;
use super::saves::Saves;
use super::sessions::{Turn, or_session_deleted};
use crate::count::count;
use crate::engine::{
    Delta, EVENTS_BUFFERED_MAX, Finish, GenerateEvent, GenerateWork, Generated, KeepAlive, WorkOrigin,
};
use crate::error::Error;
use crate::hub::ModelAssets;
use crate::prompt::Prompt;
use crate::residency::ModelLease;
use crate::session::{
    AnswerStart, HistoryOutcome, Message, Role, TurnContent, chat_text, joined, messages_bytes, tokens_bytes,
};
use crate::text::Detokenizer;

/// A generation that can be handed to the engine.
pub(super) struct Prepared {
    pub(super) origin: WorkOrigin,
    pub(super) assets: Arc<ModelAssets>,
    pub(super) context: Context,
    pub(super) resolved: Resolved,
    pub(super) output: OutputOptions,
    pub(super) turn: Option<Turn>,
    pub(super) keep_alive: Option<KeepAlive>,
}

/// The prompt a generation runs on, and what its turn adds to the session.
pub(super) struct Context {
    pub(super) prompt: Prompt,
    pub(super) adds: Adds,
    /// What became of the session's tokens; None if there were none.
    pub(super) outcome: Option<HistoryOutcome>,
    /// Turns the output into the text that follows the prompt's.
    pub(super) detokenizer: Detokenizer,
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

impl Context {
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
    events: mpsc::Receiver<GenerateEvent>,
    /// The first event, which [`Self::start`] waited for.
    first: Option<GenerateEvent>,
    deadline: Option<Pin<Box<Sleep>>>,
    cached_tokens: u32,
    queue_time: Duration,
    /// The output so far; kept for a session only.
    text: String,
    /// Time that an outcome may stay unread.
    slow_reader: Duration,
    saves: Saves,
    /// How it ended, and its tokens; set by the last event.
    ended: Option<(Finish, Vec<u32>)>,
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
        let mut generation = Self {
            events: submit(service, &mut prepared, lease).await?,
            first: None,
            deadline: prepared.origin.deadline.map(until),
            prepared,
            cached_tokens: 0,
            queue_time: Duration::ZERO,
            text: String::new(),
            slow_reader,
            saves: service.saves.clone(),
            ended: None,
        };
        let first = generation.event().await?;
        if let GenerateEvent::Ended(Err(error)) = first {
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
        if self.ended.is_some() {
            return Ok(None);
        }
        let event = match self.first.take() {
            Some(event) => event,
            None => self.event().await?,
        };
        Ok(Some(match event {
            GenerateEvent::Started { cached_tokens, queue_time } => {
                (self.cached_tokens, self.queue_time) = (cached_tokens, queue_time);
                Event::Started(self.started())
            }
            GenerateEvent::Progress { done_tokens } => {
                Event::Progress { done_tokens, total_tokens: self.prompt_tokens() }
            }
            GenerateEvent::Delta(delta) => Event::Delta(self.delta(delta)),
            GenerateEvent::Ended(outcome) => Event::Finished(self.finished(outcome?)),
        }))
    }

    /// Commits the session's turn, if there is one, after the last event, and waits until it is saved. Call
    /// it when that event can be delivered: what is not, is not part of the session. A caller who leaves
    /// while the turn is being saved has it in the session, like one who leaves while the event is on its
    /// way.
    ///
    /// # Errors
    /// The session was deleted, or the end was not read in time.
    pub async fn commit(&mut self) -> Result<(), Error> {
        let (Some((finish, generated)), Some(turn)) = (&self.ended, self.prepared.turn.take()) else {
            return Ok(());
        };
        let has_answer = self.prepared.resolved.has_answer();
        let Context { prompt, adds, .. } = &mut self.prepared.context;
        let content = match std::mem::replace(adds, Adds::Raw) {
            Adds::Raw => TurnContent::Raw,
            Adds::Chat { messages, text } if !has_answer => {
                TurnContent::Chat { messages, text: text.map(Into::into), text_is_whole: true, answer: None }
            }
            Adds::Chat { mut messages, text } => {
                let text_bytes = text.as_ref().map(String::len);
                let answer = Some(AnswerStart { tokens: prompt.len(), text_bytes });
                let ending = match (finish, generated.last()) {
                    (Finish::StopToken, Some(last)) => text_of(&self.prepared.assets.tokenizer, *last),
                    (Finish::StopToken | Finish::StopString(_) | Finish::Length, _) => String::new(),
                };
                let text = text.map(|text| chat_text(&text, &self.text, &ending));
                messages.push(Message::text(Role::Assistant, std::mem::take(&mut self.text)));
                let text_is_whole = !matches!(finish, Finish::StopString(_));
                TurnContent::Chat { messages, text, text_is_whole, answer }
            }
        };
        let tokens = joined(&prompt.tokens, generated);
        let key = turn.key().clone();
        turn.commit(self.slow_reader, (tokens, self.prepared.assets.tokenizer_hash), content)?;
        self.saves.saved(&key).await;
        Ok(())
    }

    async fn event(&mut self) -> Result<GenerateEvent, Error> {
        let Self { events, deadline, prepared, .. } = self;
        let next = async {
            tokio::select! {
                biased;
                // The engine always sends an end; without one it is dead.
                event = events.recv() => event.ok_or(Error::EngineDead),
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

    fn delta(&mut self, delta: Delta) -> OutputDelta {
        let Delta { text, tokens, logprobs } = delta;
        if self.prepared.turn.is_some() {
            self.text.push_str(&text);
        }
        let output = self.prepared.output;
        let tokenizer = &self.prepared.assets.tokenizer;
        let logprobs = logprobs.iter().filter(|_| output.top_logprobs.is_some());
        let logprobs = logprobs.map(|token| TokenLogprobs {
            chosen: TokenLogprob::new(tokenizer, token.chosen),
            top: TokenLogprob::list(tokenizer, &token.top),
        });
        OutputDelta {
            text,
            logprobs: logprobs.collect(),
            token_ids: if output.token_ids { tokens } else { Vec::new() },
        }
    }

    /// Notes how it ended, and returns the facts.
    fn finished(&mut self, generated: Generated) -> Finished {
        let Generated { finish, tokens, time_to_first_token, decode_time, total_time } = generated;
        let usage = Usage {
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: self.cached_tokens,
            completion_tokens: count(tokens.len()),
        };
        let session_token_count =
            self.prepared.turn.is_some().then(|| count(self.prepared.context.prompt.len() + tokens.len()));
        let stop_string = match finish {
            Finish::StopString(index) => self.prepared.resolved.stopping.stop_strings.get(index).cloned(),
            Finish::StopToken | Finish::Length => None,
        };
        self.ended = Some((finish, tokens));
        Finished {
            finish,
            stop_string: stop_string.unwrap_or_default(),
            usage,
            queue_time: self.queue_time,
            time_to_first_token,
            decode_time,
            total_time,
            session_token_count,
        }
    }
}

async fn submit(
    service: &Service,
    prepared: &mut Prepared,
    lease: ModelLease,
) -> Result<mpsc::Receiver<GenerateEvent>, Error> {
    let (events, receiver) = mpsc::channel(EVENTS_BUFFERED_MAX);
    let Prepared { origin, assets, context, resolved, output, turn, keep_alive } = prepared;
    let turn = turn.as_mut().map(|turn| turn.tie(service.engine.settings().slow_reader));
    let work = GenerateWork {
        origin: WorkOrigin { turn, ..origin.clone() },
        model: lease,
        prompt: context.prompt.clone(),
        sampling: resolved.sampling.clone(),
        stopping: resolved.stopping.clone(),
        top_logprobs: output.top_logprobs,
        tokenizer: assets.tokenizer.clone(),
        detokenizer: context.detokenizer.clone(),
        keep_alive: *keep_alive,
        events,
    };
    service.engine.generate(work).await?;
    Ok(receiver)
}

/// Waits for something that may be absent; then without end.
async fn resolved(something: Option<impl Future>) {
    match something {
        Some(something) => drop(something.await),
        None => std::future::pending().await,
    }
}
