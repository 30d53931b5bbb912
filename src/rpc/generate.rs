//! A running generation: owns the engine's events and the session's turn. Dropping it stops the work before
//! the next launch and gives the turn up; there is nothing else to clean.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::Sleep;

use super::caller::Caller;
use super::convert;
use super::edge::Edge;
use super::pb::{self, stream_generate_response::Event};
use super::prepare::{Adds, Ask, Prepared, Turn, session_deleted};
use crate::engine::{
    Delta, EVENTS_BUFFERED_MAX, Finish, GenerateEvent, GenerateWork, Generated, TokenLogprobs,
};
use crate::error::Error;
use crate::ids::RequestId;
use crate::session::{Message, Role, TurnContent, chat_text};

/// A generation that the engine has taken.
pub(super) struct Generation {
    request: RequestId,
    prepared: Prepared,
    events: mpsc::Receiver<GenerateEvent>,
    /// Came already, while the start was watched.
    first: Option<GenerateEvent>,
    deadline: Option<Pin<Box<Sleep>>>,
    cached_tokens: u32,
    queue_time: Option<prost_types::Duration>,
    /// The output so far; kept for a session only.
    text: String,
    ended: bool,
}

impl Generation {
    /// Prepares a request and hands it to the engine; returns when the engine has admitted it. A model that
    /// the engine lost since it was loaded is loaded once more.
    pub(super) async fn start(edge: &Arc<Edge>, caller: &Caller, ask: Ask) -> Result<Self, Error> {
        let prepared = ask.prepare(edge, caller).await?;
        let deadline = caller.deadline.map(|deadline| Box::pin(tokio::time::sleep(edge.until(deadline))));
        let mut generation = Self {
            request: caller.request.clone(),
            events: submit(edge, caller, &prepared)?,
            prepared,
            first: None,
            deadline,
            cached_tokens: 0,
            queue_time: None,
            text: String::new(),
            ended: false,
        };
        let mut first = generation.event().await?;
        if let GenerateEvent::Ended(Err(Error::ModelUnloaded(model) | Error::ModelNotLoaded(model))) = &first
        {
            edge.resident.remove(model);
            let assets = edge.ensure_loaded(model).await?;
            if assets.revision != generation.prepared.assets.revision {
                // The tokens were made for other files.
                return Err(Error::ModelUnloaded(model.clone()));
            }
            generation.events = submit(edge, caller, &generation.prepared)?;
            first = generation.event().await?;
        }
        if let GenerateEvent::Ended(Err(error)) = first {
            return Err(error);
        }
        generation.first = Some(first);
        Ok(generation)
    }

