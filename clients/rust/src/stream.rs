//! Streamed answers. Dropping a stream cancels its call, and the daemon stops the work before its next
//! launch. A stream that ends without its last event is an error, never a truncated answer.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Sleep, sleep_until};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Streaming;

use crate::address::Address;
use crate::call::Call;
use crate::error::{Error, Result};
use crate::v1::{
    ChoiceFinished, ExportSessionResponse, GenerateChoice, GenerateDelta, GenerateFinished, GenerateResponse,
    GenerateStarted, LoadModelResponse, StreamGenerateResponse, ToolCall, ToolCallDelta,
    WatchSessionsResponse, export_session_response, load_model_response, stream_generate_response,
    watch_sessions_response,
};

/// The events of a generation: `Started`, `Progress`, `Delta` …, one `Finished`. Each of several choices ends
/// with `ChoiceFinished`.
pub type GenerateStream = EventStream<StreamGenerateResponse>;

/// The events of a load: `Progress` …, then one `Loaded`, or `Validated` for a dry run.
pub type LoadStream = EventStream<LoadModelResponse>;

/// A session's file: `Chunk` …, then one `Finished`.
pub type ExportStream = EventStream<ExportSessionResponse>;

/// What becomes of sessions: `Change` …, among them one `Ready`. It has no last event.
pub type WatchStream = EventStream<WatchSessionsResponse>;

/// A message that carries one event.
pub trait EventMessage: sealed::Sealed {
    /// The event.
    type Event;
    /// Name of the last event, for errors.
    const LAST: &'static str;
    /// Returns the event, `None` for a kind unknown to this client.
    fn into_event(self) -> Option<Self::Event>;
    /// Tells whether this is the last event.
    fn is_last(event: &Self::Event) -> bool;
}

mod sealed {
    pub trait Sealed: Unpin {}
    impl Sealed for super::StreamGenerateResponse {}
    impl Sealed for super::LoadModelResponse {}
    impl Sealed for super::ExportSessionResponse {}
    impl Sealed for super::WatchSessionsResponse {}
}

impl EventMessage for StreamGenerateResponse {
    type Event = stream_generate_response::Event;
    const LAST: &'static str = "finished event";

    fn into_event(self) -> Option<Self::Event> {
        self.event
    }

    fn is_last(event: &Self::Event) -> bool {
        matches!(event, stream_generate_response::Event::Finished(_))
    }
}

impl EventMessage for LoadModelResponse {
    type Event = load_model_response::Event;
    const LAST: &'static str = "loaded event";

    fn into_event(self) -> Option<Self::Event> {
        self.event
    }

    fn is_last(event: &Self::Event) -> bool {
        !matches!(event, load_model_response::Event::Progress(_))
    }
}

impl EventMessage for ExportSessionResponse {
    type Event = export_session_response::Event;
    const LAST: &'static str = "finished event";

    fn into_event(self) -> Option<Self::Event> {
        self.event
    }

    fn is_last(event: &Self::Event) -> bool {
        matches!(event, export_session_response::Event::Finished(_))
    }
}

impl EventMessage for WatchSessionsResponse {
    type Event = watch_sessions_response::Event;
    const LAST: &'static str = "end of the daemon";

    fn into_event(self) -> Option<Self::Event> {
        self.event
    }

    fn is_last(_: &Self::Event) -> bool {
        false
    }
}

/// A streamed answer. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "dropping the stream cancels the call"]
pub struct EventStream<M> {
    inner: Streaming<M>,
    request_id: String,
    address: Address,
    expiry: Option<Pin<Box<Sleep>>>,
    complete: bool,
    ended: bool,
}

impl<M: EventMessage> EventStream<M> {
    pub(crate) fn new(inner: Streaming<M>, call: Call) -> Self {
        let Call { request_id, deadline, address } = call;
        let expiry = deadline.map(|deadline| Box::pin(sleep_until(deadline)));
        Self { inner, request_id, address, expiry, complete: false, ended: false }
    }

    /// Id of the request in the daemon's log.
    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    fn is_expired(&mut self, context: &mut Context<'_>) -> bool {
        self.expiry.as_mut().is_some_and(|expiry| expiry.as_mut().poll(context).is_ready())
    }

    /// Returns the next event, `None` after the last one.
    ///
    /// # Errors
    /// The call failed, or ended before its last event.
    pub async fn next_event(&mut self) -> Result<Option<M::Event>> {
        self.next().await.transpose()
    }
}

impl GenerateStream {
    /// Reads the stream to its end; returns the remaining text and the last event.
    ///
    /// # Errors
    /// As [`EventStream::next_event`].
    pub async fn collect_text(mut self) -> Result<(String, GenerateFinished)> {
        use stream_generate_response::Event;
        let mut text = String::new();
        while let Some(event) = self.next_event().await? {
            match event {
                Event::Delta(delta) if delta.choice == 0 => text.push_str(&delta.text),
                Event::Finished(finished) => return Ok((text, finished)),
                Event::Started(_) | Event::Progress(_) | Event::Delta(_) | Event::ChoiceFinished(_) => {}
            }
        }
        Err(Error::Incomplete { missing: StreamGenerateResponse::LAST, request_id: self.request_id })
    }