    /// What happens next, as the caller is told; none after the end.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, Error> {
        if self.ended {
            return Ok(None);
        }
        let event = match self.first.take() {
            Some(event) => event,
            None => self.event().await?,
        };
        Ok(Some(match event {
            GenerateEvent::Started { cached_tokens, queue_time } => {
                self.cached_tokens = cached_tokens;
                self.queue_time = convert::duration(queue_time);
                Event::Started(self.started())
            }
            GenerateEvent::Progress { done_tokens } => {
                Event::Progress(pb::PrefillProgress { done_tokens, total_tokens: self.prompt_tokens() })
            }
            GenerateEvent::Delta(delta) => Event::Delta(self.delta(delta)),
            GenerateEvent::Ended(outcome) => {
                self.ended = true;
                Event::Finished(self.finished(outcome?)?)
            }
        }))
    }

    async fn event(&mut self) -> Result<GenerateEvent, Error> {
        let Self { events, deadline, prepared, .. } = self;
        let stopped = prepared.turn.as_mut().map(|turn| &mut turn.stopped);
        tokio::select! {
            biased;
            // An end without a word is an end of the engine.
            event = events.recv() => event.ok_or(Error::EngineDead),
            () = resolved(stopped) => Err(session_deleted()),
            () = resolved(deadline.as_mut().map(Pin::as_mut)) => Err(Error::Deadline),
        }
    }

    fn prompt_tokens(&self) -> u32 {
        convert::count(self.prepared.tokens.len())
    }

    fn started(&self) -> pb::GenerateStarted {
        pb::GenerateStarted {
            request_id: self.request.to_string(),
            model_revision: self.prepared.assets.revision.clone(),
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: self.cached_tokens,
            queue_time: self.queue_time,
            sampling: Some(self.prepared.resolved.effective()),
        }
    }

    fn delta(&mut self, delta: Delta) -> pb::GenerateDelta {
        let Delta { text, tokens, logprobs } = delta;
        if self.prepared.turn.is_some() {
            self.text.push_str(&text);
        }
        let output = self.prepared.output;
        let tokenizer = &self.prepared.assets.tokenizer;
        let logprobs = logprobs.iter().filter(|_| output.top_logprobs.is_some());
        pb::GenerateDelta {
            text,
            token_ids: if output.token_ids { tokens } else { Vec::new() },
            logprobs: logprobs
                .map(|token: &TokenLogprobs| convert::token_logprobs(tokenizer, token))
                .collect(),
        }
    }

    /// Keeps the session's turn, then says how it ended.
    fn finished(&mut self, generated: Generated) -> Result<pb::GenerateFinished, Error> {
        let Generated { finish, tokens, time_to_first_token, decode_time, total_time } = generated;
        let usage = pb::Usage {
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: self.cached_tokens,
            completion_tokens: convert::count(tokens.len()),
        };
        let session_token_count = match self.prepared.turn.take() {
            Some(turn) => Some(convert::count(self.commit(turn, finish, &tokens)?)),
            None => None,
        };
        let (finish_reason, stop_string) =
            convert::finish(finish, &self.prepared.resolved.stopping.stop_strings);
        Ok(pb::GenerateFinished {
            finish_reason: finish_reason.into(),
            stop_string,
            usage: Some(usage),
            timings: Some(pb::Timings {
                queue_time: self.queue_time,
                time_to_first_token: convert::duration(time_to_first_token),
                decode_time: convert::duration(decode_time),
                total_time: convert::duration(total_time),
            }),
            session_token_count,
        })
    }

    fn commit(&mut self, turn: Turn, finish: Finish, generated: &[u32]) -> Result<usize, Error> {
        let Turn { guard, adds, stopped: _ } = turn;
        let content = match adds {
            Adds::Raw => TurnContent::Raw,
            Adds::Chat { mut messages, rendered } => {
                let ending = match (finish, generated.last()) {
                    (Finish::StopToken, Some(last)) => self.prepared.assets.tokenizer.token_bytes(*last),
                    (Finish::StopToken | Finish::StopString(_) | Finish::Length, _) => Vec::new(),
                };
                let text = chat_text(&rendered, &self.text, &String::from_utf8_lossy(&ending));
                messages.push(Message::text(Role::Assistant, std::mem::take(&mut self.text)));
                let text_is_whole = !matches!(finish, Finish::StopString(_));
                TurnContent::Chat { messages, text, text_is_whole }
            }
        };
        let mut tokens = std::mem::take(&mut self.prepared.tokens);
        tokens.extend(generated);
        guard.commit(tokens, content)
    }
}

fn submit(edge: &Edge, caller: &Caller, prepared: &Prepared) -> Result<mpsc::Receiver<GenerateEvent>, Error> {
    let (events, receiver) = mpsc::channel(EVENTS_BUFFERED_MAX);
    let Prepared { assets, tokens, resolved, output, priority, turn } = prepared;
    edge.engine.generate(GenerateWork {
        origin: caller.origin(turn.as_ref().map(|turn| turn.guard.key().clone()), *priority),
        model: assets.name.clone(),
        prompt: tokens.clone().into(),
        sampling: resolved.sampling.clone(),
        stopping: resolved.stopping.clone(),
        top_logprobs: output.top_logprobs,
        tokenizer: assets.tokenizer.clone(),
        events,
    })?;
    Ok(receiver)
}

/// Waits for something that may not be there; then for ever.
async fn resolved(something: Option<impl Future>) {
    match something {
        Some(something) => drop(something.await),
        None => std::future::pending().await,
    }
}