    /// Reads the stream to its end; returns what it adds up to, as `Generate` gives it. A tool call that was
    /// cut off is left out.
    ///
    /// # Errors
    /// As [`EventStream::next_event`].
    pub async fn collect_response(mut self) -> Result<GenerateResponse> {
        use stream_generate_response::Event;
        let mut whole = GenerateResponse::default();
        let mut outputs: BTreeMap<u32, Output> = BTreeMap::new();
        while let Some(event) = self.next_event().await? {
            match event {
                Event::Started(started) => {
                    let GenerateStarted { request_id, model_revision, sampling, history, .. } = started;
                    whole = GenerateResponse { request_id, model_revision, sampling, history, ..whole };
                }
                Event::Progress(_) => {}
                Event::Delta(delta) => outputs.entry(delta.choice).or_default().add(delta),
                Event::ChoiceFinished(end) => outputs.entry(end.choice).or_default().end(end),
                Event::Finished(finished) => {
                    let GenerateFinished { finish_reason, stop_string, usage, timings, .. } = finished;
                    let session_token_count = finished.session_token_count;
                    let first = outputs.get(&0).map(|output| output.choice.clone()).unwrap_or_default();
                    let GenerateChoice { text, reasoning, tool_calls, token_ids, logprobs, .. } = first;
                    let several = outputs.into_values().filter(|output| output.has_ended);
                    return Ok(GenerateResponse {
                        text,
                        reasoning,
                        tool_calls,
                        token_ids,
                        logprobs,
                        finish_reason,
                        stop_string,
                        usage,
                        timings,
                        session_token_count,
                        choices: several.map(|output| output.choice).collect(),
                        ..whole
                    });
                }
            }
        }
        Err(Error::Incomplete { missing: StreamGenerateResponse::LAST, request_id: self.request_id })
    }
}

impl ToolCall {
    /// Adds the next part of a streamed call, or begins another one; returns the call if that ends it.
    pub fn add(&mut self, part: ToolCallDelta) -> Option<Self> {
        let ToolCallDelta { index: _, id, name, arguments_json, done } = part;
        if !name.is_empty() {
            *self = Self { id, name, arguments_json: String::new() };
        }
        self.arguments_json.push_str(&arguments_json);
        done.then(|| std::mem::take(self))
    }
}

/// The output of one choice so far.
#[derive(Default)]
struct Output {
    choice: GenerateChoice,
    /// The tool call that has begun.
    call: ToolCall,
    /// Whether its end came: it is one of several.
    has_ended: bool,
}

impl Output {
    fn add(&mut self, delta: GenerateDelta) {
        let GenerateDelta { text, token_ids, logprobs, reasoning, tool_calls, choice: _ } = delta;
        self.choice.text.push_str(&text);
        self.choice.reasoning.push_str(&reasoning);
        self.choice.token_ids.extend(token_ids);
        self.choice.logprobs.extend(logprobs);
        let whole = tool_calls.into_iter().filter_map(|part| self.call.add(part));
        self.choice.tool_calls.extend(whole);
    }

    fn end(&mut self, end: ChoiceFinished) {
        let ChoiceFinished { choice, finish_reason, stop_string, completion_tokens, seed, mean_logprob } =
            end;
        let output = std::mem::take(&mut self.choice);
        self.choice = GenerateChoice {
            choice,
            finish_reason,
            stop_string,
            completion_tokens,
            seed,
            mean_logprob,
            ..output
        };
        self.has_ended = true;
    }
}

impl ExportStream {
    /// Reads the rest of the file.
    ///
    /// # Errors
    /// As [`EventStream::next_event`].
    pub async fn collect_file(mut self) -> Result<Vec<u8>> {
        use export_session_response::Event;
        let mut file = Vec::new();
        while let Some(event) = self.next_event().await? {
            match event {
                Event::Chunk(bytes) => file.extend(bytes),
                Event::Finished(_) => return Ok(file),
            }
        }
        Err(Error::Incomplete { missing: ExportSessionResponse::LAST, request_id: self.request_id })
    }
}

impl<M: EventMessage> Stream for EventStream<M> {
    type Item = Result<M::Event>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        loop {
            let polled = Pin::new(&mut self.inner).poll_next(context);
            if polled.is_pending() && self.is_expired(context) {
                self.ended = true;
                return Poll::Ready(Some(Err(Error::deadline(&self.request_id))));
            }
            match ready!(polled) {
                Some(Ok(message)) => {
                    let Some(event) = message.into_event() else { continue };
                    self.complete |= M::is_last(&event);
                    return Poll::Ready(Some(Ok(event)));
                }
                Some(Err(status)) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(Error::from_status(
                        &status,
                        &self.request_id,
                        &self.address,
                    ))));
                }
                None => {
                    self.ended = true;
                    let request_id = self.request_id.clone();
                    let end = Error::Incomplete { missing: M::LAST, request_id };
                    return Poll::Ready((!self.complete).then_some(Err(end)));
                }
            }
        }
    }
}
